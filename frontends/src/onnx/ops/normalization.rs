//! Normalizations and softmax.

use super::{Results, one};
use crate::onnx::build::{Parted, Val};
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{ArgReduce, LayerNorm, Order, Real, ReduceKind, RmsNorm, Softmax, UnaryKind as U};
use quantc_ir::ty::{Dim, ElemTy};
use std::rc::Rc;

onnx_ops! {
    /// Inference only.
    "" "BatchNormalization" since 7 => batch_norm;
    "" "GroupNormalization" since 18 => group_norm;
    "" "Hardmax" since 1 => hardmax;
    "" "InstanceNormalization" since 6 => instance_norm;
    "" "LRN" since 1 => local_response;
    "" "LayerNormalization" since 17 => layer_norm;
    "" "LogSoftmax" since 1 => |cx| softmax(cx, true);
    "" "LpNormalization" since 1 => lp_norm;
    "" "MeanVarianceNormalization" since 9 => mean_variance;
    "" "RMSNormalization" since 23 => rms_norm;
    "" "Softmax" since 1 => |cx| softmax(cx, false);
    "" "SimplifiedLayerNormalization" since 1 => rms_norm;
    "com.microsoft" "SimplifiedLayerNormalization" since 1 => rms_norm;
    "com.microsoft" "SkipLayerNormalization" since 1 => |cx| skip_norm(cx, false);
    "com.microsoft" "SkipSimplifiedLayerNormalization" since 1 => |cx| skip_norm(cx, true);
}

/// Extents of the axes before `axis` and from it on, each as one.
fn flat(cx: &Cx<'_, '_>, x: &Val, axis: usize) -> Result<Vec<Dim>> {
    let dims = cx.dims(x);
    let product = |part: &[Dim]| match part {
        [one] => Ok(*one),
        part => {
            let n = part.iter().try_fold(1u64, |n, d| n.checked_mul(d.fixed()?));
            n.map(Dim::Static).ok_or_else(|| {
                Diag::input(format!("extents of {} must be known", cx.ty(x)))
                    .help("give the named extents of the inputs numbers")
            })
        }
    };
    Ok(vec![product(&dims[..axis])?, product(&dims[axis..])?])
}

fn softmax(cx: &mut Cx<'_, '_>, log: bool) -> Results {
    let x = cx.input(0)?;
    let rank = cx.rank(&x);
    let old = cx.opset < 13;
    let axis = cx.int("axis")?.unwrap_or(if old { 1 } else { -1 });
    if old {
        // Up to version 12 all axes from this one on are one.
        let axis = if axis == rank as i64 { rank } else { cx.axis(axis, rank)? };
        let (dims, two) = (cx.dims(&x), flat(cx, &x, axis)?);
        let rows = cx.reshape(&x, two)?;
        let y = cx.op(Softmax { axis: 1, log }, &[&rows])?;
        return one(cx.reshape(&y, dims));
    }
    let axis = cx.axis(axis, rank)? as u8;
    one(cx.op(Softmax { axis, log }, &[&x]))
}

fn hardmax(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let (dims, rank, elem) = (cx.dims(&x), cx.rank(&x), cx.ty(&x).elem);
    let old = cx.opset < 13;
    let axis = cx.int("axis")?.unwrap_or(if old { 1 } else { -1 });
    let axis = cx.axis(axis, rank)?;
    let (x, axis) = if old {
        let rows = flat(cx, &x, axis)?;
        (cx.reshape(&x, rows)?, 1)
    } else {
        (x, axis)
    };
    let at = cx.op(ArgReduce { axis: axis as u8, ..ArgReduce::default() }, &[&x])?;
    let mut shape = vec![1; cx.rank(&x)];
    shape[axis] = cx.dims(&x)[axis].fixed().ok_or_else(|| Diag::input("the extent of the axis must be known"))?;
    let places = super::constants::filled(cx, ElemTy::I64, &shape, |i| i[axis].into())?;
    let hot = cx.compare(Order::Equal, &at, &places)?;
    let y = cx.cast(&hot, elem)?;
    one(cx.reshape(&y, dims))
}

