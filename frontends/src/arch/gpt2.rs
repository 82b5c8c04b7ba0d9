//! GPT-2: learned positions, norms with biases in front of each block, weights stored `[in, out]`.

use super::builder::bounds;
use super::{Act, Arch, Builder, Kind};
use quantc_ir::diag::{Diags, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::ops::{Add, Attention, CacheAppend, Embedding, LastRows, LayerNorm, MatMul, Positions, Real};
use quantc_ir::ty::{Dim, ElemTy, TensorTy};

pub(super) const ARCH: Arch = Arch {
    model_type: "gpt2",
    classes: &["GPT2LMHeadModel"],
    doc: "GPT-2 and models saved as such, with or without the `transformer.` in front of names",
    build,
};

struct Gpt2 {
    hidden: u64,
    layers: u64,
    heads: u64,
    ffn: u64,
    eps: f64,
    act: Act,
    scaled: bool,
    scaled_by_layer: bool,
    context: u64,
}

fn build(cx: &mut Builder<'_>) -> Result<(), Diags> {
    let c = &mut cx.config;
    let hidden = c.int("n_embd", bounds::WIDTH);
    let layers = c.int("n_layer", bounds::LAYERS);
    let heads = c.int("n_head", bounds::HEADS);
    let ffn = c.int_or("n_inner", bounds::WIDTH, 4 * hidden);
    let vocab = c.int("vocab_size", bounds::VOCAB);
    let positions = c.int("n_positions", bounds::CONTEXT);
    let eps = c.opt_positive("layer_norm_epsilon").unwrap_or(1e-5);
    let act = Act::read(c, "activation_function", Act::GeluTanh);
    let scaled = c.bool_or("scale_attn_weights", true);
    let scaled_by_layer = c.bool_or("scale_attn_by_inverse_layer_idx", false);
    let tied = c.bool_or("tie_word_embeddings", true);
    if c.bool_or("add_cross_attention", false) {
        c.note("add_cross_attention", "is true: attention to another model's states is not supported");
    }
    if c.problems.is_empty() && !hidden.is_multiple_of(heads) {
        c.note("n_head", format!("is {heads}, which does not divide the width of {hidden}"));
    }
    c.finish()?;
    cx.prefix(&["transformer.", ""], "wte.weight");
    cx.check_layers("n_layer", layers, "h.")?;
    cx.ignore(&[".attn.bias", ".attn.masked_bias"]);
    let context = cx.context(positions);
    cx.facts(Kind::Decoder, context, vocab);
    let model = Gpt2 { hidden, layers, heads, ffn, eps, act, scaled, scaled_by_layer, context };

    let tokens = cx.module.main.add_param("tokens", TensorTy::new(ElemTy::I32, [Dim::Sym('t')]));
    let embed = cx.weight("embed", "wte.weight", &[vocab, hidden]);
    let words = cx.op("words", Embedding::default(), &[tokens, embed])?;
    let places = cx.op("positions", Positions {}, &[])?;
    let table = cx.weight("position", "wpe.weight", &[positions, hidden]);
    let places = cx.op("places", Embedding::default(), &[places, table])?;
    let mut x = cx.op("x", Add {}, &[words, places])?;
    for i in 0..model.layers {
        x = model.layer(cx, i, x)?;
    }

    let last = cx.op("last", LastRows {}, &[x])?;
    let normed = model.norm(cx, "normed", "norm", "ln_f", last)?;
    let head = if tied {
        cx.skip_tied("lm_head.weight");
        cx.alias("head", embed)?
    } else {
        cx.exact_weight("head", "lm_head.weight", &[vocab, hidden])
    };
    let logits = cx.op("logits", MatMul::default(), &[normed, head])?;
    cx.module.main.results.push(logits);
    Ok(())
}

impl Gpt2 {
    fn layer(&self, cx: &mut Builder<'_>, i: u64, x: ValueId) -> Result<ValueId> {
        let (hidden, heads) = (self.hidden, self.heads);
        let size = hidden / heads;
        let (w, v, t) =
            (|s: &str| format!("l{i}.{s}"), |s: &str| format!("l{i}_{s}"), |s: &str| format!("h.{i}.{s}"));

        let n1 = self.norm(cx, &v("norm1"), &w("norm1"), &t("ln_1"), x)?;
        let qkv = cx.weight(&w("attn.qkv"), &t("attn.c_attn.weight"), &[hidden, 3 * hidden]);
        let bias = cx.weight(&w("attn.qkv.bias"), &t("attn.c_attn.bias"), &[3 * hidden]);
        let mut heads_of = vec![];
        for (part, p) in ["q", "k", "v"].into_iter().enumerate() {
            let start = part as u64 * hidden;
            let columns = cx.sliced(&v(&format!("{p}_cols")), qkv, 1, start, hidden)?;
            let matrix = cx.transposed(&v(&format!("{p}_w")), columns)?;
            let summand = cx.sliced(&v(&format!("{p}_bias")), bias, 0, start, hidden)?;
            let rows = cx.linear(&v(p), n1, matrix, Some(summand))?;
            heads_of.push(cx.heads(&v(&format!("{p}_heads")), rows, heads, size)?);
        }
        let ks = cx.state(&w("k"), self.context, heads, size);
        let vs = cx.state(&w("v"), self.context, heads, size);
        let k_all = cx.op(&v("k_all"), CacheAppend {}, &[ks, heads_of[1]])?;
        let v_all = cx.op(&v("v_all"), CacheAppend {}, &[vs, heads_of[2]])?;
        let mut scale = if self.scaled { 1.0 / (size as f64).sqrt() } else { 1.0 };
        if self.scaled_by_layer {
            scale /= (i + 1) as f64;
        }
        let attention = Attention { scale: Real(scale), causal: true, window: 0 };
        let attn = cx.op(&v("attn"), attention, &[heads_of[0], k_all, v_all])?;
        let attn = cx.rows(&v("attn_rows"), attn, hidden)?;
        let o = self.conv(cx, &v("o"), &w("attn.o"), &t("attn.c_proj"), attn, [hidden, hidden])?;
        let mid = cx.op(&v("mid"), Add {}, &[x, o])?;

        let n2 = self.norm(cx, &v("norm2"), &w("norm2"), &t("ln_2"), mid)?;
        let up = self.conv(cx, &v("up"), &w("mlp.up"), &t("mlp.c_fc"), n2, [hidden, self.ffn])?;
        let act = cx.op(&v("act"), self.act.op(), &[up])?;
        let down = self.conv(cx, &v("down"), &w("mlp.down"), &t("mlp.c_proj"), act, [self.ffn, hidden])?;
        cx.op(&v("out"), Add {}, &[mid, down])
    }

    fn norm(
        &self,
        cx: &mut Builder<'_>,
        value: &str,
        weight: &str,
        tensor: &str,
        x: ValueId,
    ) -> Result<ValueId> {
        let gain = cx.weight(weight, &format!("{tensor}.weight"), &[self.hidden]);
        let bias = cx.weight(&format!("{weight}.bias"), &format!("{tensor}.bias"), &[self.hidden]);
        cx.op(value, LayerNorm { eps: Real(self.eps) }, &[x, gain, bias])
    }

    /// A linear map with a bias whose weights are stored `[in, out]`.
    fn conv(
        &self,
        cx: &mut Builder<'_>,
        value: &str,
        weight: &str,
        tensor: &str,
        x: ValueId,
        dims: [u64; 2],
    ) -> Result<ValueId> {
        let stored = cx.weight(weight, &format!("{tensor}.weight"), &dims);
        let bias = cx.weight(&format!("{weight}.bias"), &format!("{tensor}.bias"), &dims[1..]);
        let matrix = cx.transposed(&format!("{value}_w"), stored)?;
        cx.linear(value, x, matrix, Some(bias))
    }
}
