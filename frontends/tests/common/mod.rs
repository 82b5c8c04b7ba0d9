//! Models of the repository, models beside it, and what both are known to compute.
#![allow(dead_code, reason = "each test uses a part of this")]

use quantc_frontends::{ImportOptions, Imported, import};
use quantc_ir::eval::{Evaluator, Tensor};
use quantc_ir::weights::Store;
use std::path::{Path, PathBuf};

/// The folder of a model that comes with the repository.
pub fn model_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models").join(name)
}

/// The folder of a model that does not, when the environment says where such models are.
pub fn outer_model_dir(name: &str) -> Option<PathBuf> {
    match std::env::var_os("QUANTC_MODELS") {
        Some(dir) => Some(Path::new(&dir).join(name)),
        None => {
            eprintln!("skipped: QUANTC_MODELS not set ({name})");
            None
        }
    }
}

/// A model in memory with its weights.
pub struct Loaded {
    pub store: Store,
    pub imported: Imported,
}

/// Imports a model that must be good.
pub fn load(dir: &Path) -> Loaded {
    let store = Store::in_memory();
    let imported = match import(dir, &store, &ImportOptions::default()) {
        Ok(imported) => imported,
        Err(problems) => panic!("{problems}"),
    };
    Loaded { store, imported }
}

impl Loaded {
    /// The first result of `main` on these inputs, all rows of it.
    pub fn eval(&self, inputs: &[Vec<i32>]) -> Vec<f32> {
        let mut evaluator = Evaluator::new(&self.imported.module, &self.store).unwrap();
        eval_with(&mut evaluator, inputs)
    }
}

/// One call of an evaluator.
pub fn eval_with(evaluator: &mut Evaluator<'_>, inputs: &[Vec<i32>]) -> Vec<f32> {
    let tensors: Vec<Tensor> =
        inputs.iter().map(|ids| Tensor::i32(&[ids.len() as u64], ids.clone()).unwrap()).collect();
    let out = evaluator.step(&tensors, inputs[0].len() as u64).unwrap_or_else(|e| panic!("{e}"));
    out[0].f32s().unwrap().to_vec()
}

/// Tensors of a file of known results.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn open(path: &Path) -> Golden {
        Golden(std::fs::read(path).unwrap())
    }

    /// Shape and elements of a float tensor.
    pub fn f32s(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let file = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let t = file.tensor(name).unwrap();
        assert_eq!(t.dtype(), safetensors::Dtype::F32, "{name}");
        let number = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap());
        (t.shape().to_vec(), t.data().chunks(4).map(number).collect())
    }

    /// Shape and elements of an integer tensor.
    pub fn ids(&self, name: &str) -> (Vec<usize>, Vec<i32>) {
        let file = safetensors::SafeTensors::deserialize(&self.0).unwrap();
        let t = file.tensor(name).unwrap();
        assert_eq!(t.dtype(), safetensors::Dtype::I64, "{name}");
        let number = |b: &[u8]| i32::try_from(i64::from_le_bytes(b.try_into().unwrap())).unwrap();
        (t.shape().to_vec(), t.data().chunks(8).map(number).collect())
    }

    /// A note of the file.
    pub fn note(&self, key: &str) -> Option<String> {
        let (_, header) = safetensors::SafeTensors::read_metadata(&self.0).unwrap();
        header.metadata().as_ref()?.get(key).cloned()
    }
}

/// The largest difference of two lists of numbers.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(!a.is_empty());
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) })
}
