//! Quantized operators: codes of constants keep their bytes, scales and zero points, and are read through
//! `dequantize`; what is computed from codes is computed in integers, as the standard says.

use super::linear::{biased, convolution, product, swapped};
use super::{Results, one};
use crate::onnx::build::{Codes, Val};
use crate::onnx::node::Cx;
use crate::onnx::tensor::{self, Const};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::eval::Tensor;
use quantc_ir::formats::{self, Format};
use quantc_ir::ops::{BinaryKind as B, Cast, Dequantize, MatMul, Quantize, ReduceKind, UnaryKind as U, zero_scheme};
use quantc_ir::scheme::{Group, Scheme, Zero};
use quantc_ir::ty::{Dim, ElemTy, Float, Int, TensorTy};
use std::rc::Rc;

onnx_ops! {
    "" "ConvInteger" since 10 => conv_integer;
    "" "DequantizeLinear" since 10 => dequantize_linear;
    "" "DynamicQuantizeLinear" since 11 => dynamic_quantize;
    "" "MatMulInteger" since 10 => matmul_integer;
    "" "QLinearConv" since 10 => qlinear_conv;
    "" "QLinearMatMul" since 10 => qlinear_matmul;
    "" "QuantizeLinear" since 10 => quantize_linear;
    "com.microsoft" "DequantizeLinear" since 1 => dequantize_linear;
    /// Weights of 2, 4 and 8 bits whose rows are whole blocks.
    "com.microsoft" "MatMulNBits" since 1 => matmul_n_bits;
    "com.microsoft" "QGemm" since 1 => qgemm;
    "com.microsoft" "QLinearAdd" since 1 => |cx| qlinear_binary(cx, false);
    "com.microsoft" "QLinearGlobalAveragePool" since 1 => qlinear_global_average;
    "com.microsoft" "QLinearMul" since 1 => |cx| qlinear_binary(cx, true);
    "com.microsoft" "QuantizeLinear" since 1 => quantize_linear;
}

/// Which elements share a scale.
#[derive(Clone, Copy)]
enum Share {
    All,
    Axis(usize),
    Block(usize, u64),
}

impl Share {
    /// What the shape of the scale says.
    fn of(cx: &mut Cx<'_, '_>, x: &Val, scale: &Val) -> Result<Share> {
        let (axis, block) = (cx.int("axis")?.unwrap_or(1), cx.int("block_size")?.unwrap_or(0));
        let (xd, sd) = (cx.dims(x), cx.dims(scale));
        if sd.iter().all(|&d| d == Dim::Static(1)) && sd.len() <= 1 {
            return Ok(Share::All);
        }
        let axis = cx.axis(axis, xd.len())?;
        let bad = || Diag::input(format!("scales of type {} do not belong to {}", cx.ty(scale), cx.ty(x)));
        if block == 0 {
            return if sd == [xd[axis]] { Ok(Share::Axis(axis)) } else { Err(bad()) };
        }
        let size = u64::try_from(block).ok().filter(|&b| b <= u32::MAX.into()).ok_or_else(bad)?;
        let fits = sd.len() == xd.len()
            && sd.iter().zip(&xd).enumerate().all(|(a, (s, d))| match (a == axis, s, d) {
                (true, Dim::Static(s), Dim::Static(d)) => *s == d.div_ceil(size),
                (_, s, d) => s == d,
            });
        if fits { Ok(Share::Block(axis, size)) } else { Err(bad()) }
    }

    fn group(self) -> Group {
        match self {
            Share::All => Group::Tensor,
            Share::Axis(axis) => Group::Axis(axis as u8),
            Share::Block(axis, size) => Group::Block { axis: axis as u8, size: size as u32 },
        }
    }

