//! Constants of a file: where their bytes lie, and what they are.

use super::proto::{StringStringEntryProto, TensorProto};
use crate::json::shown;
use prost::bytes::Bytes;
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::{ShardId, ValueId};
use quantc_ir::eval::Tensor;
use quantc_ir::formats;
use quantc_ir::module::Module;
use quantc_ir::ty::{ElemTy, Int, TensorTy};
use quantc_ir::weights::{Shard, Store};
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

/// Elements of a constant that is read while importing: more are left in the file.
pub(crate) const MOST_READ: u64 = 1 << 24;

/// The most axes of a tensor.
const MOST_AXES: usize = quantc_ir::text::MAX_RANK;

/// Element types by their numbers in the standard.
const ELEMS: &[(i32, &str, ElemTy)] = &[
    (1, "float", ElemTy::F32),
    (2, "uint8", ElemTy::Int(Int::U8)),
    (3, "int8", ElemTy::Int(Int::I8)),
    (4, "uint16", ElemTy::Int(Int::U16)),
    (5, "int16", ElemTy::Int(Int::I16)),
    (6, "int32", ElemTy::I32),
    (7, "int64", ElemTy::I64),
    (9, "bool", ElemTy::BOOL),
    (10, "float16", ElemTy::F16),
    (11, "double", ElemTy::F64),
    (12, "uint32", ElemTy::Int(Int::U32)),
    (13, "uint64", ElemTy::Int(Int::U64)),
    (16, "bfloat16", ElemTy::Bf16),
];

/// Number formats that are element types, by their numbers in the standard.
const FORMATS: &[(i32, &formats::Format)] = &[
    (17, &formats::E4M3),
    (19, &formats::E5M2),
    (21, &formats::UINT4),
    (22, &formats::INT4),
    (23, &formats::E2M1),
    (24, &formats::E8M0),
    (26, &formats::INT2),
];

/// Names of element types that are known but not supported.
const OTHERS: &[(i32, &str)] = &[
    (8, "string"),
    (14, "complex64"),
    (15, "complex128"),
    (18, "float8e4m3fnuz"),
    (20, "float8e5m2fnuz"),
    (25, "uint2"),
    (27, "float6e2m3"),
    (28, "float6e3m2"),
];

/// The element type that the standard numbers so.
pub(crate) fn elem(number: i64) -> Result<ElemTy> {
    let is = |n: i32| i64::from(n) == number;
    if let Some(&(_, _, elem)) = ELEMS.iter().find(|e| is(e.0)) {
        return Ok(elem);
    }
    if let Some(&(_, format)) = FORMATS.iter().find(|f| is(f.0)) {
        return Ok(ElemTy::bare(format));
    }
    match OTHERS.iter().find(|o| is(o.0)) {
        Some((_, name)) => Err(Diag::input(format!("elements of type {name} are not supported"))),
        None => Err(Diag::input(format!("there is no element type {number}"))),
    }
}

/// A constant: read when it is asked for.
pub(crate) struct Const {
    /// Its type.
    pub(crate) ty: TensorTy,
    /// Its name in the file, when it has one.
    pub(crate) name: Option<String>,
    /// The stored bytes, when they lie in a file as the module wants them.
    pub(crate) raw: Option<Raw>,
    read: OnceCell<Rc<Tensor>>,
    /// The value that stands for it in the graph, once one is needed.
    pub(crate) value: OnceCell<ValueId>,
}

/// Bytes in a file.
pub(crate) struct Raw {
    pub(crate) shard: ShardId,
    pub(crate) at: u64,
    pub(crate) bytes: Bytes,
}

impl Const {
    /// A constant that was computed.
    pub(crate) fn new(tensor: Tensor) -> Const {
        let (ty, read) = (tensor.ty.clone(), OnceCell::from(Rc::new(tensor)));
        Const { ty, name: None, raw: None, read, value: OnceCell::new() }
    }

    /// The same stored bytes as elements of another type with as many bits.
    pub(crate) fn retyped(&self, elem: ElemTy) -> Result<Const> {
        self.as_stored(self.ty.with_elem(elem))
    }

    /// The same stored bytes as another type.
    pub(crate) fn as_stored(&self, ty: TensorTy) -> Result<Const> {
        let bytes = self.ty.stored_bytes();
        if ty.stored_bytes() != bytes {
            return Err(Diag::input(format!("{} does not have the bytes of {ty}", self.ty)));
        }
        let name = self.name.clone();
        if let Some(raw) = &self.raw {
            let raw = Raw { shard: raw.shard, at: raw.at, bytes: raw.bytes.clone() };
            return Ok(Const { ty, name, raw: Some(raw), read: OnceCell::new(), value: OnceCell::new() });
        }
        let tensor = Tensor::from_stored(&ty, &self.tensor()?.to_stored())?;
        Ok(Const { name, ..Const::new(tensor) })
    }

