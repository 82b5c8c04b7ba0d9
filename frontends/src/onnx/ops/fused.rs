//! Attention and embeddings as ONNX Runtime's optimizer and the builders of its models write them.
//!
//! What their lengths and padding say counts for whole batches; a text model reads one sequence without padding, in which all
//! keys count.

use super::attention::{Parts, Sight, Turn, attend, behind, count, count_or_zero, heads, joined, rotated};
use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{Gather, LayerNorm, Order, Real, ReduceKind};
use quantc_ir::ty::{Dim, ElemTy};

onnx_ops! {
    /// One matrix for queries, keys and values; masks for each key.
    "com.microsoft" "Attention" since 1 => attention;
    "com.microsoft" "EmbedLayerNormalization" since 1 => embed_norm;
    /// Without quantized caches; lengths are those of text models without padding, or known.
    "com.microsoft" "GroupQueryAttention" since 1 => grouped;
    /// Separate or packed operands; masks for each key.
    "com.microsoft" "MultiHeadAttention" since 1 => multi_head;
    "com.microsoft" "RotaryEmbedding" since 1 => rotary;
}

/// The number that ONNX Runtime hides keys with, unless a node says another.
const HIDDEN: f32 = -10000.0;

/// Refuses operands from `first` on, which nothing here reads.
fn no_more(cx: &Cx<'_, '_>, first: usize) -> Result<()> {
    match (first..cx.inputs.len()).find(|&i| cx.opt(i).is_some()) {
        Some(i) => Err(Diag::input(format!("input {i} is not supported"))),
        None => Ok(()),
    }
}

/// A part of the last axis.
fn columns(cx: &mut Cx<'_, '_>, x: &Val, start: u64, len: u64) -> Result<Val> {
    let last = cx.rank(x) - 1;
    cx.slice(x, last, start, len)
}

/// The width of a value, which must be known.
fn width(cx: &Cx<'_, '_>, x: &Val) -> Result<u64> {
    let last = cx.dims(x).last().and_then(|d| d.fixed());
    last.ok_or_else(|| Diag::input(format!("the width of {} must be known", cx.ty(x))))
}

/// Keys that a mask has zeros for, or that lie behind the length of their sequence, hidden by `hidden`: what is added to
/// the scores. Sequences are as long as all keys in a text model.
fn masked(cx: &mut Cx<'_, '_>, mask: &Val, k: &Val, hidden: f64, elem: ElemTy) -> Result<Option<Val>> {
    let (batch, keys) = (cx.dims(k)[0], cx.dims(k)[2]);
    let own = cx.ty(mask).elem;
    let dims = cx.dims(mask);
    let is = |want: &[Dim]| own.int().is_some() && dims == want;
    let seen = if is(&[batch]) {
        if cx.tokens {
            return Ok(None);
        }
        let places = cx.places(keys)?;
        let places = cx.cast(&places, own)?;
        let lengths = cx.unsqueeze(mask, &[1])?;
        cx.compare(Order::Less, &places, &lengths)?
    } else if is(&[batch, keys]) {
        let zero = cx.scalar(own, 0.0)?;
        cx.compare(Order::Less, &zero, mask)?
    } else {
        return Err(Diag::input(format!("masks of type {} are not supported", cx.ty(mask))));
    };
    let (nothing, hidden) = (cx.scalar(elem, 0.0)?, cx.scalar(elem, hidden)?);
    let bias = cx.select(&seen, &nothing, &hidden)?;
    cx.unsqueeze(&bias, &[1, 2]).map(Some)
}

/// What is added to the scores: a mask of keys and numbers for all of them.
fn biases(cx: &mut Cx<'_, '_>, mask: Option<Val>, more: Option<Val>, k: &Val) -> Result<Option<Val>> {
    let (hidden, elem) = (cx.float("mask_filter_value", HIDDEN)?, cx.ty(k).elem);
    let mask = mask.map(|m| masked(cx, &m, k, hidden, elem)).transpose()?.flatten();
    Ok(match (mask, more) {
        (Some(a), Some(b)) => Some(cx.add(&a, &b)?),
        (a, b) => a.or(b),
    })
}

