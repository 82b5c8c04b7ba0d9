//! Chooses the next token from a row of logits.
//!
//! Order of the steps: divide by the temperature; keep the `top_k` largest; keep the fewest of them whose share of the
//! kept probability reaches `top_p`; draw. Equal logits rank by index, lowest first, so a choice never depends on
//! how the sort happens to go. A temperature of 0 is [`greedy`].
//!
//! The same seed and the same logits give the same tokens on every machine: the generator is ChaCha12 and the
//! exponential is a portable one. After [`Sampler::new`] nothing is allocated.

use std::cmp::Ordering;

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::error::{Error, Result};

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
    let mut best: Option<(usize, f32)> = None;
    for (index, &logit) in logits.iter().enumerate() {
        if !logit.is_nan() && best.is_none_or(|(_, top)| logit > top) {
            best = Some((index, logit));
        }
    }
    best.map(|(index, _)| index as u32)
}

/// Draws tokens; see the module.
#[derive(Debug)]
pub struct Sampler {
    options: SampleOptions,
    random: ChaCha12Rng,
    /// Logits with their indices; capacity for `vocab` of them.
    ranked: Vec<(f32, u32)>,
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
        let ranked = Vec::with_capacity(if options.temperature > 0.0 { vocab } else { 0 });
        Ok(Sampler { options, random: ChaCha12Rng::seed_from_u64(options.seed), ranked })
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
        let numbers = logits.iter().enumerate().filter(|(_, logit)| !logit.is_nan());
        self.ranked.extend(numbers.map(|(index, &logit)| (logit, index as u32)));
        if (1..self.ranked.len()).contains(&self.options.top_k) {
            self.ranked.select_nth_unstable_by(self.options.top_k - 1, rank);
            self.ranked.truncate(self.options.top_k);
        }
        // The sum below must not depend on the order the selection left.
        self.ranked.sort_unstable_by_key(|&(_, index)| index);
        let temperature = f64::from(self.options.temperature);
        let weigh = |logit: f32| libm::exp((f64::from(logit) - f64::from(top)) / temperature);
        let mut total: f64 = self.ranked.iter().map(|&(logit, _)| weigh(logit)).sum();
        if self.options.top_p < 1.0 {
            total = self.keep_nucleus(total * f64::from(self.options.top_p), weigh);
        }
        // 53 random bits make a number in 0..1.
        let uniform = (self.random.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        let mut left = uniform * total;
        for &(logit, index) in &self.ranked {
            left -= weigh(logit);
            if left < 0.0 {
                return Ok(index);
            }
        }
        // Rounding may leave a rest after the last one.
        Ok(best)
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
