//! Ways from a statistic to a range.

use quantc_ir::diag::{Diag, Result, near_misses};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// Which range a scale is to cover. In texts: the name, and after a colon the number, where there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Method {
    /// All that was seen: `whole`.
    #[default]
    Whole,
    /// The mean and so many standard deviations to both sides, but no more than what was seen: `moments:6`.
    Moments {
        /// Standard deviations; above 0.
        deviations: f32,
    },
    /// The moving averages of the extremes of samples: `moving-average:0.01`.
    MovingAverage {
        /// The weight of each next sample, from 0.005 to 1.
        constant: f32,
    },
    /// All but the largest: so many parts of a million are inside. `percentile:99.9` in percent.
    Percentile {
        /// Parts of a million, from 500000 to 1000000.
        ppm: u32,
    },
    /// The range that keeps most of the information, by the relative entropy: `entropy`.
    Entropy,
    /// The range with the least sum of squared errors: `mse`.
    Mse,
}

impl Method {
    /// All methods, those with a number with the usual ones.
    pub const ALL: &'static [Method] = &[
        Method::Whole,
        Method::Moments { deviations: 6.0 },
        Method::MovingAverage { constant: 0.01 },
        Method::Percentile { ppm: 995_000 },
        Method::Percentile { ppm: 999_000 },
        Method::Percentile { ppm: 999_900 },
        Method::Entropy,
        Method::Mse,
    ];

    /// The name of the smallest statistic that tells it.
    pub fn statistic(self) -> &'static str {
        match self {
            Method::Whole => "min-max",
            Method::Moments { .. } => "moments",
            Method::MovingAverage { .. } => "moving-average",
            Method::Percentile { .. } | Method::Entropy | Method::Mse => "histogram",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Method::Whole => f.write_str("whole"),
            Method::Moments { deviations } => write!(f, "moments:{deviations}"),
            Method::MovingAverage { constant } => write!(f, "moving-average:{constant}"),
            Method::Percentile { ppm } => write!(f, "percentile:{}", f64::from(*ppm) / 1e4),
            Method::Entropy => f.write_str("entropy"),
            Method::Mse => f.write_str("mse"),
        }
    }
}

impl FromStr for Method {
    type Err = Diag;

    fn from_str(text: &str) -> Result<Method> {
        let (name, number) = text.split_once(':').map_or((text, None), |(name, n)| (name, Some(n)));
        let within = |least: f64, most: f64| {
            let value = number.and_then(|n| n.parse::<f64>().ok());
            value.filter(|v| (least..=most).contains(v)).ok_or_else(|| {
                Diag::pipeline(format!("`{text}` needs a number from {least} to {most}"))
                    .help(format!("write `{name}:{most}`"))
            })
        };
        let method = match name {
            "whole" => Method::Whole,
            "moments" => Method::Moments { deviations: within(0.1, 1000.0)? as f32 },
            "moving-average" => Method::MovingAverage { constant: within(0.005, 1.0)? as f32 },
            "percentile" => Method::Percentile { ppm: (within(50.0, 100.0)? * 1e4).round() as u32 },
            "entropy" => Method::Entropy,
            "mse" => Method::Mse,
            _ => {
                let known = ["whole", "moments", "moving-average", "percentile", "entropy", "mse"];
                let near = near_misses(name, known);
                let near = if near.is_empty() { &known[..] } else { &near[..] };
                return Err(Diag::pipeline(format!("unknown method `{name}`"))
                    .help(format!("there is {}", crate::pass::quoted(near))));
            }
        };
        let takes_number = !matches!(method, Method::Whole | Method::Entropy | Method::Mse);
        if number.is_some() && !takes_number {
            return Err(Diag::pipeline(format!("`{text}`: the method `{name}` takes no number")));
        }
        Ok(method)
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Method {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Method, D::Error> {
        let text = String::deserialize(input)?;
        text.parse().map_err(|diag: Diag| match diag.help {
            Some(help) => serde::de::Error::custom(format!("{}, {help}", diag.message)),
            None => serde::de::Error::custom(diag.message),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_read_back() {
        for &method in Method::ALL {
            assert_eq!(method.to_string().parse::<Method>().unwrap(), method);
            let json = serde_json::to_string(&method).unwrap();
            assert_eq!(serde_json::from_str::<Method>(&json).unwrap(), method);
        }
        assert_eq!("percentile:99.99".parse::<Method>().unwrap(), Method::Percentile { ppm: 999_900 });
        for text in
            ["percentile", "percentile:40", "percentile:NaN", "moments:0", "mse:3", "moving-average:0"]
        {
            assert!(text.parse::<Method>().is_err(), "{text}");
        }
        let diag = "percentil:99".parse::<Method>().unwrap_err();
        assert_eq!(diag.help.unwrap(), "there is `percentile`");
    }
}
