//! Kernels compiled for every architecture: they compile, use no stack, and spill nothing.

use crate::{products, rows};
use quantc_codegen::cpu::rope::{RopeSpec, RopeStyle, RopeTableSpec};
use quantc_codegen::cpu::row::RowSpec;
use quantc_codegen::cuda::rope;
use quantc_codegen::cuda::row::{RowTile, build};
use quantc_codegen::cuda::skinny::{self, SkinnyTile};
use quantc_codegen::cuda::text::emit;
use quantc_codegen::cuda::tile::Kernel;
use quantc_codegen::eexpr::{F32, MemTy};
use quantc_codegen::spec::{AFmt, Code, ScaleTy, WFmt, Zero};

/// A kernel over rows as a launch would have it.
fn row(spec: &RowSpec) -> Kernel {
    build(&format!("{}_{}", spec.name, spec.cols), spec, RowTile::of(spec)).unwrap()
}

#[test]
fn the_text_of_a_norm() {
    let spec = RowSpec::rms_norm(256, 1e-5, MemTy::Bf16, MemTy::Bf16, MemTy::Bf16);
    insta::assert_snapshot!(emit(&row(&spec)));
}

#[test]
fn the_text_of_a_product_of_four_bit_weights() {
    let w = WFmt { code: Code::U4, group: 128, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    let spec = products::spec(256, 1024, w, AFmt::Bf16, false);
    let tile = SkinnyTile { rows: 1, tokens: 1, warps: 2, stages: 2 };
    insta::assert_snapshot!(emit(&skinny::build("skinny", &spec, tile).unwrap()));
}

#[cfg(feature = "cuda")]
mod with_nvrtc {
    use super::*;
    use quantc_codegen::cuda::nvrtc::{Compiler, FOLDER_VAR};
    use quantc_codegen::spec::MatmulSpec;
    use quantc_codegen::targets::GPUS;
    use quantc_ir::target::{GpuDesc, GpuTarget};
    use rayon::prelude::*;
    use std::path::Path;

    /// NVRTC from the folder the environment names, or where `make nvrtc` puts it; says so when there is none.
    fn compiler(test: &str) -> Option<Compiler> {
        let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/nvrtc/nvidia/cu13/lib");
        let folder =
            std::env::var_os(FOLDER_VAR).or_else(|| fetched.is_dir().then(|| fetched.into_os_string()));
        let found = Compiler::find_in(folder);
        found.inspect_err(|why| eprintln!("{test}: skipped, {why}")).ok()
    }

    /// Compiles kernels for all architectures and looks at what they use.
    fn check(test: &str, kernels: &[Kernel]) {
        let jobs: Vec<_> =
            kernels.iter().flat_map(|k| GPUS.iter().map(move |gpu| (k.clone(), *gpu))).collect();
        check_all(test, &jobs);
    }

    /// Compiles kernels for an architecture each.
    fn check_all(test: &str, jobs: &[(Kernel, &GpuTarget)]) {
        let Some(compiler) = compiler(test) else { return };
        jobs.par_iter().for_each(|(kernel, target)| {
            let what = format!("{} for {}", kernel.name, target.name);
            let cubin =
                compiler.compile(&emit(kernel), &target.gpu).unwrap_or_else(|e| panic!("{what}: {e}"));
            let [usage] = cubin.usage().try_into().unwrap_or_else(|_| panic!("{what}: {}", cubin.log));
            assert_eq!((usage.spills, usage.stack, usage.shared), (0, 0, 0), "{what}: {}", cubin.log);
            let registers = usage.registers.next_multiple_of(8) * kernel.threads * kernel.blocks_per_sm;
            assert!(registers <= target.gpu.registers, "{what}: {} registers", usage.registers);
            assert!(kernel.shared <= target.gpu.shared_bytes, "{what}: {} bytes shared", kernel.shared);
            assert!(cubin.bytes.starts_with(b"\x7fELF"), "{what}: not an ELF file");
        });
    }

    /// A product as a launch of up to `m` rows on a GPU would have it.
    fn skinny(spec: &MatmulSpec, m: u32, gpu: &GpuDesc) -> Kernel {
        let tile = SkinnyTile::of(spec, m, gpu).unwrap();
        skinny::build(&format!("skinny_{}_m{m}", spec.w.code.name()), spec, tile).unwrap()
    }

    #[test]
    fn skinny_products() {
        let k = 4096;
        let mut jobs = vec![];
        for (i, target) in GPUS.iter().enumerate() {
            for a in [AFmt::Bf16, AFmt::I8Token] {
                // All formats for the oldest architecture, and each again for some other.
                let (first, step) = if i == 0 { (0, 1) } else { (i - 1, GPUS.len() - 1) };
                for w in products::formats(a, k).into_iter().skip(first).step_by(step) {
                    jobs.push((skinny(&products::spec(4096, k, w, a, false), 1, &target.gpu), *target));
                }
                let w = products::formats(a, k)[0];
                for m in [16, 64] {
                    jobs.push((skinny(&products::spec(4096, k, w, a, false), m, &target.gpu), *target));
                }
                jobs.push((skinny(&products::spec(14336, k, w, a, true), 8, &target.gpu), *target));
            }
        }
        check_all("skinny_products", &jobs);
    }

    #[test]
    fn kernels_over_rows() {
        let specs = rows::specs(4096).into_iter().step_by(2).chain(rows::specs(66).into_iter().step_by(4));
        let mut kernels: Vec<_> = specs.map(|s| row(&s)).collect();
        let table = RopeTableSpec { half: 64, factor: F32::new(1.0) };
        kernels.push(rope::build_table("rope_table", &table).unwrap());
        kernels.push(rope::build("rope", &RopeSpec::new(32, 128, RopeStyle::Half)).unwrap());
        check("kernels_over_rows", &kernels);
    }
}
