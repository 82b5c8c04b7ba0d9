//! A node under import: its operands and attributes, read with their types.

use super::build::{Build, REST, Val};
use super::graph::{Importer, Scope};
use super::proto::{AttributeProto, GraphProto, TensorProto};
use crate::json::shown;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::eval::Tensor;
use quantc_ir::ty::Dim;
use std::collections::BTreeSet;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

/// One node, and what it may build with.
pub(crate) struct Cx<'c, 'a> {
    pub(crate) importer: &'c mut Importer<'a>,
    pub(crate) inputs: Vec<Option<Val>>,
    /// Number of results that the node names, up to the last one that has a name.
    pub(crate) outputs: usize,
    /// The version of the operators of the node's domain.
    pub(crate) opset: i64,
    /// Attributes, references to those of a function resolved.
    pub(crate) attributes: Vec<(&'c str, &'c AttributeProto)>,
    pub(crate) read: BTreeSet<&'static str>,
    /// What names stand for around the node.
    pub(crate) scope: &'c Scope<'c>,
}

impl<'a> Deref for Cx<'_, 'a> {
    type Target = Build<'a>;
    fn deref(&self) -> &Build<'a> {
        &self.importer.build
    }
}

impl<'a> DerefMut for Cx<'_, 'a> {
    fn deref_mut(&mut self) -> &mut Build<'a> {
        &mut self.importer.build
    }
}

/// What attribute types are called.
fn type_name(number: i32) -> &'static str {
    match number {
        1 => "a float",
        2 => "an integer",
        3 => "a text",
        4 => "a tensor",
        5 => "a graph",
        6 => "floats",
        7 => "integers",
        8 => "texts",
        _ => "of another type",
    }
}

