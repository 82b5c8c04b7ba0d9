//! Takes the mean of the error that rounding weights makes off the products.

use super::install::Originals;
use super::round_to_nearest::selects;
use crate::calib::stats::{self, Kind};
use crate::pass::prelude::*;
use crate::told::{Site, Told};
use crate::vectors;
use quantc_ir::ops::{Dequantize, MatMul};
use quantc_ir::quant::{Groups, Params, dequantize_block};
use quantc_ir::scheme::Scheme;
use quantc_ir::weights::{Recipe, WeightDecl, WeightSource, WeightView};

pass! {
    /// Takes the mean of the error that rounding weights makes off the products.
    ///
    /// `b' = b + (W - W') m` with `W'` the rounded matrix and `m` the mean of the rows that it multiplies, from the statistic
    /// `mean` (Nagel et al. 2019, Data-Free Quantization, section 4.2; with means that were measured). Where no vector is added behind
    /// the product, one is: it goes into the kernel's epilogue. The error that is left has mean 0 on the calibration text. Rows
    /// of few channels with a mean, as those behind a norm without a bias, have little to gain.
    ///
    /// Belongs behind the pass that rounds weights and in front of `fuse-dequant-matmul`.
    ///
    /// ```qir before
    /// weight @w : tensor<4x4xf32> = splat 0.75
    /// weight @w.q : tensor<4x4x!q<int8:f32 axis 0>> = inline [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
    /// weight @w.s : tensor<4x1xf32> = splat 1.0
    /// %w = dequantize @w.q, @w.s
    /// %y = matmul %x, %w
    /// {-# calibration %x.mean = [1.0, 2.0, 0.0, -1.0] #-}
    /// ```
    /// ```qir after
    /// %w = dequantize @w.q, @w.s
    /// %0 = matmul %x, %w
    /// %y = add %0, @w.bias
    /// ```
    "bias-correct" => pub struct BiasCorrect {
        /// Weights whose products are corrected, as name patterns of what they were before they were rounded; none given means all.
        only: Vec<Pattern> = vec![],
        /// Weights whose products are left alone, as name patterns.
        skip: Vec<Pattern> = vec![],
        /// Layers to work on, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers left alone, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    needs: [stat(mean)],
    scope: Layer, numerics: Requantizes, stats: keeps
}

/// A product of a rounded matrix.
struct Product {
    op: OpId,
    /// The rows, as they are before they are rounded.
    x: ValueId,
    /// The matrix before it was rounded.
    original: WeightId,
    /// Codes, scales and perhaps zero points.
    parts: Vec<WeightId>,
    scheme: Scheme,
}

impl Pass for BiasCorrect {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !selects(&self.layers, &self.skip_layers, cx.function_name()) {
            return Ok(Changed::No);
        }
        let mut changed = false;
        for op in cx.graph().order().to_vec() {
            let Some(product) = Product::of(cx, op) else { continue };
            let name = cx.module.weights[product.original].name.clone();
            if !selects(&self.only, &self.skip, &name) {
                continue;
            }
            if cx.graph().node(op).op.is::<MatMul>().is_some_and(|m| !m.epilogue.is_empty() || !m.packed.is_empty()) {
                let why = "the product has an epilogue already: let `bias-correct` run before fusion";
                cx.tell(format_args!("@{name}"), format_args!("not corrected: {why}"), Told::Site(Site::skipped(why)));
                continue;
            }
            self.correct(cx, &product, &name)?;
            changed = true;
        }
        Ok(changed.into())
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&self.only, &self.skip, &self.layers, &self.skip_layers)
    }
}

impl Product {
    fn of(cx: &mut PassCx<'_>, op: OpId) -> Option<Product> {
        let graph = cx.graph();
        let node = graph.node(op);
        node.op.is::<MatMul>()?;
        let (_, weight) = graph.def(node.args[1])?;
        weight.op.is::<Dequantize>()?;
        let parts = weight.args.iter().filter(|&&a| !graph.is_none(a)).map(|&a| graph.as_weight(a));
        let parts = parts.collect::<Option<Vec<WeightId>>>()?;
        let scheme = graph.ty(weight.args[0]).elem.scheme()?;
        let mut x = node.args[0];
        while let Some((_, rounding)) =
            graph.def(x).filter(|(_, n)| matches!(n.op, Op::Dequantize(_) | Op::Quantize(_) | Op::Cast(_)))
        {
            x = rounding.args[0];
        }
        let original = Originals::of(cx, parts[0])?;
        Some(Product { op, x, original, parts, scheme })
    }
}

