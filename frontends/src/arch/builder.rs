//! What architectures build with: weights by tensor name, ops, states, facts.

use super::{Facts, ImportOptions, Imported, Kind, tokens};
use crate::checkpoint::{Checkpoint, Placed, capped};
use crate::config::Config;
use crate::json::shown;
use quantc_ir::diag::{Diag, Diags, Loc, Result};
use quantc_ir::entity::{StateId, ValueId, WeightId};
use quantc_ir::module::{Module, State};
use quantc_ir::ops::{MatMul, Op, Reshape, Slice, Transpose};
use quantc_ir::ty::{Dim, ElemTy, Float, Shape, TensorTy};
use quantc_ir::weights::{Shard, Store, WeightDecl, WeightSource};
use std::collections::{BTreeMap, BTreeSet};

/// The context of states unless another is asked for.
pub(crate) const DEFAULT_CONTEXT: u64 = 4096;

/// The most names of one list that a message spells out.
const LISTED: usize = 12;

/// Bounds of what configurations may say; larger models than any that exists fit.
pub(crate) mod bounds {
    use std::ops::RangeInclusive;
    /// Width of hidden states and feed-forward blocks.
    pub(crate) const WIDTH: RangeInclusive<u64> = 1..=1 << 20;
    /// Number of layers.
    pub(crate) const LAYERS: RangeInclusive<u64> = 1..=1024;
    /// Number of heads.
    pub(crate) const HEADS: RangeInclusive<u64> = 1..=4096;
    /// Elements of a head.
    pub(crate) const HEAD_DIM: RangeInclusive<u64> = 1..=1 << 14;
    /// Number of tokens.
    pub(crate) const VOCAB: RangeInclusive<u64> = 1..=1 << 26;
    /// Tokens of a sequence.
    pub(crate) const CONTEXT: RangeInclusive<u64> = 1..=1 << 26;
}