    /// Scales or zero points as a scheme wants them: with the rank of `x`, one for each group.
    fn grouped(self, cx: &mut Cx<'_, '_>, v: &Val, rank: usize) -> Result<Val> {
        let mut dims = vec![Dim::Static(1); rank];
        match self {
            Share::All => {}
            Share::Axis(axis) => dims[axis] = cx.dims(v)[0],
            Share::Block(..) => return Ok(v.clone()),
        }
        cx.reshape(v, dims)
    }

    /// Scales or zero points that broadcast to the elements of `x`.
    fn spread(self, cx: &mut Cx<'_, '_>, v: &Val, x: &Val) -> Result<Val> {
        let Share::Block(axis, size) = self else { return self.grouped(cx, v, cx.rank(x)) };
        let (mut dims, Dim::Static(n)) = (cx.dims(v), cx.dims(x)[axis]) else {
            return Err(Diag::input("the extent of an axis of blocks must be known"));
        };
        let Dim::Static(blocks) = dims[axis] else { return Err(Diag::bug("blocks without number")) };
        let apart = cx.unsqueeze(v, &[axis + 1])?;
        let mut wide = cx.dims(&apart);
        wide[axis + 1] = Dim::Static(size);
        let wide = cx.expand(&apart, wide)?;
        dims[axis] = Dim::Static(blocks.saturating_mul(size));
        let flat = cx.reshape(&wide, dims)?;
        cx.slice(&flat, axis, 0, n)
    }
}

/// The format whose codes are the elements of a type.
fn format_of(elem: ElemTy) -> Option<&'static Format> {
    match elem {
        ElemTy::Int(Int::I8) => Some(&formats::INT8),
        ElemTy::Int(Int::U8) => Some(&formats::UINT8),
        elem => elem.bare_format(),
    }
}

fn float_of(elem: ElemTy) -> Option<Float> {
    [Float::F32, Float::F16, Float::Bf16].into_iter().find(|&f| ElemTy::from(f) == elem)
}

/// Whether all numbers of a constant are 0.
fn all_zero(cx: &Cx<'_, '_>, v: &Val) -> Result<bool> {
    Ok(match cx.known(v) {
        Some(tensor) => tensor?.reals().iter().all(|&x| x == 0.0),
        None => false,
    })
}

/// Whether scales are as the type system wants them: known, finite and positive.
fn sound(cx: &Cx<'_, '_>, scale: &Val) -> Result<bool> {
    Ok(match cx.known(scale) {
        Some(tensor) => tensor?.reals().iter().all(|&x| x.is_finite() && x > 0.0),
        None => false,
    })
}

/// The scheme of codes of `format`, and its scales and zero points, when it can hold them.
fn scheme(
    cx: &mut Cx<'_, '_>,
    share: Share,
    format: &'static Format,
    rank: usize,
    scale: &Val,
    zero: Option<&Val>,
) -> Result<Option<(Scheme, Val, Option<Val>)>> {
    let Some(float) = float_of(cx.ty(scale).elem).filter(|_| format.bits <= 8) else { return Ok(None) };
    if !sound(cx, scale)? {
        return Ok(None);
    }
    let zero = match zero {
        Some(z) if all_zero(cx, z)? => None,
        Some(z) if format.is_int() && matches!(z, Val::Const(_)) => Some(z),
        Some(_) => return Ok(None),
        None => None,
    };
    let scheme = Scheme {
        format,
        group: share.group(),
        zero: if zero.is_some() { Zero::Point(format) } else { Zero::Symmetric },
        scale: float,
    };
    let scale = share.grouped(cx, scale, rank)?;
    let zero = match zero {
        None => None,
        Some(z) => {
            let bare = cx.cast(z, ElemTy::bare(format))?;
            let bare = share.grouped(cx, &bare, rank)?;
            let known = cx.known(&bare).ok_or_else(|| Diag::bug("a constant that is not known"))??;
            let ty = known.ty.with_elem(ElemTy::Q(zero_scheme(scheme, format)));
            Some(Val::Const(Rc::new(Const::new(Tensor::new(&ty, known.data.clone())?))))
        }
    };
    Ok(Some((scheme, scale, zero)))
}

