//! Sessions of the toy engine: results, chunks, slots, threads, refusals.

mod common;

use std::sync::Arc;

use common::{
    CONTEXT, HIDDEN, MAX_ROWS, MAX_TOKENS, Random, TOKENS, VOCAB, toy, toy_manifest, toy_reference,
};
use quantc_runtime::format::{Blob, Kind, MANIFEST_FILE, Manifest, WEIGHTS_FILE};
use quantc_runtime::{Engine, ErrorKind, OpenOptions, Pages, Session, SessionOptions, Step, stats};

fn session(engine: &Arc<Engine>, threads: usize, slots: u32) -> Session {
    let options = SessionOptions { threads, slots, poison: true, ..SessionOptions::default() };
    Session::new(Arc::clone(engine), &options).expect("the session starts")
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn prompts_of_every_length_match_the_reference_on_any_number_of_threads() {
    let (_folder, engine) = toy(Kind::Decoder);
    let engine = Arc::new(engine);
    let tokens = Random(1).tokens(CONTEXT as usize);
    let mut sessions = [1, 2, 3].map(|threads| session(&engine, threads, 1));
    for len in 1..=CONTEXT as usize {
        let want = bits(&toy_reference(&tokens[..len]));
        for session in &mut sessions {
            session.reset(0).expect("slot 0 exists");
            let got = bits(session.prefill(0, &tokens[..len], 1).expect("the prompt fits"));
            assert_eq!(got, want, "{len} tokens on {} threads", session.threads());
            assert_eq!(session.position(0), len as u32);
        }
    }
}

#[test]
fn prefill_gives_as_many_rows_as_asked() {
    let (_folder, engine) = toy(Kind::Decoder);
    let mut session = session(&Arc::new(engine), 2, 1);
    let tokens = Random(2).tokens(40);
    for len in [4, 15, 16, 17, 18, 19, 20, 33, 40] {
        for rows in 0..=MAX_ROWS as usize {
            session.reset(0).expect("slot 0 exists");
            let got = session.prefill(0, &tokens[..len], rows).expect("the prompt fits").to_vec();
            let want: Vec<f32> = (len - rows..len).flat_map(|i| toy_reference(&tokens[..=i])).collect();
            assert_eq!(bits(&got), bits(&want), "{len} tokens, {rows} rows");
        }
    }
}

#[test]
fn decoding_scoring_and_prefilling_agree() {
    let (_folder, engine) = toy(Kind::Decoder);
    let mut session = session(&Arc::new(engine), 3, 2);
    let tokens = Random(3).tokens(CONTEXT as usize);
    let want: Vec<Vec<u32>> = (1..=tokens.len()).map(|n| bits(&toy_reference(&tokens[..n]))).collect();
    for (i, &token) in tokens.iter().enumerate() {
        assert_eq!(bits(session.decode(0, token).expect("it fits")), want[i], "token {i}");
    }
    let mut scored = Vec::new();
    session
        .score(1, &tokens, &mut |index, row| {
            assert_eq!(index, scored.len());
            scored.push(bits(row));
        })
        .expect("it fits");
    assert_eq!(scored, want);
}

#[test]
fn slots_do_not_see_each_other() {
    let (_folder, engine) = toy(Kind::Decoder);
    let mut session = session(&Arc::new(engine), 2, 3);
    let mut random = Random(4);
    let mut texts = [random.tokens(5), random.tokens(20), random.tokens(1)];
    for (slot, text) in texts.iter().enumerate() {
        session.prefill(slot as u32, text, 0).expect("it fits");
    }
    for round in 0..10 {
        // The order of the slots in a batch is free.
        let slots = if round % 2 == 0 { vec![0, 1, 2] } else { vec![2, 0, 1] };
        let tokens = random.tokens(3);
        for (&slot, &token) in slots.iter().zip(&tokens) {
            texts[slot as usize].push(token);
        }
        let got = bits(session.decode_batch(&slots, &tokens).expect("it fits"));
        let want: Vec<f32> = slots.iter().flat_map(|&slot| toy_reference(&texts[slot as usize])).collect();
        assert_eq!(got, bits(&want), "round {round}");
    }
    session.truncate(1, 7).expect("it holds more");
    texts[1].truncate(7);
    texts[1].push(2);
    assert_eq!(bits(session.decode(1, 2).expect("it fits")), bits(&toy_reference(&texts[1])));
}

#[test]
fn one_step_may_mix_prompts_and_single_tokens() {
    let (_folder, engine) = toy(Kind::Decoder);
    let mut session = session(&Arc::new(engine), 2, 2);
    session.prefill(1, &[5, 6, 7], 0).expect("it fits");
    let step = Step { tokens: &[1, 8, 2, 3], positions: &[0, 3, 1, 2], slots: &[0, 1, 0, 0], rows: 4 };
    let got = bits(session.step(step).expect("it is in order"));
    let want = [&[1][..], &[5, 6, 7, 8], &[1, 2], &[1, 2, 3]]
        .iter()
        .flat_map(|text| toy_reference(text))
        .collect::<Vec<_>>();
    assert_eq!(got, bits(&want));
    assert_eq!((session.position(0), session.position(1)), (3, 4));
}

#[test]
fn refused_calls_say_why_and_change_nothing() {
    let (_folder, engine) = toy(Kind::Decoder);
    let mut session = session(&Arc::new(engine), 2, 2);
    session.prefill(0, &[1, 2, 3], 0).expect("it fits");
    let long = vec![0; CONTEXT as usize - 2];
    let rows = MAX_ROWS as usize + 1;
    let step = |tokens, positions, slots, rows| Step { tokens, positions, slots, rows };
    let many = vec![0u32; MAX_TOKENS as usize + 1];
    let checks: Vec<(quantc_runtime::Result<()>, &str)> = vec![
        (
            session.prefill(0, &long, 1).map(drop),
            "slot 0 holds 3 tokens, 62 more do not fit the engine's context of 64",
        ),
        (session.prefill(0, &[1, TOKENS], 1).map(drop), "token 20 does not exist; the model has 20 tokens"),
        (
            session.prefill(0, &many.iter().map(|_| u32::MAX).collect::<Vec<_>>(), 1).map(drop),
            "does not exist",
        ),
        (session.prefill(0, &[], 0).map(drop), "there are no tokens"),
        (session.prefill(0, &[1], 2).map(drop), "2 result rows were asked for"),
        (session.prefill(0, &many, rows).map(drop), "5 result rows were asked for"),
        (session.decode(2, 1).map(drop), "slot 2 does not exist; the session has 2 slots"),
        (session.decode(0, TOKENS).map(drop), "does not exist"),
        (session.decode_batch(&[0, 9], &[1, 1]).map(drop), "slot 9 does not exist"),
        (session.decode_batch(&[0, 0], &[1, 1]).map(drop), "position 3 of slot 0 leaves a gap"),
        (session.decode_batch(&[0, 1], &[1]).map(drop), "do not match"),
        (session.decode_batch(&[], &[]).map(drop), "0 tokens in one step"),
        (session.decode_batch(&many, &many).map(drop), "17 tokens in one step; the engine takes 1 to 16"),
        (session.score(0, &long, &mut |_, _| ()), "do not fit"),
        (
            session.step(step(&[1], &[4], &[0], 1)).map(drop),
            "position 4 of slot 0 leaves a gap after the 3 tokens",
        ),
        (session.step(step(&[1, 1], &[0, 2], &[1, 1], 1)).map(drop), "position 2 of slot 1 leaves a gap"),
        (session.step(step(&[1], &[u32::MAX], &[0], 1)).map(drop), "outside the engine's context of 64"),
        (session.step(step(&[1], &[3], &[0], 2)).map(drop), "2 result rows"),
        (session.step(step(&[1], &[3, 4], &[0], 1)).map(drop), "do not match"),
        (session.truncate(0, 4), "slot 0 holds 3 tokens, fewer than the 4"),
        (session.reset(7), "slot 7 does not exist"),
    ];
    for (result, part) in checks {
        let error = result.expect_err(part);
        assert_eq!(error.kind(), ErrorKind::Input, "{error}");
        assert!(error.to_string().contains(part), "{error} does not say {part}");
    }
    assert_eq!((session.position(0), session.position(1)), (3, 0));
    assert_eq!(bits(session.decode(0, 4).expect("it fits")), bits(&toy_reference(&[1, 2, 3, 4])));
}

#[test]
fn a_full_slot_takes_no_more() {
    let (_folder, engine) = toy(Kind::Decoder);
    let mut session = session(&Arc::new(engine), 1, 1);
    session.prefill(0, &vec![1; CONTEXT as usize], 1).expect("it just fits");
    let error = session.decode(0, 1).expect_err("the slot is full").to_string();
    assert_eq!(error, "slot 0 holds 64 tokens, 1 more do not fit the engine's context of 64");
}

#[test]
fn taps_show_values_and_profiles_show_time() {
    let (_folder, engine) = toy(Kind::Decoder);
    let options = SessionOptions { threads: 2, profile: true, poison: true, ..SessionOptions::default() };
    let mut session = Session::new(Arc::new(engine), &options).expect("the session starts");
    let mut seen = Vec::new();
    let step = Step { tokens: &[4, 9, 4], positions: &[0, 1, 2], slots: &[0, 0, 0], rows: 1 };
    let logits = session
        .step_tapped(step, &mut |name, rows, width, values| {
            assert_eq!(values.len(), rows * width);
            seen.push((name.to_owned(), rows, width, values.to_vec()));
        })
        .expect("it fits");
    assert_eq!(bits(logits), bits(&toy_reference(&[4, 9, 4])));
    let (emb, _) = common::toy_weights();
    assert_eq!(seen.len(), 2);
    assert_eq!((seen[0].0.as_str(), seen[0].1, seen[0].2), ("x", 3, HIDDEN));
    assert_eq!(seen[0].3[HIDDEN..2 * HIDDEN], emb[9 * HIDDEN..10 * HIDDEN]);
    assert_eq!((seen[1].0.as_str(), seen[1].1, seen[1].2), ("y", 3, HIDDEN));
    assert_eq!(seen[1].3[..HIDDEN], emb[4 * HIDDEN..5 * HIDDEN]);

    session.clear_profile();
    session.decode(0, 1).expect("it fits");
    session.prefill(0, &[1, 2], 1).expect("it fits");
    let profile = session.profile();
    let names: Vec<&str> = profile.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["clock", "embed", "store", "mix", "head"]);
    assert!(profile.iter().all(|row| row.calls == 2 && row.symbol == format!("toy_{}", row.name)));
    assert!(profile.iter().map(|row| row.nanos).sum::<u64>() > 0);
    assert!(profile.iter().map(|row| row.busy_nanos).sum::<u64>() > 0);
}

