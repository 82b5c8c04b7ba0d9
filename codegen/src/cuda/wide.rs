//! Products with many rows: prompts and large batches, bound by the matrix units.
//!
//! A block computes some tiles of 16 output columns for some tiles of 8 tokens. Its warps share what they copy: a stage has
//! 128 bytes of each token's row and the chunks of weights that meet them, and some stages are under way while one is
//! multiplied. There is one barrier a stage: it lets all warps see what all have copied, and tells that the stage before
//! is free.
//!
//! Weights lie as they do for few rows ([`super::layout`]), so that one packed copy serves both, and go to shared memory as
//! they are. Rows of tokens are swizzled: the 16-byte segments of a row change places by the row's number, in such a way
//! that the lanes of an access, which read the quarters of a span in adjacent rows, meet all banks ([`Swizzle`]).
//!
//! Buffers and their order are those of [`MatmulSpec`]; scalars are `t` and `r`.

use super::expr::wide;
use super::finish::{self, Corner, Finish};
use super::layout::{CHUNK_BYTES, FragmentLayout, Meets, UNIT};
use super::product::{Arguments, tile_numbers};
use super::tile::{Builder, Extent, Kernel, WARP};
use super::warp::{TOKENS, WarpTile};
use crate::spec::{MatmulSpec, Zero};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use serde::{Deserialize, Serialize};
use stage::{Place, Stages};

mod stage;

pub use stage::Swizzle;

/// Bytes of a token's row in a stage.
const ROW_BYTES: u32 = 128;

/// Tiles of sums of 4 registers that a warp may have, those of a scale group counted too. Twice as many fit beside their
/// fragments in some formats and spill in others.
const MOST_TILES: u32 = 16;

/// How a product is cut.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct WideTile {
    /// Tiles of 16 output columns of a warp, of each product.
    pub rows: u32,
    /// Tiles of 8 tokens of a warp.
    pub tokens: u32,
    /// Warps of a block side by side over output columns, and over tokens.
    pub warps: [u32; 2],
    /// Stages in shared memory, at least 2.
    pub stages: u32,
}

impl WideTile {
    /// The tile for a GPU: as many sums as registers surely hold, in a block of 128 tokens, or of 64.
    pub fn of(spec: &MatmulSpec, gpu: &GpuDesc) -> Result<WideTile> {
        let layout = FragmentLayout::of(spec)?;
        let copies = spec.products() * if layout.per_row() { 1 } else { 2 };
        // Zero points of many groups a step take the registers of half of the sums.
        let zeros =
            layout.meets == Meets::Bytes && spec.w.zero == Zero::Asym && 4 * spec.w.group <= ROW_BYTES;
        let (tokens, most) = if zeros { (4, MOST_TILES / 2) } else { (8, MOST_TILES) };
        let rows = (most / tokens / copies).max(1);
        let tiles = [4, 3, 2].map(|stages| WideTile { rows, tokens, warps: [4, 2], stages });
        let fits = |most: u32| tiles.into_iter().find(|tile| tile.shared_bytes(spec, layout) <= most);
        // Half of what there is, so that a second block computes while one writes its results.
        fits(gpu.shared_bytes / 2).or_else(|| fits(gpu.shared_bytes)).ok_or_else(|| {
            Diag::target(format!("a product of many rows has no room in the shared memory of {}", gpu.arch))
        })
    }

    /// Warps of a block.
    fn count(&self) -> u32 {
        self.warps[0] * self.warps[1]
    }

    /// Tiles of output columns of a block, of each product.
    fn block_rows(&self) -> u32 {
        self.warps[0] * self.rows
    }

    /// Tiles of tokens of a block.
    fn block_tokens(&self) -> u32 {
        self.warps[1] * self.tokens
    }

