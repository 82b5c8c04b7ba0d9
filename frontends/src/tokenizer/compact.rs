//! Byte-level BPE tokenizers as one flat file that is ready to use when it is read.
//!
//! A `tokenizer.json` of a large vocabulary takes longer to parse than a prompt takes to run, because every token and
//! merge becomes a string in a table. The compact form holds the tables themselves. It covers what byte-level BPE
//! tokenizers are made of (those of GPT-2, Llama 3 and Qwen and their relatives); [`Compact::of`] gives `None` for all
//! others, and for a tokenizer whose texts it does not encode and decode as the library does.
//!
//! Normalizing, splitting into words and decoding bytes is left to the library, with the settings kept as JSON. Merging
//! and looking tokens up is done here, in the same order: the lowest rank first, then the leftmost.
//!
//! The layout, all numbers `u32` in little endian: magic; the numbers of bytes of settings, of tokens, of bytes of their
//! texts, of tokens in order of their texts, of merges, and whether whole words are looked up before merging; settings;
//! texts; then tables: the end of each token's text, what each token is, tokens in order of their texts, the token of each
//! character of the byte alphabet, for each token the end of the merges it begins, and merges.

use quantc_ir::diag::{Diag, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    Decoder as _, DecoderWrapper, NormalizedString, Normalizer as _, NormalizerWrapper, OffsetReferential,
    OffsetType, PreTokenizedString, PreTokenizer as _, PreTokenizerWrapper,
};

const MAGIC: [u8; 8] = *b"QTOKENS\x01";
/// Numbers after the magic.
const HEADER: usize = 6;
/// Most tokens and most merges.
const MOST: usize = 1 << 24;
/// Characters of the byte alphabet lie below this.
const ALPHABET: usize = 0x144;
const NONE: u32 = u32::MAX;

/// What a token is, as bits; 0 where there is no token.
const OF_MODEL: u32 = 1;
const ADDED: u32 = 2;
const SPECIAL: u32 = 4;

/// A byte-level BPE tokenizer.
pub(super) struct Compact {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: PreTokenizerWrapper,
    decoder: DecoderWrapper,
    whole_words: bool,
    texts: String,
    ends: Vec<u32>,
    kinds: Vec<u32>,
    sorted: Vec<u32>,
    alphabet: Vec<u32>,
    merge_ends: Vec<u32>,
    /// Right token, rank, result; of one left token ascending by right token.
    merges: Vec<[u32; 3]>,
    /// For each first byte the lengths of added tokens that begin with it, longest first.
    added_lengths: Vec<Vec<u32>>,
}

/// What the library does, with its own settings.
#[derive(Serialize, Deserialize)]
struct Settings {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: PreTokenizerWrapper,
    decoder: DecoderWrapper,
}

impl Compact {
    /// The compact form of a tokenizer, as the bytes of its file; `None` when it has none.
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> Option<Vec<u8>> {
        // The library writes a line for each id up to the largest.
        if tokenizer.get_vocab(true).into_values().max()? as usize >= MOST {
            return None;
        }
        let tables = Tables::of(&serde_json::to_value(tokenizer).ok()?)?;
        let bytes = tables.bytes();
        let compact = Compact::parse(&bytes, "").ok()?;
        compact.agrees(tokenizer).then_some(bytes)
    }

