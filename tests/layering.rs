//! Who may import whom: the packages of the workspace, and the outside packages that are confined to one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Direct dependencies of each package of the workspace, without those for tests only.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let args = ["metadata", "--format-version=1", "--no-deps", "--offline", "--manifest-path", manifest];
    let out = Command::new(env!("CARGO")).args(args).output().expect("cargo runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).expect("cargo metadata prints JSON");
    let name = |v: &serde_json::Value| v["name"].as_str().expect("packages have names").to_string();
    let list = |v: &serde_json::Value| v.as_array().expect("a list").clone();
    let kept = |d: &&serde_json::Value| d["kind"].is_null();
    list(&json["packages"])
        .iter()
        .map(|p| (name(p), list(&p["dependencies"]).iter().filter(kept).map(name).collect()))
        .collect()
}

#[test]
fn arrows_point_down() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        (
            "quantc",
            &["quantc-ir", "quantc-passes", "quantc-codegen", "quantc-frontends", "quantc-runtime"][..],
        ),
        ("quantc-frontends", &["quantc-ir"]),
        ("quantc-passes", &["quantc-ir"]),
        // Codegen writes the engine format that the runtime declares.
        ("quantc-codegen", &["quantc-ir", "quantc-runtime"]),
        ("quantc-runtime", &[]),
        ("quantc-ir", &[]),
    ]);
    let found = dependencies();
    let names: BTreeSet<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(names, allowed.keys().copied().collect(), "packages of the workspace");
    for (package, deps) in &found {
        for dep in deps.iter().filter(|d| names.contains(d.as_str())) {
            assert!(allowed[package.as_str()].contains(&dep.as_str()), "{package} may not import {dep}");
        }
    }
}

#[test]
fn outside_packages_stay_where_they_belong() {
    let confined = [
        ("egg", &["quantc-passes"][..]),
        ("petgraph", &["quantc-ir"]),
        ("inkwell", &["quantc-codegen"]),
        ("cudarc", &["quantc-codegen", "quantc-runtime"]),
        ("prost", &["quantc-frontends", "quantc-runtime"]),
        ("object", &["quantc-runtime"]),
        ("tokenizers", &["quantc-frontends"]),
        ("clap", &["quantc"]),
    ];
    let found = dependencies();
    for (package, homes) in confined {
        for (user, deps) in &found {
            let inside = homes.contains(&user.as_str());
            assert!(inside || !deps.contains(package), "{user} may not import {package}");
        }
        let used = homes.iter().any(|h| found.get(*h).is_some_and(|deps| deps.contains(package)));
        assert!(used, "nobody uses {package}: take it off the list");
    }
}

/// Codegen may use the runtime's format only.
#[test]
fn codegen_uses_the_format_only() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/codegen/src");
    let mut stack = vec![std::path::PathBuf::from(root)];
    while let Some(dir) = stack.pop() {
        for entry in std::fs::read_dir(dir).expect("sources are readable") {
            let path = entry.expect("sources are readable").path();
            if path.is_dir() {
                stack.push(path);
                continue;
            }
            // What only tests compile may run what was emitted.
            if path.ends_with("testing.rs") || path.ends_with("tests.rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("sources are text");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let code = code.split("#[cfg(all(test").next().unwrap_or_default();
            for line in code.lines().filter(|l| l.contains("quantc_runtime::")) {
                assert!(line.contains("quantc_runtime::format"), "{}: {line}", path.display());
            }
        }
    }
}
