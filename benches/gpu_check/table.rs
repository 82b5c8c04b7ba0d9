//! The kernels that are checked and timed.

use crate::kernel::Asked;
use crate::{attention, ceilings, products, rows};
use quantc::ir::target::GpuDesc;
use quantc_codegen::cpu::attention::{AttentionSpec, KvSource};
use quantc_codegen::cpu::cache::{CacheAppendSpec, CacheTy, Role};
use quantc_codegen::cpu::gather::GatherSpec;
use quantc_codegen::cpu::rope::{RopeSpec, RopeStyle, RopeTableSpec};
use quantc_codegen::cpu::row::RowSpec;
use quantc_codegen::cuda::attention::AttentionCall;
use quantc_codegen::cuda::cache::{AppendSpec, Rotation};
use quantc_codegen::cuda::group::{GroupSpec, Scales};
use quantc_codegen::cuda::mixed::MixedTile;
use quantc_codegen::cuda::sample::SampleSpec;
use quantc_codegen::cuda::tile::GroupKind;
use quantc_codegen::cuda::tiles::rows::{From, RowTilesSpec};
use quantc_codegen::eexpr::{EExpr, F32, MemTy, UnaryOp};
use quantc_codegen::spec::{AFmt, Code, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero};

/// Rows of a slot in caches of the table.
pub const SLOT_ROWS: u32 = 1024;

/// A format of weights, with what it meets. A group of 0 is a whole row.
#[derive(Clone, Copy)]
pub struct Format {
    /// Its name in the report.
    pub name: &'static str,
    code: Code,
    group: u32,
    zero: Zero,
    scale: ScaleTy,
    /// The rows that it meets.
    pub a: AFmt,
}

const fn format(name: &'static str, code: Code, group: u32, zero: Zero, scale: ScaleTy, a: AFmt) -> Format {
    Format { name, code, group, zero, scale, a }
}

/// Formats of weights.
pub const FORMATS: [Format; 9] = [
    format("w4a16-g128", Code::U4, 128, Zero::Sym(8), ScaleTy::Bf16, AFmt::Bf16),
    format("bf16", Code::Bf16, 0, Zero::Sym(0), ScaleTy::None, AFmt::Bf16),
    format("w8a16", Code::U8, 0, Zero::Sym(128), ScaleTy::F32, AFmt::Bf16),
    format("fp8", Code::E4m3, 0, Zero::Sym(0), ScaleTy::F32, AFmt::Bf16),
    format("w4a8-g128", Code::U4, 128, Zero::Sym(8), ScaleTy::Bf16, AFmt::I8Token),
    format("w8a8", Code::U8, 0, Zero::Sym(128), ScaleTy::F32, AFmt::I8Token),
    format("w4a16-g32", Code::U4, 32, Zero::Sym(8), ScaleTy::Bf16, AFmt::Bf16),
    format("w4a16-g64-zero", Code::U4, 64, Zero::Asym, ScaleTy::F32, AFmt::Bf16),
    format("e2m1-g32", Code::Lut4, 32, Zero::Sym(0), ScaleTy::F32, AFmt::Bf16),
];

/// Calls of up to so many rows.
pub fn up_to(max: u32) -> MRange {
    MRange { min: 1, max }
}

/// A product that stores its sums.
pub fn product(format: &Format, n: u32, k: u32, rows: u32) -> MatmulSpec {
    let Format { code, group, zero, scale, a, .. } = *format;
    let w = WFmt { code, group: if group == 0 { k } else { group.min(k) }, zero, scale };
    MatmulSpec { n, k, m: up_to(rows), rows: Rows::T, w, a, epilogue: EExpr::store_acc(MemTy::F32, n) }
}

/// Silu of the first product times the second, with a bias and a residual, into rows that are longer than they.
fn gated(n: u32) -> EExpr {
    let mut e = EExpr::new();
    let first = e.acc();
    let mut other = EExpr::new();
    let up = other.acc();
    other.store(up, MemTy::F32, n);
    let gate = e.unary(UnaryOp::Silu, first);
    let mut v = gate;
    if let Some(up) = e.absorb(&other, 1) {
        v = e.mul(gate, up);
    }
    let bias = e.col_input(MemTy::F32);
    let residual = e.elem_input(MemTy::Bf16, n);
    v = e.add(v, bias);
    v = e.add(v, residual);
    e.store(v, MemTy::F32, n + 4);
    e
}

