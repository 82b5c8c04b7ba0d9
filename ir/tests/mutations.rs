//! Damaged texts are read or refused with a place, and never bring the reader down.

mod files;

use proptest::prelude::Rng as _;
use proptest::test_runner::{RngAlgorithm, TestRng};
use quantc_ir::diag::Loc;
use quantc_ir::text::{parse, print};
use quantc_ir::verify::verify;

/// Damaged copies of each text.
const COPIES: usize = 60;

/// Pieces that are put into texts.
const PIECES: [&str; 40] = [
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "<",
    ">",
    ",",
    "=",
    ":",
    "\"",
    "%",
    "@",
    "!q<",
    "{-#",
    "#-}",
    "->",
    "..+",
    "//",
    "\n",
    "\\",
    "-",
    "é",
    "\u{0}",
    "99999999999999999999",
    "18446744073709551615",
    "tensor<99999999999x9x!q<int4:f16 tensor>>",
    "tensor<>",
    "none",
    "main",
    "layer @l0",
    "return",
    "weight @g : ",
    "inline [[[",
    "1e999",
    "nan",
    "%\"",
    "?",
    "block 0@9",
];

/// Cuts a text into words, blanks and signs.
fn tokens(text: &str) -> Vec<&str> {
    let mut out = vec![];
    let mut start = 0;
    let class = |c: char| if c.is_alphanumeric() { 0 } else { c as u32 };
    for ((_, a), (i, b)) in text.char_indices().zip(text.char_indices().skip(1)) {
        if class(a) != class(b) {
            out.push(&text[start..i]);
            start = i;
        }
    }
    out.push(&text[start..]);
    out
}

fn damage(text: &str, rng: &mut TestRng) -> String {
    let mut below = |n: usize| (rng.next_u64() % n.max(1) as u64) as usize;
    let mut parts: Vec<String> = tokens(text).into_iter().map(String::from).collect();
    for _ in 0..1 + below(4) {
        let (at, other) = (below(parts.len()), below(parts.len()));
        match below(7) {
            0 => drop(parts.remove(at)),
            1 => parts.swap(at, other),
            2 => parts.insert(at, parts[other].clone()),
            3 => parts[at] = PIECES[below(PIECES.len())].into(),
            4 => parts.insert(at, PIECES[below(PIECES.len())].into()),
            5 => parts.truncate(at + 1),
            _ => {
                let mut bytes = std::mem::take(&mut parts[at]).into_bytes();
                if !bytes.is_empty() {
                    let i = below(bytes.len());
                    bytes[i] ^= 1 << below(8);
                }
                parts[at] = String::from_utf8_lossy(&bytes).into_owned();
            }
        }
        if parts.is_empty() {
            break;
        }
    }
    parts.concat()
}

#[test]
fn damaged_texts_are_read_or_refused() {
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let (mut read, mut refused, mut verified) = (0, 0, 0);
    for (name, text) in files::under("tests", |_| true) {
        for _ in 0..COPIES {
            let damaged = damage(&text, &mut rng);
            match parse(&damaged, &name) {
                Err(diags) => {
                    refused += 1;
                    assert!(!diags.is_empty());
                    for diag in &diags.0 {
                        assert_eq!(diag.file.as_deref(), Some(name.as_str()), "{diag}\n{damaged}");
                        let last = diag.message.starts_with("there are too many errors");
                        assert!(last || matches!(diag.loc, Loc::Text { .. }), "{diag}\n{damaged}");
                    }
                }
                Ok(parsed) => {
                    read += 1;
                    let printed = print(&parsed.module);
                    let again =
                        parse(&printed, &name).unwrap_or_else(|e| panic!("{e}\n{damaged}\n{printed}"));
                    assert_eq!(print(&again.module), printed, "{damaged}");
                    match verify(&parsed.module) {
                        Ok(()) => verified += 1,
                        Err(errors) => {
                            assert!(errors.show(&parsed.module).contains("// ^ error: "));
                            for diag in errors.locate(&parsed.module, &parsed.places, &name).0 {
                                assert!(matches!(diag.loc, Loc::Text { .. }), "{diag}\n{damaged}");
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(refused >= 300 && read >= 100 && verified >= 50, "{refused} {read} {verified}");
}
