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
