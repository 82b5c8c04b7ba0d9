#!/usr/bin/env python3
"""Write the tiny reference models of the importer and runtime tests.

    make_goldens.py OUTDIR [NAME ...]     # OUTDIR/tiny-<name>/, all models by default

Every model is a random, seeded Hugging Face checkpoint of a few thousand
parameters, built to make one architecture's details visible (rope scaling,
sliding window, biases, query/key norms, shards, older config spellings).
A folder holds config.json, the weights, for tiny-qwen2 a tokenizer.json, and
golden.safetensors:

    input_ids [1,T] int64    and    logits_f32 [1,T,V]
    tiny-bert: input_ids, token_type_ids, last_hidden_state, pooler_output
    tiny-qwen2: the ids are those of the file's metadata "text"

The outputs are computed by transformers (eager attention, f32) from the stored
weights, whatever their dtype.  config.json is written in one of two spellings:

    new   transformers 5: "dtype", "rope_parameters": {"rope_theta", "rope_type", ...}
    old   before 5: "torch_dtype", "rope_theta" and "rope_scaling" at top level;
          keys younger than the architecture are left out, as in published files

After writing, each folder is read back: the outputs must repeat, be the same
under the other spelling, agree with f64, and change when the detail the model is
there for is taken away.

Made with Python 3.11, transformers 5.23.0, torch 2.15.0 (CPU), safetensors 0.8.0,
tokenizers 0.23.3, numpy 2.4.6.  Other versions give the same files up to the
last bits of the outputs and to what transformers writes into config.json.
"""
import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

T = 12
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LLAMA = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5,
             tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)

