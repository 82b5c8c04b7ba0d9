//! Loads a relocatable ELF x86-64 object into memory, without a linker.
//!
//! What holds:
//! - The sections an object asks to be allocated lie in one mapping: code first (read and execute), then constants
//!   and address slots (read), then data (read and write). Nothing is ever writable and executable, and code is within
//!   2 GiB of everything it refers to.
//! - A symbol the object does not define is resolved from a fixed list ([`EXTERNALS`]); any other is an error.
//! - Every offset, size and symbol of the file is checked before it is used. A hostile object gives an error; loading
//!   never writes outside the mapping. What its code does when *called* is up to the object: engines come from people
//!   one trusts to run programs.
//! - Constructors, thread-local storage, indirect functions and common symbols are refused: kernels need none.

use std::collections::{BTreeMap, BTreeSet};

use object::elf;
use object::endian::LittleEndian;
use object::read::elf::{FileHeader, Rela, SectionHeader, Sym};

use crate::error::{Error, Result};
use crate::mem::{Mapping, PAGE, Protection};

/// A kernel: `args` points to the buffers, `dims` to `[t, r]`; it does the work items `begin..end`.
pub type KernelFn = unsafe extern "C" fn(args: *const *mut u8, dims: *const i64, begin: i64, end: i64);

/// Largest object accepted, in bytes; also the most memory its sections may take beyond the file's own size.
pub const MAX_OBJECT_BYTES: usize = 512 << 20;

/// Most memory of an object that may be zero-filled, thus not justified by bytes of the file.
const MAX_ZEROED_BYTES: usize = 64 << 20;

/// A loaded object. Its kernels can be called as long as it lives.
pub struct Object {
    image: Mapping,
    /// Code symbols and their offsets in `image`.
    symbols: BTreeMap<String, usize>,
}

impl Object {
    /// Loads the object file in `bytes`.
    pub fn load(bytes: &[u8]) -> Result<Object> {
        if bytes.len() > MAX_OBJECT_BYTES {
            let what = format!("the object has {} bytes, more than {MAX_OBJECT_BYTES}", bytes.len());
            return Err(Error::object(what));
        }
        // The reader wants its tables at their natural alignment.
        let mut aligned = Vec::new();
        let bytes =
            if bytes.as_ptr().align_offset(8) == 0 { bytes } else { copy_aligned(bytes, &mut aligned) };
        let file = Parsed::read(bytes)?;
        Layout::plan(&file)?.build(&file)
    }

    /// The kernel called `name`, when the object defines a global function of that name.
    ///
    /// The pointer must not be called after the object is dropped.
    pub fn symbol(&self, name: &str) -> Option<KernelFn> {
        let &offset = self.symbols.get(name)?;
        // SAFETY: the offset was checked at load to lie in the executable part of `image`.
        let address = unsafe { self.image.ptr().add(offset) };
        // SAFETY: a non-null code address may be held as a function pointer; that the code there has a kernel's
        // signature is what the caller asserts when calling it, which is unsafe.
        Some(unsafe { std::mem::transmute::<*mut u8, KernelFn>(address) })
    }

    /// The names of the kernels, sorted.
    pub fn symbols(&self) -> impl Iterator<Item = &str> {
        self.symbols.keys().map(String::as_str)
    }

    /// Bytes of memory the object takes.
    pub fn image_bytes(&self) -> usize {
        self.image.len()
    }
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object").field("symbols", &self.symbols).finish_non_exhaustive()
    }
}

fn copy_aligned<'a>(bytes: &[u8], storage: &'a mut Vec<u64>) -> &'a [u8] {
    storage.resize(bytes.len().div_ceil(8), 0);
    // SAFETY: the vector owns at least `bytes.len()` initialized bytes, and any bytes are valid `u8`s.
    let copy = unsafe { std::slice::from_raw_parts_mut(storage.as_mut_ptr().cast::<u8>(), bytes.len()) };
    copy.copy_from_slice(bytes);
    copy
}

/// Functions of the runtime that an object may refer to, sorted by name.
pub const EXTERNALS: [&str; 32] = [
    "cosf", "erff", "exp2f", "expf", "fmaf", "logf", "memcpy", "memmove", "memset", "qc_acos", "qc_acosh",
    "qc_asin", "qc_asinh", "qc_atan", "qc_atanh", "qc_ceil", "qc_cos", "qc_cosh", "qc_erf", "qc_exp",
    "qc_floor", "qc_log", "qc_log1p", "qc_pow", "qc_rem", "qc_round", "qc_sin", "qc_sinh", "qc_tan",
    "qc_tanh", "sinf", "tanhf",
];

