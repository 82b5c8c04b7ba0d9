//! Objects as a C compiler makes them, loaded and called. Skipped, by name, where there is no `gcc`.

use std::process::Command;

use quantc_runtime::Object;

/// Compiles C to an object, or says that the test is skipped.
fn compile(test: &str, source: &str, flags: &[&str]) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let c = dir.path().join("k.c");
    let o = dir.path().join("k.o");
    std::fs::write(&c, source).expect("the source is written");
    let built = Command::new("gcc").arg("-c").arg("-O2").args(flags).arg(&c).arg("-o").arg(&o).status();
    match built {
        Ok(status) if status.success() => Some(std::fs::read(&o).expect("the object is read")),
        Ok(status) => panic!("gcc failed on the test's own source: {status}"),
        Err(_) => {
            eprintln!("{test}: skipped, no gcc");
            None
        }
    }
}

const SOURCE: &str = r#"
#include <stdint.h>
#include <string.h>
float expf(float); float tanhf(float); float fmaf(float, float, float);
static const float table[8] = {1, 2, 4, 8, 16, 32, 64, 128};
static float zeroed[1024];
static int counter = 5;
float (*volatile indirect)(float) = tanhf;
const char *volatile text = "quantized";
static float helper(float x) { return expf(x) * 2.0f; }
__attribute__((noinline)) float shared(float x) { return helper(x) + 1.0f; }

void k(uint8_t **args, const int64_t *dims, int64_t begin, int64_t end) {
    float *out = (float *)args[0];
    const float *in = (const float *)args[1];
    for (int64_t i = begin; i < end; i++) {
        zeroed[i & 1023] += in[i];
        out[i] = shared(in[i]) * table[i & 7] + indirect(in[i]) + (float)dims[0] + zeroed[i & 1023];
    }
    if (begin == 0) memcpy(args[2], (const void *)text, 9);
    counter++;
}
void count(uint8_t **args, const int64_t *dims, int64_t begin, int64_t end) {
    *(int *)args[0] = counter;
    memset(args[1], (int)begin, (size_t)end);
}
"#;

fn check(test: &str, flags: &[&str]) {
    let Some(bytes) = compile(test, SOURCE, flags) else { return };
    let object = Object::load(&bytes).unwrap_or_else(|e| panic!("{flags:?}: {e}"));
    assert_eq!(object.symbols().collect::<Vec<_>>(), ["count", "k", "shared"]);
    assert!(object.symbol("helper").is_none() && object.symbol("expf").is_none());
    let k = object.symbol("k").expect("the object defines k");
    let count = object.symbol("count").expect("the object defines count");

    let input: Vec<f32> = (0..20).map(|i| i as f32 * 0.25 - 2.0).collect();
    let mut out = vec![0f32; 20];
    let mut text = [0u8; 9];
    let args = [out.as_mut_ptr().cast::<u8>(), input.as_ptr().cast_mut().cast(), text.as_mut_ptr()];
    // SAFETY: the source above is the kernel; its buffers have 20 floats and 9 bytes.
    unsafe {
        k(args.as_ptr(), [3, 1].as_ptr(), 0, 7);
        k(args.as_ptr(), [3, 1].as_ptr(), 7, 20);
    }
    for (i, (&x, &y)) in input.iter().zip(&out).enumerate() {
        let table = (1u32 << (i % 8)) as f32;
        let want = (libm::expf(x) * 2.0 + 1.0) * table + libm::tanhf(x) + 3.0 + x;
        assert!((y - want).abs() <= want.abs() * 1e-5 + 1e-5, "{flags:?} item {i}: {y} is not {want}");
    }
    assert_eq!(&text, b"quantized");

    let mut calls = 0i32;
    let mut bytes = [0u8; 32];
    let args = [(&raw mut calls).cast::<u8>(), bytes.as_mut_ptr()];
    // SAFETY: as above; `count` writes one int and `end` bytes.
    unsafe { count(args.as_ptr(), [1, 1].as_ptr(), 7, 32) };
    assert_eq!(calls, 7, "the data section keeps what kernels write");
    assert_eq!(bytes, [7; 32]);
}

#[test]
fn position_independent() {
    check("position_independent", &["-fPIC"]);
}

#[test]
fn position_independent_without_plt() {
    check("position_independent_without_plt", &["-fPIC", "-fno-plt"]);
}

#[test]
fn executable_code_model() {
    check("executable_code_model", &["-fPIE"]);
}

#[test]
fn absolute_addresses() {
    check("absolute_addresses", &["-fno-pic", "-mcmodel=small"]);
}

#[test]
fn unoptimized_with_debug_information() {
    check("unoptimized_with_debug_information", &["-O0", "-g", "-fno-pic", "-fno-inline"]);
}

#[test]
fn unknown_function_is_refused() {
    let source = "void system_call(void); void k(void) { system_call(); }";
    let Some(bytes) = compile("unknown_function_is_refused", source, &["-fPIC"]) else { return };
    let error = Object::load(&bytes).expect_err("the function is not on the list").to_string();
    assert!(error.contains("`system_call`, which the runtime does not offer"), "{error}");
}

#[test]
fn constructors_and_thread_locals_are_refused() {
    for (source, part) in [
        (
            "static volatile int y; __attribute__((constructor)) static void f(void) { y = 1; }",
            "constructors",
        ),
        ("_Thread_local int x = 3; int *k(void) { return &x; }", "thread-local"),
        ("int x; int *k(void) { return &x; }", "absolute or common"),
    ] {
        let Some(bytes) =
            compile("constructors_and_thread_locals_are_refused", source, &["-fno-pic", "-fcommon"])
        else {
            return;
        };
        let error = Object::load(&bytes).expect_err("kernels have none").to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn damaged_objects_never_panic() {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for flags in [["-fPIC"], ["-fno-pic"]] {
        let Some(bytes) = compile("damaged_objects_never_panic", SOURCE, &flags) else { return };
        let mut refused = 0;
        for round in 0..3000 {
            let mut damaged = bytes.clone();
            for _ in 0..1 + round % 4 {
                let at = next() as usize % damaged.len();
                damaged[at] = next() as u8;
            }
            if round % 10 == 0 {
                damaged.truncate(next() as usize % bytes.len());
            }
            refused += usize::from(Object::load(&damaged).is_err());
        }
        assert!(refused > 300, "{flags:?}: only {refused} of 3000 damaged objects were refused");
    }
}
