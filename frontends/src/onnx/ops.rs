//! Operators: one file for each family, one entry for each operator.
//!
//! To add one: write its entry in the `onnx_ops!` of its family. Tables and messages follow from the entries.

use super::build::Val;
use super::node::Cx;
use quantc_ir::diag::Result;

/// The results of a node, as far as they are supported.
pub(crate) type Results = Result<Vec<Option<Val>>>;

/// How an operator is imported.
pub(crate) struct OnnxOp {
    /// The domain; empty for the default one.
    pub(crate) domain: &'static str,
    /// The name.
    pub(crate) name: &'static str,
    /// The first version of the domain's operators that is supported.
    pub(crate) since: i64,
    /// What is covered.
    pub(crate) doc: &'static str,
    /// Builds the node's results.
    pub(crate) import: fn(&mut Cx<'_, '_>) -> Results,
}

/// One result.
pub(crate) fn one(val: Result<Val>) -> Results {
    val.map(|v| vec![Some(v)])
}

/// Declares the operators of a family: name, the first version that is supported, and the importer.
macro_rules! onnx_ops {
    ($($(#[doc = $doc:literal])* $domain:literal $name:literal since $since:literal => $import:expr;)*) => {
        /// The operators of this family.
        pub(super) const OPS: &[crate::onnx::ops::OnnxOp] = &[$(crate::onnx::ops::OnnxOp {
            domain: $domain,
            name: $name,
            since: $since,
            doc: concat!("" $(, $doc)*),
            import: $import,
        }),*];
    };
}

macro_rules! families {
    ($($family:ident),* $(,)?) => {
        $(mod $family;)*

        /// Every family with its operators.
        const FAMILIES: &[(&str, &[OnnxOp])] = &[$((stringify!($family), $family::OPS)),*];
    };
}

families! {
    attention, constants, control, elementwise, fused, indexing, layout, linear, losses, normalization, pooling, quantized,
    recurrent, reductions, resize, shapes,
}

/// The operator of a domain.
pub(crate) fn find(domain: &str, name: &str) -> Option<&'static OnnxOp> {
    FAMILIES.iter().flat_map(|(_, ops)| ops.iter()).find(|op| op.domain == domain && op.name == name)
}

/// An operator that is imported, for tables.
#[derive(Clone, Copy, Debug)]
pub struct Operator {
    /// The family.
    pub family: &'static str,
    /// The domain; empty for the default one.
    pub domain: &'static str,
    /// The name.
    pub name: &'static str,
    /// The first version that is supported.
    pub since: i64,
    /// What is covered.
    pub doc: &'static str,
}

/// Every operator that is imported, by family.
pub fn operators() -> impl Iterator<Item = Operator> {
    let all = FAMILIES.iter().flat_map(|&(family, ops)| ops.iter().map(move |op| (family, op)));
    all.map(|(family, op)| Operator {
        family,
        domain: op.domain,
        name: op.name,
        since: op.since,
        doc: op.doc,
    })
}
