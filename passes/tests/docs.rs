//! Every pass's manual page: its example runs, and gives what the page says.

#[expect(dead_code, reason = "every test program uses a part of it")]
mod harness;

use quantc_ir::module::Module;
use quantc_ir::text::{self, print_graph, print_layer};
use quantc_ir::weights::Store;
use quantc_passes::Registry;
use quantc_passes::pass::PassInfo;
use std::collections::BTreeSet;

/// Types that `%x` and the last value of an example may have. An example is short, so it does not say.
const TYPES: [&str; 8] = [
    "tensor<?tx4xf32>",
    "tensor<?tx2xf32>",
    "tensor<?tx8xf32>",
    "tensor<?tx2x4xf32>",
    "tensor<?tx4xbf16>",
    "tensor<?sx4xf32>",
    "tensor<?sx4xf16>",
    "tensor<?rx4xf32>",
];

#[test]
fn every_page_has_a_summary_and_documented_options() {
    for pass in Registry::builtin().passes() {
        let summary = pass.summary();
        assert!(summary.ends_with('.') && summary.len() > 20, "{}: `{summary}`", pass.name);
        for option in pass.options {
            assert!(option.doc.trim().ends_with('.'), "{}: {} has no line", pass.name, option.name());
        }
    }
}

#[test]
fn examples_do_what_the_page_says() {
    let mut shown = 0;
    let mut wrong = String::new();
    for pass in Registry::builtin().passes() {
        let Some(before) = block(pass, "qir before") else { continue };
        shown += 1;
        if let Err(why) = check(pass, &before) {
            wrong += &format!("{}: {why}\n", pass.name);
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(shown >= 6, "only {shown} examples were found");
}

fn check(pass: &PassInfo, before: &str) -> Result<(), String> {
    let after = block(pass, "qir after").ok_or("there is no `after`")?;
    let store = Store::in_memory();
    let mut module = example(before)?;
    let options = block(pass, "text options").unwrap_or_default();
    let run = format!("{}{}", pass.name, options.trim());
    harness::run(&mut module, &store, &run, true).map_err(|e| e.to_string())?;
    let wanted: Vec<&str> = after.lines().map(str::trim).collect();
    let got = named_alike(body(&module), &wanted).join("\n");
    if got == wanted.join("\n") { Ok(()) } else { Err(format!("the page says\n{after}\nbut it is\n{got}\n")) }
}

/// The lines of a fenced block of the manual page.
fn block(pass: &PassInfo, head: &str) -> Option<String> {
    let start = pass.doc.find(&format!("```{head}\n"))? + head.len() + 4;
    let len = pass.doc[start..].find("```")?;
    let lines = pass.doc[start..start + len].lines().map(str::trim);
    Some(lines.filter(|l| !l.is_empty()).collect::<Vec<_>>().join("\n"))
}

/// The module of an example: free names are declared, the last value is the result.
fn example(body: &str) -> Result<Module, String> {
    let (mut declared, mut ops, mut sections) = (String::new(), vec![], String::new());
    for line in body.lines() {
        if line.starts_with('%') {
            ops.push(line);
        } else if line.starts_with("{-#") {
            sections = format!("{line}\n");
        } else {
            declared += &format!("{line}\n");
        }
    }
    for line in &ops {
        let state = line.split_once("= cache_append @").and_then(|(_, rest)| rest.split_once(','));
        if let Some((name, _)) = state
            && !declared.contains(&format!("@{name} "))
        {
            declared += &format!("state @{name} : tensor<8x4xf32>\n");
        }
    }
    for (name, is_matrix) in weights(&ops) {
        if !declared.contains(&format!("@{name} ")) {
            let ty = if is_matrix { "tensor<4x4xf32>" } else { "tensor<4xf32>" };
            declared += &format!("weight @{name} : {ty} = splat 0.5\n");
        }
    }
    let defined: Vec<&str> = ops.iter().filter_map(|l| Some(l[1..].split_once(' ')?.0)).collect();
    let mut free = vec![];
    for name in ops.iter().flat_map(|l| names(l, '%')) {
        if !defined.contains(&name) && !free.contains(&name) {
            free.push(name);
        }
    }
    let last = defined.last().ok_or("there is no op")?;
    let mut why = String::new();
    for x in TYPES {
        for y in TYPES {
            let params: Vec<String> = free.iter().map(|n| format!("%{n}: {x}")).collect();
            let text = format!(
                "module @example\n{declared}main ({}) -> {y} {{\n{}\nreturn %{last}\n}}\n{sections}",
                params.join(", "),
                ops.join("\n")
            );
            match text::parse(&text, "example") {
                Err(problems) => why = problems.to_string(),
                Ok(parsed) => match quantc_ir::verify::verify(&parsed.module) {
                    Err(problems) => why = problems.show(&parsed.module),
                    Ok(()) => return Ok(parsed.module),
                },
            }
        }
    }
    Err(why)
}

/// Gives values that have only a number the names that the page gives them.
fn named_alike(mut got: Vec<String>, wanted: &[&str]) -> Vec<String> {
    let defined = |l: &str| Some(l.strip_prefix('%')?.split_once(" = ")?.0.to_string());
    for i in 0..got.len().min(wanted.len()) {
        let (Some(number), Some(name)) = (defined(&got[i]), defined(wanted[i])) else { continue };
        if number.bytes().all(|b| b.is_ascii_digit()) {
            for line in &mut got {
                let words: Vec<String> = line
                    .split_inclusive([' ', ','])
                    .map(|w| {
                        let bare = w.trim_end_matches([' ', ',']);
                        if bare == format!("%{number}") {
                            format!("%{name}{}", &w[bare.len()..])
                        } else {
                            w.into()
                        }
                    })
                    .collect();
                *line = words.concat();
            }
        }
    }
    got
}

/// Names after `sign` in a line.
fn names(line: &str, sign: char) -> Vec<&str> {
    let end = |s: &str| s.find(|c: char| !(c.is_alphanumeric() || "_.-".contains(c))).unwrap_or(s.len());
    line.split(sign).skip(1).map(|s| &s[..end(s)]).collect()
}

/// Weights that the ops read, and whether each is read as a matrix.
fn weights<'a>(ops: &[&'a str]) -> BTreeSet<(&'a str, bool)> {
    let mut out = BTreeSet::new();
    for line in ops {
        let is_matrix = ["= matmul ", "= transpose ", "= embedding "].iter().any(|op| line.contains(op));
        out.extend(names(line, '@').into_iter().map(|n| (n, is_matrix)));
    }
    out
}

/// Layers, then the ops of main, without the types that the printer adds to ops.
fn body(module: &Module) -> Vec<String> {
    let mut text: String = module.layers.keys().map(|id| print_layer(module, id)).collect();
    let main = print_graph(module, &module.main);
    let ops = main.lines().filter(|l| l.trim_start().starts_with('%'));
    ops.for_each(|l| text += &format!("{l}\n"));
    let short = |l: &str| match l.trim() {
        op if op.starts_with('%') => op.split(" : ").next().unwrap_or(op).to_string(),
        other => other.to_string(),
    };
    text.lines().filter(|l| !l.trim().is_empty()).map(short).collect()
}
