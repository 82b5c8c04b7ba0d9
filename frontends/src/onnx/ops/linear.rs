//! Products of matrices and convolutions.

use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{Conv, Dot, Einsum, MatMul, Pad, PadMode, Slice};
use quantc_ir::ty::Dim;

onnx_ops! {
    "" "Conv" since 1 => conv;
    "" "ConvTranspose" since 1 => conv_transpose;
    "" "Einsum" since 12 => einsum;
    "" "Gemm" since 7 => gemm;
    "" "MatMul" since 1 => matmul;
    "com.microsoft" "FusedMatMul" since 1 => fused_matmul;
}

/// The product of matrices as numpy defines it, for any number of axes.
pub(super) fn product(cx: &mut Cx<'_, '_>, a: &Val, b: &Val) -> Result<Val> {
    let (rank_a, rank_b) = (cx.rank(a), cx.rank(b));
    if rank_a == 0 || rank_b == 0 {
        return Err(Diag::input("a number is not a matrix"));
    }
    let row = if rank_a == 1 { cx.unsqueeze(a, &[0])? } else { a.clone() };
    let column = if rank_b == 1 { cx.unsqueeze(b, &[1])? } else { b.clone() };
    let weight = matches!(column, Val::Const(_)) && cx.rank(&column) == 2 && cx.ty(&column).elem.is_float();
    let y = if let Some(w) = cx.swapped_weight(&column)?
        && cx.ty(&row).elem == cx.ty(&w).elem
    {
        cx.op(MatMul::default(), &[&row, &w])?
    } else if weight && cx.ty(&row).elem == cx.ty(&column).elem {
        let w = cx.transpose(&column, &[1, 0])?;
        cx.op(MatMul::default(), &[&row, &w])?
    } else {
        cx.op(Dot {}, &[&row, &column])?
    };
    // Products with weights are f32; in the model they have the type of their rows.
    let elem = cx.ty(&row).elem;
    let y = cx.cast(&y, elem)?;
    let rank = cx.rank(&y);
    let gone: Vec<usize> =
        [(rank_a == 1, rank - 2), (rank_b == 1, rank - 1)].into_iter().filter(|g| g.0).map(|g| g.1).collect();
    cx.squeeze(&y, &gone)
}

fn matmul(cx: &mut Cx<'_, '_>) -> Results {
    let (a, b) = (cx.input(0)?, cx.input(1)?);
    one(product(cx, &a, &b))
}

/// The tensor with its last two axes swapped.
pub(super) fn swapped(cx: &mut Cx<'_, '_>, x: &Val) -> Result<Val> {
    let rank = cx.rank(x);
    if rank < 2 {
        return Err(Diag::input(format!("{} is not a matrix", cx.ty(x))));
    }
    let mut perm: Vec<usize> = (0..rank).collect();
    perm.swap(rank - 1, rank - 2);
    cx.transpose(x, &perm)
}

fn fused_matmul(cx: &mut Cx<'_, '_>) -> Results {
    let (mut a, mut b) = (cx.input(0)?, cx.input(1)?);
    if cx.flag("transBatchA", false)? || cx.flag("transBatchB", false)? {
        return Err(Diag::input("attributes `transBatchA` and `transBatchB` are not supported"));
    }
    if cx.flag("transA", false)? {
        a = swapped(cx, &a)?;
    }
    if cx.flag("transB", false)? {
        b = swapped(cx, &b)?;
    }
    let alpha = cx.float("alpha", 1.0)?;
    let y = product(cx, &a, &b)?;
    one(if alpha == 1.0 { Ok(y) } else { cx.scale(&y, alpha) })
}

fn gemm(cx: &mut Cx<'_, '_>) -> Results {
    let (mut a, mut b, c) = (cx.input(0)?, cx.input(1)?, cx.opt(2));
    let (alpha, beta) = (cx.float("alpha", 1.0)?, cx.float("beta", 1.0)?);
    if cx.flag("transA", false)? {
        a = swapped(cx, &a)?;
    }
    let turned = cx.flag("transB", false)?;
    let weight = cx.is_weight(&b) && cx.ty(&b).elem.is_float() && cx.ty(&a).elem == cx.ty(&b).elem;
    let mut y = if weight && turned {
        let y = cx.op(MatMul::default(), &[&a, &b])?;
        let elem = cx.ty(&a).elem;
        cx.cast(&y, elem)?
    } else {
        if turned {
            b = swapped(cx, &b)?;
        }
        product(cx, &a, &b)?
    };
    if alpha != 1.0 {
        y = cx.scale(&y, alpha)?;
    }
    if let Some(c) = c {
        let c = if beta == 1.0 { c } else { cx.scale(&c, beta)? };
        y = cx.add(&y, &c)?;
    }
    one(Ok(y))
}

