//! Chooses the next token from a row of logits.
//!
//! Order of the steps: divide by the temperature; keep the `top_k` largest; keep the fewest of them whose share of the
//! kept probability reaches `top_p`; draw. Equal logits rank by index, lowest first, so a choice never depends on
//! how the sort happens to go. A temperature of 0 is [`greedy`].
//!
//! The same seed and the same logits give the same tokens on every machine: the generator is ChaCha12 and the
//! exponential is a portable one. After [`Sampler::new`] nothing is allocated.
//!
//! [`Session::decode_next`](crate::session::Session::decode_next) and its like let a GPU choose where one runs the engine.

use std::cmp::Ordering;

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};
use crate::format::CHOICE_BYTES;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleOptions {
    /// 0 takes the largest logit; 1 follows the model's distribution; more flattens it.
    pub temperature: f32,
    /// Only this many of the largest logits stay; 0 means all.
    pub top_k: usize,
    /// The fewest tokens stay whose probability reaches this; 1 means all.
    pub top_p: f32,
    /// Seed of the generator.
    pub seed: u64,
}

impl Default for SampleOptions {
    fn default() -> SampleOptions {
        SampleOptions { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

/// Index of the largest logit, the lowest one among equals; NaN is never chosen. `None` when no logit is a number.
pub fn greedy(logits: &[f32]) -> Option<u32> {
    let top = largest(logits);
    // NaN equals nothing. Parts are looked at as a whole, which is faster than stopping inside of them.
    let has_top = |part: &[f32]| part.iter().fold(false, |found, &logit| found | (logit == top));
    let start = logits.chunks(BLOCK).position(has_top)? * BLOCK;
    let within = logits[start..].iter().position(|&logit| logit == top)?;
    Some((start + within) as u32)
}

/// The largest number, or minus infinity where there is none. Many at a time, so that it takes vector instructions.
fn largest(logits: &[f32]) -> f32 {
    let mut tops = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for (top, &logit) in tops.iter_mut().zip(chunk) {
            // False for NaN, which therefore never becomes the largest.
            *top = if logit > *top { logit } else { *top };
        }
    }
    tops.iter().chain(rest).fold(f32::NEG_INFINITY, |top, &logit| if logit > top { logit } else { top })
}

/// Numbers compared at once.
const LANES: usize = 16;
/// Numbers looked at as one part.
const BLOCK: usize = 64;

/// Draws tokens; see the module.
#[derive(Debug)]
pub struct Sampler {
    options: SampleOptions,
    random: ChaCha12Rng,
    /// Logits with their indices; capacity for `vocab` of them.
    ranked: Vec<(f32, u32)>,
    /// Their weights, and the largest logit of each part; both with capacity for whatever a row may need.
    weights: Vec<f64>,
    tops: Vec<f32>,
}

impl Sampler {
    /// A sampler for rows of up to `vocab` logits.
    pub fn new(options: SampleOptions, vocab: usize) -> Result<Sampler> {
        if !options.temperature.is_finite() || options.temperature < 0.0 {
            return Err(Error::input(format!(
                "temperature {} is not a number from 0 on",
                options.temperature
            )));
        }
        if !(options.top_p > 0.0 && options.top_p <= 1.0) {
            return Err(Error::input(format!("top-p {} is not above 0 and up to 1", options.top_p)));
        }
        let room = if options.temperature > 0.0 { vocab } else { 0 };
        let (ranked, weights) = (Vec::with_capacity(room), Vec::with_capacity(room));
        let tops = Vec::with_capacity(room.div_ceil(BLOCK));
        Ok(Sampler { options, random: ChaCha12Rng::seed_from_u64(options.seed), ranked, weights, tops })
    }

    /// The next token. Fails when no logit is a number.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let best = greedy(logits)
            .ok_or_else(|| Error::input("no logit is a number; the engine's result is broken"))?;
        let top = logits[best as usize];
        // An infinite logit leaves nothing to draw.
        if self.options.temperature == 0.0 || top.is_infinite() {
            return Ok(best);
        }
        self.ranked.clear();
        let least = self.least_of_interest(logits);
        // NaN is not as large as anything.
        let numbers = logits.iter().enumerate().filter(|(_, logit)| **logit >= least);
        self.ranked.extend(numbers.map(|(index, &logit)| (logit, index as u32)));
        if (1..self.ranked.len()).contains(&self.options.top_k) {
            self.ranked.select_nth_unstable_by(self.options.top_k - 1, rank);
            self.ranked.truncate(self.options.top_k);
        }
        // The sum below must not depend on the order the selection left.
        self.ranked.sort_unstable_by_key(|&(_, index)| index);
        let temperature = f64::from(self.options.temperature);
        let weigh = |logit: f32| libm::exp((f64::from(logit) - f64::from(top)) / temperature);
        self.weights.clear();
        self.weights.extend(self.ranked.iter().map(|&(logit, _)| weigh(logit)));
        let mut total: f64 = self.weights.iter().sum();
        if self.options.top_p < 1.0 {
            total = self.keep_nucleus(total * f64::from(self.options.top_p), weigh);
            self.weights.clear();
            self.weights.extend(self.ranked.iter().map(|&(logit, _)| weigh(logit)));
        }
        // 53 random bits make a number in 0..1.
        let uniform = (self.random.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        let mut left = uniform * total;
        for (&(_, index), weight) in self.ranked.iter().zip(&self.weights) {
            left -= weight;
            if left < 0.0 {
                return Ok(index);
            }
        }
        // Rounding may leave a rest after the last one.
        Ok(best)
    }

    /// How a GPU is to choose the next token ([`crate::format::CHOICE_BYTES`]): with the same options, and a seed of its own
    /// for each.
    ///
    /// Without temperature it chooses the same tokens as [`Sampler::sample`]. Else the same tokens may be chosen with the
    /// same probabilities, up to the rounding of sums to f32, but where several logits are equal to the last one that
    /// `top_k` or `top_p` leave, all of them stay; and the same seed gives other tokens.
    pub(crate) fn choice(&mut self) -> [u8; CHOICE_BYTES as usize] {
        let SampleOptions { temperature, top_k, top_p, .. } = self.options;
        let top_k = u32::try_from(top_k).unwrap_or(0);
        let seed = if temperature > 0.0 { self.random.next_u32() } else { 0 };
        let words = [temperature.to_bits(), top_k, top_p.to_bits(), seed];
        let mut bytes = [0; CHOICE_BYTES as usize];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// A number that none of the `top_k` largest logits is below.
    fn least_of_interest(&mut self, logits: &[f32]) -> f32 {
        let k = self.options.top_k;
        self.tops.clear();
        if k == 0 || k > logits.len().div_ceil(BLOCK) {
            return f32::NEG_INFINITY;
        }
        self.tops.extend(logits.chunks(BLOCK).map(largest));
        // As many parts have a logit as large as the k-th of their largest.
        *self.tops.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    }

    /// Keeps the largest logits until their weights reach `wanted`; returns the weight kept.
    fn keep_nucleus(&mut self, wanted: f64, weigh: impl Fn(f32) -> f64) -> f64 {
        // Usually few tokens suffice, so ever larger parts are selected and sorted instead of everything.
        let mut sorted = 0;
        let mut kept = 0.0;
        while sorted < self.ranked.len() {
            let rest = &mut self.ranked[sorted..];
            let part = (sorted * 4).clamp(64, rest.len().max(64)).min(rest.len());
            if part < rest.len() {
                rest.select_nth_unstable_by(part, rank);
            }
            rest[..part].sort_unstable_by(rank);
            for (offset, &(logit, _)) in rest[..part].iter().enumerate() {
                kept += weigh(logit);
                if kept >= wanted {
                    self.ranked.truncate(sorted + offset + 1);
                    return kept;
                }
            }
            sorted += part;
        }
        kept
    }
}

/// Larger logits first, then lower indices.
fn rank(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_k: usize, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(SampleOptions { temperature, top_k, top_p, seed }, 1000)
            .expect("the options are in range")
    }

    fn histogram(mut sampler: Sampler, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits).expect("the logits are numbers") as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_never_nan() {
        assert_eq!(greedy(&[1.0, 3.0, 3.0, 2.0]), Some(1));
        assert_eq!(greedy(&[f32::NAN, -1.0, f32::NAN]), Some(1));
        assert_eq!(greedy(&[0.0, f32::INFINITY, f32::INFINITY]), Some(1));
        assert_eq!(greedy(&[f32::NEG_INFINITY]), Some(0));
        assert_eq!(greedy(&[-0.0, 0.0]), Some(0));
        assert_eq!(greedy(&[f32::NAN]), None);
        assert_eq!(greedy(&[]), None);
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let logits = [1.0f32, 2.0, 0.0, f32::NAN, f32::NEG_INFINITY];
        for temperature in [0.5f64, 1.0, 2.0] {
            let weights: Vec<f64> = [1.0, 2.0, 0.0].iter().map(|l| (l / temperature).exp()).collect();
            let total: f64 = weights.iter().sum();
            let seen = histogram(sampler(temperature as f32, 0, 1.0, 1), &logits, 20_000);
            for (weight, seen) in weights.iter().zip(&seen) {
                assert!(
                    (weight / total - seen).abs() < 0.015,
                    "{temperature}: {seen} is not {}",
                    weight / total
                );
            }
            assert_eq!(seen[3] + seen[4], 0.0);
        }
    }

    #[test]
    fn top_k_and_top_p_cut() {
        let logits: Vec<f32> = (0..1000).map(|i| if i % 100 == 7 { 5.0 } else { 0.0 }).collect();
        let seen = histogram(sampler(1.0, 3, 1.0, 2), &logits, 3000);
        let kept: Vec<usize> = (0..1000).filter(|&i| seen[i] > 0.0).collect();
        assert_eq!(kept, [7, 107, 207], "equal logits rank by index");
        // Three of four equal shares are needed to reach 0.6.
        let seen = histogram(sampler(1.0, 0, 0.6, 3), &[1.0, 1.0, 1.0, 1.0, -50.0], 3000);
        assert!(seen[0] > 0.3 && seen[1] > 0.3 && seen[2] > 0.3 && seen[3] == 0.0, "{seen:?}");
        // A flat row makes the nucleus grow beyond the first part sorted.
        let seen = histogram(sampler(1.0, 0, 0.5, 4), &[0.0; 1000], 20_000);
        assert!(seen[..499].iter().filter(|&&s| s > 0.0).count() > 450);
        assert!(seen[501..].iter().all(|&s| s == 0.0));
        let seen = histogram(sampler(1.0, 2, 0.1, 5), &[0.0, 4.0, 3.9], 100);
        assert!(seen[1] > 0.999, "{seen:?}");
    }

    #[test]
    fn the_largest_are_found_wherever_they_are() {
        let mut x = 5u64;
        let mut below = |n: u64| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) % n
        };
        for round in 0..300 {
            let len = below(700) as usize + 1;
            let numbers = [f32::NAN, f32::NEG_INFINITY, -0.0, 0.0, 1.0, 2.0, -3.5];
            let logits: Vec<f32> =
                (0..len)
                    .map(|_| {
                        if below(3) == 0 {
                            numbers[below(7) as usize]
                        } else {
                            below(1000) as f32 * 0.01 - 5.0
                        }
                    })
                    .collect();
            let mut want: Vec<(f32, u32)> =
                logits.iter().copied().zip(0..).filter(|(l, _)| !l.is_nan()).collect();
            let first = |best: Option<(f32, u32)>, &(l, i): &(f32, u32)| match best {
                Some((top, _)) if l <= top => best,
                _ => Some((l, i)),
            };
            assert_eq!(greedy(&logits), want.iter().fold(None, first).map(|(_, i)| i), "round {round}");
            want.sort_by(rank);
            let k = below(20) as usize + 1;
            want.truncate(k);
            let mut sampler = sampler(1e6, k, 1.0, round);
            if sampler.sample(&logits).is_ok() {
                let mut got = sampler.ranked.clone();
                got.sort_by(rank);
                let bits = |row: &[(f32, u32)]| row.iter().map(|r| (r.0.to_bits(), r.1)).collect::<Vec<_>>();
                assert_eq!(bits(&got), bits(&want), "round {round}, the {k} largest of {len}");
            }
        }
    }

    #[test]
    fn seeds_repeat() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.37).sin()).collect();
        let draw = |seed| {
            let mut sampler = sampler(0.9, 40, 0.95, seed);
            (0..32).map(|_| sampler.sample(&logits).expect("numbers")).collect::<Vec<_>>()
        };
        assert_eq!(draw(11), draw(11));
        assert_ne!(draw(11), draw(12));
    }

    #[test]
    fn nonsense_is_refused() {
        for (temperature, top_p) in
            [(-1.0, 1.0), (f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, 0.0), (1.0, f32::NAN)]
        {
            let options = SampleOptions { temperature, top_p, ..SampleOptions::default() };
            assert!(Sampler::new(options, 10).is_err(), "{options:?}");
        }
        assert!(sampler(1.0, 0, 1.0, 0).sample(&[f32::NAN]).is_err());
        assert_eq!(sampler(1.0, 0, 1.0, 0).sample(&[1.0, f32::INFINITY]).expect("a number"), 1);
    }
}