    /// Reads the bytes of a file called `place`.
    pub(super) fn parse(bytes: &[u8], place: &str) -> Result<Compact> {
        let bad = |what: &str| {
            Diag::input(format!("not a tokenizer in compact form: {what}"))
                .in_file(place)
                .help("compile the model again")
        };
        let mut rest = bytes.strip_prefix(&MAGIC).ok_or_else(|| bad("the first 8 bytes differ"))?;
        let short = || bad("the file ends too early");
        let mut take = |n: usize| {
            let (part, after) = rest.split_at_checked(n).ok_or_else(short)?;
            rest = after;
            Ok::<_, Diag>(part)
        };
        let header = numbers(take(HEADER * 4)?);
        let [settings, n, texts, n_sorted, n_merges, whole_words] =
            std::array::from_fn(|i| header.get(i).map_or(0, |&n| n as usize));
        if n.max(n_merges).max(n_sorted) > MOST || whole_words > 1 {
            return Err(bad("its counts are absurd"));
        }
        let settings: Settings = serde_json::from_slice(take(settings)?)
            .map_err(|e| bad(&format!("its settings: {}", crate::json::shown(&e.to_string()))))?;
        let texts = str::from_utf8(take(texts)?).map_err(|_| bad("its texts are not UTF-8"))?;
        let mut table = |len: usize| take(len * 4).map(numbers);
        let (ends, kinds, sorted) = (table(n)?, table(n)?, table(n_sorted)?);
        let (alphabet, merge_ends) = (table(ALPHABET)?, table(n)?);
        let merges: Vec<[u32; 3]> = take(n_merges * 12)?
            .chunks_exact(12)
            .map(|c| std::array::from_fn(|i| number(&c[i * 4..])))
            .collect();
        if !rest.is_empty() {
            return Err(bad("there is something behind it"));
        }
        let ascending = |ends: &[u32], last: usize| {
            ends.is_sorted() && ends.last().copied().unwrap_or(0) as usize == last
        };
        let boundaries = ends.iter().all(|&end| texts.is_char_boundary(end as usize));
        if !ascending(&ends, texts.len()) || !boundaries {
            return Err(bad("its texts"));
        }
        let known = |id: u32| (id as usize) < n && kinds[id as usize] != 0;
        let merges_fit = merges.iter().all(|&[right, _, result]| known(right) && known(result));
        if !ascending(&merge_ends, n_merges) || !merges_fit {
            return Err(bad("its merges"));
        }
        if !alphabet.iter().all(|&id| id == NONE || known(id)) || !sorted.iter().all(|&id| known(id)) {
            return Err(bad("its tokens"));
        }
        let Settings { normalizer, pre_tokenizer, decoder } = settings;
        let mut compact = Compact {
            normalizer,
            pre_tokenizer,
            decoder,
            whole_words: whole_words == 1,
            texts: texts.to_string(),
            ends,
            kinds,
            sorted,
            alphabet,
            merge_ends,
            merges,
            added_lengths: vec![Vec::new(); 256],
        };
        for id in 0..n as u32 {
            if compact.kinds[id as usize] & ADDED != 0 {
                let text = compact.text(id).as_bytes();
                let &first = text.first().ok_or_else(|| bad("an added token is empty"))?;
                let len = text.len() as u32;
                let lengths = &mut compact.added_lengths[first as usize];
                if !lengths.contains(&len) {
                    lengths.push(len);
                }
            }
        }
        compact
            .added_lengths
            .iter_mut()
            .for_each(|lengths| lengths.sort_unstable_by_key(|&len| Reverse(len)));
        Ok(compact)
    }