/// The numbers that integers or codes stand for, as `to`.
fn numbers(cx: &mut Cx<'_, '_>, x: &Val, to: ElemTy) -> Result<Val> {
    cx.cast(x, to)
}

fn dequantize_linear(cx: &mut Cx<'_, '_>) -> Results {
    let (x, scale, zero) = (cx.input(0)?, cx.input(1)?, cx.opt(2));
    let share = Share::of(cx, &x, &scale)?;
    let to = match cx.int("output_dtype")?.filter(|&d| d != 0) {
        Some(number) => tensor::elem(number)?,
        None => cx.ty(&scale).elem,
    };
    if let Val::Codes(codes) = &x
        && cx.same(&codes.scale, &scale)?
        && cx.same_opt(codes.zero.as_ref(), zero.as_ref())?
        && let Some(to) = float_of(to)
    {
        let args = [Some(&codes.codes), Some(&codes.group_scale), codes.group_zero.as_ref()];
        return one(cx.op_with(Dequantize { to }, &args));
    }
    if let (Val::Const(constant), Some(format), Some(float)) = (&x, format_of(cx.ty(&x).elem), float_of(to))
        && let Some((scheme, scale, zero)) = scheme(cx, share, format, cx.rank(&x), &scale, zero.as_ref())?
    {
        let codes = Val::Const(Rc::new(constant.retyped(ElemTy::Q(scheme))?));
        return one(cx.dequantized(float, codes, scale, zero));
    }
    let mut y = numbers(cx, &x, ElemTy::F32)?;
    if let Some(zero) = zero {
        let zero = numbers(cx, &zero, ElemTy::F32)?;
        let zero = share.spread(cx, &zero, &x)?;
        y = cx.sub(&y, &zero)?;
    }
    let scale = cx.cast(&scale, ElemTy::F32)?;
    let scale = share.spread(cx, &scale, &x)?;
    let y = cx.mul(&y, &scale)?;
    one(cx.cast(&y, to))
}

fn quantize_linear(cx: &mut Cx<'_, '_>) -> Results {
    let (x, scale, zero) = (cx.input(0)?, cx.input(1)?, cx.opt(2));
    let share = Share::of(cx, &x, &scale)?;
    let saturate = cx.flag("saturate", true)?;
    let asked = cx.int("output_dtype")?.filter(|&d| d != 0).map(tensor::elem).transpose()?;
    let elem = match (&zero, asked) {
        (Some(zero), _) => cx.ty(zero).elem,
        (None, Some(elem)) => elem,
        (None, None) => ElemTy::Int(Int::U8),
    };
    let precision = match cx.int("precision")?.filter(|&p| p != 0) {
        Some(number) => tensor::elem(number)?,
        None => cx.ty(&scale).elem,
    };
    let plain = cx.ty(&x).elem == ElemTy::F32 && precision == ElemTy::F32 && cx.ty(&scale).elem == ElemTy::F32;
    if let Some(format) = format_of(elem).filter(|f| plain && f.is_int())
        && let Some((scheme, group_scale, group_zero)) =
            scheme(cx, share, format, cx.rank(&x), &scale, zero.as_ref())?
    {
        let args = [Some(&x), Some(&group_scale), group_zero.as_ref()];
        let codes = cx.op_with(Quantize { to: scheme }, &args)?;
        let shape = cx.ty(&x).shape;
        let plain = std::cell::OnceCell::new();
        let ty = TensorTy { elem, shape };
        let codes = Codes { codes, scale, zero, group_scale, group_zero, ty, plain };
        return one(Ok(Val::Codes(Rc::new(codes))));
    }
    let wide = cx.cast(&scale, precision)?;
    let wide = share.spread(cx, &wide, &x)?;
    let from = cx.cast(&x, precision)?;
    let ratio = cx.div(&from, &wide)?;
    let zero = match zero {
        Some(zero) if elem.int().is_some() || format_of(elem).is_some_and(Format::is_int) => {
            let zero = numbers(cx, &zero, ElemTy::F32)?;
            Some(share.spread(cx, &zero, &x)?)
        }
        _ => None,
    };
    one(rounded(cx, &ratio, zero.as_ref(), elem, saturate))
}

