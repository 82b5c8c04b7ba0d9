//! Arrays as an engine has them in memory, from tensors and back.

use super::mem_of;
use crate::nest::Mem;
use half::{bf16, f16};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::eval::{Data, Tensor};
use quantc_ir::ty::{ElemTy, TensorTy};
use quantc_runtime::format::Array;

/// The type that an engine says an array has.
pub fn ty_of(array: &Array) -> Result<TensorTy> {
    Ok(TensorTy::fixed(ElemTy::parse(&array.elem)?, &array.dims))
}

/// The bytes of a tensor, row after row.
pub fn to_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let mem = mem_of(tensor.ty.elem)?;
    let ints = |bytes: usize| -> Vec<u8> {
        tensor.ints().into_iter().flat_map(|x| x.to_le_bytes()[..bytes].to_vec()).collect()
    };
    Ok(match (&tensor.data, mem) {
        (Data::Codes(codes), _) => codes.clone(),
        (Data::F64(x), _) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (Data::F32(x), Mem::F16) => x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        (Data::F32(x), Mem::Bf16) => x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        (Data::F32(x), _) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        (Data::I32(_) | Data::I64(_), mem) => ints(mem.bytes() as usize),
    })
}

/// The tensor of a type that bytes hold.
pub fn from_bytes(ty: &TensorTy, bytes: &[u8]) -> Result<Tensor> {
    let mem = mem_of(ty.elem)?;
    let size = mem.bytes() as usize;
    if !bytes.len().is_multiple_of(size) {
        return Err(Diag::bug(format!("{} bytes for {ty}", bytes.len())));
    }
    let parts = || bytes.chunks_exact(size);
    let word = |b: &[u8]| -> u64 {
        let mut all = [0; 8];
        all[..b.len()].copy_from_slice(b);
        u64::from_le_bytes(all)
    };
    let floats = |f: &dyn Fn(u64) -> f32| parts().map(|b| f(word(b))).collect();
    match (ty.elem, mem) {
        (ElemTy::Q(_), _) => Tensor::codes(ty, bytes.to_vec()),
        (_, Mem::F64) => Tensor::new(ty, Data::F64(parts().map(|b| f64::from_bits(word(b))).collect())),
        (_, Mem::F32) => Tensor::new(ty, Data::F32(floats(&|w| f32::from_bits(w as u32)))),
        (_, Mem::F16) => Tensor::new(ty, Data::F32(floats(&|w| f16::from_bits(w as u16).to_f32()))),
        (_, Mem::Bf16) => Tensor::new(ty, Data::F32(floats(&|w| bf16::from_bits(w as u16).to_f32()))),
        (ElemTy::Int(int), _) => Tensor::from_ints(ty, parts().map(|b| int.wrap(word(b).into()))),
        _ => Err(Diag::bug(format!("bytes for {ty}"))),
    }
}