#[test]
fn encoders_take_a_text_whole() {
    let (_folder, engine) = toy(Kind::Encoder);
    let mut session = session(&Arc::new(engine), 2, 1);
    let tokens = Random(5).tokens(MAX_TOKENS as usize);
    for len in [1, 7, 16] {
        let rows = bits(session.encode(&tokens[..len]).expect("it fits"));
        let want: Vec<f32> = (1..=len).flat_map(|n| toy_reference(&tokens[..n])).collect();
        assert_eq!(rows, bits(&want));
        assert_eq!(rows.len(), len * VOCAB);
    }
    assert!(session.encode(&Random(6).tokens(17)).is_err(), "an encoder does not cut texts");
    assert!(session.encode(&[]).is_err());
}

#[test]
fn encoders_refuse_two_texts_in_a_step_and_rows_of_a_part() {
    let (_folder, engine) = toy(Kind::Encoder);
    let mut session = session(&Arc::new(engine), 1, 2);
    let two = Step { tokens: &[1, 2], positions: &[0, 0], slots: &[0, 1], rows: 2 };
    let part = Step { tokens: &[1, 2], positions: &[0, 1], slots: &[0, 0], rows: 1 };
    for step in [two, part] {
        let error = session.step(step).expect_err("rows would be those of something else");
        assert!(error.message().contains("one text a step"), "{error}");
    }
    session.step(Step { rows: 2, ..part }).expect("a whole text");
}

