//! Lowering: what each op becomes, what is refused, and that launches between two barriers never meet.

use proptest::prelude::*;
use quantc_codegen::lower::{self, Launch, Limits, Lowered};
use quantc_codegen::spec::KernelSpec;
use quantc_ir::diag::Diag;
use quantc_ir::weights::Store;
use quantc_ir::{text, verify};
use quantc_runtime::format::{Ref, RefKind};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;

const LIMITS: Limits = Limits { max_tokens: 32, max_rows: 8, context: 64, always_full: false };

/// Lowers a text that the verifier accepts.
fn try_lower(source: &str) -> Result<Lowered, Diag> {
    let module = text::parse(source, "test.qir").unwrap_or_else(|e| panic!("{e}\n{source}")).module;
    verify::verify(&module).unwrap_or_else(|e| panic!("{}\n{source}", e.show(&module)));
    lower::lower(&module, &Store::in_memory(), LIMITS)
}

fn lowered(source: &str) -> Lowered {
    try_lower(source).unwrap_or_else(|e| panic!("{e}\n{source}"))
}

/// A decoder of width 4 whose layers are `body`, which reads `%x` and makes `%y`; `decls` come before it.
fn decoder(decls: &str, body: &str) -> String {
    format!(
        "module @m\n\
         weight @table : tensor<8x4xf32> = splat 1.0\n\
         weight @head : tensor<8x4xf32> = splat 1.0\n\
         weight @q : tensor<4x4x!q<int8:f32 axis 0>> = inline [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]\n\
         weight @s : tensor<4x1xf32> = splat 1.0\n\
         state @k : tensor<64x2x2xf32>\n\
         state @v : tensor<64x2x2xf32>\n\
         {decls}\n\
         main (%tokens: tensor<?txi32>) -> tensor<?rx8xf32> {{\n\
           %x = embedding %tokens, @table\n\
           {body}\n\
           %last = last_rows %y\n\
           %logits = matmul %last, @head\n\
           return %logits\n\
         }}\n"
    )
}

/// What is said about a decoder that is refused.
#[track_caller]
fn refused(decls: &str, body: &str) -> String {
    match try_lower(&decoder(decls, body)) {
        Ok(_) => panic!("it was lowered:\n{body}"),
        Err(diag) => diag.to_string(),
    }
}

const ROWS: &str = "%rows = last_rows %x\n";

#[test]
fn activations_are_quantized_once_for_all_their_products() {
    let body = "%x.s = dynamic_scale %x\n%x.q = quantize %x, %x.s\n\
                %a = qmatmul %x.q, @q, @s, none, %x.s\n%b = qmatmul %x.q, @q, @s, none, %x.s\n%y = add %a, %b";
    let module = lowered(&decoder("", body));
    let launches = &module.programs[0].1;
    let names: Vec<&str> = launches.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["main.x", "main.x.q", "main.a", "main.b", "main.y", "main.last", "main.logits"]);
    // Two products of one weight share its bytes and run side by side.
    assert_eq!(launches[2].args[3], launches[3].args[3]);
    let free: Vec<bool> = launches.iter().map(|l| l.overlaps_next).collect();
    // What makes one short row is done by every worker for itself: the first barrier comes after both products.
    assert_eq!(free, [true, true, true, false, true, true, false]);
    let replicated: Vec<bool> = launches.iter().map(|l| l.replicated).collect();
    assert_eq!(replicated, [true, true, false, false, true, true, false]);
    let many = &module.programs.last().unwrap().1;
    assert!(many.iter().all(|l| !l.replicated));
    let free: Vec<bool> = many.iter().map(|l| l.overlaps_next).collect();
    assert_eq!(free, [false, false, true, false, false, false, false]);
}

