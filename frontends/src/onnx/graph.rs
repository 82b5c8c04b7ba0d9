//! Walking the nodes of graphs, subgraphs and functions.

use super::build::{Build, Val};
use super::node::Cx;
use super::ops::{self, OnnxOp};
use super::proto::{AttributeProto, FunctionProto, GraphProto, NodeProto, OperatorSetIdProto};
use super::tensor::Files;
use crate::json::shown;
use quantc_ir::diag::{Diag, Diags, Loc, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// How deep functions may call functions.
const MOST_CALLS: usize = 24;

/// Nodes of one model, those of functions counted each time they are called, beside one for each 16 bytes of its file.
const MOST_NODES: u64 = 1 << 16;

/// Versions of operators by domain; the default domain is the empty text.
pub(crate) type Opsets = BTreeMap<String, i64>;

/// What names stand for, in a graph and those around it.
pub(crate) struct Scope<'s> {
    parent: Option<&'s Scope<'s>>,
    names: BTreeMap<String, Option<Val>>,
    /// Attributes of the function this is the body of.
    attributes: Rc<BTreeMap<String, AttributeProto>>,
    opsets: Rc<Opsets>,
}

impl<'s> Scope<'s> {
    pub(crate) fn new(opsets: Opsets) -> Scope<'s> {
        Scope { parent: None, names: BTreeMap::new(), attributes: Rc::default(), opsets: Rc::new(opsets) }
    }

    fn inside(parent: &'s Scope<'s>) -> Scope<'s> {
        let (attributes, opsets) = (Rc::clone(&parent.attributes), Rc::clone(&parent.opsets));
        Scope { parent: Some(parent), names: BTreeMap::new(), attributes, opsets }
    }

    fn get(&self, name: &str) -> Option<Option<Val>> {
        let mut scope = Some(self);
        while let Some(s) = scope {
            if let Some(val) = s.names.get(name) {
                return Some(val.clone());
            }
            scope = s.parent;
        }
        None
    }

    pub(crate) fn set(&mut self, name: &str, val: Option<Val>) -> Result<()> {
        if self.names.insert(name.into(), val).is_some() {
            return Err(Diag::input(format!("the name `{}` is given twice", shown(name))));
        }
        Ok(())
    }
}

/// The name of a domain; the default one has two names.
fn domain(name: Option<&str>) -> &str {
    match name.unwrap_or_default() {
        "ai.onnx" => "",
        name => name,
    }
}

/// Versions of operators, as a model or a function lists them.
pub(crate) fn opsets(list: &[OperatorSetIdProto]) -> Opsets {
    list.iter().map(|o| (domain(o.domain.as_deref()).to_string(), o.version.unwrap_or(1))).collect()
}

/// The functions of a model.
type Functions<'a> = BTreeMap<(&'a str, &'a str, &'a str), &'a FunctionProto>;

/// The import of a model.
pub(crate) struct Importer<'a> {
    pub(crate) build: Build<'a>,
    pub(crate) files: Files<'a>,
    functions: Functions<'a>,
    /// Nodes that may still be imported.
    nodes: u64,
    calls: usize,
}

/// What a node is, for messages.
fn place(node: &NodeProto) -> Loc {
    let op = shown(node.op_type.as_deref().unwrap_or_default());
    let name = node.name.as_deref().filter(|n| !n.is_empty());
    let output = || node.output.iter().map(String::as_str).find(|o| !o.is_empty());
    Loc::Item(match (name, output()) {
        (Some(name), _) => format!("node `{}` ({op})", shown(name)),
        (None, Some(output)) => format!("the node ({op}) that makes `{}`", shown(output)),
        (None, None) => format!("a node ({op}) without a name"),
    })
}