/// A module under construction.
///
/// Weights that are missing or of another shape are noted and stood in for, so that all of them are reported by
/// [`Builder::finish`], together.
pub(crate) struct Builder<'a> {
    /// The configuration.
    pub(crate) config: Config,
    /// The module.
    pub(crate) module: Module,
    /// What the user should know.
    pub(crate) notes: Vec<String>,
    checkpoint: &'a Checkpoint,
    options: ImportOptions,
    model_type: &'static str,
    facts: Option<Facts>,
    prefix: String,
    used: BTreeSet<String>,
    missing: Vec<String>,
    /// The first refused tensor and the number of refused tensors for each element type.
    refused: BTreeMap<&'static str, (String, u64)>,
    problems: Diags,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(
        config: Config,
        checkpoint: &'a Checkpoint,
        options: ImportOptions,
        model_type: &'static str,
        name: String,
    ) -> Builder<'a> {
        let mut module = Module::new(name);
        for file in &checkpoint.shards {
            module.shards.push(Shard { file: file.clone() });
        }
        Builder {
            config,
            module,
            notes: vec![],
            checkpoint,
            options,
            model_type,
            facts: None,
            prefix: String::new(),
            used: BTreeSet::new(),
            missing: vec![],
            refused: BTreeMap::new(),
            problems: Diags::default(),
        }
    }

    /// Chooses what stands in front of every tensor name: the first of `prefixes` under which there is `probe`.
    pub(crate) fn prefix(&mut self, prefixes: &[&str], probe: &str) {
        let found = prefixes.iter().find(|p| self.checkpoint.has(&format!("{p}{probe}")));
        self.prefix = found.or(prefixes.first()).map(|p| p.to_string()).unwrap_or_default();
    }

    /// Checks that there are tensors of as many layers as `key` says, so that no loop runs over layers that are not
    /// there. `stem` is what stands in front of the layer's number.
    pub(crate) fn check_layers(&self, key: &str, layers: u64, stem: &str) -> Result<()> {
        let stem = format!("{}{stem}", self.prefix);
        let number =
            |name: &String| -> Option<u64> { name.strip_prefix(&stem)?.split('.').next()?.parse().ok() };
        let found: BTreeSet<u64> = self.checkpoint.tensors.keys().filter_map(number).collect();
        let have = (0..).take_while(|i| found.contains(i)).count() as u64;
        if layers <= have {
            return Ok(());
        }
        let what = format!("is {layers}, but the checkpoint has tensors `{stem}N.` of {have} layers only");
        Err(self.config.problem(key, what).help("the configuration and the weights do not belong together"))
    }

    /// The number of tokens that states have room for, when the model was made for `most`.
    pub(crate) fn context(&mut self, most: u64) -> u64 {
        match self.options.context.map(u64::from) {
            Some(n) if n == 0 || n > most => {
                let text =
                    format!("a context of {n} tokens is asked for, but the model was made for 1 to {most}");
                self.problems.push(Diag::input(text));
                most
            }
            Some(n) => n,
            None if most > DEFAULT_CONTEXT => {
                self.notes.push(format!(
                    "the context is {DEFAULT_CONTEXT} tokens; the model was made for {most}, ask for more when needed"
                ));
                DEFAULT_CONTEXT
            }
            None => most,
        }
    }

    /// Gives the facts; `context` and `vocab` are within their bounds.
    pub(crate) fn facts(&mut self, kind: Kind, context: u64, vocab: u64) {
        let clip = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        self.facts = Some(Facts {
            model_type: self.model_type,
            kind,
            context: clip(context),
            vocab: clip(vocab),
            bos: None,
            eos: vec![],
        });
    }

    /// Whether the checkpoint has the tensor `tensor` behind the prefix.
    pub(crate) fn has(&self, tensor: &str) -> bool {
        self.checkpoint.has(&format!("{}{tensor}", self.prefix))
    }

    /// Counts tensors as known although nothing reads them: those whose names end so.
    pub(crate) fn ignore(&mut self, suffixes: &[&str]) {
        let known = |name: &&String| suffixes.iter().any(|s| name.ends_with(s));
        self.used.extend(self.checkpoint.tensors.keys().filter(known).cloned());
    }

    /// Declares the weight `name`, which is the tensor `tensor` behind the prefix.
    pub(crate) fn weight(&mut self, name: &str, tensor: &str, dims: &[u64]) -> ValueId {
        let tensor = format!("{}{tensor}", self.prefix);
        self.exact_weight(name, &tensor, dims)
    }

    /// Declares the weight `name`, which is the tensor `tensor`.
    pub(crate) fn exact_weight(&mut self, name: &str, tensor: &str, dims: &[u64]) -> ValueId {
        let decl = self.declare(name, tensor, dims);
        let ty = decl.ty.clone();
        let id = self.module.weights.push(decl);
        self.module.main.weight(id, &ty)
    }

    /// Declares the weight `name` as another name of `of`.
    pub(crate) fn alias(&mut self, name: &str, of: ValueId) -> Result<ValueId> {
        let id: Option<WeightId> = self.module.main.as_weight(of);
        let id = id.ok_or_else(|| Diag::bug(format!("@{name} is tied to a value that is no weight")))?;
        let ty = self.module.weights[id].ty.clone();
        let decl = WeightDecl { name: name.into(), ty: ty.clone(), source: WeightSource::Alias(id) };
        let id = self.module.weights.push(decl);
        Ok(self.module.main.weight(id, &ty))
    }

    /// Notes that a tied head's own copy, if the checkpoint has one, is not read.
    pub(crate) fn skip_tied(&mut self, tensor: &str) {
        if self.checkpoint.has(tensor) {
            self.used.insert(tensor.into());
            self.notes.push(format!("`{tensor}` is not read: the configuration ties it to the embedding"));
        }
    }

    fn declare(&mut self, name: &str, tensor: &str, dims: &[u64]) -> WeightDecl {
        let checkpoint = self.checkpoint;
        self.used.insert(tensor.into());
        let stand_in = WeightSource::Splat(0.0.into());
        let typed =
            |elem: Float, source| WeightDecl { name: name.into(), ty: TensorTy::fixed(elem, dims), source };
        let Some(placed) = checkpoint.tensors.get(tensor) else {
            self.missing.push(tensor.into());
            return typed(Float::F32, stand_in);
        };
        let info = &placed.info;
        let Some(elem) = info.dtype.float() else {
            self.refused.entry(info.dtype.name).or_insert_with(|| (shown(tensor), 0)).1 += 1;
            return typed(Float::F32, stand_in);
        };
        if info.shape != dims {
            let text = format!("tensor `{}` has shape {:?}, expected {dims:?}", shown(tensor), info.shape);
            self.problems
                .push(self.at(placed, text).help("the configuration and the weights do not belong together"));
            return typed(elem, stand_in);
        }
        let shard = self.module.shards.keys().nth(placed.shard).expect("one shard was pushed for each file");
        typed(elem, WeightSource::File { shard, at: info.at, len: info.len })
    }

    fn at(&self, placed: &Placed, text: String) -> Diag {
        let file = self.checkpoint.path_of(placed).display().to_string();
        Diag::input(text).in_file(file).at(Loc::Byte(placed.info.at))
    }

    /// Declares a state of one row of `kv_heads x head_dim` for each token.
    pub(crate) fn state(&mut self, name: &str, context: u64, kv_heads: u64, head_dim: u64) -> ValueId {
        let ty = TensorTy::fixed(ElemTy::F32, &[context, kv_heads, head_dim]);
        let id: StateId = self.module.states.push(State { name: name.into(), ty: ty.clone() });
        self.module.main.state(id, &ty)
    }

    /// Appends an op to `main`.
    pub(crate) fn op(&mut self, name: &str, op: impl Into<Op>, args: &[ValueId]) -> Result<ValueId> {
        self.module.main.append(op, args, Some(name))
    }

    /// `x w^T`, and the bias on top when there is one. The sum is called `name`.
    pub(crate) fn linear(
        &mut self,
        name: &str,
        x: ValueId,
        w: ValueId,
        bias: Option<ValueId>,
    ) -> Result<ValueId> {
        let Some(bias) = bias else { return self.op(name, MatMul::default(), &[x, w]) };
        let product = self.op(&format!("{name}_mm"), MatMul::default(), &[x, w])?;
        self.op(name, quantc_ir::ops::Add {}, &[product, bias])
    }

    /// The rows `[t, width]` as heads `[t, heads, size]`.
    pub(crate) fn heads(&mut self, name: &str, x: ValueId, heads: u64, size: u64) -> Result<ValueId> {
        let shape = Shape(vec![Dim::Sym('t'), Dim::Static(heads), Dim::Static(size)]);
        self.op(name, Reshape { shape }, &[x])
    }

    /// The heads `[t, heads, size]` as rows `[t, width]`.
    pub(crate) fn rows(&mut self, name: &str, x: ValueId, width: u64) -> Result<ValueId> {
        let shape = Shape(vec![Dim::Sym('t'), Dim::Static(width)]);
        self.op(name, Reshape { shape }, &[x])
    }

    /// The transposed weight.
    pub(crate) fn transposed(&mut self, name: &str, w: ValueId) -> Result<ValueId> {
        self.op(name, Transpose::default(), &[w])
    }

    /// Indices `start .. start + len` of one axis of a weight.
    pub(crate) fn sliced(
        &mut self,
        name: &str,
        w: ValueId,
        axis: u8,
        start: u64,
        len: u64,
    ) -> Result<ValueId> {
        self.op(name, Slice { axis, start, len, ..Default::default() }, &[w])
    }

    /// Checks what was noted, maps the files and gives the result.
    pub(crate) fn finish(mut self, store: &Store) -> Result<Imported, Diags> {
        self.report_missing();
        self.report_refused();
        capped(std::mem::take(&mut self.problems)).into_result(())?;
        let mut facts = self.facts.take().ok_or_else(|| Diag::bug("an architecture gave no facts"))?;
        let dir = &self.checkpoint.dir;
        tokens::find(dir, &mut self.config, &mut facts, &mut self.notes)?;
        self.config.finish()?;
        for (id, shard) in self.module.shards.iter() {
            store.add_shard(id, dir.join(&shard.file))?;
        }

        facts.write(&mut self.module);
        let names = self.checkpoint.tensors.keys();
        let mut unused: Vec<String> = names.filter(|n| !self.used.contains(*n)).map(|n| shown(n)).collect();
        unused.extend(self.checkpoint.unlisted.iter().cloned());
        let tokenizer = Some(dir.join("tokenizer.json")).filter(|p| p.exists());
        Ok(Imported { module: self.module, tokenizer, facts, notes: self.notes, unused })
    }

    fn report_missing(&mut self) {
        if self.missing.is_empty() {
            return;
        }
        let packed = |n: &&String| {
            [".qweight", ".weight_packed", ".qzeros", ".weight_scale"].iter().any(|s| n.ends_with(s))
        };
        let mut diag = Diag::input(format!(
            "the checkpoint lacks {}: {}",
            counted(self.missing.len() as u64, "tensor"),
            listed(self.missing.iter().map(String::as_str))
        ))
        .in_file(self.checkpoint.dir.display().to_string());
        if let Some(name) = self.checkpoint.tensors.keys().find(packed) {
            let text = format!("the tensor `{}` says that this checkpoint is already quantized", shown(name));
            diag = diag.help(format!("{text}; import the float checkpoint it was made from"));
        }
        self.problems.0.insert(0, diag);
    }

    fn report_refused(&mut self) {
        for (dtype, (first, count)) in std::mem::take(&mut self.refused) {
            let info = self.checkpoint.tensors.get(&first);
            let count = counted(count, "tensor");
            let quantized = info.is_some_and(|p| p.info.dtype.is_quantized());
            let text = if quantized {
                format!("this checkpoint is already quantized ({dtype} elements in {count}, first `{first}`)")
            } else {
                format!("weights have {dtype} elements ({count}, first `{first}`), expected F32, F16 or BF16")
            };
            let diag = match info {
                Some(placed) => self.at(placed, text),
                None => Diag::input(text),
            };
            let help = if quantized {
                "import the float checkpoint it was made from"
            } else {
                "save the weights as F32"
            };
            self.problems.push(diag.help(help));
        }
    }
}

/// Names with commas between them; of long lists the first.
fn listed<'a>(names: impl ExactSizeIterator<Item = &'a str>) -> String {
    let more = names.len().saturating_sub(LISTED);
    let mut text = names.take(LISTED).map(|n| format!("`{}`", shown(n))).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// A number of things.
fn counted(n: u64, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}
