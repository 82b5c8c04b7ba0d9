//! Tokenizers of real models.

mod common;

use common::{Golden, model_dir, outer_model_dir};
use quantc_frontends::Tokenizer;
use quantc_frontends::data::TokenWindows;
use std::path::Path;

fn open(dir: &Path) -> Tokenizer {
    Tokenizer::open(&dir.join("tokenizer.json")).unwrap()
}

/// Joins what a stream gives for `ids`; it must be the text of all ids, and no piece may hold half a character.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> (String, usize) {
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    let mut pieces = 0;
    for &id in ids {
        let piece = stream.push(id).unwrap();
        assert!(!piece.ends_with('\u{FFFD}'), "half a character in {piece:?}");
        pieces += usize::from(!piece.is_empty());
        text += &piece;
    }
    text += &stream.finish().unwrap();
    (text, pieces)
}

#[test]
fn texts_are_encoded_as_their_authors_do() {
    let dir = model_dir("tiny-qwen2");
    let golden = Golden::open(&dir.join("golden.safetensors"));
    let text = golden.note("text").unwrap();
    let ids: Vec<i32> = open(&dir).encode(&text, false).unwrap().into_iter().map(|id| id as i32).collect();
    assert_eq!(ids, golden.ids("input_ids").1);
}

#[test]
fn streams_give_the_text_of_all_tokens() {
    let texts = [
        "Once upon a time, there was a little fox.  It said: \"Hi!\"\n\n\tThe end.",
        "Grüße, 世界! 🦊🦊 naïve café — “quotes”…",
        "",
        " leading and trailing ",
    ];
    let mut dirs = vec![model_dir("tiny-qwen2"), model_dir("tales-3M")];
    for name in ["stories260K", "babyllama-char105"] {
        dirs.extend(outer_model_dir(name));
    }
    for dir in dirs {
        let tokenizer = open(&dir);
        for text in texts {
            let ids = tokenizer.encode(text, false).unwrap();
            let (out, _) = streamed(&tokenizer, &ids);
            assert_eq!(out, tokenizer.decode(&ids).unwrap(), "{}", dir.display());
        }
        // Long enough that the stream forgets tokens on the way.
        let long = texts.join(" ").repeat(20);
        let ids = tokenizer.encode(&long, false).unwrap();
        assert!(ids.len() > 500);
        let (out, pieces) = streamed(&tokenizer, &ids);
        assert_eq!(out, tokenizer.decode(&ids).unwrap(), "{}", dir.display());
        assert!(pieces > ids.len() / 3, "{pieces} pieces of {} tokens", ids.len());
    }
}

#[test]
fn any_order_of_tokens_streams() {
    let tokenizer = open(&model_dir("tales-3M"));
    let mut x = 12345u64;
    let ids: Vec<u32> = (0..2000)
        .map(|_| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (x >> 33) as u32 % 1024
        })
        .collect();
    for part in ids.chunks(300) {
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for &id in part {
            text += &stream.push(id).unwrap();
        }
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(part).unwrap());
    }
}

#[test]
fn round_trips_are_exact_for_byte_level_tokenizers() {
    let tokenizer = open(&model_dir("tales-3M"));
    let text = std::fs::read_to_string(model_dir("tales_eval.txt")).unwrap();
    let part: String = text.chars().take(20_000).collect();
    let ids = tokenizer.encode(&part, false).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), part);
    assert_eq!(
        (tokenizer.token_id("<s>"), tokenizer.token(1).as_deref(), tokenizer.vocab_size()),
        (Some(0), Some("</s>"), 1024)
    );
}

/// The number of scored tokens of the whole text is known from another implementation of the protocol.
#[test]
fn windows_of_the_evaluation_text() {
    let tokenizer = open(&model_dir("tales-3M"));
    let text = std::fs::read_to_string(model_dir("tales_eval.txt")).unwrap();
    let windows = TokenWindows::of_text(&tokenizer, &text, 0, Some(0), 512, 1024).unwrap();
    assert_eq!(windows.scored(), 32704);
    assert!(windows.iter().all(|w| w.len() == 512 && w[0] == 0));
    let wrong = TokenWindows::of_text(&tokenizer, &text, 0, Some(0), 512, 100).unwrap_err();
    assert!(wrong.message.contains("the model knows 100 tokens only"), "{wrong}");
}

#[test]
fn encoders_texts_end_as_they_should() {
    let Some(dir) = outer_model_dir("all-MiniLM-L6-v2") else { return };
    let tokenizer = open(&dir);
    let whole = tokenizer.encode("The cat sits outside", true).unwrap();
    assert_eq!(tokenizer.encode_at_most("The cat sits outside", 99).unwrap(), whole);
    let short = tokenizer.encode_at_most("The cat sits outside", 4).unwrap();
    assert_eq!(short, [whole[0], whole[1], whole[2], *whole.last().unwrap()]);
    assert!(tokenizer.encode_at_most("The cat", 1).is_err());
}

