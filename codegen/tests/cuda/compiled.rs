//! Kernels as launches would have them, compiled for the architectures: no stack, no spills, the instructions they owe.

use crate::machine::{self, check};
use crate::{attention, caches, groups, products, rows};
use quantc_codegen::cpu::attention::AttentionSpec;
use quantc_codegen::cpu::cache::{CacheAppendSpec, CacheTy, Role};
use quantc_codegen::cpu::gather::GatherSpec;
use quantc_codegen::cpu::rope::{RopeSpec, RopeStyle, RopeTableSpec};
use quantc_codegen::cuda::attention::AttentionCall;
use quantc_codegen::cuda::attention::decode::{self, DecodeTile};
use quantc_codegen::cuda::attention::prefill::{self, PrefillTile};
use quantc_codegen::cuda::cache::{self, AppendSpec, Rotation};
use quantc_codegen::cuda::gather;
use quantc_codegen::cuda::group::{self, GroupTile, Scales};
use quantc_codegen::cuda::mixed::{self, MixedTile};
use quantc_codegen::cuda::plain;
use quantc_codegen::cuda::row::{self, RowTile};
use quantc_codegen::cuda::sample::{self, SampleSpec};
use quantc_codegen::cuda::skinny::{self, SkinnyTile};
use quantc_codegen::cuda::tile::GroupKind;
use quantc_codegen::cuda::tiles::rows::{self as tile_rows, From, RowTilesSpec};
use quantc_codegen::cuda::wide::{self, WideTile};
use quantc_codegen::cuda::{rope, tile::Kernel};
use quantc_codegen::eexpr::{F32, MemTy};
use quantc_codegen::spec::{AFmt, MatmulSpec, Rows, Zero};
use quantc_codegen::targets::GPUS;
use quantc_ir::target::GpuDesc;

#[test]
fn kernels_over_rows() {
    let specs = rows::specs(4096).into_iter().step_by(2).chain(rows::specs(66).into_iter().step_by(4));
    let mut kernels: Vec<Kernel> =
        specs.map(|spec| row::build(&spec.name, &spec, RowTile::of(&spec)).unwrap()).collect();
    let table = RopeTableSpec { half: 64, factor: F32::new(1.0) };
    kernels.push(rope::build_table("rope_table", &table).unwrap());
    kernels.push(rope::build("rope", &RopeSpec::new(32, 128, RopeStyle::Half)).unwrap());
    let jobs: Vec<_> = kernels.iter().flat_map(|k| GPUS.iter().map(move |gpu| (k.clone(), *gpu))).collect();
    check("kernels_over_rows", &jobs);
}

#[test]
fn caches_and_tokens() {
    let mut kernels = vec![];
    for (i, ty) in caches::TYPES.into_iter().enumerate() {
        for role in [Role::Keys, Role::Values] {
            let rows = CacheAppendSpec {
                heads: 8,
                head_dim: 128,
                x_stride: 1024,
                ty,
                role,
                fixed_scales: i == 1,
                slot_rows: 64,
            };
            let rotation =
                (role == Role::Keys).then_some(Rotation { rotary_dim: 128, style: RopeStyle::Half });
            let spec = AppendSpec { rows, rotation, paged: i == 0 };
            kernels.push(cache::build_append("append", &spec).unwrap());
        }
    }
    for (ty, add) in [(MemTy::Bf16, false), (MemTy::I8, true)] {
        let spec = GatherSpec { width: 4096, table_rows: 128_256, ty, add };
        kernels.push(gather::build("gather", &spec).unwrap());
    }
    kernels.push(sample::build("sample", &SampleSpec { vocab: 128_256, stride: 128_256 }).unwrap());
    let jobs: Vec<_> = kernels
        .iter()
        .enumerate()
        .flat_map(|(i, k)| {
            let (first, step) = if machine::everything() { (0, 1) } else { (i % 2, 2) };
            GPUS.iter().skip(first).step_by(step).map(move |gpu| (k.clone(), *gpu))
        })
        .collect();
    check("caches_and_tokens", &jobs);
}

