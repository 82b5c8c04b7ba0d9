use super::*;
use crate::entity::PrimaryMap;
use crate::formats::{self, E2M1, E4M3, INT2, INT3, INT4, INT8, UINT4, UINT8};
use crate::scheme::Group;
use crate::ty::{Shape, TensorTy};
use crate::weights::{Store, WeightDecl, WeightSource};
use proptest::prelude::*;

fn symmetric(format: &'static Format, group: Group) -> Scheme {
    Scheme { format, group, zero: Zero::Symmetric, scale: Float::F32 }
}

fn with_zero(format: &'static Format, group: Group) -> Scheme {
    Scheme { zero: Zero::Point(format), ..symmetric(format, group) }
}

/// Numbers of a bell-like shape with an outlier now and then.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(|i| (uniform() + uniform() + uniform()) * if i % 37 == 5 { 6.0 } else { 1.0 }).collect()
}

#[test]
fn codes_of_one_number() {
    for (x, code) in
        [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, 0xe), (7.4, 7), (99.0, 7), (-8.6, 8), (-99.0, 8)]
    {
        assert_eq!(quantize_one(x, 1.0, 0, &INT4), code, "{x}");
    }
    for (x, code) in [(0.0, 3), (1.0, 4), (-3.0, 0), (-3.6, 0), (12.0, 15), (1e30, 15), (0.5, 3), (1.5, 5)] {
        assert_eq!(quantize_one(x, 1.0, 3, &UINT4), code, "{x}");
    }
    assert_eq!(quantize_one(448.0, 1.0, 0, &E4M3), 0x7e);
    assert_eq!(quantize_one(f32::NAN, 1.0, 0, &INT8), 0);
    assert_eq!(quantize_one(f32::INFINITY, 1.0, 0, &INT8), 127);
    assert_eq!(dequantize_one(0xf, 0.5, 0, &INT4), -0.5);
    assert_eq!(dequantize_one(0, 0.5, 3, &UINT4), -1.5);
    assert_eq!(dequantize_one(0x0f, 2.0, 0, &E2M1), -12.0);
}

#[test]
fn rounding_is_that_of_the_definition() {
    for format in [&INT8, &UINT8, &INT4, &UINT4, &INT3, &INT2] {
        let (lo, hi) = format.int_range();
        for zero in [lo, lo + 1, 0, hi] {
            for i in -2400..2400 {
                let x = i as f32 / 8.0;
                let want = ((x / 0.5).round_ties_even() as i32 + zero).clamp(lo, hi);
                assert_eq!(quantize_one(x, 0.5, zero, format), format.int_code(want), "{format} {x} {zero}");
            }
        }
    }
}

#[test]
fn scales_by_the_rules() {
    let scale = |scheme: &Scheme, span| scale_for(span, scheme, ScaleRule::Real).unwrap();
    let s = |format| symmetric(format, Group::Tensor);
    assert_eq!(scale(&s(&INT8), Span::symmetric(127.0)), (1.0, 0));
    assert_eq!(scale(&s(&INT4), Span::new(-3.5, 1.0)), (0.5, 0));
    assert_eq!(scale(&s(&INT3), Span::symmetric(7.0)), (2.0, 0));
    assert_eq!(scale(&s(&INT2), Span::symmetric(3.0)), (2.0, 0));
    assert_eq!(scale(&s(&E4M3), Span::symmetric(896.0)), (2.0, 0));
    assert_eq!(scale(&s(&E2M1), Span::symmetric(3.0)), (0.5, 0));
    assert_eq!(scale(&s(&INT8), Span::default()), (1.0, 0));
    let a = |format| with_zero(format, Group::Tensor);
    assert_eq!(scale(&a(&UINT8), Span::new(-1.0, 254.0)), (1.0, 1));
    assert_eq!(scale(&a(&UINT8), Span::new(10.0, 255.0)), (1.0, 0), "0 belongs to every range");
    assert_eq!(scale(&a(&UINT4), Span::new(-15.0, -2.0)), (1.0, 15));
    assert_eq!(scale(&a(&INT4), Span::new(-4.0, 11.0)), (1.0, -4));
    assert_eq!(scale(&a(&UINT4), Span::default()), (1.0, 0));
}

