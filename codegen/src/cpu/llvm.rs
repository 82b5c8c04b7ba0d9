//! Building machine code with LLVM: one [`Unit`] per object, one [`VecBuilder`] per kernel.
//!
//! This module and the emitters beside it are the only code that knows LLVM. It offers straight-line vector
//! arithmetic on one value type ([`Val`]), loops with carried values, partial loads and stores, and the calls that
//! the runtime's loader resolves. What holds:
//!
//! - A vector never gets wider than the target's registers unless an emitter asks for it.
//! - Floating-point operations are never reassociated or contracted: [`VecBuilder::fma`] is the only fused operation,
//!   and becomes a multiply and an add on targets without it.
//! - The same calls give the same bytes: nothing depends on addresses, clocks or hash order.
//! - Every function carries its processor, its features and its vector width, so that no instruction is selected
//!   that the target lacks.

use std::sync::OnceLock;

use inkwell::attributes::AttributeLoc;
use inkwell::basic_block::BasicBlock;
use inkwell::builder::{Builder, BuilderError};
use inkwell::context::Context;
use inkwell::intrinsics::Intrinsic;
use inkwell::module::{Linkage, Module};
use inkwell::passes::PassBuilderOptions;
use inkwell::targets::{
    CodeModel, FileType, InitializationConfig, RelocMode, Target, TargetMachine, TargetTriple,
};
use inkwell::types::{BasicMetadataTypeEnum, BasicType, BasicTypeEnum, VectorType};
use inkwell::values::{
    BasicMetadataValueEnum, BasicValue, BasicValueEnum, FunctionValue, InstructionOpcode, PointerValue,
};
use inkwell::{AddressSpace, FloatPredicate, IntPredicate, OptimizationLevel};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::target::{CpuDesc, TargetDesc};

/// A value while code is built: a scalar, a vector or a pointer.
pub type Val<'c> = BasicValueEnum<'c>;

/// What one lane of a value holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elem {
    /// A truth value.
    I1,
    /// Eight bits.
    I8,
    /// Sixteen bits.
    I16,
    /// Thirty-two bits.
    I32,
    /// Sixty-four bits.
    I64,
    /// IEEE half precision.
    F16,
    /// The upper half of an IEEE single, for instructions that take it.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// An address.
    Ptr,
}

impl Elem {
    /// Bytes of one lane in memory.
    pub fn bytes(self) -> u32 {
        match self {
            Elem::I1 | Elem::I8 => 1,
            Elem::I16 | Elem::F16 | Elem::Bf16 => 2,
            Elem::I32 | Elem::F32 => 4,
            Elem::I64 | Elem::F64 | Elem::Ptr => 8,
        }
    }
}

/// How two floats are compared.
pub use inkwell::FloatPredicate as FloatCmp;
/// How two integers are compared.
pub use inkwell::IntPredicate as IntCmp;

/// Functions outside the object that a kernel may call; the loader refuses any other.
pub const EXTERNAL: [&str; 8] = ["expf", "exp2f", "sinf", "cosf", "tanhf", "erff", "logf", "fmaf"];

/// The same for functions of f64, whose names no compiler knows: none is turned into another.
pub const EXTERNAL_F64: [&str; 21] = [
    "qc_acos", "qc_acosh", "qc_asin", "qc_asinh", "qc_atan", "qc_atanh", "qc_ceil", "qc_cos", "qc_cosh",
    "qc_erf", "qc_exp", "qc_floor", "qc_log", "qc_log1p", "qc_pow", "qc_rem", "qc_round", "qc_sin",
    "qc_sinh", "qc_tan", "qc_tanh",
];

/// What the builder promises: it always stands in a block.
const POSITIONED: &str = "the builder stands at the end of a block";

/// One object file in the making.
pub struct Unit<'c> {
    cx: &'c Context,
    module: Module<'c>,
    machine: TargetMachine,
    target: &'static TargetDesc,
    triple: TargetTriple,
}

/// The triple that every object is made for: the loader reads ELF for x86-64.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The pipeline run over the functions: of `default<O2>` those passes that straight vector code and its loops gain from.
/// Emitters write vectors and unroll themselves, and call nothing that could be inlined. Kernels run as fast as after
/// all of it, timed in turns, and are compiled in four fifths of the time.
const PIPELINE: &str = "function<eager-inv>(\
    sroa,early-cse,instcombine<no-verify-fixpoint>,simplifycfg<switch-range-to-icmp>,reassociate,\
    loop-mssa(loop-rotate,licm),simplifycfg<switch-range-to-icmp>,instcombine<no-verify-fixpoint>,\
    loop(indvars),gvn,correlated-propagation,instcombine<no-verify-fixpoint>,\
    simplifycfg<switch-range-to-icmp;speculate-unpredictables>)";

