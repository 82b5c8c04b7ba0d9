//! NumPy's array files (`.npy`, versions 1 to 3): a text header, then the elements in rows.

use quantc_ir::diag::{Diag, Result};
use quantc_ir::eval::{Data, Tensor};
use quantc_ir::ty::{ElemTy, Int, TensorTy};

/// Element types by their names in headers.
const NAMES: &[(&str, ElemTy)] = &[
    ("<f4", ElemTy::F32),
    ("<f8", ElemTy::F64),
    ("<f2", ElemTy::F16),
    ("|b1", ElemTy::BOOL),
    ("|i1", ElemTy::Int(Int::I8)),
    ("|u1", ElemTy::Int(Int::U8)),
    ("<i2", ElemTy::Int(Int::I16)),
    ("<i4", ElemTy::I32),
    ("<i8", ElemTy::I64),
    ("<u2", ElemTy::Int(Int::U16)),
    ("<H", ElemTy::Int(Int::U16)),
    ("<u4", ElemTy::Int(Int::U32)),
    ("<u8", ElemTy::Int(Int::U64)),
];

/// The array that the bytes of a file hold.
pub fn read(bytes: &[u8]) -> Result<Tensor> {
    let bad = |why: &str| {
        Diag::input(format!("this is no array: {why}")).help("save a C-ordered array with `numpy.save`")
    };
    let rest = bytes.strip_prefix(b"\x93NUMPY").ok_or_else(|| bad("it does not begin as an .npy file"))?;
    let (len, rest) = match rest {
        [1, _, a, b, rest @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), rest),
        [2 | 3, _, a, b, c, d, rest @ ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, rest),
        _ => return Err(bad("its version is unknown")),
    };
    let (header, data) = rest.split_at_checked(len).ok_or_else(|| bad("its header is cut off"))?;
    let header = std::str::from_utf8(header).map_err(|_| bad("its header is not text"))?;
    let after = |key: &str| {
        let at = header.find(&format!("'{key}':"))? + key.len() + 3;
        Some(header[at..].trim_start())
    };
    if !after("fortran_order").is_some_and(|t| t.starts_with("False")) {
        return Err(bad("its elements are not in rows"));
    }
    let name = after("descr").and_then(|t| t.strip_prefix('\'')?.split('\'').next());
    let elem = NAMES.iter().find(|(n, _)| Some(*n) == name).map(|(_, elem)| *elem);
    let elem = elem.ok_or_else(|| bad(&format!("its elements are {}", name.unwrap_or("unknown"))))?;
    let shape = after("shape").and_then(|t| t.strip_prefix('(')?.split(')').next());
    let shape = shape.ok_or_else(|| bad("it has no shape"))?;
    let extents = shape.split(',').map(str::trim).filter(|t| !t.is_empty());
    let dims: Option<Vec<u64>> = extents.map(|t| t.parse().ok()).collect();
    let ty = TensorTy::fixed(elem, &dims.ok_or_else(|| bad("its shape is not one"))?);
    if ty.rank() > quantc_ir::text::MAX_RANK || ty.stored_bytes() != Some(data.len() as u64) {
        return Err(bad("its length does not fit its shape"));
    }
    Tensor::from_stored(&ty, data)
}

/// A tensor as the bytes of a file. Types that NumPy lacks are written as singles.
pub fn write(tensor: &Tensor) -> Result<Vec<u8>> {
    let plain = NAMES.iter().find(|(_, elem)| *elem == tensor.ty.elem);
    let singles;
    let (tensor, name) = match plain {
        Some((name, _)) => (tensor, *name),
        None => {
            let numbers = tensor.reals().into_iter().map(|x| x as f32).collect();
            singles = Tensor::new(&tensor.ty.with_elem(ElemTy::F32), Data::F32(numbers))?;
            (&singles, "<f4")
        }
    };
    let dims: String = tensor.dims().iter().map(|d| format!("{d}, ")).collect();
    let mut header = format!("{{'descr': '{name}', 'fortran_order': False, 'shape': ({dims}), }}");
    // The elements begin at a multiple of 64 bytes.
    let unpadded = 10 + header.len() + 1;
    header.extend(std::iter::repeat_n(' ', unpadded.next_multiple_of(64) - unpadded));
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(tensor.to_stored());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_read_back() {
        for &(name, elem) in NAMES {
            for dims in [&[][..], &[3], &[2, 0], &[2, 3]] {
                let ty = TensorTy::fixed(elem, dims);
                let n = dims.iter().product::<u64>() as usize;
                let tensor = Tensor::from_reals(&ty, (0..n).map(|i| (i % 2) as f64).collect()).unwrap();
                let bytes = write(&tensor).unwrap();
                assert_eq!(read(&bytes).unwrap(), tensor, "{name} {dims:?}");
                assert!((0..bytes.len()).all(|cut| read(&bytes[..cut]).is_err()), "{name} {dims:?}");
            }
        }
        let half = Tensor::float(&TensorTy::fixed(ElemTy::Bf16, &[2]), vec![0.5, -3.0]).unwrap();
        assert_eq!(read(&write(&half).unwrap()).unwrap(), Tensor::f32(&[2], vec![0.5, -3.0]).unwrap());
    }
}
