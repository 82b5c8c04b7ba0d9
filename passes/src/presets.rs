//! Named pipelines.
//!
//! A preset is text and nothing more: what it does can be pasted into `-p`, looked at and changed. The embedding table
//! is only ever looked up by row, so that all presets but `f32` and `bf16` leave it as the checkpoint has it. The head is
//! the largest product and the one that decides between tokens: quantized presets keep it at 8 bits unless their name
//! says otherwise.

use quantc_ir::diag::{Diag, Result, near_misses};

/// A named pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// The name on the command line.
    pub name: &'static str,
    /// One sentence.
    pub doc: &'static str,
    /// What becomes of the embedding table.
    pub embedding: &'static str,
    /// What becomes of the product that makes logits.
    pub head: &'static str,
    /// The pipeline.
    pub pipeline: &'static str,
}

impl Preset {
    /// The preset called `name`, or an error that lists names like it.
    pub fn get(name: &str) -> Result<&'static Preset> {
        ALL.iter().find(|p| p.name == name).ok_or_else(|| {
            let diag = Diag::pipeline(format!("unknown preset `{name}`"));
            match near_misses(name, ALL.iter().map(|p| p.name))[..] {
                [] => diag.help("`quantc presets` lists all presets"),
                ref near => diag.help(format!("did you mean {}?", crate::pass::quoted(near))),
            }
        })
    }

    /// Whether it takes statistics, and so needs a text.
    pub fn needs_data(&self) -> bool {
        self.pipeline.contains("calibrate")
    }
}

/// The pipeline around what is done to the weights and activations of a layer.
macro_rules! pipeline {
    ($($in_layers:literal),+) => {
        concat!("outline-layers, fold-constants, dedupe, layers(", $($in_layers, ", ",)+ "fuse-epilogue), drop-dead, narrow-rows, pack-weights")
    };
}

