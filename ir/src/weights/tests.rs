use super::*;
use crate::formats::INT3;
use crate::scheme::{Group, Scheme, Zero};
use crate::ty::{Dim, ElemTy, Float};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

fn decl(name: &str, ty: TensorTy, source: WeightSource) -> WeightDecl {
    WeightDecl { name: name.into(), ty, source }
}

fn one(ty: TensorTy, source: WeightSource) -> (Weights, WeightId) {
    let mut weights = Weights::new();
    let id = weights.push(decl("w", ty, source));
    (weights, id)
}

fn shard() -> ShardId {
    let mut shards = Shards::new();
    shards.push(Shard { file: "model.safetensors".into() })
}

fn recipe(options: &str) -> Recipe {
    Recipe { step: "double", version: 1, options: options.into(), inputs: vec![Digest::of(b"in")] }
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn refusal<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("it was accepted"),
        Err(d) => d.to_string(),
    }
}

#[test]
fn floats_of_every_kind_at_odd_offsets() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard");
    let xs: Vec<f32> = (0..3 * 1500).map(|i| (i as f32 - 2000.0) / 8.0).collect();
    for ty in [Float::F32, Float::F16, Float::Bf16] {
        let mut bytes = vec![0xee; 3];
        view::float_bytes(ty, &xs, &mut bytes);
        let len = bytes.len() as u64 - 3;
        bytes.push(0xee);
        fs::write(&path, &bytes).unwrap();
        let store = Store::in_memory();
        store.add_shard(shard(), &path).unwrap();
        assert_eq!(store.shard_len(shard()), Some(len + 4));
        let source = WeightSource::File { shard: shard(), at: 3, len };
        let (weights, id) = one(TensorTy::fixed(ty, &[3, 1500]), source);
        // The view outlives the store.
        let view = store.view(&weights, id).unwrap();
        drop(store);
        let want: Vec<f32> = xs.iter().map(|&x| ty.format().decode(ty.format().encode(x))).collect();
        assert_eq!(view.read_all_f32().unwrap(), want);
        let mut row = vec![0.0; 1500];
        for r in [2, 0, 1] {
            view.read_rows_f32(r, 1, &mut row).unwrap();
            assert_eq!(row, want[r * 1500..][..1500]);
            view.release(r..r + 1);
        }
        view.release(0..99);
        assert_eq!(view.read_all_f32().unwrap(), want, "released rows can be read again");
        let mut raw = vec![0; view.row_bytes() * 2];
        view.read_rows_bytes(1, 2, &mut raw).unwrap();
        assert_eq!(raw, view.bytes().unwrap()[view.row_bytes()..]);
    }
}

#[test]
fn ranges_that_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard");
    fs::write(&path, [0; 64]).unwrap();
    let store = Store::in_memory();
    store.add_shard(shard(), &path).unwrap();
    let ty = || TensorTy::fixed(Float::F32, &[4, 4]);
    for (at, len) in
        [(1, 64), (64, 64), (65, 0), (u64::MAX, 64), (u64::MAX - 63, 64), (0, u64::MAX), (1 << 63, 1 << 63)]
    {
        let (weights, id) = one(ty(), WeightSource::File { shard: shard(), at, len });
        let text = refusal(store.view(&weights, id));
        assert!(text.contains("of a file of 64 bytes") && text.contains("@w"), "{text}");
        assert!(store.digest(&weights, id).is_err());
    }
    for len in [0, 32, 60] {
        let (weights, id) = one(ty(), WeightSource::File { shard: shard(), at: 0, len });
        let text = refusal(store.view(&weights, id));
        assert!(text.contains(&format!("takes 64 bytes, but its source has {len}")), "{text}");
    }
    let file = || WeightSource::File { shard: shard(), at: 0, len: 64 };
    for (ty, source) in [
        (TensorTy::fixed(Float::F32, &[u64::MAX, 2]), file()),
        (TensorTy::fixed(Float::F32, &[1 << 62, 1 << 62, 0]), WeightSource::Inline(vec![])),
        (TensorTy::fixed(Float::F32, &[1 << 40, 1 << 40]), WeightSource::Splat(1.0.into())),
        (TensorTy::new(Float::F32, [Dim::Sym('t'), Dim::Static(4)]), WeightSource::Splat(1.0.into())),
        (TensorTy::new(ElemTy::I32, [Dim::Static(4)]), WeightSource::Splat(1.0.into())),
        (ty(), WeightSource::Inline(vec![0; 63])),
        (ty(), WeightSource::Blob(Digest::of(b"nobody wrote this"))),
    ] {
        let (weights, id) = one(ty, source);
        assert!(store.view(&weights, id).is_err(), "{weights:?}");
    }
    let other = Store::in_memory();
    let (weights, id) = one(ty(), file());
    assert!(refusal(other.view(&weights, id)).contains("not open"));
    assert!(refusal(other.add_shard(shard(), dir.path().join("missing"))).contains("cannot read"));
    assert!(other.add_shard(shard(), dir.path()).is_err(), "a directory is no file");
}

