//! Large and deep texts are answered in time and memory that fit their length.

use quantc_ir::text::{parse, print};
use quantc_ir::verify::verify;
use std::time::{Duration, Instant};

fn within(limit: Duration, what: &str, run: impl FnOnce()) {
    let start = Instant::now();
    run();
    assert!(start.elapsed() < limit, "{what} took {:?}", start.elapsed());
}

const FUNCTION: &str = "main (%x: tensor<?x4xf32>) -> tensor<?x4xf32> {\n  return %x\n}\n";

#[test]
fn deep_and_unclosed_texts_are_refused() {
    let many = 200_000;
    let texts = [
        "{".repeat(many),
        format!("module @m {{a={}", "[".repeat(many)),
        format!("module @m {{a={}", "a{a=".repeat(many)),
        format!("module @m\nweight @w : tensor<1xf32> = inline {}", "[".repeat(many)),
        format!("module @m\nweight @w : tensor<{}f32> = splat 1.0", "1x".repeat(many)),
        format!("module @m\n{}", "main (".repeat(many)),
        format!("module @m\nmain () -> () {{{}", "{".repeat(many)),
        format!("module @m\n{}", "{-# ".repeat(many)),
        format!("module @m\n{}", "%".repeat(many)),
        format!("module @m\n{}", "%\n".repeat(many)),
        format!("module @{}", "a".repeat(many)) + "\n" + &"x\n".repeat(1000),
    ];
    for text in texts {
        let head: String = text.chars().take(40).collect();
        within(Duration::from_secs(10), &head, || {
            let errors = parse(&text, "hostile").unwrap_err();
            assert!(errors.0.len() <= 51, "{head}");
            let said: usize = errors.0.iter().map(|e| e.message.len()).sum();
            assert!(said < 100_000, "{head}");
        });
    }
}

#[test]
fn huge_types_take_no_memory() {
    let sources = ["splat 1.0", "blob ", "file 0[0..+8]", "inline [[1.0]]"];
    for source in sources {
        let source = if source == "blob " { format!("blob {}", "0".repeat(64)) } else { source.to_string() };
        for dims in ["99999999999x99999", "18446744073709551615x18446744073709551615", "0x99999999999"] {
            let text =
                format!("module @m\nshard 0 = \"f\"\nweight @w : tensor<{dims}xf32> = {source}\n{FUNCTION}");
            let Ok(parsed) = parse(&text, "hostile") else {
                assert!(source.starts_with("inline"), "only data that is written can be missing: {text}");
                continue;
            };
            assert!(print(&parsed.module).contains(dims));
            // A blob may be as large as it likes while its bytes can be counted; a range is as long as its weight, and
            // numbers that stand in no file are not repeated without end.
            let endless = source.starts_with("splat") && !dims.starts_with('0');
            let sound = !dims.starts_with("1844") && !source.starts_with("file") && !endless;
            assert_eq!(verify(&parsed.module).is_ok(), sound, "{text}");
        }
    }
}

#[test]
fn long_texts_are_read_in_linear_time() {
    let ops = 30_000;
    let mut text =
        String::from("module @m\nmain (%x: tensor<?x4xf32>) -> tensor<?x4xf32> {\n  %v = relu %x\n");
    for i in 0..ops {
        let from = if i == 0 { "v".to_string() } else { format!("v{}", i - 1) };
        text += &format!("  %v{i} = add %{from}, %x\n");
    }
    text += &format!("  return %v{}\n}}\n", ops - 1);
    within(Duration::from_secs(20), "a long function", || {
        let parsed = parse(&text, "long").unwrap();
        verify(&parsed.module).unwrap();
        let printed = print(&parsed.module);
        assert_eq!(print(&parse(&printed, "long").unwrap().module), printed);
    });
    let numbers = vec!["0.25"; 200_000].join(", ");
    let text = format!("module @m\nweight @w : tensor<200000xf32> = inline [{numbers}]\n{FUNCTION}");
    within(Duration::from_secs(20), "a long list", || {
        let parsed = parse(&text, "long").unwrap();
        assert!(print(&parsed.module).contains(&numbers));
    });
}
