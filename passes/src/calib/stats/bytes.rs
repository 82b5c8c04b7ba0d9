//! Statistics of one value as named states in bytes, and back.

use super::{Hessian, SiteStats, TENSOR, Watched};
use crate::calib::observers::AnyObserver;
use quantc_ir::diag::{Diag, Result};

/// What names of states of half of the samples begin with.
const HALF: &str = "half:";

/// The state of the largest magnitudes: singles, one for each channel.
pub const ABSMAX: &str = "absmax";
/// The state of the Hessian.
pub const HESSIAN: &str = "hessian";
/// The state of the rows that are kept: singles.
pub const ROWS: &str = "rows";
/// The state of the sums of channels, an observer's.
pub const MEAN: &str = "mean";

impl SiteStats {
    /// Everything that is known, before any division of channels.
    pub fn states(&self) -> Vec<(String, Vec<u8>)> {
        let singles = |xs: &[f32]| xs.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let mut states = vec![(ABSMAX.to_string(), singles(&self.absmax))];
        states.extend(self.sums.clone().map(|sums| (MEAN.to_string(), AnyObserver::from(sums).to_bytes())));
        for Watched { all, half } in &self.tensors {
            let name = all.info().name;
            states.push((name.to_string(), all.to_bytes()));
            states.extend(half.as_ref().map(|half| (format!("{HALF}{name}"), half.to_bytes())));
        }
        states.extend(self.hessian.as_ref().map(|h| (HESSIAN.to_string(), h.to_bytes())));
        if !self.rows.is_empty() {
            states.push((ROWS.to_string(), singles(&self.rows)));
        }
        states
    }

    /// The reverse of [`states`](Self::states), for bytes that may be anything, of a value of so many columns.
    pub fn from_states(tokens: u64, columns: usize, states: &[(&str, &[u8])]) -> Result<SiteStats> {
        let damaged =
            |name: &str, why: &str| Diag::input(format!("the statistic `{name}` is damaged: {why}"));
        let mut stats = SiteStats { tokens, ..SiteStats::default() };
        for &(name, bytes) in states {
            match name {
                ABSMAX | ROWS => {
                    let (singles, rest) = bytes.as_chunks();
                    let numbers: Vec<f32> = singles.iter().map(|&b| f32::from_le_bytes(b)).collect();
                    if !rest.is_empty() || columns == 0 || !numbers.len().is_multiple_of(columns) {
                        return Err(damaged(name, "its length is not that of its channels"));
                    }
                    let sound = |x: &f32| x.is_finite() && (name == ROWS || *x >= 0.0);
                    if !numbers.iter().all(sound) || (name == ABSMAX && numbers.len() != columns) {
                        return Err(damaged(name, "it is not a finite number for each channel"));
                    }
                    if name == ABSMAX { stats.absmax = numbers } else { stats.rows = numbers }
                }
                HESSIAN => {
                    let hessian = Hessian::from_bytes(bytes)?;
                    if hessian.k() != columns {
                        return Err(damaged(name, "it has other channels"));
                    }
                    stats.hessian = Some(hessian);
                }
                MEAN => match AnyObserver::from_bytes(bytes)? {
                    AnyObserver::ChannelMean(sums) if sums.means().len() == columns => {
                        stats.sums = Some(sums)
                    }
                    _ => return Err(damaged(name, "it is another statistic")),
                },
                _ => {
                    let of = name.strip_prefix(HALF).unwrap_or(name);
                    let state = AnyObserver::from_bytes(bytes)?;
                    if !TENSOR.contains(&of) || state.info().name != of {
                        return Err(damaged(name, "it is another statistic"));
                    }
                    let known = stats.tensors.iter_mut().find(|w| w.all.info().name == of);
                    match (known, of == name) {
                        (None, true) => stats.tensors.push(Watched { all: state, half: None }),
                        (Some(Watched { half: half @ None, .. }), false) => *half = Some(state),
                        _ => return Err(damaged(name, "it is there twice, or not at all")),
                    }
                }
            }
        }
        if stats.absmax.len() != columns {
            return Err(damaged(ABSMAX, "it is missing"));
        }
        Ok(stats)
    }
}

/// Whether a state is of a half of the samples only.
pub fn of_half(name: &str) -> bool {
    name.starts_with(HALF)
}

/// The state of what two states have seen. It does not depend on which is which, nor on how samples are divided among states.
pub fn merged(name: &str, a: &[u8], b: &[u8]) -> Result<Vec<u8>> {
    match name {
        ABSMAX => {
            let ((a, _), (b, _)) = (a.as_chunks(), b.as_chunks());
            let most = |(&a, &b): (&[u8; 4], &[u8; 4])| f32::from_le_bytes(a).max(f32::from_le_bytes(b));
            Ok(a.iter().zip(b).flat_map(|pair| most(pair).to_le_bytes()).collect())
        }
        HESSIAN | ROWS => Err(Diag::input(format!("statistics with `{name}` cannot be merged"))
            .help("sums of products depend on their order, kept rows on how many there are: take all samples in one run")),
        _ => {
            let mut all = AnyObserver::from_bytes(a)?;
            all.merge(&AnyObserver::from_bytes(b)?)?;
            Ok(all.to_bytes())
        }
    }
}
