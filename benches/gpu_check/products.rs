//! Times of products: each template with the matrices of Llama 3, by calls of 1 to 4096 tokens, beside NVIDIA's library.
//!
//! Every timed kernel is checked too, some tokens of it with all columns. Weights and rows are random and repeat after a number
//! of rows that is no multiple of what a block computes, so that one computed in another's place shows.

use crate::ceilings::Ceilings;
use crate::correctness::{POISON, workspace};
use crate::cublas::{Cublas, Numbers};
use crate::device::{Device, Fault, Held, Time};
use crate::inputs::{self, Buffer};
use crate::kernel::{Asked, Packed, Ready};
use crate::parts::{Part, Verdict};
use crate::random::{self, Num, ROTATED, Random};
use crate::reference;
use crate::report::{Table, judged, percent};
use crate::table::{FORMATS, Format, product};
use crate::torch::Torch;
use quantc::ir::diag::Result;
use quantc::ir::target::GpuDesc;
use quantc_codegen::cuda::group::{GroupSpec, Scales};
use quantc_codegen::cuda::layout::FragmentLayout;
use quantc_codegen::cuda::mixed::MixedTile;
use quantc_codegen::cuda::plan;
use quantc_codegen::cuda::tile::GroupKind;
use quantc_codegen::cuda::tiles::Tiled;
use quantc_codegen::eexpr::{EExpr, MemTy};
use quantc_codegen::spec::{AFmt, MatmulSpec, Rows};
use std::collections::BTreeMap;

/// A matrix of a model.
#[derive(Clone, Copy)]
struct Matrix {
    /// Model and name.
    name: &'static str,
    /// Output columns.
    n: u32,
    /// Length of the sums.
    k: u32,
}

/// Matrices of Llama 3. The first is the one that wanted figures are about.
const MATRICES: [Matrix; 8] = [
    Matrix { name: "70B o", n: 8192, k: 8192 },
    Matrix { name: "8B gate, up", n: 14336, k: 4096 },
    Matrix { name: "8B down", n: 4096, k: 14336 },
    Matrix { name: "70B gate, up", n: 28672, k: 8192 },
    Matrix { name: "8B qkv", n: 6144, k: 4096 },
    Matrix { name: "8B o", n: 4096, k: 4096 },
    Matrix { name: "70B qkv", n: 10240, k: 8192 },
    Matrix { name: "70B down", n: 8192, k: 28672 },
];