/// Attention of heads, as rows.
fn rows_of(
    cx: &mut Cx<'_, '_>,
    (q, k, v): (Val, Val, Val),
    (past, mut bias): (Option<Val>, Option<Val>),
    sight: Sight,
    softcap: f64,
) -> Result<Val> {
    let scale = cx.opt_float("scale")?.filter(|&s| s != 0.0);
    bias = sight.bias(cx, bias, (&q, &k, past.as_ref()))?;
    // Masks hide by finite numbers here, or what comes later: a row always sees something.
    let parts = Parts { q, k, v, bias, sees: true, scale, softcap, precision: None, mode: 0 };
    let (y, _) = attend(cx, parts)?;
    joined(cx, &y)
}

/// Only what comes later is hidden, if anything is.
fn causal(causal: bool) -> Sight {
    Sight { causal, left: -1, right: -1 }
}

fn attention(cx: &mut Cx<'_, '_>) -> Results {
    let n = count(cx, "num_heads")?.ok_or_else(|| Diag::input("attribute `num_heads` is missing"))?;
    let (x, w, bias) = (cx.input(0)?, cx.input(1)?, cx.opt(2));
    no_more(cx, 6)?;
    if cx.opt(4).is_some() || cx.flag("do_rotary", false)? {
        return Err(Diag::input("earlier keys and rotations are not supported"));
    }
    cx.ignore(&["past_present_share_buffer", "rotary_embedding_dim"]);
    let sight = causal(cx.flag("unidirectional", false)?);
    let all = super::linear::product(cx, &x, &w)?;
    let all = match bias {
        Some(bias) => cx.add(&all, &bias)?,
        None => all,
    };
    let whole = width(cx, &all)?;
    let sizes = match cx.ints_attr("qkv_hidden_sizes")? {
        None => vec![whole / 3; 3],
        Some(sizes) => {
            let fit = |s: &i64| {
                u64::try_from(*s).map_err(|_| Diag::input("attribute `qkv_hidden_sizes` is negative"))
            };
            sizes.iter().map(fit).collect::<Result<_>>()?
        }
    };
    let total = sizes.iter().try_fold(0u64, |a, &s| a.checked_add(s));
    let &[wq, wk, wv] = &sizes[..] else {
        return Err(Diag::input("attribute `qkv_hidden_sizes` has not 3 numbers"));
    };
    if total != Some(whole) || wq != wk {
        return Err(Diag::input(format!("{whole} columns are not parted into {sizes:?}")));
    }
    let q = columns(cx, &all, 0, wq)?;
    let k = columns(cx, &all, wq, wk)?;
    let v = columns(cx, &all, wq + wk, wv)?;
    let (q, k, v) = (heads(cx, &q, n)?, heads(cx, &k, n)?, heads(cx, &v, n)?);
    let (mask, more) = (cx.opt(3), cx.opt(5));
    let bias = biases(cx, mask, more, &k)?;
    one(rows_of(cx, (q, k, v), (None, bias), sight, 0.0))
}

fn multi_head(cx: &mut Cx<'_, '_>) -> Results {
    let n = count(cx, "num_heads")?.ok_or_else(|| Diag::input("attribute `num_heads` is missing"))?;
    no_more(cx, 8)?;
    let sight = causal(cx.flag("unidirectional", false)?);
    let mut q = cx.input(0)?;
    let (q, k, v) = match (cx.rank(&q), cx.opt(1), cx.opt(2)) {
        // Queries, keys and values of each head side by side: [B, S, n, 3, d].
        (5, None, None) => {
            if cx.opt(3).is_some() {
                return Err(Diag::input("a bias on packed operands is not supported"));
            }
            let mut part = |at: u64| -> Result<Val> {
                let one = cx.slice(&q, 3, at, 1)?;
                let one = cx.squeeze(&one, &[3])?;
                cx.transpose(&one, &[0, 2, 1, 3])
            };
            (part(0)?, part(1)?, part(2)?)
        }
        (3, Some(mut k), Some(mut v)) => {
            if let Some(bias) = cx.opt(3) {
                let mut at = 0;
                for x in [&mut q, &mut k, &mut v] {
                    if cx.rank(x) != 3 {
                        return Err(Diag::input("a bias on heads is not supported"));
                    }
                    let wide = width(cx, x)?;
                    let part = cx.slice(&bias, 0, at, wide)?;
                    *x = cx.add(x, &part)?;
                    at += wide;
                }
            }
            // Keys and values of another sequence come as heads.
            let mut split = |x: Val| match cx.rank(&x) {
                3 => heads(cx, &x, n),
                4 => Ok(x),
                _ => Err(Diag::input(format!("keys and values of type {} are not supported", cx.ty(&x)))),
            };
            (split(q)?, split(k)?, split(v)?)
        }
        _ => return Err(Diag::input("packed keys and values are not supported")),
    };
    let (past_k, past_v) = (cx.opt(6), cx.opt(7));
    let (k, v) = (behind(cx, past_k.clone(), k)?, behind(cx, past_v, v)?);
    let (mask, more) = (cx.opt(4), cx.opt(5));
    let bias = biases(cx, mask, more, &k)?;
    let kept = (k.clone(), v.clone());
    let y = rows_of(cx, (q, k, v), (past_k, bias), sight, 0.0)?;
    Ok(vec![Some(y), Some(kept.0), Some(kept.1)])
}