/// What groups of warps multiply, and how it is scaled.
const GROUPS: [(GroupKind, Scales, bool); 6] = [
    (GroupKind::Bf16, Scales::None, false),
    (GroupKind::E4m3, Scales::Rows, false),
    (GroupKind::S8, Scales::Rows, false),
    (GroupKind::S8, Scales::Rows, true),
    (GroupKind::E4m3, Scales::Blocks, false),
    (GroupKind::S8, Scales::Blocks, false),
];

fn group((kind, scales, zeros): (GroupKind, Scales, bool), n: u32, k: u32, epilogue: EExpr) -> Asked {
    Asked::Group { spec: GroupSpec { n, k, rows: Rows::T, kind, scales, zeros, epilogue }, rows: 256 }
}

fn row_specs() -> Vec<RowSpec> {
    use MemTy::{Bf16, F16, F32};
    vec![
        RowSpec::rms_norm(1000, 1e-5, F32, F32, Bf16),
        RowSpec::rms_norm_quantize(4096, 1e-5, F32, F32, Some(128)),
        RowSpec::rms_norm(130, 1e-5, F32, F32, Bf16).last_rows(),
        RowSpec::layer_norm(77, 1e-5, F32, F32, Some(F32), F32),
        RowSpec::quantize_token(384, F32, Some(32)),
        RowSpec::unary(UnaryOp::GeluErf, 130, F32, F32),
        RowSpec::round_e4m3_token(96, F32, F32),
        RowSpec::softmax(333, F32, F32),
        RowSpec::gated(UnaryOp::Silu, 66, Bf16, Bf16),
        RowSpec::unary(UnaryOp::GeluTanh, 128, F16, F16),
    ]
}

fn tile_specs() -> Vec<RowTilesSpec> {
    let floats = |kind, ty, scales, sums| RowTilesSpec {
        k: 200,
        rows: Rows::T,
        kind,
        from: From::Floats { ty, stride: 203, scales, sums },
        span: 0,
    };
    vec![
        floats(GroupKind::Bf16, MemTy::F32, Scales::None, false),
        floats(GroupKind::S8, MemTy::Bf16, Scales::Rows, true),
        floats(GroupKind::E4m3, MemTy::F32, Scales::Rows, false),
        floats(GroupKind::E4m3, MemTy::Bf16, Scales::Blocks, false),
        floats(GroupKind::S8, MemTy::F32, Scales::Blocks, false),
    ]
}

fn append_spec(ty: CacheTy, role: Role) -> CacheAppendSpec {
    let (heads, head_dim) = (2, 64);
    CacheAppendSpec {
        heads,
        head_dim,
        x_stride: heads * head_dim + 8,
        ty,
        role,
        fixed_scales: false,
        slot_rows: SLOT_ROWS,
    }
}

/// Attention over a cache, of up to so many tokens; by the template for many where there are more than 64.
fn cached(spec: AttentionSpec, rows: u32) -> Asked {
    let call = AttentionCall::plain(spec, true);
    if rows > 64 { Asked::Prefill(call) } else { Asked::Decode { call, rows, context: SLOT_ROWS } }
}

