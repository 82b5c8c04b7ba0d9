//! What a pass is: its declaration, what it may use while it runs, and the macros that declare it.

mod cx;
mod options;
mod pattern;

pub use cx::{Derive, Env, PassCx, PassState, Remark, Session};
pub use options::{read_options, write_options};
pub use pattern::{NameKind, Pattern, PatternUse, Patterns};

use quantc_ir::diag::Result;
use quantc_ir::ty::ElemTy;
use std::fmt;

/// What files that declare passes import.
pub mod prelude {
    pub use super::{
        Changed, Declared, Fact, NameKind, Numerics, Pass, PassCx, Pattern, PatternUse, Patterns,
    };
    pub use crate::analysis::{Analysis, Function};
    pub use crate::pass;
    pub use quantc_ir::diag::{Diag, Loc, Result};
    pub use quantc_ir::entity::{LayerId, OpId, StateId, ValueId, WeightId};
    pub use quantc_ir::graph::{Def, Graph, Node};
    pub use quantc_ir::module::Module;
    pub use quantc_ir::ops::{Op, OpKind, OpSpec};
    pub use quantc_ir::ty::{Dim, ElemTy, Float, Shape, TensorTy};
}

/// The declaration of a pass, made by [`pass!`](crate::pass!).
#[derive(Clone, Copy, Debug)]
pub struct PassInfo {
    /// The name in pipelines.
    pub name: &'static str,
    /// The manual page; its first sentence is a summary.
    pub doc: &'static str,
    /// The options in order.
    pub options: &'static [OptionInfo],
    /// What must hold before it runs.
    pub needs: &'static [Fact],
    /// What holds after it ran.
    pub provides: &'static [Fact],
    /// What it runs on.
    pub scope: Scope,
    /// What it does to results.
    pub numerics: Numerics,
    /// What becomes of statistics of values.
    pub stats: Stats,
    /// Counts up when the weights it derives change, so that older ones are not reused.
    pub version: u32,
    /// Reads the options, given as in a pipeline with their braces; the empty text is all defaults.
    pub read: fn(&str) -> Result<Box<dyn Pass>>,
}

impl PassInfo {
    /// The first sentence of the manual page.
    pub fn summary(&self) -> &'static str {
        let first = self.doc.trim_start().split("\n\n").next().unwrap_or_default().trim_end();
        first.find(". ").map_or(first, |end| &first[..=end])
    }
}

/// One option of a pass.
#[derive(Clone, Copy, Debug)]
pub struct OptionInfo {
    /// The field; in texts with `-` for `_`.
    pub field: &'static str,
    /// Its type, in Rust.
    pub ty: &'static str,
    /// The default, in Rust.
    pub default: &'static str,
    /// The manual line.
    pub doc: &'static str,
}

impl OptionInfo {
    /// The name in texts.
    pub fn name(&self) -> String {
        self.field.trim_start_matches("r#").replace('_', "-")
    }
}

/// What a pass runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// One layer at a time; `main` counts as a layer when there are no layers.
    Layer,
    /// The whole module.
    Module,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scope::Layer => "layer",
            Scope::Module => "module",
        })
    }
}

/// What a rewrite does to results, from the least to the most.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Numerics {
    /// The same numbers.
    #[default]
    Exact,
    /// The same numbers in real arithmetic; rounding differs.
    Reassociates,
    /// Other numbers: something is rounded to fewer bits.
    Requantizes,
}

impl fmt::Display for Numerics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Numerics::Exact => "exact",
            Numerics::Reassociates => "reassociates",
            Numerics::Requantizes => "requantizes",
        })
    }
}

/// What becomes of statistics of values when a pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stats {
    /// They stay true.
    Keeps,
    /// The pass changes values and their statistics alike; those of whole tensors are no longer true.
    Transforms,
    /// They are no longer true.
    Drops,
}

/// Something that passes need and provide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fact {
    /// The module is cut into layers.
    Layers,
    /// A target is chosen.
    Target,
    /// There is a text to calibrate on.
    Data,
    /// A statistic of the layer's values, by name.
    Stat(&'static str),
    /// Anything else, by name.
    Named(&'static str),
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fact::Layers => f.write_str("a module cut into layers"),
            Fact::Target => f.write_str("a target"),
            Fact::Data => f.write_str("a text to calibrate on"),
            Fact::Stat(name) => write!(f, "the statistic `{name}`"),
            Fact::Named(name) => write!(f, "`{name}`"),
        }
    }
}

/// Whether a pass changed what it ran on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// Nothing is different.
    No,
    /// Something is.
    Yes,
}

impl From<bool> for Changed {
    fn from(changed: bool) -> Changed {
        if changed { Changed::Yes } else { Changed::No }
    }
}

impl std::ops::BitOr for Changed {
    type Output = Changed;
    fn bitor(self, other: Changed) -> Changed {
        (self == Changed::Yes || other == Changed::Yes).into()
    }
}

/// What the declaration gives a pass.
pub trait Declared {
    /// The declaration.
    fn info(&self) -> &'static PassInfo;

    /// The options as text with braces, fully spelled; the empty text when there are none.
    fn options(&self) -> String;
}

