//! Texts as windows of tokens: what evaluation scores and calibration looks at.

use crate::npy;
use crate::tokenizer::Tokenizer;
use quantc_ir::diag::{Diag, Result};

/// A text cut into windows.
///
/// The text is tokenized whole, without special tokens, and cut into consecutive windows of `size - 1` tokens. The
/// token that starts texts is put in front of each when the model has one. The last partial window is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenWindows {
    tokens: Vec<u32>,
    bos: Option<u32>,
    /// Tokens of the text in a window.
    step: usize,
    size: usize,
}

impl TokenWindows {
    /// Cuts `text` for a model of `vocab` tokens; `most` bounds the tokens taken from the text, 0 takes all.
    pub fn of_text(
        tokenizer: &Tokenizer,
        text: &str,
        most: usize,
        bos: Option<u32>,
        size: usize,
        vocab: u32,
    ) -> Result<TokenWindows> {
        TokenWindows::of_ids(tokenizer.encode(text, false)?, most, bos, size, vocab)
    }

    /// As [`of_text`](Self::of_text), for a text that is tokenized.
    pub fn of_ids(
        mut tokens: Vec<u32>,
        most: usize,
        bos: Option<u32>,
        size: usize,
        vocab: u32,
    ) -> Result<TokenWindows> {
        if most > 0 {
            tokens.truncate(most);
        }
        known(&tokens, bos, vocab)?;
        TokenWindows::new(tokens, bos, size)
    }

    /// Samples of `size` tokens, one after the other and each taken as it is: nothing is put in front.
    pub fn of_samples(mut tokens: Vec<u32>, most: usize, size: usize, vocab: u32) -> Result<TokenWindows> {
        if most > 0 {
            tokens.truncate(most);
        }
        known(&tokens, None, vocab)?;
        TokenWindows::cut(tokens, None, size, size)
    }

    /// Cuts the tokens of a text.
    pub fn new(tokens: Vec<u32>, bos: Option<u32>, size: usize) -> Result<TokenWindows> {
        TokenWindows::cut(tokens, bos, size.saturating_sub(1), size)
    }

    /// Windows of `size` tokens by name, of which `step` come from the text.
    fn cut(tokens: Vec<u32>, bos: Option<u32>, step: usize, size: usize) -> Result<TokenWindows> {
        let least = if bos.is_some() { 1 } else { 2 };
        if step < least {
            return Err(Diag::input(format!("a window of {size} tokens scores nothing"))
                .help(format!("use at least {}", size.max(1) - step + least)));
        }
        if tokens.len() < step {
            let have = tokens.len();
            return Err(Diag::input(format!("the text has {have} tokens, a window of {size} needs {step}"))
                .help("give a longer text or a smaller window"));
        }
        Ok(TokenWindows { tokens, bos, step, size })
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.step
    }

    /// Whether there is no window, which [`TokenWindows::new`] refuses.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The size the windows were asked to have: what counts whether a token is put in front or not.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Tokens of a window, the one in front included.
    pub fn window_len(&self) -> usize {
        self.step + usize::from(self.bos.is_some())
    }

    /// Tokens that are scored: of each window all but the first.
    pub fn scored(&self) -> usize {
        self.len() * (self.window_len() - 1)
    }

    /// The windows in order.
    pub fn iter(&self) -> impl Iterator<Item = Vec<u32>> + '_ {
        self.tokens.chunks_exact(self.step).map(|part| self.bos.iter().chain(part).copied().collect())
    }
}

/// Refuses tokens that a model of `vocab` tokens does not know.
fn known(tokens: &[u32], bos: Option<u32>, vocab: u32) -> Result<()> {
    match tokens.iter().chain(&bos).find(|&&id| id >= vocab) {
        None => Ok(()),
        Some(id) => {
            let text = format!("the tokenizer makes token {id}, but the model knows {vocab} tokens only");
            Err(Diag::input(text).help("the tokenizer belongs to another model"))
        }
    }
}