fn initialize() -> Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| Target::initialize_x86(&InitializationConfig::default()));
    Ok(())
}

fn features(cpu: &CpuDesc) -> String {
    let all: Vec<String> = cpu.features.iter().map(|f| format!("+{f}")).collect();
    all.join(",")
}

impl<'c> Unit<'c> {
    /// An empty object called `name` for `target`.
    pub fn new(cx: &'c Context, target: &'static TargetDesc, name: &str) -> Result<Unit<'c>> {
        initialize()?;
        let triple = TargetTriple::create(TRIPLE);
        let llvm = Target::from_triple(&triple)
            .map_err(|e| Diag::system(format!("LLVM cannot generate x86-64 code: {e}")))?;
        let machine = llvm
            .create_target_machine(
                &triple,
                target.cpu.llvm_cpu,
                &features(&target.cpu),
                OptimizationLevel::Default,
                RelocMode::PIC,
                CodeModel::Small,
            )
            .ok_or_else(|| {
                Diag::bug(format!("LLVM does not know the processor `{}`", target.cpu.llvm_cpu))
            })?;
        let module = cx.create_module(name);
        module.set_source_file_name(name);
        module.set_triple(&triple);
        module.set_data_layout(&machine.get_target_data().get_data_layout());
        Ok(Unit { cx, module, machine, target, triple })
    }

    /// The target of this object.
    pub fn target(&self) -> &'static TargetDesc {
        self.target
    }

    /// Adds a kernel: `extern "C" fn(args: *const *mut u8, dims: *const i64, begin: i64, end: i64)`.
    ///
    /// `body` finds the parameters in the builder and must leave it in an open block; the return is added here.
    pub fn kernel(&self, symbol: &str, body: impl FnOnce(&VecBuilder<'_, 'c>) -> Result<()>) -> Result<()> {
        if self.module.get_function(symbol).is_some() {
            return Err(Diag::bug(format!("the kernel `{symbol}` is emitted twice")));
        }
        let ptr = self.cx.ptr_type(AddressSpace::default());
        let i64t = self.cx.i64_type();
        let ty = self.cx.void_type().fn_type(&[ptr.into(), ptr.into(), i64t.into(), i64t.into()], false);
        let func = self.module.add_function(symbol, ty, None);
        self.attributes(func);
        for param in [0, 1] {
            for name in ["noalias", "readonly"] {
                let kind = inkwell::attributes::Attribute::get_named_enum_kind_id(name);
                func.add_attribute(AttributeLoc::Param(param), self.cx.create_enum_attribute(kind, 0));
            }
        }
        let builder = self.cx.create_builder();
        builder.position_at_end(self.cx.append_basic_block(func, "entry"));
        let b = VecBuilder { unit: self, builder, func };
        body(&b)?;
        b.builder.build_return(None).expect(POSITIONED);
        Ok(())
    }

    fn attributes(&self, func: FunctionValue<'c>) {
        let bits = self.target.cpu.vector_bits.to_string();
        let features = features(&self.target.cpu);
        for (key, value) in [
            ("target-cpu", self.target.cpu.llvm_cpu),
            ("target-features", features.as_str()),
            ("prefer-vector-width", bits.as_str()),
            ("min-legal-vector-width", bits.as_str()),
            ("no-trapping-math", "true"),
        ] {
            if !value.is_empty() {
                func.add_attribute(AttributeLoc::Function, self.cx.create_string_attribute(key, value));
            }
        }
        let nounwind = inkwell::attributes::Attribute::get_named_enum_kind_id("nounwind");
        func.add_attribute(AttributeLoc::Function, self.cx.create_enum_attribute(nounwind, 0));
    }

    /// The LLVM assembly as emitted, before optimization unless [`Unit::optimize`] ran.
    pub fn ir(&self) -> String {
        self.module.print_to_string().to_string()
    }

    /// Checks the module and runs the optimizer over it.
    pub fn optimize(&self) -> Result<()> {
        self.module.verify().map_err(|e| Diag::bug(format!("LLVM refuses the emitted code: {e}")))?;
        self.module
            .run_passes(PIPELINE, &self.machine, PassBuilderOptions::create())
            .map_err(|e| Diag::bug(format!("LLVM cannot optimize the emitted code: {e}")))
    }

    /// The optimized relocatable object.
    pub fn finish(self) -> Result<Vec<u8>> {
        self.optimize()?;
        self.emit(FileType::Object)
    }

    /// The optimized machine code as assembly text, to be read by people and tests.
    pub fn assembly(self) -> Result<String> {
        self.optimize()?;
        Ok(String::from_utf8_lossy(&self.emit(FileType::Assembly)?).into_owned())
    }

    fn emit(&self, kind: FileType) -> Result<Vec<u8>> {
        let buffer = self
            .machine
            .write_to_memory_buffer(&self.module, kind)
            .map_err(|e| Diag::bug(format!("LLVM cannot write the object for {}: {e}", self.triple)))?;
        Ok(buffer.as_slice().to_vec())
    }
}

