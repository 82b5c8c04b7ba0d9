//! Takes statistics of what products read.

use crate::calib::chain::{Calibrator, Choice, Start};
use crate::calib::stats::{self, Kind, LayerStats};
use crate::pass::prelude::*;
use crate::told::{Taken, Told};
use crate::weights::{float_matrix, selects};
use crate::calib::{StatsFile, piece};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

pass! {
    /// Takes statistics of the rows that products read, from a text.
    ///
    /// With a file that `quantc calibrate` wrote in place of a text, its statistics are those of the float model's layers, and the
    /// options that choose samples do not count. Such a file is refused when this layer is not the one it was taken of.
    ///
    /// Samples of the text run through the layers before, as passes have left them by now, and through this layer as it is.
    /// Inside of `layers(..)` the layers before are quantized already: `layers(calibrate, gptq)` lets each layer make up
    /// for what those before it lost. Nothing runs until a pass asks for a number, and not at all when an
    /// earlier run with the same store has derived the same weights.
    "calibrate" => pub struct Calibrate {
        /// Samples at most; 0 takes as many as the text has.
        samples: u32 = 128,
        /// Samples left out in front, for statistics that are taken in parts.
        first: u32 = 0,
        /// Tokens of one sample; 0 takes the model's context, but at most 512. A sample of an encoder is as many lines of the text
        /// as have so many together, each read by itself.
        length: u32 = 0,
        /// 0 takes the samples from the beginning of the text on, any other number shuffles them first.
        seed: u64 = 0,
        /// What to take: `absmax`, the largest magnitude of each channel; `hessian`, the sum of `x x^T`; `rows`, some rows as
        /// they are; `mean`, the mean of each channel; `cache`, the largest magnitude of each channel of what goes into caches; and of each tensor as a whole
        /// `min-max`, `moments`, `moving-average` or `histogram`.
        stats: Vec<Kind> = vec![Kind::Absmax, Kind::Hessian],
        /// What products that make the statistics read: `f32`, `bf16`, or `auto`, which is bf16 for matrices that are bf16 in the
        /// checkpoint, where that is faster.
        rows: RowType = RowType::Auto,
        /// Rows of more channels get no Hessian, which takes four bytes for each pair of them, and twelve while it is used:
        /// `gptq` rounds what reads them to nearest, and says so.
        widest: u32 = 16384,
        /// Weights whose rows are looked at, as name patterns; none given means all.
        only: Vec<Pattern> = vec![],
        /// Weights whose rows are not looked at, as name patterns. A pattern that matches nothing is an error.
        skip: Vec<Pattern> = vec![],
        /// Layers to look at, as name patterns; none given means all.
        layers: Vec<Pattern> = vec![],
        /// Layers not looked at, as name patterns.
        skip_layers: Vec<Pattern> = vec![],
    }
    needs: [data],
    scope: Layer, numerics: Exact, stats: keeps
}

/// What products read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowType {
    /// bf16 where nothing of the matrices is lost by it and it is faster.
    #[default]
    Auto,
    /// As in the float model.
    F32,
    /// Rounded to 8 bits of mantissa.
    Bf16,
}

/// Tokens of a sample unless the pipeline says otherwise.
const LENGTH: u64 = 512;