/// The functions of f64.
mod f64s {
    macro_rules! functions {
        ($($name:ident($($x:ident),+) = $body:expr;)*) => {
            $(pub(super) extern "C" fn $name($($x: f64),+) -> f64 {
                $body
            })*

            /// The address of the function called `name`.
            pub(super) fn address(name: &str) -> Option<*const ()> {
                match name {
                    $(concat!("qc_", stringify!($name)) => Some($name as *const ()),)*
                    _ => None,
                }
            }
        };
    }

    functions! {
        acos(x) = libm::acos(x);
        acosh(x) = libm::acosh(x);
        asin(x) = libm::asin(x);
        asinh(x) = libm::asinh(x);
        atan(x) = libm::atan(x);
        atanh(x) = libm::atanh(x);
        ceil(x) = x.ceil();
        cos(x) = libm::cos(x);
        cosh(x) = libm::cosh(x);
        erf(x) = libm::erf(x);
        exp(x) = libm::exp(x);
        floor(x) = x.floor();
        log(x) = libm::log(x);
        log1p(x) = libm::log1p(x);
        pow(x, y) = libm::pow(x, y);
        rem(x, y) = x % y;
        round(x) = x.round_ties_even();
        sin(x) = libm::sin(x);
        sinh(x) = libm::sinh(x);
        tan(x) = libm::tan(x);
        tanh(x) = libm::tanh(x);
    }
}

/// The address of external number `index` of [`EXTERNALS`].
fn external_address(index: usize) -> u64 {
    extern "C" fn expf(x: f32) -> f32 {
        libm::expf(x)
    }
    extern "C" fn exp2f(x: f32) -> f32 {
        libm::exp2f(x)
    }
    extern "C" fn sinf(x: f32) -> f32 {
        libm::sinf(x)
    }
    extern "C" fn cosf(x: f32) -> f32 {
        libm::cosf(x)
    }
    extern "C" fn tanhf(x: f32) -> f32 {
        libm::tanhf(x)
    }
    extern "C" fn erff(x: f32) -> f32 {
        libm::erff(x)
    }
    extern "C" fn logf(x: f32) -> f32 {
        libm::logf(x)
    }
    extern "C" fn fmaf(x: f32, y: f32, z: f32) -> f32 {
        libm::fmaf(x, y, z)
    }
    if let Some(address) = f64s::address(EXTERNALS[index]) {
        return address as u64;
    }
    let address: *const () = match EXTERNALS[index] {
        "erff" => erff as *const (),
        "exp2f" => exp2f as *const (),
        "expf" => expf as *const (),
        "cosf" => cosf as *const (),
        "fmaf" => fmaf as *const (),
        "logf" => logf as *const (),
        "memcpy" => libc::memcpy as *const (),
        "memmove" => libc::memmove as *const (),
        "memset" => libc::memset as *const (),
        "sinf" => sinf as *const (),
        _ => tanhf as *const (),
    };
    address as u64
}

/// Where a section goes, in the order of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Segment {
    Code,
    Constant,
    Data,
}

struct Section<'a> {
    name: String,
    segment: Segment,
    /// Empty for zero-filled sections.
    data: &'a [u8],
    size: usize,
    align: usize,
}

/// What a relocation refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    /// An offset into `Parsed::sections[section]`.
    Local { section: usize, offset: u64 },
    /// An index into [`EXTERNALS`].
    External(usize),
}

/// The relocations the loader applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `S + A`, 64 bits.
    Abs64,
    /// `S + A`, 32 bits, zero-extended.
    Abs32,
    /// `S + A`, 32 bits, sign-extended.
    Abs32Signed,
    /// `S + A - P`, 32 bits.
    Rel32,
    /// `S + A - P`, 64 bits.
    Rel64,
    /// `G + A - P`, 32 bits, where the slot at `G` holds `S`.
    Slot32,
}

impl Kind {
    fn width(self) -> usize {
        match self {
            Kind::Abs64 | Kind::Rel64 => 8,
            Kind::Abs32 | Kind::Abs32Signed | Kind::Rel32 | Kind::Slot32 => 4,
        }
    }
}

struct Fixup {
    /// Index into `Parsed::sections`.
    section: usize,
    /// Offset in the section; `offset + width <= size` holds.
    offset: usize,
    kind: Kind,
    target: Target,
    addend: i64,
}