/// Builds one kernel.
pub struct VecBuilder<'u, 'c> {
    unit: &'u Unit<'c>,
    builder: Builder<'c>,
    func: FunctionValue<'c>,
}

/// Takes the value out of a builder call. The calls fail only when the builder has no position, and it always has.
fn ok<T>(result: Result<T, BuilderError>) -> T {
    result.expect(POSITIONED)
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident = $op:ident;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(&self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
                debug_assert_eq!(a.get_type(), b.get_type(), stringify!($name));
                ok(self.builder.build_binop(InstructionOpcode::$op, a, b, ""))
            }
        )*
    };
}

macro_rules! casts {
    ($($(#[$doc:meta])* $name:ident = $op:ident;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(&self, v: Val<'c>, to: Elem) -> Val<'c> {
                let ty = self.ty(to, self.lanes(v));
                ok(self.builder.build_cast(InstructionOpcode::$op, v, ty, ""))
            }
        )*
    };
}

impl<'u, 'c> VecBuilder<'u, 'c> {
    binary! {
        /// Integer sum, wrapping.
        add = Add;
        /// Integer difference, wrapping.
        sub = Sub;
        /// Integer product, wrapping.
        mul = Mul;
        /// Signed quotient, rounded to zero.
        sdiv = SDiv;
        /// Signed remainder.
        srem = SRem;
        /// Unsigned quotient.
        udiv = UDiv;
        /// Unsigned remainder.
        urem = URem;
        /// Bitwise and.
        and = And;
        /// Bitwise or.
        or = Or;
        /// Bitwise exclusive or.
        xor = Xor;
        /// Shift to the left.
        shl = Shl;
        /// Shift to the right, zeros come in.
        lshr = LShr;
        /// Shift to the right, the sign comes in.
        ashr = AShr;
        /// Float sum.
        fadd = FAdd;
        /// Float difference.
        fsub = FSub;
        /// Float product.
        fmul = FMul;
        /// Float quotient.
        fdiv = FDiv;
    }

    casts! {
        /// Sign extension.
        sext = SExt;
        /// Zero extension.
        zext = ZExt;
        /// Truncation of an integer.
        trunc = Trunc;
        /// Signed integer to float, to nearest even.
        sitofp = SIToFP;
        /// Unsigned integer to float, to nearest even.
        uitofp = UIToFP;
        /// Float to signed integer, rounded to zero; the value must fit.
        fptosi = FPToSI;
        /// Float to a wider float.
        fpext = FPExt;
        /// Float to a narrower float, to nearest even.
        fptrunc = FPTrunc;
    }

