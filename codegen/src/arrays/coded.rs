//! Matrices of codes in blocks, as `MatMulNBits` has them: they stay codes in the engine, and the kernel makes numbers of
//! them as it meets them.

use super::{Lowering, dims_of};
use crate::conv::Factors;
use quantc_ir::diag::Result;
use quantc_ir::entity::ValueId;
use quantc_ir::graph::Graph;
use quantc_ir::ops::Op;
use quantc_ir::scheme::Group;
use quantc_ir::ty::Float;

/// A matrix of codes.
pub(super) struct Coded {
    bits: u8,
    block: u64,
    outs: u64,
    channels: u64,
    /// Codes without sign, output by output.
    codes: Vec<u8>,
    /// A scale and a zero point for each block of each output.
    blocks: Vec<(f32, f32)>,
}

impl Lowering<'_> {
    /// The codes that a matrix is made of, in blocks of its channels; `by_rows` when each output is a row.
    pub(super) fn coded(&self, g: &Graph, w: ValueId, by_rows: bool) -> Result<Option<Coded>> {
        let Some((_, node)) = g.def(w) else { return Ok(None) };
        let Op::Dequantize(op) = &node.op else {
            let turned = matches!(&node.op, Op::Transpose(t) if t.perm.is_empty() || t.perm[..] == [1, 0]);
            return if turned { self.coded(g, node.args[0], !by_rows) } else { Ok(None) };
        };
        let ty = g.ty(node.args[0]);
        let (Some(scheme), [rows, cols]) = (ty.elem.scheme(), &dims_of(ty)?[..]) else { return Ok(None) };
        let Group::Block { axis, size } = scheme.group else { return Ok(None) };
        let (outs, channels) = if by_rows { (*rows, *cols) } else { (*cols, *rows) };
        let (bits, block) = (scheme.format.bits, u64::from(size));
        let along = usize::from(axis) == usize::from(by_rows);
        let fits = matches!(bits, 4 | 8) && scheme.format.is_int() && block % 2 == 0 && block > 0;
        if !along || !fits || channels % block != 0 || op.to != Float::F32 {
            return Ok(None);
        }
        let (Some(codes), Some(scale)) = (self.tensor(g, node.args[0])?, self.tensor(g, node.args[1])?)
        else {
            return Ok(None);
        };
        let zeros = match node.args.get(2).filter(|&&z| !g.is_none(z)) {
            Some(&z) => match self.tensor(g, z)? {
                Some(z) => z.reals(),
                None => return Ok(None),
            },
            None => vec![0.0; scale.reals().len()],
        };
        // Signed codes move up, and their zero points with them.
        let least = f64::from(scheme.format.int_range().0);
        let (codes, scale) = (codes.reals(), scale.reals());
        let at =
            |o: u64, c: u64, channels: u64| (if by_rows { o * channels + c } else { c * outs + o }) as usize;
        let blocks = channels / block;
        let each = |n: u64| (0..outs).flat_map(move |o| (0..n).map(move |c| (o, c)));
        Ok(Some(Coded {
            bits: bits as u8,
            block,
            outs,
            channels,
            codes: each(channels).map(|(o, c)| (codes[at(o, c, channels)] - least) as u8).collect(),
            blocks: each(blocks)
                .map(|(o, c)| at(o, c, blocks))
                .map(|i| (scale[i] as f32, (zeros[i] - least) as f32))
                .collect(),
        }))
    }
}

impl Coded {
    /// What the kernel multiplies.
    pub(super) fn factors(&self) -> Factors {
        Factors::Codes { bits: self.bits, block: self.block as u32 }
    }

    /// As the kernel reads it, in panels of so many outputs: of each block scales, zero points and codes.
    pub(super) fn packed(&self, panel: u64) -> Vec<u8> {
        let (each, blocks) = (8 / u64::from(self.bits), self.channels / self.block);
        let mut bytes = vec![];
        for first in (0..self.outs).step_by(panel as usize) {
            for block in 0..blocks {
                let lanes = (first..first + panel).map(|o| {
                    let there = o < self.outs;
                    if there { self.blocks[(o * blocks + block) as usize] } else { (0.0, 0.0) }
                });
                bytes.extend(lanes.clone().flat_map(|(scale, _)| scale.to_le_bytes()));
                bytes.extend(lanes.flat_map(|(_, zero)| zero.to_le_bytes()));
                for c in (block * self.block..(block + 1) * self.block).step_by(each as usize) {
                    for o in first..first + panel {
                        let code = |part: u64| match o < self.outs {
                            true => {
                                self.codes[(o * self.channels + c + part) as usize]
                                    << (part * u64::from(self.bits))
                            }
                            false => 0,
                        };
                        bytes.push((0..each).fold(0, |byte, part| byte | code(part)));
                    }
                }
            }
        }
        bytes
    }
}