#[test]
fn memory_that_is_not_there_is_not_asked_for() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut manifest = toy_manifest(Kind::Decoder);
    manifest.states[0].row_bytes = 1 << 33;
    common::write_engine(folder.path(), manifest, &common::toy_object().build());
    let engine =
        Arc::new(Engine::open(folder.path(), &OpenOptions::default()).expect("the engine itself is fine"));
    let error = Session::new(engine, &SessionOptions::default()).expect_err("half a terabyte is not there");
    assert_eq!(error.kind(), ErrorKind::Memory);
    assert!(error.to_string().contains("states 549755813888 for 1 slots of 64 tokens"), "{error}");

    let (_folder, engine) = toy(Kind::Decoder);
    let engine = Arc::new(engine);
    for slots in [0, u32::MAX] {
        let options = SessionOptions { slots, ..SessionOptions::default() };
        assert!(Session::new(Arc::clone(&engine), &options).is_err());
    }
    let options = SessionOptions { threads: usize::MAX, ..SessionOptions::default() };
    assert!(Session::new(engine, &options).is_err());
}

#[test]
fn sessions_share_an_engine_between_threads() {
    let (_folder, engine) = toy(Kind::Decoder);
    let engine = Arc::new(engine);
    std::thread::scope(|scope| {
        for seed in 10..13 {
            let engine = &engine;
            scope.spawn(move || {
                let tokens = Random(seed).tokens(50);
                let mut session = session(engine, 2, 1);
                let got = bits(session.prefill(0, &tokens, 1).expect("it fits"));
                assert_eq!(got, bits(&toy_reference(&tokens)));
            });
        }
    });
}

