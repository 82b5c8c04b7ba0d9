//! Resizing: along each axis a constant matrix that says which elements a result is made of.

use super::{Results, one};
use crate::onnx::build::Val;
use crate::onnx::node::Cx;
use crate::onnx::tensor::MOST_READ;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::eval::Tensor;
use quantc_ir::ops::{Gather, MatMul};
use quantc_ir::ty::ElemTy;

onnx_ops! {
    "" "CenterCropPad" since 18 => center_crop_pad;
    "" "Resize" since 10 => resize;
    "" "Upsample" since 7 => resize;
}

/// How a place of the result is mapped to one of the input.
#[derive(Clone, Copy, PartialEq)]
enum Coordinates {
    HalfPixel,
    HalfPixelSymmetric,
    PytorchHalfPixel,
    AlignCorners,
    Asymmetric,
    /// With the part of the axis that is resized, as shares of it.
    CropAndResize(f64, f64),
}

/// Which elements count, and how much.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Nearest(Nearest),
    Linear,
    /// With the coefficient `a`.
    Cubic(f64),
}

#[derive(Clone, Copy, PartialEq)]
enum Nearest {
    PreferFloor,
    PreferCeil,
    Floor,
    Ceil,
}

/// One axis.
struct Axis {
    from: u64,
    to: u64,
    scale: f64,
    coordinates: Coordinates,
    mode: Mode,
    antialias: bool,
    exclude_outside: bool,
}

impl Axis {
    /// The place in the input that place `i` of the result stands for; `None` outside of the part that is resized.
    fn origin(&self, i: u64) -> Option<f64> {
        let (x, n, to) = (i as f64, self.from as f64, self.scale * self.from as f64);
        Some(match self.coordinates {
            Coordinates::HalfPixel => (x + 0.5) / self.scale - 0.5,
            Coordinates::HalfPixelSymmetric => {
                let adjustment = self.to as f64 / to;
                n / 2.0 * (1.0 - adjustment) + (x + 0.5) / self.scale - 0.5
            }
            Coordinates::PytorchHalfPixel if to == 1.0 => -0.5,
            Coordinates::PytorchHalfPixel => (x + 0.5) / self.scale - 0.5,
            Coordinates::AlignCorners if to == 1.0 => 0.0,
            Coordinates::AlignCorners => x * (n - 1.0) / (to - 1.0),
            Coordinates::Asymmetric => x / self.scale,
            Coordinates::CropAndResize(start, end) => {
                let within = if to == 1.0 { 0.5 } else { x / (to - 1.0) };
                let at = (start + within * (end - start)) * (n - 1.0);
                return (0.0..=n - 1.0).contains(&at).then_some(at);
            }
        })
    }

    /// The elements that make up place `i` of the result, with their shares.
    fn taps(&self, i: u64) -> Option<Vec<(u64, f64)>> {
        let at = self.origin(i)?;
        let last = self.from - 1;
        let clamped = |k: f64| k.clamp(0.0, last as f64) as u64;
        let (kernel, reach): (&dyn Fn(f64) -> f64, f64) = match self.mode {
            Mode::Nearest(nearest) => {
                let k = match nearest {
                    Nearest::PreferFloor => (at - 0.5).ceil(),
                    Nearest::PreferCeil => (at + 0.5).floor(),
                    Nearest::Floor => at.floor(),
                    Nearest::Ceil => at.ceil(),
                };
                return Some(vec![(clamped(k), 1.0)]);
            }
            Mode::Linear => (&|d: f64| (1.0 - d.abs()).max(0.0), 1.0),
            Mode::Cubic(a) => (
                &move |d: f64| {
                    let d = d.abs();
                    if d <= 1.0 {
                        ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0
                    } else if d < 2.0 {
                        ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a
                    } else {
                        0.0
                    }
                },
                2.0,
            ),
        };
        // Where the result is smaller, an antialiasing kernel is as much wider.
        let squeeze = if self.antialias { self.scale.min(1.0) } else { 1.0 };
        let (first, end) = ((at - reach / squeeze).floor(), (at + reach / squeeze).ceil());
        let mut taps = vec![];
        let mut k = first;
        while k <= end {
            let share = kernel((k - at) * squeeze);
            let outside = k < 0.0 || k > last as f64;
            if share != 0.0 && !(outside && self.exclude_outside) {
                taps.push((clamped(k), share));
            }
            k += 1.0;
        }
        if self.antialias || self.exclude_outside {
            let sum: f64 = taps.iter().map(|t| t.1).sum();
            taps.iter_mut().for_each(|t| t.1 /= sum);
        }
        Some(taps)
    }
}