#[test]
fn rows_beyond_the_end_are_refused() {
    let (weights, id) = one(TensorTy::fixed(Float::F32, &[2, 3]), WeightSource::Splat(1.0.into()));
    let store = Store::in_memory();
    let view = store.view(&weights, id).unwrap();
    assert!(view.read_rows_f32(1, 2, &mut [0.0; 6]).is_err());
    assert!(view.read_rows_f32(usize::MAX, 2, &mut [0.0; 6]).is_err());
    assert!(view.read_rows_f32(0, 1, &mut [0.0; 4]).is_err());
    assert!(view.read_rows_codes(0, 1, &mut [0; 3]).is_err());
    assert!(view.read_rows_i32(0, 1, &mut [0; 3]).is_err());
    assert!(view.read_rows_f32(2, 0, &mut []).is_ok());
}

#[test]
fn empty_and_small_ranks() {
    let store = Store::in_memory();
    for (dims, rows, cols) in
        [(&[][..], 1, 1), (&[5], 1, 5), (&[0], 1, 0), (&[0, 4], 0, 4), (&[3, 0], 3, 0), (&[2, 3, 4], 6, 4)]
    {
        let bytes = (0..(rows * cols) as u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let (weights, id) = one(TensorTy::fixed(Float::F32, dims), WeightSource::Inline(bytes));
        let view = store.view(&weights, id).unwrap();
        assert_eq!((view.rows(), view.cols()), (rows, cols));
        assert_eq!(view.read_all_f32().unwrap(), (0..rows * cols).map(|i| i as f32).collect::<Vec<_>>());
        view.release(0..rows);
        let blocks: Vec<_> = view.row_blocks(2 * 4 * cols).collect();
        assert_eq!(blocks.iter().map(|b| b.len()).sum::<usize>(), rows);
        assert!(blocks.windows(2).all(|b| b[0].end == b[1].start));
    }
}

#[test]
fn numbers_repeated_are_rounded() {
    let store = Store::in_memory();
    let (weights, id) = one(TensorTy::fixed(Float::F16, &[2, 2]), WeightSource::Splat(0.1.into()));
    let view = store.view(&weights, id).unwrap();
    assert!(view.bytes().is_none());
    assert_eq!(view.read_all_f32().unwrap(), [half::f16::from_f32(0.1).to_f32(); 4]);
    let mut raw = [0; 8];
    view.read_rows_bytes(0, 2, &mut raw).unwrap();
    assert_eq!(raw, [half::f16::from_f32(0.1).to_le_bytes(); 4].concat()[..]);
}

#[test]
fn codes_and_integers() {
    let store = Store::in_memory();
    let scheme = Scheme { format: &INT3, group: Group::Axis(0), zero: Zero::Symmetric, scale: Float::F32 };
    let codes: Vec<u8> = (0..3 * 11).map(|i| (i * 5 % 8) as u8).collect();
    let digest = store
        .derive(&recipe("codes"), 1, &mut |out| {
            codes.chunks(11).try_for_each(|row| out[0].write_row_codes(&INT3, row))
        })
        .unwrap()[0];
    let (weights, id) = one(TensorTy::fixed(ElemTy::Q(scheme), &[3, 11]), WeightSource::Blob(digest));
    let view = store.view(&weights, id).unwrap();
    assert_eq!(view.row_bytes(), 5);
    assert_eq!(view.read_all_codes().unwrap(), codes);
    let mut two = [0; 22];
    view.read_rows_codes(1, 2, &mut two).unwrap();
    assert_eq!(two, codes[11..]);
    assert!(view.read_all_f32().is_err());

    let ints = WeightSource::Inline([-1i32, 7].iter().flat_map(|x| x.to_le_bytes()).collect());
    let (weights, id) = one(TensorTy::new(ElemTy::I32, [Dim::Static(2)]), ints);
    let mut out = [0; 2];
    store.view(&weights, id).unwrap().read_rows_i32(0, 1, &mut out).unwrap();
    assert_eq!(out, [-1, 7]);
}

#[test]
fn aliases() {
    let ty = TensorTy::fixed(Float::F32, &[2]);
    let store = Store::in_memory();
    let mut weights = Weights::new();
    let splat = weights.push(decl("embed", ty.clone(), WeightSource::Splat(2.0.into())));
    let tied = weights.push(decl("head", ty.clone(), WeightSource::Alias(splat)));
    let twice = weights.push(decl("head2", ty.clone(), WeightSource::Alias(tied)));
    assert_eq!(resolve(&weights, twice).unwrap(), splat);
    assert_eq!(store.view(&weights, twice).unwrap().read_all_f32().unwrap(), [2.0; 2]);
    assert_eq!(store.digest(&weights, twice).unwrap(), store.digest(&weights, splat).unwrap());
    weights[splat].source = WeightSource::Alias(twice);
    assert!(refusal(store.view(&weights, tied)).contains("an alias of itself"));
    assert!(store.digest(&weights, splat).is_err());
    weights[splat] = decl("embed", TensorTy::fixed(Float::F16, &[2]), WeightSource::Splat(2.0.into()));
    assert!(refusal(store.view(&weights, tied)).contains("tensor<2xf16> and not tensor<2xf32>"));
    weights = [decl("w", ty, WeightSource::Alias(twice))].into_iter().collect();
    assert!(refusal(store.view(&weights, splat)).contains("not in the module"));
}

#[test]
fn digests_tell_type_and_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard");
    fs::write(&path, [7; 24]).unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    store.add_shard(shard(), &path).unwrap();
    let ty = TensorTy::fixed(Float::F32, &[2]);
    let digest = |ty: &TensorTy, source| {
        let (weights, id) = one(ty.clone(), source);
        store.digest(&weights, id).unwrap()
    };
    let file = |at| WeightSource::File { shard: shard(), at, len: 8 };
    let of_file = digest(&ty, file(0));
    assert_eq!(of_file, digest(&ty, file(9)), "where it lies does not matter");
    assert_eq!(of_file, digest(&ty, WeightSource::Inline(vec![7; 8])));
    assert_eq!(of_file, digest(&ty, WeightSource::Blob(store.put(&[7; 8]).unwrap())));
    assert_ne!(of_file, digest(&ty, WeightSource::Inline(vec![8; 8])));
    assert_ne!(of_file, digest(&TensorTy::fixed(Float::F16, &[4]), file(0)));
    assert_ne!(of_file, digest(&TensorTy::fixed(Float::F32, &[1, 2]), file(0)));
    assert_ne!(digest(&ty, WeightSource::Splat(0.0.into())), digest(&ty, WeightSource::Splat((-0.0).into())));

    // A replaced shard is read anew.
    fs::remove_file(&path).unwrap();
    fs::write(&path, [8; 24]).unwrap();
    store.add_shard(shard(), &path).unwrap();
    assert_eq!(digest(&ty, file(0)), digest(&ty, WeightSource::Inline(vec![8; 8])));
}