    /// The elements.
    pub(crate) fn tensor(&self) -> Result<Rc<Tensor>> {
        if let Some(read) = self.read.get() {
            return Ok(Rc::clone(read));
        }
        let raw = self.raw.as_ref().ok_or_else(|| Diag::bug("a constant without bytes"))?;
        let read = Rc::new(Tensor::from_stored(&self.ty, &raw.bytes)?);
        Ok(Rc::clone(self.read.get_or_init(|| read)))
    }
}

/// Where tensors of a model lie.
pub(crate) struct Files<'a> {
    /// The folder of the model.
    dir: PathBuf,
    /// The bytes of the model's own file.
    own: Bytes,
    /// Files of external data, by the name in the model.
    external: BTreeMap<String, (ShardId, Bytes)>,
    store: &'a Store,
}

impl<'a> Files<'a> {
    /// The files of the model at `path`, whose own bytes are `own` and shard 0.
    pub(crate) fn new(path: &Path, own: Bytes, store: &'a Store) -> Files<'a> {
        let dir = path.parent().map(Path::to_path_buf).unwrap_or_default();
        Files { dir, own, external: BTreeMap::new(), store }
    }

    /// Bytes of the model's own file.
    pub(crate) fn size(&self) -> u64 {
        self.own.len() as u64
    }

    /// The constant that a message describes.
    pub(crate) fn constant(&mut self, t: &TensorProto, module: &mut Module) -> Result<Const> {
        let name = t.name.clone().filter(|n| !n.is_empty());
        self.constant_inner(t, name.clone(), module).map_err(|e| match name {
            Some(name) => e.context(format!("reading tensor `{}`", shown(&name))),
            None => e.context("reading a tensor"),
        })
    }

    fn constant_inner(
        &mut self,
        t: &TensorProto,
        name: Option<String>,
        module: &mut Module,
    ) -> Result<Const> {
        if t.segment.is_some() {
            return Err(Diag::input("`segment` is set: tensors in several parts are not supported"));
        }
        let elem = elem(t.data_type.unwrap_or(0).into()).map_err(|e| e.context("reading `data_type`"))?;
        let ty = TensorTy::fixed(elem, &extents(&t.dims)?);
        let stored = ty.stored_bytes().zip(ty.shape.elements());
        let (stored, count) = stored.ok_or_else(|| Diag::input(format!("`dims`: {ty} is too large")))?;
        let (raw, location) = match (&t.raw_data, t.data_location) {
            (_, Some(1)) => (Some(self.external(&t.external_data, module)?), "external_data"),
            (Some(raw), None | Some(0)) => {
                // Slices of the file itself, so that the difference is where they lie.
                let at = (raw.as_ptr() as u64).wrapping_sub(self.own.as_ptr() as u64);
                (Some(Raw { shard: shard(0), at, bytes: raw.clone() }), "raw_data")
            }
            (None, None | Some(0)) => (None, ""),
            (_, Some(n)) => return Err(Diag::input(format!("`data_location` is {n}, which is no location"))),
        };
        let Some(raw) = raw else {
            let tensor = typed(t, &ty, count)?;
            return Ok(Const { name, ..Const::new(tensor) });
        };
        // Elements of less than a byte are packed without regard to rows.
        let packed = (count as u128 * u128::from(elem.bits())).div_ceil(8);
        if raw.bytes.len() as u128 != packed {
            let n = raw.bytes.len();
            return Err(Diag::input(format!("`{location}` has {n} bytes, but {ty} takes {packed}")));
        }
        if u128::from(stored) != packed {
            let codes = unpack(&raw.bytes, elem, count);
            return Ok(Const { name, ..Const::new(Tensor::codes(&ty, codes)?) });
        }
        Ok(Const { ty, name, raw: Some(raw), read: OnceCell::new(), value: OnceCell::new() })
    }

    /// The bytes that `external_data` names.
    fn external(&mut self, entries: &[StringStringEntryProto], module: &mut Module) -> Result<Raw> {
        let (mut location, mut offset, mut length) = (None, 0u64, None);
        for entry in entries {
            let value = entry.value.as_deref().unwrap_or_default();
            let number = |key: &str| {
                let bad = || Diag::input(format!("`external_data.{key}` is `{}`, no number", shown(value)));
                value.parse::<u64>().map_err(|_| bad())
            };
            match entry.key.as_deref().unwrap_or_default() {
                "location" => location = Some(value),
                "offset" => offset = number("offset")?,
                "length" => length = Some(number("length")?),
                // Digests and what later versions add do not change where the bytes are.
                _ => {}
            }
        }
        let location = location.ok_or_else(|| Diag::input("`external_data.location` is missing"))?;
        let (shard, bytes) = self.open(location, module)?;
        let size = bytes.len() as u64;
        let length = length.unwrap_or(size.saturating_sub(offset));
        let end = offset.checked_add(length).filter(|&end| end <= size);
        let end = end.ok_or_else(|| {
            let file = shown(location);
            Diag::input(format!(
                "`external_data`: bytes {offset}..+{length} lie outside of `{file}` of {size} bytes"
            ))
        })?;
        Ok(Raw { shard, at: offset, bytes: bytes.slice(offset as usize..end as usize) })
    }

    /// Maps a file of external data, which must lie in the folder of the model.
    fn open(&mut self, location: &str, module: &mut Module) -> Result<(ShardId, Bytes)> {
        if let Some((shard, bytes)) = self.external.get(location) {
            return Ok((*shard, bytes.clone()));
        }
        let about =
            |text: &str| Diag::input(format!("`external_data.location` is `{}`: {text}", shown(location)));
        let plain = Path::new(location).components().all(|c| matches!(c, Component::Normal(_)));
        if location.is_empty() || !plain || location.contains(['\\', '\0']) {
            return Err(about("it must be a path inside of the model's folder, without `..`"));
        }
        let base = if self.dir.as_os_str().is_empty() { Path::new(".") } else { &self.dir };
        let path = base.join(location);
        let real = |p: &Path| p.canonicalize().map_err(|e| about(&format!("it cannot be opened: {e}")));
        // Links are followed before anything is opened.
        if !real(&path)?.starts_with(real(base)?) {
            return Err(about("it leads out of the model's folder"));
        }
        let id = module.shards.push(Shard { file: location.into() });
        self.store.add_shard(id, &path)?;
        let bytes = self.store.shard(id).map(Bytes::from_owner);
        let bytes = bytes.ok_or_else(|| Diag::bug("a shard is missing after it was added"))?;
        self.external.insert(location.into(), (id, bytes.clone()));
        Ok((id, bytes))
    }
}

/// Extents of a constant.
pub(crate) fn extents(dims: &[i64]) -> Result<Vec<u64>> {
    if dims.len() > MOST_AXES {
        return Err(Diag::input(format!("`dims` has {} axes, more than {MOST_AXES}", dims.len())));
    }
    let one = |&d: &i64| u64::try_from(d).map_err(|_| Diag::input(format!("`dims` has the extent {d}")));
    dims.iter().map(one).collect()
}

fn shard(index: usize) -> ShardId {
    quantc_ir::entity::Entity::new(index)
}

/// One code a byte, of codes packed from the least significant bits on.
fn unpack(bytes: &[u8], elem: ElemTy, count: u64) -> Vec<u8> {
    let (bits, per) = (elem.bits() as usize, 8 / elem.bits() as usize);
    let mask = ((1u16 << bits) - 1) as u8;
    (0..count as usize).map(|i| bytes[i / per] >> (i % per * bits) & mask).collect()
}

/// The tensor whose elements are in the field for its type.
fn typed(t: &TensorProto, ty: &TensorTy, count: u64) -> Result<Tensor> {
    let check = |field: &str, got: usize, want: u64| {
        if got as u64 == want {
            return Ok(());
        }
        Err(Diag::input(format!("`{field}` has {got} numbers, but {ty} takes {want}")))
    };
    let ints = || t.int32_data.iter().map(|&x| i128::from(x));
    match ty.elem {
        ElemTy::F32 => {
            check("float_data", t.float_data.len(), count)?;
            Tensor::float(ty, t.float_data.clone())
        }
        ElemTy::F64 => {
            check("double_data", t.double_data.len(), count)?;
            Tensor::from_reals(ty, t.double_data.clone())
        }
        ElemTy::Int(Int::I64) => {
            check("int64_data", t.int64_data.len(), count)?;
            Tensor::from_ints(ty, t.int64_data.iter().map(|&x| x.into()))
        }
        ElemTy::Int(Int::U32 | Int::U64) => {
            check("uint64_data", t.uint64_data.len(), count)?;
            Tensor::from_ints(ty, t.uint64_data.iter().map(|&x| x.into()))
        }
        ElemTy::Int(_) => {
            check("int32_data", t.int32_data.len(), count)?;
            Tensor::from_ints(ty, ints())
        }
        ElemTy::F16 | ElemTy::Bf16 => {
            check("int32_data", t.int32_data.len(), count)?;
            let bytes: Vec<u8> = t.int32_data.iter().flat_map(|&x| (x as u16).to_le_bytes()).collect();
            Tensor::from_stored(ty, &bytes)
        }
        ElemTy::Q(_) => {
            let per = u64::from(8 / ty.elem.bits());
            check("int32_data", t.int32_data.len(), count.div_ceil(per))?;
            let bytes: Vec<u8> = t.int32_data.iter().map(|&x| x as u8).collect();
            let codes = if per == 1 { bytes } else { unpack(&bytes, ty.elem, count) };
            Tensor::codes(ty, codes)
        }
    }
}
