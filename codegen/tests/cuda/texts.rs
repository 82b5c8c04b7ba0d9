//! The texts of kernels, one of each template.

use crate::{attention, groups, products};
use quantc_codegen::cpu::cache::{CacheAppendSpec, CacheTy, Role};
use quantc_codegen::cpu::gather::GatherSpec;
use quantc_codegen::cpu::rope::RopeStyle;
use quantc_codegen::cpu::row::RowSpec;
use quantc_codegen::cuda::attention::decode::{self, DecodeTile};
use quantc_codegen::cuda::attention::prefill::{self, PrefillTile};
use quantc_codegen::cuda::cache::{AppendSpec, Rotation, build_append};
use quantc_codegen::cuda::gather;
use quantc_codegen::cuda::group::{self, GroupTile};
use quantc_codegen::cuda::mixed::{self, MixedTile};
use quantc_codegen::cuda::row::{self, RowTile};
use quantc_codegen::cuda::sample::{self, SampleSpec};
use quantc_codegen::cuda::skinny::{self, SkinnyTile};
use quantc_codegen::cuda::text::emit;
use quantc_codegen::cuda::tiles::rows as tile_rows;
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

#[test]
fn the_text_of_rows_into_a_cache() {
    let rows = CacheAppendSpec {
        heads: 2,
        head_dim: 64,
        x_stride: 128,
        ty: CacheTy::I8,
        role: Role::Keys,
        fixed_scales: false,
        slot_rows: 64,
    };
    let rotation = Some(Rotation { rotary_dim: 64, style: RopeStyle::Half });
    insta::assert_snapshot!(emit(
        &build_append("append", &AppendSpec { rows, rotation, paged: true }).unwrap()
    ));
}

#[test]
fn the_text_of_rows_of_a_table() {
    let spec = GatherSpec { width: 256, table_rows: 1000, ty: MemTy::Bf16, add: false };
    insta::assert_snapshot!(emit(&gather::build("gather", &spec).unwrap()));
}

#[test]
fn the_text_of_choosing_tokens() {
    insta::assert_snapshot!(emit(
        &sample::build("sample", &SampleSpec { vocab: 1000, stride: 1000 }).unwrap()
    ));
}

#[test]
fn the_text_of_attention_of_single_tokens() {
    let call = attention::call(2, 1, 16, CacheTy::I8, true);
    let tile = DecodeTile { unit: 64, warps: 2, stages: 2, splits: 2 };
    insta::assert_snapshot!(emit(&decode::build("decode", &call, tile).unwrap()));
}

#[test]
fn the_text_of_attention_of_many_tokens() {
    let call = attention::call(2, 1, 16, CacheTy::Bf16, false);
    let tile = PrefillTile { unit: 32, warps: 2, stages: 2 };
    insta::assert_snapshot!(emit(&prefill::build("prefill", &call, tile).unwrap()));
}

#[test]
fn the_text_of_a_product_of_a_group_of_warps() {
    let spec = groups::spec(64, 256, groups::FORMATS[4], false);
    let tile = GroupTile { groups: 2, columns: 64, stages: 2, apart: true };
    insta::assert_snapshot!(emit(&group::build("group", &spec, tile).unwrap()));
}

#[test]
fn the_text_of_a_product_of_codes_in_registers() {
    let w = WFmt { code: Code::U4, group: 128, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    let spec = products::spec(64, 256, w, AFmt::Bf16, false);
    let tile = MixedTile { groups: 1, tokens: 64, stages: 2 };
    insta::assert_snapshot!(emit(&mixed::build("mixed", &spec, tile).unwrap()));
}

#[test]
fn the_text_of_rows_into_tiles() {
    let w = WFmt { code: Code::U4, group: 128, zero: Zero::Sym(8), scale: ScaleTy::Bf16 };
    let spec = products::spec(64, 256, w, AFmt::I8Token, false);
    let tiles = MixedTile::tokens_spec(&spec).unwrap();
    insta::assert_snapshot!(emit(&tile_rows::build("tiles", &tiles).unwrap()));
}