/// Kernels of attention as launches would have them: one of each width for some caches, all of them when asked.
#[test]
fn attention_kernels() {
    let mut jobs = vec![];
    let all = machine::everything();
    for (i, target) in GPUS.iter().enumerate() {
        for (j, ty) in caches::TYPES.into_iter().enumerate() {
            for (k, (heads, kv_heads, d)) in [(32, 8, 128), (8, 8, 64), (16, 1, 256)].into_iter().enumerate()
            {
                let call = attention::call(heads, kv_heads, d, ty, k == 0);
                if all || (i + j + k) % 3 == 0 {
                    let tile = DecodeTile::of(&call, 4, 8192, &target.gpu).unwrap();
                    jobs.push((decode::build("decode", &call, tile).unwrap(), *target));
                }
                if all || (i + j + k) % 3 == 1 {
                    let tile = PrefillTile::of(&call, &target.gpu).unwrap();
                    jobs.push((prefill::build("prefill", &call, tile).unwrap(), *target));
                }
                // Of the rows that are wanted only.
                if all || (k < 2 && (i + j + k) % 6 == 2) {
                    let mut call = call.clone();
                    call.spec.rows = Rows::R;
                    let tile = DecodeTile::of(&call, 8, 8192, &target.gpu).unwrap();
                    jobs.push((decode::build("decode_wanted", &call, tile).unwrap(), *target));
                    let tile = PrefillTile::of(&call, &target.gpu).unwrap();
                    jobs.push((prefill::build("prefill_wanted", &call, tile).unwrap(), *target));
                }
            }
        }
        let direct = AttentionCall::plain(AttentionSpec::direct(12, 12, 64, 0.125, i % 2 == 0), false);
        let tile = PrefillTile::of(&direct, &target.gpu).unwrap();
        jobs.push((prefill::build("direct", &direct, tile).unwrap(), *target));
        for (j, ty) in [CacheTy::F32, CacheTy::F16, CacheTy::I8].into_iter().enumerate() {
            if all || i % 3 == j {
                let mut spec = AttentionSpec::cached(8, 2, 100, 0.1, ty, 64);
                spec.rows = if i % 2 == 0 { Rows::T } else { Rows::R };
                jobs.push((plain::attention("plain_attention", &spec).unwrap(), *target));
                let role = if i % 2 == 0 { Role::Keys } else { Role::Values };
                let (heads, head_dim, x_stride) = (2, 100, 200);
                let rows = CacheAppendSpec {
                    heads,
                    head_dim,
                    x_stride,
                    ty,
                    role,
                    fixed_scales: false,
                    slot_rows: 64,
                };
                jobs.push((plain::append("plain_append", &rows).unwrap(), *target));
            }
        }
    }
    check("attention_kernels", &jobs);
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
            // All formats for the oldest architecture, and each again for some other; all for all when asked.
            let some = i > 0 && !machine::everything();
            let (first, step) = if some { (i - 1, GPUS.len() - 1) } else { (0, 1) };
            for w in products::formats(a, k).into_iter().skip(first).step_by(step) {
                jobs.push((skinny(&products::spec(4096, k, w, a, false), 1, &target.gpu), *target));
            }
            let w = products::formats(a, k)[0];
            for m in [8, 16, 32, 64].into_iter().filter(|m| machine::everything() || m % 48 == 16) {
                jobs.push((skinny(&products::spec(4096, k, w, a, false), m, &target.gpu), *target));
            }
            jobs.push((skinny(&products::spec(14336, k, w, a, true), 8, &target.gpu), *target));
        }
    }
    check("skinny_products", &jobs);
}

/// Products of groups of warps, where groups multiply: some of each format, all cuts when asked.
#[test]
fn group_products() {
    let target = GPUS.iter().find(|t| t.gpu.arch == "sm_90a").unwrap();
    let mut jobs = vec![];
    for (i, format) in groups::FORMATS.into_iter().enumerate() {
        for (m, gated, n) in [(4096, false, 4096), (4096, true, 14336), (64, false, 4096)] {
            let spec = groups::spec(n, 4096, format, gated);
            let tile = GroupTile::of(&spec, m, &target.gpu).unwrap();
            let mut cuts = vec![tile];
            if machine::everything() {
                let most = if gated && tile.apart { 64 } else { 128 };
                cuts.extend([64, most].map(|columns| GroupTile { columns, stages: 3, ..tile }));
            }
            if i < 5 || machine::everything() {
                jobs.extend(
                    cuts.into_iter().map(|cut| (group::build("group", &spec, cut).unwrap(), *target)),
                );
            }
        }
    }
    check("group_products", &jobs);
    let mut jobs = vec![];
    for a in [AFmt::Bf16, AFmt::I8Token] {
        let list = products::formats(a, 4096);
        for (i, w) in list.into_iter().enumerate().filter(|(i, _)| machine::everything() || i % 3 == 0) {
            let spec = products::spec(4096, 4096, w, a, false);
            let tile = MixedTile::of(&spec, if i % 2 == 0 { 4096 } else { 64 }, &target.gpu).unwrap();
            // Zero points for groups of columns have no such kernel.
            let Ok(kernel) = mixed::build("mixed", &spec, tile) else { continue };
            jobs.push((kernel, *target));
            if i % 6 == 0 {
                let spec = products::spec(14336, 4096, w, a, true);
                let tile = MixedTile::of(&spec, 4096, &target.gpu).unwrap();
                jobs.push((mixed::build("mixed_gated", &spec, tile).unwrap(), *target));
            }
        }
    }
    check("group_products", &jobs);
    let mut jobs = vec![];
    for (i, kind) in [GroupKind::Bf16, GroupKind::S8, GroupKind::E4m3].into_iter().enumerate() {
        let scales = [Scales::None, Scales::Rows, Scales::Blocks][i];
        let from = From::Floats { ty: MemTy::F32, stride: 4096, scales, sums: i == 1 };
        let same = From::Same { stride: if i == 0 { 8256 } else { 4160 } };
        for from in [from, same] {
            let spec = RowTilesSpec { k: 4096, rows: Rows::T, kind, from, span: 0 };
            jobs.push((tile_rows::build("tiles", &spec).unwrap(), *target));
        }
    }
    check("group_products", &jobs);
}

#[test]
fn wide_products() {
    let k = 4096;
    let mut jobs = vec![];
    for (i, target) in GPUS.iter().enumerate() {
        for a in [AFmt::Bf16, AFmt::I8Token] {
            // Some formats for each architecture: every fourth, from another one on.
            let list = products::formats(a, k);
            let (first, step) = if machine::everything() { (0, 1) } else { (i, 4) };
            // And the one that takes most registers.
            let most = list.iter().find(|w| w.zero == Zero::Asym && w.group == 32);
            for w in list.iter().skip(first).step_by(step).chain(most) {
                let spec = products::spec(4096, k, *w, a, false);
                let kernel = wide::build("wide", &spec, WideTile::of(&spec, &target.gpu).unwrap()).unwrap();
                jobs.push((kernel, *target));
            }
            let spec = products::spec(14336, k, list[0], a, true);
            let kernel = wide::build("wide_gated", &spec, WideTile::of(&spec, &target.gpu).unwrap()).unwrap();
            jobs.push((kernel, *target));
        }
    }
    check("wide_products", &jobs);
}