impl<'a> Importer<'a> {
    pub(crate) fn new(
        build: Build<'a>,
        files: Files<'a>,
        functions: &'a [FunctionProto],
    ) -> Result<Importer<'a>> {
        let mut known = Functions::new();
        for f in functions {
            let name = f.name.as_deref().unwrap_or_default();
            let key = (domain(f.domain.as_deref()), name, f.overload.as_deref().unwrap_or_default());
            if known.insert(key, f).is_some() {
                return Err(Diag::input(format!("the function `{}` is defined twice", shown(name))));
            }
        }
        let nodes = MOST_NODES + files.size() / 16;
        Ok(Importer { build, files, functions: known, nodes, calls: 0 })
    }

    fn function(&self, node: &NodeProto) -> Option<&'a FunctionProto> {
        let name = node.op_type.as_deref().unwrap_or_default();
        let domain = domain(node.domain.as_deref());
        self.functions.get(&(domain, name, node.overload.as_deref().unwrap_or_default())).copied()
    }

    /// Every operator of the model that is not supported, one problem each with its nodes.
    pub(crate) fn unsupported(&self, graph: &GraphProto, versions: &Opsets) -> Diags {
        let mut found: BTreeMap<(String, String, String), Vec<String>> = BTreeMap::new();
        let mut visited = BTreeSet::new();
        self.scan(&graph.node, versions, &mut visited, &mut found);
        let mut problems = Diags::default();
        for ((domain, op, why), nodes) in found {
            let of = if domain.is_empty() { String::new() } else { format!("{}.", shown(&domain)) };
            let listed: Vec<String> = nodes.iter().take(8).map(|n| format!("`{}`", shown(n))).collect();
            let more = nodes.len().saturating_sub(listed.len());
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let (n, listed) = (nodes.len(), listed.join(", "));
            let text = format!("the operator {of}{} {why}: {n} nodes, {listed}{more}", shown(&op));
            problems.push(Diag::input(text));
        }
        problems
    }

    fn scan<'n>(
        &self,
        nodes: &'n [NodeProto],
        versions: &Opsets,
        visited: &mut BTreeSet<*const FunctionProto>,
        found: &mut BTreeMap<(String, String, String), Vec<String>>,
    ) where
        'a: 'n,
    {
        for node in nodes {
            for graph in node.attribute.iter().filter_map(|a| a.g.as_deref()) {
                self.scan(&graph.node, versions, visited, found);
            }
            if let Some(f) = self.function(node) {
                if visited.insert(f) {
                    self.scan(&f.node, &opsets(&f.opset_import), visited, found);
                }
                continue;
            }
            if let Err(why) = find(node, versions) {
                let output = || node.output.first().cloned().unwrap_or_default();
                let name = node.name.clone().filter(|n| !n.is_empty()).unwrap_or_else(output);
                let op = node.op_type.clone().unwrap_or_default();
                let key = (domain(node.domain.as_deref()).to_string(), op, why);
                found.entry(key).or_default().push(name);
            }
        }
    }

    /// Imports nodes; their results become names of `scope`.
    pub(crate) fn run(&mut self, nodes: &[NodeProto], scope: &mut Scope<'_>) -> Result<()> {
        for node in nodes {
            self.node(node, scope).map_err(|e| e.at(place(node)))?;
        }
        Ok(())
    }

    fn node(&mut self, node: &NodeProto, scope: &mut Scope<'_>) -> Result<()> {
        let left = self.nodes.checked_sub(1);
        self.nodes = left
            .ok_or_else(|| Diag::input("the model unfolds to more nodes than a file of its size may have"))?;
        let resolve = |name: &String| match name.as_str() {
            "" => Ok(None),
            name => scope.get(name).ok_or_else(|| {
                Diag::input(format!("it reads `{}`, which nothing before it makes", shown(name)))
                    .help("nodes stand behind those they read; a circle is not a graph")
            }),
        };
        let inputs: Vec<Option<Val>> = node.input.iter().map(resolve).collect::<Result<_>>()?;
        let held = Rc::clone(&scope.attributes);
        let mut attributes: Vec<(&str, &AttributeProto)> = vec![];
        for attr in &node.attribute {
            let name = attr.name.as_deref().unwrap_or_default();
            match attr.ref_attr_name.as_deref().filter(|r| !r.is_empty()) {
                None => attributes.push((name, attr)),
                Some(of) => attributes.extend(held.get(of).map(|a| (name, a))),
            }
        }
        let results = match self.function(node) {
            Some(f) => self.call(f, inputs, &attributes)?,
            None => {
                let (op, opset) = find(node, &scope.opsets).map_err(|why| {
                    let name = shown(node.op_type.as_deref().unwrap_or_default());
                    Diag::input(format!("the operator {name} {why}"))
                })?;
                let outputs = node.output.iter().rposition(|o| !o.is_empty()).map_or(0, |i| i + 1);
                let read = BTreeSet::new();
                let scope = &*scope;
                let mut cx = Cx { importer: self, inputs, outputs, opset, attributes, read, scope };
                let results = (op.import)(&mut cx)?;
                cx.finish()?;
                results
            }
        };
        for (i, name) in node.output.iter().enumerate().filter(|(_, n)| !n.is_empty()) {
            let result = results.get(i).cloned().flatten();
            let result = result.ok_or_else(|| Diag::input(format!("its result {i} is not supported")))?;
            self.build.name(&result, name);
            scope.set(name, Some(result))?;
        }
        Ok(())
    }

    /// The results of a function.
    fn call(
        &mut self,
        f: &'a FunctionProto,
        inputs: Vec<Option<Val>>,
        attributes: &[(&str, &AttributeProto)],
    ) -> Result<Vec<Option<Val>>> {
        let name = || shown(f.name.as_deref().unwrap_or_default());
        if self.calls >= MOST_CALLS {
            return Err(Diag::input(format!("functions call one another more than {MOST_CALLS} deep"))
                .context(format!("importing the function `{}`", name())));
        }
        let mut bound: BTreeMap<String, AttributeProto> = BTreeMap::new();
        for attr in &f.attribute_proto {
            bound.insert(attr.name.clone().unwrap_or_default(), attr.clone());
        }
        for &(name, attr) in attributes {
            bound.insert(name.to_string(), attr.clone());
        }
        let mut scope = Scope {
            parent: None,
            names: BTreeMap::new(),
            attributes: Rc::new(bound),
            opsets: Rc::new(opsets(&f.opset_import)),
        };
        if inputs.len() > f.input.len() {
            let (got, want) = (inputs.len(), f.input.len());
            return Err(Diag::input(format!("the function `{}` takes {want} inputs, got {got}", name())));
        }
        for (i, input) in f.input.iter().enumerate() {
            scope.set(input, inputs.get(i).cloned().flatten())?;
        }
        self.calls += 1;
        let done = self.run(&f.node, &mut scope);
        self.calls -= 1;
        done.map_err(|e| e.context(format!("importing the function `{}`", name())))?;
        Ok(f.output.iter().map(|o| scope.get(o).flatten()).collect())
    }

    /// The results of a subgraph whose inputs are `inputs`; it also reads what is around it.
    pub(crate) fn subgraph(
        &mut self,
        graph: &GraphProto,
        around: &Scope<'_>,
        inputs: Vec<Val>,
    ) -> Result<Vec<Val>> {
        let mut scope = Scope::inside(around);
        if inputs.len() != graph.input.len() {
            let (got, want) = (inputs.len(), graph.input.len());
            return Err(Diag::input(format!("a subgraph takes {want} inputs, got {got}")));
        }
        for (info, val) in graph.input.iter().zip(inputs) {
            scope.set(info.name.as_deref().unwrap_or_default(), Some(val))?;
        }
        self.initializers(graph, &mut scope)?;
        self.run(&graph.node, &mut scope)?;
        self.outputs(graph, &scope)
    }

    /// Makes the constants of a graph names of `scope`.
    pub(crate) fn initializers(&mut self, graph: &GraphProto, scope: &mut Scope<'_>) -> Result<()> {
        if !graph.sparse_initializer.is_empty() {
            return Err(Diag::input("`sparse_initializer`: sparse tensors are not supported"));
        }
        for tensor in &graph.initializer {
            let constant = self.files.constant(tensor, &mut self.build.module)?;
            let name = tensor.name.as_deref().unwrap_or_default();
            if name.is_empty() {
                return Err(Diag::input("an initializer has no name"));
            }
            scope.set(name, Some(Val::Const(Rc::new(constant))))?;
        }
        Ok(())
    }

    /// The values of a graph's outputs.
    pub(crate) fn outputs(&mut self, graph: &GraphProto, scope: &Scope<'_>) -> Result<Vec<Val>> {
        let one = |info: &super::proto::ValueInfoProto| {
            let name = info.name.as_deref().unwrap_or_default();
            let val = scope.get(name).flatten();
            val.ok_or_else(|| Diag::input(format!("the output `{}` is not computed", shown(name))))
        };
        graph.output.iter().map(one).collect()
    }
}

/// The operator of a node and the version that the model uses, or why there is none.
fn find(node: &NodeProto, versions: &Opsets) -> Result<(&'static OnnxOp, i64), String> {
    let (op, domain) = (node.op_type.as_deref().unwrap_or_default(), domain(node.domain.as_deref()));
    let version = versions.get(domain).copied();
    let known = ops::find(domain, op).ok_or("is not supported")?;
    let version = version.or((!domain.is_empty()).then_some(1));
    let version = version.ok_or("belongs to a domain whose version the model does not give")?;
    if version < known.since {
        return Err(format!("of version {version} is not supported, it is from version {} on", known.since));
    }
    Ok((known, version))
}
