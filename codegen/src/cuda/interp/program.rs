//! A kernel as a list of steps with jumps: what a warp can stop in the middle of.

use crate::cuda::tile::{Addr, Kernel, Reg, Stmt, Val};

/// A step of a warp.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// A statement without others inside.
    Plain(&'a Stmt),
    /// Lanes where the condition does not hold leave, until the step at `otherwise`.
    If { cond: Val, otherwise: usize },
    /// The lanes that left come, the others leave, until the step at `end`.
    Else { end: usize },
    /// All that came to the `If` or `Loop` are back.
    Join,
    /// All lanes set the counter.
    Enter { var: Reg, from: Val },
    /// Lanes that are through leave, until the step at `end`.
    Test { var: Reg, to: Val, end: usize },
    /// Counts, and goes back to the step at `test`.
    Again { var: Reg, step: Val, test: usize },
}

/// A kernel with its steps.
#[derive(Debug)]
pub(super) struct Program<'a> {
    pub kernel: &'a Kernel,
    pub steps: Vec<Step<'a>>,
    /// Whether groups of warps multiply.
    pub groups: bool,
}

impl<'a> Program<'a> {
    pub fn new(kernel: &'a Kernel) -> Program<'a> {
        let mut program = Program { kernel, steps: vec![], groups: false };
        program.body(&kernel.body);
        program.groups = program.steps.iter().any(|s| matches!(s, Step::Plain(Stmt::GroupMma { .. })));
        program
    }

    fn body(&mut self, body: &'a [Stmt]) {
        for stmt in body {
            match stmt {
                Stmt::Note(_) => {}
                Stmt::If(cond, then, other) => {
                    let at = self.steps.len();
                    self.steps.push(Step::Join);
                    self.body(then);
                    let middle = self.steps.len();
                    self.steps.push(Step::Join);
                    self.body(other);
                    let end = self.steps.len();
                    self.steps.push(Step::Join);
                    self.steps[at] = Step::If { cond: *cond, otherwise: middle };
                    self.steps[middle] = Step::Else { end };
                }
                Stmt::For { var, from, to, step, body } => {
                    self.steps.push(Step::Enter { var: *var, from: *from });
                    let test = self.steps.len();
                    self.steps.push(Step::Join);
                    self.body(body);
                    self.steps.push(Step::Again { var: *var, step: *step, test });
                    let end = self.steps.len();
                    self.steps.push(Step::Join);
                    self.steps[test] = Step::Test { var: *var, to: *to, end };
                }
                plain => self.steps.push(Step::Plain(plain)),
            }
        }
    }

    /// The barrier and the parity that the step at `pc` waits for.
    pub fn awaited(&self, pc: usize) -> Option<(Addr, Val)> {
        match self.steps.get(pc) {
            Some(Step::Plain(Stmt::BarWait { at, parity })) => Some((*at, *parity)),
            _ => None,
        }
    }

    /// A step in words, for messages.
    pub fn describe(&self, pc: usize) -> String {
        match self.steps.get(pc) {
            Some(Step::Plain(stmt)) => format!("step {pc}, {stmt:?}"),
            Some(step) => format!("step {pc}, {step:?}"),
            None => "the end".to_owned(),
        }
    }
}
