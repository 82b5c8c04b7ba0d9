//! Texts as windows of tokens: what evaluation scores and calibration looks at.

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
    step: usize,
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
        let mut tokens = tokenizer.encode(text, false)?;
        if most > 0 {
            tokens.truncate(most);
        }
        if let Some(id) = tokens.iter().chain(&bos).find(|&&id| id >= vocab) {
            let text = format!("the tokenizer makes token {id}, but the model knows {vocab} tokens only");
            return Err(Diag::input(text).help("the tokenizer belongs to another model"));
        }
        TokenWindows::new(tokens, bos, size)
    }

    /// Cuts the tokens of a text.
    pub fn new(tokens: Vec<u32>, bos: Option<u32>, size: usize) -> Result<TokenWindows> {
        let least = 2 + usize::from(bos.is_none());
        if size < least {
            return Err(Diag::input(format!("a window of {size} tokens scores nothing"))
                .help(format!("use at least {least}")));
        }
        if tokens.len() < size - 1 {
            let (have, need) = (tokens.len(), size - 1);
            return Err(Diag::input(format!("the text has {have} tokens, a window of {size} needs {need}"))
                .help("give a longer text or a smaller window"));
        }
        Ok(TokenWindows { tokens, bos, step: size - 1 })
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
        self.step + 1
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

#[cfg(test)]
mod tests {
    use super::*;

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
    }

    #[test]
    fn windows_that_score_nothing_are_refused() {
        assert!(TokenWindows::new(vec![1; 9], Some(0), 1).is_err());
        assert!(TokenWindows::new(vec![1; 9], None, 2).is_err());
        assert!(TokenWindows::new(vec![1; 9], None, 0).is_err());
        assert!(TokenWindows::new(vec![1; 2], Some(0), 4).unwrap_err().message.contains("2 tokens"));
        assert!(TokenWindows::new(vec![1; 3], Some(0), 4).is_ok());
    }
}
