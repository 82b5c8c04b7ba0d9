//! Attention and what belongs to it.

use super::linear::swapped;
use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use crate::onnx::tensor;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{
    Conv, Dot, Gather, Order, Pad, PadMode, ReduceKind, Silu, Slice, Softmax, Tanh, UnaryKind as U,
};
use quantc_ir::ty::{Dim, ElemTy};

onnx_ops! {
    "" "Attention" since 23 => attention;
    "" "CausalConvWithState" since 26 => causal_conv;
    /// Sequences of known length, which are unrolled.
    "" "LinearAttention" since 26 => linear_attention;
    "" "RotaryEmbedding" since 23 => rotary;
}

/// The most steps that are unrolled.
const MOST_STEPS: u64 = 1024;

/// A count that an attribute gives.
pub(super) fn count(cx: &mut Cx<'_, '_>, name: &'static str) -> Result<Option<u64>> {
    let Some(n) = cx.int(name)? else { return Ok(None) };
    let fit = u64::try_from(n).ok().filter(|&n| n > 0);
    fit.map(Some).ok_or_else(|| Diag::input(format!("attribute `{name}` is {n}")))
}

/// `[B, S, n * d]` as `[B, n, S, d]`.
pub(super) fn heads(cx: &mut Cx<'_, '_>, x: &Val, n: u64) -> Result<Val> {
    let [batch, length, Dim::Static(width)] = cx.dims(x)[..] else {
        return Err(Diag::input(format!("{} is not split into heads", cx.ty(x))));
    };
    if width % n != 0 {
        return Err(Diag::input(format!("{width} numbers are not split into {n} heads")));
    }
    let y = cx.reshape(x, vec![batch, length, Dim::Static(n), Dim::Static(width / n)])?;
    cx.transpose(&y, &[0, 2, 1, 3])
}

/// `[B, n, S, d]` as `[B, S, n * d]`.
pub(super) fn joined(cx: &mut Cx<'_, '_>, x: &Val) -> Result<Val> {
    let y = cx.transpose(x, &[0, 2, 1, 3])?;
    let [batch, length, Dim::Static(n), Dim::Static(d)] = cx.dims(&y)[..] else {
        return Err(Diag::input(format!("heads of {} are not joined", cx.ty(x))));
    };
    cx.reshape(&y, vec![batch, length, Dim::Static(n * d)])
}

/// Heads `[B, n, S, d]`, each `times` times.
fn repeated(cx: &mut Cx<'_, '_>, x: &Val, times: u64) -> Result<Val> {
    let [batch, Dim::Static(n), length, d] = cx.dims(x)[..] else {
        return Err(Diag::input(format!("heads of {} are not repeated", cx.ty(x))));
    };
    let y = cx.unsqueeze(x, &[2])?;
    let y = cx.expand(&y, vec![batch, Dim::Static(n), Dim::Static(times), length, d])?;
    cx.reshape(&y, vec![batch, Dim::Static(n * times), length, d])
}

/// What attention is computed of: heads `[B, n, S, d]`.
pub(super) struct Parts {
    pub(super) q: Val,
    pub(super) k: Val,
    pub(super) v: Val,
    /// Added to the products.
    pub(super) bias: Option<Val>,
    /// Whether every query sees a key, so that no row of weights must be made zeros.
    pub(super) sees: bool,
    /// Factor on the products; none is one over the root of the size of a head.
    pub(super) scale: Option<f64>,
    pub(super) softcap: f64,
    pub(super) precision: Option<ElemTy>,
    pub(super) mode: i64,
}