/// How a window moves, as the attributes of convolutions and pools say it.
pub(super) struct Moves {
    pub(super) strides: Vec<u32>,
    pub(super) dilations: Vec<u32>,
    pub(super) before: Vec<u32>,
    pub(super) after: Vec<u32>,
}

/// Numbers of an attribute, one for each spatial axis.
pub(super) fn per_axis(cx: &mut Cx<'_, '_>, name: &'static str, n: usize, default: u32) -> Result<Vec<u32>> {
    let Some(list) = cx.ints_attr(name)? else { return Ok(vec![default; n]) };
    let fit = |&x: &i64| {
        u32::try_from(x).map_err(|_| Diag::input(format!("attribute `{name}` has the number {x}")))
    };
    let list: Vec<u32> = list.iter().map(fit).collect::<Result<_>>()?;
    if list.len() == n {
        return Ok(list);
    }
    Err(Diag::input(format!("attribute `{name}` has {} numbers, expected {n}", list.len())))
}

/// Reads the attributes; `space` are the extents of the input, `kernel` those of the window.
pub(super) fn moves(cx: &mut Cx<'_, '_>, space: &[Dim], kernel: &[u32]) -> Result<Moves> {
    let n = space.len();
    let (strides, dilations) = (per_axis(cx, "strides", n, 1)?, per_axis(cx, "dilations", n, 1)?);
    if strides.contains(&0) || dilations.contains(&0) {
        return Err(Diag::input("attributes `strides` and `dilations` must not be 0"));
    }
    let mut pads = per_axis(cx, "pads", 2 * n, 0)?;
    let auto = cx.text("auto_pad", "NOTSET")?;
    match auto.as_str() {
        "NOTSET" => {}
        "VALID" => pads.fill(0),
        "SAME_UPPER" | "SAME_LOWER" => {
            for i in 0..n {
                let bad =
                    || Diag::input(format!("attribute `auto_pad` is {auto}: the extents must be known"));
                let size = space[i].fixed().ok_or_else(bad)?;
                let reach = u64::from(kernel[i].saturating_sub(1)) * u64::from(dilations[i]) + 1;
                let stride = u64::from(strides[i]);
                let covered = (size.div_ceil(stride).max(1) - 1) * stride + reach;
                let total = u32::try_from(covered.saturating_sub(size)).map_err(|_| bad())?;
                let small = total / 2;
                let (before, after) =
                    if auto == "SAME_UPPER" { (small, total - small) } else { (total - small, small) };
                (pads[i], pads[n + i]) = (before, after);
            }
        }
        other => return Err(Diag::input(format!("attribute `auto_pad` is `{other}`"))),
    }
    let after = pads.split_off(n);
    Ok(Moves { strides, dilations, before: pads, after })
}

/// The extents of the window, which are those of the weights.
fn kernel(cx: &mut Cx<'_, '_>, w: &Val) -> Result<Vec<u32>> {
    let dims = cx.fixed(w)?;
    let fit = |&d: &u64| u32::try_from(d).map_err(|_| Diag::input("the weights are too large"));
    let kernel: Vec<u32> = dims.get(2..).unwrap_or_default().iter().map(fit).collect::<Result<_>>()?;
    if kernel.is_empty() {
        return Err(Diag::input(format!("weights of type {} have no spatial axes", cx.ty(w))));
    }
    match cx.ints_attr("kernel_shape")? {
        Some(given) if !given.iter().copied().eq(kernel.iter().map(|&k| i64::from(k))) => {
            Err(Diag::input(format!("attribute `kernel_shape` is {given:?}, but the weights say {kernel:?}")))
        }
        _ => Ok(kernel),
    }
}

/// `group` as it is given.
fn groups(cx: &mut Cx<'_, '_>) -> Result<u32> {
    let group = cx.int("group")?.unwrap_or(1);
    u32::try_from(group)
        .ok()
        .filter(|&g| g > 0)
        .ok_or_else(|| Diag::input(format!("attribute `group` is {group}")))
}