impl Pass for Calibrate {
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed> {
        if !selects(&self.layers, &self.skip_layers, cx.function_name()) {
            return Ok(Changed::No);
        }
        let graph = cx.graph();
        let read = |op: OpId| {
            float_matrix(graph, op).is_some_and(|(w, _)| selects(&self.only, &self.skip, &cx.module.weights[w].name))
        };
        let products = self.stats.iter().any(|kind| *kind != Kind::Cache);
        let mut sites = if products { stats::sites(graph, read) } else { vec![] };
        let read = sites.len();
        if self.stats.contains(&Kind::Cache) {
            sites.extend(stats::cached(graph));
        }
        if sites.is_empty() {
            return Ok(Changed::No);
        }
        if let Some(file) = cx.session().get::<Arc<StatsFile>>().cloned() {
            return self.given(cx, file, &sites, read);
        }
        let context = cx.module.fact_u64("context")?.unwrap_or(LENGTH);
        let length = match self.length {
            0 => context.min(LENGTH) as u32,
            length => length,
        };
        if u64::from(length) > context {
            return Err(Diag::pipeline(format!("samples of {length} tokens are longer than the context of {context}"))
                .help("let `length` be smaller"));
        }
        let choice = Choice { first: self.first, samples: self.samples, length, seed: self.seed };
        let values: Vec<ValueId> = sites.iter().map(|&(v, _)| v).collect();
        let function = cx.function;
        let mut calibrator = cx.session().take::<Calibrator>().ok_or_else(|| {
            Diag::pipeline("there is no text to calibrate on").help("give one with `--data`")
        })?;
        let start = calibrator.start(cx.module, cx.store, function, &values, choice);
        let plain = |(_, node): (OpId, &Node)| {
            let matrix = node.args.get(1).filter(|_| matches!(node.op, Op::MatMul(_)));
            matrix.is_none_or(|&w| cx.graph().ty(w).elem == ElemTy::Bf16)
        };
        let bf16 = match self.rows {
            RowType::Auto => calibrator.multiplies_bf16() && cx.graph().ops().all(plain),
            RowType::F32 => false,
            RowType::Bf16 => true,
        };
        let name = calibrator.data().name.clone();
        cx.session().put(calibrator);
        let start = Start { bf16, ..start? };
        let (n, each) = (start.samples.count, start.samples.length);
        let digest = start.samples.digest.to_string();
        let place = format!("@{}", cx.function_name());
        let text = format!("{} values on {n} samples of {each} tokens of {name}, {}", values.len(), &digest[..16]);
        let told = Taken {
            data: name,
            samples: n,
            length: each,
            seed: self.seed,
            digest,
            statistics: self.stats.iter().map(|kind| kind.name().to_string()).collect(),
            values: values.len(),
        };
        cx.tell(place, format_args!("{text}"), Told::Data(told));
        cx.session().put_about(function, LayerStats::new(start, &sites, read, &self.stats, self.widest as usize));
        Ok(Changed::No)
    }

    fn provides(&self) -> Vec<Fact> {
        self.stats.iter().map(|kind| Fact::Stat(kind.name())).collect()
    }

    fn validate(&self) -> Result<()> {
        if self.stats.is_empty() {
            return Err(Diag::pipeline("no statistics are asked for").help("use `stats=[absmax]` or `stats=[absmax, hessian]`"));
        }
        Ok(())
    }

    fn patterns(&self) -> Vec<PatternUse<'_>> {
        PatternUse::filters(&self.only, &self.skip, &self.layers, &self.skip_layers)
    }
}

impl Calibrate {
    /// Uses what a file says of the layer.
    fn given(
        &self,
        cx: &mut PassCx<'_>,
        file: Arc<StatsFile>,
        sites: &[(ValueId, usize)],
        read: usize,
    ) -> Result<Changed> {
        let key = piece::layer_key(cx.module, cx.graph(), cx.store)?;
        let layer = file.layer(&cx.module.name, cx.function_name(), key)?;
        // Files have all values; filters may have left some out here.
        let graph = cx.graph();
        let all = [stats::sites(graph, |op| float_matrix(graph, op).is_some()), stats::cached(graph)];
        let known = |(i, &(v, columns)): (usize, &(ValueId, usize))| {
            let cache = i >= read;
            let place = all[usize::from(cache)].iter().position(|&(known, _)| known == v);
            place.map(|place| (v, columns, cache, place)).ok_or_else(|| Diag::bug("a value that no file has"))
        };
        let values = sites.iter().enumerate().map(known).collect::<Result<Vec<_>>>()?;
        let stats = LayerStats::given(file.clone(), layer, &values, &self.stats)?;
        let head = file.head();
        let (n, each) = (head.samples.len(), head.length);
        let digest = file.digest().to_string();
        let told = Taken {
            data: head.data.clone(),
            samples: n,
            length: each,
            seed: head.seed,
            digest: digest.clone(),
            statistics: self.stats.iter().map(|kind| kind.name().to_string()).collect(),
            values: values.len(),
        };
        let text = format!("{} values on {n} samples of {each} tokens of {}, {}, from a file", values.len(), head.data, &digest[..16]);
        let (place, function) = (format!("@{}", cx.function_name()), cx.function);
        cx.tell(place, format_args!("{text}"), Told::Data(told));
        cx.session().put_about(function, stats);
        Ok(Changed::No)
    }
}
