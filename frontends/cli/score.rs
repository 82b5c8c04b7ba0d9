//! Perplexity, divergence and agreement on a text.
//!
//! The text is cut as [`TokenWindows`] says; every token of a window after the first position is scored.

use crate::failure::Outcome;
use quantc_frontends::data::TokenWindows;
use quantc_ir::diag::Diag;
use quantc_runtime::session::Session;
use serde::Serialize;

/// What a text says about an engine.
#[derive(Clone, Debug, Serialize)]
pub struct Scores {
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Mean negative log likelihood of the scored tokens, in nats.
    pub nll: f64,
    /// Number of scored tokens.
    pub tokens_scored: u64,
    /// The window.
    pub window: usize,
    /// Wall time.
    pub seconds: f64,
    /// What the comparison says, when there was one.
    #[serde(flatten)]
    pub against: Option<Comparison>,
}

/// How an engine differs from its base on the same tokens.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Mean over the scored tokens of KL(base || engine), in nats.
    pub kl_mean: f64,
    /// The 99th percentile of the same.
    pub kl_p99: f64,
    /// Share of the scored tokens where both give the highest logit to the same token.
    pub top1_agreement: f64,
    /// The base's perplexity.
    pub perplexity_base: f64,
    /// Norm of the difference of all logits by the norm of the base's.
    pub logits_error: f64,
}

/// Logarithms of the probabilities of one row of logits, in f64.
pub struct LogSoftmax<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    /// Of one row of logits.
    pub fn new(logits: &'a [f32]) -> LogSoftmax<'a> {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&x| f64::from(x - top).exp()).sum();
        LogSoftmax { logits, log_sum: f64::from(top) + sum.ln() }
    }
    /// Itself, unless there is no number among the logits.
    #[cfg(feature = "llvm")]
    pub fn finite(self) -> Option<LogSoftmax<'a>> {
        (!self.log_sum.is_nan()).then_some(self)
    }
    /// The logarithm of the probability of entry `i`.
    pub fn at(&self, i: usize) -> f64 {
        f64::from(self.logits[i]) - self.log_sum
    }
    /// KL(self || other).
    pub fn kl(&self, other: &LogSoftmax<'_>) -> f64 {
        (0..self.logits.len())
            .map(|i| {
                let p = self.at(i);
                p.exp() * (p - other.at(i))
            })
            .sum()
    }
}

/// Scores `session`, and compares it with `base` when there is one. `progress` is told the share done.
pub fn score(
    session: &mut Session,
    mut base: Option<&mut Session>,
    windows: &TokenWindows,
    progress: &mut dyn FnMut(f64),
) -> Outcome<Scores> {
    let start = std::time::Instant::now();
    let width = session.engine().manifest().vocab as usize;
    let mut chunk = rows_of(session);
    if let Some(base) = base.as_deref() {
        let other = base.engine().manifest().vocab as usize;
        if other != width {
            return Err(
                Diag::input(format!("the engines have vocabularies of {width} and {other} tokens")).into()
            );
        }
        chunk = chunk.min(rows_of(base));
    }
    let count = windows.len();
    let (mut nll, mut base_nll, mut scored, mut agree) = (0.0, 0.0, 0u64, 0u64);
    let mut divergence = vec![];
    let (mut apart, mut size) = (0.0, 0.0);
    for (n, window) in windows.iter().enumerate() {
        session.reset(0)?;
        if let Some(base) = base.as_deref_mut() {
            base.reset(0)?;
        }
        for (c, tokens) in window.chunks(chunk).enumerate() {
            let logits = session.prefill(0, tokens, tokens.len())?;
            let reference = match base.as_deref_mut() {
                Some(base) => Some(base.prefill(0, tokens, tokens.len())?),
                None => None,
            };
            for i in 0..tokens.len() {
                let Some(&next) = window.get(c * chunk + i + 1) else { break };
                let row = LogSoftmax::new(&logits[i * width..][..width]);
                if row.log_sum.is_nan() {
                    return Err(Diag::input("the engine's logits are not numbers").into());
                }
                nll -= row.at(next as usize);
                scored += 1;
                if let Some(reference) = reference {
                    let reference = LogSoftmax::new(&reference[i * width..][..width]);
                    for (&x, &y) in row.logits.iter().zip(reference.logits) {
                        apart += f64::from(x - y).powi(2);
                        size += f64::from(y).powi(2);
                    }
                    base_nll -= reference.at(next as usize);
                    divergence.push(reference.kl(&row));
                    let top = |r: &LogSoftmax<'_>| quantc_runtime::sample::greedy(r.logits);
                    agree += u64::from(top(&row) == top(&reference));
                }
            }
        }
        progress((n + 1) as f64 / count as f64);
    }
    let tokens = scored.max(1) as f64;
    let against = base.map(|_| {
        let kl_mean = divergence.iter().sum::<f64>() / tokens;
        divergence.sort_by(f64::total_cmp);
        let p99 = (divergence.len() * 99).div_ceil(100).saturating_sub(1);
        Comparison {
            kl_mean,
            kl_p99: divergence.get(p99).copied().unwrap_or(0.0),
            top1_agreement: agree as f64 / tokens,
            perplexity_base: (base_nll / tokens).exp(),
            logits_error: if size > 0.0 { (apart / size).sqrt() } else { 0.0 },
        }
    });
    Ok(Scores {
        perplexity: (nll / tokens).exp(),
        nll: nll / tokens,
        tokens_scored: scored,
        window: windows.size(),
        seconds: start.elapsed().as_secs_f64(),
        against,
    })
}

/// Rows of results that one call of a session can give.
fn rows_of(session: &Session) -> usize {
    let manifest = session.engine().manifest();
    manifest.max_rows.min(manifest.max_tokens) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_equal_rows_is_zero() {
        let logits = [1.0, -2.0, 0.5];
        let row = LogSoftmax::new(&logits);
        assert_eq!(row.kl(&row), 0.0);
        let total: f64 = (0..3).map(|i| row.at(i).exp()).sum();
        assert!((total - 1.0).abs() < 1e-12);
    }
}