/// `saturate(round(ratio) + zero)` as `elem`, ties to even.
fn rounded(cx: &mut Cx<'_, '_>, ratio: &Val, zero: Option<&Val>, elem: ElemTy, saturate: bool) -> Result<Val> {
    let format = format_of(elem);
    let range = match (elem.int(), format) {
        (Some(int), _) => {
            let (min, max) = int.range();
            (min as f64, max as f64)
        }
        (None, Some(format)) if format.is_int() => {
            let (min, max) = format.int_range();
            (f64::from(min), f64::from(max))
        }
        _ => return cx.op(Cast { to: elem, saturate }, &[ratio]),
    };
    let wide = cx.cast(ratio, ElemTy::F32)?;
    let mut y = cx.unary(U::Round, &wide)?;
    if let Some(zero) = zero {
        y = cx.add(&y, zero)?;
    }
    let (low, high) = (cx.scalar(ElemTy::F32, range.0)?, cx.scalar(ElemTy::F32, range.1)?);
    let y = cx.binary(B::Max, &y, &low)?;
    let y = cx.binary(B::Min, &y, &high)?;
    cx.cast(&y, elem)
}

fn dynamic_quantize(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let all: Vec<usize> = (0..cx.rank(&x)).collect();
    let zero = cx.scalar(ElemTy::F32, 0.0)?;
    let mut extreme = |kind, with| -> Result<Val> {
        let most = cx.reduce(kind, &x, &all)?;
        let most = cx.squeeze(&most, &all)?;
        cx.binary(with, &most, &zero)
    };
    let (low, high) = (extreme(ReduceKind::Min, B::Min)?, extreme(ReduceKind::Max, B::Max)?);
    let span = cx.sub(&high, &low)?;
    // Of nothing but zeros any scale is right.
    let flat = cx.compare(quantc_ir::ops::Order::Equal, &span, &zero)?;
    let unit = cx.scalar(ElemTy::F32, 1.0)?;
    let span = cx.select(&flat, &unit, &span)?;
    let steps = cx.scalar(ElemTy::F32, 255.0)?;
    let scale = cx.div(&span, &steps)?;
    let below = cx.div(&low, &scale)?;
    let point = cx.unary(U::Neg, &below)?;
    let point = rounded(cx, &point, None, ElemTy::Int(Int::U8), true)?;
    let ratio = cx.div(&x, &scale)?;
    let wide = cx.cast(&point, ElemTy::F32)?;
    let y = rounded(cx, &ratio, Some(&wide), ElemTy::Int(Int::U8), true)?;
    Ok(vec![Some(y), Some(scale), Some(point)])
}

/// Scales or zero points of rows, columns or channels: one number stays one, a list lies along an axis that `after`
/// more axes follow.
fn along(cx: &mut Cx<'_, '_>, v: &Val, after: usize) -> Result<Val> {
    let mut dims = cx.dims(v);
    match dims.len() {
        0 => Ok(v.clone()),
        1 if dims[0] == Dim::Static(1) => cx.reshape(v, vec![]),
        1 => {
            dims.resize(1 + after, Dim::Static(1));
            cx.reshape(v, dims)
        }
        _ => Ok(v.clone()),
    }
}