/// The table of presets.
macro_rules! presets {
    ($(
        $(#[doc = $doc:literal])+
        $name:literal, embedding: $embedding:literal, head: $head:literal, [$($in_layers:literal),+ $(,)?];
    )*) => {
        /// Every preset.
        pub static ALL: &[Preset] = &[$(Preset {
            name: $name,
            doc: concat!($($doc),+),
            embedding: $embedding,
            head: $head,
            pipeline: pipeline!($($in_layers),+),
        }),*];
    };
}

presets! {
    /// All weights as f32: the reference.
    "f32", embedding: "f32", head: "f32", ["cast-weights{to=f32}"];

    /// All matrices as bf16, bf16 activations.
    "bf16", embedding: "bf16", head: "bf16", ["cast-weights{to=bf16}", "cast-activations{to=bf16}"];

    /// int8 weights with a scale per row, int8 activations with a scale per token.
    "w8a8", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "round-to-nearest{format=int8, group=row}",
        "quantize-activations{format=int8}",
        "fuse-dequant-matmul",
    ];

    /// int8 weights with a scale per row, int8 activations with one scale per tensor from calibration.
    "w8a8-static", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "calibrate{stats=[histogram]}",
        "round-to-nearest{format=int8, group=row}",
        "quantize-activations{format=int8, scale=static, range=mse}",
        "fuse-dequant-matmul",
    ];

    /// As `w8a8-static`, with outliers of activations moved into the weights first.
    "w8a8-static-smoothquant", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "calibrate{stats=[absmax, rows]}",
        "smoothquant{alpha=search, scale=static}",
        "calibrate{stats=[histogram]}",
        "round-to-nearest{format=int8, group=row}",
        "quantize-activations{format=int8, scale=static, range=mse}",
        "fuse-dequant-matmul",
    ];

    /// int8 weights with a scale per row, bf16 activations.
    "w8a16", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "round-to-nearest{format=int8, group=row}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// Symmetric int4 weights with a bf16 scale per 128 columns, bf16 activations.
    "w4a16-g128", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "round-to-nearest{format=int4, group=128, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// Symmetric int4 weights with a bf16 scale per 64 columns, bf16 activations.
    "w4a16-g64", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "round-to-nearest{format=int4, group=64, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// Symmetric int4 weights with a bf16 scale per 32 columns, bf16 activations.
    "w4a16-g32", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "round-to-nearest{format=int4, group=32, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// Symmetric int4 weights with a bf16 scale per 128 columns, int8 activations with a scale per token.
    "w4a8-g128", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "round-to-nearest{format=int4, group=128, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "quantize-activations{format=int8}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a8-g128`, and the head int4 too: the fewest bytes a token.
    "w4a8-g128-head4", embedding: "as in the checkpoint", head: "int4 in groups of 32, int8 activations", [
        "round-to-nearest{format=int4, group=128, skip-layers=[head]}",
        "round-to-nearest{format=int4, group=32, search=mse, layers=[head]}",
        "quantize-activations{format=int8}",
        "fuse-dequant-matmul",
    ];

    /// Symmetric int4 weights with a bf16 scale per 64 columns, int8 activations with a scale per token.
    "w4a8-g64", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "round-to-nearest{format=int4, group=64, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "quantize-activations{format=int8}",
        "fuse-dequant-matmul",
    ];

    /// Symmetric int4 weights with a bf16 scale per 32 columns, int8 activations with a scale per token.
    "w4a8-g32", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "round-to-nearest{format=int4, group=32, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "quantize-activations{format=int8}",
        "fuse-dequant-matmul",
    ];

    /// As `w8a8`, with outliers of activations moved into the weights first.
    "w8a8-smoothquant", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "calibrate{stats=[absmax, rows]}",
        "smoothquant{alpha=search}",
        "round-to-nearest{format=int8, group=row}",
        "quantize-activations{format=int8}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a16-g128`, rounded so that outputs change little.
    "w4a16-gptq-g128", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "gptq{format=int4, group=128, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a16-g64`, rounded so that outputs change little.
    "w4a16-gptq-g64", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "gptq{format=int4, group=64, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a16-g32`, rounded so that outputs change little.
    "w4a16-gptq-g32", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "gptq{format=int4, group=32, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a16-g128`, with the channels that matter made larger and ranges searched for.
    "w4a16-awq-g128", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "awq{format=int4, group=128, skip-layers=[head]}",
        "round-to-nearest{format=int4, group=128, skip-layers=[head], search=output}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a16-g32`, with the channels that matter made larger and ranges searched for.
    "w4a16-awq-g32", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "awq{format=int4, group=32, skip-layers=[head]}",
        "round-to-nearest{format=int4, group=32, skip-layers=[head], search=output}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a16-gptq-g128`, with channels made larger where that helps.
    "w4a16-awq-gptq-g128", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "awq{format=int4, group=128, skip-layers=[head], rounding=gptq}",
        "gptq{format=int4, group=128, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a16-gptq-g32`, with channels made larger where that helps.
    "w4a16-awq-gptq-g32", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "awq{format=int4, group=32, skip-layers=[head], rounding=gptq}",
        "gptq{format=int4, group=32, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a8-g128`, with large outliers of activations moved into the weights, rounded so that outputs change little.
    "w4a8-gptq-g128", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "calibrate{stats=[absmax, rows, hessian], skip-layers=[head]}",
        "smoothquant{alpha=search, worth=0.2, skip-layers=[head]}",
        "gptq{format=int4, group=128, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "quantize-activations{format=int8}",
        "fuse-dequant-matmul",
    ];

    /// As `w4a8-g32`, with large outliers of activations moved into the weights, rounded so that outputs change little.
    "w4a8-gptq-g32", embedding: "as in the checkpoint", head: "int8 per row, int8 activations", [
        "calibrate{stats=[absmax, rows, hessian], skip-layers=[head]}",
        "smoothquant{alpha=search, worth=0.2, skip-layers=[head]}",
        "gptq{format=int4, group=32, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "quantize-activations{format=int8}",
        "fuse-dequant-matmul",
    ];

    /// Symmetric int3 weights with an f32 scale per 64 columns, rounded so that outputs change little, bf16 activations.
    "w3a16-gptq-g64", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "gptq{format=int3, group=64, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// Symmetric int3 weights with an f32 scale per 32 columns, rounded so that outputs change little, bf16 activations.
    "w3a16-gptq-g32", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[hessian], skip-layers=[head]}",
        "gptq{format=int3, group=32, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// e4m3 weights with a scale per row, bf16 activations.
    "fp8", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "round-to-nearest{format=e4m3, group=row, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// e4m3 weights with a scale per row, e4m3 activations with a scale per token; products of bf16 on CPUs.
    "fp8-dynamic", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "round-to-nearest{format=e4m3, group=row, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "quantize-activations{format=e4m3}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];

    /// e4m3 weights with a scale per row, e4m3 activations with one scale per tensor from calibration; products of bf16
    /// on CPUs.
    "fp8-static", embedding: "as in the checkpoint", head: "int8 per row, bf16 activations", [
        "calibrate{stats=[min-max], skip-layers=[head]}",
        "round-to-nearest{format=e4m3, group=row, skip-layers=[head]}",
        "round-to-nearest{format=int8, group=row, layers=[head]}",
        "quantize-activations{format=e4m3, scale=static, range=whole}",
        "cast-activations{to=bf16}",
        "fuse-dequant-matmul",
    ];
}