/// Floats of an attribute in old versions, of operand `i` in newer ones; nothing when there are none.
fn floats(cx: &mut Cx<'_, '_>, i: usize, what: &'static str) -> Result<Option<Vec<f64>>> {
    if cx.opt(i).is_none() {
        return Ok(None);
    }
    let xs = cx.must_know(i, what)?.reals();
    Ok(Some(xs).filter(|xs| !xs.is_empty()))
}

fn mode(cx: &mut Cx<'_, '_>) -> Result<Mode> {
    let default = if cx.opset < 11 { "floor" } else { "round_prefer_floor" };
    let nearest = match cx.text("nearest_mode", default)?.as_str() {
        "round_prefer_floor" => Nearest::PreferFloor,
        "round_prefer_ceil" => Nearest::PreferCeil,
        "floor" => Nearest::Floor,
        "ceil" => Nearest::Ceil,
        other => return Err(Diag::input(format!("attribute `nearest_mode` is `{other}`"))),
    };
    let a = cx.float("cubic_coeff_a", -0.75)?;
    match cx.text("mode", "nearest")?.as_str() {
        "nearest" => Ok(Mode::Nearest(nearest)),
        "linear" | "bilinear" => Ok(Mode::Linear),
        "cubic" => Ok(Mode::Cubic(a)),
        other => Err(Diag::input(format!("attribute `mode` is `{other}`"))),
    }
}

fn resize(cx: &mut Cx<'_, '_>) -> Results {
    let x = cx.input(0)?;
    let from = cx.fixed(&x)?;
    let rank = from.len();
    let old = cx.opset < 11;
    let (roi, scales) = if old {
        let scales = match cx.floats_attr("scales")? {
            Some(scales) => Some(scales.into_iter().map(f64::from).collect()),
            None => floats(cx, 1, "scales")?,
        };
        (None, scales)
    } else {
        (floats(cx, 1, "roi")?, floats(cx, 2, "scales")?)
    };
    let sizes = if old { None } else { cx.known_ints(3, "sizes")?.filter(|s| !s.is_empty()) };
    let axes = match cx.ints_attr("axes")? {
        None => (0..rank).collect::<Vec<_>>(),
        Some(axes) => {
            cx.axes(&axes, rank)?;
            axes.iter().map(|&a| cx.axis(a, rank)).collect::<Result<_>>()?
        }
    };
    let policy = cx.text("keep_aspect_ratio_policy", "stretch")?;
    let default = if old { "asymmetric" } else { "half_pixel" };
    let coordinates = cx.text("coordinate_transformation_mode", default)?;
    let (mode, antialias) = (mode(cx)?, cx.flag("antialias", false)?);
    let (exclude_outside, outside) = (cx.flag("exclude_outside", false)?, cx.float("extrapolation_value", 0.0)?);
    let bad = |what: &str| Diag::input(format!("`{what}` does not fit the {} axes", axes.len()));
    let targets = targets(&from, &axes, scales, sizes, &policy)?;
    let mut y = x;
    for (i, (&axis, &(to, scale))) in axes.iter().zip(&targets).enumerate() {
        let coordinates = match coordinates.as_str() {
            "half_pixel" => Coordinates::HalfPixel,
            "half_pixel_symmetric" => Coordinates::HalfPixelSymmetric,
            "pytorch_half_pixel" => Coordinates::PytorchHalfPixel,
            "align_corners" => Coordinates::AlignCorners,
            "asymmetric" => Coordinates::Asymmetric,
            "tf_crop_and_resize" => {
                let roi = roi.as_ref().filter(|r| r.len() == 2 * axes.len()).ok_or_else(|| bad("roi"))?;
                Coordinates::CropAndResize(roi[i], roi[axes.len() + i])
            }
            other => return Err(Diag::input(format!("attribute `coordinate_transformation_mode` is `{other}`"))),
        };
        let whole = !matches!(coordinates, Coordinates::CropAndResize(a, b) if (a, b) != (0.0, 1.0));
        if to == from[axis] && scale == 1.0 && whole {
            continue;
        }
        let one = Axis { from: from[axis], to, scale, coordinates, mode, antialias, exclude_outside };
        y = along(cx, &y, axis, &one, outside)?;
    }
    one(Ok(y))
}

