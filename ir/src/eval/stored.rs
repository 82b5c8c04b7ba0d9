//! Tensors from and to the bytes that weights are stored as.

use super::{Data, Tensor};
use crate::diag::{Diag, Result};
use crate::text::code_format;
use crate::ty::{ElemTy, Int, TensorTy};

impl Tensor {
    /// The tensor whose stored bytes are `bytes`: rows in little-endian order, each starting on a byte boundary.
    pub fn from_stored(ty: &TensorTy, bytes: &[u8]) -> Result<Tensor> {
        if ty.stored_bytes() != Some(bytes.len() as u64) {
            return Err(Diag::input(format!("{} bytes do not fill {ty}", bytes.len())));
        }
        let data = match ty.elem {
            ElemTy::F32 => Data::F32(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
            ElemTy::F64 => Data::F64(bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()),
            ElemTy::F16 | ElemTy::Bf16 => {
                let format = code_format(ty.elem);
                let one = |&b: &[u8; 2]| format.decode(u16::from_le_bytes(b).into());
                Data::F32(bytes.as_chunks().0.iter().map(one).collect())
            }
            ElemTy::Int(int) => {
                let word = |b: &[u8]| b.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
                let numbers = bytes.chunks_exact(int.bits() as usize / 8).map(|b| int.wrap(word(b).into()));
                return Tensor::from_ints(ty, numbers);
            }
            ElemTy::Q(scheme) => {
                let cols = ty.shape.last().and_then(|d| d.fixed()).unwrap_or(1) as usize;
                let mut codes = vec![0; ty.shape.elements().unwrap_or(0) as usize];
                if cols > 0 {
                    let rows = bytes.chunks_exact(scheme.format.packed_len(cols));
                    rows.zip(codes.chunks_exact_mut(cols))
                        .for_each(|(row, out)| scheme.format.unpack(row, out));
                }
                Data::Codes(codes)
            }
        };
        Tensor::new(ty, data)
    }

    /// The bytes that this tensor is stored as.
    pub fn to_stored(&self) -> Vec<u8> {
        match (&self.data, self.ty.elem) {
            (Data::F32(x), ElemTy::F16 | ElemTy::Bf16) => {
                let format = code_format(self.ty.elem);
                x.iter().flat_map(|&x| (format.encode(x) as u16).to_le_bytes()).collect()
            }
            (Data::F32(x), _) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            (Data::F64(x), _) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            (Data::I32(x), _) => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
            (Data::I64(x), elem) => {
                let width = elem.int().map_or(8, Int::bits) as usize / 8;
                x.iter().flat_map(|x| x.to_le_bytes().into_iter().take(width)).collect()
            }
            (Data::Codes(codes), ElemTy::Q(scheme)) => {
                let (_, cols) = self.rows_cols();
                let pack = |row: &[u8]| {
                    let mut out = vec![0; scheme.format.packed_len(row.len())];
                    scheme.format.pack(row, &mut out);
                    out
                };
                codes.chunks(cols.max(1)).flat_map(pack).collect()
            }
            (Data::Codes(codes), _) => codes.clone(),
        }
    }
}