#[test]
fn scales_of_powers_of_two() {
    let scale = |format, absmax, rule| {
        scale_for(Span::symmetric(absmax), &symmetric(format, Group::Tensor), rule).unwrap().0
    };
    assert_eq!(scale(&INT8, 127.0, ScaleRule::PowerOfTwo), 1.0);
    assert_eq!(scale(&INT8, 128.0, ScaleRule::PowerOfTwo), 2.0);
    assert_eq!(scale(&E2M1, 6.0, ScaleRule::Mx), 1.0);
    assert_eq!(scale(&E2M1, 7.9, ScaleRule::Mx), 1.0, "saturates");
    assert_eq!(scale(&E2M1, 8.0, ScaleRule::Mx), 2.0);
    assert_eq!(scale(&E4M3, 1.0, ScaleRule::Mx), 2f32.powi(-8));
    assert_eq!(scale(&E4M3, f32::from_bits(1), ScaleRule::Mx), f32::MIN_POSITIVE);
    assert!(scale_for(Span::symmetric(1.0), &with_zero(&UINT4, Group::Tensor), ScaleRule::Mx).is_err());
}

#[test]
fn scales_fit_their_type() {
    let with = |scale| Scheme { scale, ..symmetric(&INT4, Group::Tensor) };
    let of = |absmax, scale| scale_for(Span::symmetric(absmax), &with(scale), ScaleRule::Real);
    for x in [1e-45, 1e-38, 1e-9, 3e-7, 0.1, 1.0, 3e4, 4e5] {
        for ty in [Float::F32, Float::F16, Float::Bf16] {
            let (s, _) = of(x, ty).unwrap();
            assert!(s > 0.0 && ty.format().decode(ty.format().encode(s)) == s, "{x} {ty} {s}");
            assert!(x / s < 7.5, "{x} {ty} {s}: the largest number saturates");
        }
    }
    let refused = of(1e9, Float::F16).unwrap_err();
    assert!(refused.message.contains("too large for f16") && refused.help.is_some());
    for ty in [Float::F32, Float::Bf16] {
        assert!(of(f32::MAX, ty).unwrap().0.is_finite());
    }
    let wide =
        scale_for(Span::new(f32::MIN, f32::MAX), &with_zero(&UINT8, Group::Tensor), ScaleRule::Real).unwrap();
    assert!(wide.0.is_finite() && (127..=128).contains(&wide.1));
    assert!(scale_for(Span::symmetric(f32::INFINITY), &with(Float::F32), ScaleRule::Real).is_err());
    assert!(
        scale_for(Span::symmetric(1.0), &symmetric(&formats::E8M0, Group::Tensor), ScaleRule::Real).is_err()
    );
    assert!(scale_for(Span::symmetric(1.0), &with_zero(&E4M3, Group::Tensor), ScaleRule::Real).is_err());
}

#[test]
fn numbers_that_are_not_finite_are_found() {
    let groups = Groups::new(&symmetric(&INT8, Group::Axis(0)), &Shape::fixed(&[3, 20])).unwrap();
    for (bad, group) in
        [(f32::NAN, Group::Axis(0)), (f32::INFINITY, Group::Axis(1)), (f32::NEG_INFINITY, Group::Tensor)]
    {
        let scheme = symmetric(&INT8, group);
        let mut xs = numbers(60, 1);
        xs[47] = bad;
        let err = quantize_rows(&groups, &scheme, Options::default(), &xs).unwrap_err();
        assert!(err.message.starts_with(&format!("element [2, 7] is {bad}")), "{err}");
    }
}

#[test]
fn groups_follow_the_shape_of_the_scales() {
    let shapes: &[&[u64]] = &[&[], &[7], &[5, 9], &[1, 1], &[0, 4], &[4, 0], &[2, 3, 10], &[1, 6, 4]];
    let all = [
        Group::Tensor,
        Group::Axis(0),
        Group::Axis(1),
        Group::Block { axis: 0, size: 2 },
        Group::Block { axis: 1, size: 4 },
        Group::Block { axis: 2, size: 4 },
        Group::Tile([2, 4]),
        Group::Token,
    ];
    let mut refused = 0;
    for shape in shapes {
        let shape = Shape::fixed(shape);
        for group in all {
            let scheme = symmetric(&INT4, group);
            let Ok(scales) = scheme.scale_shape(&shape) else {
                assert!(Groups::new(&scheme, &shape).is_err());
                continue;
            };
            match Groups::new(&scheme, &shape) {
                Ok(groups) if shape.elements() != Some(0) => {
                    assert_eq!(Some(groups.len() as u64), scales.elements(), "{scheme} {shape:?}");
                    let last = groups.index(groups.rows() - 1, groups.cols() - 1);
                    assert_eq!(last + 1, groups.len());
                }
                Ok(_) => {}
                Err(_) => refused += 1,
            }
        }
    }
    // [2, 3, 10] along axis 1, and in blocks along axes 0 and 1.
    assert_eq!(refused, 3);
}

