//! Reading what observers were written as. The bytes may be anything: what is not the one way in which a state is
//! written is refused, and nothing is reserved for what is not there.

use super::rows::Extremes;
use quantc_ir::diag::{Diag, Loc, Result};

pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, at: 0 }
    }

    pub fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let Some(taken) = self.bytes[self.at..].get(..n) else {
            return Err(self.refuse("it ends early"));
        };
        self.at += n;
        Ok(taken)
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    pub fn u32(&mut self) -> Result<u32> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from(self.u32()?) | u64::from(self.u32()?) << 32)
    }

    pub fn f32(&mut self) -> Result<f32> {
        Ok(f32::from_bits(self.u32()?))
    }

    /// The extremes of `n` numbers.
    pub fn extremes(&mut self, n: u64) -> Result<Extremes> {
        let extremes = Extremes { min: self.f32()?, max: self.f32()? };
        if extremes.are_of(n) { Ok(extremes) } else { Err(self.refuse("its range is none")) }
    }

    /// What is left.
    pub fn rest(&mut self) -> &'a [u8] {
        let rest = &self.bytes[self.at..];
        self.at = self.bytes.len();
        rest
    }

    pub fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// Refuses bytes that are left.
    pub fn end(&self) -> Result<()> {
        if self.is_empty() { Ok(()) } else { Err(self.refuse("it goes on after its end")) }
    }

    /// An error about what was read last.
    pub fn refuse(&self, why: &str) -> Diag {
        Diag::input(format!("this is no statistic of activations: {why}")).at(Loc::Byte(self.at as u64))
    }
}

pub(super) fn write_extremes(extremes: Extremes, out: &mut Vec<u8>) {
    out.extend(extremes.min.to_le_bytes());
    out.extend(extremes.max.to_le_bytes());
}

/// `n` numbers more on a counter.
pub(super) fn count(counter: u64, n: u64) -> Result<u64> {
    counter.checked_add(n).ok_or_else(|| Diag::input("more than 2^64 activations were counted"))
}

/// Refuses the merge of states with different numbers of channels.
pub(super) fn same_channels(a: usize, b: usize) -> Result<()> {
    if a == b {
        return Ok(());
    }
    Err(Diag::input(format!("statistics of {a} and of {b} channels cannot be put together")))
}
