//! Observers: statistics of activations of bounded size.
//!
//! An observer sees rows of an activation, sample by sample, and folds them into a statistic; the rows are forgotten.
//! A file declares one, the table below lists it; [`AnyObserver`] drives any of them by name. From a statistic a
//! [`Method`] makes the range that a scale is to cover, for a [`Scheme`].
//!
//! What holds:
//! - States may be merged. However samples, or rows of them, are divided among states and in whatever order these are
//!   merged, the bytes are those of one state that saw all: maxima, counters, and sums without rounding.
//! - The size of a state does not depend on the number of samples. With 32768 channels none has more than 8 MiB.
//! - Numbers that are not finite are refused by [`Rows`], with their place, before anything is folded.
//! - A state has one form in bytes; whatever else [`AnyObserver::from_bytes`] is given, it refuses.
//! - Ranges are finite and include 0.
//!
//! ```
//! use quantc_ir::scheme::Scheme;
//! use quantc_passes::calib::observers::{AnyObserver, Method, Rows};
//!
//! let scheme = Scheme::parse("!q<int8:f32 tensor>")?;
//! let mut halves = [AnyObserver::new("histogram", 2)?, AnyObserver::new("histogram", 2)?];
//! halves[0].see(&Rows::new(0, &[0.5, -0.25, 1.0, 0.0], 2)?)?;
//! halves[1].see(&Rows::new(1, &[0.75, -3.0], 2)?)?;
//! let [mut all, other] = halves;
//! all.merge(&other)?;
//! assert_eq!(all.span(Method::Whole, &scheme)?.max(), 3.0);
//! # Ok::<(), quantc_ir::diag::Diag>(())
//! ```

mod bytes;
mod channel_sums;
mod convergence;
mod exact;
mod method;
mod rows;

pub use channel_sums::{ChannelSum, ChannelSums};
pub use convergence::Convergence;
pub use method::Method;
pub use rows::Rows;

use bytes::Reader;
use quantc_ir::diag::{Diag, Result, near_misses};
use quantc_ir::quant::Span;
use quantc_ir::scheme::{Scheme, Zero};
use rows::Extremes;

/// Channels that an observer may have.
pub const MAX_CHANNELS: usize = 1 << 18;

/// A statistic that is folded from rows. [`AnyObserver`] is what to use when the kind is not known.
pub trait Observer: Clone + PartialEq + Send + Sync + Sized {
    /// The name in pipelines and files.
    const NAME: &'static str;

    /// What it tells, in one sentence.
    const DOC: &'static str;

    /// The state that has seen nothing, for rows of so many channels.
    fn new(channels: usize) -> Result<Self>;

    /// Folds rows. On an error the state is as before.
    fn see(&mut self, rows: &Rows<'_>) -> Result<()>;

    /// Adds what another state has seen. On an error the state is as before.
    fn merge(&mut self, other: &Self) -> Result<()>;

    /// The state in bytes.
    fn to_bytes(&self) -> Vec<u8>;

    /// The reverse of [`to_bytes`](Self::to_bytes), for bytes that may be anything.
    fn from_bytes(bytes: &[u8]) -> Result<Self>;

    /// The bytes of memory that it holds.
    fn memory(&self) -> usize;

    /// How many numbers it has seen; for statistics of channels, in each channel.
    fn n_seen(&self) -> u64;

    /// The range for one scale of the whole tensor, when the statistic tells it by this method. For symmetric schemes
    /// it is symmetric.
    fn span(&self, _method: Method, _scheme: &Scheme) -> Result<Option<Span>> {
        Ok(None)
    }

    /// The whole range of each channel, when the statistic tells it.
    fn channel_spans(&self, _scheme: &Scheme) -> Option<Vec<Span>> {
        None
    }

    /// The share of the numbers seen that lie outside of `span`, so that they saturate; when the statistic tells it.
    fn outside(&self, _span: Span) -> Option<f64> {
        None
    }
}

/// A line of the table of observers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObserverInfo {
    /// The name in pipelines and files.
    pub name: &'static str,
    /// What it tells, in one sentence.
    pub doc: &'static str,
}