/// Every template with formats and shapes that are odd where they may be; a small table has each template once.
pub fn kernels(small: bool) -> Vec<Asked> {
    let mut list = vec![];
    let few = |some: usize, all: usize| if small { some } else { all };
    let (n, k) = if small { (40, 256) } else { (83, 384) };
    for format in FORMATS.iter().take(few(1, FORMATS.len())) {
        for rows in [8, 64].into_iter().take(few(1, 2)) {
            list.push(Asked::Skinny(product(format, n, k, rows)));
        }
        list.push(Asked::Wide(product(format, n, k, 256)));
        let mixed = product(format, n, k, 256);
        let has_sums = format.a == AFmt::I8Token && format.zero == Zero::Asym;
        if !has_sums {
            if let Ok(tiles) = MixedTile::tokens_spec(&mixed) {
                list.push(Asked::Tiles(tiles));
            }
            list.push(Asked::Mixed(mixed));
        }
    }
    // Of the rows that are wanted alone.
    let wanted = |spec| MatmulSpec { rows: Rows::R, ..spec };
    list.push(Asked::Skinny(wanted(product(&FORMATS[0], n, k, 8))));
    if !small {
        let mixed = wanted(product(&FORMATS[0], n, k, 256));
        list.extend(MixedTile::tokens_spec(&mixed).map(Asked::Tiles));
        list.extend([Asked::Wide(mixed.clone()), Asked::Mixed(mixed)]);
    }
    let two = MatmulSpec { epilogue: gated(n), ..product(&FORMATS[0], n, k, 8) };
    list.push(Asked::Skinny(two.clone()));
    if !small {
        list.push(Asked::Wide(MatmulSpec { m: up_to(256), ..two.clone() }));
        list.push(Asked::Mixed(MatmulSpec { m: up_to(256), ..two }));
    }
    for kind in GROUPS.into_iter().take(few(2, GROUPS.len())) {
        list.push(group(kind, n, k, EExpr::store_acc(MemTy::F32, n)));
        if !small {
            list.push(group(kind, 66, 512, gated(66)));
        }
    }
    list.extend(tile_specs().into_iter().take(few(2, 5)).map(Asked::Tiles));
    list.extend(row_specs().into_iter().take(few(3, 10)).map(Asked::Row));
    list.push(Asked::RopeTable(RopeTableSpec { half: 32, factor: F32::new(1.25) }));
    list.push(Asked::Rope(RopeSpec::new(5, 64, RopeStyle::Half)));
    list.push(Asked::Rope(RopeSpec::new(3, 24, RopeStyle::Interleaved)));
    list.push(Asked::Rope(RopeSpec { rows: Rows::R, ..RopeSpec::new(5, 64, RopeStyle::Half) }));
    for ty in [MemTy::Bf16, MemTy::I8].into_iter().take(few(1, 2)) {
        list.push(Asked::Gather(GatherSpec { width: 130, table_rows: 77, ty, add: false }));
    }
    for ty in [CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3].into_iter().take(few(1, 3)) {
        for role in [Role::Keys, Role::Values] {
            let append = |rotation| AppendSpec { rows: append_spec(ty, role), rotation, paged: true };
            list.push(Asked::Append(append(None)));
            if role == Role::Keys {
                list.push(Asked::Append(append(Some(Rotation { rotary_dim: 64, style: RopeStyle::Half }))));
            }
        }
        for (rows, of) in [(1, Rows::T), (8, Rows::T), (256, Rows::T), (8, Rows::R), (256, Rows::R)] {
            let all = AttentionSpec::cached(8, 2, 64, 0.125, ty, SLOT_ROWS);
            list.push(cached(AttentionSpec { rows: of, ..all }, rows));
        }
    }
    for ty in [CacheTy::F32, CacheTy::F16].into_iter().take(few(1, 2)) {
        list.extend([Role::Keys, Role::Values].map(|role| Asked::PlainAppend(append_spec(ty, role))));
        let all = AttentionSpec::cached(8, 2, 64, 0.125, ty, SLOT_ROWS);
        list.extend(
            [Rows::T, Rows::R].map(|rows| Asked::PlainAttention(AttentionSpec { rows, ..all.clone() })),
        );
    }
    let narrow = AttentionSpec::cached(3, 1, 128, 0.09, CacheTy::Bf16, SLOT_ROWS);
    list.push(cached(AttentionSpec { window: Some(37), ..narrow }, 8));
    let direct = AttentionSpec {
        source: KvSource::Direct { stride: 128 },
        ..AttentionSpec::direct(4, 2, 64, 0.125, false)
    };
    list.push(Asked::Prefill(AttentionCall::plain(direct, false)));
    list.push(Asked::Sample(SampleSpec { vocab: 4099, stride: 4104 }));
    list
}

/// Everything that a folder for a GPU has.
pub fn all(small: bool, gpu: &GpuDesc) -> Vec<Asked> {
    let mut list = kernels(small);
    if !small {
        // What the sanitizer looks at.
        list.extend(kernels(true));
    }
    list.extend(ceilings::kernels());
    list.extend(rows::kernels(small));
    list.extend(products::kernels_for(small, gpu));
    list.extend(attention::kernels(small));
    list
}
