//! Products of windows with weights: convolutions, and matrix products as those of windows of one element.
//!
//! Arrays have their channels side by side (`[.., C]`), and margins are part of the array, so that every window lies
//! inside. The sums of a few neighbouring windows with a few vectors of outputs stay in registers; what becomes of a sum
//! is an expression of [`crate::nest`], over the axes of the result as the model has them.
//!
//! Where each output has a channel of its own ([`Factors::Single`]), the bytes of four rows of a window are put side by
//! side, once for all windows of a tile that see them, and multiplied as those of four channels are.

use crate::nest::{Affine, Mem, Node, NodeId};
use quantc_ir::target::TargetDesc;
use serde::{Deserialize, Serialize};

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Factors {
    /// f32 and f32, summed in f32.
    F32,
    /// Unsigned and signed bytes, four neighbouring channels at a time, summed in i32.
    Bytes,
    /// The same where output `c` sees channel `c` alone: four rows of the window at a time.
    Single,
    /// f32, and codes of 4 or 8 bits whose numbers are `(code - zero) * scale`, with scales and zero points for each output
    /// and each block of channels; summed in f32.
    Codes {
        /// Bits of a code.
        bits: u8,
        /// Channels of a block: an even number.
        block: u32,
    },
}

impl Factors {
    /// Channels that lie together in a lane of the weights.
    pub fn together(self) -> u64 {
        match self {
            Factors::F32 | Factors::Single | Factors::Codes { .. } => 1,
            Factors::Bytes => 4,
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Factors::F32 => "f32",
            Factors::Bytes => "bytes",
            Factors::Single => "single",
            Factors::Codes { bits: 4, .. } => "codes4",
            Factors::Codes { .. } => "codes8",
        }
    }
}

/// One axis of windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Axis {
    /// Extent.
    pub n: u64,
    /// Elements of the array from one to the next.
    pub x: i64,
    /// Elements of the packed weights from one to the next: only batches have weights of their own.
    pub w: i64,
    /// The axis of the result, as the expression counts them; `None` for axes of the window.
    pub y: Option<u8>,
}

/// A kernel; see the module. Arguments: the array, the packed weights, the inputs of the expression, the result.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ConvSpec {
    /// For people.
    pub name: String,
    /// What is multiplied.
    pub factors: Factors,
    /// Axes of the result besides channels; the last is tiled.
    pub outer: Vec<Axis>,
    /// Axes of the window.
    pub window: Vec<Axis>,
    /// The element of the array that the first window begins with.
    pub base: i64,
    /// Channels of the array that an output sees, a multiple of those that lie together.
    pub channels: u64,
    /// Sums of f32 are taken of so many products at a time, which then join the total: channel by channel, and of each
    /// the window. Without it, element by element of the window, and of each the channels.
    pub run: Option<u64>,
    /// Channels of the result.
    pub outs: u64,
    /// The axis of the result that channels are.
    pub axis: u8,
    /// Number of axes of the result.
    pub rank: u8,
    /// The expression, over the axes of the result; the sum is its [`Node::Folded`].
    pub nodes: Vec<Node>,
    /// The node that is stored.
    pub value: NodeId,
    /// How it is stored.
    pub out: Mem,
    /// Where it is stored.
    pub to: Affine,
    /// Inputs of the expression.
    pub inputs: u16,
}

/// Windows and vectors of outputs whose sums are in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Neighbouring windows.
    pub windows: u64,
    /// Vectors of outputs: a panel of weights.
    pub vectors: u64,
}

impl ConvSpec {
    /// The tile on a target.
    pub fn tile(&self, target: &TargetDesc) -> Tile {
        let lanes = u64::from(target.cpu.vector_bits / 32);
        let last = self.outer.last().map_or(1, |a| a.n);
        tile(self.factors, self.outs, last, lanes, target.cpu.vector_bits == 512)
    }

    /// Elements of all axes of the window but the last, in elements of the array from its first one, and the last axis.
    pub fn rows(&self) -> (Vec<i64>, Axis) {
        let one = Axis { n: 1, x: 0, w: 0, y: None };
        let (last, above) = self.window.split_last().map_or((one, &[][..]), |(last, above)| (*last, above));
        let mut rows = vec![0];
        for axis in above {
            rows = rows.iter().flat_map(|r| (0..axis.n as i64).map(move |i| r + i * axis.x)).collect();
        }
        (rows, last)
    }

    /// Lanes of four bytes that each output's weights are packed into.
    pub fn steps(&self) -> u64 {
        if self.factors == Factors::Single {
            let (rows, last) = self.rows();
            return rows.len().div_ceil(4) as u64 * last.n;
        }
        self.window.iter().map(|a| a.n).product::<u64>() * (self.channels / self.factors.together())
    }

    /// Bytes of a panel of weights of so many lanes.
    pub fn panel_bytes(&self, lanes: u64) -> u64 {
        match self.factors {
            // Scales and zero points of a block, then its codes.
            Factors::Codes { bits, block } => {
                let block = u64::from(block);
                self.channels.div_ceil(block) * (8 + block * u64::from(bits) / 8) * lanes
            }
            _ => self.steps() * lanes * 4,
        }
    }

    /// Panels of outputs.
    pub fn panels(&self, target: &TargetDesc) -> u64 {
        self.outs.div_ceil(self.tile(target).vectors * u64::from(target.cpu.vector_bits / 32))
    }

    /// Items of a launch: a tile of windows, all tiles for a panel after one another.
    pub fn items(&self, target: &TargetDesc) -> u64 {
        let (last, rows) = match self.outer.split_last() {
            Some((last, rows)) => (last.n, rows.iter().map(|a| a.n).product::<u64>()),
            None => (1, 1),
        };
        self.panels(target) * rows * last.div_ceil(self.tile(target).windows)
    }

    /// Multiply-adds.
    pub fn macs(&self) -> u64 {
        self.outer.iter().chain(&self.window).map(|a| a.n).product::<u64>() * self.channels * self.outs
    }
}

/// The tile for so many outputs and windows side by side.
pub fn tile(factors: Factors, outs: u64, last: u64, lanes: u64, wide: bool) -> Tile {
    let (most, sums) = match (factors, wide) {
        (Factors::Single, true) => (1, 8),
        (Factors::Single, false) => (1, 4),
        (_, true) => (4, 24),
        (_, false) => (2, 12),
    };
    let all = outs.div_ceil(lanes);
    let vectors = all.div_ceil(all.div_ceil(most));
    let windows = (sums / vectors).min(if wide { 14 } else { 8 });
    // Tiles of one size, which overlap little.
    let windows = last.div_ceil(last.div_ceil(windows));
    Tile { windows, vectors }
}
