//! What texts begin with: types, and helpers of a line or a few of inline PTX.

/// Helpers that texts may use: name, definition. Written before the kernel in this order, those it uses.
pub(super) const HELPERS: &[(&str, &str)] = &[
    ("ld1", "DEVICE u32 ld1(const u8* p) { return *p; }"),
    ("ld2", "DEVICE u32 ld2(const u8* p) { return *(const u16*)p; }"),
    ("ld4", "DEVICE u32 ld4(const u8* p) { return *(const u32*)p; }"),
    ("ld8", "DEVICE v2 ld8(const u8* p) { return *(const v2*)p; }"),
    ("ld16", "DEVICE v4 ld16(const u8* p) { return *(const v4*)p; }"),
    ("st1", "DEVICE void st1(u8* p, u32 a) { *p = (u8)a; }"),
    ("st2", "DEVICE void st2(u8* p, u32 a) { *(u16*)p = (u16)a; }"),
    ("st4", "DEVICE void st4(u8* p, u32 a) { *(u32*)p = a; }"),
    ("st8", "DEVICE void st8(u8* p, u32 a, u32 b) { *(v2*)p = v2{a, b}; }"),
    ("st16", "DEVICE void st16(u8* p, u32 a, u32 b, u32 c, u32 d) { *(v4*)p = v4{a, b, c, d}; }"),
    (
        "shared_address",
        "DEVICE u32 shared_address(const u8* p) {\n  u32 a;\n  asm(\"{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }\" : \"=r\"(a) : \"l\"(p));\n  return a;\n}",
    ),
    (
        "cp_async_4",
        "DEVICE void cp_async_4(u32 to, const u8* from, u32 valid) {\n  asm volatile(\"cp.async.ca.shared.global [%0], [%1], 4, %2;\" :: \"r\"(to), \"l\"(from), \"r\"(valid) : \"memory\");\n}",
    ),
    (
        "cp_async_8",
        "DEVICE void cp_async_8(u32 to, const u8* from, u32 valid) {\n  asm volatile(\"cp.async.ca.shared.global [%0], [%1], 8, %2;\" :: \"r\"(to), \"l\"(from), \"r\"(valid) : \"memory\");\n}",
    ),
    (
        "cp_async_16",
        "DEVICE void cp_async_16(u32 to, const u8* from, u32 valid) {\n  asm volatile(\"cp.async.cg.shared.global [%0], [%1], 16, %2;\" :: \"r\"(to), \"l\"(from), \"r\"(valid) : \"memory\");\n}",
    ),
    ("cp_commit", "DEVICE void cp_commit() { asm volatile(\"cp.async.commit_group;\" ::: \"memory\"); }"),
    (
        "cp_wait",
        "template <int N> DEVICE void cp_wait() { asm volatile(\"cp.async.wait_group %0;\" :: \"n\"(N) : \"memory\"); }",
    ),
    (
        "mma_bf16",
        "DEVICE void mma_bf16(f32& d0, f32& d1, f32& d2, f32& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {\n  asm(\"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\"\n      : \"+f\"(d0), \"+f\"(d1), \"+f\"(d2), \"+f\"(d3) : \"r\"(a0), \"r\"(a1), \"r\"(a2), \"r\"(a3), \"r\"(b0), \"r\"(b1));\n}",
    ),
    (
        "mma_s8",
        "DEVICE void mma_s8(u32& d0, u32& d1, u32& d2, u32& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {\n  asm(\"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\"\n      : \"+r\"(d0), \"+r\"(d1), \"+r\"(d2), \"+r\"(d3) : \"r\"(a0), \"r\"(a1), \"r\"(a2), \"r\"(a3), \"r\"(b0), \"r\"(b1));\n}",
    ),
    (
        "half_to_float",
        "DEVICE f32 half_to_float(u32 h) {\n  f32 x;\n  asm(\"{ .reg .b16 t; cvt.u16.u32 t, %1; cvt.f32.f16 %0, t; }\" : \"=f\"(x) : \"r\"(h));\n  return x;\n}",
    ),
    (
        "float_to_half",
        "DEVICE u32 float_to_half(f32 x) {\n  u32 h;\n  asm(\"{ .reg .b16 t; cvt.rn.f16.f32 t, %1; cvt.u32.u16 %0, t; }\" : \"=r\"(h) : \"f\"(x));\n  return h;\n}",
    ),
    (
        "pack_bf16",
        "DEVICE u32 pack_bf16(f32 low, f32 high) {\n  u32 p;\n  asm(\"cvt.rn.bf16x2.f32 %0, %2, %1;\" : \"=r\"(p) : \"f\"(low), \"f\"(high));\n  return p;\n}",
    ),
    (
        "bf16_fma2",
        "DEVICE u32 bf16_fma2(u32 a, u32 b, u32 c) {\n  u32 d;\n  asm(\"fma.rn.bf16x2 %0, %1, %2, %3;\" : \"=r\"(d) : \"r\"(a), \"r\"(b), \"r\"(c));\n  return d;\n}",
    ),
    (
        "round_even",
        "DEVICE f32 round_even(f32 x) {\n  f32 r;\n  asm(\"cvt.rni.f32.f32 %0, %1;\" : \"=f\"(r) : \"f\"(x));\n  return r;\n}",
    ),
    (
        "to_int",
        "DEVICE u32 to_int(f32 x) {\n  u32 r;\n  asm(\"cvt.rni.s32.f32 %0, %1;\" : \"=r\"(r) : \"f\"(x));\n  return r;\n}",
    ),
    (
        "to_byte",
        "DEVICE u32 to_byte(f32 x) {\n  u32 r;\n  asm(\"cvt.rni.s8.f32 %0, %1;\" : \"=r\"(r) : \"f\"(x));\n  return r;\n}",
    ),
    (
        "divide",
        "DEVICE f32 divide(f32 a, f32 b) {\n  f32 q;\n  asm(\"div.rn.f32 %0, %1, %2;\" : \"=f\"(q) : \"f\"(a), \"f\"(b));\n  return q;\n}",
    ),
    (
        "square_root",
        "DEVICE f32 square_root(f32 a) {\n  f32 r;\n  asm(\"sqrt.rn.f32 %0, %1;\" : \"=f\"(r) : \"f\"(a));\n  return r;\n}",
    ),
    (
        "exp2",
        "DEVICE f32 exp2(f32 a) {\n  f32 r;\n  asm(\"ex2.approx.ftz.f32 %0, %1;\" : \"=f\"(r) : \"f\"(a));\n  return r;\n}",
    ),
    (
        "log2",
        "DEVICE f32 log2(f32 a) {\n  f32 r;\n  asm(\"lg2.approx.f32 %0, %1;\" : \"=f\"(r) : \"f\"(a));\n  return r;\n}",
    ),
    (
        "larger",
        "DEVICE f32 larger(f32 a, f32 b) {\n  f32 r;\n  asm(\"max.f32 %0, %1, %2;\" : \"=f\"(r) : \"f\"(a), \"f\"(b));\n  return r;\n}",
    ),
    (
        "fma",
        "DEVICE f32 fma(f32 a, f32 b, f32 c) {\n  f32 d;\n  asm(\"fma.rn.f32 %0, %1, %2, %3;\" : \"=f\"(d) : \"f\"(a), \"f\"(b), \"f\"(c));\n  return d;\n}",
    ),
    (
        "copysign",
        "DEVICE f32 copysign(f32 size, f32 sign) { return from_bits(bits(size) & 0x7fffffffu | bits(sign) & 0x80000000u); }",
    ),
    ("absolute", "DEVICE f32 absolute(f32 x) { return from_bits(bits(x) & 0x7fffffffu); }"),
    (
        "shuffle_xor",
        "DEVICE u32 shuffle_xor(u32 x, u32 mask) {\n  u32 y;\n  asm volatile(\"shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;\" : \"=r\"(y) : \"r\"(x), \"r\"(mask));\n  return y;\n}",
    ),
    ("barrier", "DEVICE void barrier() { asm volatile(\"bar.sync 0;\" ::: \"memory\"); }"),
    (
        "last_of",
        "DEVICE bool last_of(u8* counter, u32 count) {\n  u32 last = 0;\n  asm volatile(\"bar.sync 0;\" ::: \"memory\");\n  if (threadIdx.x == 0) {\n    u32 before;\n    asm volatile(\"fence.acq_rel.gpu;\" ::: \"memory\");\n    asm volatile(\"atom.relaxed.gpu.global.add.u32 %0, [%1], 1;\" : \"=r\"(before) : \"l\"(counter) : \"memory\");\n    asm volatile(\"fence.acq_rel.gpu;\" ::: \"memory\");\n    last = before == count - 1;\n    if (last) *(u32*)counter = 0;\n  }\n  u32 any;\n  asm volatile(\"{ .reg .pred p, q; setp.ne.u32 p, %1, 0; bar.red.or.pred q, 0, p; selp.u32 %0, 1, 0, q; }\" : \"=r\"(any) : \"r\"(last) : \"memory\");\n  return any != 0;\n}",
    ),
    (
        "bar_init",
        "DEVICE void bar_init(u32 at, u32 count) { asm volatile(\"mbarrier.init.shared.b64 [%0], %1;\" :: \"r\"(at), \"r\"(count) : \"memory\"); }",
    ),
    (
        "bar_fence",
        "DEVICE void bar_fence() { asm volatile(\"fence.mbarrier_init.release.cluster;\" ::: \"memory\"); }",
    ),
    (
        "bar_expect",
        "DEVICE void bar_expect(u32 at, u32 bytes) { asm volatile(\"mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\" :: \"r\"(at), \"r\"(bytes) : \"memory\"); }",
    ),
    (
        "bar_arrive",
        "DEVICE void bar_arrive(u32 at) { asm volatile(\"mbarrier.arrive.shared.b64 _, [%0];\" :: \"r\"(at) : \"memory\"); }",
    ),
    (
        "bar_wait",
        "DEVICE void bar_wait(u32 at, u32 parity) {\n  u32 over;\n  do {\n    asm volatile(\"{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }\" : \"=r\"(over) : \"r\"(at), \"r\"(parity) : \"memory\");\n  } while (!over);\n}",
    ),
    (
        "bulk_copy",
        "DEVICE void bulk_copy(u32 to, const u8* from, u32 bytes, u32 barrier) {\n  asm volatile(\"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\" :: \"r\"(to), \"l\"(from), \"r\"(bytes), \"r\"(barrier) : \"memory\");\n}",
    ),
    (
        "proxy_fence",
        "DEVICE void proxy_fence() { asm volatile(\"fence.proxy.async.shared::cta;\" ::: \"memory\"); }",
    ),
    (
        "more_registers",
        "template <int N> DEVICE void more_registers() { asm volatile(\"setmaxnreg.inc.sync.aligned.u32 %0;\" :: \"n\"(N)); }",
    ),
    (
        "fewer_registers",
        "template <int N> DEVICE void fewer_registers() { asm volatile(\"setmaxnreg.dec.sync.aligned.u32 %0;\" :: \"n\"(N)); }",
    ),
    (
        "group_fence",
        "DEVICE void group_fence() { asm volatile(\"wgmma.fence.sync.aligned;\" ::: \"memory\"); }",
    ),
    (
        "group_commit",
        "DEVICE void group_commit() { asm volatile(\"wgmma.commit_group.sync.aligned;\" ::: \"memory\"); }",
    ),
    (
        "group_wait",
        "template <int N> DEVICE void group_wait() { asm volatile(\"wgmma.wait_group.sync.aligned %0;\" :: \"n\"(N) : \"memory\"); }",
    ),
    ("keep", "DEVICE void keep(f32& x) { asm volatile(\"\" : \"+f\"(x) :: \"memory\"); }"),
    ("keep_word", "DEVICE void keep_word(u32& x) { asm volatile(\"\" : \"+r\"(x) :: \"memory\"); }"),
    (
        // Rows of 128 bytes in groups of eight, 1024 bytes apart, swizzled by the row's number.
        "descriptor",
        "DEVICE u64 descriptor(u32 at) { return (u64)((at & 0x3ffffu) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }",
    ),
    ("sync_warp", "DEVICE void sync_warp() { asm volatile(\"bar.warp.sync 0xffffffff;\" ::: \"memory\"); }"),
];

/// What every text begins with.
pub(super) const TYPES: &str = "typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;
struct alignas(8) v2 { u32 x, y; };
struct alignas(16) v4 { u32 x, y, z, w; };
#define DEVICE static __device__ __forceinline__
DEVICE f32 from_bits(u32 x) { f32 y; asm(\"mov.b32 %0, %1;\" : \"=f\"(y) : \"r\"(x)); return y; }
DEVICE u32 bits(f32 x) { u32 y; asm(\"mov.b32 %0, %1;\" : \"=r\"(y) : \"f\"(x)); return y; }
";