/// Integers without their zero point.
fn centred(cx: &mut Cx<'_, '_>, x: &Val, zero: Option<Val>, after: usize) -> Result<Val> {
    let wide = cx.cast(x, ElemTy::I32)?;
    let Some(zero) = zero else { return Ok(wide) };
    if all_zero(cx, &zero)? {
        return Ok(wide);
    }
    let zero = cx.cast(&zero, ElemTy::I32)?;
    let zero = along(cx, &zero, after)?;
    cx.sub(&wide, &zero)
}

fn matmul_integer(cx: &mut Cx<'_, '_>) -> Results {
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    let (az, bz) = (cx.opt(2), cx.opt(3));
    let (a, b) = (centred(cx, &a, az, 1)?, centred(cx, &b, bz, 0)?);
    one(product(cx, &a, &b))
}

fn conv_integer(cx: &mut Cx<'_, '_>) -> Results {
    let (x, w) = (cx.input(0)?, cx.input(1)?);
    let (xz, wz, after) = (cx.opt(2), cx.opt(3), cx.rank(&w).saturating_sub(1));
    let (x, w) = (centred(cx, &x, xz, 0)?, centred(cx, &w, wz, after)?);
    one(convolution(cx, &x, &w))
}

/// Sums of products of codes as codes again: `saturate(round(sum * (a * b / y)) + zero)`.
fn requantized(cx: &mut Cx<'_, '_>, sum: &Val, [a, b, y]: [&Val; 3], zero: Option<Val>, elem: ElemTy) -> Result<Val> {
    let factor = cx.mul(a, b)?;
    let factor = cx.div(&factor, y)?;
    let factor = cx.cast(&factor, ElemTy::F32)?;
    let wide = cx.cast(sum, ElemTy::F32)?;
    let scaled = cx.mul(&wide, &factor)?;
    let zero = match zero {
        Some(zero) => {
            let zero = cx.cast(&zero, ElemTy::F32)?;
            Some(along(cx, &zero, 0)?)
        }
        None => None,
    };
    rounded(cx, &scaled, zero.as_ref(), elem, true)
}

fn qlinear_matmul(cx: &mut Cx<'_, '_>) -> Results {
    let (a, sa, b, sb) = (cx.input(0)?, cx.input(1)?, cx.input(3)?, cx.input(4)?);
    let (sy, zy) = (cx.input(6)?, cx.opt(7));
    let elem = zy.as_ref().map_or(cx.ty(&a).elem, |z| cx.ty(z).elem);
    let (za, zb) = (cx.opt(2), cx.opt(5));
    let (a, b) = (centred(cx, &a, za, 1)?, centred(cx, &b, zb, 0)?);
    let sum = product(cx, &a, &b)?;
    let (sa, sb, sy) = (along(cx, &sa, 1)?, along(cx, &sb, 0)?, along(cx, &sy, 0)?);
    one(requantized(cx, &sum, [&sa, &sb, &sy], zy, elem))
}

fn qlinear_conv(cx: &mut Cx<'_, '_>) -> Results {
    let (x, sx, w, sw) = (cx.input(0)?, cx.input(1)?, cx.input(3)?, cx.input(4)?);
    let (sy, zy, bias) = (cx.input(6)?, cx.opt(7), cx.opt(8));
    let elem = zy.as_ref().map_or(cx.ty(&x).elem, |z| cx.ty(z).elem);
    let space = cx.rank(&x).saturating_sub(2);
    let (zx, zw) = (cx.opt(2), cx.opt(5));
    let (x, w) = (centred(cx, &x, zx, 0)?, centred(cx, &w, zw, space + 1)?);
    let sum = convolution(cx, &x, &w)?;
    let sum = biased(cx, &sum, bias.as_ref())?;
    let (sx, sw, sy) = (along(cx, &sx, 0)?, along(cx, &sw, space)?, along(cx, &sy, 0)?);
    one(requantized(cx, &sum, [&sx, &sw, &sy], zy, elem))
}

