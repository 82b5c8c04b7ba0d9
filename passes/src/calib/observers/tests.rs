//! What holds for every observer.

use super::*;
use proptest::prelude::*;
use quantc_ir::formats::{INT8, UINT8};
use quantc_ir::scheme::Group;
use quantc_ir::ty::Float;

pub const SYMMETRIC: Scheme =
    Scheme { format: &INT8, group: Group::Tensor, zero: Zero::Symmetric, scale: Float::F32 };
pub const ASYMMETRIC: Scheme =
    Scheme { format: &UINT8, group: Group::Tensor, zero: Zero::Point(&UINT8), scale: Float::F32 };

fn all_of(channels: usize) -> Vec<AnyObserver> {
    ALL.iter().map(|info| AnyObserver::new(info.name, channels).unwrap()).collect()
}

/// Any finite single, often one of few, and with zeros of both signs.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite()),
        4 => -4f32..4.0,
        2 => prop::sample::select(vec![0.0, -0.0, 1.0, -1.0, f32::MAX, f32::MIN, 1e-45, -1e-45]),
    ]
}

/// Samples of some rows, with indices that may repeat: a sample in pieces.
fn samples(channels: usize) -> impl Strategy<Value = Vec<(u64, Vec<f32>)>> {
    let rows = (0usize..5).prop_flat_map(move |n| prop::collection::vec(number(), n * channels));
    prop::collection::vec((0u64..12, rows), 0..12)
}

proptest! {
    /// Each piece goes to one of four states, in any order; these are merged in any order. The bytes are those of one
    /// state that saw the samples as they were.
    #[test]
    fn any_split_and_any_order_give_the_same_bytes(
        (channels, samples, order, to, merges) in (1usize..6).prop_flat_map(|channels| {
            (Just(channels), samples(channels)).prop_flat_map(|(channels, samples)| {
                // Cut between rows: a sample's pieces.
                let pieces: Vec<usize> = (0..samples.iter().map(|s| s.1.len() / channels).sum()).collect();
                let n = pieces.len();
                (
                    Just(channels),
                    Just(samples),
                    Just(pieces).prop_shuffle(),
                    prop::collection::vec(0usize..4, n),
                    Just(vec![0usize, 1, 2, 3]).prop_shuffle(),
                )
            })
        })
    ) {
        let rows: Vec<Rows<'_>> = samples
            .iter()
            .flat_map(|(s, data)| data.chunks_exact(channels).map(|row| Rows::new(*s, row, channels).unwrap()))
            .collect();
        for info in ALL {
            let new = || AnyObserver::new(info.name, channels).unwrap();
            let mut whole = new();
            for (s, data) in &samples {
                whole.see(&Rows::new(*s, data, channels).unwrap()).unwrap();
            }
            let mut parts = [new(), new(), new(), new()];
            for (&piece, &part) in order.iter().zip(&to) {
                parts[part].see(&rows[piece]).unwrap();
            }
            // ((a + b) + (c + d)) for any order of the four; by way of bytes.
            let [a, b, c, d] = [0, 1, 2, 3].map(|i| parts[merges[i]].clone());
            let (mut left, mut right) = (a, c);
            left.merge(&b).unwrap();
            right.merge(&AnyObserver::from_bytes(&d.to_bytes()).unwrap()).unwrap();
            left.merge(&right).unwrap();
            prop_assert_eq!(left.to_bytes(), whole.to_bytes(), "{}", info.name);
            prop_assert_eq!(AnyObserver::from_bytes(&whole.to_bytes()).unwrap(), whole);
        }
    }

    /// Ranges of whatever was seen are finite, include 0, are not wider than what was seen, and symmetric ones are.
    #[test]
    fn ranges_are_ranges(samples in samples(3)) {
        let data: Vec<f32> = samples.iter().flat_map(|s| s.1.iter().copied()).collect();
        let seen = Span::of(&data).unwrap();
        for mut observer in all_of(3) {
            for (s, data) in &samples {
                observer.see(&Rows::new(*s, data, 3).unwrap()).unwrap();
            }
            for &method in Method::ALL {
                for scheme in [SYMMETRIC, ASYMMETRIC] {
                    let Ok(span) = observer.span(method, &scheme) else { continue };
                    prop_assert!(span.min().is_finite() && span.min() <= 0.0);
                    prop_assert!(span.max().is_finite() && span.max() >= 0.0);
                    if scheme.zero == Zero::Symmetric {
                        prop_assert_eq!(span.max(), -span.min());
                        prop_assert!(span.max() <= seen.absmax());
                    } else {
                        prop_assert!(span.min() >= seen.min() && span.max() <= seen.max());
                    }
                }
            }
        }
    }

    /// Bytes that were changed, cut or invented are a state in its one form, or an error.
    #[test]
    fn hostile_bytes_are_refused_or_read_back(
        which in 0..ALL.len(), samples in samples(2), cut in 0usize..400,
        changes in prop::collection::vec((0usize..400, any::<u8>()), 0..4),
        noise in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut observer = all_of(2).swap_remove(which);
        for (s, data) in &samples {
            observer.see(&Rows::new(*s, data, 2).unwrap()).unwrap();
        }
        let mut bytes = observer.to_bytes();
        for (at, value) in changes {
            let len = bytes.len();
            bytes[at % len] = value;
        }
        if cut < bytes.len() {
            bytes.truncate(bytes.len() - cut);
        }
        for bytes in [&bytes, &noise] {
            if let Ok(mut read) = AnyObserver::from_bytes(bytes) {
                prop_assert_eq!(&read.to_bytes(), bytes);
                // What was read may be used, and merges with the like.
                let twin = read.clone();
                let merged = read.merge(&twin);
                prop_assert!(merged.is_err() || AnyObserver::from_bytes(&read.to_bytes()).is_ok());
                for &method in Method::ALL {
                    // It may not tell it; whatever it tells is finite.
                    if let Ok(span) = read.span(method, &ASYMMETRIC) {
                        prop_assert!(span.min().is_finite() && span.max().is_finite());
                    }
                }
            }
        }
    }
}

