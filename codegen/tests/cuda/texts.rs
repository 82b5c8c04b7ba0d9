//! The texts of kernels, one of each template.

use crate::products;
use quantc_codegen::cpu::row::RowSpec;
use quantc_codegen::cuda::row::{self, RowTile};
use quantc_codegen::cuda::skinny::{self, SkinnyTile};
use quantc_codegen::cuda::text::emit;
use quantc_codegen::cuda::wide::{self, WideTile};
use quantc_codegen::eexpr::MemTy;
use quantc_codegen::spec::{AFmt, Code, ScaleTy, WFmt, Zero};

#[test]
fn the_text_of_a_norm() {
    let spec = RowSpec::rms_norm(256, 1e-5, MemTy::Bf16, MemTy::Bf16, MemTy::Bf16);
    insta::assert_snapshot!(emit(&row::build("rms_norm", &spec, RowTile::of(&spec)).unwrap()));
}

#[test]
fn the_text_of_a_product_of_four_bit_weights() {
    let w = WFmt { code: Code::U4, group: 128, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    let spec = products::spec(256, 1024, w, AFmt::Bf16, false);
    let tile = SkinnyTile { rows: 1, tokens: 1, warps: 2, stages: 2 };
    insta::assert_snapshot!(emit(&skinny::build("skinny", &spec, tile).unwrap()));
}

#[test]
fn the_text_of_a_product_of_bytes() {
    let w = WFmt { code: Code::U8, group: 512, zero: Zero::Sym(128), scale: ScaleTy::F32 };
    let spec = products::spec(256, 512, w, AFmt::I8Token, false);
    let tile = WideTile { rows: 1, tokens: 1, warps: [2, 1], stages: 2 };
    insta::assert_snapshot!(emit(&wide::build("wide", &spec, tile).unwrap()));
}