/// The heads of the result, and the products as `mode` wants them.
pub(super) fn attend(cx: &mut Cx<'_, '_>, p: Parts) -> Result<(Val, Val)> {
    let (qd, kd) = (cx.dims(&p.q), cx.dims(&p.k));
    let ([_, Dim::Static(hq), _, Dim::Static(d)], [_, Dim::Static(hk), ..]) = (&qd[..], &kd[..]) else {
        return Err(Diag::input(format!("queries {} and keys {} need 4 axes", cx.ty(&p.q), cx.ty(&p.k))));
    };
    if *hk == 0 || hq % hk != 0 {
        return Err(Diag::input(format!("{hq} heads of queries do not share {hk} heads of keys")));
    }
    let (k, v) = match hq / hk {
        1 => (p.k, p.v),
        times => (repeated(cx, &p.k, times)?, repeated(cx, &p.v, times)?),
    };
    let scale = p.scale.unwrap_or(1.0 / (*d as f64).sqrt());
    // Half of the factor on each side keeps the products of narrow floats small.
    let (half, sign) = (scale.abs().sqrt(), if scale < 0.0 { -1.0 } else { 1.0 });
    let (q, k) = (cx.scale(&p.q, half * sign)?, cx.scale(&k, half)?);
    let k = swapped(cx, &k)?;
    let raw = cx.op(Dot {}, &[&q, &k])?;
    let elem = cx.ty(&raw).elem;
    let mut capped = raw.clone();
    if p.softcap > 0.0 {
        let inner = cx.scale(&raw, 1.0 / p.softcap)?;
        let inner = cx.op(Tanh {}, &[&inner])?;
        capped = cx.scale(&inner, p.softcap)?;
    }
    let biased = match &p.bias {
        Some(bias) => cx.add(&capped, bias)?,
        None => capped.clone(),
    };
    let wide = cx.cast(&biased, p.precision.unwrap_or(elem))?;
    let axis = cx.rank(&wide) as u8 - 1;
    let mut shares = cx.op(Softmax { axis, log: false }, &[&wide])?;
    if let Some(bias) = p.bias.as_ref().filter(|_| !p.sees) {
        // A query that sees no key yields zeros.
        let last = cx.rank(bias) - 1;
        let most = cx.reduce(ReduceKind::Max, bias, &[last])?;
        let blind = cx.unary(U::IsNegInf, &most)?;
        let zero = cx.scalar(cx.ty(&shares).elem, 0.0)?;
        shares = cx.select(&blind, &zero, &shares)?;
    }
    let shares = cx.cast(&shares, elem)?;
    let y = cx.op(Dot {}, &[&shares, &v])?;
    let shown = match p.mode {
        0 => raw,
        1 => capped,
        2 => biased,
        3 => shares,
        mode => return Err(Diag::input(format!("attribute `qk_matmul_output_mode` is {mode}"))),
    };
    Ok((y, shown))
}

/// `[.., S, d]` and `[.., P, d]` before it, as one.
pub(super) fn behind(cx: &mut Cx<'_, '_>, past: Option<Val>, x: Val) -> Result<Val> {
    match past {
        Some(past) if cx.dims(&past).get(2) == Some(&Dim::Static(0)) => Ok(x),
        Some(past) => cx.concat(&[&past, &x], 2),
        None => Ok(x),
    }
}

/// The length of a sequence, which must be known.
pub(super) fn length(cx: &Cx<'_, '_>, x: &Val, axis: usize) -> Result<u64> {
    cx.dims(x).get(axis).and_then(|d| d.fixed()).ok_or_else(|| {
        Diag::input(format!("the length of {} must be known where keys are hidden", cx.ty(x)))
            .help("give the named extents of the inputs numbers")
    })
}

/// The places of queries as a column, and of keys as a row, as i64; `past` is what comes before the queries.
fn places(cx: &mut Cx<'_, '_>, q: &Val, k: &Val, past: Option<&Val>) -> Result<(Val, Val)> {
    let (rows, cols) = (cx.dims(q)[2], cx.dims(k)[2]);
    let start = past.map_or(Ok(0), |p| length(cx, p, 2))?;
    let row = cx.places(rows)?;
    let row = cx.reshape(&row, vec![rows, Dim::Static(1)])?;
    let row = if start == 0 { row } else { cx.shift(&row, start as f64)? };
    let col = cx.places(cols)?;
    Ok((row, cx.reshape(&col, vec![Dim::Static(1), cols])?))
}

/// Which keys a query sees by its place, and what hides the others; `start` is what comes before the queries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sight {
    /// Nothing later.
    pub(super) causal: bool,
    /// So many places to the left at most; any number when negative.
    pub(super) left: i64,
    /// So many places to the right at most; any number when negative.
    pub(super) right: i64,
}

