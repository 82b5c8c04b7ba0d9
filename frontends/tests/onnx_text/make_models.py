#!/usr/bin/env python3
"""Write tiny text models with random weights as ONNX files, by every exporter that is installed.

    make_models.py OUTDIR [--family NAME]... [--exporter NAME]... [--record]

OUTDIR/FAMILY/EXPORTER/model.onnx is a model, case.safetensors beside it holds sequences of several
lengths (`ids.LENGTH`) and the rows that ONNX Runtime computes from them (`rows.LENGTH`). Where an
exporter does not write a family, failed.txt says why. `--record` leaves the models that are there
as they are, and computes the rows again. Needs torch, transformers, onnx, onnxscript and
onnxruntime; optimum and onnxruntime-genai are exporters of their own, and are left out, by name,
where they are missing.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers as hf
from safetensors.numpy import save_file

TOKENS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38]
VOCAB = 64
CONTEXT = 40
# Lengths of the sequences that are recorded; some families keep two rows of their positions for padding.
LENGTHS = [1, 2, 5, len(TOKENS), 24, CONTEXT - 3]

# What all families have, by the usual names.
DECODER = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
GROUPED = dict(DECODER, num_key_value_heads=2)
GPT = dict(
    vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, n_inner=48, bos_token_id=1, eos_token_id=2,
)


def config(name, **settings):
    return getattr(hf, name + "Config")(**settings)


# Family: the class of the model and its configuration.
FAMILIES = {
    "bert": ("BertModel", lambda: config("Bert", **DECODER)),
    "roberta": ("RobertaModel", lambda: config("Roberta", **DECODER | dict(pad_token_id=1))),
    "distilbert": (
        "DistilBertModel",
        lambda: config("DistilBert", vocab_size=VOCAB, dim=32, hidden_dim=48, n_layers=2, n_heads=4,
                       max_position_embeddings=CONTEXT),
    ),
    "gpt2": ("GPT2LMHeadModel", lambda: config("GPT2", **GPT)),
    "gptj": ("GPTJForCausalLM", lambda: config("GPTJ", **GPT, rotary_dim=4)),
    "gpt-neox": ("GPTNeoXForCausalLM", lambda: config("GPTNeoX", **DECODER, rotary_pct=0.5)),
    "opt": ("OPTForCausalLM", lambda: config(
        "OPT", vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, word_embed_proj_dim=32)),
    "gpt-neo": ("GPTNeoForCausalLM", lambda: config(
        "GPTNeo", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, window_size=6,
        max_position_embeddings=CONTEXT, attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2)),
    "llama": ("LlamaForCausalLM", lambda: config("Llama", **GROUPED)),
    "mistral": ("MistralForCausalLM", lambda: config("Mistral", **GROUPED, sliding_window=6)),
    "qwen2": ("Qwen2ForCausalLM", lambda: config("Qwen2", **GROUPED)),
    "qwen3": ("Qwen3ForCausalLM", lambda: config("Qwen3", **GROUPED, head_dim=8)),
    "phi": ("PhiForCausalLM", lambda: config("Phi", **DECODER, partial_rotary_factor=0.5)),
    "phi3": ("Phi3ForCausalLM", lambda: config("Phi3", **GROUPED)),
    "gemma": ("GemmaForCausalLM", lambda: config("Gemma", **GROUPED, head_dim=8)),
}
ENCODERS = ["bert", "roberta", "distilbert"]


def settings(family, wide=False):
    """The family's configuration; wide ones have heads of 32 numbers, others of 8."""
    made = FAMILIES[family][1]()
    if wide:
        made.hidden_size *= 4
        # The builder takes any linear layer with as many outputs as there are tokens for the model's last one, and keys
        # of two heads have VOCAB.
        made.vocab_size += 16
        if getattr(made, "head_dim", None):
            made.head_dim = 32
    return made