/// The file's sections, relocations and kernels, all checked.
struct Parsed<'a> {
    sections: Vec<Section<'a>>,
    fixups: Vec<Fixup>,
    /// Name, section, offset.
    kernels: Vec<(String, usize, u64)>,
}

type Header = elf::FileHeader64<LittleEndian>;
type SectionTable<'a> = object::read::elf::SectionTable<'a, Header>;
type SymbolTable<'a> = object::read::elf::SymbolTable<'a, Header>;

const LE: LittleEndian = LittleEndian;

impl<'a> Parsed<'a> {
    fn read(bytes: &'a [u8]) -> Result<Parsed<'a>> {
        let bad = |e: object::read::Error| Error::object(format!("not a well-formed ELF object: {e}"));
        let header = Header::parse(bytes).map_err(bad)?;
        if !header.is_little_endian() || header.e_machine(LE) != elf::EM_X86_64 {
            return Err(Error::object("not an object for 64-bit x86"));
        }
        if header.e_type(LE) != elf::ET_REL {
            return Err(Error::object("not a relocatable object"));
        }
        let table = header.sections(LE, bytes).map_err(bad)?;
        let symbols = table.symbols(LE, bytes, elf::SHT_SYMTAB).map_err(bad)?;
        // `index_of[i]`: where file section i is in `sections`.
        let (sections, index_of) = read_sections(bytes, &table)?;
        let fixups = read_relocations(bytes, &table, &symbols, &sections, &index_of)?;
        let kernels = read_kernels(&symbols, &sections, &index_of)?;
        Ok(Parsed { sections, fixups, kernels })
    }
}

fn read_sections<'a>(
    bytes: &'a [u8],
    table: &SectionTable<'a>,
) -> Result<(Vec<Section<'a>>, Vec<Option<usize>>)> {
    let mut sections = Vec::new();
    let mut index_of = vec![None; table.len()];
    let mut zeroed = 0usize;
    let mut copied = 0usize;
    for (index, header) in table.enumerate() {
        let name = table.section_name(LE, header).unwrap_or(b"?");
        let name = String::from_utf8_lossy(name).into_owned();
        let flags = header.sh_flags(LE);
        let ty = header.sh_type(LE);
        if !flags.contains(elf::SHF_ALLOC) || ty == elf::SHT_NOTE || name == ".eh_frame" {
            continue;
        }
        let refuse = |what: &str| Error::object(what).at(format_args!("section {name}"));
        if flags.contains(elf::SHF_TLS) {
            return Err(refuse("thread-local storage is not supported in kernels"));
        }
        if flags.contains(elf::SHF_COMPRESSED) {
            return Err(refuse("compressed sections are not supported"));
        }
        if flags.contains(elf::SHF_WRITE) && flags.contains(elf::SHF_EXECINSTR) {
            return Err(refuse("a section must not be writable and executable"));
        }
        let zero_filled = ty == elf::SHT_NOBITS;
        if !zero_filled && ty != elf::SHT_PROGBITS {
            return Err(refuse(
                "only plain sections are supported in kernels (no constructors, no dynamic linking)",
            ));
        }
        let segment = if flags.contains(elf::SHF_EXECINSTR) {
            Segment::Code
        } else if flags.contains(elf::SHF_WRITE) {
            Segment::Data
        } else {
            Segment::Constant
        };
        let align = header.sh_addralign(LE).max(1);
        if !align.is_power_of_two() || align > PAGE as u64 {
            return Err(refuse(&format!("alignment {align} is not a power of two up to {PAGE}")));
        }
        let data = match zero_filled {
            true => &[][..],
            false => header
                .data(LE, bytes)
                .map_err(|e| refuse(&format!("the section lies outside the file: {e}")))?,
        };
        let size = header.sh_size(LE);
        if zero_filled {
            zeroed = zeroed.saturating_add(usize::try_from(size).unwrap_or(usize::MAX));
            if zeroed > MAX_ZEROED_BYTES {
                return Err(refuse(&format!("more than {MAX_ZEROED_BYTES} bytes of zero-filled sections")));
            }
        } else {
            // Sections may overlap in the file; memory is still bounded by it.
            copied = copied.saturating_add(data.len());
            if copied > bytes.len() {
                return Err(refuse("the sections are larger than the file"));
            }
        }
        let size = if zero_filled { size as usize } else { data.len() };
        index_of[index.0] = Some(sections.len());
        sections.push(Section { name, segment, data, size, align: align as usize });
    }
    Ok((sections, index_of))
}