impl Sight {
    /// Adds to `bias` what hides keys that are out of sight.
    pub(super) fn hide(
        self,
        cx: &mut Cx<'_, '_>,
        mut bias: Option<Val>,
        (row, col): (&Val, &Val),
        elem: ElemTy,
    ) -> Result<Option<Val>> {
        if self.causal {
            let seen = cx.compare(Order::LessEqual, col, row)?;
            let hidden = hidden_unless(cx, &seen, elem)?;
            bias = plus(cx, bias, hidden)?;
        }
        if self.left >= 0 {
            let first = cx.shift(row, -(self.left as f64))?;
            let seen = cx.compare(Order::LessEqual, &first, col)?;
            let hidden = hidden_unless(cx, &seen, elem)?;
            bias = plus(cx, bias, hidden)?;
        }
        if self.right >= 0 {
            let last = cx.shift(row, self.right as f64)?;
            let seen = cx.compare(Order::LessEqual, col, &last)?;
            let hidden = hidden_unless(cx, &seen, elem)?;
            bias = plus(cx, bias, hidden)?;
        }
        Ok(bias)
    }

    /// The bias of queries behind `past`, as far as places tell.
    pub(super) fn bias(
        self,
        cx: &mut Cx<'_, '_>,
        bias: Option<Val>,
        (q, k, past): (&Val, &Val, Option<&Val>),
    ) -> Result<Option<Val>> {
        if !self.causal && self.left < 0 && self.right < 0 {
            return Ok(bias);
        }
        let elem = cx.ty(q).elem;
        let (row, col) = places(cx, q, k, past)?;
        self.hide(cx, bias, (&row, &col), elem)
    }
}

/// Zero where `allowed`, minus infinity elsewhere.
pub(super) fn hidden_unless(cx: &mut Cx<'_, '_>, allowed: &Val, elem: ElemTy) -> Result<Val> {
    let (zero, none) = (cx.scalar(elem, 0.0)?, cx.scalar(elem, f64::NEG_INFINITY)?);
    cx.select(allowed, &zero, &none)
}

/// The sum, when there is something to add to.
pub(super) fn plus(cx: &mut Cx<'_, '_>, a: Option<Val>, b: Val) -> Result<Option<Val>> {
    Ok(Some(match a {
        Some(a) => cx.add(&a, &b)?,
        None => b,
    }))
}

fn attention(cx: &mut Cx<'_, '_>) -> Results {
    let (mut q, mut k, mut v) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let flat = cx.rank(&q) == 3;
    let (q_heads, kv_heads) = (count(cx, "q_num_heads")?, count(cx, "kv_num_heads")?);
    if flat {
        let missing = || Diag::input("attributes `q_num_heads` and `kv_num_heads` are missing");
        let (n, m) = (q_heads.ok_or_else(missing)?, kv_heads.ok_or_else(missing)?);
        (q, k, v) = (heads(cx, &q, n)?, heads(cx, &k, m)?, heads(cx, &v, m)?);
    }
    let (past_k, past_v, valid) = (cx.opt(4), cx.opt(5), cx.opt(6));
    let past = past_k.clone();
    let (k, v) = (behind(cx, past_k, k)?, behind(cx, past_v, v)?);
    let elem = cx.ty(&q).elem;
    let causal = cx.flag("is_causal", false)?;
    let mut window = |name| -> Result<i64> { Ok(cx.int(name)?.unwrap_or(-1)) };
    let (left, right) = (window("left_window_size")?, window("right_window_size")?);
    let sight = Sight { causal, left, right };
    let mut bias = None;
    if let Some(mask) = cx.opt(3) {
        bias = Some(mask_bias(cx, mask, &k, elem)?);
    }
    // A query sees itself where nothing but its place hides keys.
    let sees = bias.is_none() && valid.is_none() && past.is_none() && cx.dims(&q)[2] == cx.dims(&k)[2];
    match (&valid, &past) {
        (Some(valid), None) if causal || left >= 0 || right >= 0 => {
            let (row, col) = places(cx, &q, &k, None)?;
            let rows = length(cx, &q, 2)?;
            let offset = cx.cast(valid, ElemTy::I64)?;
            let offset = cx.shift(&offset, -(rows as f64))?;
            let offset = cx.unsqueeze(&offset, &[1, 2, 3])?;
            let row = cx.add(&row, &offset)?;
            bias = sight.hide(cx, bias, (&row, &col), elem)?;
        }
        _ => bias = sight.bias(cx, bias, (&q, &k, past.as_ref()))?,
    }
    if let Some(valid) = &valid {
        let cols = length(cx, &k, 2)?;
        let col = super::constants::filled(cx, ElemTy::I64, &[1, 1, 1, cols], |i| i[3].into())?;
        let valid = cx.cast(valid, ElemTy::I64)?;
        let valid = cx.unsqueeze(&valid, &[1, 2, 3])?;
        let seen = cx.compare(Order::Less, &col, &valid)?;
        let hidden = hidden_unless(cx, &seen, elem)?;
        bias = plus(cx, bias, hidden)?;
    }
    let parts = Parts {
        q,
        k: k.clone(),
        v: v.clone(),
        bias,
        sees,
        scale: cx.opt_float("scale")?,
        softcap: cx.float("softcap", 0.0)?,
        precision: cx.int("softmax_precision")?.map(tensor::elem).transpose()?,
        mode: cx.int("qk_matmul_output_mode")?.unwrap_or(0),
    };
    let (y, shown) = attend(cx, parts)?;
    let y = if flat { joined(cx, &y)? } else { y };
    Ok(vec![Some(y), Some(k), Some(v), Some(shown)])
}