/// One number for each channel, for a tensor `[N, C, ..]` of `rank` axes.
fn channels(cx: &mut Cx<'_, '_>, v: &Val, rank: usize) -> Result<Val> {
    let mut dims = cx.dims(v);
    if dims.len() != 1 {
        return Err(Diag::input(format!("numbers of channels have type {}", cx.ty(v))));
    }
    dims.resize((rank - 1).max(1), Dim::Static(1));
    cx.reshape(v, dims)
}

fn batch_norm(cx: &mut Cx<'_, '_>) -> Results {
    if cx.flag("training_mode", false)? || (cx.outputs > 1 && cx.opset >= 14) {
        return Err(Diag::input("statistics of a batch are computed when training only"));
    }
    let x = cx.input(0)?;
    let rank = cx.rank(&x);
    let eps = cx.float("epsilon", 1e-5)?;
    cx.ignore(&["momentum", "spatial", "is_test"]);
    let elem = cx.ty(&x).elem;
    let mut part = |i: usize| -> Result<Val> {
        let v = cx.input(i)?;
        let v = channels(cx, &v, rank)?;
        cx.cast(&v, elem)
    };
    let (gain, bias, mean, var) = (part(1)?, part(2)?, part(3)?, part(4)?);
    let var = cx.shift(&var, eps)?;
    let root = cx.unary(U::Sqrt, &var)?;
    let factor = cx.div(&gain, &root)?;
    let moved = cx.mul(&mean, &factor)?;
    let summand = cx.sub(&bias, &moved)?;
    let y = cx.mul(&x, &factor)?;
    one(cx.add(&y, &summand))
}

/// `x` as rows of everything but its first two axes, normalized.
fn rows_normalized(cx: &mut Cx<'_, '_>, x: &Val, rows: Vec<Dim>, eps: f64) -> Result<Val> {
    let dims = cx.dims(x);
    let y = cx.reshape(x, rows)?;
    let y = cx.op_with(LayerNorm { eps: Real(eps) }, &[Some(&y), None, None])?;
    cx.reshape(&y, dims)
}

fn instance_norm(cx: &mut Cx<'_, '_>) -> Results {
    let (x, gain, bias) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let (eps, rank) = (cx.float("epsilon", 1e-5)?, cx.rank(&x));
    if rank < 3 {
        return Err(Diag::input(format!("input 0 has type {}, expected channels of something", cx.ty(&x))));
    }
    let rows = { let dims = cx.dims(&x); vec![dims[0], dims[1], flat(cx, &x, 2)?[1]] };
    let y = rows_normalized(cx, &x, rows, eps)?;
    let (gain, bias) = (channels(cx, &gain, rank)?, channels(cx, &bias, rank)?);
    let y = cx.mul(&y, &gain)?;
    one(cx.add(&y, &bias))
}

fn group_norm(cx: &mut Cx<'_, '_>) -> Results {
    let (x, gain, bias) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let (eps, rank) = (cx.float("epsilon", 1e-5)?, cx.rank(&x));
    let groups = cx.int("num_groups")?.and_then(|g| u64::try_from(g).ok()).filter(|&g| g > 0);
    let groups = groups.ok_or_else(|| Diag::input("attribute `num_groups` is missing or not positive"))?;
    cx.ignore(&["stash_type"]);
    let dims = cx.dims(&x);
    let (Some(&n), Some(Dim::Static(c))) = (dims.first(), dims.get(1)) else {
        return Err(Diag::input(format!("input 0 has type {}, whose channels must be known", cx.ty(&x))));
    };
    let Dim::Static(per) = flat(cx, &x, 2)?[1] else { return Err(Diag::input("extents must be known")) };
    let c = *c;
    if c % groups != 0 {
        return Err(Diag::input(format!("{c} channels do not part into {groups} groups")));
    }
    let rows = vec![n, Dim::Static(groups), Dim::Static(c / groups * per)];
    let y = rows_normalized(cx, &x, rows, eps)?;
    // Up to version 20 there is one number for each group.
    let mut spread = |v: Val| -> Result<Val> {
        if cx.dims(&v) == [Dim::Static(groups)] && groups != c {
            let v = cx.unsqueeze(&v, &[1])?;
            let v = cx.expand(&v, vec![Dim::Static(groups), Dim::Static(c / groups)])?;
            let v = cx.reshape(&v, vec![Dim::Static(c)])?;
            return channels(cx, &v, rank);
        }
        channels(cx, &v, rank)
    };
    let (gain, bias) = (spread(gain)?, spread(bias)?);
    let y = cx.mul(&y, &gain)?;
    one(cx.add(&y, &bias))
}