#[test]
fn derived_once() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..3 {
        // The first two rounds share a store; the third comes back to the directory.
        let (in_memory, on_disk) = (Store::in_memory(), Store::open(dir.path()).unwrap());
        for store in [&in_memory, &on_disk] {
            let mut runs = 0;
            let mut derive = |options: &str| {
                store.derive(&recipe(options), 2, &mut |out| {
                    runs += 1;
                    out[0].write(&vec![1; 700_000])?;
                    out[0].write(&[2; 3])?;
                    out[1].write_f32(Float::F16, &[1.0, -2.0])
                })
            };
            let first = derive("a").unwrap();
            assert_eq!(derive("a").unwrap(), first);
            assert_eq!(derive("b").unwrap(), first, "the same bytes are the same blobs");
            assert_eq!(first[0], Digest::of(&[vec![1; 700_000], vec![2; 3]].concat()));
            assert_eq!(store.read_blob(first[1]).unwrap(), [0, 0x3c, 0, 0xc0]);
            let bytes = 700_007;
            let stats = if store.dir().is_some() && round > 0 {
                StoreStats { made: 0, reused: 3, bytes_made: 0, bytes_reused: 3 * bytes }
            } else {
                StoreStats { made: 2, reused: 1, bytes_made: 2 * bytes, bytes_reused: bytes }
            };
            assert_eq!((store.stats(), runs), (stats, stats.made));
        }
    }
    assert_eq!(files(&dir.path().join("blobs")).len(), 2);
    assert_eq!(files(&dir.path().join("recipes")).len(), 2);
    assert!(files(&dir.path().join("tmp")).is_empty());
}

