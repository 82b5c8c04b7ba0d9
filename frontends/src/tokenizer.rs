//! Tokenizers: text to token ids and back, as `tokenizer.json` says.
//!
//! The work is done by the `tokenizers` crate; this module stands between it and files and texts nobody vouches for.
//! What holds:
//! - Padding and truncation that a file asks for are left out: both are the caller's business, and a file may ask for
//!   more padding than there is memory.
//! - The ids of added tokens are those of the file, or the file is refused.
//! - A panic inside the crate is an error that says so.
//! - A tokenizer read from its compact form gives the ids and texts that its `tokenizer.json` gives.

mod compact;

use crate::json::{self, shown};
use compact::Compact;
use quantc_ir::diag::{Diag, Loc, Result};
use serde::Deserialize;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::{Once, OnceLock};
use tokenizers::{Encoding, PostProcessor as _, Token, TruncationDirection};

/// The longest `tokenizer.json` that is read, in bytes.
const MAX_FILE: u64 = 256 << 20;

/// A tokenizer.
pub struct Tokenizer {
    inner: Inner,
    /// Where it was read from, for messages.
    place: String,
}

/// Reads the bytes of a `tokenizer.json` when they turn out to be needed.
pub type ReadWhole = dyn Fn() -> Result<Vec<u8>> + Send + Sync;

enum Inner {
    Whole(Box<tokenizers::Tokenizer>),
    /// The compact form, and the whole for what it lacks: what is put around a text.
    Compact {
        compact: Box<Compact>,
        whole: OnceLock<Box<tokenizers::Tokenizer>>,
        read: Box<ReadWhole>,
    },
}

impl Tokenizer {
    /// Reads the file at `path`.
    pub fn open(path: &Path) -> Result<Tokenizer> {
        Tokenizer::from_bytes(&json::read_file(path, MAX_FILE)?, &path.display().to_string())
    }

    /// Reads `bytes`, the content of the file called `place`.
    pub fn from_bytes(bytes: &[u8], place: &str) -> Result<Tokenizer> {
        Ok(Tokenizer { inner: Inner::Whole(Box::new(read_whole(bytes, place)?)), place: place.into() })
    }

    /// Reads `bytes`, the compact form of a tokenizer; `read` gives its `tokenizer.json`, which is called `place`.
    pub fn from_compact(bytes: &[u8], place: &str, read: Box<ReadWhole>) -> Result<Tokenizer> {
        let compact = guard(place, "reading the tokenizer", || Compact::parse(bytes, place))?;
        let inner = Inner::Compact { compact: Box::new(compact), whole: OnceLock::new(), read };
        Ok(Tokenizer { inner, place: place.into() })
    }

    /// The compact form, which is read much faster; `None` for a tokenizer that has none.
    pub fn to_compact(&self) -> Result<Option<Vec<u8>>> {
        self.guarded("making the tokenizer compact", || Ok(Compact::of(self.whole()?)))
    }

    /// The ids of `text`; with `special`, those that the file puts around a text are added.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.guarded("encoding a text", || {
            if let (Inner::Compact { compact, .. }, false) = (&self.inner, special) {
                return compact.encode(text).map_err(|e| self.failed(&e.to_string()));
            }
            let encoding =
                self.whole()?.encode_fast(text, special).map_err(|e| self.failed(&e.to_string()))?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// As [`Tokenizer::encode`] with `special`, but with no more than `most` ids: the end of the text is left out, not
    /// what is put behind it.
    pub fn encode_at_most(&self, text: &str, most: usize) -> Result<Vec<u32>> {
        self.guarded("encoding a text", || {
            let whole = self.whole()?;
            let around = whole.get_post_processor().map_or(0, |p| p.added_tokens(false));
            let Some(room) = most.checked_sub(around) else {
                let text = format!("{most} ids have no room for the {around} that are put around a text");
                return Err(Diag::input(text).in_file(&self.place));
            };
            let mut encoding = whole.encode_fast(text, false).map_err(|e| self.failed(&e.to_string()))?;
            encoding.truncate(room, 0, TruncationDirection::Right);
            let all = whole.post_process(encoding, None, true).map_err(|e| self.failed(&e.to_string()))?;
            Ok(all.get_ids().to_vec())
        })
    }

    /// The special tokens in front of and behind what [`Tokenizer::encode`] makes of a text.
    pub fn around(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        // No token of any text.
        const TEXT: u32 = u32::MAX;
        self.guarded("looking at what is put around a text", || {
            let text = Encoding::from_tokens(vec![Token::new(TEXT, "a".into(), (0, 1))], 0);
            let all =
                self.whole()?.post_process(text, None, true).map_err(|e| self.failed(&e.to_string()))?;
            match all.get_ids().split(|&id| id == TEXT).collect::<Vec<_>>()[..] {
                [before, after] => Ok((before.to_vec(), after.to_vec())),
                _ => Err(self.failed("a text does not stand once in what is put around it")),
            }
        })
    }