    /// The target that is built for.
    pub fn target(&self) -> &'static TargetDesc {
        self.unit.target
    }

    /// Lanes of 32 bits in one vector register.
    pub fn width(&self) -> u32 {
        self.unit.target.cpu.vector_bits / 32
    }

    // Types and constants.

    /// The type of `lanes` lanes of `elem`; one lane is a scalar.
    pub fn ty(&self, elem: Elem, lanes: u32) -> BasicTypeEnum<'c> {
        let cx = self.unit.cx;
        let scalar: BasicTypeEnum<'c> = match elem {
            Elem::I1 => cx.bool_type().into(),
            Elem::I8 => cx.i8_type().into(),
            Elem::I16 => cx.i16_type().into(),
            Elem::I32 => cx.i32_type().into(),
            Elem::I64 => cx.i64_type().into(),
            Elem::F16 => cx.f16_type().into(),
            Elem::Bf16 => cx.bf16_type().into(),
            Elem::F32 => cx.f32_type().into(),
            Elem::F64 => cx.f64_type().into(),
            Elem::Ptr => cx.ptr_type(AddressSpace::default()).into(),
        };
        if lanes == 1 {
            return scalar;
        }
        match scalar {
            BasicTypeEnum::IntType(t) => t.vec_type(lanes).into(),
            BasicTypeEnum::FloatType(t) => t.vec_type(lanes).into(),
            BasicTypeEnum::PointerType(t) => t.vec_type(lanes).into(),
            other => other,
        }
    }

    /// Lanes of a value; one for a scalar.
    pub fn lanes(&self, v: Val<'c>) -> u32 {
        match v {
            BasicValueEnum::VectorValue(v) => v.get_type().get_size(),
            _ => 1,
        }
    }

    /// An integer in every lane.
    pub fn int(&self, elem: Elem, lanes: u32, value: i64) -> Val<'c> {
        self.ints(elem, &vec![value; lanes as usize])
    }

    /// The integers of a vector; of a scalar when there is one.
    pub fn ints(&self, elem: Elem, values: &[i64]) -> Val<'c> {
        let ty = self.ty(elem, 1).into_int_type();
        let lanes: Vec<_> = values.iter().map(|&v| ty.const_int(v as u64, true)).collect();
        if lanes.len() == 1 { lanes[0].into() } else { VectorType::const_vector(&lanes).into() }
    }

    /// An address-sized integer.
    pub fn i64(&self, value: i64) -> Val<'c> {
        self.int(Elem::I64, 1, value)
    }

    /// A 32-bit integer in every lane.
    pub fn i32(&self, lanes: u32, value: i32) -> Val<'c> {
        self.int(Elem::I32, lanes, i64::from(value))
    }

    /// A truth value.
    pub fn bit(&self, value: bool) -> Val<'c> {
        self.int(Elem::I1, 1, i64::from(value))
    }

    /// A single-precision float in every lane.
    pub fn f32(&self, lanes: u32, value: f32) -> Val<'c> {
        self.f32s(&vec![value; lanes as usize])
    }

    /// The floats of a vector; of a scalar when there is one.
    pub fn f32s(&self, values: &[f32]) -> Val<'c> {
        // Through the bits, so that no conversion can touch a NaN or a subnormal.
        let bits: Vec<i64> = values.iter().map(|v| i64::from(v.to_bits())).collect();
        self.bitcast(self.ints(Elem::I32, &bits), Elem::F32, values.len() as u32)
    }

    /// The same bits as `lanes` lanes of `elem`.
    pub fn bitcast(&self, v: Val<'c>, elem: Elem, lanes: u32) -> Val<'c> {
        let ty = self.ty(elem, lanes);
        if v.get_type() == ty {
            return v;
        }
        ok(self.builder.build_cast(InstructionOpcode::BitCast, v, ty, ""))
    }

    /// The value whose bits nobody may look at; used to start a shuffle.
    fn poison(&self, elem: BasicTypeEnum<'c>, lanes: u32) -> inkwell::values::VectorValue<'c> {
        match elem {
            BasicTypeEnum::IntType(t) => t.vec_type(lanes).get_poison(),
            BasicTypeEnum::FloatType(t) => t.vec_type(lanes).get_poison(),
            BasicTypeEnum::PointerType(t) => t.vec_type(lanes).get_poison(),
            other => unreachable!("a lane is a number or an address, not {other}"),
        }
    }

    /// The scalar `v` in every lane.
    pub fn splat(&self, v: Val<'c>, lanes: u32) -> Val<'c> {
        if lanes == 1 {
            return v;
        }
        let empty = self.poison(v.get_type(), lanes);
        let zero = self.unit.cx.i32_type().const_zero();
        let first = ok(self.builder.build_insert_element(empty, v, zero, ""));
        let mask = self.unit.cx.i32_type().vec_type(lanes).const_zero();
        ok(self.builder.build_shuffle_vector(first, empty, mask, "")).into()
    }

    /// The lanes of `a` and `b`, counted through, that `lanes` names.
    pub fn shuffle(&self, a: Val<'c>, b: Val<'c>, lanes: &[u32]) -> Val<'c> {
        let i32t = self.unit.cx.i32_type();
        let mask: Vec<_> = lanes.iter().map(|&l| i32t.const_int(u64::from(l), false)).collect();
        let mask = VectorType::const_vector(&mask);
        ok(self.builder.build_shuffle_vector(a.into_vector_value(), b.into_vector_value(), mask, "")).into()
    }

    /// One lane of a vector.
    pub fn extract(&self, v: Val<'c>, lane: u32) -> Val<'c> {
        if self.lanes(v) == 1 {
            return v;
        }
        let at = self.unit.cx.i32_type().const_int(u64::from(lane), false);
        ok(self.builder.build_extract_element(v.into_vector_value(), at, ""))
    }

    /// The vector with one lane replaced.
    pub fn insert(&self, v: Val<'c>, lane: u32, value: Val<'c>) -> Val<'c> {
        let at = self.unit.cx.i32_type().const_int(u64::from(lane), false);
        ok(self.builder.build_insert_element(v.into_vector_value(), value, at, "")).into()
    }

    // Arithmetic beyond single instructions.

    /// `a * b + c`: fused where the target has it, else a rounded product and a rounded sum.
    pub fn fma(&self, a: Val<'c>, b: Val<'c>, c: Val<'c>) -> Val<'c> {
        if self.unit.target.cpu.fma {
            self.intrinsic("llvm.fma", &[a.get_type()], &[a, b, c])
        } else {
            self.fadd(self.fmul(a, b), c)
        }
    }

    /// `-v`.
    pub fn fneg(&self, v: Val<'c>) -> Val<'c> {
        match v {
            BasicValueEnum::VectorValue(v) => ok(self.builder.build_float_neg(v, "")).into(),
            v => ok(self.builder.build_float_neg(v.into_float_value(), "")).into(),
        }
    }

    /// The integers compared lane by lane.
    pub fn icmp(&self, how: IntPredicate, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        match (a, b) {
            (BasicValueEnum::VectorValue(a), BasicValueEnum::VectorValue(b)) => {
                ok(self.builder.build_int_compare(how, a, b, "")).into()
            }
            (a, b) => {
                ok(self.builder.build_int_compare(how, a.into_int_value(), b.into_int_value(), "")).into()
            }
        }
    }

    /// The floats compared lane by lane.
    pub fn fcmp(&self, how: FloatPredicate, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        match (a, b) {
            (BasicValueEnum::VectorValue(a), BasicValueEnum::VectorValue(b)) => {
                ok(self.builder.build_float_compare(how, a, b, "")).into()
            }
            (a, b) => {
                ok(self.builder.build_float_compare(how, a.into_float_value(), b.into_float_value(), ""))
                    .into()
            }
        }
    }

    /// `yes` in the lanes where `cond` holds, `no` elsewhere.
    pub fn select(&self, cond: Val<'c>, yes: Val<'c>, no: Val<'c>) -> Val<'c> {
        match cond {
            BasicValueEnum::VectorValue(c) => ok(self.builder.build_select(c, yes, no, "")),
            c => ok(self.builder.build_select(c.into_int_value(), yes, no, "")),
        }
    }

    /// `a < b ? a : b`, the processor's own minimum: with a NaN, `b`.
    pub fn fmin(&self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        self.select(self.fcmp(FloatPredicate::OLT, a, b), a, b)
    }

    /// `a > b ? a : b`, the processor's own maximum: with a NaN, `b`.
    pub fn fmax(&self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        self.select(self.fcmp(FloatPredicate::OGT, a, b), a, b)
    }

    /// The smaller signed integer.
    pub fn smin(&self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        self.intrinsic("llvm.smin", &[a.get_type()], &[a, b])
    }

    /// The larger signed integer.
    pub fn smax(&self, a: Val<'c>, b: Val<'c>) -> Val<'c> {
        self.intrinsic("llvm.smax", &[a.get_type()], &[a, b])
    }

    /// The absolute value.
    pub fn fabs(&self, v: Val<'c>) -> Val<'c> {
        self.intrinsic("llvm.fabs", &[v.get_type()], &[v])
    }

    /// The square root, correctly rounded.
    pub fn sqrt(&self, v: Val<'c>) -> Val<'c> {
        self.intrinsic("llvm.sqrt", &[v.get_type()], &[v])
    }

    /// The lanes combined by `combine` in a fixed tree: halves onto each other until one lane is left.
    pub fn reduce(&self, v: Val<'c>, combine: impl Fn(&Self, Val<'c>, Val<'c>) -> Val<'c>) -> Val<'c> {
        let mut v = v;
        let mut lanes = self.lanes(v);
        while lanes > 1 {
            let half = lanes / 2;
            let low: Vec<u32> = (0..half).collect();
            let high: Vec<u32> = (half..lanes).collect();
            v = if half == 1 {
                combine(self, self.extract(v, 0), self.extract(v, 1))
            } else {
                combine(self, self.shuffle(v, v, &low), self.shuffle(v, v, &high))
            };
            lanes = half;
        }
        v
    }

    /// Calls the LLVM intrinsic `name`, overloaded on `types`.
    ///
    /// The caller answers for the target having the instruction: LLVM ends the process otherwise.
    pub fn intrinsic(&self, name: &str, types: &[BasicTypeEnum<'c>], args: &[Val<'c>]) -> Val<'c> {
        let found = Intrinsic::find(name).and_then(|i| i.get_declaration(&self.unit.module, types));
        let func = found.unwrap_or_else(|| panic!("LLVM has no intrinsic {name}"));
        self.call(func, args)
    }

    /// Calls one of the [`EXTERNAL`] functions of f32, lane by lane.
    pub fn external(&self, name: &str, args: &[Val<'c>]) -> Val<'c> {
        debug_assert!(EXTERNAL.contains(&name), "{name} is not resolved by the loader");
        self.lane_by_lane(name, args, Elem::F32)
    }

    /// Calls one of the [`EXTERNAL_F64`] functions of f64, lane by lane.
    pub fn external_f64(&self, name: &str, args: &[Val<'c>]) -> Val<'c> {
        debug_assert!(EXTERNAL_F64.contains(&name), "{name} is not resolved by the loader");
        self.lane_by_lane(name, args, Elem::F64)
    }

    fn lane_by_lane(&self, name: &str, args: &[Val<'c>], elem: Elem) -> Val<'c> {
        let func = self.unit.module.get_function(name).unwrap_or_else(|| {
            let ty: BasicTypeEnum<'c> = self.ty(elem, 1);
            let params: Vec<BasicMetadataTypeEnum<'c>> = args.iter().map(|_| ty.into()).collect();
            let func =
                self.unit.module.add_function(name, ty.fn_type(&params, false), Some(Linkage::External));
            for attribute in ["nounwind", "willreturn"] {
                let kind = inkwell::attributes::Attribute::get_named_enum_kind_id(attribute);
                func.add_attribute(AttributeLoc::Function, self.unit.cx.create_enum_attribute(kind, 0));
            }
            func
        });
        let lanes = self.lanes(args[0]);
        if lanes == 1 {
            return self.call(func, args);
        }
        let mut out = self.ty(elem, lanes).const_zero();
        for lane in 0..lanes {
            let scalars: Vec<_> = args.iter().map(|&a| self.extract(a, lane)).collect();
            out = self.insert(out, lane, self.call(func, &scalars));
        }
        out
    }

    fn call(&self, func: FunctionValue<'c>, args: &[Val<'c>]) -> Val<'c> {
        let args: Vec<BasicMetadataValueEnum<'c>> = args.iter().map(|&a| a.into()).collect();
        let site = ok(self.builder.build_call(func, &args, ""));
        site.try_as_basic_value().basic().expect("the function returns a value")
    }

    // Memory.

    /// `args[i]`: the address of buffer `i`.
    pub fn arg(&self, i: u32) -> PointerValue<'c> {
        let at = self.offset(self.param(0).into_pointer_value(), i64::from(i) * 8);
        self.load(at, Elem::Ptr, 1).into_pointer_value()
    }

    /// `dims[i]`.
    pub fn dim(&self, i: u32) -> Val<'c> {
        let at = self.offset(self.param(1).into_pointer_value(), i64::from(i) * 8);
        self.load(at, Elem::I64, 1)
    }

    /// The first item of this call.
    pub fn begin(&self) -> Val<'c> {
        self.param(2)
    }

    /// One past the last item of this call.
    pub fn end(&self) -> Val<'c> {
        self.param(3)
    }

    fn param(&self, i: u32) -> Val<'c> {
        self.func.get_nth_param(i).expect("a kernel has four parameters")
    }

    /// `base + bytes`.
    pub fn at(&self, base: PointerValue<'c>, bytes: Val<'c>) -> PointerValue<'c> {
        let i8t = self.unit.cx.i8_type();
        // SAFETY: the builder only forms an address here; emitters keep addresses inside the buffers that the kernel
        // ABI promises.
        ok(unsafe { self.builder.build_in_bounds_gep(i8t, base, &[bytes.into_int_value()], "") })
    }

    /// `base + bytes` for a distance known now.
    pub fn offset(&self, base: PointerValue<'c>, bytes: i64) -> PointerValue<'c> {
        if bytes == 0 { base } else { self.at(base, self.i64(bytes)) }
    }

    /// `base + index * bytes`.
    pub fn row(&self, base: PointerValue<'c>, index: Val<'c>, bytes: i64) -> PointerValue<'c> {
        self.at(base, self.mul(index, self.i64(bytes)))
    }

    /// Loads `lanes` lanes, aligned to one lane only.
    pub fn load(&self, ptr: PointerValue<'c>, elem: Elem, lanes: u32) -> Val<'c> {
        self.load_aligned(ptr, elem, lanes, elem.bytes())
    }

    /// Loads `lanes` lanes from an address that is a multiple of `align`.
    pub fn load_aligned(&self, ptr: PointerValue<'c>, elem: Elem, lanes: u32, align: u32) -> Val<'c> {
        let v = ok(self.builder.build_load(self.ty(elem, lanes), ptr, ""));
        let instruction = v.as_instruction_value().expect("a load is an instruction");
        instruction.set_alignment(align).expect("the alignment is a power of two");
        v
    }

    /// Stores all lanes, aligned to one lane only.
    pub fn store(&self, ptr: PointerValue<'c>, v: Val<'c>, elem: Elem) {
        let store = ok(self.builder.build_store(ptr, v));
        store.set_alignment(elem.bytes()).expect("the alignment is a power of two");
    }

    /// Loads the first `valid` of `lanes` lanes and zeros for the rest; bytes beyond them are not touched.
    pub fn load_partial(&self, ptr: PointerValue<'c>, elem: Elem, lanes: u32, valid: u32) -> Val<'c> {
        if valid >= lanes {
            return self.load(ptr, elem, lanes);
        }
        if valid == 0 {
            return self.ty(elem, lanes).const_zero();
        }
        self.load_masked(ptr, elem, lanes, self.first_lanes(lanes, valid))
    }

    /// Stores the first `valid` lanes; bytes beyond them are not touched.
    pub fn store_partial(&self, ptr: PointerValue<'c>, v: Val<'c>, elem: Elem, valid: u32) {
        let lanes = self.lanes(v);
        if valid >= lanes {
            self.store(ptr, v, elem);
        } else if valid > 0 {
            self.store_masked(ptr, v, elem, self.first_lanes(lanes, valid));
        }
    }

    fn first_lanes(&self, lanes: u32, valid: u32) -> Val<'c> {
        let mask: Vec<i64> = (0..lanes).map(|l| i64::from(l < valid)).collect();
        self.ints(Elem::I1, &mask)
    }

    /// The mask of the first `count` lanes, `count` being a 64-bit value of any size.
    pub fn lane_mask(&self, lanes: u32, count: Val<'c>) -> Val<'c> {
        let all = self.i64(i64::from(lanes));
        let count = self.trunc(self.smin(count, all), Elem::I32);
        let index: Vec<i64> = (0..i64::from(lanes)).collect();
        self.icmp(IntPredicate::SLT, self.ints(Elem::I32, &index), self.splat(count, lanes))
    }

    /// Loads the lanes where `mask` holds and zeros elsewhere; other bytes are not touched.
    pub fn load_masked(&self, ptr: PointerValue<'c>, elem: Elem, lanes: u32, mask: Val<'c>) -> Val<'c> {
        let ty = self.ty(elem, lanes);
        let align = self.i32(1, elem.bytes() as i32);
        self.intrinsic(
            "llvm.masked.load",
            &[ty, ptr.get_type().into()],
            &[ptr.into(), align, mask, ty.const_zero()],
        )
    }

    /// Stores the lanes where `mask` holds; other bytes are not touched.
    pub fn store_masked(&self, ptr: PointerValue<'c>, v: Val<'c>, elem: Elem, mask: Val<'c>) {
        let found = Intrinsic::find("llvm.masked.store")
            .and_then(|i| i.get_declaration(&self.unit.module, &[v.get_type(), ptr.get_type().into()]));
        let func = found.expect("LLVM has masked stores");
        let align = self.i32(1, elem.bytes() as i32);
        let args: Vec<BasicMetadataValueEnum<'c>> = vec![v.into(), ptr.into(), align.into(), mask.into()];
        ok(self.builder.build_call(func, &args, ""));
    }

    /// Asks for the cache line at `ptr`, to be read soon. The address need not be mapped.
    pub fn prefetch(&self, ptr: PointerValue<'c>) {
        let found = Intrinsic::find("llvm.prefetch")
            .and_then(|i| i.get_declaration(&self.unit.module, &[ptr.get_type().into()]));
        let func = found.expect("LLVM has prefetches");
        // To be read, of some use after that, data.
        let args = [ptr.into(), self.i32(1, 0).into(), self.i32(1, 2).into(), self.i32(1, 1).into()];
        ok(self.builder.build_call(func, &args, ""));
    }

    /// Loads bf16 lanes as f32.
    pub fn load_bf16(&self, ptr: PointerValue<'c>, lanes: u32) -> Val<'c> {
        self.bf16_to_f32(self.load(ptr, Elem::I16, lanes))
    }

    /// The bits of bf16 numbers as f32, exactly.
    pub fn bf16_to_f32(&self, bits: Val<'c>) -> Val<'c> {
        let lanes = self.lanes(bits);
        let wide = self.shl(self.zext(bits, Elem::I32), self.i32(lanes, 16));
        self.bitcast(wide, Elem::F32, lanes)
    }

    // Control.

    fn block(&self, name: &str) -> BasicBlock<'c> {
        self.unit.cx.append_basic_block(self.func, name)
    }

    fn here(&self) -> BasicBlock<'c> {
        self.builder.get_insert_block().expect(POSITIONED)
    }

    /// `for i in (begin..end).step_by(step)`, carrying `init` from turn to turn; gives the carried values at the end.
    pub fn for_range(
        &self,
        begin: Val<'c>,
        end: Val<'c>,
        step: i64,
        init: &[Val<'c>],
        body: impl FnOnce(Val<'c>, &[Val<'c>]) -> Vec<Val<'c>>,
    ) -> Vec<Val<'c>> {
        let before = self.here();
        let (head, inside, after) = (self.block("head"), self.block("body"), self.block("after"));
        ok(self.builder.build_unconditional_branch(head));
        self.builder.position_at_end(head);
        let index = ok(self.builder.build_phi(begin.get_type(), ""));
        index.add_incoming(&[(&begin, before)]);
        let carried: Vec<_> = init
            .iter()
            .map(|v| {
                let phi = ok(self.builder.build_phi(v.get_type(), ""));
                phi.add_incoming(&[(v, before)]);
                phi
            })
            .collect();
        let i = index.as_basic_value();
        let more = self.icmp(IntPredicate::SLT, i, end);
        ok(self.builder.build_conditional_branch(more.into_int_value(), inside, after));
        self.builder.position_at_end(inside);
        let values: Vec<_> = carried.iter().map(|phi| phi.as_basic_value()).collect();
        let next = body(i, &values);
        assert_eq!(next.len(), carried.len(), "a loop carries the same values on every turn");
        let stride = ok(self.builder.build_int_nsw_add(
            i.into_int_value(),
            i.get_type().into_int_type().const_int(step as u64, true),
            "",
        ));
        let last = self.here();
        index.add_incoming(&[(&stride, last)]);
        for (phi, v) in carried.iter().zip(&next) {
            phi.add_incoming(&[(v, last)]);
        }
        ok(self.builder.build_unconditional_branch(head));
        self.builder.position_at_end(after);
        values
    }

    /// As [`VecBuilder::for_range`] over bounds known now: no code for an empty range, no loop for a single turn.
    pub fn for_const(
        &self,
        begin: i64,
        end: i64,
        step: i64,
        init: &[Val<'c>],
        body: impl FnOnce(Val<'c>, &[Val<'c>]) -> Vec<Val<'c>>,
    ) -> Vec<Val<'c>> {
        if begin >= end {
            init.to_vec()
        } else if begin + step >= end {
            body(self.i64(begin), init)
        } else {
            self.for_range(self.i64(begin), self.i64(end), step, init, body)
        }
    }

    /// Runs `body` for every item of this call.
    pub fn for_items(&self, body: impl FnOnce(Val<'c>)) {
        self.for_range(self.begin(), self.end(), 1, &[], |i, _| {
            body(i);
            vec![]
        });
    }

    /// Runs one of two bodies; both give as many values, which meet in the result.
    pub fn if_else(
        &self,
        cond: Val<'c>,
        yes: impl FnOnce() -> Vec<Val<'c>>,
        no: impl FnOnce() -> Vec<Val<'c>>,
    ) -> Vec<Val<'c>> {
        let (then, other, after) = (self.block("then"), self.block("else"), self.block("joined"));
        ok(self.builder.build_conditional_branch(cond.into_int_value(), then, other));
        self.builder.position_at_end(then);
        let a = yes();
        let from_a = self.here();
        ok(self.builder.build_unconditional_branch(after));
        self.builder.position_at_end(other);
        let b = no();
        let from_b = self.here();
        ok(self.builder.build_unconditional_branch(after));
        self.builder.position_at_end(after);
        assert_eq!(a.len(), b.len(), "both branches give the same values");
        a.iter()
            .zip(&b)
            .map(|(a, b)| {
                let phi = ok(self.builder.build_phi(a.get_type(), ""));
                phi.add_incoming(&[(a, from_a), (b, from_b)]);
                phi.as_basic_value()
            })
            .collect()
    }

    /// Runs `body` when `cond` holds.
    pub fn when(&self, cond: Val<'c>, body: impl FnOnce()) {
        self.if_else(
            cond,
            || {
                body();
                vec![]
            },
            Vec::new,
        );
    }
}
