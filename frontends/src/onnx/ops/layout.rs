//! The same elements in other places.

use super::constants::filled;
use super::{Results, one};
use crate::onnx::build::{REST, Val};
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{Gather, Order, Pad, PadMode, Slice};
use quantc_ir::ty::{Dim, ElemTy};

onnx_ops! {
    "" "Concat" since 4 => concat;
    "" "DepthToSpace" since 1 => depth_to_space;
    "" "Pad" since 2 => pad;
    "" "Slice" since 1 => slice;
    "" "SpaceToDepth" since 1 => space_to_depth;
    "" "Split" since 2 => split;
    "" "Tile" since 6 => tile;
    "" "Transpose" since 1 => transpose;
    "" "Trilu" since 14 => trilu;
}

fn transpose(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let rank = cx.rank(&x);
    let perm = match cx.ints_attr("perm")? {
        None => (0..rank).rev().collect(),
        Some(perm) => perm.iter().map(|&p| cx.axis(p, rank)).collect::<Result<Vec<_>>>()?,
    };
    let mut sorted = perm.clone();
    sorted.sort_unstable();
    if !sorted.iter().copied().eq(0..rank) {
        return Err(Diag::input(format!("attribute `perm` {perm:?} is not an order of {rank} axes")));
    }
    one(cx.transpose(&x, &perm))
}

fn concat(cx: &mut Cx<'_, '_>) -> Results {
    let all = cx.all()?;
    let axis = cx.int("axis")?.ok_or_else(|| Diag::input("attribute `axis` is missing"))?;
    let first = all.first().ok_or_else(|| Diag::input("input 0 is missing"))?;
    let axis = cx.axis(axis, cx.rank(first))?;
    if all.iter().any(|v| matches!(v, Val::Extents { .. })) {
        let mut dims = vec![];
        for part in &all {
            dims.extend(held(cx, part)?);
        }
        return one(Ok(cx.extents(dims)));
    }
    // Empty lists, which some exporters put first, have nothing to say of the other extents.
    let empty = |v: &&Val| {
        let dims = cx.dims(v);
        dims == [Dim::Static(0)] || dims.get(axis) == Some(&Dim::Static(0))
    };
    let some: Vec<&Val> = all.iter().filter(|v| !empty(v)).collect();
    let parts: Vec<&Val> = if some.is_empty() { all.iter().take(1).collect() } else { some };
    one(cx.concat(&parts, axis))
}

/// The extents that a list of extents, or of known integers, holds.
fn held(cx: &Cx<'_, '_>, val: &Val) -> Result<Vec<Dim>> {
    if let Val::Extents { dims, .. } = val {
        return Ok(dims.to_vec());
    }
    let unknown = || Diag::input("extents that are not known are put together with numbers that are computed");
    let tensor = cx.known(val).ok_or_else(unknown)??;
    let one = |n: i128| match n {
        -1 => Ok(REST),
        n => u64::try_from(n).map(Dim::Static).map_err(|_| Diag::input(format!("an extent is {n}"))),
    };
    tensor.ints().into_iter().map(one).collect()
}