fn read_relocations(
    bytes: &[u8],
    table: &SectionTable<'_>,
    symbols: &SymbolTable<'_>,
    sections: &[Section<'_>],
    index_of: &[Option<usize>],
) -> Result<Vec<Fixup>> {
    let mut fixups = Vec::new();
    for header in table.iter() {
        let ty = header.sh_type(LE);
        if ty != elf::SHT_RELA && ty != elf::SHT_REL && ty != elf::SHT_CREL {
            continue;
        }
        let patched = header.sh_info(LE) as usize;
        let Some(&Some(section)) = index_of.get(patched) else {
            // Relocations of a section that is not loaded, or of none.
            if patched >= index_of.len() {
                return Err(Error::object(format!("relocations of section {patched}, which does not exist")));
            }
            continue;
        };
        let place = |e: Error| e.at(format_args!("relocations of {}", sections[section].name));
        if ty != elf::SHT_RELA {
            return Err(place(Error::object("only relocations with addends are supported")));
        }
        let bad = |e: object::read::Error| place(Error::object(e.to_string()));
        let Some((relas, link)) = header.rela(LE, bytes).map_err(bad)? else { continue };
        if link != symbols.section() {
            return Err(place(Error::object("they use a symbol table that is not the object's")));
        }
        if fixups.len() + relas.len() > bytes.len() {
            return Err(place(Error::object("more relocations than the file has room for")));
        }
        for rela in relas {
            let fixup = read_relocation(rela, section, symbols, sections, index_of).map_err(place)?;
            fixups.extend(fixup);
        }
    }
    Ok(fixups)
}

fn read_relocation(
    rela: &elf::Rela64<LittleEndian>,
    section: usize,
    symbols: &SymbolTable<'_>,
    sections: &[Section<'_>],
    index_of: &[Option<usize>],
) -> Result<Option<Fixup>> {
    let kind = match rela.r_type(LE, false) {
        elf::R_X86_64_NONE => return Ok(None),
        elf::R_X86_64_64 => Kind::Abs64,
        elf::R_X86_64_32 => Kind::Abs32,
        elf::R_X86_64_32S => Kind::Abs32Signed,
        elf::R_X86_64_PC32 | elf::R_X86_64_PLT32 => Kind::Rel32,
        elf::R_X86_64_PC64 => Kind::Rel64,
        elf::R_X86_64_GOTPCREL | elf::R_X86_64_GOTPCRELX | elf::R_X86_64_REX_GOTPCRELX => Kind::Slot32,
        other => {
            let what =
                "is not supported; compile kernels with the small code model, position-independent or not";
            return Err(Error::object(format!("relocation type {} {what}", other.0)));
        }
    };
    let size = sections[section].size;
    let offset = rela.r_offset(LE);
    let fits = offset.checked_add(kind.width() as u64).is_some_and(|end| end <= size as u64);
    if !fits {
        return Err(Error::object(format!("offset {offset} lies outside the section's {size} bytes")));
    }
    if sections[section].data.is_empty() {
        return Err(Error::object("a zero-filled section cannot have relocations"));
    }
    let index = rela.symbol(LE, false).ok_or_else(|| Error::object("a relocation names no symbol"))?;
    let symbol =
        symbols.symbol(index).map_err(|_| Error::object(format!("symbol {} does not exist", index.0)))?;
    let target = resolve(symbols, index, symbol, sections, index_of)?;
    Ok(Some(Fixup { section, offset: offset as usize, kind, target, addend: rela.r_addend(LE) }))
}

fn resolve(
    symbols: &SymbolTable<'_>,
    index: object::read::SymbolIndex,
    symbol: &elf::Sym64<LittleEndian>,
    sections: &[Section<'_>],
    index_of: &[Option<usize>],
) -> Result<Target> {
    let name = symbol_name(symbols, symbol)?;
    let ty = symbol.st_type();
    if ty == elf::STT_TLS || ty == elf::STT_GNU_IFUNC {
        return Err(Error::object(format!(
            "symbol `{name}` is thread-local or indirect; neither is supported"
        )));
    }
    if symbol.is_undefined(LE) {
        let position = EXTERNALS.iter().position(|&known| known == name);
        return position.map(Target::External).ok_or_else(|| {
            let known = EXTERNALS.join(", ");
            Error::object(format!(
                "the object needs `{name}`, which the runtime does not offer; it offers {known}"
            ))
        });
    }
    let file_section = symbols
        .symbol_section(LE, symbol, index)
        .map_err(|e| Error::object(format!("symbol `{name}`: {e}")))?
        .ok_or_else(|| {
            Error::object(format!("symbol `{name}` is absolute or common; neither is supported"))
        })?;
    let Some(&Some(section)) = index_of.get(file_section.0) else {
        return Err(Error::object(format!("symbol `{name}` lies in a section that is not loaded")));
    };
    let offset = symbol.st_value(LE);
    if offset > sections[section].size as u64 {
        return Err(Error::object(format!(
            "symbol `{name}` lies outside its section {}",
            sections[section].name
        )));
    }
    Ok(Target::Local { section, offset })
}

fn read_kernels(
    symbols: &SymbolTable<'_>,
    sections: &[Section<'_>],
    index_of: &[Option<usize>],
) -> Result<Vec<(String, usize, u64)>> {
    let mut kernels = Vec::new();
    let mut names = BTreeSet::new();
    for (index, symbol) in symbols.enumerate() {
        let ty = symbol.st_type();
        if symbol.is_local() || symbol.is_undefined(LE) || (ty != elf::STT_FUNC && ty != elf::STT_NOTYPE) {
            continue;
        }
        let Target::Local { section, offset } = resolve(symbols, index, symbol, sections, index_of)? else {
            continue;
        };
        if sections[section].segment != Segment::Code {
            continue;
        }
        let name = symbol_name(symbols, symbol)?;
        if offset >= sections[section].size as u64 {
            return Err(Error::object(format!(
                "kernel `{name}` lies at the end of {}",
                sections[section].name
            )));
        }
        if !names.insert(name.clone()) {
            return Err(Error::object(format!("kernel `{name}` is defined twice")));
        }
        kernels.push((name, section, offset));
    }
    Ok(kernels)
}

fn symbol_name(symbols: &SymbolTable<'_>, symbol: &elf::Sym64<LittleEndian>) -> Result<String> {
    let name = symbols.symbol_name(LE, symbol).map_err(|e| Error::object(format!("a symbol's name: {e}")))?;
    let name = std::str::from_utf8(name).map_err(|_| Error::object("a symbol's name is not UTF-8"))?;
    Ok(name.to_owned())
}

/// Bytes of a stub: `jmp *slot(%rip)` and filling.
const STUB_BYTES: usize = 16;
const SLOT_BYTES: usize = 8;

/// Offsets of everything in the image.
struct Layout {
    /// Offset of each section of the file.
    at: Vec<usize>,
    /// For each external reached by a 32-bit reference, its stub; it jumps through the external's slot.
    stubs: BTreeMap<usize, usize>,
    /// Slots that hold addresses.
    slots: BTreeMap<Target, usize>,
    code: usize,
    constants: usize,
    data: usize,
    /// Code holds 32-bit absolute addresses.
    low: bool,
}

impl Layout {
    fn plan(file: &Parsed<'_>) -> Result<Layout> {
        let mut layout = Layout {
            at: vec![0; file.sections.len()],
            stubs: BTreeMap::new(),
            slots: BTreeMap::new(),
            code: 0,
            constants: 0,
            data: 0,
            low: false,
        };
        for fixup in &file.fixups {
            match (fixup.kind, fixup.target) {
                (Kind::Abs32 | Kind::Abs32Signed | Kind::Rel32, Target::External(external)) => {
                    layout.stubs.insert(external, 0);
                    layout.slots.insert(fixup.target, 0);
                }
                (Kind::Slot32, _) => {
                    layout.slots.insert(fixup.target, 0);
                }
                _ => {}
            }
            layout.low |= matches!(fixup.kind, Kind::Abs32 | Kind::Abs32Signed);
        }
        let mut end = 0usize;
        for segment in [Segment::Code, Segment::Constant, Segment::Data] {
            let start = end;
            for (section, at) in file.sections.iter().zip(&mut layout.at) {
                if section.segment == segment {
                    *at = end.next_multiple_of(section.align);
                    end = *at + section.size;
                }
            }
            match segment {
                Segment::Code => place_all(layout.stubs.values_mut(), STUB_BYTES, &mut end),
                Segment::Constant => place_all(layout.slots.values_mut(), SLOT_BYTES, &mut end),
                Segment::Data => {}
            }
            end = end.next_multiple_of(PAGE);
            match segment {
                Segment::Code => layout.code = end - start,
                Segment::Constant => layout.constants = end - start,
                Segment::Data => layout.data = end - start,
            }
            // Sizes were bounded by the file's size and the limit on zeroed bytes; alignment adds less than a page
            // for each section. Checked all the same, because 32-bit distances rest on it.
            if end > 2 * MAX_OBJECT_BYTES {
                return Err(Error::object(format!(
                    "the object takes more than {} bytes",
                    2 * MAX_OBJECT_BYTES
                )));
            }
        }
        Ok(layout)
    }

    fn build(&self, file: &Parsed<'_>) -> Result<Object> {
        let len = self.code + self.constants + self.data;
        let mut image = match self.low {
            true => Mapping::new_low(len, "kernels")?,
            false => Mapping::new(len, "kernels")?,
        };
        let base = image.ptr() as u64;
        // SAFETY: nothing has been protected yet, and nobody else knows the mapping.
        let bytes = unsafe { image.bytes_mut() };
        for (section, &at) in file.sections.iter().zip(&self.at) {
            bytes[at..at + section.data.len()].copy_from_slice(section.data);
        }
        for (&target, &at) in &self.slots {
            let address = self.address(base, target);
            bytes[at..at + SLOT_BYTES].copy_from_slice(&address.to_le_bytes());
        }
        for (&external, &at) in &self.stubs {
            let slot = self.slots[&Target::External(external)];
            // jmp *disp(%rip): the displacement counts from the end of the 6-byte instruction.
            let disp = i32::try_from(slot as i64 - (at as i64 + 6)).expect("the image is smaller than 2 GiB");
            let mut stub = [0xcc; STUB_BYTES];
            stub[..2].copy_from_slice(&[0xff, 0x25]);
            stub[2..6].copy_from_slice(&disp.to_le_bytes());
            bytes[at..at + STUB_BYTES].copy_from_slice(&stub);
        }
        for fixup in &file.fixups {
            let at = self.at[fixup.section] + fixup.offset;
            let field = &mut bytes[at..at + fixup.kind.width()];
            self.apply(fixup, base, base + at as u64, field)
                .map_err(|e| e.at(format_args!("relocations of {}", file.sections[fixup.section].name)))?;
        }
        image.protect(0, self.code, Protection::ReadExecute)?;
        image.protect(self.code, self.constants, Protection::Read)?;
        let symbols = file
            .kernels
            .iter()
            .map(|(name, section, offset)| (name.clone(), self.at[*section] + *offset as usize))
            .collect();
        Ok(Object { image, symbols })
    }

    /// Writes the value of `fixup` into its field at address `p`.
    fn apply(&self, fixup: &Fixup, base: u64, p: u64, field: &mut [u8]) -> Result<()> {
        let s = match (fixup.kind, fixup.target) {
            (Kind::Slot32, target) => base + self.slots[&target] as u64,
            (Kind::Abs32 | Kind::Abs32Signed | Kind::Rel32, Target::External(external)) => {
                base + self.stubs[&external] as u64
            }
            (_, target) => self.address(base, target),
        };
        let absolute = s.wrapping_add_signed(fixup.addend);
        let relative = absolute.wrapping_sub(p);
        let far = || {
            Error::object(format!(
                "relocation at offset {} does not fit its {:?} field",
                fixup.offset, fixup.kind
            ))
        };
        match fixup.kind {
            Kind::Abs64 => field.copy_from_slice(&absolute.to_le_bytes()),
            Kind::Rel64 => field.copy_from_slice(&relative.to_le_bytes()),
            Kind::Abs32 => {
                field.copy_from_slice(&u32::try_from(absolute).map_err(|_| far())?.to_le_bytes());
            }
            Kind::Abs32Signed => {
                field.copy_from_slice(&i32::try_from(absolute as i64).map_err(|_| far())?.to_le_bytes());
            }
            Kind::Rel32 | Kind::Slot32 => {
                field.copy_from_slice(&i32::try_from(relative as i64).map_err(|_| far())?.to_le_bytes());
            }
        }
        Ok(())
    }

    fn address(&self, base: u64, target: Target) -> u64 {
        match target {
            Target::Local { section, offset } => base + self.at[section] as u64 + offset,
            Target::External(external) => external_address(external),
        }
    }
}

/// Puts entries of `size` bytes one after another from `end` on.
fn place_all<'a>(entries: impl Iterator<Item = &'a mut usize>, size: usize, end: &mut usize) {
    *end = end.next_multiple_of(size);
    for at in entries {
        *at = *end;
        *end += size;
    }
}