    /// The text of `ids`; special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.guarded("decoding tokens", || {
            let text = match &self.inner {
                Inner::Whole(whole) => whole.decode(ids, true),
                Inner::Compact { compact, .. } => compact.decode(ids),
            };
            text.map_err(|e| self.failed(&e.to_string()))
        })
    }

    /// The id of the token that is written so.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.inner {
            Inner::Whole(whole) => whole.token_to_id(token),
            Inner::Compact { compact, .. } => compact.token_id(token),
        }
    }

    /// The token with this id as the file writes it.
    pub fn token(&self, id: u32) -> Option<String> {
        match &self.inner {
            Inner::Whole(whole) => whole.id_to_token(id),
            Inner::Compact { compact, .. } => compact.token(id).map(String::from),
        }
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        match &self.inner {
            Inner::Whole(whole) => whole.get_vocab_size(true),
            Inner::Compact { compact, .. } => compact.vocab_size(),
        }
    }

    /// A decoder of tokens that come one by one.
    pub fn stream(&self) -> Stream<'_> {
        Stream { tokenizer: self, ids: vec![], given: String::new() }
    }

    /// The library's tokenizer, read now if it has not been.
    fn whole(&self) -> Result<&tokenizers::Tokenizer> {
        match &self.inner {
            Inner::Whole(whole) => Ok(whole),
            Inner::Compact { whole, read, .. } => match whole.get() {
                Some(whole) => Ok(whole),
                None => {
                    let new = read_whole(&read()?, &self.place)?;
                    Ok(whole.get_or_init(|| Box::new(new)))
                }
            },
        }
    }

    fn guarded<T>(&self, doing: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
        guard(&self.place, doing, f)
    }

    fn failed(&self, why: &str) -> Diag {
        refused(&self.place, why)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("place", &self.place).finish_non_exhaustive()
    }
}

/// Decodes tokens that come one by one: what it gives, joined, is the text of all tokens.
///
/// A character whose bytes are spread over tokens is held back until it is whole, and a token's spacing is that of
/// the text, since each time the text of several tokens is decoded and the part that is new is given.
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens decoded again each time: the last ones.
    ids: Vec<u32>,
    /// The part of their text that was given.
    given: String,
}

impl Stream<'_> {
    /// Tokens decoded again, at most; the older half is then let go.
    const MOST: usize = 64;

    /// Takes a token and gives the text that is now certain.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        // What ends in replacement characters may become another character with the next token.
        let certain = text.trim_end_matches('\u{FFFD}');
        // When this token changes the end of what was given (a decoder that tidies spaces), the change is kept back.
        let Some(new) = certain.strip_prefix(self.given.as_str()).map(String::from) else {
            return Ok(String::new());
        };
        self.given.push_str(&new);
        if self.ids.len() > Stream::MOST && certain.len() == text.len() {
            self.let_go()?;
        }
        Ok(new)
    }

    /// Gives what was held back.
    pub fn finish(mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        let same = text.char_indices().zip(self.given.chars()).take_while(|((_, a), b)| a == b);
        let end = same.map(|((i, c), _)| i + c.len_utf8()).last().unwrap_or(0);
        self.given.clear();
        Ok(text[end..].to_string())
    }

    /// Forgets the older half of the tokens, if the text of the others does not depend on them.
    fn let_go(&mut self) -> Result<()> {
        // The cut moves with each token: at one place it may fall inside a character.
        let rest = &self.ids[self.ids.len() - Stream::MOST / 2..];
        let text = self.tokenizer.decode(rest)?;
        // A decoder may strip the space in front of a text, so the shorter text must be what the longer ends with.
        if !text.is_empty() && self.given.ends_with(&text) {
            self.ids = rest.to_vec();
            self.given = text;
        }
        Ok(())
    }
}

/// Reads `bytes`, the content of a `tokenizer.json` called `place`.
fn read_whole(bytes: &[u8], place: &str) -> Result<tokenizers::Tokenizer> {
    let declared: Declared = json::parse(place, bytes, std::marker::PhantomData)?;
    let read = guard(place, "reading the tokenizer", || {
        serde_json::from_slice::<tokenizers::Tokenizer>(bytes).map_err(|e| {
            let text = e.to_string();
            let place_of = format!(" at line {} column {}", e.line(), e.column());
            let text = text.strip_suffix(&place_of).unwrap_or(&text);
            let clip = |n: usize| u32::try_from(n.max(1)).unwrap_or(u32::MAX);
            Diag::input(format!("the tokenizer is malformed: {}", shown(text)))
                .in_file(place)
                .at(Loc::Text { line: clip(e.line()), col: clip(e.column()) })
        })
    });
    let mut inner = read?;
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|e| refused(place, &e.to_string()))?;
    for token in declared.added_tokens {
        let got = inner.token_to_id(&token.content);
        if got != Some(token.id) {
            let is = got.map_or("no token".into(), |id| format!("token {id}"));
            let text = format!(
                "the added token `{}` has id {}, but {is} among the others",
                shown(&token.content),
                token.id
            );
            return Err(Diag::input(text).in_file(place).at(Loc::Item("added_tokens".into())));
        }
    }
    Ok(inner)
}

