//! What rounding costs on the bundled model: never more than a textbook implementation, whose figures are written here.
//!
//! By default a few rows on a quarter of the text; `QUANTC_FULL=1` scores every row on all of it.
#![cfg(feature = "llvm")]

mod common;

use common::{Recipe, full, models, number};

/// A way of rounding, with the mean divergence from the float model that a plain implementation has on the whole text.
struct Row {
    format: &'static str,
    group: &'static str,
    zero: &'static str,
    activations: bool,
    divergence: f64,
    /// Whether the short form of the test has it.
    short: bool,
}

const fn row(
    format: &'static str,
    group: &'static str,
    zero: &'static str,
    divergence: f64,
    short: bool,
) -> Row {
    Row { format, group, zero, activations: false, divergence, short }
}

const ROWS: &[Row] = &[
    row("int8", "row", "symmetric", 0.00018, true),
    Row { activations: true, ..row("int8", "row", "symmetric", 0.00132, true) },
    row("int4", "128", "symmetric", 0.04807, false),
    row("int4", "128", "asymmetric", 0.03524, true),
    row("int4", "64", "symmetric", 0.04061, false),
    row("int4", "64", "asymmetric", 0.03034, false),
    row("int4", "32", "symmetric", 0.03411, true),
    row("int4", "32", "asymmetric", 0.02352, false),
    row("int3", "32", "symmetric", 0.14341, false),
    row("int3", "32", "asymmetric", 0.10751, false),
    row("int2", "32", "asymmetric", 0.61189, true),
];

impl Row {
    /// All matrices but the head are rounded; the embedding and the head stay as they are.
    fn pipeline(&self) -> String {
        let Row { format, group, zero, .. } = self;
        let activations =
            if self.activations { "quantize-activations{format=int8, skip-layers=[head]}, " } else { "" };
        format!(
            "outline-layers, fold-constants, dedupe, \
             layers(round-to-nearest{{format={format}, group={group}, zero={zero}, skip-layers=[head]}}, \
             {activations}fuse-dequant-matmul, fuse-epilogue), drop-dead, pack-weights"
        )
    }
}

#[test]
fn rounding_costs_no_more_than_the_textbook() {
    let base = Recipe::preset(models("tales-3M"), "f32").built().path;
    let base = base.to_str().expect("UTF-8");
    // A quarter of the text is another sample: its figures lie a few percent off those of the whole.
    let (tokens, slack) = if full() { ("0", 1.05) } else { ("8176", 1.15) };
    let mut worse = vec![];
    for row in ROWS.iter().filter(|r| full() || r.short) {
        let built = Recipe::pipeline(models("tales-3M"), &row.pipeline()).built();
        let scores = built.eval(&models("tales_eval.txt"), &["--against", base, "--max-tokens", tokens]);
        let got = number(&scores, "kl_mean");
        let name = format!(
            "{} {} {}{}",
            row.format,
            row.group,
            row.zero,
            if row.activations { " w8a8" } else { "" }
        );
        let perplexity = number(&scores, "perplexity");
        eprintln!("{name}: divergence {got:.5}, textbook {:.5}, perplexity {perplexity:.4}", row.divergence);
        if got > row.divergence * slack {
            worse.push(format!("{name}: {got:.5}, textbook {:.5}", row.divergence));
        }
        assert!(built.disagreement() < 1e-4, "{name}: {}", built.disagreement());
    }
    assert!(worse.is_empty(), "{}", worse.join("\n"));
}

/// More bits, and smaller groups, never cost more.
#[test]
fn presets_are_ordered_by_what_they_keep() {
    let base = Recipe::preset(models("tales-3M"), "f32").built().path;
    let base = base.to_str().expect("UTF-8");
    let cost = |preset| {
        let built = Recipe::preset(models("tales-3M"), preset).built();
        let args = ["--against", base, "--max-tokens", "4088"];
        let got = number(&built.eval(&models("tales_eval.txt"), &args), "kl_mean");
        eprintln!("{preset}: divergence {got:.6}");
        got
    };
    let costs = ["bf16", "w8a16", "w8a8", "w4a16-g32", "w4a16-g128"].map(cost);
    assert!(costs.is_sorted(), "{costs:?}");
}
