//! Where the time of a run went, as a tree of pipeline steps.
//!
//! A step that runs on many layers is one node with a count. Below a pass are the parts it measured itself: analyses,
//! groups of rules.

use std::fmt;
use std::time::Duration;

/// The tree of a run.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    roots: Vec<Node>,
    /// Places of the open steps.
    open: Vec<usize>,
}

/// One step, or one part of a pass.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Node {
    /// The step's place among its siblings in the pipeline; parts of passes have none.
    #[serde(skip)]
    step: Option<usize>,
    /// Name of the pass, the group or the part.
    pub name: String,
    /// How often it ran.
    pub count: usize,
    /// Seconds, what is below included.
    pub seconds: f64,
    /// What is below.
    pub parts: Vec<Node>,
}

impl Timing {
    /// The steps of the pipeline.
    pub fn steps(&self) -> &[Node] {
        &self.roots
    }

    /// All seconds.
    pub fn seconds(&self) -> f64 {
        self.roots.iter().map(|n| n.seconds).sum()
    }

    /// Each pass with how often it ran and its seconds, over the whole pipeline, in order of first appearance.
    pub fn passes(&self) -> Vec<(&str, usize, f64)> {
        fn walk<'a>(nodes: &'a [Node], sums: &mut Vec<(&'a str, usize, f64)>) {
            for node in nodes.iter().filter(|n| n.step.is_some()) {
                match sums.iter_mut().find(|(name, ..)| *name == node.name) {
                    // Groups are the sum of what is in them.
                    _ if node.parts.iter().any(|n| n.step.is_some()) => walk(&node.parts, sums),
                    Some((_, count, seconds)) => {
                        (*count, *seconds) = (*count + node.count, *seconds + node.seconds)
                    }
                    None => sums.push((&node.name, node.count, node.seconds)),
                }
            }
        }
        let mut sums = vec![];
        walk(&self.roots, &mut sums);
        sums
    }

    pub(super) fn enter(&mut self, step: usize, name: &str) {
        let place = find(self.siblings(), Some(step), name);
        self.open.push(place);
    }

    pub(super) fn leave(&mut self, time: Duration) {
        if let Some(place) = self.open.pop() {
            count(&mut self.siblings()[place], time);
        }
    }

    /// Adds to a part of the step entered last.
    pub(super) fn part(&mut self, name: &str, time: Duration) {
        let parts = self.siblings();
        let place = find(parts, None, name);
        count(&mut parts[place], time);
    }

    /// The nodes below the step entered last.
    fn siblings(&mut self) -> &mut Vec<Node> {
        self.open.iter().fold(&mut self.roots, |nodes, &i| &mut nodes[i].parts)
    }
}

fn count(node: &mut Node, time: Duration) {
    node.count += 1;
    node.seconds += time.as_secs_f64();
}

fn find(nodes: &mut Vec<Node>, step: Option<usize>, name: &str) -> usize {
    let known = nodes.iter().position(|n| n.step == step && n.name == name);
    known.unwrap_or_else(|| {
        nodes.push(Node { step, name: name.into(), count: 0, seconds: 0.0, parts: vec![] });
        nodes.len() - 1
    })
}

impl serde::Serialize for Timing {
    fn serialize<S: serde::Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        self.roots.serialize(out)
    }
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.seconds();
        writeln!(f, "{all:10.3} s  100.0 %  all passes")?;
        self.roots.iter().try_for_each(|n| print(f, n, 1, all))
    }
}

fn print(f: &mut fmt::Formatter<'_>, node: &Node, depth: usize, all: f64) -> fmt::Result {
    let share = if all > 0.0 { 100.0 * node.seconds / all } else { 0.0 };
    write!(f, "{:10.3} s  {share:5.1} %  {:indent$}{}", node.seconds, "", node.name, indent = 2 * depth)?;
    writeln!(f, "{}", if node.count > 1 { format!(" ({} times)", node.count) } else { String::new() })?;
    node.parts.iter().try_for_each(|n| print(f, n, depth + 1, all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_on_many_layers_is_one_node() {
        let mut t = Timing::default();
        t.enter(0, "layers");
        for _ in 0..3 {
            t.enter(0, "gptq");
            t.part("solve", Duration::from_millis(250));
            t.leave(Duration::from_millis(500));
        }
        t.leave(Duration::from_millis(2000));
        let text = "     2.000 s  100.0 %  all passes\n     2.000 s  100.0 %    layers\n     \
                    1.500 s   75.0 %      gptq (3 times)\n     0.750 s   37.5 %        solve (3 times)\n";
        assert_eq!(t.to_string(), text);
        assert_eq!(t.passes(), [("gptq", 3, 1.5)]);
    }
}