/// A tokenizer in its compact form.
fn compacted(dir: &Path) -> Option<Tokenizer> {
    let path = dir.join("tokenizer.json");
    let bytes = open(dir).to_compact().unwrap()?;
    let read = Box::new(move || Ok(std::fs::read(&path).unwrap()));
    Some(Tokenizer::from_compact(&bytes, "tokenizer.bin", read).unwrap())
}

#[test]
fn compact_tokenizers_do_what_whole_ones_do() {
    let mut x = 7u64;
    let mut below = |n: usize| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 33) as usize % n
    };
    let parts = [
        "the",
        " and",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "'s",
        "'LL",
        "don't",
        "12",
        "3456789",
        "é",
        "e\u{301}",
        "ß",
        "世界",
        "🦊",
        "\u{200d}",
        "\0",
        "\u{ad}",
        "\u{fffd}",
        "x=y;",
        "...",
        "aaaaaaaaaaaaaaaaaaaa",
        "<|endoftext|>",
        "<|im_start|>",
        "<|",
        "|>",
        "<s>",
        "</s>",
        "Ġ",
        "Ω",
        "नमस्ते",
        "ﬁ",
        "Å",
        "A\u{30a}",
    ];
    for name in ["tiny-qwen2", "tales-3M"] {
        let dir = model_dir(name);
        let (whole, compact) =
            (open(&dir), compacted(&dir).unwrap_or_else(|| panic!("{name} is byte-level BPE")));
        assert_eq!(whole.vocab_size(), compact.vocab_size());
        for round in 0..2000 {
            let text: String = (0..below(12)).map(|_| parts[below(parts.len())]).collect();
            let ids = whole.encode(&text, false).unwrap();
            assert_eq!(ids, compact.encode(&text, false).unwrap(), "{name}, round {round}: {text:?}");
            assert_eq!(whole.decode(&ids).unwrap(), compact.decode(&ids).unwrap());
            let ids: Vec<u32> = (0..below(9)).map(|_| below(whole.vocab_size() + 3) as u32).collect();
            assert_eq!(whole.decode(&ids).unwrap(), compact.decode(&ids).unwrap(), "{name}: {ids:?}");
        }
        for id in (0..whole.vocab_size() as u32 + 9).chain([u32::MAX]) {
            let token = whole.token(id);
            assert_eq!(token, compact.token(id), "{name}: {id}");
            if let Some(token) = token {
                assert_eq!(whole.token_id(&token), compact.token_id(&token));
            }
        }
        assert_eq!(compact.token_id("no token of any"), None);
        // What the compact form lacks is read from the whole.
        let text = "a fox";
        assert_eq!(whole.encode(text, true).unwrap(), compact.encode(text, true).unwrap());
        assert_eq!(whole.encode_at_most(text, 2).unwrap(), compact.encode_at_most(text, 2).unwrap());
        // Made again from itself it is the same.
        assert_eq!(whole.to_compact().unwrap(), compact.to_compact().unwrap());
    }
}

#[test]
fn only_byte_level_bpe_is_compact() {
    let words = br#"{"version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}"#;
    let words = Tokenizer::from_bytes(words, "t.json").unwrap();
    assert_eq!(words.to_compact().unwrap(), None);
    // A byte without a token, and an added token that takes spaces with it.
    let text = std::fs::read_to_string(model_dir("tales-3M").join("tokenizer.json")).unwrap();
    let tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
    let compact = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = tokenizer.clone();
        change(&mut changed);
        let bytes = serde_json::to_vec(&changed).unwrap();
        Tokenizer::from_bytes(&bytes, "t.json").unwrap().to_compact().unwrap()
    };
    assert!(compact(&|_| ()).is_some());
    assert!(compact(&|t| t["added_tokens"][0]["lstrip"] = true.into()).is_none());
    assert!(compact(&|t| t["decoder"] = serde_json::Value::Null).is_none());
    assert!(compact(&|t| t["model"]["dropout"] = 0.1.into()).is_none());
}

#[test]
fn damaged_compact_tokenizers_give_errors_not_panics() {
    let good = open(&model_dir("tales-3M")).to_compact().unwrap().unwrap();
    let read =
        |bytes: &[u8]| Tokenizer::from_compact(bytes, "tokenizer.bin", Box::new(|| Ok(b"{}".to_vec())));
    for len in (0..good.len()).step_by(97).chain([good.len() - 1]) {
        let error = read(&good[..len]).unwrap_err();
        assert_eq!(error.file.as_deref(), Some("tokenizer.bin"));
    }
    let mut x = 99u64;
    let mut below = |n: usize| {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (x >> 33) as usize % n
    };
    let mut refused = 0;
    for _ in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..1 + below(3) {
            let at = if below(2) == 0 { below(64) } else { below(bytes.len()) };
            bytes[at] = [0, 0xff, below(256) as u8][below(3)];
        }
        match read(&bytes) {
            Err(_) => refused += 1,
            // It may be another tokenizer now, but it is one.
            Ok(t) => {
                let ids = t.encode("Once upon a time <|endoftext|> 🦊 don't", false).unwrap();
                t.decode(&ids).unwrap();
                t.decode(&[0, 5, 1023, 1024, u32::MAX]).unwrap();
                t.token_id("the");
            }
        }
    }
    assert!(refused > 1000, "{refused} refused");
}