    /// The ids of `text`, without any that are put around a text.
    pub(super) fn encode(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 4 + 1);
        let (mut begun, mut at) = (0, 0);
        while at < text.len() {
            match self.added_at(&text[at..]) {
                Some((id, len)) => {
                    self.encode_piece(&text[begun..at], &mut ids)?;
                    ids.push(id);
                    at += len;
                    begun = at;
                }
                None => at += text[at..].chars().next().map_or(1, char::len_utf8),
            }
        }
        self.encode_piece(&text[begun..], &mut ids)?;
        Ok(ids)
    }

    /// The text of `ids`, without special tokens.
    pub(super) fn decode(&self, ids: &[u32]) -> tokenizers::Result<String> {
        let kept = ids.iter().filter(|&&id| self.kind(id) != 0 && self.kind(id) & SPECIAL == 0);
        self.decoder.decode(kept.map(|&id| self.text(id).to_string()).collect())
    }

    /// The id of the token that is written so.
    pub(super) fn token_id(&self, token: &str) -> Option<u32> {
        let at = self.sorted.binary_search_by(|&id| self.text(id).cmp(token)).ok()?;
        self.sorted.get(at).copied()
    }

    /// The token with this id.
    pub(super) fn token(&self, id: u32) -> Option<&str> {
        (self.kind(id) != 0).then(|| self.text(id))
    }

    /// Number of tokens.
    pub(super) fn vocab_size(&self) -> usize {
        self.sorted.len()
    }

    fn kind(&self, id: u32) -> u32 {
        self.kinds.get(id as usize).copied().unwrap_or(0)
    }

    /// The text of a token that exists.
    fn text(&self, id: u32) -> &str {
        let start = (id as usize).checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.texts[start as usize..self.ends[id as usize] as usize]
    }

    /// The longest added token that `text` begins with, and its length.
    fn added_at(&self, text: &str) -> Option<(u32, usize)> {
        let lengths = &self.added_lengths[usize::from(*text.as_bytes().first()?)];
        lengths.iter().find_map(|&len| {
            let id = self.token_id(text.get(..len as usize)?)?;
            (self.kind(id) & ADDED != 0).then_some((id, len as usize))
        })
    }

    /// Appends the ids of a text between added tokens.
    fn encode_piece(&self, text: &str, ids: &mut Vec<u32>) -> tokenizers::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = &self.normalizer {
            normalizer.normalize(&mut normalized)?;
        }
        let mut words = PreTokenizedString::from(normalized);
        self.pre_tokenizer.pre_tokenize(&mut words)?;
        let mut merging = Merging::default();
        for (word, _, _) in words.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            self.encode_word(word, &mut merging, ids);
        }
        Ok(())
    }

    fn encode_word(&self, word: &str, merging: &mut Merging, ids: &mut Vec<u32>) {
        if self.whole_words
            && let Some(id) = self.token_id(word)
            && self.kind(id) & OF_MODEL != 0
        {
            ids.push(id);
            return;
        }
        let letter = |c: char| self.alphabet.get(c as usize).copied().filter(|&id| id != NONE);
        merging.start(word.chars().filter_map(letter));
        merging.merge(|left, right| self.merge_of(left, right));
        ids.extend(merging.ids());
    }

    /// Rank and result of merging two tokens.
    fn merge_of(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        let start = (left as usize).checked_sub(1).map_or(0, |before| self.merge_ends[before]);
        let merges = &self.merges[start as usize..self.merge_ends[left as usize] as usize];
        let at = merges.binary_search_by_key(&right, |merge| merge[0]).ok()?;
        Some((merges[at][1], merges[at][2]))
    }

    /// Whether texts and tokens come out as from `tokenizer`: an insurance against settings that mean more than this
    /// module knows.
    fn agrees(&self, tokenizer: &tokenizers::Tokenizer) -> bool {
        let same_text = |text: &str| {
            let want = tokenizer.encode_fast(text, false).ok().map(|e| e.get_ids().to_vec());
            want == self.encode(text).ok()
        };
        let same_token = |id: u32| {
            tokenizer.decode(&[id], true).ok() == self.decode(&[id]).ok()
                && tokenizer.id_to_token(id).as_deref() == self.token(id)
        };
        let n = self.kinds.len() as u32;
        // Every token's own text, many at a time: they meet in all kinds of ways.
        let mut ids = (0..n).step_by((n as usize / 2000).max(1));
        let some: Vec<u32> = ids.by_ref().collect();
        let texts = some.chunks(50).all(|ids| match tokenizer.decode(ids, false) {
            Ok(text) => same_text(&text),
            Err(_) => false,
        });
        texts
            && PROBES.iter().all(|text| same_text(text))
            && some.into_iter().chain([n, NONE]).all(same_token)
            && tokenizer.get_vocab_size(true) == self.vocab_size()
    }
}

/// Texts of many kinds.
const PROBES: [&str; 6] = [
    "Once upon a time, there was a little fox.  It said: \"Hi!\"\n\n\tThe end.",
    "Grüße, 世界! 🦊🦊 naïve café — “quotes”… Ωμέγα שלום नमस्ते e\u{301}",
    "   leading and trailing \r\n\r\n  x ",
    "I'll they've IT'S 1234567 3.14 x=y+2; fn main() { println!(\"{}\", a[0]); }",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\0\u{7f}\u{ad}\u{fffd}",
    "",
];

/// The tables on their way to a file.
struct Tables {
    settings: Vec<u8>,
    /// Text and kind of each token; an empty text of kind 0 where there is none.
    tokens: Vec<(String, u32)>,
    alphabet: Vec<u32>,
    /// Left, right, rank, result.
    merges: Vec<[u32; 4]>,
    whole_words: bool,
}