/// A named pipeline for graphs over arrays, which have neither tokens nor layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GraphPreset {
    /// The name on the command line.
    pub name: &'static str,
    /// One sentence.
    pub doc: &'static str,
    /// The pipeline.
    pub pipeline: &'static str,
}

/// Every preset for graphs.
pub static GRAPHS: &[GraphPreset] = &[
    GraphPreset {
        name: "f32",
        doc: "The graph as it is: quantized parts stay so, everything else is computed in its own type.",
        pipeline: "fold-constants, fold-batch-norm, dedupe, drop-dead",
    },
    GraphPreset {
        name: "w8a8-static",
        doc: "Convolutions and products with weights multiply bytes: int8 weights with a scale per output, unsigned \
              activations with one scale per array from samples.",
        pipeline: "fold-constants, fold-batch-norm, dedupe, quantize-products, drop-dead",
    },
];

impl GraphPreset {
    /// The preset called `name`, or an error that lists all.
    pub fn get(name: &str) -> Result<&'static GraphPreset> {
        GRAPHS.iter().find(|p| p.name == name).ok_or_else(|| {
            let names: Vec<&str> = GRAPHS.iter().map(|p| p.name).collect();
            Diag::pipeline(format!("`{name}` is no preset for graphs over arrays"))
                .help(format!("use {}", crate::pass::quoted(&names)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Registry;
    use crate::pass::Fact;
    use crate::pipeline;
    use quantc_ir::module::Module;
    use quantc_ir::target::{CpuDesc, TargetDesc};

    #[test]
    fn every_preset_passes_the_check() {
        let cpu = CpuDesc {
            llvm_cpu: "",
            features: &[],
            vector_bits: 256,
            vector_regs: 16,
            fma: true,
            dots: &[],
            l1_kib: 32,
            l2_kib: 256,
            int8_mac_per_cycle: 1.0,
            f32_mac_per_cycle: 1.0,
            bf16_mac_per_cycle: 0.0,
            stream_bytes_per_cycle: 1.0,
        };
        let target = TargetDesc { name: "cpu", doc: "", cpu, gpu: None };
        for preset in ALL {
            let parsed = pipeline::parse(preset.pipeline).unwrap();
            let data: &[Fact] = if preset.needs_data() { &[Fact::Data] } else { &[] };
            let registry = Registry::builtin();
            let checked =
                pipeline::check_given(&parsed, &registry, &Module::new("m"), Some(&target), None, data);
            let checked = checked.unwrap_or_else(|e| panic!("{}: {e}", preset.name));
            assert!(checked.passes().len() >= 6, "{}", preset.name);
            assert!(preset.doc.trim().ends_with('.'));
        }
    }

    #[test]
    fn names_are_suggested() {
        assert_eq!(Preset::get("w4a16-g64").unwrap().name, "w4a16-g64");
        assert!(Preset::get("w4a16-g6").unwrap_err().help.unwrap().contains("w4a16-g64"));
    }
}