#[test]
fn rows_of_products_are_rounded_by_the_kernel_that_makes_them() {
    let names = |body: &str| -> Vec<String> {
        let module = lowered(&decoder("weight @w : tensor<4x4xbf16> = splat 1.0", body));
        module.programs[0].1.iter().map(|l| format!("{} {}", l.name, l.spec.template())).collect()
    };
    let chained = "%n = rmsnorm %x\n%n.r = cast %n {to=bf16}\n%a = matmul %n.r, @w {epilogue=[silu]}\n\
                   %a.r = cast %a {to=bf16}\n%b = matmul %a.r, @w\n%y = add %x, %b";
    let tail = ["main.y row", "main.last row", "main.logits matmul"];
    assert_eq!(
        names(chained),
        [&["main.x gather", "main.n row", "main.a matmul", "main.b matmul"], &tail[..]].concat()
    );
    // Somebody else reads them.
    let shared = "%n = rmsnorm %x\n%n.r = cast %n {to=bf16}\n%b = matmul %n.r, @w\n%y = add %n, %b";
    assert_eq!(
        names(shared),
        [&["main.x gather", "main.n row", "main.n.r row", "main.b matmul"], &tail[..]].concat()
    );
    // Not by a cast, or not for products alone: they are copied to where products read them.
    let plain =
        "%c = cast %x {to=bf16}\n%s = silu %c\n%b = matmul %s, @w\n%d = matmul %c, @w\n%y = add %d, %b";
    let copied = names(plain);
    assert!(copied.contains(&"main.b.rows row".to_owned()), "{copied:?}");
    assert!(copied.contains(&"main.d.rows row".to_owned()), "{copied:?}");
}

#[test]
fn a_product_that_only_another_product_of_its_rows_reads_is_computed_with_it() {
    let quantized =
        "%x.s = dynamic_scale %x\n%x.q = quantize %x, %x.s\n%u = qmatmul %x.q, @q, @s, none, %x.s\n";
    let gated = "%y = qmatmul %x.q, @p, @s, none, %x.s, %u {epilogue=[silu, mul0]}";
    let other = "weight @p : tensor<4x4x!q<int8:f32 axis 0>> = inline [[4, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]";
    let names = |body: &str| -> Vec<String> {
        lowered(&decoder(other, body)).programs[0].1.iter().map(|l| l.name.clone()).collect()
    };
    let one = names(&format!("{quantized}{gated}"));
    assert_eq!(one, ["main.x", "main.x.q", "main.y", "main.last", "main.logits"]);
    // Somebody else reads it, or it is a product of other rows: two launches.
    let read_twice = names(&format!("{quantized}%a = {}\n%y = add %a, %u", &gated[5..]));
    assert!(read_twice.contains(&"main.u".to_owned()), "{read_twice:?}");
    let floats = "%u = matmul %x, @f\n%z = add %x, %x\n%y = matmul %z, @f, %u {epilogue=[mul0]}";
    let rows = lowered(&decoder("weight @f : tensor<4x4xf32> = splat 1.0", floats));
    assert!(rows.programs[0].1.iter().any(|l| l.name == "main.u"));
}

/// A chain of so many products, each with another that is computed with it: no more than one of them has rows at a time.
#[test]
fn what_no_launch_touches_takes_no_memory() {
    let other = "weight @p : tensor<4x4x!q<int8:f32 axis 0>> = inline [[4, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]";
    let arena = |count: usize| {
        let mut body = String::new();
        for i in 0..count {
            let x = if i == 0 { "x".into() } else { format!("y{i}") };
            let y = if i + 1 == count { "y".into() } else { format!("y{}", i + 1) };
            writeln!(
                body,
                "%s{i} = dynamic_scale %{x}\n%q{i} = quantize %{x}, %s{i}\n\
                 %u{i} = qmatmul %q{i}, @q, @s, none, %s{i}\n\
                 %{y} = qmatmul %q{i}, @p, @s, none, %s{i}, %u{i} {{epilogue=[silu, mul0]}}"
            )
            .expect("text");
        }
        let module = lowered(&decoder(other, &body));
        assert!(module.programs[0].1.iter().all(|l| !l.name.starts_with("main.u")));
        module.arena_bytes
    };
    assert_eq!(arena(2), arena(24));
}

