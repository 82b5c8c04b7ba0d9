//! Recurrent networks over sequences of known length, which are unrolled.

use super::Results;
use super::linear::swapped;
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::ops::{Dot, Tanh, UnaryKind as U};
use quantc_ir::ty::Dim;

onnx_ops! {
    /// Default activations; all sequences of one length.
    "" "GRU" since 7 => |cx| run(cx, 3);
    /// Default activations; all sequences of one length.
    "" "LSTM" since 7 => |cx| run(cx, 4);
    /// Default activation; all sequences of one length.
    "" "RNN" since 7 => |cx| run(cx, 1);
}

/// The most steps that are unrolled.
const MOST_STEPS: u64 = 512;

/// The numbers of one direction.
struct Cell {
    gates: u64,
    hidden: u64,
    /// `[in, gates * hidden]`.
    w: Val,
    /// `[hidden, gates * hidden]`.
    r: Val,
    bias: Option<(Val, Val)>,
    peepholes: Option<[Val; 3]>,
    linear_before_reset: bool,
}

impl Cell {
    /// Gate `i` of numbers `[.., gates * hidden]`.
    fn gate(&self, cx: &mut Cx<'_, '_>, x: &Val, i: u64) -> Result<Val> {
        let last = cx.rank(x) - 1;
        cx.slice(x, last, i * self.hidden, self.hidden)
    }

    /// One step from the state `h` and, of LSTM, `c`.
    fn step(&self, cx: &mut Cx<'_, '_>, x: &Val, h: &Val, c: Option<&Val>) -> Result<(Val, Option<Val>)> {
        let mut from_x = cx.op(Dot {}, &[x, &self.w])?;
        let mut from_h = cx.op(Dot {}, &[h, &self.r])?;
        if let Some((wb, rb)) = &self.bias {
            from_x = cx.add(&from_x, wb)?;
            from_h = cx.add(&from_h, rb)?;
        }
        match (self.gates, c) {
            (4, Some(c)) => self.lstm(cx, &from_x, &from_h, c),
            (3, _) => Ok((self.gru(cx, &from_x, &from_h, h)?, None)),
            _ => {
                let sum = cx.add(&from_x, &from_h)?;
                Ok((cx.op(Tanh {}, &[&sum])?, None))
            }
        }
    }

    fn lstm(&self, cx: &mut Cx<'_, '_>, from_x: &Val, from_h: &Val, c: &Val) -> Result<(Val, Option<Val>)> {
        let sum = cx.add(from_x, from_h)?;
        let mut gate = |i: u64| self.gate(cx, &sum, i);
        let (mut i, mut o, mut f, g) = (gate(0)?, gate(1)?, gate(2)?, gate(3)?);
        if let Some([pi, _, pf]) = &self.peepholes {
            i = seen(cx, &i, pi, c)?;
            f = seen(cx, &f, pf, c)?;
        }
        let (i, f, g) = (cx.unary(U::Sigmoid, &i)?, cx.unary(U::Sigmoid, &f)?, cx.op(Tanh {}, &[&g])?);
        let (kept, new) = (cx.mul(&f, c)?, cx.mul(&i, &g)?);
        let c = cx.add(&kept, &new)?;
        if let Some([_, po, _]) = &self.peepholes {
            o = seen(cx, &o, po, &c)?;
        }
        let (o, shown) = (cx.unary(U::Sigmoid, &o)?, cx.op(Tanh {}, &[&c])?);
        Ok((cx.mul(&o, &shown)?, Some(c)))
    }

    fn gru(&self, cx: &mut Cx<'_, '_>, from_x: &Val, from_h: &Val, h: &Val) -> Result<Val> {
        let mut both = |i: u64| -> Result<Val> {
            let (a, b) = (self.gate(cx, from_x, i)?, self.gate(cx, from_h, i)?);
            let sum = cx.add(&a, &b)?;
            cx.unary(U::Sigmoid, &sum)
        };
        let (z, r) = (both(0)?, both(1)?);
        let inner = if self.linear_before_reset {
            let old = self.gate(cx, from_h, 2)?;
            cx.mul(&r, &old)?
        } else {
            let reset = cx.mul(&r, h)?;
            let weights = self.gate(cx, &self.r, 2)?;
            let mut old = cx.op(Dot {}, &[&reset, &weights])?;
            if let Some((_, rb)) = &self.bias {
                let bias = self.gate(cx, rb, 2)?;
                old = cx.add(&old, &bias)?;
            }
            old
        };
        let new = self.gate(cx, from_x, 2)?;
        let new = cx.add(&new, &inner)?;
        let new = cx.op(Tanh {}, &[&new])?;
        // h' = (1 - z) * new + z * h
        let old = cx.sub(h, &new)?;
        let part = cx.mul(&z, &old)?;
        cx.add(&new, &part)
    }
}

/// `gate + peephole * c`.
fn seen(cx: &mut Cx<'_, '_>, gate: &Val, peephole: &Val, c: &Val) -> Result<Val> {
    let more = cx.mul(peephole, c)?;
    cx.add(gate, &more)
}

