//! Objects that lie: each is refused with a reason, none is trusted.

mod common;

use common::{ALLOC, EXEC, Elf, GLOBAL_FUNC, GLOBAL_NOTYPE, NOBITS, Random, Section, Symbol, WRITE};
use quantc_runtime::Object;

const ABS64: u32 = 1;
const PC32: u32 = 2;
const PLT32: u32 = 4;
const GOTPCREL: u32 = 9;
const ABS32: u32 = 10;
const ABS32S: u32 = 11;
const PC64: u32 = 24;

/// `mov arg0[0] <- value at data; ret`, written as `mov (%rdi),%rdi; mov data(%rip),%eax; mov %eax,(%rdi); ret`.
fn good() -> Elf {
    let code = vec![0x48, 0x8b, 0x3f, 0x8b, 0x05, 0, 0, 0, 0, 0x89, 0x07, 0xc3];
    let mut text = Section::new(".text", EXEC, code);
    text.relocations.push((5, PC32, 2, -4));
    let constants = Section::new(".rodata", 0, vec![0, 0, 0, 0, 0x2a, 0, 0, 0]);
    let mut data = Section::new(".data", WRITE, vec![0; 24]);
    data.relocations.push((8, ABS64, 1, 0));
    data.relocations.push((16, PC64, 2, 0));
    let mut zeroed = Section::new(".bss", WRITE, Vec::new());
    zeroed.ty = NOBITS;
    zeroed.size = 4096;
    Elf {
        sections: vec![text, constants, data, zeroed],
        symbols: vec![
            Symbol { name: "k", info: GLOBAL_FUNC, section: 1, value: 0 },
            Symbol { name: "answer", info: 1, section: 2, value: 4 },
            Symbol { name: "expf", info: GLOBAL_NOTYPE, section: 0, value: 0 },
        ],
    }
}

#[test]
fn the_good_object_works() {
    let object = Object::load(&good().build()).expect("it is good");
    let k = object.symbol("k").expect("it is defined");
    let mut value = 0u32;
    let args = [(&raw mut value).cast::<u8>()];
    // SAFETY: the code above writes one u32 to its first buffer.
    unsafe { k(args.as_ptr(), [1, 1].as_ptr(), 0, 1) };
    assert_eq!(value, 42);
    assert_eq!(object.image_bytes(), 4 * 4096, "code, constants, data with zeroed pages after it");
    // A buffer at an odd address is copied first.
    let mut shifted = vec![0];
    shifted.extend_from_slice(&good().build());
    Object::load(&shifted[1..]).expect("alignment of the caller's buffer does not matter");
}

#[test]
fn every_kind_of_reference_to_an_external_is_resolved() {
    for (ty, at) in [(PLT32, 5), (PC32, 5), (GOTPCREL, 5), (ABS32, 5), (ABS32S, 5)] {
        let mut elf = good();
        elf.sections[0].relocations = vec![(at, ty, 3, 0)];
        elf.sections[2].relocations.push((0, ABS64, 3, 0));
        Object::load(&elf.build()).unwrap_or_else(|e| panic!("type {ty}: {e}"));
    }
}

