//! Shared memory of a block, with who touched what when.

/// Who may see what: for each warp, the last of its periods that is known.
pub(super) type Clock = Vec<u32>;

/// One lane, at a time that its warp's clock tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Who<'a> {
    pub warp: usize,
    pub lane: u32,
    pub clock: &'a Clock,
}

/// An access in the past. Period 0 stands for none.
#[derive(Clone, Copy, Debug, Default)]
struct Past {
    period: u32,
    warp: u16,
    /// [`MANY`] for several lanes.
    lane: u8,
}

const MANY: u8 = u8::MAX;

impl Past {
    fn is_before(self, who: Who<'_>) -> bool {
        let warp = usize::from(self.warp);
        match self.period {
            0 => true,
            // Lanes of a warp see each other's periods that are over.
            period if warp == who.warp => u32::from(self.lane) == who.lane || who.clock[warp] > period,
            period => who.clock[warp] >= period,
        }
    }

    fn describe(self) -> String {
        match self.lane {
            MANY => format!("warp {}", self.warp),
            lane => format!("warp {}, lane {lane}", self.warp),
        }
    }
}

/// What is known of some adjacent bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Grain {
    written: Past,
    /// Whether an asynchronous copy to it is under way.
    pending: bool,
    /// How many products of groups may be reading it.
    reading: u16,
    /// Whether it was stored by threads, and no fence has followed.
    stored: bool,
}

/// Shared memory.
#[derive(Debug)]
pub(super) struct Shared {
    data: Vec<u8>,
    grains: Vec<Grain>,
    /// For each grain the last reads of each warp.
    reads: Vec<Past>,
    grain: usize,
    warps: usize,
}

impl Shared {
    pub fn new(bytes: u32, grain: u32, warps: usize) -> Shared {
        let count = bytes.div_ceil(grain) as usize;
        // Bulk copies are one more who touches memory.
        let warps = warps + 1;
        let (grains, reads) = (vec![Grain::default(); count], vec![Past::default(); count * warps]);
        Shared { data: vec![0; bytes as usize], grains, reads, grain: grain as usize, warps }
    }

    fn check(&self, at: u64, bytes: u32) -> Result<std::ops::Range<usize>, String> {
        if !at.is_multiple_of(u64::from(bytes.min(16))) {
            return Err(format!("{bytes} bytes of shared memory at {at}: not aligned"));
        }
        if at + u64::from(bytes) > self.data.len() as u64 {
            return Err(format!("{bytes} bytes of shared memory at {at}: it has {}", self.data.len()));
        }
        let at = at as usize;
        Ok(at / self.grain..(at + bytes as usize).div_ceil(self.grain))
    }

    /// Bytes that a lane reads.
    pub fn read(&mut self, who: Who<'_>, at: u64, bytes: u32) -> Result<&[u8], String> {
        for i in self.check(at, bytes)? {
            let Grain { written, pending, .. } = self.grains[i];
            if pending {
                return Err(format!(
                    "lane {} reads shared byte {at} while a copy to it is under way",
                    who.lane
                ));
            }
            if written.period == 0 {
                return Err(format!("lane {} reads shared byte {at}, which nobody wrote", who.lane));
            }
            if !written.is_before(who) {
                let other = written.describe();
                return Err(format!("a race: lane {} reads shared byte {at} that {other} writes", who.lane));
            }
            let past = &mut self.reads[i * self.warps + who.warp];
            let period = who.clock[who.warp];
            let lane =
                if past.period == period && u32::from(past.lane) != who.lane { MANY } else { who.lane as u8 };
            *past = Past { period, warp: who.warp as u16, lane };
        }
        Ok(&self.data[at as usize..][..bytes as usize])
    }

    /// Claims bytes for a lane to write.
    fn claim(&mut self, who: Who<'_>, at: u64, bytes: u32, pending: bool) -> Result<(), String> {
        for i in self.check(at, bytes)? {
            if self.grains[i].pending {
                return Err(format!(
                    "lane {} writes shared byte {at} while a copy to it is under way",
                    who.lane
                ));
            }
            if self.grains[i].reading > 0 {
                return Err(format!("lane {} writes shared byte {at} while a product may read it", who.lane));
            }
            let reads = &self.reads[i * self.warps..][..self.warps];
            let others = reads.iter().chain([&self.grains[i].written]);
            if let Some(other) = others.copied().find(|p| !p.is_before(who)) {
                let other = other.describe();
                return Err(format!("a race: lane {} writes shared byte {at} that {other} uses", who.lane));
            }
            let written = Past { period: who.clock[who.warp], warp: who.warp as u16, lane: who.lane as u8 };
            self.grains[i] = Grain { written, pending, reading: 0, stored: true };
        }
        Ok(())
    }

    /// Writes for a lane.
    pub fn write(&mut self, who: Who<'_>, at: u64, data: &[u8]) -> Result<(), String> {
        self.claim(who, at, data.len() as u32, false)?;
        self.data[at as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    /// Starts a copy: nobody may touch the bytes until it has ended.
    pub fn start_copy(&mut self, who: Who<'_>, at: u64, bytes: u32) -> Result<(), String> {
        self.claim(who, at, bytes, true)
    }

    /// Ends a bulk copy, which was number `period`: who knows of it has the bytes.
    pub fn land(&mut self, period: u32, at: u64, data: &[u8]) {
        let written = Past { period, warp: (self.warps - 1) as u16, lane: 0 };
        for grain in &mut self.grains[at as usize / self.grain..(at as usize + data.len()) / self.grain] {
            *grain = Grain { written, pending: false, reading: 0, stored: false };
        }
        self.data[at as usize..][..data.len()].copy_from_slice(data);
    }

    /// What a warp has stored is there for products of groups.
    pub fn proxy_fence(&mut self, warp: usize) {
        for grain in self.grains.iter_mut().filter(|g| usize::from(g.written.warp) == warp) {
            grain.stored = false;
        }
    }

    /// Begins to read 16 bytes for a product.
    pub fn begin_reading(&mut self, who: Who<'_>, at: u64) -> Result<[u8; 16], String> {
        for i in self.check(at, 16)? {
            let Grain { written, pending, stored, .. } = self.grains[i];
            if stored && !pending && written.period > 0 {
                return Err(format!("a product reads shared byte {at}, which was stored without a fence"));
            }
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(self.read(who, at, 16)?);
        for i in self.check(at, 16)? {
            self.grains[i].reading += 1;
        }
        Ok(bytes)
    }

    /// A product has read 16 bytes.
    pub fn end_reading(&mut self, who: Who<'_>, at: u64) {
        for i in at as usize / self.grain..(at as usize + 16).div_ceil(self.grain) {
            self.grains[i].reading -= 1;
            self.reads[i * self.warps + who.warp] =
                Past { period: who.clock[who.warp], warp: who.warp as u16, lane: MANY };
        }
    }

    /// Ends a copy: the lane that started it has the bytes.
    pub fn end_copy(&mut self, who: Who<'_>, at: u64, data: &[u8]) {
        let grains = at as usize / self.grain..(at as usize + data.len()).div_ceil(self.grain);
        for grain in &mut self.grains[grains] {
            let written = Past { period: who.clock[who.warp], warp: who.warp as u16, lane: who.lane as u8 };
            *grain = Grain { written, pending: false, reading: 0, stored: true };
        }
        self.data[at as usize..][..data.len()].copy_from_slice(data);
    }
}
