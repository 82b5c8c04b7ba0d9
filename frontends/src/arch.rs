//! Architectures: what a checkpoint's `config.json` and tensor names mean as a graph.
//!
//! A safetensors checkpoint has no graph. Each file under `arch/` reads the configuration of one architecture and
//! builds the graph with the tensors' names; nothing behind the importer reads those names again. To add one: write
//! the file, with its [`Arch`] and a `build` function, and add its name to `archs!`.
//!
//! What holds for an imported module:
//! - `main` is flat. A decoder takes `tokens: [t]` and yields logits for the last `r` of them, keeping keys and
//!   values in states `@l0.k`, `@l0.v`, ..; an encoder takes `tokens` and `types` and yields hidden states.
//! - Weights are ranges of the checkpoint's files in the type they are stored in. A tied head is an alias, so whoever
//!   rewrites it sees that it is shared. Weights stored another way round are turned by ops on the weight.
//! - No loop runs longer than the checkpoint is large: counts are compared with the tensors that are there first.

mod builder;
mod decoder;
mod rope;
pub(crate) mod tokens;

pub(crate) use builder::{Builder, DEFAULT_CONTEXT};

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::json::shown;
use quantc_ir::diag::{Diag, Diags, Result, near_misses};
use quantc_ir::module::Module;
use quantc_ir::weights::Store;
use std::path::{Path, PathBuf};

/// An architecture.
#[derive(Clone, Copy)]
pub struct Arch {
    /// `model_type` in the configuration.
    pub model_type: &'static str,
    /// The model classes in `architectures` that are imported.
    pub classes: &'static [&'static str],
    /// One line on what is covered.
    pub doc: &'static str,
    pub(crate) build: fn(&mut Builder<'_>) -> Result<(), Diags>,
}

macro_rules! archs {
    ($($name:ident),* $(,)?) => {
        $(mod $name;)*

        /// Every architecture, in order of name.
        pub const ARCHS: &[Arch] = &[$($name::ARCH),*];
    };
}

archs! { bert, gpt2, llama, mistral, qwen2, qwen3 }

/// What to import otherwise than by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportOptions {
    /// Tokens that the states have room for. By default those the model was made for, but no more than 4096.
    pub context: Option<u32>,
}

/// Facts about a model that its graph does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// `model_type` of the configuration.
    pub model_type: &'static str,
    /// Whether it makes text or reads it.
    pub kind: Kind,
    /// Tokens of a sequence at most.
    pub context: u32,
    /// Number of tokens.
    pub vocab: u32,
    /// The token that starts a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

impl Facts {
    /// Writes the facts among those of the module.
    pub(crate) fn write(&self, module: &mut Module) {
        let all = &mut module.facts;
        all.insert("model_type".into(), self.model_type.into());
        all.insert("kind".into(), self.kind.name().into());
        all.insert("context".into(), self.context.to_string());
        all.insert("vocab".into(), self.vocab.to_string());
        if let Some(bos) = self.bos {
            all.insert("bos".into(), bos.to_string());
        }
        if !self.eos.is_empty() {
            let ids: Vec<String> = self.eos.iter().map(u32::to_string).collect();
            all.insert("eos".into(), ids.join(","));
        }
    }
}

/// What a model does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Yields logits of the next token.
    Decoder,
    /// Yields a vector for each token.
    Encoder,
}

impl Kind {
    /// The name among a module's facts.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Decoder => "decoder",
            Kind::Encoder => "encoder",
        }
    }
}

/// An imported model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The graph and where its weights lie. The facts are among [`Module::facts`] too.
    pub module: Module,
    /// `tokenizer.json`, when there is one.
    pub tokenizer: Option<PathBuf>,
    /// Facts about the model.
    pub facts: Facts,
    /// What the user should know although nothing is wrong, one sentence each.
    pub notes: Vec<String>,
    /// Tensors of the checkpoint that the model does not use.
    pub unused: Vec<String>,
}

/// Imports the checkpoint in `dir` and maps its files into `store`.
pub fn import(dir: &Path, store: &Store, options: &ImportOptions) -> Result<Imported, Diags> {
    let doing = |mut problems: Diags| {
        problems.0.iter_mut().for_each(|d| d.context.push(format!("importing {}", dir.display())));
        problems
    };
    import_inner(dir, store, options).map_err(doing)
}

fn import_inner(dir: &Path, store: &Store, options: &ImportOptions) -> Result<Imported, Diags> {
    let mut config = Config::read(&dir.join("config.json"))?;
    refuse_quantized(&config)?;
    let arch = find(&mut config)?;
    let checkpoint = Checkpoint::open(dir)?;
    let mut builder = Builder::new(config, &checkpoint, *options, arch.model_type, module_name(dir));
    (arch.build)(&mut builder)?;
    builder.finish(store)
}

/// The name of the module made from `dir`.
pub(crate) fn module_name(dir: &Path) -> String {
    let full = dir.canonicalize().unwrap_or_else(|_| dir.into());
    let last = full.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "_.-".contains(c) { c } else { '_' };
    let name: String = last.chars().map(plain).take(64).collect();
    match name.chars().next() {
        None => "model".into(),
        Some(c) if c.is_ascii_digit() => format!("m_{name}"),
        Some(_) => name,
    }
}