#[test]
fn scales_that_are_not_those_of_the_codes_are_refused() {
    // The scale of other rows.
    let other = "%z = add %x, %x\n%z.s = dynamic_scale %z\n%z.q = quantize %z, %z.s\n%d = qmatmul %z.q, @q, @s, none, %z.s\n\
                 %x.s = dynamic_scale %x\n%x.q = quantize %x, %x.s\n%e = qmatmul %x.q, @q, @s, none, %z.s\n%y = add %d, %e";
    assert!(refused("", other).contains("not those they were quantized with"), "{}", refused("", other));
    // A scale read as a number.
    let read = "%x.s = dynamic_scale %x\n%x.q = quantize %x, %x.s\n%d = qmatmul %x.q, @q, @s, none, %x.s\n\
                %t = add %x.s, %x.s\n%y = add %d, %t";
    assert!(refused("", read).contains("scale that is read as a number"), "{}", refused("", read));
    // A scale for fewer bits than the codes have.
    let narrow = "%x.s = dynamic_scale %x {to=!q<int4:f32 token>}\n%x.q = quantize %x, %x.s\n\
                  %y = qmatmul %x.q, @q, @s, none, %x.s";
    assert!(refused("", narrow).contains("quantizing to"), "{}", refused("", narrow));
}

/// Caches of codes, and the rows that go into them.
const CODES: &str = "state @kq : tensor<64x2x2x!q<int8:f32 token>>\nstate @vq : tensor<64x2x2x!q<int8:f32 token>>\n\
                     state @ks : tensor<64x2x1xf32>\nstate @vs : tensor<64x2x1xf32>";
const CODED: &str = "%h = reshape %x {shape=?tx2x2}\n%s = dynamic_scale %h\n%c = quantize %h, %s\n";

#[test]
fn scales_go_into_the_state_that_attention_reads_beside_the_codes() {
    // Keys and values are the same rows, rounded once.
    let body = format!(
        "{CODED}%ks = cache_append @ks, %s\n%k = cache_append @kq, %c\n%v = cache_append @vq, %c\n\
         %vs = cache_append @vs, %s\n%a = attention %h, %k, %v, %ks, %vs\n%y = reshape %a {{shape=?tx4}}"
    );
    let module = lowered(&decoder(CODES, &body));
    let state = |name: &str| {
        let index = module.states.iter().position(|(n, _)| n == name).expect("the state is there");
        Ref::state(index as u32)
    };
    let launches = &module.programs[0].1;
    let of = |name: &str| launches.iter().find(|l| l.name == name).expect("it is launched");
    assert_eq!(of("main.k").args[3..], [state("kq"), state("ks")]);
    assert_eq!(of("main.v").args[3..], [state("vq"), state("vs")]);
    let attention = &of("main.a").args;
    assert_eq!(
        (&attention[1..3], &attention[5..7]),
        (&[state("kq"), state("vq")][..], &[state("ks"), state("vs")][..])
    );
    assert!(!launches.iter().any(|l| ["main.s", "main.c", "main.ks", "main.vs"].contains(&l.name.as_str())));
    // Two heads of two codes take a row of sixteen each.
    let bytes = |name: &str| module.states.iter().find(|(n, _)| n == name).map(|(_, bytes)| *bytes);
    assert_eq!((bytes("kq"), bytes("ks")), (Some(32), Some(8)));
}