#[test]
fn lies_are_refused_with_a_reason() {
    type Change = fn(&mut Elf);
    let cases: &[(Change, &str)] = &[
        (|e| e.sections[0].relocations[0].0 = 9, "offset 9 lies outside the section's 12 bytes"),
        (|e| e.sections[0].relocations[0].0 = u64::MAX, "lies outside the section"),
        (|e| e.sections[2].relocations[0].0 = 17, "offset 17 lies outside"),
        (|e| e.sections[0].relocations[0].2 = 99, "symbol 99 does not exist"),
        (|e| e.sections[0].relocations[0].2 = 0, "names no symbol"),
        (|e| e.sections[0].relocations[0].1 = 23, "relocation type 23 is not supported"),
        (|e| e.sections[0].relocations[0].3 = 1 << 40, "does not fit its Rel32 field"),
        (|e| e.sections[0].relocations[0] = (5, ABS32, 2, -(1 << 40)), "does not fit its Abs32 field"),
        (|e| e.sections[0].relocations[0] = (5, ABS32S, 2, i64::MIN), "does not fit its Abs32Signed field"),
        (|e| e.sections[0].relocations[0] = (5, GOTPCREL, 2, i64::MAX), "does not fit its Slot32 field"),
        (|e| e.sections[3].relocations.push((0, ABS64, 1, 0)), "zero-filled section cannot have relocations"),
        (|e| e.symbols[1].value = 9, "`answer` lies outside its section .rodata"),
        (|e| e.symbols[1].value = u64::MAX, "`answer` lies outside its section .rodata"),
        (|e| e.symbols[1].section = 77, "`answer` lies in a section that is not loaded"),
        (|e| e.symbols[1].section = 0xfff1, "absolute or common"),
        (|e| e.symbols[1].section = 0xfff2, "absolute or common"),
        (
            |e| e.symbols[1].section = 0,
            "needs `answer`, which the runtime does not offer; it offers cosf, erff",
        ),
        (|e| e.symbols[1].info = 6, "thread-local or indirect"),
        (|e| e.symbols[1].info = 10, "thread-local or indirect"),
        (|e| e.symbols[0].value = 12, "kernel `k` lies at the end of .text"),
        (|e| e.symbols.push(e.symbols[0].clone()), "kernel `k` is defined twice"),
        (
            |e| e.sections[0].flags = ALLOC | EXEC | WRITE,
            "section .text: a section must not be writable and executable",
        ),
        (|e| e.sections[2].flags |= 0x400, "section .data: thread-local"),
        (|e| e.sections[1].flags |= 0x800, "section .rodata: compressed"),
        (|e| e.sections[2].ty = 14, "only plain sections"),
        (|e| e.sections[1].align = 3, "alignment 3"),
        (|e| e.sections[1].align = 1 << 40, "alignment"),
        (|e| e.sections[1].size = 1 << 40, "outside the file"),
        (|e| e.sections[1].size = u64::MAX, "outside the file"),
        (|e| e.sections[3].size = u64::MAX, "zero-filled"),
        (|e| e.sections[3].size = (64 << 20) + 1, "zero-filled"),
    ];
    for (index, (change, part)) in cases.iter().enumerate() {
        let mut elf = good();
        change(&mut elf);
        let error = Object::load(&elf.build()).expect_err(part).to_string();
        assert!(error.contains(part), "case {index}: {error:?} does not say {part:?}");
    }
}

#[test]
fn foreign_files_are_refused() {
    let message = |bytes: &[u8]| Object::load(bytes).expect_err("it is no kernel object").to_string();
    assert!(message(b"").contains("not a well-formed ELF"));
    assert!(message(b"\x7fELF").contains("not a well-formed ELF"));
    let change = |at: usize, byte: u8| {
        let mut bytes = good().build();
        bytes[at] = byte;
        message(&bytes)
    };
    assert!(change(16, 3).contains("not a relocatable object"));
    assert!(change(18, 183).contains("not an object for 64-bit x86"));
    assert!(change(5, 2).contains("ELF") || change(5, 2).contains("64-bit x86"));
}

#[test]
fn damage_gives_errors_not_panics() {
    let bytes = good().build();
    for len in 0..bytes.len() {
        // Every truncation either fails or leaves a whole object; none may panic.
        assert!(Object::load(&bytes[..len]).is_err(), "truncated to {len}");
    }
    let mut random = Random(7);
    let mut refused = 0;
    for _ in 0..20_000 {
        refused += usize::from(Object::load(&random.damage(&bytes)).is_err());
    }
    assert!(refused > 2000, "only {refused} of 20000 were refused");
    for at in 0..bytes.len() {
        for byte in [0, 1, 0x7f, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] = byte;
            // Loading returns; whether such an object is still acceptable depends on the byte.
            let _outcome = Object::load(&damaged);
        }
    }
}