/// Which template multiplies.
#[derive(Clone, Copy)]
enum By {
    /// Warps, few tokens.
    Skinny(&'static Format),
    /// Warps, many tokens.
    Wide(&'static Format),
    /// Groups of warps, from the weights of warps.
    Mixed(&'static Format),
    /// Groups of warps, from tiles.
    Group(GroupKind, Scales),
}

/// What one matrix takes in one template.
struct Item {
    matrix: Matrix,
    by: By,
}

/// Classes of calls of few tokens, and calls in them.
const FEW: [(u32, &[u32]); 4] = [(8, &[1, 2, 4, 8]), (16, &[16]), (32, &[32]), (64, &[64])];

/// Calls of many tokens.
const MANY: [u32; 4] = [128, 512, 2048, 4096];

impl Item {
    fn group(&self, kind: GroupKind, scales: Scales) -> GroupSpec {
        let Matrix { n, k, .. } = self.matrix;
        let epilogue = EExpr::store_acc(MemTy::F32, n);
        GroupSpec { n, k, rows: Rows::T, kind, scales, zeros: false, epilogue }
    }

    /// Calls by their kernels.
    fn calls(&self) -> Vec<(Asked, Vec<u32>)> {
        let Matrix { n, k, .. } = self.matrix;
        let most = MANY[MANY.len() - 1];
        match self.by {
            By::Skinny(format) => {
                let class = |(rows, calls): (u32, &[u32])| {
                    (Asked::Skinny(product(format, n, k, rows)), calls.to_vec())
                };
                FEW.into_iter().map(class).collect()
            }
            By::Wide(format) => vec![(Asked::Wide(product(format, n, k, most)), MANY.to_vec())],
            By::Mixed(format) => vec![(Asked::Mixed(product(format, n, k, most)), MANY.to_vec())],
            By::Group(kind, scales) => {
                vec![(Asked::Group { spec: self.group(kind, scales), rows: most }, MANY.to_vec())]
            }
        }
    }

    /// The kernels that it takes.
    fn kernels(&self) -> Vec<Asked> {
        self.calls().into_iter().map(|(asked, _)| asked).collect()
    }

    fn format(&self) -> &'static str {
        match self.by {
            By::Skinny(f) | By::Wide(f) | By::Mixed(f) => f.name,
            By::Group(GroupKind::Bf16, _) => "bf16",
            By::Group(GroupKind::S8, _) => "w8a8",
            By::Group(GroupKind::E4m3, Scales::Blocks) => "fp8 rows, blocks",
            By::Group(GroupKind::E4m3, _) => "fp8 rows",
        }
    }

    /// What the matrix units multiply.
    fn numbers(&self) -> Numbers {
        match self.by {
            By::Skinny(f) | By::Wide(f) | By::Mixed(f) if f.a == AFmt::I8Token => Numbers::Int8,
            By::Skinny(_) | By::Wide(_) | By::Mixed(_) | By::Group(GroupKind::Bf16, _) => Numbers::Bf16,
            By::Group(GroupKind::S8, _) => Numbers::Int8,
            By::Group(GroupKind::E4m3, _) => Numbers::Fp8,
        }
    }

    /// What stands beside: few tokens are bound by weights, and bf16 is what one has without quantization.
    fn beside(&self, m: u32) -> Numbers {
        if m <= 64 { Numbers::Bf16 } else { self.numbers() }
    }
}

/// Every template with the matrices, the wanted ones first.
fn table(small: bool) -> Vec<Item> {
    let mut list = vec![];
    for matrix in MATRICES.into_iter().take(if small { 0 } else { MATRICES.len() }) {
        let formats = FORMATS.iter().take(6);
        list.extend(formats.clone().map(|f| Item { matrix, by: By::Skinny(f) }));
        let groups = [
            (GroupKind::Bf16, Scales::None),
            (GroupKind::S8, Scales::Rows),
            (GroupKind::E4m3, Scales::Rows),
            (GroupKind::E4m3, Scales::Blocks),
        ];
        list.extend(groups.map(|(kind, scales)| Item { matrix, by: By::Group(kind, scales) }));
        list.extend(formats.clone().map(|f| Item { matrix, by: By::Mixed(f) }));
        list.extend(formats.map(|f| Item { matrix, by: By::Wide(f) }));
    }
    if small {
        let matrix = Matrix { name: "small", n: 512, k: 512 };
        list.push(Item { matrix, by: By::Skinny(&FORMATS[0]) });
        list.push(Item { matrix, by: By::Group(GroupKind::E4m3, Scales::Rows) });
        list.push(Item { matrix, by: By::Mixed(&FORMATS[0]) });
        list.push(Item { matrix, by: By::Wide(&FORMATS[0]) });
    }
    list
}

/// Rows of activations after which they repeat: a multiple of the 64 of a tile, and of none of the 128 of a block.
const PERIOD: u32 = 192;

/// Rows of weights after which they repeat, where they lie in tiles of 16, in tiles of 64, and there with scales of 128 rows.
const PERIODS: [u32; 3] = [48, 192, 384];

/// What a product reads, in pieces that repeat, and their values.
struct Pieces {
    /// Arguments before the weights: bytes that repeat, and bytes of all.
    rows: Vec<(Vec<u8>, u64)>,
    x: Vec<f64>,
}

fn lines(buffers: Vec<Buffer>, have: u32, m: u32) -> Vec<(Vec<u8>, u64)> {
    let whole = |b: Buffer| {
        let bytes = b.given().to_vec();
        let each = bytes.len() as u64 / u64::from(have);
        (bytes, each * u64::from(m))
    };
    buffers.into_iter().map(whole).collect()
}

fn pieces(asked: &Asked, m: u32, random: &mut Random) -> Result<Pieces> {
    let have = m.min(PERIOD);
    Ok(match asked {
        Asked::Skinny(s) | Asked::Wide(s) => {
            let (buffers, x) = inputs::rows(random, s, have)?;
            Pieces { rows: lines(buffers, have, m), x }
        }
        Asked::Mixed(s) => {
            let (buffers, x) = inputs::rows(random, s, have)?;
            let spec = MixedTile::tokens_spec(s)?;
            let tiles = inputs::tiles_of(&spec, buffers[0].given(), have)?;
            let all = Tiled { kind: spec.kind, rows: m, columns: spec.columns() }.bytes();
            let mut rows = lines(buffers, have, m);
            rows[0] = (tiles, all);
            Pieces { rows, x }
        }
        Asked::Group { spec, .. } => {
            let (buffers, x) = inputs::group_rows(random, spec, have);
            let tiles = buffers[0].given().to_vec();
            let all = Tiled { kind: spec.kind, rows: m, columns: spec.k }.bytes();
            let mut rows = lines(buffers, have, m);
            rows[0] = (tiles, all);
            Pieces { rows, x }
        }
        _ => Pieces { rows: vec![], x: vec![] },
    })
}

/// Weights: parts of a blob, of bytes that repeat and bytes of all; and their values.
struct Weights {
    parts: Vec<(Vec<u8>, u64)>,
    bytes: u64,
    w: Vec<f64>,
}

fn fragments(s: &MatmulSpec, random: &mut Random) -> Result<Weights> {
    let n = PERIODS[0].min(s.n);
    let piece = MatmulSpec { n, epilogue: EExpr::store_acc(MemTy::F32, n), ..s.clone() };
    let matrix = random.matrix(n, s.k, s.w);
    let blob = inputs::packed(&piece, &matrix)?;
    let bytes = FragmentLayout::of(s)?.bytes();
    Ok(Weights { parts: vec![(blob, bytes)], bytes, w: random::weights(&matrix, n, s.k, s.w) })
}

fn group_weights(s: &GroupSpec, random: &mut Random) -> Result<Weights> {
    let n = PERIODS[if s.scales == Scales::Blocks { 2 } else { 1 }].min(s.n);
    let piece = GroupSpec { n, epilogue: EExpr::store_acc(MemTy::F32, n), ..s.clone() };
    let (blob, w) = inputs::group_weights(random, &piece)?;
    let (small, large) = (piece.layout(), s.layout());
    let (tiles, tail) = blob.split_at(small.scales_at() as usize);
    let scales = (small.zeros_at() - small.scales_at()) as usize;
    let parts = vec![
        (tiles.to_vec(), large.scales_at()),
        (tail[..scales].to_vec(), large.zeros_at() - large.scales_at()),
    ];
    Ok(Weights { parts, bytes: large.bytes(), w })
}

fn weights(asked: &Asked, random: &mut Random) -> Result<Weights> {
    match asked {
        Asked::Skinny(s) | Asked::Wide(s) | Asked::Mixed(s) => fragments(s, random),
        Asked::Group { spec, .. } => group_weights(spec, random),
        _ => Ok(Weights { parts: vec![], bytes: 0, w: vec![] }),
    }
}

/// Times by NVIDIA's library, or by PyTorch where there is no library; each product is timed once.
struct Beside {
    blas: std::result::Result<Cublas, String>,
    torch: Torch,
    known: BTreeMap<(Numbers, u32, u32, u32), f64>,
}

impl Beside {
    fn time(&mut self, device: &mut Device<'_>, numbers: Numbers, m: u32, matrix: Matrix) -> Option<f64> {
        let Matrix { n, k, .. } = matrix;
        if let Some(us) = self.known.get(&(numbers, m, n, k)) {
            return Some(*us);
        }
        let us = match &mut self.blas {
            Ok(blas) => blas.time(device, numbers, m, n, k).ok().map(|time| time.us),
            Err(_) => self.torch.product(numbers, m, n, k),
        }?;
        self.known.insert((numbers, m, n, k), us);
        Some(us)
    }
}

/// Its kernels.
pub fn kernels(small: bool) -> Vec<Asked> {
    table(small).into_iter().flat_map(|item| item.kernels()).collect()
}

/// Its kernels for a GPU: of many rows those that engines have, and with the first matrix both templates.
pub fn kernels_for(small: bool, gpu: &GpuDesc) -> Vec<Asked> {
    let first = table(small).first().map(|item| (item.matrix.n, item.matrix.k));
    let wanted = |asked: &Asked| match asked {
        Asked::Wide(s) => first == Some((s.n, s.k)) || plan::token_tiles(s, gpu).is_none(),
        _ => true,
    };
    kernels(small).into_iter().filter(wanted).collect()
}

/// Times the products of the table.
pub fn run(part: &Part<'_>, packed: &Packed) -> Result<Verdict> {
    let ceilings = Ceilings::read(part.scratch, &packed.target.gpu);
    let mut device = Device::open(packed)?;
    let torch = Torch::read(part.scratch);
    let mut beside = Beside { blas: Cublas::open(device.driver.stream()), torch, known: BTreeMap::new() };
    let by = match &beside.blas {
        Ok(blas) => {
            format!("cuBLASLt {} stands beside, with results of bf16 or i32; ours are f32.", blas.version())
        }
        Err(why) => format!("cuBLASLt is left out: {why}. PyTorch stands beside where it was measured."),
    };
    let note = format!(
        "Times are of launches in a graph, one after the other, with weights that no cache holds. The share is of the least time \
         that bytes or products take. {} {by}",
        ceilings.note()
    );
    let columns = [
        "matrix",
        "template",
        "format",
        "tokens",
        "us",
        "±",
        "GB/s",
        "T/s",
        "share",
        "beside us",
        "wanted",
        "",
        "error",
    ];
    let mut table = Table::new(part, "Products", &note, &columns);
    for (i, item) in self::table(part.small).into_iter().enumerate() {
        table.each(i, |say| item_rows(&item, packed, &mut device, &ceilings, &mut beside, say))?;
    }
    Ok(table.finish())
}

fn item_rows(
    item: &Item,
    packed: &Packed,
    device: &mut Device<'_>,
    ceilings: &Ceilings,
    beside: &mut Beside,
    say: &mut dyn FnMut(Vec<String>),
) -> std::result::Result<(), Fault> {
    let matrix = item.matrix;
    let calls: Vec<(&Ready, u32)> = item
        .calls()
        .into_iter()
        .filter_map(|(asked, calls)| Some((packed.find(&asked)?, calls)))
        .flat_map(|(kernel, calls)| calls.into_iter().map(move |m| (kernel, m)))
        .collect();
    let Some((first, _)) = calls.first() else { return Ok(()) };
    let others: Vec<Option<f64>> =
        calls.iter().map(|(_, m)| beside.time(device, item.beside(*m), *m, matrix)).collect();
    let mut random = Random(u64::from(matrix.n) << 20 ^ u64::from(matrix.k));
    let weights = weights(&first.asked, &mut random)?;
    let copies = ROTATED.div_ceil(weights.bytes).clamp(2, 24);
    let mut held = Held::new(device);
    let mut blobs = vec![];
    for _ in 0..copies {
        let at = held.filled(weights.bytes, 0)?;
        let mut to = at;
        for (piece, bytes) in weights.parts.iter().filter(|(_, bytes)| *bytes > 0) {
            held.repeat_at(to, *bytes, piece)?;
            to += bytes;
        }
        blobs.push(at);
    }
    for ((kernel, m), other) in calls.into_iter().zip(others) {
        let (time, bytes, error) = measure(kernel, matrix, m, &weights, &blobs, &mut held, &mut random)?;
        let macs = f64::from(m) * f64::from(matrix.n) * f64::from(matrix.k);
        let least = (bytes as f64 / ceilings.read / 1e3).max(macs / ceilings.tmac(item.numbers()) / 1e6);
        let (wanted, verdict) = wanted(item, m, time.us, macs, other);
        say(vec![
            format!("{} {} x {}", matrix.name, matrix.n, matrix.k),
            kernel.asked.template().into(),
            item.format().into(),
            m.to_string(),
            format!("{:.1}", time.us),
            percent(time.spread),
            format!("{:.0}", bytes as f64 / time.us / 1e3),
            format!("{:.0}", 2.0 * macs / time.us / 1e6),
            percent(least / time.us),
            other.map_or("".into(), |us| format!("{us:.1}")),
            wanted,
            verdict,
            format!("{error:.0e}"),
        ]);
    }
    Ok(())
}

/// Bytes of weights from which on quantized products are to be as fast as bf16's.
const LARGE: u64 = 16 << 20;

/// What is wanted of a product, in words, and whether it was met.
fn wanted(item: &Item, m: u32, us: f64, macs: f64, other: Option<f64>) -> (String, String) {
    let Matrix { n, k, .. } = item.matrix;
    let mut wants: Vec<(String, Option<bool>)> = vec![];
    let ratio = |least: f64| other.map(|other| other / us >= least);
    match item.by {
        By::Skinny(format) if format.name == "w4a16-g128" => {
            if (n, k) == (8192, 8192) && m <= 16 {
                wants.push(("at most 11.5 us".into(), Some(us <= 11.5)));
            }
            let spec = product(format, n, k, m);
            if FragmentLayout::of(&spec).is_ok_and(|l| l.bytes() >= LARGE) {
                wants.push(("not slower than bf16 beside".into(), ratio(1.0)));
            }
        }
        By::Group(GroupKind::E4m3, Scales::Rows) if m >= 2048 => {
            wants.push(("1150 T/s".into(), Some(2.0 * macs / us / 1e6 >= 1150.0)));
            wants.push(("95 % of beside".into(), ratio(0.95)));
        }
        By::Group(GroupKind::Bf16 | GroupKind::S8, _) if m >= 2048 => {
            wants.push(("85 % of beside".into(), ratio(0.85)));
        }
        _ => {}
    }
    let all = wants.iter().filter_map(|(_, met)| *met).all(|met| met);
    let words: Vec<String> = wants
        .iter()
        .map(|(what, met)| if met.is_none() { format!("{what} (nothing beside)") } else { what.clone() })
        .collect();
    let said = if wants.iter().all(|(_, met)| met.is_none()) { String::new() } else { judged(all) };
    (words.join(", "), said)
}

/// The time of a product, the bytes that it moves, and its largest error.
fn measure(
    kernel: &Ready,
    matrix: Matrix,
    m: u32,
    weights: &Weights,
    blobs: &[u64],
    held: &mut Held<'_, '_>,
    random: &mut Random,
) -> std::result::Result<(Time, u64, f64), Fault> {
    let Pieces { rows, x } = pieces(&kernel.asked, m, random)?;
    held.add(kernel)?;
    let mut a = vec![];
    for (piece, bytes) in &rows {
        a.push(held.repeated(*bytes, piece)?);
    }
    let out_bytes = 4 * u64::from(m) * u64::from(matrix.n);
    let out = held.filled(out_bytes, POISON)?;
    let extra = workspace(held, kernel, m)?;
    let buffers =
        |w: u64| -> Vec<u64> { a.iter().copied().chain([w, out]).chain(extra.iter().copied()).collect() };
    held.launch(kernel, &buffers(blobs[0]), m, m)?;
    held.wait()?;
    let sides = Sides { x: &x, w: &weights.w, e4m3: is_e4m3(&kernel.asked) };
    let error = check(held, out, matrix, m, sides, random)?;
    let count = Held::launches(blobs.len(), m <= 64);
    let time =
        held.time(count, &mut |held, i| held.launch(kernel, &buffers(blobs[i % blobs.len()]), m, m))?;
    let moved = weights.bytes + rows.iter().map(|(_, bytes)| bytes).sum::<u64>() + out_bytes;
    Ok((time, moved, error))
}

fn is_e4m3(asked: &Asked) -> bool {
    matches!(asked, Asked::Group { spec, .. } if spec.kind == GroupKind::E4m3)
}

/// What was multiplied.
struct Sides<'a> {
    x: &'a [f64],
    w: &'a [f64],
    e4m3: bool,
}

/// Compares the results of some tokens, with all columns.
fn check(
    held: &mut Held<'_, '_>,
    out: u64,
    matrix: Matrix,
    m: u32,
    sides: Sides<'_>,
    random: &mut Random,
) -> std::result::Result<f64, Fault> {
    let (n, k) = (matrix.n as usize, matrix.k as usize);
    let period = sides.w.len() / k;
    let mut tokens = vec![0, m - 1, m / 2];
    tokens.extend((0..3).map(|_| random.below(m)));
    tokens.sort_unstable();
    tokens.dedup();
    let mut worst = 0f64;
    for token in tokens {
        let row = &sides.x[(token % PERIOD) as usize * k..][..k];
        let (sums, size) = reference::products(row, &[sides.w], k);
        let numbers = (0..n).map(|column| f64::from(sums[column % period])).collect();
        let absolute = reference::near(size, sides.e4m3);
        let wanted = reference::Wanted { numbers, relative: 2e-6, absolute };
        let bytes = held.download(out + 4 * u64::from(token) * n as u64, 4 * n)?;
        let error = wanted.compare(&Num::Of(MemTy::F32).all(&bytes), |_| true);
        worst = worst.max(error.map_err(|what| {
            Fault::Wrong(format!("{} {n} x {k}, {m} tokens, token {token}: {what}", matrix.name))
        })?);
    }
    Ok(worst)
}