/// A toy engine with a third weight, which no kernel reads, of `ballast` bytes; and these.
fn heavy(ballast: usize) -> (tempfile::TempDir, Vec<u8>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut manifest: Manifest =
        common::write_engine(folder.path(), toy_manifest(Kind::Decoder), &common::toy_object().build());
    let path = folder.path().join(WEIGHTS_FILE);
    let mut weights = std::fs::read(&path).expect("it was written");
    weights.resize(weights.len().next_multiple_of(4096), 0);
    let bytes: Vec<u8> = (0..ballast as u64).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    let digest = blake3::hash(&bytes).as_bytes().to_vec();
    let (offset, len) = (weights.len() as u64, ballast as u64);
    manifest.weights.push(Blob { name: "ballast".into(), offset, len, digest, streamed: true });
    weights.extend_from_slice(&bytes);
    let file = manifest.files.iter_mut().find(|file| file.name == WEIGHTS_FILE).expect("it is listed");
    file.len = weights.len() as u64;
    file.digest = blake3::hash(&weights).as_bytes().to_vec();
    std::fs::write(path, weights).expect("the file is written");
    std::fs::write(folder.path().join(MANIFEST_FILE), manifest.encode_file()).expect("the file is written");
    (folder, bytes)
}

fn open(folder: &tempfile::TempDir, pages: Pages) -> Arc<Engine> {
    let options = OpenOptions { pages, ..OpenOptions::default() };
    Arc::new(Engine::open(folder.path(), &options).expect("the toy engine opens"))
}