#[test]
fn a_failed_step_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let failed = store.derive(&recipe(""), 1, &mut |out| {
        out[0].write(&vec![1; 1 << 20])?;
        Err(Diag::input("element [0, 3] is NaN"))
    });
    let text = refusal(failed);
    assert!(
        text.contains("element [0, 3] is NaN") && text.contains("while: carrying out the step double"),
        "{text}"
    );
    for sub in ["blobs", "recipes", "tmp"] {
        assert!(files(&dir.path().join(sub)).is_empty());
    }
    assert_eq!(store.stats(), StoreStats::default());
}

/// The state that a kill leaves at any point between two file operations.
#[test]
fn killed_at_any_point() {
    let dir = tempfile::tempdir().unwrap();
    let derive = |store: &Store| {
        store.derive(&recipe(""), 2, &mut |out| {
            out[0].write(b"left")?;
            out[1].write(b"right")
        })
    };
    let made = derive(&Store::open(dir.path()).unwrap()).unwrap();
    let recipe_file = dir.path().join("recipes").join(recipe("").digest().to_string());
    let whole = fs::read(&recipe_file).unwrap();
    let blob = |i: usize| dir.path().join("blobs").join(made[i].to_string());
    let tmp = dir.path().join("tmp");

    let spoil: [&dyn Fn(); 7] = [
        &|| fs::write(tmp.join("4242-0"), b"half a bl").unwrap(),
        &|| fs::remove_file(&recipe_file).unwrap(),
        &|| fs::remove_file(blob(0)).unwrap(),
        &|| fs::write(blob(1), b"rig").unwrap(),
        &|| fs::write(blob(1), b"").unwrap(),
        &|| fs::write(&recipe_file, &whole[..whole.len() - 1]).unwrap(),
        &|| fs::write(&recipe_file, b"").unwrap(),
    ];
    for (i, spoil) in spoil.iter().enumerate() {
        spoil();
        let store = Store::open(dir.path()).unwrap();
        assert!(files(&tmp).is_empty(), "what was left is swept");
        assert_eq!(derive(&store).unwrap(), made);
        assert_eq!(store.stats().made, u64::from(i > 0), "state {i}");
        assert_eq!(fs::read(blob(0)).unwrap(), b"left");
        assert_eq!(fs::read(blob(1)).unwrap(), b"right");
        assert_eq!(fs::read(&recipe_file).unwrap(), whole);
    }
    // A recipe cut at any length is no recipe.
    for n in 0..whole.len() {
        fs::write(&recipe_file, &whole[..n]).unwrap();
        let store = Store::open(dir.path()).unwrap();
        derive(&store).unwrap();
        assert_eq!(store.stats().made, 1, "cut at {n}");
    }
}