/// The numbers of codes with one scale and zero point.
fn read(cx: &mut Cx<'_, '_>, x: &Val, scale: &Val, zero: Option<Val>) -> Result<Val> {
    let centred = centred(cx, x, zero, 0)?;
    let wide = cx.cast(&centred, ElemTy::F32)?;
    let scale = along(cx, scale, 0)?;
    cx.mul(&wide, &scale)
}

fn qlinear_binary(cx: &mut Cx<'_, '_>, product: bool) -> Results {
    let (a, sa, b, sb, sy) = (cx.input(0)?, cx.input(1)?, cx.input(3)?, cx.input(4)?, cx.input(6)?);
    let (za, zb, zy) = (cx.opt(2), cx.opt(5), cx.opt(7));
    let elem = cx.ty(&a).elem;
    let (a, b) = (read(cx, &a, &sa, za)?, read(cx, &b, &sb, zb)?);
    let y = if product { cx.mul(&a, &b)? } else { cx.add(&a, &b)? };
    let sy = along(cx, &sy, 0)?;
    let ratio = cx.div(&y, &sy)?;
    let zero = zy.map(|z| cx.cast(&z, ElemTy::F32)).transpose()?;
    one(rounded(cx, &ratio, zero.as_ref(), elem, true))
}

fn qlinear_global_average(cx: &mut Cx<'_, '_>) -> Results {
    let (x, sx, sy) = (cx.input(0)?, cx.input(1)?, cx.input(3)?);
    let (zx, zy) = (cx.opt(2), cx.opt(4));
    if cx.flag("channels_last", false)? {
        return Err(Diag::input("attribute `channels_last` is not supported"));
    }
    let elem = cx.ty(&x).elem;
    let x = centred(cx, &x, zx, 0)?;
    let axes: Vec<usize> = (2..cx.rank(&x)).collect();
    let sum = cx.reduce(ReduceKind::Sum, &x, &axes)?;
    let dims = cx.dims(&x);
    let space = dims.get(2..).unwrap_or_default();
    let n = space.iter().try_fold(1u64, |n, d| n.checked_mul(d.fixed()?));
    let n = n.ok_or_else(|| Diag::input(format!("the spatial extents of {} must be known", cx.ty(&x))))?;
    let count = cx.scalar(ElemTy::F32, n as f64)?;
    let (sx, sy) = (along(cx, &sx, 0)?, along(cx, &sy, 0)?);
    let below = cx.mul(&sy, &count)?;
    let one_each = cx.scalar(ElemTy::F32, 1.0)?;
    one(requantized(cx, &sum, [&sx, &one_each, &below], zy, elem))
}

/// A positive attribute.
fn size(cx: &mut Cx<'_, '_>, name: &'static str, default: Option<i64>) -> Result<u64> {
    let n = cx.int(name)?.or(default);
    let n = n.and_then(|n| u64::try_from(n).ok()).filter(|&n| n > 0 && n <= u32::MAX.into());
    n.ok_or_else(|| Diag::input(format!("attribute `{name}` is missing or not sensible")))
}