#[test]
fn caches_of_codes_that_no_kernel_fills_are_refused() {
    let attention = "%a = attention %h, %k, %v, %ks, %vs\n%y = reshape %a {shape=?tx4}";
    // Scales of other rows.
    let other = format!(
        "{CODED}%z = add %h, %h\n%zs = dynamic_scale %z\n%zc = quantize %z, %zs\n%ks = cache_append @ks, %zs\n\
         %k = cache_append @kq, %c\n%v = cache_append @vq, %zc\n%vs = cache_append @vs, %s\n{attention}"
    );
    assert!(refused(CODES, &other).contains("scales attention does not read"), "{}", refused(CODES, &other));
    // The same state as keys and as values.
    let both = format!(
        "{CODED}%ks = cache_append @ks, %s\n%k = cache_append @kq, %c\n\
         %a = attention %h, %k, %k, %ks, %ks\n%y = reshape %a {{shape=?tx4}}"
    );
    assert!(refused(CODES, &both).contains("by more than keys"), "{}", refused(CODES, &both));
    // Codes of this call, which lie in no cache.
    let direct = format!("{CODED}%a = attention %h, %c, %c, %s, %s\n%y = reshape %a {{shape=?tx4}}");
    assert!(try_lower(&decoder("", &direct)).is_err());
    // Codes of fewer bits.
    let narrow = CODES.replace("int8", "int4");
    let body = CODED
        .replace("%h\n%c", "%h {to=!q<int4:f32 token>}\n%c")
        .replace("%h, %s\n", "%h, %s {to=!q<int4:f32 token>}\n");
    let body = format!(
        "{body}%ks = cache_append @ks, %s\n%k = cache_append @kq, %c\n%v = cache_append @vq, %c\n\
         %vs = cache_append @vs, %s\n{attention}"
    );
    assert!(refused(&narrow, &body).contains("a cache of type"), "{}", refused(&narrow, &body));
}

#[test]
fn rows_that_a_kernel_would_miscount_are_refused() {
    let heads = "%h = reshape %x {shape=?tx2x2}\n";
    let mixed = format!(
        "{heads}%c = cast %h {{to=f16}}\n%k = cache_append @half, %c\n%v = cache_append @v, %h\n\
                         %a = attention %h, %k, %v\n%y = reshape %a {{shape=?tx4}}"
    );
    assert!(refused("state @half : tensor<64x2x2xf16>", &mixed).contains("with values of type"));
    let narrow = format!(
        "{heads}%c = cast %h {{to=f16}}\n%a = attention %c, %h, %h\n%d = cast %a {{to=f32}}\n\
                          %y = reshape %d {{shape=?tx4}}"
    );
    assert!(refused("", &narrow).contains("queries of type"));
    let rows =
        format!("{ROWS}%h = reshape %rows {{shape=?rx2x2}}\n%k = cache_append @k, %h\n%y = add %x, %x");
    assert!(refused("", &rows).contains("appended to a cache"));
    let half = format!(
        "{heads}%c = cast %h {{to=f16}}\n%p = positions\n%t = rope_table %p {{size=2}}\n%r = rope %c, %t\n\
                        %d = cast %r {{to=f32}}\n%y = reshape %d {{shape=?tx4}}"
    );
    assert!(refused("", &half).contains("rotated heads"));
    let whole = "module @m\nweight @table : tensor<8x4xf32> = splat 1.0\n\
                 main (%tokens: tensor<?txi32>) -> tensor<?tx4xf32> {\n%x = embedding %tokens, @table\nreturn %x\n}\n";
    assert!(try_lower(whole).unwrap_err().to_string().contains("a row for each token"));
    assert!(try_lower(&whole.replace("module @m", "module @m {kind=encoder}")).is_ok());
    let halves = "module @m\nmain (%x: tensor<?tx4xf16>) -> tensor<?rx4xf32> {\n%y = cast %x {to=f32}\n%z = last_rows %y\nreturn %z\n}\n";
    assert!(try_lower(halves).unwrap_err().to_string().contains("an input of @main has type"));
}

