//! Opening engines: what is refused and what the message says; damaged files never panic or hang.

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{Elf, Random, toy, toy_manifest, toy_object, write_engine};
use quantc_runtime::format::{
    DIGEST_BYTES, KERNELS_FILE, Kind, MAGIC, MANIFEST_FILE, Manifest, WEIGHTS_FILE,
};
use quantc_runtime::{Engine, Error, ErrorKind, OpenOptions, Session, SessionOptions};

fn open(folder: &Path) -> Result<Engine, Error> {
    Engine::open(folder, &OpenOptions::default())
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    fs::write(folder.join(name), bytes).expect("the file is written");
}

fn read(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name)).expect("the file is read")
}

/// Writes a manifest whose file entry for `name` fits `bytes`, and the bytes.
fn write_listed(folder: &Path, manifest: &Manifest, name: &str, bytes: &[u8]) {
    let mut manifest = manifest.clone();
    let file = manifest.files.iter_mut().find(|file| file.name == name).expect("the file is listed");
    file.len = bytes.len() as u64;
    file.digest = blake3::hash(bytes).as_bytes().to_vec();
    write(folder, name, bytes);
    write(folder, MANIFEST_FILE, &manifest.encode_file());
}

#[test]
fn an_open_engine_tells_what_it_holds() {
    let (folder, engine) = toy(Kind::Decoder);
    assert_eq!(engine.path(), folder.path());
    assert_eq!(engine.manifest().model, "toy");
    let (emb, _) = common::toy_weights();
    let bytes: Vec<u8> = emb.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(engine.weight(0), Some(bytes.as_slice()));
    assert_eq!(engine.weight(2), None);
    assert_eq!(engine.object().expect("it runs on a processor").symbols().count(), 5);
    assert_eq!(engine.read_file("pipeline.txt").expect("it is listed"), b"none\n");
    assert!(engine.read_file("secret.txt").is_err());
    assert!(engine.read_file("../manifest.pb").is_err());
}

#[test]
fn each_file_is_checked_and_named() {
    for name in [KERNELS_FILE, WEIGHTS_FILE, "pipeline.txt"] {
        let (folder, _engine) = toy(Kind::Decoder);
        let good = read(folder.path(), name);
        let mut flipped = good.clone();
        flipped[1] ^= 4;
        write(folder.path(), name, &flipped);
        // Files that the runtime itself does not need are compared when they are read.
        let error = match name {
            "pipeline.txt" => open(folder.path()).and_then(|engine| engine.read_file(name).map(drop)),
            _ => open(folder.path()).map(drop),
        };
        let error = error.expect_err("a bit was flipped");
        assert_eq!(error.kind(), ErrorKind::Digest, "{error}");
        assert!(
            error.to_string().contains(name) && error.to_string().contains("the contents have blake3"),
            "{error}"
        );
        write(folder.path(), name, &good[..good.len() - 1]);
        let error = open(folder.path()).expect_err("a byte is missing").to_string();
        let (is, should) = (good.len() - 1, good.len());
        assert!(
            error.ends_with(&format!("{name}: the file has {is} bytes, the manifest says {should}")),
            "{error}"
        );
        fs::remove_file(folder.path().join(name)).expect("the file is there");
        let error = open(folder.path()).expect_err("the file is missing");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains(name), "{error}");
        fs::create_dir(folder.path().join(name)).expect("a folder in its place");
        let error = open(folder.path()).expect_err("a folder is no file").to_string();
        assert!(error.ends_with(&format!("{name}: not a plain file")), "{error}");
    }
    let nothing = tempfile::tempdir().expect("a temporary folder");
    let error = open(nothing.path()).expect_err("the folder is empty").to_string();
    assert!(error.contains(MANIFEST_FILE) && error.contains("cannot open the file"), "{error}");
}

#[test]
fn damaged_weights_are_named_unless_not_verified() {
    let (folder, _engine) = toy(Kind::Decoder);
    let mut weights = read(folder.path(), WEIGHTS_FILE);
    weights[4096 + 5] ^= 1;
    write(folder.path(), WEIGHTS_FILE, &weights);
    let error = open(folder.path()).expect_err("weight 1 is damaged").to_string();
    assert!(error.contains("weights.bin: weight 1 \"head\": the contents have blake3"), "{error}");
    let options = OpenOptions { verify_weights: false, ..OpenOptions::default() };
    Engine::open(folder.path(), &options).expect("weights are not looked at");
    weights[4096 + 5] ^= 1;
    weights[4095] = 1;
    write(folder.path(), WEIGHTS_FILE, &weights);
    let error = open(folder.path()).expect_err("the gap is damaged").to_string();
    assert!(error.contains("640..4096 belong to no weight but are not zero"), "{error}");
}