/// The activations that an operator has when none are given.
fn check_activations(cx: &mut Cx<'_, '_>, gates: u64) -> Result<()> {
    for name in ["activations", "activation_alpha", "activation_beta", "clip", "input_forget"] {
        if cx.has(name) {
            return Err(Diag::input(format!("attribute `{name}` of a network of {gates} gates is not supported")));
        }
    }
    Ok(())
}

fn run(cx: &mut Cx<'_, '_>, gates: u64) -> Results {
    check_activations(cx, gates)?;
    let (mut x, w, r) = (cx.input(0)?, cx.input(1)?, cx.input(2)?);
    let (bias, lengths) = (cx.opt(3), cx.opt(4));
    let by_batch = cx.flag("layout", false)?;
    let linear_before_reset = cx.flag("linear_before_reset", false)?;
    cx.ignore(&["hidden_size"]);
    if by_batch {
        x = cx.transpose(&x, &[1, 0, 2])?;
    }
    let (xd, rd) = (cx.dims(&x), cx.fixed(&r)?);
    let ([Dim::Static(steps), batch, _], [directions, _, hidden]) = (&xd[..], &rd[..]) else {
        return Err(Diag::input(format!("{} is no sequence of known length", cx.ty(&x))));
    };
    let (steps, batch, directions, hidden) = (*steps, *batch, *directions, *hidden);
    if steps == 0 || steps > MOST_STEPS {
        return Err(Diag::input(format!("{steps} steps are none, or more than {MOST_STEPS}, which are unrolled")));
    }
    if lengths.is_some() {
        let own = cx.must_know(4, "sequence_lens")?;
        if own.ints().iter().any(|&n| n != i128::from(steps)) {
            return Err(Diag::input("sequences are of different lengths"));
        }
    }
    let reversed: &[bool] = match (cx.text("direction", "forward")?.as_str(), directions) {
        ("forward", 1) => &[false],
        ("reverse", 1) => &[true],
        ("bidirectional", 2) => &[false, true],
        (other, n) => return Err(Diag::input(format!("attribute `direction` is `{other}`, weights are for {n}"))),
    };
    let elem = cx.ty(&x).elem;
    let zero = cx.scalar(elem, 0.0)?;
    let zero = cx.expand(&zero, vec![batch, Dim::Static(hidden)])?;
    let (mut all, mut last, mut cells) = (vec![], vec![], vec![]);
    for (d, &reverse) in reversed.iter().enumerate() {
        let part = |cx: &mut Cx<'_, '_>, v: &Val| -> Result<Val> {
            let one = cx.slice(v, 0, d as u64, 1)?;
            cx.squeeze(&one, &[0])
        };
        let start = |cx: &mut Cx<'_, '_>, i: usize| -> Result<Val> {
            let Some(state) = cx.opt(i) else { return Ok(zero.clone()) };
            let state = if by_batch { cx.transpose(&state, &[1, 0, 2])? } else { state };
            part(cx, &state)
        };
        let (w, r) = (part(cx, &w)?, part(cx, &r)?);
        let bias = match &bias {
            None => None,
            Some(bias) => {
                let bias = part(cx, bias)?;
                let n = gates * hidden;
                Some((cx.slice(&bias, 0, 0, n)?, cx.slice(&bias, 0, n, n)?))
            }
        };
        let peepholes = match cx.opt(7).filter(|_| gates == 4) {
            None => None,
            Some(p) => {
                let p = part(cx, &p)?;
                let mut at = |i: u64| cx.slice(&p, 0, i * hidden, hidden);
                Some([at(0)?, at(1)?, at(2)?])
            }
        };
        let (w, r) = (swapped(cx, &w)?, swapped(cx, &r)?);
        let cell = Cell { gates, hidden, w, r, bias, peepholes, linear_before_reset };
        let mut h = start(cx, 5)?;
        let mut c = if gates == 4 { Some(start(cx, 6)?) } else { None };
        let mut outputs = vec![];
        for t in 0..steps {
            let t = if reverse { steps - 1 - t } else { t };
            let now = cx.slice(&x, 0, t, 1)?;
            let now = cx.squeeze(&now, &[0])?;
            (h, c) = cell.step(cx, &now, &h, c.as_ref())?;
            outputs.push(cx.unsqueeze(&h, &[0, 1])?);
        }
        if reverse {
            outputs.reverse();
        }
        let outputs: Vec<&Val> = outputs.iter().collect();
        all.push(cx.concat(&outputs, 0)?);
        last.push(cx.unsqueeze(&h, &[0])?);
        if let Some(c) = &c {
            cells.push(cx.unsqueeze(c, &[0])?);
        }
    }
    let mut together = |parts: &[Val], axis: usize, turned: &[usize]| -> Result<Option<Val>> {
        let parts: Vec<&Val> = parts.iter().collect();
        if parts.is_empty() {
            return Ok(None);
        }
        let y = cx.concat(&parts, axis)?;
        Ok(Some(if by_batch { cx.transpose(&y, turned)? } else { y }))
    };
    Ok(vec![together(&all, 1, &[2, 0, 1, 3])?, together(&last, 0, &[1, 0, 2])?, together(&cells, 0, &[1, 0, 2])?])
}