#[test]
fn rows_of_the_caller_live_from_the_first_launch_and_further_results_to_the_last() {
    let text = "module @m {kind=encoder}\nmain (%ids: tensor<?txi32>, %x: tensor<?tx4xf32>) -> (tensor<?tx4xf32>, tensor<?tx4xf32>) {\n\
                %y = add %x, %x\n%z = mul %y, %x\nreturn %z, %y\n}\n";
    let lowered = lowered(text);
    let [x] = &lowered.row_inputs[..] else { panic!("{:?}", lowered.row_inputs) };
    let [y] = &lowered.row_outputs[..] else { panic!("{:?}", lowered.row_outputs) };
    assert_eq!((x.name.as_str(), x.width, y.name.as_str(), y.width), ("x", 4, "y", 4));
    let places = [x.at, y.at, lowered.output];
    assert!(places.iter().enumerate().all(|(i, a)| !places[..i].contains(a)), "{places:?}");
}

#[test]
fn the_last_of_the_rows_wanted_are_the_rows_wanted() {
    let twice = decoder("", &format!("{ROWS}%y = last_rows %rows"));
    let copies = lowered(&twice).programs[0].1.iter().filter(|l| l.name.starts_with("main.last")).count();
    assert_eq!((copies, lowered(&twice).programs[0].1.len()), (0, 3));
}

/// The buffers a launch reads and writes, as ranges of one address space. Which arguments are outputs, and how long
/// they are, is derived here from the specs, not taken from the planner.
struct Touch {
    reads: Vec<(u64, u64)>,
    writes: Vec<(u64, u64)>,
}

/// States lie behind everything else, one a mebibyte.
const STATES: u64 = 1 << 40;

fn touch(launch: &Launch, sizes: &BTreeMap<u64, u64>) -> Touch {
    let range = |at: &Ref| match at.kind {
        Some(RefKind::Arena(at)) => Some((at, at + sizes.get(&at).copied().unwrap_or(4))),
        Some(RefKind::State(i)) => Some((STATES + (u64::from(i) << 20), STATES + ((u64::from(i) + 1) << 20))),
        _ => None,
    };
    let outputs = match &launch.spec {
        KernelSpec::Row(row) if row.name.ends_with("quantize") || row.name.starts_with("quantize") => {
            launch.args.len() - 3..launch.args.len()
        }
        KernelSpec::Attention(_) => launch.args.len() - 2..launch.args.len() - 1,
        _ => launch.args.len() - 1..launch.args.len(),
    };
    let ranges = |inside: bool| {
        let args = launch.args.iter().enumerate().filter(|(i, _)| outputs.contains(i) == inside);
        args.filter_map(|(_, at)| range(at)).collect()
    };
    Touch { reads: ranges(false), writes: ranges(true) }
}

/// Checks that launches between two barriers do not meet.
fn check_program(launches: &[Launch], width: u64) {
    // All values of the random graphs have the same size.
    let bytes = 4 * width * u64::from(LIMITS.max_tokens);
    let mut sizes = BTreeMap::new();
    for launch in launches {
        for at in &launch.args {
            if let Some(RefKind::Arena(at)) = at.kind {
                sizes.insert(at, bytes);
            }
        }
    }
    let touched: Vec<Touch> = launches.iter().map(|l| touch(l, &sizes)).collect();
    let meet =
        |a: &[(u64, u64)], b: &[(u64, u64)]| a.iter().any(|x| b.iter().any(|y| x.0 < y.1 && y.0 < x.1));
    let mut from = 0;
    for i in 0..launches.len() {
        // The head's values have another size.
        let head = |k: usize| ["main.last", "main.logits"].contains(&launches[k].name.as_str());
        for j in (from..i).filter(|&j| !head(i) && !head(j)) {
            let (a, b) = (&touched[j], &touched[i]);
            let clash = meet(&a.writes, &b.reads) || meet(&a.writes, &b.writes) || meet(&a.reads, &b.writes);
            assert!(!clash, "{} runs beside {}", launches[j].name, launches[i].name);
        }
        if !launches[i].overlaps_next {
            from = i + 1;
        }
    }
}