/// Refuses checkpoints that another tool has quantized.
fn refuse_quantized(config: &Config) -> Result<()> {
    for key in ["quantization_config", "compression_config"] {
        let Some(value) = config.get(key) else { continue };
        let method = value.get("quant_method").and_then(|m| m.as_str()).unwrap_or("unknown method");
        let what = format!("is set: this checkpoint is already quantized ({})", shown(method));
        return Err(config.problem(key, what).help("import the float checkpoint it was made from"));
    }
    Ok(())
}

/// The architecture that a configuration names.
fn find(config: &mut Config) -> Result<&'static Arch, Diags> {
    let classes = config.texts("architectures").unwrap_or_default();
    let model_type = config.text("model_type");
    config.finish()?;
    if let Some(class) = classes.first() {
        if let Some(arch) = ARCHS.iter().find(|a| a.classes.contains(&class.as_str())) {
            return Ok(arch);
        }
        let known = ARCHS.iter().flat_map(|a| a.classes.iter().copied());
        return Err(unknown(config, "architectures", class, known).into());
    }
    if let Some(name) = model_type {
        if let Some(arch) = ARCHS.iter().find(|a| a.model_type == name) {
            return Ok(arch);
        }
        return Err(unknown(config, "model_type", &name, ARCHS.iter().map(|a| a.model_type)).into());
    }
    Err(config.problem("architectures", "is missing, and so is `model_type`").into())
}

fn unknown(
    config: &Config,
    key: &str,
    name: &str,
    known: impl Iterator<Item = &'static str> + Clone,
) -> Diag {
    let near = near_misses(name, known.clone());
    let list = known.collect::<Vec<_>>().join(", ");
    let help = match near[..] {
        [] => format!("supported are {list}"),
        _ => format!("near to it is {}; supported are {list}", near.join(", ")),
    };
    config.problem(key, format!("names `{}`, which is not supported", shown(name))).help(help)
}

/// An activation function of a feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Silu,
    Gelu,
    GeluTanh,
    Relu,
    Tanh,
}

impl Act {
    /// The names in configurations.
    const NAMES: &[(&str, Act)] = &[
        ("silu", Act::Silu),
        ("swish", Act::Silu),
        ("gelu", Act::Gelu),
        ("gelu_python", Act::Gelu),
        ("gelu_new", Act::GeluTanh),
        ("gelu_fast", Act::GeluTanh),
        ("gelu_pytorch_tanh", Act::GeluTanh),
        ("gelu_python_tanh", Act::GeluTanh),
        ("relu", Act::Relu),
        ("tanh", Act::Tanh),
    ];

    /// The activation that `key` names, or `default` when it names none.
    pub(crate) fn read(config: &mut Config, key: &str, default: Act) -> Act {
        let Some(name) = config.text(key) else { return default };
        let known = Act::NAMES.iter().find(|(n, _)| *n == name);
        if known.is_none() {
            let list = Act::NAMES.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", ");
            config.note(key, format!("names the unknown activation `{}`; known are {list}", shown(&name)));
        }
        known.map_or(default, |k| k.1)
    }

    /// The op.
    pub(crate) fn op(self) -> quantc_ir::ops::Op {
        use quantc_ir::ops;
        match self {
            Act::Silu => ops::Silu {}.into(),
            Act::Gelu => ops::Gelu { approx: false }.into(),
            Act::GeluTanh => ops::Gelu { approx: true }.into(),
            Act::Relu => ops::Relu {}.into(),
            Act::Tanh => ops::Tanh {}.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(text: &str) -> Result<&'static str, String> {
        let mut config = Config::parse("config.json", text.as_bytes()).unwrap();
        find(&mut config).map(|a| a.model_type).map_err(|d| d.to_string())
    }

    #[test]
    fn architectures_are_found_by_class_then_by_type() {
        assert_eq!(find_in(r#"{"architectures": ["LlamaForCausalLM"], "model_type": "x"}"#), Ok("llama"));
        assert_eq!(find_in(r#"{"model_type": "qwen2"}"#), Ok("qwen2"));
        let near = find_in(r#"{"architectures": ["LlamaForCausalLm"]}"#).unwrap_err();
        assert!(near.contains("near to it is LlamaForCausalLM"), "{near}");
        let far = find_in(r#"{"architectures": ["T5"], "model_type": "t5"}"#).unwrap_err();
        assert!(far.contains("`T5`, which is not supported") && far.contains("GPT2LMHeadModel"), "{far}");
        assert!(find_in("{}").unwrap_err().contains("is missing"));
        assert!(find_in(r#"{"architectures": 3}"#).unwrap_err().contains("expected a list"));
    }

    #[test]
    fn architectures_are_in_order_and_distinct() {
        let types: Vec<_> = ARCHS.iter().map(|a| a.model_type).collect();
        assert!(types.is_sorted_by(|a, b| a < b), "{types:?}");
    }

    #[test]
    fn quantized_checkpoints_are_refused() {
        let text = br#"{"quantization_config": {"quant_method": "gptq"}}"#;
        let d = refuse_quantized(&Config::parse("config.json", text).unwrap()).unwrap_err();
        assert!(d.message.contains("already quantized (gptq)"), "{d}");
    }
}