fn slice(cx: &mut Cx<'_, '_>) -> Results {
    let mut x = cx.input(0)?;
    let rank = cx.rank(&x);
    let missing = |what: &str| Diag::input(format!("`{what}` is missing"));
    let starts = bounds(cx, 1, "starts")?.ok_or_else(|| missing("starts"))?;
    let ends = bounds(cx, 2, "ends")?.ok_or_else(|| missing("ends"))?;
    let axes = cx.ints_of(3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = cx.known_ints(4, "steps")?.unwrap_or_else(|| vec![1; starts.len()]);
    if [ends.len(), axes.len(), steps.len()].iter().any(|&n| n != starts.len()) {
        return Err(Diag::input("`starts`, `ends`, `axes` and `steps` are not of one length"));
    }
    cx.axes(&axes, rank)?;
    for i in 0..starts.len() {
        let axis = cx.axis(axes[i], rank)?;
        x = match (starts[i], ends[i]) {
            (Bound::At(start), Bound::At(end)) => cut(cx, x, axis, (start, end, steps[i]))?,
            (Bound::At(0), Bound::Extent(end)) if steps[i] == 1 => first(cx, x, axis, end)?,
            _ => {
                let ty = cx.ty(&x);
                return Err(Diag::input(format!("axis {axis} of {ty} is cut at places that are not known"))
                    .help("give the named extents of the inputs numbers"));
            }
        };
    }
    one(Ok(x))
}

/// Where a slice begins or ends.
#[derive(Clone, Copy)]
enum Bound {
    At(i64),
    Extent(Dim),
}

/// The bounds that operand `i`, or in older versions an attribute, holds.
fn bounds(cx: &mut Cx<'_, '_>, i: usize, name: &'static str) -> Result<Option<Vec<Bound>>> {
    if let Some(Val::Extents { dims, .. }) = cx.opt(i) {
        let one = |&d: &Dim| match d {
            REST => Bound::At(-1),
            Dim::Static(n) => Bound::At(i64::try_from(n).unwrap_or(i64::MAX)),
            extent => Bound::Extent(extent),
        };
        return Ok(Some(dims.iter().map(one).collect()));
    }
    Ok(cx.ints_of(i, name)?.map(|all| all.into_iter().map(Bound::At).collect()))
}

/// The first `len` indices of an axis. An axis that turns out to be shorter is an error when the model runs.
fn first(cx: &mut Cx<'_, '_>, x: Val, axis: usize, len: Dim) -> Result<Val> {
    if cx.dims(&x)[axis] == len {
        return Ok(x);
    }
    if cx.dims(&x)[axis].fixed().is_none() {
        let ty = cx.ty(&x);
        return Err(Diag::input(format!("axis {axis} of {ty} is cut, whose extent is not known"))
            .help("give the named extents of the inputs numbers"));
    }
    let places = cx.places(len)?;
    cx.op(Gather { axis: axis as u8 }, &[&x, &places])
}

/// A slice of one axis, with bounds as the standard reads them.
fn cut(cx: &mut Cx<'_, '_>, x: Val, axis: usize, (start, end, step): (i64, i64, i64)) -> Result<Val> {
    if step == 0 {
        return Err(Diag::input("`steps` has a step of 0"));
    }
    let dims = cx.dims(&x);
    let Dim::Static(n) = dims[axis] else {
        // The whole axis is a slice whatever its extent is.
        if start == 0 && step == 1 && end >= i64::from(i32::MAX) {
            return Ok(x);
        }
        let ty = cx.ty(&x);
        return Err(Diag::input(format!("axis {axis} of {ty} is cut, whose extent is not known"))
            .help("give the named extents of the inputs numbers"));
    };
    let n = i64::try_from(n).map_err(|_| Diag::input("an extent is too large"))?;
    let from_end = |i: i64| if i < 0 { i.saturating_add(n) } else { i };
    let (start, len) = if step > 0 {
        let (a, b) = (from_end(start).clamp(0, n), from_end(end).clamp(0, n));
        (a, if b > a { (b - a - 1) / step + 1 } else { 0 })
    } else {
        let (a, b) = (from_end(start).clamp(-1, n - 1), from_end(end).clamp(-1, n - 1));
        // Further steps than the axis is long are as long as that.
        let back = step.checked_neg().unwrap_or(i64::MAX);
        (a.max(0), if a > b { (a - b - 1) / back + 1 } else { 0 })
    };
    if let Val::Extents { dims, .. } = &x {
        let at = |i: i64| dims[(start + i * step) as usize];
        return Ok(cx.extents((0..len).map(at).collect()));
    }
    if (start, len, step) == (0, n, 1) {
        return Ok(x);
    }
    let step = if len <= 1 { 1 } else { step };
    cx.op(Slice { axis: axis as u8, start: start as u64, len: len as u64, step }, &[&x])
}

fn split(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let axis = cx.int("axis")?.unwrap_or(0);
    let axis = cx.axis(axis, cx.rank(&x))?;
    let Dim::Static(n) = cx.dims(&x)[axis] else {
        return Err(Diag::input(format!("axis {axis} of {} is split, whose extent is not known", cx.ty(&x))));
    };
    let asked = cx.int("num_outputs")?;
    let sizes: Vec<u64> = match cx.ints_of(1, "split")? {
        Some(sizes) => {
            let bad = |_| Diag::input(format!("`split` is {sizes:?}"));
            sizes.iter().map(|&s| u64::try_from(s).map_err(bad)).collect::<Result<_>>()?
        }
        None => {
            let parts = asked.map_or(Ok(cx.outputs as u64), u64::try_from);
            let parts = parts.ok().filter(|&p| (1..=1 << 16).contains(&p));
            let parts = parts.ok_or_else(|| Diag::input("the number of parts is not sensible"))?;
            let each = n.div_ceil(parts);
            (0..parts).map(|i| each.min(n.saturating_sub(i * each))).collect()
        }
    };
    if sizes.iter().try_fold(0u64, |a, &s| a.checked_add(s)) != Some(n) {
        return Err(Diag::input(format!("`split` {sizes:?} does not part {n} indices")));
    }
    let mut at = 0;
    let mut parts = vec![];
    for size in sizes {
        parts.push(Some(cx.slice(&x, axis, at, size)?));
        at += size;
    }
    Ok(parts)
}

fn pad(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let rank = cx.rank(&x);
    let mode = match cx.text("mode", "constant")?.as_str() {
        "constant" => PadMode::Constant,
        "reflect" => PadMode::Reflect,
        "edge" => PadMode::Edge,
        "wrap" => PadMode::Wrap,
        other => return Err(Diag::input(format!("attribute `mode` is `{other}`"))),
    };
    let pads = match cx.opset {
        ..11 => cx.ints_attr("pads")?,
        _ => cx.known_ints(1, "pads")?,
    };
    let pads = pads.ok_or_else(|| Diag::input("`pads` is missing"))?;
    let axes = match cx.known_ints(3, "axes")? {
        None => (0..rank).collect(),
        Some(axes) => {
            cx.axes(&axes, rank)?;
            axes.iter().map(|&a| cx.axis(a, rank)).collect::<Result<Vec<_>>>()?
        }
    };
    if pads.len() != 2 * axes.len() {
        return Err(Diag::input(format!("`pads` has {} numbers for {} axes", pads.len(), axes.len())));
    }
    let (mut before, mut after) = (vec![0; rank], vec![0; rank]);
    for (i, &axis) in axes.iter().enumerate() {
        (before[axis], after[axis]) = (pads[i], pads[axes.len() + i]);
    }
    let value = match cx.opset {
        ..11 => {
            let value = cx.float("value", 0.0)?;
            Some(cx.scalar(cx.ty(&x).elem, value)?)
        }
        _ => cx.opt(2),
    };
    let value = value.filter(|_| mode == PadMode::Constant);
    if before.iter().chain(&after).all(|&n| n == 0) {
        return one(Ok(x));
    }
    one(cx.op_with(Pad { before, after, mode }, &[Some(&x), value.as_ref()]))
}

fn tile(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let repeats = cx.known_ints(1, "repeats")?.ok_or_else(|| Diag::input("`repeats` is missing"))?;
    let dims = cx.dims(&x);
    if repeats.len() != dims.len() {
        return Err(Diag::input(format!("`repeats` has {} numbers for {} axes", repeats.len(), dims.len())));
    }
    let mut y = x;
    // One axis at a time, so that there is never more than one axis beyond those of the input.
    for (axis, &times) in repeats.iter().enumerate().filter(|(_, t)| **t != 1) {
        let times = u64::try_from(times).map_err(|_| Diag::input(format!("`repeats` has {times}")))?;
        let own = cx.dims(&y);
        let whole = match own[axis] {
            Dim::Static(n) => n.checked_mul(times).map(Dim::Static),
            Dim::Sym(_) => None,
        };
        let whole = whole.ok_or_else(|| Diag::input(format!("axis {axis} of {} is repeated", cx.ty(&y))))?;
        cx.check_rank(own.len() + 1)?;
        let mut apart = own.clone();
        apart.insert(axis, Dim::Static(1));
        let y1 = cx.reshape(&y, apart.clone())?;
        apart[axis] = Dim::Static(times);
        let y2 = cx.expand(&y1, apart)?;
        let mut joined = own;
        joined[axis] = whole;
        y = cx.reshape(&y2, joined)?;
    }
    one(Ok(y))
}

fn trilu(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let upper = cx.flag("upper", true)?;
    let k = match cx.opt(1) {
        None => 0,
        Some(_) => cx.known_ints(1, "k")?.and_then(|k| k.first().copied()).unwrap_or(0),
    };
    let dims = cx.dims(&x);
    let zero = cx.scalar(cx.ty(&x).elem, 0.0)?;
    let (rows, cols) = match dims[..] {
        [.., Dim::Static(rows), Dim::Static(cols)] => (rows, cols),
        [.., rows, cols] => {
            let (down, along) = (cx.places(rows)?, cx.places(cols)?);
            let down = cx.unsqueeze(&down, &[1])?;
            let k = cx.scalar(ElemTy::I64, k as f64)?;
            let edge = cx.add(&down, &k)?;
            let (low, high) = if upper { (edge, along) } else { (along, edge) };
            let mask = cx.compare(Order::LessEqual, &low, &high)?;
            return one(cx.select(&mask, &x, &zero));
        }
        _ => return Err(Diag::input(format!("input 0 has type {}, expected matrices", cx.ty(&x)))),
    };
    let k = i128::from(k);
    let kept = |i: &[u64]| {
        let beyond = i128::from(i[1]) - i128::from(i[0]);
        i128::from(if upper { beyond >= k } else { beyond <= k })
    };
    let mask = filled(cx, ElemTy::BOOL, &[rows, cols], kept)?;
    one(cx.select(&mask, &x, &zero))
}

/// Extents of `[N, C, H, W]` and the block size.
fn blocks(cx: &mut Cx<'_, '_>) -> Result<(Val, [Dim; 4], u64)> {
    let x = cx.input(0)?;
    let size = cx.int("blocksize")?.and_then(|b| u64::try_from(b).ok()).filter(|&b| b > 0);
    let size = size.ok_or_else(|| Diag::input("attribute `blocksize` is missing or not positive"))?;
    let dims: [Dim; 4] = cx.dims(&x).try_into().map_err(|_| Diag::input("input 0 must have 4 axes"))?;
    Ok((x, dims, size))
}

fn parted(d: Dim, by: u64) -> Result<Dim> {
    match d {
        Dim::Static(n) if by > 0 && n % by == 0 => Ok(Dim::Static(n / by)),
        d => Err(Diag::input(format!("an extent of {d} does not part into blocks of {by}"))),
    }
}

fn times(d: Dim, by: u64) -> Result<Dim> {
    let n = d.fixed().and_then(|n| n.checked_mul(by));
    n.map(Dim::Static).ok_or_else(|| Diag::input(format!("an extent of {d} is multiplied by {by}")))
}

fn depth_to_space(cx: &mut Cx<'_, '_>) -> Results {
    let (x, [n, c, h, w], b) = blocks(cx)?;
    let size = Dim::Static(b);
    let square = b.checked_mul(b).ok_or_else(|| Diag::input("attribute `blocksize` is too large"))?;
    let inner = parted(c, square)?;
    let (dims, perm) = match cx.text("mode", "DCR")?.as_str() {
        "DCR" => ([n, size, size, inner, h, w], [0, 3, 4, 1, 5, 2]),
        "CRD" => ([n, inner, size, size, h, w], [0, 1, 4, 2, 5, 3]),
        other => return Err(Diag::input(format!("attribute `mode` is `{other}`"))),
    };
    let y = cx.reshape(&x, dims.to_vec())?;
    let y = cx.transpose(&y, &perm)?;
    one(cx.reshape(&y, vec![n, inner, times(h, b)?, times(w, b)?]))
}

fn space_to_depth(cx: &mut Cx<'_, '_>) -> Results {
    let (x, [n, c, h, w], b) = blocks(cx)?;
    let size = Dim::Static(b);
    let (h, w) = (parted(h, b)?, parted(w, b)?);
    let square = b.checked_mul(b).ok_or_else(|| Diag::input("attribute `blocksize` is too large"))?;
    let (dims, perm) = match cx.text("mode", "DCR")?.as_str() {
        "DCR" => ([n, c, h, size, w, size], [0, 3, 5, 1, 2, 4]),
        "CRD" => ([n, c, h, size, w, size], [0, 1, 3, 5, 2, 4]),
        other => return Err(Diag::input(format!("attribute `mode` is `{other}`"))),
    };
    let y = cx.reshape(&x, dims.to_vec())?;
    let y = cx.transpose(&y, &perm)?;
    one(cx.reshape(&y, vec![n, times(c, square)?, h, w]))
}
