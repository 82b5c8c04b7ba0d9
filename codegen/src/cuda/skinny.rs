//! Products with few rows: up to 64 tokens at a time, bound by the bytes of the weights.
//!
//! Weights are the left side of the warps' products and tokens the right side, so that 16 rows of weights meet 8 tokens
//! and little is wasted on tokens that are not there. A block computes some tiles of 16 output columns for some tiles of 8
//! tokens; its warps take turns at units of [`UNIT`] columns of k, and add up what they have at the end.
//!
//! Every lane copies exactly what it will multiply itself, several units ahead, into its own part of shared memory
//! ([`ring`]): there is no barrier, no exchange and no conflict of banks before the sums are added up. This is what
//! [`super::layout`] is made for.
//!
//! Buffers and their order are those of [`MatmulSpec`], weights as [`FragmentLayout`] stores them; scalars are `t` and `r`.

use super::finish::{self, Corner, Finish};
use super::layout::{FragmentLayout, TILE, UNIT};
use super::product::{Arguments, tile_numbers};
use super::tile::{Builder, Extent, Kernel, Val, WARP};
use super::warp::{TOKENS, WarpTile};
use crate::spec::MatmulSpec;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::GpuDesc;
use ring::Ring;
use serde::{Deserialize, Serialize};

mod ring;

/// How a product is cut.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct SkinnyTile {
    /// Tiles of 16 output columns of a block.
    pub rows: u32,
    /// Tiles of 8 tokens of a block.
    pub tokens: u32,
    /// Warps of a block, among which k is divided.
    pub warps: u32,
    /// Units under way in each warp, at least 2.
    pub stages: u32,
}

impl SkinnyTile {
    /// The tile for calls of up to `m` rows on a GPU: as many warps and stages as shared memory has room for, and one tile
    /// of output columns, or two where that still leaves a block for each of a hundred multiprocessors.
    pub fn of(spec: &MatmulSpec, m: u32, gpu: &GpuDesc) -> Result<SkinnyTile> {
        let layout = FragmentLayout::of(spec)?;
        let tokens = m.div_ceil(TOKENS).next_power_of_two().min(8);
        let rows = if spec.n >= 100 * 2 * TILE && tokens <= 4 && spec.products() == 1 { 2 } else { 1 };
        let sizes = [(8, 4), (8, 3), (4, 4), (4, 3), (4, 2), (2, 2), (1, 2)];
        let tiles = sizes.map(|(warps, stages)| SkinnyTile { rows, tokens, warps, stages });
        let fits = |part: u32| {
            let most = gpu.shared_bytes / part;
            tiles.into_iter().find(|tile| tile.shared_bytes(spec, layout) <= most)
        };
        // Half of what there is, so that two blocks hide each other's beginnings and ends.
        fits(2).filter(|t| t.warps >= 4).or_else(|| fits(1)).ok_or_else(|| {
            Diag::target(format!("a product of {m} rows has no room in the shared memory of {}", gpu.arch))
        })
    }

    fn warp<'a>(&self, spec: &'a MatmulSpec, layout: FragmentLayout) -> WarpTile<'a> {
        WarpTile { spec, layout, rows: self.rows, tokens: self.tokens, columns: UNIT }
    }

    fn shared_bytes(&self, spec: &MatmulSpec, layout: FragmentLayout) -> u32 {
        let ring = Ring { warp: self.warp(spec, layout), stages: self.stages };
        let sums = finish::bytes(spec.products(), self.rows, self.tokens, self.warps);
        (ring.stage_bytes() * self.stages * self.warps).max(sums)
    }
}

/// The kernel of `spec`, called `name`.
pub fn build(name: &str, spec: &MatmulSpec, tile: SkinnyTile) -> Result<Kernel> {
    spec.check()?;
    let layout = FragmentLayout::of(spec)?;
    let warp_tile = tile.warp(spec, layout);
    let mut b = Builder::new(name, tile.warps * WARP);
    let args = Arguments::declare(&mut b, spec);
    let columns = layout.tiles().div_ceil(tile.rows);
    let rows = Extent::PerScalar { scalar: spec.rows.dim(), times: 1, per: tile.tokens * TOKENS };
    b.grid(Extent::Fixed(columns), rows);
    b.shared(tile.shared_bytes(spec, layout));

    let m = b.scalar_value(spec.rows.dim());
    let (x, y) = (b.block_x(), b.block_y());
    let thread = b.thread();
    let (warp, lane) = (b.div(thread, WARP), b.rem(thread, WARP));
    let (g, t) = (b.div(lane, 4), b.rem(lane, 4));
    let first_tile = b.mul(x, tile.rows);
    let first_token = b.mul(y, tile.tokens * TOKENS);
    let ring = Ring { warp: warp_tile, stages: tile.stages };
    let stage = ring.stage_bytes();
    let tiles = tile_numbers(&mut b, &layout, first_tile, tile.rows, tile.rows);
    let fixed = warp_tile.row_offsets(&mut b, &args.weights, &tiles, g);
    let place = Place { m, warp, lane, g, t, first_token };
    let source = ring.source(&mut b, &args, place, &tiles);
    b.note("units ahead");
    for i in 0..tile.stages - 1 {
        let unit = b.add(warp, i * tile.warps);
        ring.issue(&mut b, &source, unit, (i * stage).into());
    }
    let acc = warp_tile.accs(&mut b);
    let (read, write) = (b.var(0), b.var((tile.stages - 1) * stage));
    b.repeat(warp, layout.units(), tile.warps, |b, unit| {
        b.cp_wait(tile.stages - 2);
        let ahead = b.add(unit, (tile.stages - 1) * tile.warps);
        ring.issue(b, &source, ahead, write.into());
        let fragments = ring.lane(b, place, read.into());
        warp_tile.compute(b, &fragments, &acc, &fixed);
        for slot in [read, write] {
            b.turn(slot, stage, tile.stages * stage);
        }
    });
    let finish = Finish {
        warp: warp_tile,
        frame: &args.frame,
        weights: &args.weights,
        rows: args.rows,
        tiles: tile.rows,
        tokens: tile.tokens,
        parts: tile.warps,
        threads: tile.warps * WARP,
        m,
        thread,
        first_tile,
        first_token,
    };
    // No copy is under way: each was waited for, and those after the last unit copy nothing.
    finish.emit(&mut b, &acc, Corner { part: warp, tile: 0.into(), token: 0.into(), g, t });
    Ok(b.finish())
}

/// Where a lane is.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Rows of the call.
    m: Val,
    warp: Val,
    lane: Val,
    /// Row of a fragment.
    g: Val,
    /// Lane of the row.
    t: Val,
    /// The block's first token.
    first_token: Val,
}