/// A mask as numbers that are added; keys beyond its end are hidden.
fn mask_bias(cx: &mut Cx<'_, '_>, mut mask: Val, k: &Val, elem: ElemTy) -> Result<Val> {
    let rank = cx.rank(&mask);
    if rank == 0 {
        return Err(Diag::input("`attn_mask` is one number"));
    }
    if let (Dim::Static(n), Dim::Static(all)) = (cx.dims(&mask)[rank - 1], cx.dims(k)[2])
        && n < all
    {
        let (before, mut after) = (vec![0; rank], vec![0; rank]);
        after[rank - 1] = (all - n) as i64;
        let own = cx.ty(&mask).elem;
        let hidden = if own == ElemTy::BOOL { 0.0 } else { f64::NEG_INFINITY };
        let value = cx.scalar(own, hidden)?;
        mask = cx.op(Pad { before, after, mode: PadMode::Constant }, &[&mask, &value])?;
    }
    if cx.ty(&mask).elem == ElemTy::BOOL { hidden_unless(cx, &mask, elem) } else { cx.cast(&mask, elem) }
}

fn rotary(cx: &mut Cx<'_, '_>) -> Results {
    let (x, cos, sin, at) = (cx.input(0)?, cx.input(1)?, cx.input(2)?, cx.opt(3));
    let turn = Turn { cos, sin, at, interleaved: cx.flag("interleaved", false)? };
    let n = count_or_zero(cx, "num_heads")?;
    let size = count_or_zero(cx, "rotary_embedding_dim")?;
    one(rotated(cx, &x, n, size, turn))
}

/// Rotations: cosines and sines, which rows of them, and what makes a pair.
pub(super) struct Turn {
    pub(super) cos: Val,
    pub(super) sin: Val,
    /// Rows of the tables, `[B, S]`; without them the tables have those axes.
    pub(super) at: Option<Val>,
    pub(super) interleaved: bool,
}