def make(family, attention="eager", wide=False):
    torch.manual_seed(7)
    model_config = settings(family, wide)
    model_config._attn_implementation = attention
    model = getattr(hf, FAMILIES[family][0])(model_config)
    # Norms and biases that are ones and zeros would hide mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.mul_(4)
    return model.eval()


class Rows(torch.nn.Module):
    """The model from ids and mask to its first result."""

    def __init__(self, model, cache):
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, input_ids, attention_mask):
        more = {"use_cache": False} if self.cache else {}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False, **more)[0]


def torch_export(family, path, dynamo, attention, half=False):
    model = make(family, attention)
    if half:
        model = model.half()
    model = Rows(model, family not in ENCODERS)
    ids = torch.tensor([TOKENS, TOKENS[::-1]])
    inputs = (ids, torch.ones_like(ids))
    names = dict(input_names=["input_ids", "attention_mask"], output_names=["logits"])
    if dynamo:
        batch, tokens = torch.export.Dim("batch"), torch.export.Dim("sequence")
        axes = {0: batch, 1: tokens}
        torch.onnx.export(model, inputs, path, dynamo=True, external_data=False, verbose=False,
                          dynamic_shapes=dict(input_ids=axes, attention_mask=axes), **names)
    else:
        axes = {0: "batch", 1: "sequence"}
        torch.onnx.export(model, inputs, path, dynamo=False, opset_version=17,
                          dynamic_axes=dict(input_ids=axes, attention_mask=axes, logits=axes), **names)


def saved(family, folder, attention="eager", wide=False):
    model = make(family, attention, wide)
    model.save_pretrained(folder)
    return folder


def optimum_export(family, path, past):
    from optimum.exporters.onnx import main_export

    task = "feature-extraction" if family in ENCODERS else "text-generation" + ("-with-past" if past else "")
    with tempfile.TemporaryDirectory() as folder:
        saved(family, os.path.join(folder, "model"), "eager" if family in ["gptj", "gpt-neo"] else "sdpa")
        main_export(os.path.join(folder, "model"), os.path.join(folder, "onnx"), task=task, do_validation=False,
                    no_post_process=False, library_name="transformers", framework="pt")
        shutil.copy(os.path.join(folder, "onnx", "model.onnx"), path)


def runtime_export(family, path, source):
    """ONNX Runtime's optimizer over what PyTorch wrote."""
    from onnxruntime.transformers.optimizer import optimize_model
    from onnxruntime.transformers.fusion_options import FusionOptions

    kinds = {"bert": "bert", "roberta": "bert", "distilbert": "bert", "gpt-neox": "gpt_neox", "phi": "phi"}
    kind = kinds.get(family, "gpt2")
    with tempfile.TemporaryDirectory() as folder:
        plain = os.path.join(folder, "plain.onnx")
        torch_export(family, plain, source == "dynamo", "eager")
        options = FusionOptions(kind)
        better = optimize_model(plain, model_type=kind, num_heads=4, hidden_size=32, opt_level=0,
                                optimization_options=options)
        better.save_model_to_file(path)


def genai_export(family, path):
    import onnxruntime_genai  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        model, out = os.path.join(folder, "model"), os.path.join(folder, "onnx")
        saved(family, model, wide=True)
        write_tokenizer(model)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out, "-p", "fp32",
                   "-e", "cpu", "-c", os.path.join(folder, "cache")]
        offline = dict(os.environ, HF_HUB_OFFLINE="1")
        done = subprocess.run(command, capture_output=True, text=True, env=offline)
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            raise ValueError(why.replace(model + " ", ""))
        onnx.save(onnx.load(os.path.join(out, "model.onnx")), path)


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCAB)}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    fast.save_pretrained(folder)


