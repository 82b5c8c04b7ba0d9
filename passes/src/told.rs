//! What passes tell of what they did, in fields: the rows of an engine's report.
//!
//! A remark is a sentence for people; where it carries one of these, programs find the same in it. Nothing here depends on the
//! clock, on the number of threads or on memory, so that a report has the same bytes every time.

use serde::Serialize;

/// What a remark says, in fields.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Told {
    /// A weight was rounded.
    Weight(Rounded),
    /// Channels were divided at a place, or were not.
    Site(Site),
    /// An activation has one scale from now on.
    Scale(StaticScale),
    /// A layer is looked at on data.
    Data(Taken),
    /// Results of a layer before and after a pass that must not change them.
    Same(Same),
}

/// A weight that was rounded.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rounded {
    /// The weight as it was called before.
    pub weight: String,
    /// The scheme of its codes.
    pub scheme: String,
    /// Bits that one element takes with its share of scales and zero points.
    pub bits: f64,
    /// Signal over noise of the elements in decibels; 999 when nothing was lost.
    pub sqnr_db: f64,
    /// The largest difference of an element.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_error: Option<f64>,
    /// Squared error of what the matrix makes of the calibration rows, by the squares of what it made before, where that was
    /// measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_error: Option<f64>,
    /// The same error by that of rounding to nearest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by_nearest: Option<f64>,
    /// Why it was rounded to nearest when more was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// A place whose channels a pass may divide, and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Site {
    /// Whether something was changed.
    pub applied: bool,
    /// What was done, or why nothing was.
    pub what: String,
    /// Matrices that make up for it; 0 when nothing was changed.
    pub matrices: usize,
    /// The least and the largest factor, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factors: Option<[f32; 2]>,
}

impl Site {
    /// A place that was left as it is.
    pub fn skipped(why: impl Into<String>) -> Site {
        Site { applied: false, what: why.into(), matrices: 0, factors: None }
    }
}

/// The one scale of an activation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StaticScale {
    /// The scheme of its codes.
    pub scheme: String,
    /// How the range was found.
    pub range: String,
    /// The least number that does not saturate.
    pub min: f32,
    /// The largest.
    pub max: f32,
    /// The share of the numbers seen that saturates, where the statistic tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saturates: Option<f64>,
    /// By which part the second half of the samples moved the scale, in words, when that is much.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unsettled: Option<String>,
}

/// The data that a layer is looked at on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Taken {
    /// Where it comes from, for people.
    pub data: String,
    /// How many samples.
    pub samples: usize,
    /// Tokens of each.
    pub length: usize,
    /// What shuffled them; 0 when they are in the order of the text.
    pub seed: u64,
    /// A name for the samples in their order.
    pub digest: String,
    /// The statistics that are taken.
    pub statistics: Vec<String>,
    /// Values of the layer.
    pub values: usize,
}

/// Results of a layer before and after a pass that must not change them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Same {
    /// Norm of the difference by that of the results before, on one sample.
    pub difference: f64,
}

/// The least and the largest of some factors.
pub fn span(factors: &[f32]) -> [f32; 2] {
    factors.iter().fold([f32::MAX, 0.0], |[low, high], &s| [low.min(s), high.max(s)])
}