/// `x` with the first `size` numbers of its heads rotated, all of them if that is 0: `[B, S, n * d]` or `[B, n, S, d]`.
pub(super) fn rotated(cx: &mut Cx<'_, '_>, x: &Val, n: u64, size: u64, turn: Turn) -> Result<Val> {
    let Turn { mut cos, mut sin, at, interleaved } = turn;
    let whole = cx.dims(x);
    let flat = whole.len() == 3;
    // [B, S, heads, d]
    let y = match whole[..] {
        [batch, length, Dim::Static(width)] if n > 0 && width % n == 0 => {
            cx.reshape(x, vec![batch, length, Dim::Static(n), Dim::Static(width / n)])?
        }
        [_, _, _, _] => cx.transpose(x, &[0, 2, 1, 3])?,
        _ => return Err(Diag::input(format!("input 0 has type {}", cx.ty(x)))),
    };
    let dims = cx.dims(&y);
    let Dim::Static(d) = dims[3] else { return Err(Diag::input("the size of a head must be known")) };
    let size = if size == 0 { d } else { size };
    if size > d || size % 2 != 0 {
        return Err(Diag::input(format!("{size} numbers of a head are to be rotated, heads have {d}")));
    }
    if let Some(at) = at {
        cos = cx.op(Gather { axis: 0 }, &[&cos, &at])?;
        sin = cx.op(Gather { axis: 0 }, &[&sin, &at])?;
    }
    let (cos, sin) = (cx.unsqueeze(&cos, &[2])?, cx.unsqueeze(&sin, &[2])?);
    let part = cx.slice(&y, 3, 0, size)?;
    let half = size / 2;
    let (a, b) = if interleaved {
        let mut every = |start| cx.op(Slice { axis: 3, start, len: half, step: 2 }, &[&part]);
        (every(0)?, every(1)?)
    } else {
        (cx.slice(&part, 3, 0, half)?, cx.slice(&part, 3, half, half)?)
    };
    let (cos, sin) = (pairs(cx, &cos, &cos, interleaved)?, pairs(cx, &sin, &sin, interleaved)?);
    let b = cx.unary(U::Neg, &b)?;
    let moved = pairs(cx, &b, &a, interleaved)?;
    let (still, moved) = (cx.mul(&part, &cos)?, cx.mul(&moved, &sin)?);
    let turned = cx.add(&still, &moved)?;
    let y = if size < d {
        let rest = cx.slice(&y, 3, size, d - size)?;
        cx.concat(&[&turned, &rest], 3)?
    } else {
        turned
    };
    if flat { cx.reshape(&y, whole) } else { cx.transpose(&y, &[0, 2, 1, 3]) }
}

/// `a` and `b` behind one another, or in turn, along axis 3.
fn pairs(cx: &mut Cx<'_, '_>, a: &Val, b: &Val, in_turn: bool) -> Result<Val> {
    if !in_turn {
        return cx.concat(&[a, b], 3);
    }
    let mut dims = cx.dims(a);
    let Dim::Static(half) = dims[3] else { return Err(Diag::input("the size of a head must be known")) };
    let (a, b) = (cx.unsqueeze(a, &[4])?, cx.unsqueeze(b, &[4])?);
    let both = cx.concat(&[&a, &b], 4)?;
    dims[3] = Dim::Static(2 * half);
    cx.reshape(&both, dims)
}

pub(super) fn count_or_zero(cx: &mut Cx<'_, '_>, name: &'static str) -> Result<u64> {
    let n = cx.int(name)?.unwrap_or(0);
    u64::try_from(n).map_err(|_| Diag::input(format!("attribute `{name}` is {n}")))
}

fn causal_conv(cx: &mut Cx<'_, '_>) -> Results {
    let (x, w, bias, past) = (cx.input(0)?, cx.input(1)?, cx.opt(2), cx.opt(3));
    let (xd, wd) = (cx.dims(&x), cx.fixed(&w)?);
    let ([_, Dim::Static(channels), _], [_, _, k]) = (&xd[..], &wd[..]) else {
        return Err(Diag::input(format!("{} is not convolved with {}", cx.ty(&x), cx.ty(&w))));
    };
    let (channels, carried) = (*channels, k.saturating_sub(1));
    let whole = match past {
        Some(past) => cx.concat(&[&past, &x], 2)?,
        None if carried == 0 => x,
        None => {
            let (before, after) = (vec![0, 0, carried as i64], vec![0; 3]);
            cx.op_with(Pad { before, after, mode: PadMode::Constant }, &[Some(&x), None])?
        }
    };
    let groups = u32::try_from(channels).map_err(|_| Diag::input("there are too many channels"))?;
    let y = cx.op(Conv { groups, ..Conv::default() }, &[&whole, &w])?;
    let y = super::linear::biased(cx, &y, bias.as_ref())?;
    let y = match cx.text("activation", "none")?.as_str() {
        "none" => y,
        "silu" | "swish" => cx.op(Silu {}, &[&y])?,
        other => return Err(Diag::input(format!("attribute `activation` is `{other}`"))),
    };
    let n = length(cx, &whole, 2)?;
    let state = cx.slice(&whole, 2, n.saturating_sub(carried), carried)?;
    Ok(vec![Some(y), Some(state)])
}

