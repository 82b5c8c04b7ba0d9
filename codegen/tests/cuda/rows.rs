//! Kernels over rows against expressions run in f64, and to the bit against those run in f32 where no sum is involved.

use crate::support::{Near, compare, numbers, run};
use quantc_codegen::cpu::row::{RowOffset, RowSpec};
use quantc_codegen::cuda::row::{RowTile, build};
use quantc_codegen::eexpr::interp::{self, Mode, Rows};
use quantc_codegen::eexpr::{BinaryOp, EExpr, InputKind, MemTy, Node, OutputKind, ReduceOp, UnaryOp};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Runs a kernel for `t` tokens and `r` results and compares all it writes.
fn check(spec: &RowSpec, tile: RowTile, t: u32, r: u32, rng: &mut ChaCha8Rng) {
    let what = format!("{} of {} columns, {tile:?}, t {t} r {r}", spec.name, spec.cols);
    let kernel = build("kernel", spec, tile).unwrap();
    let rows = spec.rows.rows(t.into(), r.into()) as usize;
    let skipped = match spec.row_offset {
        RowOffset::None => 0,
        RowOffset::LastRows => ((t - r) * spec.rows.per) as usize,
    };
    let (mut buffers, mut inputs) = (vec![], vec![]);
    for desc in &spec.body.inputs {
        let (per_row, count) = match desc.kind {
            InputKind::Elem { stride } => (stride as usize, (rows + skipped) * stride as usize),
            InputKind::Col => (0, spec.cols as usize),
            InputKind::Row => (1, rows + skipped),
            InputKind::One => (0, 1),
        };
        let (bytes, mut values) = numbers(desc.ty, count, rng);
        buffers.push(bytes);
        inputs.push(values.split_off(per_row * skipped));
    }
    for desc in &spec.body.outputs {
        let per_row = match desc.kind {
            OutputKind::Elem { stride, .. } | OutputKind::GroupSums { stride, .. } => stride as usize,
            OutputKind::Row => 1,
        };
        buffers.push(vec![0; rows * per_row * desc.ty.bytes()]);
    }
    let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let on = Rows { rows, cols: spec.cols as usize, inputs: &inputs, acc: None };
    let sums = spec.body.nodes.iter().any(|n| matches!(n, Node::Reduce(ReduceOp::Sum, _)));
    let mode = if sums { Mode::F64 } else { Mode::F32 { fused: true } };
    let want = interp::run(&spec.body, mode, on).unwrap();
    let got = run(&kernel, &buffers, &[t, r]);
    for (i, (desc, want)) in spec.body.outputs.iter().zip(&want).enumerate() {
        let near = match (sums, desc.ty) {
            (false, _) => Near { relative: 0.0, absolute: 0.0 },
            (true, MemTy::F32) => Near { relative: 2e-5, absolute: 2e-6 },
            (true, MemTy::F16) => Near { relative: 1e-3, absolute: 1e-6 },
            (true, MemTy::Bf16) => Near { relative: 4e-3, absolute: 1e-6 },
            // A number between two codes may go to either.
            (true, MemTy::I8) => Near { relative: 0.0, absolute: 1.0 },
            (true, MemTy::I32) => Near { relative: 0.0, absolute: 2.0 },
        };
        let buffer = &got.buffers[spec.body.inputs.len() + i];
        compare(&format!("{what}, output {i}"), desc.ty, buffer, want, near);
    }
}

/// Specs of a width, of all kinds of bodies and types.
pub fn specs(cols: u32) -> Vec<RowSpec> {
    use MemTy::{Bf16, F16, F32};
    let mut rows = EExpr::new();
    let x = rows.elem_input(Bf16, cols);
    let bias = rows.row_input(F32);
    let y = rows.add(x, bias);
    rows.store(y, F16, cols + 3);
    vec![
        RowSpec::rms_norm(cols, 1e-5, F32, F32, F32),
        RowSpec::rms_norm(cols, 1e-5, Bf16, Bf16, Bf16),
        RowSpec::layer_norm(cols, 1e-5, F32, F32, Some(F16), Bf16),
        RowSpec::softmax(cols, F32, F32),
        RowSpec::binary(BinaryOp::Add, cols, F32, Bf16, F32),
        RowSpec::unary(UnaryOp::GeluErf, cols, F16, F16),
        RowSpec::unary(UnaryOp::GeluTanh, cols, F32, F32),
        RowSpec::unary(UnaryOp::Tanh, cols, F32, F32),
        RowSpec::gated(UnaryOp::Silu, cols, Bf16, Bf16),
        RowSpec::gated_pair(UnaryOp::Silu, cols, F32, F32),
        RowSpec::copy_last_rows(cols, F32, Bf16),
        RowSpec::quantize_token(cols, F32, None),
        RowSpec::quantize_token(cols, Bf16, Some(cols)),
        RowSpec::quantize_static(cols, F32, None),
        RowSpec::round_e4m3_token(cols, F32, F32),
        RowSpec::rms_norm_quantize(cols, 1e-5, F32, F32, None),
        RowSpec::new("row_bias", cols, rows),
    ]
}

#[test]
fn all_bodies_on_odd_widths() {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for cols in [1, 7, 66, 128, 300] {
        for spec in specs(cols) {
            let (t, r) = (rng.random_range(2..6), 2);
            check(&spec, RowTile::of(&spec), t, r, &mut rng);
        }
    }
}

#[test]
fn rows_of_many_warps_and_long_ones() {
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    for cols in [1024, 2050, 4097] {
        for spec in specs(cols).into_iter().step_by(3) {
            check(&spec, RowTile::of(&spec), 2, 1, &mut rng);
        }
    }
    // Too long for registers: the row is read again in each pass.
    let spec = RowSpec::rms_norm_quantize(3000, 1e-5, MemTy::F32, MemTy::Bf16, None);
    check(&spec, RowTile { warps_per_row: 1, rows: 4, width: 4 }, 5, 1, &mut rng);
}

#[test]
fn sums_of_groups() {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    for (cols, group) in [(256, 128), (96, 32), (320, 64), (300, 128), (72, 16)] {
        let spec = RowSpec::quantize_token(cols, MemTy::F32, Some(group));
        check(&spec, RowTile::of(&spec), 3, 3, &mut rng);
    }
    let spec = RowSpec::quantize_token(96, MemTy::F32, Some(48));
    let refusal = build("kernel", &spec, RowTile::of(&spec)).unwrap_err();
    assert!(refusal.to_string().contains("groups of 48 columns"), "{refusal}");
}

#[test]
fn rows_of_heads() {
    let mut rng = ChaCha8Rng::seed_from_u64(14);
    let spec = RowSpec::rms_norm(64, 1e-6, MemTy::F32, MemTy::F32, MemTy::F32)
        .with_rows(quantc_codegen::cpu::row::RowCount::per_token(3));
    check(&spec, RowTile::of(&spec), 3, 3, &mut rng);
}