#[test]
fn names_are_listed_once_and_kept() {
    for info in ALL {
        let observer = AnyObserver::new(info.name, 2).unwrap();
        assert_eq!(observer.info(), *info);
        assert_eq!(ALL.iter().filter(|i| i.name == info.name).count(), 1);
        assert!(info.doc.ends_with('.'));
    }
    let diag = AnyObserver::new("histogramm", 1).unwrap_err();
    assert_eq!(diag.help.unwrap(), "there is `histogram`");
}

#[test]
fn each_method_is_told_by_the_statistic_it_names() {
    for &method in Method::ALL {
        let mut observer = AnyObserver::new(method.statistic(), 1).unwrap();
        let diag = observer.span(method, &SYMMETRIC).unwrap_err();
        assert!(diag.message.contains("has seen nothing"), "{diag}");
        observer.see(&Rows::new(0, &[-1.0, 3.0, 2.0], 1).unwrap()).unwrap();
        assert!(observer.span(method, &SYMMETRIC).is_ok());
        assert!(observer.span(method, &ASYMMETRIC).is_ok());
    }
    let mut observer = AnyObserver::new("absmax", 1).unwrap();
    observer.see(&Rows::new(0, &[-1.0], 1).unwrap()).unwrap();
    let diag = observer.span(Method::Entropy, &SYMMETRIC).unwrap_err();
    assert_eq!(
        diag.to_string(),
        "the statistic `absmax` does not tell the range `entropy` for !q<int8:f32 tensor>\n  help: collect `histogram`"
    );
    assert!(observer.span(Method::Whole, &ASYMMETRIC).is_err());
}

#[test]
fn what_does_not_fit_leaves_the_state_as_it_was() {
    for mut observer in all_of(3) {
        observer.see(&Rows::new(0, &[1.0, 2.0, -3.0], 3).unwrap()).unwrap();
        let before = observer.clone();
        let name = before.info().name;
        for mut other in all_of(4) {
            other.see(&Rows::new(0, &[1.0; 4], 4).unwrap()).unwrap();
            if other.info().name != name || name.starts_with("channel") {
                assert!(observer.merge(&other).is_err());
                assert_eq!(observer, before);
            }
        }
        if name.starts_with("channel") {
            assert!(observer.see(&Rows::new(0, &[1.0; 4], 4).unwrap()).is_err());
            assert!(AnyObserver::new(name, 0).is_err());
            assert!(AnyObserver::new(name, MAX_CHANNELS + 1).is_err());
        }
        assert_eq!(observer, before);
    }
}

#[test]
fn counters_do_not_wrap() {
    // A state that has seen 2^64 - 1 zeros.
    let mut histogram = vec![1, 9];
    histogram.extend(b"histogram");
    histogram.extend(u64::MAX.to_le_bytes());
    histogram.extend([0; 8]);
    histogram.extend(0u32.to_le_bytes());
    histogram.extend(u64::MAX.to_le_bytes());
    let mut full = AnyObserver::from_bytes(&histogram).unwrap();
    let before = full.clone();
    assert!(full.see(&Rows::new(0, &[0.0], 1).unwrap()).is_err());
    assert!(full.merge(&before.clone()).is_err());
    assert_eq!(full, before);
    assert_eq!(full.span(Method::Entropy, &SYMMETRIC).unwrap().max(), 0.0);
    assert_eq!(full.span(Method::Percentile { ppm: 999_000 }, &ASYMMETRIC).unwrap().max(), 0.0);
}

#[test]
fn memory_is_bounded() {
    for (channels, n_samples) in [(32768, 30), (1, 30_000)] {
        let data: Vec<f32> = (0..channels).map(|i| f32::from_bits(i as u32 * 0xfe00)).collect();
        for mut observer in all_of(channels) {
            for sample in 0..n_samples {
                let mut data = data.clone();
                data[0] = sample as f32;
                observer.see(&Rows::new(sample, &data, channels).unwrap()).unwrap();
                assert!(observer.memory() < 8 << 20, "{}", observer.info().name);
            }
            let bytes = observer.to_bytes();
            assert!(bytes.len() < 8 << 20, "{}", observer.info().name);
            assert!(AnyObserver::from_bytes(&bytes).unwrap().memory() < 8 << 20);
        }
    }
}
