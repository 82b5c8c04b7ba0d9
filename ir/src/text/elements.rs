//! Elements of inline data: how each is written, and how rows of them are stored.
//!
//! An element is carried as its stored bits: the code of a format, the bits of a float, two's complement of an integer.

use crate::formats::{self, Format};
use crate::ty::{ElemTy, Float, Int};

/// The format whose codes the stored bits of an element of at most 32 bits are. Plain integers are stored as any other
/// format of as many bits is.
pub(crate) fn code_format(elem: ElemTy) -> &'static Format {
    match elem {
        ElemTy::F32 | ElemTy::F64 => Float::F32.format(),
        ElemTy::F16 => Float::F16.format(),
        ElemTy::Bf16 => Float::Bf16.format(),
        ElemTy::Int(i) => match i.bits() {
            8 => &formats::UINT8,
            16 => Float::F16.format(),
            _ => Float::F32.format(),
        },
        ElemTy::Q(scheme) => scheme.format,
    }
}

/// The stored bits of the number written as `text`, when it is one of the element type.
pub(super) fn read(text: &str, elem: ElemTy) -> Option<u64> {
    match elem {
        ElemTy::Int(int) => {
            let n = text.parse::<i128>().ok()?;
            let (min, max) = int.range();
            (min..=max).contains(&n).then_some(n as u64 & mask(int))
        }
        ElemTy::F64 => double(text).map(f64::to_bits),
        ElemTy::Q(s) if s.format.is_int() => {
            let n = text.parse::<i32>().ok()?;
            let (min, max) = s.format.int_range();
            (min..=max).contains(&n).then(|| s.format.int_code(n).into())
        }
        elem => {
            let x = single(text)?;
            let format = code_format(elem);
            let code = format.encode(x);
            let fits = if x.is_finite() {
                (format.min()..=format.max()).contains(&x)
            } else {
                // Infinities and NaN are numbers of some formats only.
                format.decode(code).is_nan() == x.is_nan() && !format.decode(code).is_finite()
            };
            fits.then_some(code.into())
        }
    }
}

/// The number with these stored bits.
pub(super) fn write(bits: u64, elem: ElemTy) -> String {
    match elem {
        ElemTy::Int(int) => int.wrap(i128::from(bits)).to_string(),
        ElemTy::F64 => match f64::from_bits(bits) {
            x if x.is_nan() => "nan".into(),
            x => format!("{x:?}"),
        },
        ElemTy::Q(s) if s.format.is_int() => s.format.int_value(bits as u32).to_string(),
        elem => f32_text(code_format(elem).decode(bits as u32)),
    }
}

/// The stored bytes of rows of `cols` elements.
pub(super) fn pack(elems: &[u64], cols: usize, elem: ElemTy) -> Vec<u8> {
    if elem.bits() == 64 {
        return elems.iter().flat_map(|e| e.to_le_bytes()).collect();
    }
    let format = code_format(elem);
    let row_bytes = format.packed_len(cols);
    let mut bytes = vec![0; elems.len() / cols * row_bytes];
    let mut codes = Vec::with_capacity(cols.min(elems.len()));
    for (row, out) in elems.chunks_exact(cols).zip(bytes.chunks_exact_mut(row_bytes)) {
        codes.clear();
        codes.extend(row.iter().map(|&e| e as u32));
        format.pack_wide(&codes, out);
    }
    bytes
}

/// The elements of stored rows of `cols` elements, one or more.
pub(super) fn unpack(bytes: &[u8], cols: usize, elem: ElemTy) -> Vec<u64> {
    if elem.bits() == 64 {
        let (words, _) = bytes.as_chunks::<8>();
        return words.iter().map(|&w| u64::from_le_bytes(w)).collect();
    }
    let format = code_format(elem);
    let mut codes = vec![0; cols];
    let row = |row| {
        format.unpack_wide(row, &mut codes);
        codes.iter().map(|&c| c.into()).collect::<Vec<u64>>()
    };
    bytes.chunks_exact(format.packed_len(cols)).flat_map(row).collect()
}

/// The single written as `text`; one that is not written as infinite must be finite.
pub(super) fn single(text: &str) -> Option<f32> {
    let x = text.parse::<f32>().ok()?;
    (!x.is_infinite() || text.ends_with("inf")).then_some(x)
}

/// As [`single`], for doubles.
pub(super) fn double(text: &str) -> Option<f64> {
    let x = text.parse::<f64>().ok()?;
    (!x.is_infinite() || text.ends_with("inf")).then_some(x)
}

/// A single, with the fewest digits that read back.
pub(super) fn f32_text(x: f32) -> String {
    if x.is_nan() { "nan".into() } else { format!("{x:?}") }
}

fn mask(int: Int) -> u64 {
    if int.bits() == 64 { u64::MAX } else { (1 << int.bits()) - 1 }
}