/// What the definition says, element by element.
fn by_definition(scheme: &Scheme, rows: usize, cols: usize, xs: &[f32]) -> Quantized {
    let shape = Shape::fixed(&[rows as u64, cols as u64]);
    let blocks = scheme.blocks(2).unwrap();
    let grid = scheme.scale_shape(&shape).unwrap().dims().unwrap();
    let along = |axis: usize, i: usize| blocks[axis].map_or(0, |b| i / b as usize);
    let group = |i: usize| along(0, i / cols) * grid[1] as usize + along(1, i % cols);
    let mut params = Params::default();
    for g in 0..(grid[0] * grid[1]) as usize {
        let members: Vec<f32> = (0..xs.len()).filter(|&i| group(i) == g).map(|i| xs[i]).collect();
        let (scale, zero) = scale_for(Span::of(&members).unwrap(), scheme, ScaleRule::Real).unwrap();
        params.scales.push(scale);
        if scheme.zero != Zero::Symmetric {
            params.zeros.push(zero);
        }
    }
    let code = |i: usize| {
        let (scale, zero) = params.get(group(i));
        quantize_one(xs[i], scale, zero, scheme.format) as u8
    };
    Quantized { codes: (0..xs.len()).map(code).collect(), params: params.clone() }
}

fn any_group() -> impl Strategy<Value = Group> {
    prop_oneof![
        Just(Group::Tensor),
        Just(Group::Token),
        (0u8..2).prop_map(Group::Axis),
        (0u8..2, 1u32..9).prop_map(|(axis, size)| Group::Block { axis, size }),
        (1u32..5, 1u32..9).prop_map(|(r, c)| Group::Tile([r, c])),
    ]
}

fn any_scheme() -> impl Strategy<Value = Scheme> {
    let formats = prop::sample::select(vec![&INT8, &UINT8, &INT4, &UINT4, &INT3, &INT2, &E4M3, &E2M1]);
    let scale = prop::sample::select(vec![Float::F32, Float::F16, Float::Bf16]);
    (formats, any_group(), scale, any::<bool>()).prop_map(|(format, group, scale, zero)| {
        // Unsigned integers without zero points have no negative numbers.
        let zero = if format.is_int() && (zero || !format.is_signed_int()) {
            Zero::Point(format)
        } else {
            Zero::Symmetric
        };
        Scheme { format, group, zero, scale }
    })
}

/// A store and a module of one weight.
fn weight(rows: usize, cols: usize, xs: &[f32]) -> PrimaryMap<crate::entity::WeightId, WeightDecl> {
    let bytes = xs.iter().flat_map(|x| x.to_le_bytes()).collect();
    let ty = TensorTy::fixed(Float::F32, &[rows as u64, cols as u64]);
    [WeightDecl { name: "w".into(), ty, source: WeightSource::Inline(bytes) }].into_iter().collect()
}