# cls: config and model class prefix; drop: keys left out of an old config.json;
# matters: changes of the configuration that must change the outputs
MODELS = {
    "llama3": dict(
        cls="Llama", dtype="bf16", style="old",
        # wavelengths 6.3, 20, 63, 199 against 8 and 32: kept, blended, divided, divided
        config=dict(LLAMA, max_position_embeddings=256, rope_parameters=dict(
            rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=32)),
        matters=[dict(rope_parameters=dict(rope_type="default", rope_theta=100.0)),
                 dict(rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=8.0)),
                 dict(rms_norm_eps=0.1)]),
    "mistral": dict(
        cls="Mistral", dtype="f32", style="old",
        config=dict(vocab_size=48, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6,
                    max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        matters=[dict(sliding_window=None), dict(sliding_window=5), dict(sliding_window=7)]),
    "qwen2": dict(
        cls="Qwen2", dtype="bf16", style="new", tokenizer=True,
        # a window that use_sliding_window switches off, as published configs have it
        extra=dict(sliding_window=6, max_window_layers=0),
        config=dict(vocab_size=272, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=64,
                    rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=None, eos_token_id=271,
                    rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        matters=[dict(use_sliding_window=True, sliding_window=6, layer_types=["sliding_attention"] * 2)]),
    "qwen3": dict(
        cls="Qwen3", dtype="f32", style="new",
        config=dict(vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                    max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
        matters=[dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))]),
    "gpt2": dict(
        cls="GPT2", dtype="f16", style="old",
        # the first GPT-2 files: no "transformer." prefix, causal masks stored, tied by default
        drop=["tie_word_embeddings"],
        config=dict(vocab_size=48, n_positions=16, n_embd=32, n_layer=2, n_head=4,
                    layer_norm_epsilon=1e-5, bos_token_id=47, eos_token_id=47,
                    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
        matters=[dict(activation_function="gelu"), dict(layer_norm_epsilon=0.1)]),
    "bert": dict(
        cls="Bert", dtype="f32", style="new",
        config=dict(vocab_size=48, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=3, max_position_embeddings=32, type_vocab_size=2,
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        matters=[dict(hidden_act="gelu_new"), dict(layer_norm_eps=0.1)]),
    "sharded-llama": dict(
        cls="Llama", dtype="f16", style="old", shards=3,
        # an early Llama: no head_dim, and rotary_emb.inv_freq buffers to be ignored
        drop=["head_dim", "attention_bias", "mlp_bias"],
        config=dict(LLAMA, max_position_embeddings=256,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        matters=[dict(rms_norm_eps=0.1)]),
}
HEAD = {"Bert": "Model", "GPT2": "LMHeadModel"}
TEXT = "The fox can't eat 17."


def classes(m):
    head = HEAD.get(m["cls"], "ForCausalLM")
    return getattr(tf, m["cls"] + "Config"), getattr(tf, m["cls"] + head)


def randomise(model, seed):
    """Gains around 1, everything else large enough for strongly varying outputs."""
    g = np.random.default_rng(seed)
    for name, p in sorted(model.named_parameters()):
        leaf = name.split(".")[-1]
        if p.dim() == 1 and leaf == "weight":                       # norm gains
            x = g.uniform(0.5, 1.5, p.shape)
        elif p.dim() == 1:
            x = 0.3 * g.standard_normal(p.shape)
        elif "embed" in name or "wte" in name or "wpe" in name:
            x = 0.5 * g.standard_normal(p.shape)
        else:
            x = 0.4 * g.standard_normal(p.shape)
        p.data.copy_(torch.from_numpy(x.astype(np.float32)))


def old_style(c, drop=()):
    """A transformers 5 config dictionary in the older spelling."""
    c = dict(c)
    c["torch_dtype"] = c.pop("dtype")
    rope = c.pop("rope_parameters", None)
    if rope is not None:
        rope = dict(rope)
        c["rope_theta"] = rope.pop("rope_theta")
        c["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    for key in drop:
        c.pop(key, None)
    c["transformers_version"] = "4.44.0"
    return c


def new_style(c):
    c = dict(c)
    c["dtype"] = c.pop("torch_dtype")
    if "rope_theta" in c:
        rope = c.pop("rope_scaling") or {"rope_type": "default"}
        c["rope_parameters"] = dict(rope, rope_theta=c.pop("rope_theta"))
    return c


def write_config(folder, c):
    (folder / "config.json").write_text(json.dumps(c, indent=2, sort_keys=True) + "\n")


def make_tokenizer(folder, size):
    """Byte-level BPE as Qwen2 has it (NFC, split by pattern, no BOS), a few merges."""
    import tokenizers as tk
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    tok = tk.Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tk.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    text = ["the cat and the dog sat on the old mat, and then the hen ran", "in the end the ox and the "
            "fox ate the oat and the nut"]
    tok.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size - 1, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_special_tokens(["<|endoftext|>"])
    assert tok.get_vocab_size() == size
    t = json.loads(tok.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(t, ensure_ascii=False, separators=(",", ":")) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        bos_token=None, eos_token="<|endoftext|>", model_max_length=64, pad_token="<|endoftext|>",
        tokenizer_class="PreTrainedTokenizerFast"), indent=2) + "\n")


def rewrite(folder, change):
    """Apply change to the tensors of the (last) weight file, and to its index."""
    path = sorted(folder.glob("model*.safetensors"))[-1]
    before = load_file(path)
    after = {k: v.contiguous() for k, v in change(before).items()}
    save_file(after, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        j = json.loads(index.read_text())
        j["weight_map"].update({k: path.name for k in after})
        j["metadata"]["total_size"] += sum(v.nbytes for k, v in after.items() if k not in before)
        j["weight_map"] = dict(sorted(j["weight_map"].items()))
        index.write_text(json.dumps(j, indent=2) + "\n")


def outputs(folder, m, inputs, dtype=torch.float32, change=None):
    config_cls, model_cls = classes(m)
    config = config_cls.from_pretrained(folder, **(change or {}))
    model = model_cls.from_pretrained(folder, config=config, dtype=dtype,
                                      attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(**inputs, use_cache=False) if m["cls"] != "Bert" else model(**inputs)
    if m["cls"] == "Bert":
        return dict(last_hidden_state=out.last_hidden_state, pooler_output=out.pooler_output)
    return dict(logits_f32=out.logits)


def distance(a, b):
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def make(root, name):
    m, folder = MODELS[name], root / f"tiny-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config_cls, model_cls = classes(m)
    seed = zlib.crc32(name.encode())
    config = config_cls(**m["config"])
    model = model_cls(config).eval()
    randomise(model, seed)
    model = model.to(DTYPES[m["dtype"]])
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size * 2 // 5 if "shards" in m else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert len(list(folder.glob("model*.safetensors"))) == m.get("shards", 1)

    c = json.loads((folder / "config.json").read_text())
    c.update(m.get("extra", {}))
    write_config(folder, old_style(c, m.get("drop", ())) if m["style"] == "old" else c)
    if name == "gpt2":
        mask = torch.ones(16, 16, dtype=torch.float16).tril()[None, None]
        rewrite(folder, lambda w: {k.removeprefix("transformer."): v for k, v in w.items()}
                | {f"h.{i}.attn.bias": mask.clone() for i in range(2)})
    if name == "sharded-llama":
        freq = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
        rewrite(folder, lambda w: w | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": freq.clone()
                                       for i in range(2)})

    g = np.random.default_rng(seed + 1)
    ids, meta = g.integers(3, m["config"]["vocab_size"], T), {}
    if m.get("tokenizer"):
        make_tokenizer(folder, m["config"]["vocab_size"])
        import tokenizers
        tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        meta = {"text": TEXT}
        ids = tok.encode(TEXT).ids
        assert tok.decode(ids) == TEXT
    inputs = dict(input_ids=torch.tensor(np.array(ids, np.int64))[None])
    if m["cls"] == "Bert":
        inputs["token_type_ids"] = torch.tensor([[0] * 7 + [1] * (T - 7)])
    golden = inputs | outputs(folder, m, inputs)
    save_file({k: v.contiguous() for k, v in golden.items()}, folder / "golden.safetensors", metadata=meta or None)
    for f in folder.iterdir():
        f.chmod(0o644)
    check(folder, name, m)


def check(folder, name, m):
    golden = load_file(folder / "golden.safetensors")
    inputs = {k: golden[k] for k in ("input_ids", "token_type_ids") if k in golden}
    want = {k: v for k, v in golden.items() if k not in inputs}
    again = distance(want, outputs(folder, m, inputs))
    f64 = distance(want, outputs(folder, m, inputs, torch.float64))
    with tempfile.TemporaryDirectory() as t:                        # the other spelling
        other = Path(t) / "m"
        shutil.copytree(folder, other)
        c = json.loads((folder / "config.json").read_text())
        write_config(other, new_style(c) if m["style"] == "old" else old_style(c))
        spelling = distance(want, outputs(other, m, inputs))
        # without biases, gains (or gains of q and k only), token types
        fill = lambda w, part, v: {k: torch.full_like(x, v) if part(k) else x for k, x in w.items()}
        ablations = {}
        parts = {"gains": lambda k: k.endswith("weight") and ("norm" in k.lower() or "ln_" in k)}
        if m["cls"] in ("Qwen2", "GPT2", "Bert"):
            parts["biases"] = lambda k: k.endswith(".bias") and not k.endswith("attn.bias")
        if m["cls"] == "Qwen3":
            parts["q_norm"] = lambda k: "q_norm" in k
            parts["k_norm"] = lambda k: "k_norm" in k
        if m["cls"] == "Bert":
            parts["token types"] = lambda k: "token_type" in k
        for what, part in parts.items():
            shutil.rmtree(other)
            shutil.copytree(folder, other)
            rewrite(other, lambda w: fill(w, part, 0.0 if what in ("biases", "token types") else 1.0))
            ablations[what] = distance(want, outputs(other, m, inputs))
    for change in m["matters"]:
        what = "; ".join(f"{k} {v}" for k, v in change.items())
        ablations[what] = distance(want, outputs(folder, m, inputs, change=change))
    std = min(float(v.std()) for v in want.values())
    kb = sum(f.stat().st_size for f in folder.iterdir()) / 1000
    print(f"{folder.name}: {kb:.1f} KB, ids {inputs['input_ids'].shape[1]}, output std {std:.2f}, repeat {again:.1e}, "
          f"other spelling {spelling:.1e}, f64 {f64:.1e}\n   changes: "
          + ", ".join(f"{k}: {v:.1e}" for k, v in ablations.items()))
    assert again <= 1e-6 and spelling <= 1e-6 and f64 <= 2e-4 and std > 0.3 and kb < 64
    assert all(v > 30 * f64 for v in ablations.values())


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in sys.argv[2:] or MODELS:
        make(Path(sys.argv[1]), name.removeprefix("tiny-"))


if __name__ == "__main__":
    main()
