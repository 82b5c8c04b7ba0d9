//! The kernels that are checked, and the shapes that are timed.

use quantc_codegen::cpu::attention::{AttentionSpec, KvSource};
use quantc_codegen::cpu::cache::{CacheAppendSpec, CacheTy, Role};
use quantc_codegen::cpu::gather::GatherSpec;
use quantc_codegen::cpu::rope::{RopeSpec, RopeStyle, RopeTableSpec};
use quantc_codegen::cpu::row::RowSpec;
use quantc_codegen::cuda::plan::Want;
use quantc_codegen::eexpr::{EExpr, F32, MemTy, UnaryOp};
use quantc_codegen::spec::{AFmt, Code, KernelSpec, MRange, MatmulSpec, Rows, ScaleTy, WFmt, Zero};

/// Rows of a slot in caches of the table.
pub const SLOT_ROWS: u32 = 1024;

/// Weight formats by name, with what they meet. A group of 0 is a whole row.
pub const FORMATS: [(&str, Code, u32, Zero, ScaleTy, AFmt); 9] = [
    ("w4a16-g128", Code::U4, 128, Zero::Sym(8), ScaleTy::Bf16, AFmt::Bf16),
    ("w4a16-g32", Code::U4, 32, Zero::Sym(8), ScaleTy::Bf16, AFmt::Bf16),
    ("w4a16-g64-zero", Code::U4, 64, Zero::Asym, ScaleTy::F32, AFmt::Bf16),
    ("w8a16", Code::U8, 0, Zero::Sym(128), ScaleTy::F32, AFmt::Bf16),
    ("fp8", Code::E4m3, 0, Zero::Sym(0), ScaleTy::F32, AFmt::Bf16),
    ("e2m1-g32", Code::Lut4, 32, Zero::Sym(0), ScaleTy::F32, AFmt::Bf16),
    ("bf16", Code::Bf16, 0, Zero::Sym(0), ScaleTy::None, AFmt::Bf16),
    ("w4a8-g128", Code::U4, 128, Zero::Sym(8), ScaleTy::Bf16, AFmt::I8Token),
    ("w8a8", Code::U8, 0, Zero::Sym(128), ScaleTy::F32, AFmt::I8Token),
];

fn product(format: usize, n: u32, k: u32, m: MRange) -> KernelSpec {
    let (_, code, group, zero, scale, a) = FORMATS[format];
    let group = if group == 0 { k } else { group };
    let w = WFmt { code, group, zero, scale };
    KernelSpec::Matmul(MatmulSpec { n, k, m, rows: Rows::T, w, a, epilogue: EExpr::store_acc(MemTy::F32, n) })
}

fn up_to(max: u32) -> MRange {
    MRange { min: 1, max }
}

/// Every template with formats and shapes that are odd where they may be.
pub fn kernels(small: bool) -> Vec<Want> {
    let mut wants = vec![];
    let mut want = |spec: KernelSpec, tokens: MRange| wants.push(Want { spec, tokens });
    let formats = if small { 2 } else { FORMATS.len() };
    for format in 0..formats {
        for max in [8, 64, 256] {
            want(product(format, 83, 384, up_to(max)), up_to(max));
        }
    }
    let rows = [
        RowSpec::rms_norm(1000, 1e-5, MemTy::F32, MemTy::F32, MemTy::Bf16),
        RowSpec::rms_norm_quantize(4096, 1e-5, MemTy::F32, MemTy::F32, Some(128)),
        RowSpec::layer_norm(77, 1e-5, MemTy::F32, MemTy::F32, Some(MemTy::F32), MemTy::F32),
        RowSpec::quantize_token(384, MemTy::F32, Some(32)),
        RowSpec::unary(UnaryOp::GeluErf, 130, MemTy::F32, MemTy::F32),
        RowSpec::round_e4m3_token(96, MemTy::F32, MemTy::F32),
    ];
    for row in rows.into_iter().take(if small { 2 } else { 6 }) {
        want(KernelSpec::Row(row), up_to(256));
    }
    want(KernelSpec::RopeTable(RopeTableSpec { half: 32, factor: F32::new(1.0) }), up_to(256));
    want(KernelSpec::Rope(RopeSpec::new(5, 64, RopeStyle::Half)), up_to(256));
    want(KernelSpec::Rope(RopeSpec::new(3, 24, RopeStyle::Interleaved)), up_to(256));
    let gather = GatherSpec { width: 130, table_rows: 77, ty: MemTy::Bf16, add: false };
    want(KernelSpec::Gather(gather), up_to(256));
    let caches = [CacheTy::Bf16, CacheTy::I8, CacheTy::E4m3, CacheTy::F32];
    for ty in caches.into_iter().take(if small { 1 } else { 4 }) {
        for role in [Role::Keys, Role::Values] {
            let (heads, head_dim) = (2, 64);
            let spec = CacheAppendSpec {
                heads,
                head_dim,
                x_stride: heads * head_dim,
                ty,
                role,
                fixed_scales: false,
                slot_rows: SLOT_ROWS,
            };
            want(KernelSpec::CacheAppend(spec), up_to(256));
        }
        for max in [1, 8, 256] {
            let spec = AttentionSpec::cached(8, 2, 64, 0.125, ty, SLOT_ROWS);
            want(KernelSpec::Attention(spec), up_to(max));
        }
    }
    let windowed = AttentionSpec {
        window: Some(37),
        ..AttentionSpec::cached(3, 1, 128, 0.09, CacheTy::Bf16, SLOT_ROWS)
    };
    want(KernelSpec::Attention(windowed), up_to(8));
    let direct = AttentionSpec {
        source: KvSource::Direct { stride: 128 },
        ..AttentionSpec::direct(4, 2, 64, 0.125, false)
    };
    want(KernelSpec::Attention(direct), up_to(256));
    wants
}

/// A product that is timed.
pub struct Shape {
    pub model: &'static str,
    pub name: &'static str,
    pub format: &'static str,
    pub want: Want,
    /// Rows of the call.
    pub m: u32,
}

/// Matrices of Llama 3, 8B and 70B, by calls of 1 to 4096 tokens.
pub fn shapes(small: bool) -> Vec<Shape> {
    let matrices = [
        ("8B", "qkv", 6144, 4096),
        ("8B", "o", 4096, 4096),
        ("8B", "gate, up", 14336, 4096),
        ("8B", "down", 4096, 14336),
        ("70B", "qkv", 10240, 8192),
        ("70B", "o", 8192, 8192),
        ("70B", "gate, up", 28672, 8192),
        ("70B", "down", 8192, 28672),
    ];
    let calls = [(1, 8), (8, 8), (16, 16), (32, 32), (64, 64), (512, 4096), (4096, 4096)];
    let mut shapes = vec![];
    for (model, name, n, k) in matrices.into_iter().take(if small { 1 } else { 8 }) {
        for format in [0, 3, 4, 6, 7, 8].into_iter().take(if small { 1 } else { 6 }) {
            for (m, class) in calls.into_iter().take(if small { 1 } else { 7 }) {
                let want = Want { spec: product(format, n, k, up_to(class)), tokens: up_to(class) };
                shapes.push(Shape { model, name, format: FORMATS[format].0, want, m });
            }
        }
    }
    shapes
}