fn matmul_n_bits(cx: &mut Cx<'_, '_>) -> Results {
    let (x, w, scale) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let (k, n) = (size(cx, "K", None)?, size(cx, "N", None)?);
    let (bits, block) = (size(cx, "bits", Some(4))?, size(cx, "block_size", None)?);
    cx.ignore(&["accuracy_level"]);
    if cx.opt(4).is_some() || cx.int("weight_prepacked")?.is_some_and(|p| p != 0) {
        return Err(Diag::input("input `g_idx` and packed weights are not supported"));
    }
    let format = match bits {
        4 => &formats::UINT4,
        8 => &formats::UINT8,
        bits => return Err(Diag::input(format!("attribute `bits` is {bits}, only 4 and 8 are supported"))),
    };
    if k % block != 0 {
        return Err(Diag::input(format!("rows of {k} numbers are not whole blocks of {block}")));
    }
    let blocks = k / block;
    let Val::Const(weights) = &w else { return Err(Diag::input("the weights are computed")) };
    let float = float_of(cx.ty(&scale).elem).ok_or_else(|| Diag::input("the scales are no floats"))?;
    let group = Group::Block { axis: 1, size: block as u32 };
    let scheme = Scheme { format, group, zero: Zero::Point(format), scale: float };
    let codes = weights.as_stored(TensorTy::fixed(ElemTy::Q(scheme), &[n, k]))?;
    let scale = cx.reshape(&scale, vec![Dim::Static(n), Dim::Static(blocks)])?;
    let zero_ty = TensorTy::fixed(ElemTy::Q(zero_scheme(scheme, format)), &[n, blocks]);
    let zero = match cx.opt(3) {
        None => {
            let middle = vec![1u8 << (bits - 1); (n * blocks) as usize];
            Const::new(Tensor::codes(&zero_ty, middle)?)
        }
        Some(Val::Const(zero)) if zero.ty.elem == ElemTy::Int(Int::U8) => zero.as_stored(zero_ty)?,
        Some(_) => return Err(Diag::input("zero points that are not codes are not supported")),
    };
    let w = if sound(cx, &scale)? {
        let zero = Val::Const(Rc::new(zero));
        cx.dequantized(float, Val::Const(Rc::new(codes)), scale, Some(zero))?
    } else {
        // Scales below zero, as symmetric quantizers write them, are no scales of a type: the numbers are computed.
        let mut number = |c: &Const| -> Result<Val> {
            let bare = Val::Const(Rc::new(c.retyped(ElemTy::bare(format))?));
            cx.cast(&bare, ElemTy::F32)
        };
        let (codes, zero) = (number(&codes)?, number(&zero)?);
        let share = Share::Block(1, block);
        let scale = cx.cast(&scale, ElemTy::F32)?;
        let (zero, scale) = (share.spread(cx, &zero, &codes)?, share.spread(cx, &scale, &codes)?);
        let centred = cx.sub(&codes, &zero)?;
        let numbers = cx.mul(&centred, &scale)?;
        cx.cast(&numbers, float.into())?
    };
    let mut y = cx.op(MatMul::default(), &[&x, &w])?;
    if let Some(bias) = cx.opt(5) {
        y = cx.add(&y, &bias)?;
    }
    one(Ok(y))
}

fn qgemm(cx: &mut Cx<'_, '_>) -> Results {
    let (a, sa, b, sb) = (cx.input(0)?, cx.input(1)?, cx.input(3)?, cx.input(4)?);
    let (za, zb, bias, sy, zy) = (cx.opt(2), cx.opt(5), cx.opt(6), cx.opt(7), cx.opt(8));
    let (turn_a, turn_b) = (cx.flag("transA", false)?, cx.flag("transB", false)?);
    let alpha = cx.float("alpha", 1.0)?;
    let elem = cx.ty(&a).elem;
    // Scales and zero points of `b` belong to its columns, which are rows where it is turned.
    let (mut a, mut b) = (centred(cx, &a, za, 0)?, centred(cx, &b, zb, usize::from(turn_b))?);
    if turn_a {
        a = swapped(cx, &a)?;
    }
    if turn_b {
        b = swapped(cx, &b)?;
    }
    let mut sum = product(cx, &a, &b)?;
    if let Some(bias) = bias {
        sum = cx.add(&sum, &bias)?;
    }
    let (sa, sb) = (along(cx, &sa, 0)?, along(cx, &sb, 0)?);
    let sa = if alpha == 1.0 { sa } else { cx.scale(&sa, alpha)? };
    let Some(sy) = sy else {
        let factor = cx.mul(&sa, &sb)?;
        let wide = cx.cast(&sum, ElemTy::F32)?;
        return one(cx.mul(&wide, &factor));
    };
    let sy = along(cx, &sy, 0)?;
    one(requantized(cx, &sum, [&sa, &sb, &sy], zy, elem))
}
