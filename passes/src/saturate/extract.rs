//! Choosing one node of each class so that the whole is cheap, shared values being paid once.
//!
//! A tree cost would count a shared value once for each path to it, which multiplies with every residual connection.
//! Here each class knows the *set* of classes that its best expression is made of; the price of an expression is the
//! sum over that set. Classes are improved until nothing gets cheaper.
//!
//! Of nodes that cost the same, the greater one is taken, so that the choice does not depend on the order of rules.

use super::cost::Cost;
use super::enode::{ENode, Graph, Head};
use egg::Id;
use quantc_ir::diag::{Diag, Result};
use std::collections::BTreeMap;

/// Prices are cut here, so that sums over a region do not overflow.
const MOST: u64 = 1 << 44;

/// A set of classes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Set(Vec<u64>);

impl Set {
    fn empty(n: usize) -> Set {
        Set(vec![0; n.div_ceil(64)])
    }
    fn add(&mut self, i: usize) {
        self.0[i / 64] |= 1 << (i % 64);
    }
    fn has(&self, i: usize) -> bool {
        self.0[i / 64] >> (i % 64) & 1 == 1
    }
    fn add_all(&mut self, other: &Set) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a |= b);
    }
    fn sum(&self, price: &[u64]) -> u64 {
        let mut total = 0u64;
        for (at, &word) in self.0.iter().enumerate() {
            let mut word = word;
            while word != 0 {
                total += price[at * 64 + word.trailing_zeros() as usize];
                word &= word - 1;
            }
        }
        total
    }
}

/// One node for each class that is needed.
pub(super) struct Choice {
    index: BTreeMap<Id, usize>,
    nodes: Vec<Option<ENode>>,
}

impl Choice {
    /// The choice of these nodes; ids and operands are canonical.
    pub(super) fn of(nodes: impl Iterator<Item = (Id, ENode)>) -> Choice {
        let (ids, nodes): (Vec<Id>, Vec<Option<ENode>>) = nodes.map(|(id, node)| (id, Some(node))).unzip();
        Choice { index: ids.into_iter().enumerate().map(|(i, id)| (id, i)).collect(), nodes }
    }

    /// The node of a class.
    pub(super) fn node(&self, egraph: &Graph, id: Id) -> Result<&ENode> {
        let node = self.index.get(&egraph.find(id)).and_then(|&i| self.nodes[i].as_ref());
        node.ok_or_else(|| Diag::bug("a class without an expression"))
    }
}

struct Candidate {
    node: ENode,
    price: u64,
    args: Vec<usize>,
}

/// The cheapest expression found for each class. `original` is a choice known to be acyclic, one node for each class
/// of the region; it is kept when nothing cheaper is found for the whole.
pub(super) fn extract(
    egraph: &Graph,
    cost: &dyn Cost,
    roots: &[Id],
    original: &[(Id, ENode)],
) -> Result<Choice> {
    let mut ids: Vec<Id> = egraph.classes().map(|c| c.id).collect();
    ids.sort_unstable();
    let index: BTreeMap<Id, usize> = ids.iter().enumerate().map(|(i, &id)| (id, i)).collect();
    let at = |id: Id| index[&egraph.find(id)];
    let candidate = |node: &ENode| {
        let node = node.clone().map_children_to(egraph);
        let args = node.args.iter().map(|&a| at(a)).collect();
        Candidate { price: price(egraph, cost, &node), args, node }
    };
    let candidates: Vec<Vec<Candidate>> = ids
        .iter()
        .map(|&id| {
            let mut all: Vec<Candidate> = egraph[id].nodes.iter().map(&candidate).collect();
            all.sort_by(|a, b| b.node.cmp(&a.node));
            all.dedup_by(|a, b| a.node == b.node);
            all
        })
        .collect();

    let n = ids.len();
    let mut chosen: Vec<Option<usize>> = vec![None; n];
    let mut sets: Vec<Option<Set>> = vec![None; n];
    let mut prices = vec![0u64; n];
    // Each round settles at least the classes whose operands are settled; prices only fall after that.
    for _ in 0..=n {
        let mut improved = false;
        for class in 0..n {
            let mut best: Option<(u64, usize, Set)> = None;
            for (i, c) in candidates[class].iter().enumerate() {
                let mut set = Set::empty(n);
                let ready = c.args.iter().all(|&a| sets[a].as_ref().map(|s| set.add_all(s)).is_some());
                if !ready || set.has(class) {
                    continue;
                }
                let total = set.sum(&prices) + c.price;
                if best.as_ref().is_none_or(|b| total < b.0) {
                    set.add(class);
                    best = Some((total, i, set));
                }
            }
            let Some((_, i, set)) = best else { continue };
            if chosen[class] != Some(i) || sets[class].as_ref() != Some(&set) {
                chosen[class] = Some(i);
                prices[class] = candidates[class][i].price;
                sets[class] = Some(set);
                improved = true;
            }
        }
        if !improved {
            break;
        }
    }

    let roots: Vec<usize> = roots.iter().map(|&r| at(r)).collect();
    let mut first: Vec<Option<Candidate>> = (0..n).map(|_| None).collect();
    for (id, node) in original {
        first[at(*id)].get_or_insert_with(|| candidate(node));
    }
    let found: Vec<Option<&Candidate>> =
        (0..n).map(|class| chosen[class].map(|i| &candidates[class][i])).collect();
    let as_before: Vec<Option<&Candidate>> = first.iter().map(Option::as_ref).collect();
    let better = match (whole(&found, &roots), whole(&as_before, &roots)) {
        (Some(new), Some(old)) => new <= old,
        (new, _) => new.is_some(),
    };
    let best = if better { found } else { as_before };
    Ok(Choice { index, nodes: best.into_iter().map(|c| c.map(|c| c.node.clone())).collect() })
}

/// The price of everything that `roots` need, each class once; `None` when a class depends on itself or has no node.
fn whole(choice: &[Option<&Candidate>], roots: &[usize]) -> Option<u64> {
    // 0: not seen, 1: its operands are being visited, 2: done.
    let mut state = vec![0u8; choice.len()];
    let mut total = 0u64;
    let mut stack: Vec<(usize, usize)> = vec![];
    for &root in roots {
        if state[root] == 0 {
            state[root] = 1;
            stack.push((root, 0));
        }
        while let Some((class, arg)) = stack.pop() {
            let c = choice[class]?;
            let Some(&next) = c.args.get(arg) else {
                state[class] = 2;
                total += c.price;
                continue;
            };
            stack.push((class, arg + 1));
            match state[next] {
                0 => {
                    state[next] = 1;
                    stack.push((next, 0));
                }
                1 => return None,
                _ => {}
            }
        }
    }
    Some(total)
}

/// The price of one node; leaves are free.
fn price(egraph: &Graph, cost: &dyn Cost, node: &ENode) -> u64 {
    let op = match &node.head {
        Head::Op(op) => op,
        Head::Effect(..) | Head::Leaf(_) | Head::None => return 0,
    };
    let Ok(out) = super::enode::infer(egraph, op, &node.args) else { return MOST };
    let args: Vec<_> = node.args.iter().map(|&a| egraph[a].data.ty.as_ref()).collect();
    cost.cost(op, &args, &out).min(MOST)
}

impl ENode {
    /// The node with canonical children.
    pub(super) fn map_children_to(mut self, egraph: &Graph) -> ENode {
        self.args.iter_mut().for_each(|a| *a = egraph.find(*a));
        self
    }
}