fn layer_norm(cx: &mut Cx<'_, '_>) -> Results {
    let (x, gain, bias) = (cx.input(0)?, cx.input(1)?, cx.opt(2));
    let rank = cx.rank(&x);
    let (eps, axis) = (cx.float("epsilon", 1e-5)?, cx.int("axis")?.unwrap_or(-1));
    let axis = cx.axis(axis, rank)?;
    cx.ignore(&["stash_type"]);
    let cols = [cx.dims(&x)[rank - 1]];
    let elem = cx.ty(&x).elem;
    let fits = |v: &Val| cx.dims(v) == cols && cx.ty(v).elem == elem;
    let y = if axis == rank - 1 && fits(&gain) && bias.as_ref().is_none_or(fits) {
        cx.op_with(LayerNorm { eps: Real(eps) }, &[Some(&x), Some(&gain), bias.as_ref()])?
    } else {
        let rows = if axis == rank - 1 { cx.dims(&x) } else { flat(cx, &x, axis)? };
        let y = rows_normalized(cx, &x, rows, eps)?;
        let y = cx.mul(&y, &gain)?;
        match &bias {
            Some(bias) => cx.add(&y, bias)?,
            None => y,
        }
    };
    let mut results = vec![Some(y)];
    if cx.outputs > 1 {
        let axes: Vec<usize> = (axis..rank).collect();
        let mean = cx.reduce(ReduceKind::Mean, &x, &axes)?;
        let centred = cx.sub(&x, &mean)?;
        let square = cx.mul(&centred, &centred)?;
        let var = cx.reduce(ReduceKind::Mean, &square, &axes)?;
        let var = cx.shift(&var, eps)?;
        let root = cx.unary(U::Sqrt, &var)?;
        results.extend([Some(mean), Some(cx.unary(U::Reciprocal, &root)?)]);
    }
    Ok(results)
}

fn rms_norm(cx: &mut Cx<'_, '_>) -> Results {
    let (x, gain) = (cx.input(0)?, cx.input(1)?);
    let rank = cx.rank(&x);
    let (eps, axis) = (cx.float("epsilon", 1e-5)?, cx.int("axis")?.unwrap_or(-1));
    let axis = cx.axis(axis, rank)?;
    cx.ignore(&["stash_type"]);
    one(rms(cx, &x, &gain, axis, eps))
}

fn rms(cx: &mut Cx<'_, '_>, x: &Val, gain: &Val, axis: usize, eps: f64) -> Result<Val> {
    let rank = cx.rank(x);
    if let Val::Parted(p) = x
        && axis + 1 == rank
        && cx.rank(gain) == 1
    {
        let parts = rms(cx, &p.parts, gain, cx.rank(&p.parts) - 1, eps)?;
        return Ok(Val::Parted(Rc::new(Parted { parts, dims: p.dims.clone() })));
    }
    if axis + 1 == rank && cx.dims(gain) == [cx.dims(x)[rank - 1]] {
        return cx.op(RmsNorm { eps: Real(eps) }, &[x, gain]);
    }
    let dims = cx.dims(x);
    let rows = if axis + 1 == rank { dims.clone() } else { flat(cx, x, axis)? };
    let y = cx.reshape(x, rows)?;
    let y = cx.op_with(RmsNorm { eps: Real(eps) }, &[Some(&y), None])?;
    let y = cx.reshape(&y, dims)?;
    cx.mul(&y, gain)
}