/// Extents and scales of the axes.
fn targets(
    from: &[u64],
    axes: &[usize],
    scales: Option<Vec<f64>>,
    sizes: Option<Vec<i64>>,
    policy: &str,
) -> Result<Vec<(u64, f64)>> {
    let bad = |what: &str| Diag::input(format!("`{what}` does not fit the {} axes", axes.len()));
    if let Some(sizes) = sizes {
        if sizes.len() != axes.len() || sizes.iter().any(|&s| !(0..=1 << 31).contains(&s)) {
            return Err(bad("sizes"));
        }
        let ratios: Vec<f64> = sizes.iter().zip(axes).map(|(&s, &a)| s as f64 / from[a] as f64).collect();
        let shared = match policy {
            "stretch" => None,
            "not_larger" => Some(ratios.iter().copied().fold(f64::INFINITY, f64::min)),
            "not_smaller" => Some(ratios.iter().copied().fold(0.0, f64::max)),
            other => return Err(Diag::input(format!("attribute `keep_aspect_ratio_policy` is `{other}`"))),
        };
        let one = |((&size, &ratio), &axis): ((&i64, &f64), &usize)| match shared {
            None => (size as u64, ratio),
            Some(scale) => ((scale * from[axis] as f64 + 0.5).floor() as u64, scale),
        };
        return Ok(sizes.iter().zip(&ratios).zip(axes).map(one).collect());
    }
    let scales = scales.ok_or_else(|| Diag::input("neither `scales` nor `sizes` are given"))?;
    if scales.len() != axes.len() || scales.iter().any(|&s| s.is_nan() || s <= 0.0 || s > 1e6) {
        return Err(bad("scales"));
    }
    Ok(scales.iter().zip(axes).map(|(&s, &a)| ((from[a] as f64 * s).floor() as u64, s)).collect())
}

/// The tensor resized along one axis.
fn along(cx: &mut Cx<'_, '_>, x: &Val, axis: usize, one: &Axis, outside: f64) -> Result<Val> {
    let size = one.to.checked_mul(one.from).filter(|&n| n <= MOST_READ);
    if one.from == 0 || size.is_none() {
        return Err(Diag::input(format!("axis {axis} of {} is too large to be resized, or empty", cx.ty(x))));
    }
    cx.spend(size.unwrap_or(0))?;
    let taps: Vec<Option<Vec<(u64, f64)>>> = (0..one.to).map(|i| one.taps(i)).collect();
    let elem = cx.ty(x).elem;
    let y = if let Mode::Nearest(_) = one.mode {
        let at: Vec<i64> = taps.iter().map(|t| t.as_ref().map_or(0, |t| t[0].0 as i64)).collect();
        let at = cx.ints(&at);
        cx.op(Gather { axis: axis as u8 }, &[x, &at])?
    } else {
        let mut matrix = vec![0.0; (one.to * one.from) as usize];
        for (row, taps) in matrix.chunks_mut(one.from as usize).zip(&taps) {
            taps.iter().flatten().for_each(|&(k, share)| row[k as usize] += share as f32);
        }
        let matrix = cx.constant(Tensor::f32(&[one.to, one.from], matrix)?);
        // The axis is moved to the end and back.
        let rank = cx.rank(x);
        let mut there: Vec<usize> = (0..rank).collect();
        there.swap(axis, rank - 1);
        let wide = if elem.is_float() { x.clone() } else { cx.cast(x, ElemTy::F32)? };
        let rows = cx.transpose(&wide, &there)?;
        let rows = cx.op(MatMul::default(), &[&rows, &matrix])?;
        let back = cx.transpose(&rows, &there)?;
        cx.cast(&back, elem)?
    };
    if taps.iter().all(Option::is_some) {
        return Ok(y);
    }
    let mut dims = vec![1; cx.rank(x)];
    dims[axis] = one.to;
    let inside = super::constants::filled(cx, ElemTy::BOOL, &dims, |i| {
        i128::from(taps.get(i[axis] as usize).is_some_and(Option::is_some))
    })?;
    let outside = cx.scalar(elem, outside)?;
    cx.select(&inside, &y, &outside)
}

fn center_crop_pad(cx: &mut Cx<'_, '_>) -> Results {
    use quantc_ir::ops::{Pad, PadMode};
    let x = cx.input(0)?;
    let (dims, rank) = (cx.fixed(&x)?, cx.rank(&x));
    let shape = cx.known_ints(1, "shape")?.unwrap_or_default();
    let axes = match cx.ints_attr("axes")? {
        None => (0..rank).collect::<Vec<_>>(),
        Some(axes) => axes.iter().map(|&a| cx.axis(a, rank)).collect::<Result<_>>()?,
    };
    if shape.len() != axes.len() || shape.iter().any(|&s| s < 0) {
        return Err(Diag::input(format!("`shape` {shape:?} does not fit {} axes", axes.len())));
    }
    let (mut before, mut after) = (vec![0; rank], vec![0; rank]);
    for (&axis, &to) in axes.iter().zip(&shape) {
        let more = to - i64::try_from(dims[axis]).map_err(|_| Diag::input("an extent is too large"))?;
        // Towards the start where it is odd, for margins and for what is cut off.
        (before[axis], after[axis]) = (more / 2, more - more / 2);
    }
    one(cx.op_with(Pad { before, after, mode: PadMode::Constant }, &[Some(&x), None]))
}