    fn warp<'a>(&self, spec: &'a MatmulSpec, layout: FragmentLayout) -> WarpTile<'a> {
        let columns = match layout.meets {
            Meets::Bf16 => ROW_BYTES / 2,
            Meets::Bytes => ROW_BYTES,
        };
        WarpTile { spec, layout, rows: self.rows, tokens: self.tokens, columns }
    }

    fn shared_bytes(&self, spec: &MatmulSpec, layout: FragmentLayout) -> u32 {
        let stage = Stages { warp: self.warp(spec, layout), tile: *self }.bytes();
        let sums = finish::bytes(spec.products(), self.block_rows(), self.block_tokens(), 1);
        (stage * self.stages).max(sums)
    }
}

/// The kernel of `spec`, called `name`.
pub fn build(name: &str, spec: &MatmulSpec, tile: WideTile) -> Result<Kernel> {
    spec.check()?;
    let layout = FragmentLayout::of(spec)?;
    let warp_tile = tile.warp(spec, layout);
    let threads = tile.count() * WARP;
    let mut b = Builder::new(name, threads);
    let args = Arguments::declare(&mut b, spec);
    let columns = layout.tiles().div_ceil(tile.block_rows());
    let rows = Extent::PerScalar { scalar: spec.rows.dim(), times: 1, per: tile.block_tokens() * TOKENS };
    b.grid(Extent::Fixed(columns), rows);
    b.shared(tile.shared_bytes(spec, layout));

    let m = b.scalar_value(spec.rows.dim());
    let (x, y) = (b.block_x(), b.block_y());
    let thread = b.thread();
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let (g, t) = (b.div(lane, 4), b.rem(lane, 4));
    let across = b.rem(warp, tile.warps[0]);
    let along = b.div(warp, tile.warps[0]);
    let first_tile = b.mul(x, tile.block_rows());
    let first_token = b.mul(y, tile.block_tokens() * TOKENS);
    let own_tile = b.mul(across, tile.rows);
    let own_token = b.mul(along, tile.tokens * TOKENS);
    let place = Place { m, thread, lane, g, t, first_tile, first_token, own_tile, own_token };

    let first_own = b.add(first_tile, own_tile);
    let tiles = tile_numbers(&mut b, &layout, first_own, tile.rows, tile.block_rows());
    let fixed = warp_tile.row_offsets(&mut b, &args.weights, &tiles, g);
    let stages = Stages { warp: warp_tile, tile };
    let source = stages.source(&mut b, &args, place);
    let bytes = stages.bytes();
    let count = layout.units() * UNIT / warp_tile.columns;
    b.note("stages ahead");
    for i in 0..tile.stages - 1 {
        if i < count {
            stages.issue(&mut b, &source, i.into(), (i * bytes).into());
        }
        b.cp_commit();
    }
    let acc = warp_tile.accs(&mut b);
    let (read, write) = (b.var(0), b.var((tile.stages - 1) * bytes));
    b.repeat(0, count, 1, |b, number| {
        b.cp_wait(tile.stages - 2);
        b.barrier();
        let ahead = b.add(number, tile.stages - 1);
        let here = b.lt(ahead, count);
        b.when(here, |b| stages.issue(b, &source, ahead, write.into()));
        b.cp_commit();
        let fragments = stages.lane(b, &source, number, read.into());
        warp_tile.compute(b, &fragments, &acc, &fixed);
        for slot in [read, write] {
            b.turn(slot, bytes, tile.stages * bytes);
        }
    });
    let finish = Finish {
        warp: warp_tile,
        frame: &args.frame,
        weights: &args.weights,
        rows: args.rows,
        tiles: tile.block_rows(),
        tokens: tile.block_tokens(),
        parts: 1,
        threads,
        m,
        thread,
        first_tile,
        first_token,
    };
    // No copy is under way: each was waited for, and those after the last stage copy nothing.
    finish.emit(&mut b, &acc, Corner { part: 0.into(), tile: own_tile, token: own_token, g, t });
    Ok(b.finish())
}