/// A pass with its options.
pub trait Pass: Declared + fmt::Debug + Send + Sync {
    /// Does the work on [`PassCx::graph`] (scope `Layer`) or on [`PassCx::module`] (scope `Module`).
    fn run(&self, cx: &mut PassCx<'_>) -> Result<Changed>;

    /// The pairs (activation, weight) of quantized matmuls that it may leave behind: the target must have kernels.
    fn emits(&self) -> Vec<(ElemTy, ElemTy)> {
        vec![]
    }

    /// What it rounds the f32 rows of all products to, when it leaves none as they are.
    fn rounds_rows(&self) -> Option<ElemTy> {
        None
    }

    /// The name filters among the options. Each must match something.
    fn patterns(&self) -> Vec<PatternUse<'_>> {
        vec![]
    }

    /// Checks the options beyond their types, before anything runs.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// What must hold before it runs, when that depends on options.
    fn needs(&self) -> Vec<Fact> {
        self.info().needs.to_vec()
    }

    /// What holds after it ran, when that depends on options.
    fn provides(&self) -> Vec<Fact> {
        self.info().provides.to_vec()
    }
}

/// `` `a`, `b` or `c` ``.
pub(crate) fn quoted(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => format!("`{one}`"),
        [most @ .., last] => {
            let most: Vec<String> = most.iter().map(|n| format!("`{n}`")).collect();
            format!("{} or `{last}`", most.join(", "))
        }
    }
}

/// Declares a pass: manual page, name, options with defaults, and what it needs and does.
///
/// ```text
/// pass! {
///     /// Manual page.
///     "name-in-pipelines" => pub struct Name {
///         /// Manual line.
///         option: f32 = 0.5,
///     }
///     needs: [target, layers, stat(absmax)], provides: [named(smooth)],    // both may be left out
///     scope: Layer, numerics: Exact, stats: keeps, version: 1      // `version` may be left out
/// }
/// ```
#[macro_export]
macro_rules! pass {
    (
        $(#[doc = $doc:literal])*
        $text:literal => pub struct $name:ident {
            $($(#[doc = $fdoc:literal])* $field:ident : $fty:ty = $default:expr),* $(,)?
        }
        $(needs: [$($need:ident $(($need_arg:ident))?),* $(,)?],)?
        $(provides: [$($gives:ident $(($gives_arg:ident))?),* $(,)?],)?
        scope: $scope:ident, numerics: $numerics:ident, stats: $stats:ident $(, version: $version:literal)? $(,)?
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq, $crate::serde::Serialize, $crate::serde::Deserialize)]
        #[serde(crate = "quantc_passes::serde", deny_unknown_fields, rename_all = "kebab-case", default)]
        pub struct $name {
            $($(#[doc = $fdoc])* pub $field: $fty,)*
        }
        impl ::core::default::Default for $name {
            fn default() -> Self {
                $name { $($field: $default,)* }
            }
        }
        impl $name {
            /// The declaration.
            pub const INFO: &'static $crate::pass::PassInfo = &$crate::pass::PassInfo {
                name: $text,
                doc: ::core::concat!($($doc, "\n"),*),
                options: &[$($crate::pass::OptionInfo {
                    field: ::core::stringify!($field),
                    ty: ::core::stringify!($fty),
                    default: ::core::stringify!($default),
                    doc: ::core::concat!("" $(, $fdoc)*),
                }),*],
                needs: &[$($($crate::__fact!($need $(($need_arg))?)),*)?],
                provides: &[$($($crate::__fact!($gives $(($gives_arg))?)),*)?],
                scope: $crate::pass::Scope::$scope,
                numerics: $crate::pass::Numerics::$numerics,
                stats: $crate::__stats!($stats),
                version: $crate::__version!($($version)?),
                read: |text| {
                    let pass: $name = $crate::pass::read_options(text)?;
                    ::core::result::Result::Ok(::std::boxed::Box::new(pass))
                },
            };
        }
        impl $crate::pass::Declared for $name {
            fn info(&self) -> &'static $crate::pass::PassInfo {
                Self::INFO
            }
            fn options(&self) -> ::std::string::String {
                $crate::pass::write_options(self)
            }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __fact {
    (layers) => {
        $crate::pass::Fact::Layers
    };
    (target) => {
        $crate::pass::Fact::Target
    };
    (data) => {
        $crate::pass::Fact::Data
    };
    (stat($name:ident)) => {
        $crate::pass::Fact::Stat(::core::stringify!($name))
    };
    (named($name:ident)) => {
        $crate::pass::Fact::Named(::core::stringify!($name))
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __stats {
    (keeps) => {
        $crate::pass::Stats::Keeps
    };
    (transforms) => {
        $crate::pass::Stats::Transforms
    };
    (drops) => {
        $crate::pass::Stats::Drops
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __version {
    () => {
        1
    };
    ($version:literal) => {
        $version
    };
}

/// Lists the passes of a family: the `mod` lines and the registry lines.
#[macro_export]
macro_rules! passes {
    ($($module:ident :: $name:ident),* $(,)?) => {
        $(mod $module;)*
        $(pub use $module::$name;)*

        /// The passes of this family.
        pub static ALL: &[&$crate::pass::PassInfo] = &[$($name::INFO),*];
    };
}
