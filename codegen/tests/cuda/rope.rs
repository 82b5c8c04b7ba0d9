//! Rotations against their definition in f64.

use crate::support::{Near, compare, numbers, run};
use quantc_codegen::cpu::rope::{RopeSpec, RopeStyle, RopeTableSpec};
use quantc_codegen::cuda::rope::{build, build_table};
use quantc_codegen::eexpr::{F32, MemTy};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[test]
fn tables() {
    let mut rng = ChaCha8Rng::seed_from_u64(21);
    for half in [1u32, 5, 64] {
        let kernel = build_table("table", &RopeTableSpec { half, factor: F32::new(1.25) }).unwrap();
        let mut positions: Vec<i32> = (0..40).map(|_| rng.random_range(0..1 << 20)).collect();
        positions.extend([0, 1, 1 << 20]);
        let frequencies: Vec<f32> = (0..half).map(|j| 10_000f32.powf(-(j as f32) / half as f32)).collect();
        let t = positions.len();
        let buffers = [
            positions.iter().flat_map(|p| p.to_le_bytes()).collect(),
            frequencies.iter().flat_map(|f| f.to_le_bytes()).collect(),
            vec![0; t * 2 * half as usize * 4],
        ];
        let mut want = vec![];
        for &p in &positions {
            let angles = frequencies.iter().map(|f| f64::from(p as f32 * f));
            want.extend(angles.clone().map(|a| 1.25 * a.cos()));
            want.extend(angles.map(|a| 1.25 * a.sin()));
        }
        let got = run(&kernel, &buffers, &[t as u32]);
        compare("table", MemTy::F32, &got.buffers[2], &want, Near { relative: 1e-7, absolute: 2.5e-7 });
    }
}

#[test]
fn heads() {
    let mut rng = ChaCha8Rng::seed_from_u64(22);
    for style in [RopeStyle::Half, RopeStyle::Interleaved] {
        for (heads, d, rotary, gap) in
            [(1, 2, 2, 0), (3, 8, 8, 4), (2, 64, 16, 0), (2, 37, 26, 5), (2, 128, 128, 0)]
        {
            let stride = heads * d + gap;
            let spec = RopeSpec {
                rotary_dim: rotary,
                x_stride: stride,
                out_stride: stride,
                ..RopeSpec::new(heads, d, style)
            };
            let kernel = build("rope", &spec).unwrap();
            let (t, half) = (7usize, rotary as usize / 2);
            let (x, xv) = numbers(MemTy::F32, t * stride as usize, &mut rng);
            let (table, angles) = numbers(MemTy::F32, t * 2 * half, &mut rng);
            let mut want = vec![f64::NAN; xv.len()];
            for i in 0..t {
                for h in 0..heads as usize {
                    let first = i * stride as usize + h * d as usize;
                    for j in 0..d as usize {
                        want[first + j] = xv[first + j].into();
                    }
                    for j in 0..half {
                        let (p, q) = match style {
                            RopeStyle::Half => (first + j, first + j + half),
                            RopeStyle::Interleaved => (first + 2 * j, first + 2 * j + 1),
                        };
                        let cos = f64::from(angles[i * 2 * half + j]);
                        let sin = f64::from(angles[i * 2 * half + half + j]);
                        let (u, v) = (f64::from(xv[p]), f64::from(xv[q]));
                        (want[p], want[q]) = (u * cos - v * sin, v * cos + u * sin);
                    }
                }
            }
            let bytes = xv.len() * 4;
            let got = run(&kernel, &[x, table, vec![0; bytes]], &[t as u32]);
            compare(
                &format!("{spec:?}"),
                MemTy::F32,
                &got.buffers[2],
                &want,
                Near { relative: 1e-6, absolute: 2e-6 },
            );
        }
    }
}