impl Tables {
    /// From what the library writes about a tokenizer; `None` for anything that is not plain byte-level BPE.
    fn of(json: &Value) -> Option<Tables> {
        let model = &json["model"];
        let empty = |v: &Value| v.is_null() || v == "";
        let plain = model["type"] == "BPE"
            && model["dropout"].is_null()
            && empty(&model["continuing_subword_prefix"])
            && empty(&model["end_of_word_suffix"]);
        if !plain || !splits_into_bytes(&json["pre_tokenizer"]) || json["decoder"]["type"] != "ByteLevel" {
            return None;
        }
        let part = |name: &str| json[name].clone();
        let settings = Settings {
            normalizer: serde_json::from_value(part("normalizer")).ok()?,
            pre_tokenizer: serde_json::from_value(part("pre_tokenizer")).ok()?,
            decoder: serde_json::from_value(part("decoder")).ok()?,
        };
        let id_of = |v: &Value| v.as_u64().map(|id| id as usize).filter(|&id| id < MOST);
        let mut tokens: Vec<(String, u32)> = Vec::new();
        let mut put = |id: usize, text: &str, kind: u32| {
            if tokens.len() <= id {
                tokens.resize(id + 1, (String::new(), 0));
            }
            let token = &mut tokens[id];
            // One id with two texts needs to know which of them is meant.
            let fits = token.1 == 0 || token.0 == text;
            *token = (text.to_string(), token.1 | kind);
            fits.then_some(())
        };
        let vocab = model["vocab"].as_object()?;
        for (text, id) in vocab {
            put(id_of(id)?, text, OF_MODEL)?;
        }
        let mut normalized = false;
        for token in json["added_tokens"].as_array()? {
            let whole = ["single_word", "lstrip", "rstrip"].iter().all(|flag| token[flag] == false);
            let text = token["content"].as_str()?;
            if !whole || text.is_empty() {
                return None;
            }
            normalized |= token["normalized"] != false;
            put(id_of(&token["id"])?, text, ADDED | if token["special"] == true { SPECIAL } else { 0 })?;
        }
        // Tokens found after normalizing are looked for in another text.
        if normalized && settings.normalizer.is_some() {
            return None;
        }
        let one_pass =
            json["added_tokens"].as_array()?.iter().all(|t| (t["normalized"] != false) == normalized);
        let ids: BTreeMap<&str, u32> =
            (0..).zip(&tokens).filter(|(_, t)| t.1 != 0).map(|(id, t)| (t.0.as_str(), id)).collect();
        let unique = ids.len() == tokens.iter().filter(|t| t.1 != 0).count();
        if !one_pass || !unique {
            return None;
        }
        let mut alphabet = vec![NONE; ALPHABET];
        for letter in ByteLevel::alphabet() {
            let &id =
                ids.get(letter.to_string().as_str()).filter(|&&id| tokens[id as usize].1 & OF_MODEL != 0)?;
            *alphabet.get_mut(letter as usize)? = id;
        }
        let mut merges = Vec::new();
        for (rank, merge) in model["merges"].as_array()?.iter().enumerate() {
            let (left, right) = (merge[0].as_str()?, merge[1].as_str()?);
            let id = |text: &str| vocab.get(text).and_then(id_of).map(|id| id as u32);
            merges.push([id(left)?, id(right)?, rank as u32, id(&format!("{left}{right}"))?]);
        }
        merges.sort_unstable();
        let whole_words = model["ignore_merges"] == true;
        let settings = serde_json::to_vec(&settings).ok()?;
        (merges.len() <= MOST).then_some(Tables { settings, tokens, alphabet, merges, whole_words })
    }

