//! The engine against the reference evaluator, layer by layer, each on the engine's own inputs.

use crate::failure::Outcome;
use crate::{output, subject};
use quantc_ir::diag::Diag;
use quantc_ir::entity::ValueId;
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::module::Module;
use quantc_ir::ops::{Call, Op};
use quantc_ir::weights::Store;
use quantc_runtime::session::{Session, SessionOptions, Step};
use serde::Serialize;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// Above this relative error a layer is said to disagree.
const LIMIT: f64 = 1e-4;

/// The same for layers that round activations to integers: where float sums differ in the last place a code may flip to
/// its neighbour, which is worth up to 1/127 of the largest element of its row.
const LIMIT_ROUNDED: f64 = 2e-2;

/// The same for layers that round activations to bf16, where a flip is worth up to 1/128 of one element.
const LIMIT_CAST: f64 = 4e-3;

/// How engine and evaluator compare.
#[derive(Clone, Debug, Serialize)]
pub struct Agreement {
    /// Tokens compared.
    tokens: usize,
    /// Layers in order with their relative error.
    layers: Vec<LayerError>,
    /// The largest error that counts as agreement.
    limit: f64,
}

/// One layer's error.
#[derive(Clone, Debug, Serialize)]
struct LayerError {
    layer: String,
    /// Euclidean norm of the difference over that of the reference.
    relative: f64,
    /// Largest absolute difference.
    largest: f64,
}

impl Agreement {
    fn worst(&self) -> f64 {
        self.layers.iter().map(|l| l.relative).fold(0.0, f64::max)
    }

    /// Whether engine and evaluator agree.
    pub fn holds(&self) -> bool {
        self.worst() <= self.limit
    }

    /// One line.
    pub fn verdict(&self) -> String {
        let word = if self.holds() { "with the reference" } else { "NOT with the reference" };
        format!("{word}: largest relative error of a layer {:.1e} on {} tokens", self.worst(), self.tokens)
    }

    /// A row for each layer.
    pub fn table(&self) -> String {
        let row = |l: &LayerError| {
            vec![l.layer.clone(), format!("{:.2e}", l.relative), format!("{:.2e}", l.largest)]
        };
        let rows: Vec<_> = self.layers.iter().map(row).collect();
        output::table(&["layer", "relative error", "largest difference"], &rows)
    }
}

/// Runs `tokens` tokens through both.
pub fn compare(engine: &Path, module: &Module, store: &Store, tokens: usize) -> Outcome<Agreement> {
    let engine = subject::open_engine(engine, false)?;
    let manifest = engine.manifest();
    let n = tokens.min(manifest.max_tokens as usize).min(manifest.max_rows as usize);
    let ids = u64::from(manifest.token_ids());
    let text: Vec<u32> = (0..n as u64).map(|i| ((i * 7919 + 13) % ids) as u32).collect();

    let mut got: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    let mut session =
        Session::new(engine.clone(), &SessionOptions { poison: true, ..SessionOptions::default() })?;
    let positions: Vec<u32> = (0..n as u32).collect();
    let step = Step { tokens: &text, positions: &positions, slots: &vec![0; n], rows: n };
    let logits = session.step_tapped(step, &mut |name, _, _, values| {
        got.insert(name.to_string(), values.to_vec());
    })?;
    got.insert("result".into(), logits.to_vec());

    let want = reference(module, store, &text, &got)?;
    let has = |op: fn(&Op) -> bool| module.graphs().any(|(_, graph)| graph.ops().any(|(_, n)| op(&n.op)));
    let limit = match (has(|op| matches!(op, Op::Quantize(_))), has(|op| matches!(op, Op::Cast(_)))) {
        (true, _) => LIMIT_ROUNDED,
        (false, true) => LIMIT_CAST,
        (false, false) => LIMIT,
    };
    let mut layers = vec![];
    for (layer, want) in want {
        let Some(got) = got.get(&layer) else { continue };
        let want = want.f32s()?;
        if want.len() != got.len() {
            return Err(
                Diag::bug(format!("@{layer} has {} values, expected {}", got.len(), want.len())).into()
            );
        }
        let (mut difference, mut norm, mut largest) = (0.0, 0.0, 0f64);
        for (&a, &b) in got.iter().zip(want) {
            let d = f64::from(a) - f64::from(b);
            difference += d * d;
            norm += f64::from(b) * f64::from(b);
            largest = if d.is_nan() { f64::INFINITY } else { largest.max(d.abs()) };
        }
        let relative =
            if largest.is_infinite() { f64::INFINITY } else { (difference / norm.max(1e-30)).sqrt() };
        layers.push(LayerError { layer, relative, largest });
    }
    Ok(Agreement { tokens: n, layers, limit })
}

/// The results of the calls of `main`, in order, and of `main` itself. Each layer is given what the engine `got` from
/// the layer before, so that its error is its own.
fn reference(
    module: &Module,
    store: &Store,
    text: &[u32],
    got: &BTreeMap<String, Vec<f32>>,
) -> Outcome<Vec<(String, Tensor)>> {
    let calls: BTreeMap<ValueId, String> = module
        .main
        .ops()
        .filter_map(|(_, node)| Some((node.result, node.op.is::<Call>()?.layer.clone())))
        .collect();
    let seen: RefCell<Vec<(String, Tensor)>> = RefCell::default();
    let tap = |function: &str, value: ValueId, tensor: &Tensor| {
        if let (true, Some(layer)) = (function == "main", calls.get(&value)) {
            seen.borrow_mut().push((layer.clone(), tensor.clone()));
        }
    };
    let n = text.len() as u64;
    let ids = Tensor::i32(&[n], text.iter().map(|&t| t as i32).collect())?;
    let types = Tensor::i32(&[n], vec![0; text.len()])?;
    let inputs: Vec<Tensor> = [ids, types].into_iter().take(module.main.params.len()).collect();
    let replace = |function: &str, value: ValueId| {
        let values = calls.get(&value).filter(|_| function == "main").and_then(|layer| got.get(layer))?;
        let extents =
            module.main.ty(value).shape.0.iter().map(|d| d.fixed().unwrap_or(n)).collect::<Vec<_>>();
        Tensor::f32(&extents, values.clone()).ok()
    };
    let mut evaluator = Evaluator::new(module, store)?.with_tap(&tap).with_replacement(&replace);
    let results = evaluator.step(&inputs, n)?;
    let mut seen = seen.into_inner();
    if let Some(result) = results.into_iter().next() {
        seen.push(("result".into(), result));
    }
    Ok(seen)
}