#[test]
fn a_machine_without_the_instructions_is_told_so() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut manifest = toy_manifest(Kind::Decoder);
    // No machine has both, and none that runs this test has the first.
    manifest.target.name = "odd".into();
    manifest.target.features = vec!["sse2".into(), "tbm2000".into()];
    write_engine(folder.path(), manifest.clone(), &toy_object().build());
    let error = open(folder.path()).expect_err("nobody has it");
    assert_eq!(error.kind(), ErrorKind::Target);
    let text = error.to_string();
    assert!(text.contains("target `odd` (sse2, tbm2000)") && text.contains("it has sse, sse2"), "{text}");
    let has = quantc_runtime::host_features();
    let Some(lacking) = ["avx512fp16", "avxvnniint16", "sse4a"].iter().find(|name| !has.contains(name))
    else {
        return eprintln!(
            "a_machine_without_the_instructions_is_told_so: half skipped, this machine has everything"
        );
    };
    manifest.target.features = vec![(*lacking).into()];
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_engine(folder.path(), manifest, &toy_object().build());
    let text = open(folder.path()).expect_err("the machine lacks it").to_string();
    assert!(text.contains(&format!("this machine lacks {lacking}; it has")), "{text}");
}

#[test]
fn a_missing_kernel_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut object = toy_object();
    object.symbols.retain(|symbol| symbol.name != "toy_mix");
    write_engine(folder.path(), toy_manifest(Kind::Decoder), &object.build());
    let error = open(folder.path()).expect_err("toy_mix is missing").to_string();
    assert!(error.ends_with("kernels.o: the object lacks `toy_mix`, which `mix` calls"), "{error}");
    let folder = tempfile::tempdir().expect("a temporary folder");
    write_engine(folder.path(), toy_manifest(Kind::Decoder), b"not an object");
    let error = open(folder.path()).expect_err("there is no object").to_string();
    assert!(error.contains("kernels.o: not a well-formed ELF object"), "{error}");
}

#[test]
fn damaged_files_never_open() {
    let (folder, _engine) = toy(Kind::Decoder);
    let mut random = Random(41);
    for name in [MANIFEST_FILE, KERNELS_FILE, WEIGHTS_FILE] {
        let good = read(folder.path(), name);
        for round in 0..300 {
            let damaged = random.damage(&good);
            if damaged == good {
                continue;
            }
            write(folder.path(), name, &damaged);
            let error =
                open(folder.path()).err().unwrap_or_else(|| panic!("{name}, round {round}: it opened"));
            assert!(error.to_string().contains(name), "{error}");
        }
        write(folder.path(), name, &good);
    }
    open(folder.path()).expect("all files are whole again");
}

#[test]
fn damaged_manifests_with_a_right_digest_give_errors_or_valid_engines() {
    let (folder, _engine) = toy(Kind::Decoder);
    let good = read(folder.path(), MANIFEST_FILE);
    let body = &good[MAGIC.len() + DIGEST_BYTES..];
    let mut random = Random(42);
    let (mut refused, mut opened) = (0, 0);
    for _ in 0..3000 {
        let damaged = random.damage(body);
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(blake3::hash(&damaged).as_bytes());
        bytes.extend_from_slice(&damaged);
        write(folder.path(), MANIFEST_FILE, &bytes);
        match open(folder.path()) {
            Err(_) => refused += 1,
            Ok(engine) => {
                opened += 1;
                engine.manifest().validate().expect("an open engine's manifest is valid");
                engine.manifest().to_text();
                // Sizes may be odd, but never more than there is.
                let options = SessionOptions { threads: 1, ..SessionOptions::default() };
                if let Ok(session) = Session::new(Arc::new(engine), &options) {
                    assert_eq!(session.position(0), 0);
                }
            }
        }
    }
    assert!(refused > 1000 && opened > 100, "{refused} refused, {opened} opened");
}

#[test]
fn damaged_objects_with_a_right_digest_give_errors_or_load() {
    let (folder, engine) = toy(Kind::Decoder);
    let manifest = engine.manifest().clone();
    let good = toy_object().build();
    let mut random = Random(43);
    let mut refused = 0;
    for _ in 0..1000 {
        let damaged = random.damage(&good);
        write_listed(folder.path(), &manifest, KERNELS_FILE, &damaged);
        refused += usize::from(open(folder.path()).is_err());
    }
    assert!(refused > 200, "only {refused} refused");
    write_listed(folder.path(), &manifest, KERNELS_FILE, &Elf::default().build());
    assert!(open(folder.path()).is_err(), "an empty object has no kernels");
}

#[test]
fn damaged_weights_with_a_right_file_digest_are_found_by_blob() {
    let (folder, engine) = toy(Kind::Decoder);
    let manifest = engine.manifest().clone();
    let good = read(folder.path(), WEIGHTS_FILE);
    let mut random = Random(44);
    for round in 0..300 {
        let damaged = random.damage(&good);
        // A file that only grew by zeros holds the same weights.
        let same = damaged.starts_with(&good) && damaged[good.len()..].iter().all(|&byte| byte == 0);
        write_listed(folder.path(), &manifest, WEIGHTS_FILE, &damaged);
        assert_eq!(open(folder.path()).is_ok(), same, "round {round}");
    }
}