/// The sum with one number for each channel.
pub(super) fn biased(cx: &mut Cx<'_, '_>, y: &Val, bias: Option<&Val>) -> Result<Val> {
    let Some(bias) = bias else { return Ok(y.clone()) };
    let mut dims = cx.dims(bias);
    if dims.len() != 1 {
        return Err(Diag::input(format!("the bias has type {}", cx.ty(bias))));
    }
    dims.resize(cx.rank(y) - 1, Dim::Static(1));
    let bias = cx.reshape(bias, dims)?;
    cx.add(y, &bias)
}

/// A convolution of `x` with `w` with the attributes of the node.
pub(super) fn convolution(cx: &mut Cx<'_, '_>, x: &Val, w: &Val) -> Result<Val> {
    let (space, kernel) = (cx.dims(x).get(2..).unwrap_or_default().to_vec(), kernel(cx, w)?);
    if space.len() != kernel.len() {
        return Err(Diag::input(format!("{} is not convolved with {}", cx.ty(x), cx.ty(w))));
    }
    let m = moves(cx, &space, &kernel)?;
    let groups = groups(cx)?;
    let op = Conv { strides: m.strides, dilations: m.dilations, before: m.before, after: m.after, groups };
    cx.op(op, &[x, w])
}

fn conv(cx: &mut Cx<'_, '_>) -> Results {
    let (x, w, bias) = (cx.input(0)?, cx.input(1)?, cx.opt(2));
    let y = convolution(cx, &x, &w)?;
    one(biased(cx, &y, bias.as_ref()))
}

/// The transposed convolution: zeros are put between the elements of `x`, and the mirrored weights are moved over it.
fn conv_transpose(cx: &mut Cx<'_, '_>) -> Results {
    let (x, w, bias) = (cx.input(0)?, cx.input(1)?, cx.opt(2));
    let (xd, wd) = (cx.fixed(&x)?, cx.fixed(&w)?);
    let (kernel, groups) = (kernel(cx, &w)?, u64::from(groups(cx)?));
    let n = kernel.len();
    if xd.len() != n + 2 || wd[0] != xd[1] || wd[0] % groups != 0 {
        return Err(Diag::input(format!("{} is not convolved with {}", cx.ty(&x), cx.ty(&w))));
    }
    let (strides, dilations) = (per_axis(cx, "strides", n, 1)?, per_axis(cx, "dilations", n, 1)?);
    let extra = per_axis(cx, "output_padding", n, 0)?;
    let pads = per_axis(cx, "pads", 2 * n, 0)?;
    let asked = cx.ints_attr("output_shape")?;
    let auto = cx.text("auto_pad", "NOTSET")?;
    let (mut before, mut after) = (vec![0i64; n + 2], vec![0i64; n + 2]);
    let mut y = x;
    for i in 0..n {
        let axis = i + 2;
        let stride = u64::from(strides[i]);
        let reach = i64::from(kernel[i].max(1) - 1) * i64::from(dilations[i]);
        let size = i64::try_from(xd[axis]).map_err(|_| Diag::input("an extent is too large"))?;
        let full = (size - 1) * i64::from(strides[i]) + reach + 1 + i64::from(extra[i]);
        let (low, high) = match (&asked, auto.as_str()) {
            (None, "NOTSET") => (i64::from(pads[i]), i64::from(pads[n + i])),
            (None, "VALID") => (0, 0),
            (asked, auto) => {
                let same = size * i64::from(strides[i]);
                let want = asked.as_ref().map_or(Some(same), |a| a.get(a.len().checked_sub(n)? + i).copied());
                let want = want.ok_or_else(|| Diag::input("attribute `output_shape` has too few numbers"))?;
                let total = full - want;
                // More than there is to see is put behind it.
                let small = total.max(0) / 2;
                if auto == "SAME_UPPER" || total < 0 {
                    (small, total - small)
                } else {
                    (total - small, small)
                }
            }
        };
        before[axis] = reach - low;
        after[axis] = reach - high + i64::from(extra[i]);
        if stride > 1 {
            y = spread(cx, &y, axis, stride)?;
        }
    }
    let y = cx.op_with(Pad { before, after, mode: PadMode::Constant }, &[Some(&y), None])?;
    // [C, O / groups, ..] to [O, C / groups, ..], mirrored.
    let mut w = w;
    for (i, &k) in kernel.iter().enumerate().filter(|(_, k)| **k > 1) {
        let k = u64::from(k);
        w = cx.op(Slice { axis: i as u8 + 2, start: k - 1, len: k, step: -1 }, &[&w])?;
    }
    let static_dims = |dims: &[u64]| dims.iter().map(|&d| Dim::Static(d)).collect::<Vec<_>>();
    let mut parted = vec![groups, wd[0] / groups, wd[1]];
    parted.extend(&wd[2..]);
    cx.check_rank(parted.len())?;
    let w = cx.reshape(&w, static_dims(&parted))?;
    let mut perm: Vec<usize> = (0..parted.len()).collect();
    perm.swap(1, 2);
    let w = cx.transpose(&w, &perm)?;
    let mut joined = vec![groups * wd[1], wd[0] / groups];
    joined.extend(&wd[2..]);
    let w = cx.reshape(&w, static_dims(&joined))?;
    let op = Conv { dilations, groups: groups as u32, ..Conv::default() };
    let y = cx.op(op, &[&y, &w])?;
    one(biased(cx, &y, bias.as_ref()))
}

