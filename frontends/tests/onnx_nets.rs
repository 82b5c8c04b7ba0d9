//! Whole ONNX networks: import, evaluation by the reference evaluator, and the outputs recorded beside them.
//!
//! `QUANTC_ONNX_MODELS` names a folder of folders, each with `model.onnx` and `test_data_set_0/{input,output}_N.pb`, as
//! the ONNX model zoo has them. Without it the test says that it is skipped.

use quantc_frontends::onnx::{self, Options};
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::ops::Op;
use quantc_ir::verify::verify;
use quantc_ir::weights::Store;
use std::path::{Path, PathBuf};

/// Recorded tensors of a kind, in order.
fn recorded(dir: &Path, kind: &str) -> Vec<Tensor> {
    let path = |i: usize| dir.join(format!("test_data_set_0/{kind}_{i}.pb"));
    let found = (0..).map(path).take_while(|p| p.is_file());
    found.map(|p| onnx::read_tensor(&p).unwrap_or_else(|e| panic!("{e}"))).collect()
}

/// The largest difference, as a share of the largest recorded number, and the share of elements that are further apart
/// than 1e-4.
fn apart(got: &Tensor, want: &Tensor) -> (f64, f64) {
    assert_eq!(got.ty, want.ty);
    let (got, want) = (got.reals(), want.reals());
    let largest = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    let off: Vec<f64> = got.iter().zip(&want).map(|(g, w)| (g - w).abs() / largest).collect();
    let far = off.iter().filter(|&&d| d > 1e-4).count() as f64 / off.len() as f64;
    (off.iter().copied().fold(0.0, f64::max), far)
}

#[test]
fn recorded_networks() {
    let Some(folder) = std::env::var_os("QUANTC_ONNX_MODELS").map(PathBuf::from) else {
        println!("skipped: recorded_networks: QUANTC_ONNX_MODELS names no folder of networks");
        return;
    };
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder is readable")
        .map(|e| e.expect("readable").path())
        .collect();
    dirs.retain(|d| d.join("model.onnx").is_file());
    dirs.sort();
    assert!(!dirs.is_empty(), "{} has no networks", folder.display());
    for dir in dirs {
        let name = dir.file_name().expect("folders have names").to_string_lossy().into_owned();
        let inputs = recorded(&dir, "input");
        let path = dir.join("model.onnx");
        // Named extents are those of the recorded inputs; files without names for initializers list inputs first.
        let names = onnx::inputs(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        let shapes = names.into_iter().zip(&inputs).map(|(n, t)| (n, t.ty.shape.dims().unwrap())).collect();
        let options = Options { shapes, ..Options::default() };
        let store = Store::in_memory();
        let imported = onnx::import(&path, &store, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        verify(&imported.module).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut evaluator = Evaluator::new(&imported.module, &store).expect("there are no states");
        let outputs = evaluator.step(&inputs, u64::MAX).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (i, (got, want)) in outputs.iter().zip(recorded(&dir, "output")).enumerate() {
            let (most, far) = apart(got, &want);
            println!(
                "{name}: output {i} of type {}: {most:.2e} apart, {:.2} % further than 1e-4",
                got.ty,
                far * 100.0
            );
            // Where numbers are rounded to codes in between, sums in another order now and then round to the next code.
            let rounds = imported.module.main.ops().any(|(_, n)| matches!(n.op, Op::Quantize(_)));
            let fits = if rounds { far <= 0.01 && most <= 0.02 } else { most <= 1e-4 };
            assert!(fits, "{name}: output {i} is {most} apart, {far} of it further than 1e-4");
        }
    }
}