EXPORTERS = {
    "torchscript-eager": lambda f, p: torch_export(f, p, False, "eager"),
    "torchscript-sdpa": lambda f, p: torch_export(f, p, False, "sdpa"),
    "dynamo-eager": lambda f, p: torch_export(f, p, True, "eager"),
    "dynamo-sdpa": lambda f, p: torch_export(f, p, True, "sdpa"),
    "torchscript-half": lambda f, p: torch_export(f, p, False, "eager", half=True),
    "optimum": lambda f, p: optimum_export(f, p, False),
    "optimum-past": lambda f, p: optimum_export(f, p, True),
    "ort-optimizer": lambda f, p: runtime_export(f, p, "torchscript"),
    "ort-optimizer-dynamo": lambda f, p: runtime_export(f, p, "dynamo"),
    "genai-builder": genai_export,
}
# Exporters whose models ONNX Runtime does not run with heads of 8 numbers.
WIDE = ["genai-builder"]
# Exporters that only know decoders.
NO_ENCODERS = ["optimum-past", "genai-builder"]


def sequence(length):
    """Tokens that no family takes for padding."""
    if length == len(TOKENS):
        return np.array(TOKENS, dtype=np.int64)
    return np.random.default_rng(length).integers(3, VOCAB, length, dtype=np.int64)


def expected(session, ids, head):
    """The rows that ONNX Runtime computes for the tokens; heads have `head` numbers."""
    ids = ids[None]
    feeds = {}
    for i in session.get_inputs():
        kind = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32,
                "tensor(float16)": np.float16, "tensor(bool)": bool}[i.type]
        if i.name == "input_ids":
            feeds[i.name] = ids.astype(kind)
        elif i.name == "attention_mask":
            feeds[i.name] = np.ones_like(ids).astype(kind)
        elif i.name == "position_ids":
            feeds[i.name] = np.arange(ids.size, dtype=kind)[None]
        elif i.name == "token_type_ids":
            feeds[i.name] = np.zeros_like(ids).astype(kind)
        elif i.name.startswith("past"):
            # Batch, heads, earlier tokens, size of a head.
            unknown = [1, 0, 0, head]
            shape = [d if isinstance(d, int) else unknown[axis] for axis, d in enumerate(i.shape)]
            feeds[i.name] = np.zeros(shape, dtype=kind)
        else:
            raise ValueError(f"an input is called {i.name}")
    return session.run(None, feeds)[0].astype(np.float32)[0]


def record(folder, wide):
    """Keeps what ONNX Runtime computes beside the model."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    path = os.path.join(folder, "model.onnx")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    case = {}
    for length in LENGTHS:
        ids = sequence(length)
        case[f"ids.{length}"], case[f"rows.{length}"] = ids, expected(session, ids, 32 if wide else 8)
    save_file(case, os.path.join(folder, "case.safetensors"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--exporter", action="append", choices=list(EXPORTERS))
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    made = 0
    missing = set()
    for family in args.family or FAMILIES:
        for exporter in args.exporter or EXPORTERS:
            if exporter in missing or family in ENCODERS and exporter in NO_ENCODERS:
                continue
            folder = os.path.join(args.out, family, exporter)
            if args.record:
                if os.path.exists(os.path.join(folder, "model.onnx")):
                    record(folder, exporter in WIDE)
                    made += 1
                continue
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder)
            path = os.path.join(folder, "model.onnx")
            try:
                EXPORTERS[exporter](family, path)
                record(folder, exporter in WIDE)
                settings(family, exporter in WIDE).save_pretrained(folder)
                made += 1
                print(f"{family}/{exporter}", flush=True)
            except ImportError as e:
                missing.add(exporter)
                shutil.rmtree(folder)
                print(f"left out: {exporter}: {e}", flush=True)
            except Exception as e:
                lines = [l for l in str(e).splitlines() if l.strip()] or [type(e).__name__]
                if os.path.exists(path):
                    os.remove(path)
                with open(os.path.join(folder, "failed.txt"), "w") as f:
                    f.write(f"{type(e).__name__}: {lines[0]}\n")
                print(f"{family}/{exporter} failed: {type(e).__name__}: {lines[0][:300]}", flush=True)
                if os.environ.get("TRACE"):
                    traceback.print_exc()
    print(f"{made} models in {args.out}")


if __name__ == "__main__":
    sys.exit(main())