#[test]
fn moving_weights_changes_no_bits() {
    // Neither a multiple of a page nor of a huge one.
    let (folder, ballast) = heavy((16 << 20) + 4321);
    let tokens = Random(20).tokens(CONTEXT as usize);
    let want: Vec<Vec<u32>> = (1..=tokens.len()).map(|n| bits(&toy_reference(&tokens[..n]))).collect();
    for pages in [Pages::Mapped, Pages::Huge] {
        let engine = open(&folder, pages);
        let mut session = session(&engine, 2, 1);
        let before = stats::rss_bytes().unwrap_or(0) >> 20;
        for (i, &token) in tokens.iter().enumerate() {
            assert_eq!(bits(session.decode(0, token).expect("it fits")), want[i], "token {i}");
            assert!(engine.weight(2) == Some(ballast.as_slice()), "after token {i}");
            if i == 0 {
                assert_eq!(engine.moved().moved_bytes, 0, "nothing moves before the first result");
            }
        }
        let after = stats::rss_bytes().unwrap_or(0) >> 20;
        let moved = engine.moved();
        eprintln!("{pages:?}: memory {before} MiB before, {after} MiB after; {moved:?}");
        // Each step moves at least a chunk of each worker, until there are none.
        assert!(moved.done && (pages == Pages::Huge || moved.wanted_bytes == 0));
    }
}

#[test]
fn sessions_share_weights_that_are_moving() {
    let (folder, ballast) = heavy((40 << 20) + 1);
    let engine = open(&folder, Pages::Huge);
    std::thread::scope(|scope| {
        for (seed, threads) in [(30, 1), (31, 2), (32, 3)] {
            let (engine, ballast) = (&engine, &ballast);
            scope.spawn(move || {
                let tokens = Random(seed).tokens(30);
                let mut session = session(engine, threads, 1);
                for n in 1..=tokens.len() {
                    let got = bits(session.decode(0, tokens[n - 1]).expect("it fits"));
                    assert_eq!(got, bits(&toy_reference(&tokens[..n])));
                    assert!(engine.weight(2) == Some(ballast.as_slice()));
                }
            });
        }
    });
    assert!(engine.moved().done);
    engine.verify_weights().expect("they are what they were");
}

#[test]
fn an_engine_may_be_dropped_while_its_weights_move() {
    let (folder, _) = heavy(40 << 20);
    for steps in 0..6 {
        let engine = open(&folder, Pages::Huge);
        let verifying = engine.verify_weights_beside().expect("a thread starts");
        let mut session = session(&engine, 2, 1);
        drop(engine);
        for token in 0..steps {
            session.decode(0, token).expect("it fits");
        }
        drop(session);
        verifying.wait().expect("the weights are whole");
    }
}

#[test]
fn damaged_weights_are_found_beside_running() {
    let (folder, _) = heavy(9 << 20);
    let path = folder.path().join(WEIGHTS_FILE);
    let mut weights = std::fs::read(&path).expect("it was written");
    weights[5 << 20] ^= 1;
    std::fs::write(path, weights).expect("the file is written");
    let options = OpenOptions { verify_weights: false, ..OpenOptions::default() };
    let engine = Arc::new(Engine::open(folder.path(), &options).expect("weights are not looked at"));
    let verifying = engine.verify_weights_beside().expect("a thread starts");
    let error = verifying.wait().expect_err("a bit was flipped");
    assert_eq!(error.kind(), ErrorKind::Digest);
    assert!(error.to_string().contains("weight 2 \"ballast\""), "{error}");
}

#[test]
fn single_tokens_may_run_on_fewer_threads() {
    let (_folder, engine) = toy(Kind::Decoder);
    let engine = Arc::new(engine);
    let tokens = Random(40).tokens(20);
    for decode_threads in 0..=3 {
        let options =
            SessionOptions { threads: 3, decode_threads, poison: true, ..SessionOptions::default() };
        let mut session = Session::new(Arc::clone(&engine), &options).expect("the session starts");
        assert_eq!(session.decode_threads(), if decode_threads == 0 { 3 } else { decode_threads });
        session.prefill(0, &tokens[..10], 1).expect("it fits");
        for n in 11..=tokens.len() {
            let got = bits(session.decode(0, tokens[n - 1]).expect("it fits"));
            assert_eq!(got, bits(&toy_reference(&tokens[..n])), "{decode_threads} threads");
        }
    }
    let options = SessionOptions { threads: 3, decode_threads: 4, ..SessionOptions::default() };
    let error = Session::new(engine, &options).expect_err("there are three");
    assert!(error.message().contains("4 threads for single tokens are more than the 3"), "{error}");
}
