//! The text form of modules, `.qir`: grammar, [`parse`] and [`print()`].
//!
//! ```text
//! file      := directive* header declaration* section*
//! directive := "//" text                            comment lines before everything else, kept for test harnesses
//! header    := "module" @name fields?               the fields are the model's facts
//! declaration :=
//!     "target" word                                 the target the text is for
//!   | "pipeline" string                             the pipeline applied so far
//!   | "shard" integer "=" string                    numbered from 0
//!   | "weight" @name ":" type "=" source
//!   | "state" @name ":" type
//!   | "layer" @name function
//!   | "main" function
//! source    := "file" integer "[" integer "..+" integer "]"
//!            | "inline" numbers | "splat" number | "blob" digest | "alias" @name
//! numbers   := number | "[" (numbers ("," numbers)*)? "]"      nested as the shape is; codes as what they mean
//! function  := "(" (param ("," param)*)? ")" "->" results "{" op* "return" (%name ("," %name)*)? "}"
//! param     := %name ":" type
//! results   := type | "(" (type ("," type)*)? ")"
//! op        := %name "=" word (operand ("," operand)*)? fields? (":" type)?
//! operand   := %name | @name | "none"
//! type      := "tensor" "<" (extent "x")* element ">"          extents: 4096, ?t, ?; elements: f32, f16, bf16, i32
//!                                                              or a scheme such as !q<int4:f16 block 128@1>
//! section   := "{-#" "calibration" (statistic "=" "[" (number ("," number)*)? "]")* "#-}"
//! statistic := %value.name ("in" @function)? | string         the function may be left out when there is one; the string
//!                                                              is a key that names no function of the module
//! ```
//!
//! Fields are described in [`fields`]; names with other characters than `A-Za-z0-9_$.-` are quoted, as in `@"a b"`;
//! comments run from `//` to the end of the line. An op ends with its line, unless that ends with a comma or inside
//! fields; else line breaks are white space.
//!
//! What holds:
//! - The printer always writes an op's type; the parser infers types that are left out. Attributes with default values
//!   and absent operands at the end are not printed.
//! - Weights, states and layers may be declared in any order, before or after what reads them. Values are defined
//!   before they are read. The order of weights, states and layers is kept.
//! - Names of values are kept. Names that are numbers mean nothing: such values are unnamed, and numbered when printed.
//! - Printing, parsing and printing again gives the same text. Modules are the [`same`] when their texts are.
//! - Any input is answered in time and memory in proportion to its length: nesting, ranks and the number of reported
//!   errors are bounded, and nothing is allocated for a weight beyond what is written for it.

mod elements;
pub mod fields;
mod lexer;
mod parser;
mod printer;

pub(crate) use elements::code_format;
pub use lexer::Pos;
pub use parser::parse;
pub(crate) use printer::{Line, Listing};
pub use printer::{attributes, print, print_graph, print_layer};

use crate::entity::{LayerId, OpId, StateId, WeightId};
use crate::module::Module;
use std::collections::BTreeMap;

/// The most axes that the type of a value in a text may have.
pub const MAX_RANK: usize = 8;

/// A function of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Function {
    /// A layer.
    Layer(LayerId),
    /// The entry.
    Main,
}

/// Something that has a line in the text of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The first line.
    Module,
    /// The declaration of a weight.
    Weight(WeightId),
    /// The declaration of a state.
    State(StateId),
    /// The line with the name, parameters and result types of a function.
    Function(Function),
    /// An op.
    Op(Function, OpId),
    /// The `return` of a function.
    Return(Function),
}

/// A module read from a text, with what the text says besides.
#[derive(Clone, Debug)]
pub struct Parsed {
    /// The module. It is well-formed as a text, but not verified.
    pub module: Module,
    /// The comment lines before the module, without `//` and the blanks around.
    pub directives: Vec<String>,
    /// Where things stand in the text.
    pub places: BTreeMap<Place, Pos>,
}

impl Parsed {
    /// The text of the first directive `key: text`.
    pub fn directive(&self, key: &str) -> Option<&str> {
        self.directives.iter().find_map(|d| d.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
    }
}

/// Whether two modules are the same but for the numbering of their values.
pub fn same(a: &Module, b: &Module) -> bool {
    print(a) == print(b)
}
