//! Every `.qir` of the repository reads, prints and reads again as the same module.

mod files;

use quantc_ir::text::{parse, print, same};

#[test]
fn every_text_reads_back() {
    let files = files::under("tests", |path| !path.contains("/errors/"));
    assert!(files.len() >= 4, "the texts are not where this test looks");
    let mut failures = vec![];
    for (name, text) in files {
        let first = match parse(&text, &name) {
            Ok(parsed) => parsed,
            Err(e) => {
                failures.push(format!("{e}"));
                continue;
            }
        };
        let printed = print(&first.module);
        match parse(&printed, &name) {
            Ok(second) if same(&second.module, &first.module) => {
                if second.module != first.module {
                    // Only the numbering of values may differ, and it does not once it is that of the text.
                    let third = parse(&print(&second.module), &name).expect("the same text was just read");
                    assert_eq!(third.module, second.module, "{name}");
                }
            }
            Ok(second) => {
                failures.push(format!("{name} reads back as\n{}\nnot as\n{printed}", print(&second.module)))
            }
            Err(e) => failures.push(format!("{name} does not read back: {e}\n{printed}")),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
