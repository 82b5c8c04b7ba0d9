//! The decoder that Llama and its relatives share: norms in front of each block, rotary positions, grouped keys and
//! values, a gated feed-forward block.

use super::builder::{Builder, bounds};
use super::{Act, Kind, rope};
use quantc_ir::diag::{Diags, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::ops::{
    Add, Attention, CacheAppend, Embedding, LastRows, MatMul, Mul, Positions, Real, RmsNorm, Rope, RopeTable,
};
use quantc_ir::ty::{Dim, ElemTy, TensorTy};

/// What may differ between the relatives.
pub(super) struct Decoder {
    hidden: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
    ffn: u64,
    vocab: u64,
    eps: f64,
    act: Act,
    positions: u64,
    rope: RopeTable,
    tied: bool,
    /// Biases on queries, keys and values.
    pub(super) qkv_bias: bool,
    /// A bias on the attention's output.
    pub(super) o_bias: bool,
    /// Biases in the feed-forward block.
    pub(super) mlp_bias: bool,
    /// Norms of each head's queries and keys.
    pub(super) qk_norm: bool,
    /// Positions seen by each layer; 0 means all.
    pub(super) windows: Vec<u32>,
}

/// What a model class takes for keys that a configuration leaves out.
#[derive(Clone, Copy, Default)]
pub(super) struct Defaults {
    /// `num_key_value_heads`; none means as many as there are heads.
    pub(super) kv_heads: Option<u64>,
    /// `head_dim`; none means `hidden_size / num_attention_heads`.
    pub(super) head_dim: Option<u64>,
}

impl Decoder {
    /// Reads what all relatives have. Problems stay noted in the configuration.
    pub(super) fn read(cx: &mut Builder<'_>, defaults: Defaults) -> Decoder {
        let c = &mut cx.config;
        let hidden = c.int("hidden_size", bounds::WIDTH);
        let layers = c.int("num_hidden_layers", bounds::LAYERS);
        let heads = c.int("num_attention_heads", bounds::HEADS);
        let absent =
            |c: &crate::config::Config, key: &str, default: Option<u64>| default.filter(|_| !c.has(key));
        let kv_default = absent(c, "num_key_value_heads", defaults.kv_heads).unwrap_or(heads);
        let kv_heads = c.int_or("num_key_value_heads", bounds::HEADS, kv_default);
        let dim_default = absent(c, "head_dim", defaults.head_dim).unwrap_or(hidden / heads);
        let head_dim = c.int_or("head_dim", bounds::HEAD_DIM, dim_default);
        let ffn = c.int("intermediate_size", bounds::WIDTH);
        let vocab = c.int("vocab_size", bounds::VOCAB);
        let eps = c.positive("rms_norm_eps");
        let act = Act::read(c, "hidden_act", Act::Silu);
        let positions = c.int("max_position_embeddings", bounds::CONTEXT);
        let tied = c.bool_or("tie_word_embeddings", false);
        if c.problems.is_empty() && !heads.is_multiple_of(kv_heads) {
            c.note("num_key_value_heads", format!("is {kv_heads}, which does not divide the {heads} heads"));
        }
        if c.problems.is_empty() && (head_dim == 0 || !head_dim.is_multiple_of(2)) {
            c.note("head_dim", format!("is {head_dim}, expected a positive even number"));
        }
        let rope = rope::read(c, head_dim, positions);
        Decoder {
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            ffn,
            vocab,
            eps,
            act,
            positions,
            rope,
            tied,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            windows: vec![0; layers as usize],
        }
    }

    /// The windows of Qwen's configurations: those of `layer_types`, else of the layers from `max_window_layers` on, and
    /// none unless `use_sliding_window`.
    pub(super) fn read_layer_windows(&mut self, cx: &mut Builder<'_>) {
        let c = &mut cx.config;
        let using = c.bool_or("use_sliding_window", false);
        let null = c.has("sliding_window") && c.get("sliding_window").is_none();
        let window = c.int_or("sliding_window", 0..=1 << 26, 4096) as u32;
        let first = c.int_or("max_window_layers", 0..=1 << 20, 28) as usize;
        let window = if using && !null { window } else { 0 };
        let sliding: Vec<bool> = match c.texts("layer_types") {
            None => (0..self.windows.len()).map(|i| i >= first).collect(),
            Some(types) => {
                let unknown =
                    types.iter().find(|t| !["full_attention", "sliding_attention"].contains(&t.as_str()));
                if let Some(t) = unknown {
                    let t = crate::json::shown(t);
                    c.note(
                        "layer_types",
                        format!("has a `{t}`; supported are full_attention, sliding_attention"),
                    );
                } else if types.len() != self.windows.len() {
                    c.note(
                        "layer_types",
                        format!("has {} entries for {} layers", types.len(), self.windows.len()),
                    );
                }
                types.iter().map(|t| t == "sliding_attention").collect()
            }
        };
        self.windows = sliding.into_iter().map(|s| if s { window } else { 0 }).collect();
    }

    /// Builds the module once the configuration is found good.
    pub(super) fn build(self, cx: &mut Builder<'_>) -> Result<(), Diags> {
        cx.config.finish()?;
        cx.prefix(&["model.", ""], "embed_tokens.weight");
        cx.check_layers("num_hidden_layers", self.layers, "layers.")?;
        cx.ignore(&[".rotary_emb.inv_freq"]);
        let context = cx.context(self.positions);
        cx.facts(Kind::Decoder, context, self.vocab);

        let tokens = cx.module.main.add_param("tokens", TensorTy::new(ElemTy::I32, [Dim::Sym('t')]));
        let embed = cx.weight("embed", "embed_tokens.weight", &[self.vocab, self.hidden]);
        let mut x = cx.op("x", Embedding::default(), &[tokens, embed])?;
        let positions = cx.op("positions", Positions {}, &[])?;
        let angles = cx.op("angles", self.rope.clone(), &[positions])?;
        for i in 0..self.layers as usize {
            x = self.layer(cx, i, x, angles, context)?;
        }

        let last = cx.op("last", LastRows {}, &[x])?;
        let gain = cx.weight("norm", "norm.weight", &[self.hidden]);
        let normed = cx.op("normed", self.norm(), &[last, gain])?;
        let head = if self.tied {
            cx.skip_tied("lm_head.weight");
            cx.alias("head", embed)?
        } else {
            cx.exact_weight("head", "lm_head.weight", &[self.vocab, self.hidden])
        };
        let logits = cx.op("logits", MatMul::default(), &[normed, head])?;
        cx.module.main.results.push(logits);
        Ok(())
    }

    fn norm(&self) -> RmsNorm {
        RmsNorm { eps: Real(self.eps) }
    }

    fn layer(
        &self,
        cx: &mut Builder<'_>,
        i: usize,
        x: ValueId,
        angles: ValueId,
        context: u64,
    ) -> Result<ValueId> {
        let Decoder { hidden, heads, kv_heads, head_dim, .. } = *self;
        let (w, v, t) = (
            |s: &str| format!("l{i}.{s}"),
            |s: &str| format!("l{i}_{s}"),
            |s: &str| format!("layers.{i}.{s}"),
        );

        let gain = cx.weight(&w("norm1"), &t("input_layernorm.weight"), &[hidden]);
        let n1 = cx.op(&v("norm1"), self.norm(), &[x, gain])?;
        let mut rotated = vec![];
        for (p, n) in [("q", heads), ("k", kv_heads)] {
            let rows = self.project(cx, i, p, n1, [n * head_dim, hidden], self.qkv_bias)?;
            let mut y = cx.heads(&v(&format!("{p}_heads")), rows, n, head_dim)?;
            if self.qk_norm {
                let gain = cx.weight(
                    &w(&format!("attn.{p}_norm")),
                    &t(&format!("self_attn.{p}_norm.weight")),
                    &[head_dim],
                );
                y = cx.op(&v(&format!("{p}_norm")), self.norm(), &[y, gain])?;
            }
            rotated.push(cx.op(&v(&format!("{p}_rot")), Rope::default(), &[y, angles])?);
        }
        let rows = self.project(cx, i, "v", n1, [kv_heads * head_dim, hidden], self.qkv_bias)?;
        let values = cx.heads(&v("v_heads"), rows, kv_heads, head_dim)?;

        let (ks, vs) =
            (cx.state(&w("k"), context, kv_heads, head_dim), cx.state(&w("v"), context, kv_heads, head_dim));
        let k_all = cx.op(&v("k_all"), CacheAppend {}, &[ks, rotated[1]])?;
        let v_all = cx.op(&v("v_all"), CacheAppend {}, &[vs, values])?;
        let scale = Real(1.0 / (head_dim as f64).sqrt());
        let attention = Attention { scale, causal: true, window: self.windows[i] };
        let attn = cx.op(&v("attn"), attention, &[rotated[0], k_all, v_all])?;
        let attn = cx.rows(&v("attn_rows"), attn, heads * head_dim)?;
        let o = self.project(cx, i, "o", attn, [hidden, heads * head_dim], self.o_bias)?;
        let mid = cx.op(&v("mid"), Add {}, &[x, o])?;

        let gain = cx.weight(&w("norm2"), &t("post_attention_layernorm.weight"), &[hidden]);
        let n2 = cx.op(&v("norm2"), self.norm(), &[mid, gain])?;
        let gate = self.feed(cx, i, "gate", n2, [self.ffn, hidden])?;
        let act = cx.op(&v("act"), self.act.op(), &[gate])?;
        let up = self.feed(cx, i, "up", n2, [self.ffn, hidden])?;
        let gated = cx.op(&v("gated"), Mul {}, &[act, up])?;
        let down = self.feed(cx, i, "down", gated, [hidden, self.ffn])?;
        cx.op(&v("out"), Add {}, &[mid, down])
    }

    /// One of the attention's four projections.
    fn project(
        &self,
        cx: &mut Builder<'_>,
        i: usize,
        p: &str,
        x: ValueId,
        dims: [u64; 2],
        bias: bool,
    ) -> Result<ValueId> {
        let tensor = format!("layers.{i}.self_attn.{p}_proj");
        linear(cx, &format!("l{i}_{p}"), &format!("l{i}.attn.{p}"), &tensor, x, dims, bias)
    }

    /// One of the feed-forward block's three projections.
    fn feed(&self, cx: &mut Builder<'_>, i: usize, p: &str, x: ValueId, dims: [u64; 2]) -> Result<ValueId> {
        let tensor = format!("layers.{i}.mlp.{p}_proj");
        linear(cx, &format!("l{i}_{p}"), &format!("l{i}.mlp.{p}"), &tensor, x, dims, self.mlp_bias)
    }
}

/// A linear map with weights `[out, in]` called `tensor.weight` and, if there is a bias, `tensor.bias`.
pub(super) fn linear(
    cx: &mut Builder<'_>,
    value: &str,
    weight: &str,
    tensor: &str,
    x: ValueId,
    dims: [u64; 2],
    bias: bool,
) -> Result<ValueId> {
    let w = cx.weight(weight, &format!("{tensor}.weight"), &dims);
    let bias = bias.then(|| cx.weight(&format!("{weight}.bias"), &format!("{tensor}.bias"), &dims[..1]));
    cx.linear(value, x, w, bias)
}
