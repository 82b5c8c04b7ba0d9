//! Pipelines as text: what is understood, and what is refused and where.

#[expect(dead_code, reason = "every test program uses a part of it")]
mod harness;

use quantc_ir::module::Module;
use quantc_ir::target::Backend;
use quantc_ir::ty::ElemTy;
use quantc_passes::Registry;
use quantc_passes::pass::prelude::*;
use quantc_passes::pipeline::{check, parse};

quantc_passes::pass! {
    /// Pretends to measure the largest magnitudes.
    "measure" => pub struct Measure {
        /// What to measure.
        what: Vec<String> = vec!["absmax".into()],
    }
    scope: Layer, numerics: Exact, stats: keeps
}

impl Pass for Measure {
    fn run(&self, _: &mut PassCx<'_>) -> Result<Changed> {
        Ok(Changed::No)
    }
    fn provides(&self) -> Vec<Fact> {
        let known = ["absmax", "hessian"].into_iter();
        known.filter(|k| self.what.iter().any(|w| w == k)).map(Fact::Stat).collect()
    }
    fn validate(&self) -> Result<()> {
        match self.what.iter().find(|w| !["absmax", "hessian"].contains(&w.as_str())) {
            Some(what) => Err(Diag::pipeline(format!("there is no statistic `{what}`"))),
            None => Ok(()),
        }
    }
}

quantc_passes::pass! {
    /// Pretends to use the largest magnitudes.
    "smooth" => pub struct Smooth {
        /// How much.
        alpha: f32 = 0.5,
        /// Weights left alone.
        skip: Vec<Pattern> = vec![],
    }
    needs: [stat(absmax)],
    scope: Layer, numerics: Reassociates, stats: drops
}

impl Pass for Smooth {
    fn run(&self, _: &mut PassCx<'_>) -> Result<Changed> {
        Ok(Changed::Yes)
    }
    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::all("skip", &self.skip, NameKind::Weight)
    }
}

quantc_passes::pass! {
    /// Pretends to leave products of a type behind.
    "narrow" => pub struct Narrow {
        /// The scheme of activations.
        to: quantc_ir::scheme::Scheme = quantc_ir::ops::DYNAMIC_INT8,
    }
    needs: [target, layers],
    scope: Module, numerics: Requantizes, stats: drops
}

impl Pass for Narrow {
    fn run(&self, _: &mut PassCx<'_>) -> Result<Changed> {
        Ok(Changed::Yes)
    }
    fn emits(&self) -> Vec<(ElemTy, ElemTy)> {
        vec![(ElemTy::Q(self.to), ElemTy::F32)]
    }
}

fn registry() -> Registry {
    Registry::builtin().with(Measure::INFO).with(Smooth::INFO).with(Narrow::INFO)
}

const MODULE: &str = "module @m
weight @l0.up : tensor<4x4xf32> = splat 1.0
weight @l0.down : tensor<4x4xf32> = splat 1.0
main (%x: tensor<?tx4xf32>) -> tensor<?tx4xf32> {
  %h = matmul %x, @l0.up
  %y = matmul %h, @l0.down
  return %y
}
";

/// What is said about a pipeline: the fully spelled text, or the problems.
fn said(module: &Module, text: &str, target: bool) -> String {
    let backend = target.then_some(&harness::TestBackend as &dyn Backend);
    let parsed = match parse(text) {
        Ok(parsed) => parsed,
        Err(problem) => return format!("error: {problem}"),
    };
    match check(&parsed, &registry(), module, target.then_some(&harness::TARGET), backend) {
        Ok(checked) => {
            let spelled = checked.to_string();
            let again = parse(&spelled).expect("what is printed parses");
            let again = check(&again, &registry(), module, target.then_some(&harness::TARGET), backend);
            assert_eq!(again.expect("what is printed checks").to_string(), spelled);
            spelled
        }
        Err(problems) => problems.to_string(),
    }
}

#[test]
fn problems_point_at_the_text() {
    let module = harness::module(MODULE).module;
    let texts = [
        // Syntax.
        "dedupe,",
        "dedupe drop-dead",
        "layers(dedupe",
        "dedupe)",
        "layers",
        "layers()",
        "smooth(dedupe)",
        "smooth{alpha=0.5",
        "smooth{alpha=\"}\"",
        // Names, options and their values.
        "dedup, fold-constants",
        "measure,\n  smoth{alpha=0.5},\n  dedupe",
        "measure, smooth{alhpa=0.5}",
        "measure, smooth{alpha=much}",
        "measure{what=[absmax, median]}",
        "measure, smooth{skip=[\"l0.dwon\"]}",
        // Needs.
        "dedupe, smooth",
        "measure{what=[hessian]}, smooth",
        "layers(measure, smooth), smooth",
        "layers(measure, repeat(smooth))",
        "narrow",
        // Structure.
        "layers(dedupe, drop-dead)",
        "layers(layers(dedupe))",
        // Several at once.
        "dedup, smooth{alpha}, nothing-like-it",
    ];
    let all: Vec<String> = texts.iter().map(|t| format!("> {t}\n{}\n", said(&module, t, false))).collect();
    insta::assert_snapshot!(all.join("\n"));
}

#[test]
fn sound_pipelines_print_fully_spelled() {
    let module = harness::module(MODULE).module;
    let texts = [
        "",
        "dedupe",
        " layers( dedupe,fold-constants ) , drop-dead ",
        "measure, smooth{alpha=0.75, skip=[l0.down]}",
        "repeat(dedupe, drop-dead)",
        "layers(repeat(dedupe))",
        "fold-constants{dequantize}",
    ];
    let all: Vec<String> = texts.iter().map(|t| format!("> {t}\n{}\n", said(&module, t, false))).collect();
    insta::assert_snapshot!(all.join("\n"));
}

#[test]
fn kernels_are_asked_for_before_anything_runs() {
    let module = harness::module(MODULE).module;
    let fine = said(&module, "outline-layers, narrow", true);
    assert_eq!(fine, "outline-layers, narrow{to=!q<int8:f32 token>}");
    insta::assert_snapshot!(said(&module, "outline-layers, narrow{to=!q<int4:f32 token>}", true));
}

#[test]
fn statistics_in_the_text_are_statistics() {
    let text = format!("{MODULE}{{-# calibration %h.absmax = [1.0] #-}}\n");
    let module = harness::module(&text).module;
    assert!(said(&module, "smooth", false).starts_with("layers(smooth{"));
    let stale = said(&module, "smooth, smooth", false);
    assert!(stale.contains("but `smooth` changes the values it was taken of"), "{stale}");
}

#[test]
fn deep_nesting_is_refused() {
    let text = "repeat(".repeat(100_000);
    let problem = parse(&text).expect_err("it is too deep");
    assert!(problem.message.starts_with("groups are nested too deeply"));
}