/// The tensor with `stride - 1` zeros between the indices of an axis.
fn spread(cx: &mut Cx<'_, '_>, x: &Val, axis: usize, stride: u64) -> Result<Val> {
    let dims = cx.dims(x);
    let Dim::Static(n) = dims[axis] else { return Err(Diag::input("an extent is not known")) };
    let mut apart = dims.clone();
    apart.insert(axis + 1, Dim::Static(1));
    cx.check_rank(apart.len())?;
    let y = cx.reshape(x, apart.clone())?;
    let mut after = vec![0; apart.len()];
    after[axis + 1] = stride as i64 - 1;
    let y =
        cx.op_with(Pad { before: vec![0; apart.len()], after, mode: PadMode::Constant }, &[Some(&y), None])?;
    let mut joined = dims;
    let wide = n.checked_mul(stride).ok_or_else(|| Diag::input("an extent is too large"))?;
    joined[axis] = Dim::Static(wide);
    let y = cx.reshape(&y, joined)?;
    cx.slice(&y, axis, 0, wide.saturating_sub(stride - 1))
}

fn einsum(cx: &mut Cx<'_, '_>) -> Results {
    let all = cx.all()?;
    let equation: String = cx.text("equation", "")?.chars().filter(|c| !c.is_whitespace()).collect();
    let (inputs, output) = match equation.split_once("->") {
        Some((inputs, output)) => (inputs.to_string(), Some(output.to_string())),
        None => (equation.clone(), None),
    };
    let terms: Vec<&str> = inputs.split(',').collect();
    if terms.len() != all.len() {
        return Err(Diag::input(format!("attribute `equation` `{equation}` has {} operands", terms.len())));
    }
    // What an ellipsis stands for: letters that the equation does not use.
    let free: Vec<char> = ('A'..='Z').chain('a'..='z').filter(|c| !equation.contains(*c)).collect();
    let hidden = |term: &str, rank: usize| {
        let named = term.replace("...", "").chars().count();
        if term.contains("...") { rank.checked_sub(named) } else { Some(0) }
    };
    let ranks: Vec<usize> = all.iter().map(|v| cx.rank(v)).collect();
    let bad = || Diag::input(format!("attribute `equation` `{equation}` does not fit the operands"));
    let mut most = 0;
    for (term, &rank) in terms.iter().zip(&ranks) {
        most = most.max(hidden(term, rank).ok_or_else(bad)?);
    }
    let ellipsis = free.get(..most).ok_or_else(bad)?;
    let expanded =
        |term: &str, n: usize| term.replacen("...", &ellipsis[most - n..].iter().collect::<String>(), 1);
    let mut left = vec![];
    for (term, &rank) in terms.iter().zip(&ranks) {
        left.push(expanded(term, hidden(term, rank).ok_or_else(bad)?));
    }
    let right = match output {
        Some(output) => expanded(&output, most),
        None => {
            // Without an arrow: what occurs once, in alphabetical order, behind the ellipsis.
            let letters: String = left.concat();
            let once = |c: &char| letters.matches(*c).count() == 1;
            let mut named: Vec<char> =
                letters.chars().filter(|c| !ellipsis.contains(c)).filter(once).collect();
            named.sort_unstable();
            ellipsis.iter().chain(&named).collect()
        }
    };
    let args: Vec<&Val> = all.iter().collect();
    one(cx.op(Einsum { equation: format!("{}->{right}", left.join(",")) }, &args))
}