#[test]
fn a_writer_at_work_is_not_swept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let made = store.derive(&recipe(""), 1, &mut |out| {
        out[0].write(&vec![5; 1 << 20])?;
        Store::open(dir.path())?;
        assert_eq!(files(&dir.path().join("tmp")).len(), 1);
        Ok(())
    });
    assert_eq!(store.read_blob(made.unwrap()[0]).unwrap(), vec![5; 1 << 20]);
}

#[test]
fn a_damaged_blob_is_found_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let derive = |store: &Store| store.derive(&recipe(""), 1, &mut |out| out[0].write(&[1; 8])).unwrap()[0];
    let digest = derive(&Store::open(dir.path()).unwrap());
    fs::write(dir.path().join("blobs").join(digest.to_string()), [2; 8]).unwrap();
    let (weights, id) = one(TensorTy::fixed(Float::F32, &[2]), WeightSource::Blob(digest));
    assert!(Store::open(dir.path()).unwrap().view(&weights, id).is_ok(), "the length is right");
    let store = Store::open(dir.path()).unwrap().verifying();
    assert!(refusal(store.view(&weights, id)).contains("corrupt"));
    assert_eq!(derive(&store), digest);
    assert_eq!(store.stats().made, 1);
    assert_eq!(store.view(&weights, id).unwrap().bytes().unwrap(), [1; 8]);
}

#[test]
fn threads_that_derive_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for store in [Store::in_memory(), Store::open(dir.path()).unwrap()] {
        let runs = AtomicUsize::new(0);
        let results: Vec<Vec<Digest>> = std::thread::scope(|s| {
            let work = |i: usize| {
                let (store, runs) = (&store, &runs);
                s.spawn(move || {
                    store
                        .derive(&recipe(if i < 4 { "other" } else { "same" }), 1, &mut |out| {
                            runs.fetch_add(1, Ordering::Relaxed);
                            (0..100).try_for_each(|j| out[0].write(&[j; 5000]))
                        })
                        .unwrap()
                })
            };
            let threads: Vec<_> = (0..16).map(work).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(results.iter().all(|r| *r == results[0]));
        let stats = store.stats();
        assert_eq!((stats.made, stats.reused), (2, 14), "after {} runs", runs.into_inner());
        assert_eq!((stats.bytes_made, stats.bytes_reused), (2 * 500_000, 14 * 500_000));
    }
    assert!(files(&dir.path().join("tmp")).is_empty());
}

#[test]
fn a_step_that_is_not_deterministic_is_a_bug() {
    let dir = tempfile::tempdir().unwrap();
    for store in [Store::in_memory(), Store::open(dir.path()).unwrap()] {
        let text = refusal(store.derive(&recipe(""), 1, &mut |out| {
            // Someone else carries out the recipe meanwhile, and gets something else.
            store.derive(&recipe(""), 1, &mut |out| out[0].write(b"one"))?;
            out[0].write(b"two")
        }));
        assert!(text.starts_with("bug in quantc: the step double made different bytes"), "{text}");
    }
}

#[test]
fn a_store_outlives_its_blobs_views() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let digest = store.put(&1.5f32.to_le_bytes()).unwrap();
    let (weights, id) = one(TensorTy::fixed(Float::F32, &[]), WeightSource::Blob(digest));
    let view = store.view(&weights, id).unwrap();
    fs::remove_file(store.blob_path(digest).unwrap()).unwrap();
    drop(store);
    assert_eq!(view.read_all_f32().unwrap(), [1.5], "a mapped file stays");
}

#[test]
fn stores_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Store>();
    shared::<WeightView<'static>>();
}