/// Refuses lengths that might leave keys out: those of a text model count all of them.
fn all_count(cx: &mut Cx<'_, '_>, i: usize, length: Dim) -> Result<()> {
    let Some(last) = cx.opt(i) else { return Ok(()) };
    let known = cx.known(&last).transpose()?;
    // A number that is written is the length of one text only.
    if cx.tokens && known.is_none() {
        return Ok(());
    }
    let all = known.is_some_and(|t| t.ints().iter().all(|&n| u64::try_from(n + 1).ok() == length.fixed()));
    if all {
        return Ok(());
    }
    cx.need(&last);
    Err(if cx.tokens {
        Diag::input(format!("input {i} (`seqlens_k`) is the length of one text, whatever text is read"))
            .help("export the model with lengths that follow from its attention mask")
    } else {
        Diag::input(format!("input {i} (`seqlens_k`) must be known, and count all keys"))
            .help("compile it as a text model, which reads one sequence without padding")
    })
}

fn grouped(cx: &mut Cx<'_, '_>) -> Results {
    let missing = |what: &str| Diag::input(format!("attribute `{what}` is missing"));
    let n = count(cx, "num_heads")?.ok_or_else(|| missing("num_heads"))?;
    let m = count(cx, "kv_num_heads")?.ok_or_else(|| missing("kv_num_heads"))?;
    no_more(cx, 11)?;
    if cx.flag("smooth_softmax", false)? || cx.int("qk_output")?.unwrap_or(0) != 0 {
        return Err(Diag::input("attributes `smooth_softmax` and `qk_output` are not supported"));
    }
    let mut q = cx.input(0)?;
    let (mut k, mut v) = match (cx.opt(1), cx.opt(2)) {
        (Some(k), Some(v)) => (k, v),
        (None, None) => {
            let whole = width(cx, &q)?;
            if !whole.is_multiple_of(n + 2 * m) {
                return Err(Diag::input(format!("{whole} columns are not {n} heads and twice {m}")));
            }
            let d = whole / (n + 2 * m);
            let (k, v) = (columns(cx, &q, n * d, m * d)?, columns(cx, &q, (n + m) * d, m * d)?);
            q = columns(cx, &q, 0, n * d)?;
            (k, v)
        }
        _ => return Err(Diag::input("keys without values")),
    };
    let (past_k, past_v) = (cx.opt(3), cx.opt(4));
    let before = match past_k.as_ref().map(|p| cx.dims(p)) {
        Some(dims) => dims.get(2).and_then(|d| d.fixed()).ok_or_else(|| {
            Diag::input("how many keys come before is not known")
                .help("give the named extents of the inputs numbers")
        })?,
        None => 0,
    };
    if cx.flag("do_rotary", false)? {
        let (cos, sin) = (cx.input(7)?, cx.input(8)?);
        let interleaved = cx.flag("rotary_interleaved", false)?;
        let at = match cx.opt(9) {
            Some(at) => at,
            None => {
                let length = cx.dims(&q)[1];
                let at = cx.places(length)?;
                let at = if before == 0 { at } else { cx.shift(&at, before as f64)? };
                cx.unsqueeze(&at, &[0])?
            }
        };
        let size = 2 * width(cx, &cos)?;
        let turn = |cos: &Val, sin: &Val, at: &Val| {
            let (cos, sin, at) = (cos.clone(), sin.clone(), Some(at.clone()));
            Turn { cos, sin, at, interleaved }
        };
        q = rotated(cx, &q, n, size, turn(&cos, &sin, &at))?;
        k = rotated(cx, &k, m, size, turn(&cos, &sin, &at))?;
    } else {
        cx.ignore(&["rotary_interleaved"]);
    }
    let (q, k) = (heads(cx, &q, n)?, heads(cx, &k, m)?);
    v = heads(cx, &v, m)?;
    let (k, v) = (behind(cx, past_k.clone(), k)?, behind(cx, past_v, v)?);
    let length = cx.dims(&k)[2];
    all_count(cx, 5, length)?;
    let left = match cx.int("local_window_size")?.unwrap_or(-1) {
        window if window > 0 => window - 1,
        _ => -1,
    };
    let softcap = cx.float("softcap", 0.0)?;
    let sight = Sight { causal: true, left, right: -1 };
    let kept = (k.clone(), v.clone());
    let y = rows_of(cx, (q, k, v), (past_k, cx.opt(10)), sight, softcap)?;
    Ok(vec![Some(y), Some(kept.0), Some(kept.1)])
}