fn skip_norm(cx: &mut Cx<'_, '_>, simplified: bool) -> Results {
    let (x, skip, gain) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let eps = cx.float("epsilon", 1e-5)?;
    let (beta, bias) = if simplified { (None, cx.opt(3)) } else { (cx.opt(3), cx.opt(4)) };
    let mut sum = cx.add(&x, &skip)?;
    if let Some(bias) = bias {
        sum = cx.add(&sum, &bias)?;
    }
    let y = if simplified {
        rms(cx, &sum, &gain, cx.rank(&sum) - 1, eps)?
    } else {
        cx.op_with(LayerNorm { eps: Real(eps) }, &[Some(&sum), Some(&gain), beta.as_ref()])?
    };
    Ok(vec![Some(y), None, None, Some(sum)])
}

fn lp_norm(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let (axis, p) = (cx.int("axis")?.unwrap_or(-1), cx.int("p")?.unwrap_or(2));
    let axis = cx.axis(axis, cx.rank(&x))?;
    let kind = match p {
        1 => ReduceKind::L1,
        2 => ReduceKind::L2,
        p => return Err(Diag::input(format!("attribute `p` is {p}, expected 1 or 2"))),
    };
    let norm = cx.reduce(kind, &x, &[axis])?;
    // Rows of zeros stay so.
    let zero = cx.scalar(cx.ty(&x).elem, 0.0)?;
    let none = cx.compare(Order::Equal, &norm, &zero)?;
    let unit = cx.scalar(cx.ty(&x).elem, 1.0)?;
    let norm = cx.select(&none, &unit, &norm)?;
    one(cx.div(&x, &norm))
}

fn mean_variance(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let axes = cx.ints_attr("axes")?.unwrap_or_else(|| vec![0, 2, 3]);
    let axes = cx.axes(&axes, cx.rank(&x))?;
    let mean = cx.reduce(ReduceKind::Mean, &x, &axes)?;
    let centred = cx.sub(&x, &mean)?;
    let square = cx.mul(&centred, &centred)?;
    let var = cx.reduce(ReduceKind::Mean, &square, &axes)?;
    let root = cx.unary(U::Sqrt, &var)?;
    let below = cx.shift(&root, 1e-9)?;
    one(cx.div(&centred, &below))
}

/// `y = x / (bias + alpha / size * sum x^2)^beta`, the sum over channels nearby.
fn local_response(cx: &mut Cx<'_, '_>) -> Results {
    use quantc_ir::ops::{BinaryKind, Pad, PadMode};
    let x = cx.input(0)?;
    let (alpha, beta) = (cx.float("alpha", 1e-4)?, cx.float("beta", 0.75)?);
    let (bias, size) = (cx.float("bias", 1.0)?, cx.int("size")?.unwrap_or(0));
    if !(1..=1024).contains(&size) || cx.rank(&x) < 2 {
        return Err(Diag::input(format!("attribute `size` is {size}")));
    }
    let square = cx.mul(&x, &x)?;
    let (mut before, mut after) = (vec![0; cx.rank(&x)], vec![0; cx.rank(&x)]);
    (before[1], after[1]) = ((size - 1) / 2, size - 1 - (size - 1) / 2);
    let Dim::Static(n) = cx.dims(&x)[1] else { return Err(Diag::input("the channels must be known")) };
    let wide = cx.op_with(Pad { before, after, mode: PadMode::Constant }, &[Some(&square), None])?;
    let mut sum = cx.slice(&wide, 1, 0, n)?;
    for i in 1..size {
        let next = cx.slice(&wide, 1, i as u64, n)?;
        sum = cx.add(&sum, &next)?;
    }
    let inner = cx.scale(&sum, alpha / size as f64)?;
    let inner = cx.shift(&inner, bias)?;
    let power = cx.scalar(cx.ty(&x).elem, beta)?;
    let below = cx.binary(BinaryKind::Pow, &inner, &power)?;
    one(cx.div(&x, &below))
}