impl BiasCorrect {
    fn correct(&self, cx: &mut PassCx<'_>, product: &Product, name: &str) -> Result<()> {
        cx.check_interrupt()?;
        let Product { op, x, original, ref parts, scheme } = *product;
        let y = cx.graph().node(op).result;
        let there = vectors::added(cx, y);
        let known = stats::key(cx, x, Kind::Mean).ok_or_else(|| stats::missing(cx, x, Kind::Mean))?;
        let weights: Vec<WeightId> =
            std::iter::once(original).chain(parts.iter().copied()).chain(there.map(|(.., b)| b)).collect();
        let mut inputs = vec![known];
        for &w in &weights {
            inputs.push(cx.store.digest(&cx.module.weights, w)?);
        }
        let options = format!("{scheme} {}", there.is_some());
        let recipe = Recipe { step: Self::INFO.name, version: Self::INFO.version, options, inputs };
        let means = match cx.store.has(&recipe, 2) {
            true => vec![],
            false => stats::of(cx, x)?.means().ok_or_else(|| Diag::bug("means that were not taken"))?,
        };
        let (store, module, budget) = (cx.store, &*cx.module, cx.env.budget);
        let blobs = store.derive(&recipe, 2, &mut |out| {
            let views = weights.iter().map(|&w| store.view(&module.weights, w)).collect::<Result<Vec<_>>>()?;
            let old = if there.is_some() { views.last() } else { None };
            let (vector, size) = corrected(&views, parts.len(), &scheme, &means, old, budget)?;
            out[0].write_f32(Float::F32, &vector)?;
            out[1].write(&size.to_le_bytes())
        })?;
        let size = store.read_blob(blobs[1])?;
        let size = size.try_into().map_err(|_| Diag::input("what the store keeps of a correction is damaged"))?;
        let size = f64::from_le_bytes(size);
        let rows = module.weights[original].ty.shape.0[..1].to_vec();
        let wanted = match there {
            Some((.., b)) => format!("{}.corrected", module.weights[b].name),
            None => format!("{name}.bias"),
        };
        let decl = WeightDecl {
            name: cx.module.fresh_weight_name(&wanted),
            ty: TensorTy::new(ElemTy::F32, rows),
            source: WeightSource::Blob(blobs[0]),
        };
        let made = cx.module.weights.push(decl);
        vectors::put(cx, op, there, made)?;
        let what = format!("corrected by vectors of size {size:.3e}");
        let told = Site { applied: true, what: what.clone(), matrices: 1, factors: None };
        cx.tell(format_args!("@{name}"), format_args!("{what}"), Told::Site(told));
        Ok(())
    }
}

/// The vector that is to be added, and the size of what it changes: `views` are the matrix, its codes, scales and zero points.
fn corrected(
    views: &[WeightView<'_>],
    parts: usize,
    scheme: &Scheme,
    means: &[f64],
    old: Option<&WeightView<'_>>,
    budget: usize,
) -> Result<(Vec<f32>, f64)> {
    let [matrix, codes, scales, ..] = views else { return Err(Diag::bug("a rounded matrix without scales")) };
    let zeros = if parts > 2 { views[3].read_all_codes()? } else { vec![] };
    let params = Params::from_codes(scheme, scales.read_all_f32()?, &zeros);
    let groups = Groups::new(scheme, &matrix.ty().shape)?;
    let old = old.map(WeightView::read_all_f32).transpose()?;
    let k = means.len();
    if k != groups.cols() {
        return Err(Diag::bug("means of other rows than the matrix reads"));
    }
    let (mut vector, mut squares) = (vec![], 0.0);
    crate::stream::rows(matrix, budget, |first, rows| {
        let (mut coded, mut after) = (vec![0; rows.len()], vec![0.0; rows.len()]);
        codes.read_rows_codes(first, rows.len() / k.max(1), &mut coded)?;
        dequantize_block(&groups, scheme, &params, first, &coded, &mut after)?;
        for (row, after) in rows.chunks_exact(k.max(1)).zip(after.chunks_exact(k.max(1))) {
            let error = row.iter().zip(after).zip(means).map(|((&w, &q), m)| (f64::from(w) - f64::from(q)) * m);
            let error: f64 = error.sum();
            squares += error * error;
            let old = old.as_ref().map_or(0.0, |old| f64::from(old[vector.len()]));
            vector.push((old + error) as f32);
        }
        Ok(())
    })?;
    Ok((vector, squares.sqrt()))
}