/// Runs a program as its graph means it: every value is a number made of its operands' numbers. What lies in the arena
/// must be what the graph's value is whenever it is read. Launches between barriers run in an order chosen by `seed`.
fn simulate(launches: &[Launch], ops: &[(usize, usize)], seed: u64) {
    let mix = |name: &str, args: &[u64]| {
        args.iter().fold(name.bytes().fold(7u64, |h, b| h.wrapping_mul(31) + u64::from(b)), |h, a| {
            (h ^ a).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17)
        })
    };
    // The arena, then each worker's scratch.
    const WORKERS: usize = 2;
    let mut memory = vec![BTreeMap::<u64, u64>::new(); 1 + WORKERS];
    let address = |at: &Ref, worker: usize| match at.kind {
        Some(RefKind::Arena(at)) => (0, at),
        Some(RefKind::Scratch(at)) => (1 + worker, at),
        other => panic!("{other:?}"),
    };
    // What the graph says.
    let mut want = vec![mix("main.x", &[])];
    for (n, &(a, b)) in ops.iter().enumerate() {
        let name = if n + 1 == ops.len() { "main.y".into() } else { format!("main.v{n}") };
        want.push(mix(&name, &[want[a], want[b]]));
    }
    let (mut from, mut random, mut read) = (0, seed, false);
    for i in 0..launches.len() {
        if launches[i].overlaps_next && i + 1 < launches.len() {
            continue;
        }
        let mut below = |n: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) as usize % n
        };
        // Each worker runs its part in order; how the workers' parts fall together is up to chance.
        let mut left: Vec<VecDeque<usize>> = vec![VecDeque::new(); WORKERS];
        for (k, launch) in launches.iter().enumerate().take(i + 1).skip(from) {
            let one = below(WORKERS);
            for (worker, left) in left.iter_mut().enumerate() {
                if launch.replicated || worker == one {
                    left.push_back(k);
                }
            }
        }
        while left.iter().any(|l| !l.is_empty()) {
            let worker = below(WORKERS);
            let Some(k) = left[worker].pop_front() else { continue };
            let args = &launches[k].args;
            let (out, inputs) = args.split_last().expect("a launch has a result");
            let read_one = |at: &Ref| {
                let (space, at) = address(at, worker);
                memory[space].get(&at).copied().unwrap_or(0)
            };
            let values = || inputs.iter().map(read_one).collect::<Vec<_>>();
            let values: Vec<u64> = match launches[k].name.as_str() {
                "main.x" => vec![],
                "main.last" => {
                    assert_eq!(Some(&values()[0]), want.last(), "seed {seed}");
                    read = true;
                    continue;
                }
                "main.logits" => continue,
                _ => values(),
            };
            let (space, at) = address(out, worker);
            memory[space].insert(at, mix(&launches[k].name, &values));
        }
        from = i + 1;
    }
    assert!(read, "the result is read");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Sums of earlier sums, in any shape: dead values, values that live long, reshapes in between.
    #[test]
    fn values_survive_until_they_are_read_and_neighbours_do_not_meet(
        picks in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 1..40),
        seed in any::<u64>(),
    ) {
        let mut body = String::new();
        let (mut names, mut ops) = (vec!["%x".to_string()], vec![]);
        for (n, (a, b, reshape)) in picks.iter().enumerate() {
            let (a, b) = (a.index(names.len()), b.index(names.len()));
            let last = n + 1 == picks.len();
            let name = if last { "%y".to_string() } else { format!("%v{n}") };
            writeln!(body, "{name} = add {}, {}", names[a], names[b]).unwrap();
            ops.push((a, b));
            if *reshape && !last {
                writeln!(body, "{name}.h = reshape {name} {{shape=?tx2x2}}\n{name}.r = reshape {name}.h {{shape=?tx4}}").unwrap();
                names.push(format!("{name}.r"));
            } else {
                names.push(name);
            }
        }
        for (_, launches) in &lowered(&decoder("", &body)).programs {
            check_program(launches, 4);
            for shift in 0..4 {
                simulate(launches, &ops, seed.wrapping_add(shift));
            }
        }
    }
}
