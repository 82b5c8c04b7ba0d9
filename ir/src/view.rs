//! petgraph's view of a graph: ops are nodes, uses of results are edges.
//!
//! Algorithms (topological order, dominators, reachability, components) run on `&Graph` directly; nothing is copied
//! and operand order stays a matter of [`crate::graph::Node::args`].

use crate::entity::{Entity, OpId};
use crate::graph::{Def, Graph};
use petgraph::visit;

impl visit::GraphBase for Graph {
    type NodeId = OpId;
    type EdgeId = (OpId, OpId);
}

impl visit::Visitable for Graph {
    type Map = std::collections::HashSet<OpId>;
    fn visit_map(&self) -> Self::Map {
        Self::Map::new()
    }
    fn reset_map(&self, map: &mut Self::Map) {
        map.clear();
    }
}

impl visit::IntoNodeIdentifiers for &Graph {
    type NodeIdentifiers = std::vec::IntoIter<OpId>;
    fn node_identifiers(self) -> Self::NodeIdentifiers {
        self.order().to_vec().into_iter()
    }
}

impl visit::NodeCount for Graph {
    fn node_count(&self) -> usize {
        self.order().len()
    }
}

impl visit::NodeIndexable for Graph {
    fn node_bound(&self) -> usize {
        self.order().iter().map(|op| op.index() + 1).max().unwrap_or(0)
    }
    fn to_index(&self, op: OpId) -> usize {
        op.index()
    }
    fn from_index(&self, index: usize) -> OpId {
        OpId::new(index)
    }
}

impl visit::IntoNeighbors for &Graph {
    type Neighbors = std::vec::IntoIter<OpId>;
    fn neighbors(self, op: OpId) -> Self::Neighbors {
        self.users(self.node(op).result).into_iter()
    }
}

impl visit::IntoNeighborsDirected for &Graph {
    type NeighborsDirected = std::vec::IntoIter<OpId>;
    fn neighbors_directed(self, op: OpId, direction: petgraph::Direction) -> Self::NeighborsDirected {
        match direction {
            petgraph::Direction::Outgoing => visit::IntoNeighbors::neighbors(self, op),
            petgraph::Direction::Incoming => {
                let defs = self.node(op).args.iter().filter_map(|&a| match self.value(a).def {
                    Def::Op(d) => Some(d),
                    _ => None,
                });
                defs.collect::<Vec<_>>().into_iter()
            }
        }
    }
}