macro_rules! observers {
    ($($module:ident :: $name:ident),* $(,)?) => {
        $(mod $module;)*
        $(pub use $module::$name;)*

        /// Every observer.
        pub static ALL: &[ObserverInfo] =
            &[$(ObserverInfo { name: $name::NAME, doc: $name::DOC }),*];

        /// Any observer.
        #[derive(Clone, Debug, PartialEq)]
        pub enum AnyObserver {
            $(#[doc = concat!("See [`", stringify!($name), "`].")] $name($name),)*
        }

        $(impl From<$name> for AnyObserver {
            fn from(observer: $name) -> AnyObserver {
                AnyObserver::$name(observer)
            }
        })*

        impl AnyObserver {
            /// The state of the observer `name` that has seen nothing, for rows of so many channels.
            pub fn new(name: &str, channels: usize) -> Result<AnyObserver> {
                match name {
                    $($name::NAME => $name::new(channels).map(AnyObserver::from),)*
                    _ => Err(unknown(name)),
                }
            }

            /// The line of the table.
            pub fn info(&self) -> ObserverInfo {
                match self {
                    $(AnyObserver::$name(_) => ObserverInfo { name: $name::NAME, doc: $name::DOC },)*
                }
            }

            /// See [`Observer::see`].
            pub fn see(&mut self, rows: &Rows<'_>) -> Result<()> {
                match self {
                    $(AnyObserver::$name(o) => o.see(rows),)*
                }
            }

            /// See [`Observer::merge`]. Statistics of different kinds are refused.
            pub fn merge(&mut self, other: &AnyObserver) -> Result<()> {
                match (self, other) {
                    $((AnyObserver::$name(a), AnyObserver::$name(b)) => a.merge(b),)*
                    (a, b) => {
                        let (a, b) = (a.info().name, b.info().name);
                        Err(Diag::input(format!("the statistics `{a}` and `{b}` cannot be put together")))
                    }
                }
            }

            /// See [`Observer::memory`].
            pub fn memory(&self) -> usize {
                match self {
                    $(AnyObserver::$name(o) => o.memory(),)*
                }
            }

            /// See [`Observer::n_seen`].
            pub fn n_seen(&self) -> u64 {
                match self {
                    $(AnyObserver::$name(o) => o.n_seen(),)*
                }
            }

            /// See [`Observer::channel_spans`]. `None` also when nothing was seen.
            pub fn channel_spans(&self, scheme: &Scheme) -> Option<Vec<Span>> {
                match self {
                    _ if self.n_seen() == 0 => None,
                    $(AnyObserver::$name(o) => o.channel_spans(scheme),)*
                }
            }

            /// See [`Observer::outside`].
            pub fn outside(&self, span: Span) -> Option<f64> {
                match self {
                    $(AnyObserver::$name(o) => o.outside(span),)*
                }
            }

            fn told_span(&self, method: Method, scheme: &Scheme) -> Result<Option<Span>> {
                match self {
                    $(AnyObserver::$name(o) => o.span(method, scheme),)*
                }
            }

            fn payload(&self) -> Vec<u8> {
                match self {
                    $(AnyObserver::$name(o) => o.to_bytes(),)*
                }
            }

            fn from_payload(name: &[u8], bytes: &[u8]) -> Option<Result<AnyObserver>> {
                $(if name == $name::NAME.as_bytes() {
                    return Some($name::from_bytes(bytes).map(AnyObserver::from));
                })*
                None
            }
        }
    };
}

observers! {
    absmax::AbsMax, min_max::MinMax, moments::Moments, moving_average::MovingAverage, histogram::Histogram,
    channel_absmax::ChannelAbsMax, channel_mean::ChannelMean, channel_min_max::ChannelMinMax, channel_mean_square::ChannelMeanSquare,
}

/// The first byte of states in bytes.
const VERSION: u8 = 1;

impl AnyObserver {
    /// The range for one scale of the whole tensor; finite, with 0 inside; symmetric for symmetric schemes.
    ///
    /// It is an error when the statistic does not tell it by this method, and when nothing was seen.
    pub fn span(&self, method: Method, scheme: &Scheme) -> Result<Span> {
        let name = self.info().name;
        if self.n_seen() == 0 {
            return Err(Diag::input(format!("the statistic `{name}` has seen nothing: there is no range"))
                .help("give calibration data that reaches this activation"));
        }
        self.told_span(method, scheme)?.ok_or_else(|| {
            Diag::pipeline(format!("the statistic `{name}` does not tell the range `{method}` for {scheme}"))
                .help(format!("collect `{}`", method.statistic()))
        })
    }

    /// The state in bytes: a version, the name with its length in a byte before it, and what the observer writes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let name = self.info().name;
        let mut out = vec![VERSION, name.len() as u8];
        out.extend(name.as_bytes());
        out.extend(self.payload());
        out
    }

    /// The reverse of [`to_bytes`](Self::to_bytes). Bytes that are no state are refused, and memory is taken only for
    /// what is there.
    pub fn from_bytes(bytes: &[u8]) -> Result<AnyObserver> {
        let mut input = Reader::new(bytes);
        if input.u8()? != VERSION {
            return Err(input.refuse("it was written by another version of quantc"));
        }
        let len = input.u8()?;
        let name = input.take(usize::from(len))?;
        AnyObserver::from_payload(name, input.rest())
            .unwrap_or_else(|| Err(unknown(&String::from_utf8_lossy(name))))
    }
}

fn unknown(name: &str) -> Diag {
    let near = near_misses(name, ALL.iter().map(|o| o.name));
    let all: Vec<&str> = ALL.iter().map(|o| o.name).collect();
    let listed = crate::pass::quoted(if near.is_empty() { &all } else { &near });
    Diag::pipeline(format!("unknown statistic `{name}`")).help(format!("there is {listed}"))
}

/// The span of a range for a scheme.
fn whole(extremes: Extremes, scheme: &Scheme) -> Span {
    match scheme.zero {
        Zero::Symmetric => Span::symmetric(extremes.absmax()),
        Zero::Point(_) => extremes.span(),
    }
}

fn check_channels(channels: usize) -> Result<()> {
    if (1..=MAX_CHANNELS).contains(&channels) {
        return Ok(());
    }
    Err(Diag::input(format!("statistics of {channels} channels: they can have from 1 to {MAX_CHANNELS}")))
}

#[cfg(test)]
mod tests;