proptest! {
    #[test]
    fn rows_are_quantized_as_defined(
        scheme in any_scheme(), rows in 1usize..9, cols in 1usize..20, seed: u32, budget in 1usize..700, steps in 0u32..4,
    ) {
        let xs = numbers(rows * cols, seed);
        let groups = Groups::new(&scheme, &Shape::fixed(&[rows as u64, cols as u64])).unwrap();
        let got = quantize_rows(&groups, &scheme, Options::default(), &xs).unwrap();
        prop_assert_eq!(&got, &by_definition(&scheme, rows, cols, &xs));

        // Back again: no error above half a step, where nothing saturates.
        let mut back = vec![0.0; xs.len()];
        dequantize_block(&groups, &scheme, &got.params, 0, &got.codes, &mut back).unwrap();
        if scheme.format.is_int() && scheme.scale == Float::F32 {
            for (i, (x, y)) in xs.iter().zip(&back).enumerate() {
                let (scale, _) = got.params.get(groups.index(i / cols, i % cols));
                prop_assert!((x - y).abs() <= scale * 1.01, "{} became {} at scale {}", x, y, scale);
            }
        }

        // The same from a weight, however it is cut, with and without a search.
        let weights = weight(rows, cols, &xs);
        let store = Store::in_memory();
        let view = store.view(&weights, weights.keys().next().unwrap()).unwrap();
        for search in [Search::None, Search::Mse { steps }] {
            let options = Options { search, ..Options::default() };
            let whole = quantize_rows(&groups, &scheme, options, &xs).unwrap();
            let (mut codes, mut next) = (vec![], 0);
            let params = quantize_view(&view, &scheme, options, budget, &mut |rows, part| {
                assert_eq!(rows.start, next);
                assert_eq!(part.len(), rows.len() * cols);
                next = rows.end;
                codes.extend_from_slice(part);
                Ok(())
            }).unwrap();
            prop_assert_eq!(next, rows);
            prop_assert_eq!(&Quantized { codes, params: params.clone() }, &whole);
            let codes = params.zero_codes(&scheme);
            prop_assert_eq!(Params::from_codes(&scheme, params.scales.clone(), &codes), params);
        }
    }

    #[test]
    fn a_search_never_loses(scheme in any_scheme(), rows in 1usize..6, cols in 1usize..40, seed: u32, steps in 1u32..20) {
        let xs = numbers(rows * cols, seed);
        let groups = Groups::new(&scheme, &Shape::fixed(&[rows as u64, cols as u64])).unwrap();
        let errors = |search| {
            let q = quantize_rows(&groups, &scheme, Options { search, ..Options::default() }, &xs).unwrap();
            let mut back = vec![0.0; xs.len()];
            dequantize_block(&groups, &scheme, &q.params, 0, &q.codes, &mut back).unwrap();
            let mut sums = vec![0.0f64; groups.len()];
            for (i, (x, y)) in xs.iter().zip(back).enumerate() {
                sums[groups.index(i / cols, i % cols)] += (f64::from(*x) - f64::from(y)).powi(2);
            }
            sums
        };
        for (with, without) in errors(Search::Mse { steps }).into_iter().zip(errors(Search::None)) {
            prop_assert!(with <= without * (1.0 + 1e-12), "{} > {}", with, without);
        }
    }
}

#[test]
fn a_search_helps_where_there_are_outliers() {
    let xs = numbers(512, 3);
    let scheme = symmetric(&INT2, Group::Block { axis: 1, size: 128 });
    let (plain, _) = fit(&xs, &scheme, Options::default()).unwrap();
    let options = Options { search: Search::Mse { steps: 20 }, ..Options::default() };
    let (found, _) = fit(&xs, &scheme, options).unwrap();
    assert!(found < 0.7 * plain, "{found} {plain}");
}

#[test]
fn wide_formats_are_not_codes() {
    let scheme = symmetric(&formats::F16, Group::Tensor);
    let groups = Groups::new(&scheme, &Shape::fixed(&[1, 4])).unwrap();
    assert!(quantize_rows(&groups, &scheme, Options::default(), &[1.0; 4]).is_err());
}

#[test]
fn blocks_that_are_no_rows_are_refused() {
    let scheme = symmetric(&INT4, Group::Tensor);
    let groups = Groups::new(&scheme, &Shape::fixed(&[2, 4])).unwrap();
    let params = Params { scales: vec![1.0], zeros: vec![] };
    let mut codes = [0; 8];
    assert!(quantize_block(&groups, &scheme, &params, 0, &[0.0; 7], &mut codes[..7]).is_err());
    assert!(quantize_block(&groups, &scheme, &params, 1, &[0.0; 8], &mut codes).is_err());
    assert!(quantize_block(&groups, &scheme, &params, 0, &[0.0; 8], &mut codes[..4]).is_err());
    assert!(quantize_block(&groups, &scheme, &Params::default(), 0, &[0.0; 8], &mut codes).is_err());
    assert!(quantize_block(&groups, &scheme, &params, 0, &[0.0; 8], &mut codes).is_ok());
}