    fn bytes(&self) -> Vec<u8> {
        let mut sorted: Vec<u32> =
            (0..self.tokens.len() as u32).filter(|&id| self.tokens[id as usize].1 != 0).collect();
        sorted.sort_unstable_by_key(|&id| &self.tokens[id as usize].0);
        let mut end = 0;
        let ends = self.tokens.iter().map(|(text, _)| {
            end += text.len() as u32;
            end
        });
        let ends: Vec<u32> = ends.collect();
        let mut merge_ends = vec![0; self.tokens.len()];
        self.merges.iter().for_each(|merge| merge_ends[merge[0] as usize] += 1);
        let mut before = 0;
        for end in &mut merge_ends {
            before += *end;
            *end = before;
        }
        let n_texts = ends.last().copied().unwrap_or(0);
        let header = [
            self.settings.len() as u32,
            self.tokens.len() as u32,
            n_texts,
            sorted.len() as u32,
            self.merges.len() as u32,
            u32::from(self.whole_words),
        ];
        let mut bytes = MAGIC.to_vec();
        let put =
            |bytes: &mut Vec<u8>, numbers: &[u32]| bytes.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
        put(&mut bytes, &header);
        bytes.extend_from_slice(&self.settings);
        self.tokens.iter().for_each(|(text, _)| bytes.extend_from_slice(text.as_bytes()));
        put(&mut bytes, &ends);
        put(&mut bytes, &self.tokens.iter().map(|&(_, kind)| kind).collect::<Vec<_>>());
        put(&mut bytes, &sorted);
        put(&mut bytes, &self.alphabet);
        put(&mut bytes, &merge_ends);
        self.merges.iter().for_each(|merge| put(&mut bytes, &merge[1..]));
        bytes
    }
}

/// Whether a pre-tokenizer ends by writing words in the byte alphabet, and looks at nothing but the text it is given.
fn splits_into_bytes(pre_tokenizer: &Value) -> bool {
    let parts = match pre_tokenizer["type"].as_str() {
        Some("Sequence") => pre_tokenizer["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice),
        _ => std::slice::from_ref(pre_tokenizer),
    };
    let Some((last, before)) = parts.split_last() else { return false };
    last["type"] == "ByteLevel"
        && before.iter().all(|part| part["type"] == "Split" || part["type"] == "Digits")
}

/// A word while its parts are merged.
#[derive(Default)]
struct Merging {
    symbols: Vec<Symbol>,
    /// Lowest rank first, then leftmost: rank, position, result.
    queue: BinaryHeap<Reverse<(u32, usize, u32)>>,
}

/// A part of a word, in a list of the parts that are left.
#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    /// [`usize::MAX`] before the first.
    prev: usize,
    /// The number of parts after the last.
    next: usize,
    merged: bool,
}

impl Merging {
    fn start(&mut self, ids: impl Iterator<Item = u32>) {
        self.symbols.clear();
        self.queue.clear();
        let symbol =
            |(at, id): (usize, u32)| Symbol { id, prev: at.wrapping_sub(1), next: at + 1, merged: false };
        self.symbols.extend(ids.enumerate().map(symbol));
    }

    fn merge(&mut self, merge_of: impl Fn(u32, u32) -> Option<(u32, u32)>) {
        for at in 1..self.symbols.len() {
            self.offer(at - 1, at, &merge_of);
        }
        while let Some(Reverse((_, at, result))) = self.queue.pop() {
            let left = self.symbols[at];
            let Some(&right) = self.symbols.get(left.next).filter(|_| !left.merged) else { continue };
            // What was offered may have changed since.
            if merge_of(left.id, right.id).is_none_or(|(_, now)| now != result) {
                continue;
            }
            self.symbols[left.next].merged = true;
            self.symbols[at].id = result;
            self.symbols[at].next = right.next;
            if let Some(after) = self.symbols.get_mut(right.next) {
                after.prev = at;
            }
            if left.prev != usize::MAX {
                self.offer(left.prev, at, &merge_of);
            }
            if right.next < self.symbols.len() {
                self.offer(at, right.next, &merge_of);
            }
        }
    }

    fn offer(&mut self, left: usize, right: usize, merge_of: &impl Fn(u32, u32) -> Option<(u32, u32)>) {
        if let Some((rank, result)) = merge_of(self.symbols[left].id, self.symbols[right].id) {
            self.queue.push(Reverse((rank, left, result)));
        }
    }

    fn ids(&self) -> impl Iterator<Item = u32> {
        self.symbols.iter().filter(|s| !s.merged).map(|s| s.id)
    }
}

fn numbers(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(number).collect()
}

/// The number at the beginning of at least four bytes.
fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[i]))
}
