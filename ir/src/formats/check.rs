//! Checks that hold for every format; each format's file runs them.

use super::{ALL, Class, Format};
use proptest::prelude::*;

/// The code stands for `x`, with its sign, where all NaNs are alike.
pub(super) fn same(format: &Format, code: u32, x: f32) {
    let y = format.decode(code);
    assert!(y.to_bits() == x.to_bits() || x.is_nan() && y.is_nan(), "{format} {code:#x}: {y} is not {x}");
    assert_eq!(format.is_nan_code(code), x.is_nan());
}

/// Every finite number is encoded as itself; between two neighbours the nearer one is taken and halfway the even
/// code; beyond the largest it is the largest.
pub(super) fn encoding(format: &Format) {
    let mut numbers: Vec<(f32, u32)> = (0..=format.mask())
        .map(|code| (format.decode(code), code))
        .filter(|(x, _)| x.is_finite() && !(*x == 0.0 && x.is_sign_negative()))
        .collect();
    numbers.sort_by(|a, b| a.0.total_cmp(&b.0));
    for &(x, code) in &numbers {
        assert_eq!(format.encode(x), code, "{format} {x}");
    }
    for pair in numbers.windows(2) {
        let [(low, low_code), (high, high_code)] = [pair[0], pair[1]];
        assert!(low < high);
        let exact = (f64::from(low) + f64::from(high)) / 2.0;
        let middle = exact as f32;
        if f64::from(middle) != exact {
            // Only the least subnormal numbers have no single between them.
            assert!(high.is_subnormal() || low.is_subnormal(), "{format} {low} {high}");
            continue;
        }
        // The sign of a negative zero is kept.
        let code_of = |x: f32, code: u32| match format.class {
            Class::Float { .. } if x < 0.0 && format.decode(code) == 0.0 => format.mask() / 2 + 1,
            _ => code,
        };
        let even = if low_code & 1 == 0 { low_code } else { high_code };
        assert_eq!(low_code & 1 ^ high_code & 1, 1, "{format}: of two neighbours one is even");
        assert_eq!(format.encode(middle), code_of(middle, even), "{format}: halfway {middle}");
        assert_eq!(
            format.encode(middle.next_down()),
            code_of(middle.next_down(), low_code),
            "{format}: below {middle}"
        );
        assert_eq!(
            format.encode(middle.next_up()),
            code_of(middle.next_up(), high_code),
            "{format}: above {middle}"
        );
    }
    let (min, max) = (numbers[0], numbers[numbers.len() - 1]);
    assert_eq!((format.min(), format.max()), (min.0, max.0));
    assert_eq!(format.encode((max.0 * 1.0625 + 1.0).min(f32::MAX)), max.1);
    assert_eq!(format.encode(f32::MAX), max.1);
    assert_eq!(format.encode(f32::MIN), min.1);
}

#[test]
fn tables_agree_with_decode() {
    for format in ALL {
        let Some(table) = format.decode_table() else {
            assert!(format.bits > 8);
            continue;
        };
        for (code, x) in (0u32..).zip(table) {
            assert_eq!(x.to_bits(), format.decode(code).to_bits(), "{format} {code}");
        }
    }
}

#[test]
fn every_format_says_what_it_is() {
    for format in ALL {
        assert!(format.doc.ends_with('.') && format.doc.len() > 10, "{format}");
        assert_eq!(Format::by_name(format.name), Some(*format));
    }
}

#[test]
fn packed_bytes_are_as_published() {
    let pack = |name: &str, codes: &[u8]| {
        let format = Format::by_name(name).unwrap();
        let mut out = vec![0xaa; format.packed_len(codes.len())];
        format.pack(codes, &mut out);
        out
    };
    assert_eq!(pack("e2m1", &[1, 2]), [0x21]);
    assert_eq!(pack("int4", &[0, 1, 2, 3, 4, 5, 6, 7]), 0x7654_3210u32.to_le_bytes());
    let three: Vec<u8> = (0..32).map(|i| i % 8).collect();
    let words = [0x88fa_c688u32, 0xc688_fac6, 0xfac6_88fa];
    assert_eq!(pack("int3", &three), words.map(u32::to_le_bytes).concat());
    assert_eq!(pack("int2", &[0, 1, 2, 3, 1]), [0b1110_0100, 1]);
    assert_eq!(pack("int4", &[0xff]), [0x0f], "bits above the format's are dropped");
}

proptest! {
    #[test]
    fn packing_round_trips(which in 0..ALL.len(), codes in prop::collection::vec(any::<u32>(), 0..70)) {
        let format = ALL[which];
        let codes: Vec<u32> = codes.into_iter().map(|c| c & format.mask()).collect();
        let mut packed = vec![0xff; format.packed_len(codes.len())];
        prop_assert_eq!(packed.len(), (codes.len() * format.bits as usize).div_ceil(8));
        format.pack_wide(&codes, &mut packed);
        // The definition: bit b of the stream is bit b % bits of code b / bits.
        for b in 0..packed.len() * 8 {
            let bit = packed[b / 8] >> (b % 8) & 1;
            let want = codes.get(b / format.bits as usize).map_or(0, |c| c >> (b as u32 % format.bits) & 1);
            prop_assert_eq!(u32::from(bit), want);
        }
        let mut wide = vec![0; codes.len()];
        format.unpack_wide(&packed, &mut wide);
        prop_assert_eq!(&wide, &codes);
        if format.bits <= 8 {
            let bytes: Vec<u8> = codes.iter().map(|&c| c as u8).collect();
            let mut narrow = vec![0xff; packed.len()];
            format.pack(&bytes, &mut narrow);
            prop_assert_eq!(&narrow, &packed);
            let mut back = vec![0xff; codes.len()];
            format.unpack(&packed, &mut back);
            prop_assert_eq!(back, bytes);
        }
    }

    #[test]
    fn the_nearest_number_is_taken(which in 0..ALL.len(), bits in any::<u32>()) {
        let (format, x) = (ALL[which], f32::from_bits(bits));
        prop_assume!(x.is_finite() && format.bits <= 8);
        let x = if format.class == Class::Exponent { x.abs() } else { x };
        let error = |code| (f64::from(format.decode(code)) - f64::from(x)).abs();
        let found = error(format.encode(x));
        for code in 0..=format.mask() {
            prop_assert!(format.is_nan_code(code) || error(code) >= found, "{} {}: {} is nearer", format, x, format.decode(code));
        }
    }
}
