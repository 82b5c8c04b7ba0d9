//! BERT: an encoder with learned positions, token types, and a norm behind each block.

use super::builder::bounds;
use super::decoder::linear;
use super::{Act, Arch, Builder, Kind};
use crate::json::shown;
use quantc_ir::diag::{Diags, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::ops::{Add, Attention, Embedding, LayerNorm, Positions, Real};
use quantc_ir::ty::{Dim, ElemTy, TensorTy};

pub(super) const ARCH: Arch = Arch {
    model_type: "bert",
    classes: &["BertModel"],
    doc: "BERT encoders and sentence encoders built on them; the result is the last hidden state",
    build,
};

struct Bert {
    hidden: u64,
    heads: u64,
    ffn: u64,
    eps: f64,
    act: Act,
}

fn build(cx: &mut Builder<'_>) -> Result<(), Diags> {
    let c = &mut cx.config;
    let hidden = c.int("hidden_size", bounds::WIDTH);
    let layers = c.int("num_hidden_layers", bounds::LAYERS);
    let heads = c.int("num_attention_heads", bounds::HEADS);
    let ffn = c.int("intermediate_size", bounds::WIDTH);
    let vocab = c.int("vocab_size", bounds::VOCAB);
    let positions = c.int("max_position_embeddings", bounds::CONTEXT);
    let types = c.int_or("type_vocab_size", 1..=1 << 16, 2);
    let eps = c.opt_positive("layer_norm_eps").unwrap_or(1e-12);
    let act = Act::read(c, "hidden_act", Act::Gelu);
    if let Some(kind) = c.text("position_embedding_type").filter(|k| k != "absolute") {
        c.note("position_embedding_type", format!("is `{}`; supported is absolute", shown(&kind)));
    }
    for key in ["is_decoder", "add_cross_attention"] {
        if c.bool_or(key, false) {
            c.note(key, "is true: only encoders are supported");
        }
    }
    if c.problems.is_empty() && !hidden.is_multiple_of(heads) {
        c.note("num_attention_heads", format!("is {heads}, which does not divide the width of {hidden}"));
    }
    c.finish()?;
    cx.prefix(&["bert.", ""], "embeddings.word_embeddings.weight");
    cx.check_layers("num_hidden_layers", layers, "encoder.layer.")?;
    cx.ignore(&["embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"]);
    let context = cx.context(positions);
    cx.facts(Kind::Encoder, context, vocab);
    let model = Bert { hidden, heads, ffn, eps, act };

    let ids = TensorTy::new(ElemTy::I32, [Dim::Sym('t')]);
    let tokens = cx.module.main.add_param("tokens", ids.clone());
    let kinds = cx.module.main.add_param("types", ids);
    let table = cx.weight("embed", "embeddings.word_embeddings.weight", &[vocab, hidden]);
    let words = cx.op("words", Embedding::default(), &[tokens, table])?;
    let table = cx.weight("type", "embeddings.token_type_embeddings.weight", &[types, hidden]);
    let kinds = cx.op("kinds", Embedding::default(), &[kinds, table])?;
    let sum = cx.op("typed", Add {}, &[words, kinds])?;
    let places = cx.op("positions", Positions {}, &[])?;
    let table = cx.weight("position", "embeddings.position_embeddings.weight", &[positions, hidden]);
    let places = cx.op("places", Embedding::default(), &[places, table])?;
    let sum = cx.op("placed", Add {}, &[sum, places])?;
    let mut x = model.norm(cx, "x", "embed.norm", "embeddings.LayerNorm", sum)?;
    for i in 0..layers {
        x = model.layer(cx, i, x)?;
    }
    cx.module.main.results.push(x);
    Ok(())
}

impl Bert {
    fn layer(&self, cx: &mut Builder<'_>, i: u64, x: ValueId) -> Result<ValueId> {
        let (hidden, heads) = (self.hidden, self.heads);
        let size = hidden / heads;
        let (w, v) = (|s: &str| format!("l{i}.{s}"), |s: &str| format!("l{i}_{s}"));
        let t = |s: &str| format!("encoder.layer.{i}.{s}");

        let mut heads_of = vec![];
        for (p, tensor) in [("q", "query"), ("k", "key"), ("v", "value")] {
            let (weight, tensor) = (w(&format!("attn.{p}")), t(&format!("attention.self.{tensor}")));
            let rows = linear(cx, &v(p), &weight, &tensor, x, [hidden, hidden], true)?;
            heads_of.push(cx.heads(&v(&format!("{p}_heads")), rows, heads, size)?);
        }
        let attention = Attention { scale: Real(1.0 / (size as f64).sqrt()), causal: false, window: 0 };
        let attn = cx.op(&v("attn"), attention, &heads_of)?;
        let attn = cx.rows(&v("attn_rows"), attn, hidden)?;
        let o =
            linear(cx, &v("o"), &w("attn.o"), &t("attention.output.dense"), attn, [hidden, hidden], true)?;
        let sum = cx.op(&v("attn_sum"), Add {}, &[o, x])?;
        let mid = self.norm(cx, &v("mid"), &w("norm1"), &t("attention.output.LayerNorm"), sum)?;

        let up = linear(cx, &v("up"), &w("mlp.up"), &t("intermediate.dense"), mid, [self.ffn, hidden], true)?;
        let act = cx.op(&v("act"), self.act.op(), &[up])?;
        let down = linear(cx, &v("down"), &w("mlp.down"), &t("output.dense"), act, [hidden, self.ffn], true)?;
        let sum = cx.op(&v("mlp_sum"), Add {}, &[down, mid])?;
        self.norm(cx, &v("out"), &w("norm2"), &t("output.LayerNorm"), sum)
    }

    fn norm(
        &self,
        cx: &mut Builder<'_>,
        value: &str,
        weight: &str,
        tensor: &str,
        x: ValueId,
    ) -> Result<ValueId> {
        // Checkpoints converted from the first release call gain and bias by other names.
        let old = !cx.has(&format!("{tensor}.weight")) && cx.has(&format!("{tensor}.gamma"));
        let (gain, bias) = if old { ("gamma", "beta") } else { ("weight", "bias") };
        let gain = cx.weight(weight, &format!("{tensor}.{gain}"), &[self.hidden]);
        let bias = cx.weight(&format!("{weight}.bias"), &format!("{tensor}.{bias}"), &[self.hidden]);
        cx.op(value, LayerNorm { eps: Real(self.eps) }, &[x, gain, bias])
    }
}