fn linear_attention(cx: &mut Cx<'_, '_>) -> Results {
    let missing = |what: &str| Diag::input(format!("attribute `{what}` is missing"));
    let hq = count(cx, "q_num_heads")?.ok_or_else(|| missing("q_num_heads"))?;
    let hk = count(cx, "kv_num_heads")?.ok_or_else(|| missing("kv_num_heads"))?;
    let rule = cx.text("update_rule", "gated_delta")?;
    let (gated, delta) = match rule.as_str() {
        "linear" => (false, false),
        "gated" => (true, false),
        "delta" => (false, true),
        "gated_delta" => (true, true),
        other => return Err(Diag::input(format!("attribute `update_rule` is `{other}`"))),
    };
    cx.ignore(&["chunk_size"]);
    if hq % hk != 0 {
        return Err(Diag::input(format!("{hq} heads of queries do not share {hk} heads of keys")));
    }
    let (q, k, v) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let elem = cx.ty(&q).elem;
    let mut split = |x: &Val, n: u64| -> Result<Val> {
        let wide = cx.cast(x, ElemTy::F32)?;
        heads(cx, &wide, n)
    };
    let (q, k, v) = (split(&q, hq)?, split(&k, hk)?, split(&v, hk)?);
    let (kd, vd) = (cx.fixed(&k)?, cx.fixed(&v)?);
    let (batch, steps, dk, dv) = (kd[0], kd[2], kd[3], vd[3]);
    if steps > MOST_STEPS {
        return Err(Diag::input(format!("{steps} steps are more than the {MOST_STEPS} that are unrolled")));
    }
    let kept = cx.opt(3).map(|s| cx.ty(&s).elem).unwrap_or(elem);
    let mut state = match cx.opt(3) {
        Some(state) => cx.cast(&state, ElemTy::F32)?,
        None => {
            let zero = cx.scalar(ElemTy::F32, 0.0)?;
            cx.expand(&zero, [batch, hk, dk, dv].map(Dim::Static).to_vec())?
        }
    };
    let decay = match cx.opt(4).filter(|_| gated) {
        None => None,
        Some(g) => {
            let g = split_wide(cx, &g, hk)?;
            Some(cx.unary(U::Exp, &g)?)
        }
    };
    let rate = match cx.opt(5).filter(|_| delta) {
        None => None,
        Some(b) => {
            let width = length(cx, &b, 2)?;
            Some(split_wide(cx, &b, width)?)
        }
    };
    if decay.is_some() != gated || rate.is_some() != delta {
        return Err(Diag::input(format!("`decay` or `beta` are missing for the rule `{rule}`")));
    }
    let scale = cx.opt_float("scale")?.filter(|&s| s != 0.0).unwrap_or(1.0 / (dk as f64).sqrt());
    let mut outputs = vec![];
    for t in 0..steps {
        let mut at = |x: &Val| cx.slice(x, 2, t, 1);
        let (q, k, mut v) = (at(&q)?, at(&k)?, at(&v)?);
        let (decay, rate) =
            (decay.as_ref().map(&mut at).transpose()?, rate.as_ref().map(&mut at).transpose()?);
        if let Some(decay) = decay {
            let column = swapped(cx, &decay)?;
            state = cx.mul(&state, &column)?;
        }
        if let Some(rate) = rate {
            let known = cx.op(Dot {}, &[&k, &state])?;
            let fresh = cx.sub(&v, &known)?;
            v = cx.mul(&fresh, &rate)?;
        }
        let column = swapped(cx, &k)?;
        let outer = cx.mul(&column, &v)?;
        state = cx.add(&state, &outer)?;
        let read = if hq == hk { state.clone() } else { repeated(cx, &state, hq / hk)? };
        let y = cx.op(Dot {}, &[&q, &read])?;
        outputs.push(cx.scale(&y, scale)?);
    }
    let parts: Vec<&Val> = outputs.iter().collect();
    if parts.is_empty() {
        return Err(Diag::input("the sequence is empty"));
    }
    let y = cx.concat(&parts, 2)?;
    let y = joined(cx, &y)?;
    let (y, state) = (cx.cast(&y, elem)?, cx.cast(&state, kept)?);
    Ok(vec![Some(y), Some(state)])
}

/// `[B, T, n * d]` as `[B, n, T, d]` of f32.
fn split_wide(cx: &mut Cx<'_, '_>, x: &Val, n: u64) -> Result<Val> {
    let wide = cx.cast(x, ElemTy::F32)?;
    heads(cx, &wide, n)
}