/// Token ids of a NumPy array file (`.npy`, versions 1 to 3): little-endian integers of 2 to 8 bytes; and the length of its
/// rows, which are samples.
///
/// The header is a Python literal; what it says is checked against the length of the file before anything is allocated.
pub fn npy_tokens(bytes: &[u8]) -> Result<(Vec<u32>, usize)> {
    let bad = |why: &str| {
        Diag::input(format!("this is no array of token ids: {why}"))
            .help("save ids as a C-ordered array of int32 or int64 with `numpy.save`")
    };
    let array = npy::read(bytes).map_err(|e| bad(e.message.trim_start_matches("this is no array: ")))?;
    if array.ty.elem.int().is_none_or(|int| int.bits() < 16) {
        return Err(bad(&format!("its elements are {}", array.ty.elem)));
    }
    let id = |n: i128| u32::try_from(n).map_err(|_| bad(&format!("{n} is no id")));
    let row = array.dims().last().map_or(1, |&n| n);
    Ok((array.ints().into_iter().map(id).collect::<Result<_>>()?, row))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn arrays_of_ids_are_read_and_lies_refused() {
        let data: Vec<u8> = [7i64, 0, 300, 65536].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(npy_tokens(&npy("<i8", "(2, 2)", &data)).unwrap(), (vec![7, 0, 300, 65536], 2));
        assert_eq!(
            npy_tokens(&npy("<u2", "(4,)", &[1, 0, 2, 1, 3, 0, 255, 255])).unwrap(),
            (vec![1, 258, 3, 65535], 4)
        );
        for (descr, shape, data) in [
            ("<i8", "(2, 3)", &data[..]),
            ("<f4", "(2, 2)", &data[..16]),
            ("<i8", "(99999999999999999999,)", &data[..]),
            ("<i8", "(4611686018427387904, 4)", &data[..]),
            ("<i4", "(1,)", &(-1i32).to_le_bytes()[..]),
        ] {
            assert!(npy_tokens(&npy(descr, shape, data)).is_err(), "{descr} {shape}");
        }
        let whole = npy("<i8", "(2, 2)", &data);
        for cut in 0..whole.len() {
            assert!(npy_tokens(&whole[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn windows_follow_the_protocol() {
        let w = TokenWindows::new((0..11).collect(), Some(99), 4).unwrap();
        let all: Vec<_> = w.iter().collect();
        assert_eq!(all, [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]);
        assert_eq!((w.len(), w.window_len(), w.scored()), (3, 4, 9));
        assert_eq!(w.size(), 4);
        let w = TokenWindows::new((0..11).collect(), None, 4).unwrap();
        assert_eq!(w.iter().next().unwrap(), [0, 1, 2]);
        assert_eq!(w.scored(), 6);
        let w = TokenWindows::of_samples((0..11).collect(), 9, 4, 100).unwrap();
        assert_eq!(w.iter().collect::<Vec<_>>(), [[0, 1, 2, 3], [4, 5, 6, 7]]);
        assert_eq!((w.scored(), w.size()), (6, 4));
    }

    #[test]
    fn windows_that_score_nothing_are_refused() {
        assert!(TokenWindows::new(vec![1; 9], Some(0), 1).is_err());
        assert!(TokenWindows::of_samples(vec![1; 9], 0, 1, 2).is_err());
        assert!(TokenWindows::of_samples(vec![1; 9], 0, 2, 2).is_ok());
        assert!(TokenWindows::of_samples(vec![1; 9], 0, 10, 2).is_err());
        assert!(TokenWindows::new(vec![1; 9], None, 2).is_err());
        assert!(TokenWindows::new(vec![1; 9], None, 0).is_err());
        assert!(TokenWindows::new(vec![1; 2], Some(0), 4).unwrap_err().message.contains("2 tokens"));
        assert!(TokenWindows::new(vec![1; 3], Some(0), 4).is_ok());
    }
}