impl<'c> Cx<'c, '_> {
    /// Operand `i`.
    pub(crate) fn input(&self, i: usize) -> Result<Val> {
        self.opt(i).ok_or_else(|| Diag::input(format!("input {i} is missing")))
    }

    /// Operand `i` when it is present.
    pub(crate) fn opt(&self, i: usize) -> Option<Val> {
        self.inputs.get(i).cloned().flatten()
    }

    /// All operands, each of which must be present.
    pub(crate) fn all(&self) -> Result<Vec<Val>> {
        (0..self.inputs.len()).map(|i| self.input(i)).collect()
    }

    fn attr(&mut self, name: &'static str, number: i32) -> Result<Option<&'c AttributeProto>> {
        self.read.insert(name);
        let found = self.attributes.iter().find(|a| a.0 == name).map(|a| a.1);
        let Some(attr) = found else { return Ok(None) };
        // Files of the first versions do not say the type.
        match attr.r#type.unwrap_or(0) {
            0 => Ok(Some(attr)),
            t if t == number => Ok(Some(attr)),
            t => {
                let (is, want) = (type_name(t), type_name(number));
                Err(Diag::input(format!("attribute `{name}` is {is}, expected {want}")))
            }
        }
    }

    /// Whether the attribute is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.attributes.iter().any(|a| a.0 == name)
    }

    /// An integer.
    pub(crate) fn int(&mut self, name: &'static str) -> Result<Option<i64>> {
        Ok(self.attr(name, 2)?.map(|a| a.i.unwrap_or(0)))
    }

    /// An integer that is 0 or 1.
    pub(crate) fn flag(&mut self, name: &'static str, default: bool) -> Result<bool> {
        match self.int(name)? {
            None => Ok(default),
            Some(0) => Ok(false),
            Some(1) => Ok(true),
            Some(n) => Err(Diag::input(format!("attribute `{name}` is {n}, expected 0 or 1"))),
        }
    }

    /// A float.
    pub(crate) fn float(&mut self, name: &'static str, default: f32) -> Result<f64> {
        Ok(self.opt_float(name)?.unwrap_or(f64::from(default)))
    }

    /// A float, if it is given.
    pub(crate) fn opt_float(&mut self, name: &'static str) -> Result<Option<f64>> {
        Ok(self.attr(name, 1)?.map(|a| f64::from(a.f.unwrap_or(0.0))))
    }

    /// A text.
    pub(crate) fn text(&mut self, name: &'static str, default: &str) -> Result<String> {
        let Some(attr) = self.attr(name, 3)? else { return Ok(default.into()) };
        let bytes = attr.s.clone().unwrap_or_default();
        let text = std::str::from_utf8(&bytes);
        Ok(text.map_err(|_| Diag::input(format!("attribute `{name}` is not a text")))?.into())
    }

    /// Integers.
    pub(crate) fn ints_attr(&mut self, name: &'static str) -> Result<Option<Vec<i64>>> {
        Ok(self.attr(name, 7)?.map(|a| a.ints.clone()))
    }

    /// Floats.
    pub(crate) fn floats_attr(&mut self, name: &'static str) -> Result<Option<Vec<f32>>> {
        Ok(self.attr(name, 6)?.map(|a| a.floats.clone()))
    }

    /// A tensor.
    pub(crate) fn tensor_attr(&mut self, name: &'static str) -> Result<Option<Val>> {
        let Some(attr) = self.attr(name, 4)? else { return Ok(None) };
        let missing = || Diag::input(format!("attribute `{name}` has no tensor"));
        let tensor: &TensorProto = attr.t.as_deref().ok_or_else(missing)?;
        let importer = &mut *self.importer;
        let constant = importer.files.constant(tensor, &mut importer.build.module)?;
        Ok(Some(Val::Const(Rc::new(constant))))
    }

    /// A graph.
    pub(crate) fn graph_attr(&mut self, name: &'static str) -> Result<&'c GraphProto> {
        let attr = self.attr(name, 5)?;
        let graph = attr.and_then(|a| a.g.as_deref());
        graph.ok_or_else(|| Diag::input(format!("attribute `{name}` is missing")))
    }

    /// Says that the attribute makes no difference here.
    pub(crate) fn ignore(&mut self, names: &[&'static str]) {
        self.read.extend(names);
    }

    /// Refuses attributes that nobody has read: they might change what the node means.
    pub(crate) fn finish(&self) -> Result<()> {
        for &(name, _) in &self.attributes {
            if !self.read.contains(name) {
                return Err(Diag::input(format!("attribute `{}` is not supported", shown(name))));
            }
        }
        Ok(())
    }

    /// The elements of operand `i`, which must be known when the model is compiled.
    pub(crate) fn must_know(&mut self, i: usize, what: &str) -> Result<Rc<Tensor>> {
        let val = self.input(i)?;
        if let Some(known) = self.known(&val) {
            return known;
        }
        self.need(&val);
        let text = format!("input {i} (`{what}`) must be known when the model is compiled");
        Err(Diag::input(text).help("fix the inputs that it is computed from, or simplify the model"))
    }

    /// The integers of operand `i`, which must be known; `None` when the operand is absent.
    pub(crate) fn known_ints(&mut self, i: usize, what: &str) -> Result<Option<Vec<i64>>> {
        if self.opt(i).is_none() {
            return Ok(None);
        }
        let tensor = self.must_know(i, what)?;
        if tensor.ty.elem.int().is_none() || tensor.ty.rank() > 1 {
            return Err(Diag::input(format!(
                "input {i} (`{what}`) has type {}, expected integers",
                tensor.ty
            )));
        }
        let fit = |n: i128| i64::try_from(n).map_err(|_| Diag::input(format!("`{what}` has the number {n}")));
        Ok(Some(tensor.ints().into_iter().map(fit).collect::<Result<_>>()?))
    }

    /// Integers that were an attribute in older versions and are operand `i` in newer ones.
    pub(crate) fn ints_of(&mut self, i: usize, name: &'static str) -> Result<Option<Vec<i64>>> {
        match self.ints_attr_if(name)? {
            Some(ints) => Ok(Some(ints)),
            None => self.known_ints(i, name),
        }
    }

    fn ints_attr_if(&mut self, name: &'static str) -> Result<Option<Vec<i64>>> {
        if self.has(name) { self.ints_attr(name) } else { Ok(None) }
    }

    /// Extents that operand `i` holds: numbers, and symbols where they are not known. Negative numbers are `Err`.
    pub(crate) fn extents_of(&mut self, i: usize, what: &str) -> Result<Vec<Result<Dim, i64>>> {
        if let Val::Extents { dims, .. } = self.input(i)? {
            return Ok(dims.iter().map(|&d| if d == REST { Err(-1) } else { Ok(d) }).collect());
        }
        let ints = self.known_ints(i, what)?.unwrap_or_default();
        Ok(ints.into_iter().map(|n| u64::try_from(n).map(Dim::Static).map_err(|_| n)).collect())
    }

    /// Extents that operand `i` holds, none of which may be negative.
    pub(crate) fn shape_of(&mut self, i: usize, what: &str) -> Result<Vec<Dim>> {
        let one = |d: Result<Dim, i64>| d.map_err(|n| Diag::input(format!("`{what}` has the extent {n}")));
        let dims: Vec<Dim> = self.extents_of(i, what)?.into_iter().map(one).collect::<Result<_>>()?;
        self.check_rank(dims.len())?;
        Ok(dims)
    }

    /// Refuses more axes than a type has.
    pub(crate) fn check_rank(&self, rank: usize) -> Result<()> {
        let most = quantc_ir::text::MAX_RANK;
        if rank <= most { Ok(()) } else { Err(Diag::input(format!("{rank} axes are more than {most}"))) }
    }

    /// `axis` of a tensor of `rank` axes; negative ones count from the end.
    pub(crate) fn axis(&self, axis: i64, rank: usize) -> Result<usize> {
        let at = if axis < 0 { axis + rank as i64 } else { axis };
        let found = usize::try_from(at).ok().filter(|&a| a < rank);
        found.ok_or_else(|| Diag::input(format!("there is no axis {axis} among {rank}")))
    }

    /// Axes in order, each once.
    pub(crate) fn axes(&self, axes: &[i64], rank: usize) -> Result<Vec<usize>> {
        let mut axes = axes.iter().map(|&a| self.axis(a, rank)).collect::<Result<Vec<_>>>()?;
        axes.sort_unstable();
        let n = axes.len();
        axes.dedup();
        if axes.len() == n { Ok(axes) } else { Err(Diag::input("an axis is named twice")) }
    }
}