/// What a tokenizer file declares and is checked for.
#[derive(Deserialize)]
struct Declared {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

fn refused(place: &str, why: &str) -> Diag {
    Diag::input(format!("the tokenizer fails: {}", shown(why))).in_file(place)
}

thread_local! {
    /// Whether this thread's panics are caught here and say nothing on their own.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`; a panic in it becomes an error.
fn guard<T>(place: &str, doing: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.with(Cell::get) {
                usual(info);
            }
        }));
    });
    let before = QUIET.with(|q| q.replace(true));
    // What `f` reads is not used again after a panic but through further guarded calls, and the crate keeps nothing
    // half-changed in it: caches are behind locks that it takes anew or leaves alone.
    let out = panic::catch_unwind(AssertUnwindSafe(f));
    QUIET.with(|q| q.set(before));
    out.unwrap_or_else(|cause| {
        let why =
            cause.downcast_ref::<&str>().map(|s| s.to_string()).or(cause.downcast_ref::<String>().cloned());
        let why = shown(&why.unwrap_or_else(|| "no reason given".into()));
        Err(Diag::input(format!("the tokenizer library panicked: {why}"))
            .in_file(place)
            .context(doing)
            .help("the file is damaged, or it is one that the library does not handle"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error() {
        let d = guard("t.json", "testing", || -> Result<()> { panic!("no {}", "way") }).unwrap_err();
        assert_eq!(d.message, "the tokenizer library panicked: no way");
        assert!(d.to_string().contains("t.json"));
        assert!(!QUIET.with(Cell::get));
    }

    #[test]
    fn a_file_that_is_none_is_refused_in_its_place() {
        let d = Tokenizer::from_bytes(b"{\n \"version\": 1", "t.json").unwrap_err();
        assert_eq!(d.file.as_deref(), Some("t.json"));
        assert!(matches!(d.loc, Loc::Text { line: 2, .. }), "{d}");
        let d =
            Tokenizer::from_bytes(br#"{"version": "1.0", "model": {"type": "BPE", "vocab": {}}}"#, "t.json");
        assert!(d.unwrap_err().message.contains("malformed"));
    }

    #[test]
    fn added_tokens_keep_their_ids() {
        let text = br#"{"version": "1.0", "added_tokens": [{"id": 7, "content": "<s>", "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"#;
        let d = Tokenizer::from_bytes(text, "t.json").unwrap_err();
        assert!(d.message.contains("`<s>` has id 7"), "{d}");
    }

    #[test]
    fn what_stands_around_a_text_depends_on_no_word() {
        // Its one word is no part of any text.
        let around = |single: serde_json::Value| {
            let special = |id: u32| serde_json::json!({ "id": id.to_string(), "ids": [id], "tokens": [id.to_string()] });
            let post = serde_json::json!({
                "type": "TemplateProcessing", "single": single, "pair": [],
                "special_tokens": { "1": special(1), "2": special(2) },
            });
            let file = serde_json::json!({
                "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
                "pre_tokenizer": null, "decoder": null,
                "post_processor": if single.is_null() { serde_json::Value::Null } else { post },
                "model": { "type": "WordLevel", "vocab": { "nothing": 0 }, "unk_token": "nothing" },
            });
            Tokenizer::from_bytes(file.to_string().as_bytes(), "t").unwrap().around()
        };
        let special = |id: u32| serde_json::json!({ "SpecialToken": { "id": id.to_string(), "type_id": 0 } });
        let text = || serde_json::json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let both = around(serde_json::json!([special(1), text(), special(2), special(2)])).unwrap();
        assert_eq!(both, (vec![1], vec![2, 2]));
        assert_eq!(around(serde_json::Value::Null).unwrap(), (vec![], vec![]));
        for single in [serde_json::json!([special(1)]), serde_json::json!([text(), special(1), text()])] {
            let refused = around(single).unwrap_err().to_string();
            assert!(refused.contains("does not stand once"), "{refused}");
        }
    }

    #[test]
    fn padding_of_any_size_is_left_out() {
        let text = br#"{"version": "1.0", "truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 99999999999999}, "direction": "Right", "pad_to_multiple_of": null,
                        "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}"#;
        let t = Tokenizer::from_bytes(text, "t.json").unwrap();
        assert_eq!(t.encode("a b b", true).unwrap(), [0, 1, 1]);
        assert_eq!(t.encode_at_most("a b b", 2).unwrap(), [0, 1]);
    }

    #[test]
    fn a_stream_forgets_although_characters_are_spread_over_tokens() {
        let text = r#"{"version": "1.0", "decoder": {"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": false},
            "model": {"type": "BPE", "vocab": {"a": 0, "Ã": 1, "©": 2}, "merges": []}}"#;
        let t = Tokenizer::from_bytes(text.as_bytes(), "t.json").unwrap();
        let mut stream = t.stream();
        let ids: Vec<u32> = std::iter::once(0).chain([1, 2].repeat(200)).collect();
        let mut told = String::new();
        for id in ids {
            told += &stream.push(id).unwrap();
            assert!(stream.ids.len() <= Stream::MOST + 2, "{} tokens are decoded again", stream.ids.len());
        }
        told += &stream.finish().unwrap();
        assert_eq!(told, format!("a{}", "é".repeat(200)));
    }
}