fn rotary(cx: &mut Cx<'_, '_>) -> Results {
    let (x, mut at, cos, sin) = (cx.input(0)?, cx.input(1)?, cx.input(2)?, cx.input(3)?);
    if cx.flag("is_packed_batching", false)? || cx.float("scale", 1.0)? != 1.0 {
        return Err(Diag::input("attributes `is_packed_batching` and `scale` are not supported"));
    }
    let dims = cx.dims(&x);
    let length = match dims.len() {
        3 => dims[1],
        4 => dims[2],
        _ => return Err(Diag::input(format!("input 0 has type {}", cx.ty(&x)))),
    };
    // One number is the place of the first token.
    if cx.rank(&at) == 1 {
        let places = cx.places(length)?;
        at = cx.add(&places, &at)?;
        at = cx.unsqueeze(&at, &[0])?;
    }
    let n = count_or_zero(cx, "num_heads")?;
    let size = count_or_zero(cx, "rotary_embedding_dim")?;
    let heads = match (n, dims.last()) {
        // Without a number of heads, tables as wide as heads tell it.
        (0, Some(Dim::Static(wide))) if dims.len() == 3 && size == 0 => wide / (2 * width(cx, &cos)?).max(1),
        (n, _) => n,
    };
    let interleaved = cx.flag("interleaved", false)?;
    one(rotated(cx, &x, heads, size, Turn { cos, sin, at: Some(at), interleaved }))
}

fn embed_norm(cx: &mut Cx<'_, '_>) -> Results {
    let (ids, words, places) = (cx.input(0)?, cx.input(2)?, cx.input(3)?);
    let (types, kinds) = (cx.opt(1), cx.opt(4));
    let (gain, bias) = (cx.input(5)?, cx.input(6)?);
    no_more(cx, 9)?;
    let eps = cx.float("epsilon", 1e-12)?;
    cx.ignore(&["mask_index_type"]);
    let words = cx.op(Gather { axis: 0 }, &[&words, &ids])?;
    let at = match cx.opt(8) {
        Some(at) => at,
        None => {
            let Some(&length) = cx.dims(&ids).get(1) else {
                return Err(Diag::input(format!("ids of type {} are not supported", cx.ty(&ids))));
            };
            let at = cx.places(length)?;
            cx.unsqueeze(&at, &[0])?
        }
    };
    let places = cx.op(Gather { axis: 0 }, &[&places, &at])?;
    let mut sum = cx.add(&words, &places)?;
    if let Some(kinds) = kinds {
        let types = match types {
            Some(types) => types,
            None => {
                let zero = cx.scalar(ElemTy::I32, 0.0)?;
                let dims = cx.dims(&ids);
                cx.expand(&zero, dims)?
            }
        };
        let kinds = cx.op(Gather { axis: 0 }, &[&kinds, &types])?;
        sum = cx.add(&sum, &kinds)?;
    }
    let y = cx.op_with(LayerNorm { eps: Real(eps) }, &[Some(&sum), Some(&gain), Some(&bias)])?;
    let lengths = match cx.opt(7) {
        Some(mask) => {
            let mask = cx.cast(&mask, ElemTy::I32)?;
            let sum = cx.reduce(ReduceKind::Sum, &mask, &[1])?;
            cx.squeeze(&sum, &[1])?
        }
        // Without a mask there are no lengths: the result that nodes name all the same is zeros.
        None => {
            let zero = cx.scalar(ElemTy::I32, 0.0)?;
            let batch = cx.dims(&ids)[0];
            cx.expand(&zero, vec![batch])?
        }
    };
    Ok(vec![Some(y), Some(lengths), Some(sum)])
}
