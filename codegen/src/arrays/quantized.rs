//! Codes: from numbers and back.

use super::fold::{Folding, num_mem};
use super::value::{Body, Value};
use super::{Lowering, Place, dims_of, mem_of};
use crate::arrays::elementwise::{decode_at, decode_int};
use crate::lower::BlobSource;
use crate::nest::{Affine, Bin, Cmp, FoldKind, Mem, Node, NodeId, Num, Un};
use quantc_ir::diag::{Diag, Result};
use quantc_ir::entity::ValueId;
use quantc_ir::eval::{Tensor, eval_pure};
use quantc_ir::formats::{Class, Format};
use quantc_ir::graph::Graph;
use quantc_ir::ops::{Cast, Op};
use quantc_ir::scheme::{Scheme, Zero};
use quantc_ir::ty::{ElemTy, TensorTy};

impl Lowering<'_> {
    /// The numbers of a format's codes.
    pub(super) fn decode_table(&mut self, format: &'static Format) -> Place {
        let numbers = (0..256u32).map(|code| format.decode(code & format.mask()));
        let bytes: Vec<u8> = numbers.flat_map(|x| x.to_le_bytes()).collect();
        let len = bytes.len() as u64;
        self.blob(&format!("codes of {format}"), BlobSource::Made(bytes), len)
    }

    /// Codes of floats: how many of the numbers at which the next code begins are not above the magnitude.
    pub(super) fn encode(
        &mut self,
        x: &Value,
        format: &'static Format,
        saturate: bool,
        double: bool,
    ) -> Result<Value> {
        if !matches!(format.class, Class::Float { .. }) || double || x.mem() != Mem::F32 {
            return Err(Diag::target(format!("no kernel makes codes of `{format}` from these numbers")));
        }
        let codes = |numbers: Vec<f32>| self.codes_of(numbers, format, saturate);
        // Magnitudes are ordered as their bits are; the code of each is looked for from both sides.
        let infinite = codes(vec![f32::INFINITY])?[0];
        let (mut low, mut high) =
            (vec![0u32; infinite.into()], vec![f32::INFINITY.to_bits(); infinite.into()]);
        for _ in 0..32 {
            let middle: Vec<u32> = low.iter().zip(&high).map(|(l, h)| l + (h - l) / 2).collect();
            let found = codes(middle.iter().map(|&b| f32::from_bits(b)).collect())?;
            for (i, (&m, &code)) in middle.iter().zip(&found).enumerate() {
                if u32::from(code) > i as u32 { high[i] = m } else { low[i] = (m + 1).min(high[i]) }
            }
        }
        let nan = codes(vec![f32::NAN])?[0];
        let bytes: Vec<u8> = high.iter().flat_map(|b| b.to_le_bytes()).collect();
        let len = bytes.len() as u64;
        let place = self.blob(&format!("steps of {format}"), BlobSource::Made(bytes), len);
        let x = self.without_product(x)?;
        let x = if x.is_cheap() { x } else { Value::View(self.stored(&x)?) };
        let dims = x.dims().to_vec();
        let rank = dims.len() + 1;
        let mut body = Body::new(rank);
        let map: Vec<Affine> = (0..dims.len()).map(|a| Affine::axis(a, rank)).collect();
        let v = body.absorb(&x, &map);
        let input = body.input(place);
        let step =
            body.push(Node::Load { input, mem: Mem::F32, at: Affine::axis(rank - 1, rank), guards: vec![] });
        let size = body.un(Un::Abs, v);
        let reached = body.cmp(Cmp::LessEqual, step, size);
        let of = body.convert(Num::I32, reached);
        let layout = x.layout();
        let over = [u64::from(infinite)];
        let folding = Folding {
            name: "encode",
            dims: &dims,
            layout: &layout,
            over: &over,
            kind: FoldKind::Sum,
            mem: Mem::U8,
        };
        let sign = i64::from((format.mask() >> 1) + 1);
        let view = self.folded(&folding, body, of, |b, code| {
            let (nan, zero) = (b.int(Num::I32, i64::from(nan)), b.int(Num::I32, 0));
            let number = b.cmp(Cmp::Equal, v, v);
            let code = b.select(number, code, nan);
            let key = b.un(Un::Key, v);
            let below = b.cmp(Cmp::Less, key, zero);
            let sign = b.int(Num::I32, sign);
            let sign = b.select(below, sign, zero);
            b.bin(Bin::Or, code, sign)
        })?;
        Ok(Value::View(view))
    }

    /// What the evaluator makes of numbers.
    fn codes_of(&self, numbers: Vec<f32>, format: &'static Format, saturate: bool) -> Result<Vec<u8>> {
        let x = Tensor::f32(&[numbers.len() as u64], numbers)?;
        let mut g = Graph::new();
        let param = g.add_param("x", x.ty.clone());
        let to = ElemTy::bare(format);
        let y = g.push(Op::Cast(Cast { to, saturate }), vec![param], x.ty.with_elem(to), None);
        g.results.push(y);
        let codes = eval_pure(&g, &[&x], 1, self.module, self.store)?;
        codes.first().ok_or_else(|| Diag::bug("a graph without result"))?.code_bytes().map(<[u8]>::to_vec)
    }

    /// The node of a group's scale or zero point, at the index of an element: groups along axes are looked up.
    fn of_group(
        &mut self,
        body: &mut Body,
        scheme: Scheme,
        v: &Value,
        dims: &[u64],
        axes: &[Affine],
    ) -> Result<NodeId> {
        let blocks = scheme.blocks(dims.len())?;
        let v = self.without_product(v)?;
        let blocked = |a: usize| blocks[a].is_some_and(|b| b > 1 && b < dims[a]);
        if !(0..dims.len()).any(blocked) {
            let map: Vec<Affine> = (0..dims.len())
                .map(|a| match blocks[a] {
                    Some(1) => axes[a].clone(),
                    _ => Affine::constant(0, body.rank),
                })
                .collect();
            return Ok(body.absorb(&v, &map));
        }
        let view = self.stored(&v)?;
        let mut base = Affine::constant(view.at.base, body.rank);
        let mut parts = vec![];
        for a in 0..dims.len() {
            let stride = view.at.strides[a];
            match blocks[a] {
                Some(1) => base = base.plus(&axes[a].scaled(stride, 0)),
                Some(b) if b < dims[a] => {
                    let at = body.pos(axes[a].clone());
                    let block = body.int(Num::I64, b as i64);
                    parts.push((body.bin(Bin::Div, at, block), stride));
                }
                _ => {}
            }
        }
        let at = body.address(base, &parts);
        let input = body.input(view.place);
        Ok(body.push(Node::LoadAt { input, mem: view.mem, at }))
    }

    /// The number of a code, without its scale.
    fn number_of(&mut self, body: &mut Body, format: &'static Format, code: NodeId) -> NodeId {
        if format.is_int() {
            return decode_int(body, format, code);
        }
        let table = self.decode_table(format);
        decode_at(body, table, code)
    }

    pub(super) fn dequantize(&mut self, g: &Graph, args: &[ValueId], out: &TensorTy) -> Result<Value> {
        let scheme = g.ty(args[0]).elem.scheme().ok_or_else(|| Diag::bug("codes without a scheme"))?;
        let (q, scale) = (self.value(g, args[0])?, self.value(g, args[1])?);
        let zero = self.optional(g, args, 2)?;
        let q = self.without_product(&q)?;
        let (dims, mem) = (dims_of(out)?, mem_of(out.elem)?);
        let mut body = Body::new(dims.len());
        let axes = super::value::identity(dims.len());
        let code = body.absorb(&q, &axes);
        let mut number = self.number_of(&mut body, scheme.format, code);
        if let (Some(zero), Zero::Point(format)) = (&zero, scheme.zero) {
            let zero = self.of_group(&mut body, scheme, zero, &dims, &axes)?;
            let zero = self.number_of(&mut body, format, zero);
            number = body.bin(Bin::Sub, number, zero);
        }
        let number = body.convert(Num::F32, number);
        let scale = self.of_group(&mut body, scheme, &scale, &dims, &axes)?;
        let y = body.bin(Bin::Mul, number, scale);
        let y = body.fit(mem, y);
        self.lazy(mem, &dims, body, y)
    }

    pub(super) fn quantize(
        &mut self,
        g: &Graph,
        args: &[ValueId],
        to: Scheme,
        out: &TensorTy,
    ) -> Result<Value> {
        let (x, scale) = (self.value(g, args[0])?, self.value(g, args[1])?);
        let zero = self.optional(g, args, 2)?;
        let (dims, mem) = (dims_of(out)?, mem_of(out.elem)?);
        let format = to.format;
        let rank = dims.len();
        if !format.is_int() {
            let scale = self.without_product(&scale)?;
            let x = self.without_product(&x)?;
            let axes = super::value::identity(rank);
            let mut body = Body::new(rank);
            let v = body.absorb(&x, &axes);
            let s = self.of_group(&mut body, to, &scale, &dims, &axes)?;
            let ratio = body.bin(Bin::Div, v, s);
            let ratio = self.lazy(Mem::F32, &dims, body, ratio)?;
            return self.encode(&ratio, format, true, false);
        }
        if let Some(codes) = self.requantized(g, args, &x, to, &dims, mem)? {
            return Ok(codes);
        }
        // The expression goes on from the value's own, so that products take the rounding with them.
        let product = x.product();
        let mut body = Body::new(rank);
        let axes = super::value::identity(rank);
        let v = body.absorb(&x, &axes);
        let s = self.of_group(&mut body, to, &scale, &dims, &axes)?;
        let ratio = body.bin(Bin::Div, v, s);
        let (low, high) = format.int_range();
        let (mut low, mut high) = (body.real(Num::F32, low.into()), body.real(Num::F32, high.into()));
        let mut offset = None;
        if let (Some(zero), Zero::Point(format)) = (&zero, to.zero) {
            let z = self.of_group(&mut body, to, zero, &dims, &axes)?;
            let z = self.number_of(&mut body, format, z);
            let zf = body.convert(Num::F32, z);
            (low, high) = (body.bin(Bin::Sub, low, zf), body.bin(Bin::Sub, high, zf));
            offset = Some(z);
        }
        // NaN becomes the zero point. The ends are whole numbers, so that rounding may come last.
        let number = body.cmp(Cmp::Equal, ratio, ratio);
        let nothing = body.real(Num::F32, 0.0);
        let ratio = body.select(number, ratio, nothing);
        let ratio = body.bin(Bin::Max, low, ratio);
        let ratio = body.bin(Bin::Min, high, ratio);
        let mut code = body.push(Node::Nearest(ratio));
        if let Some(z) = offset {
            code = body.bin(Bin::Add, code, z);
        }
        if mem == Mem::U8 {
            let mask = body.int(Num::I32, i64::from(format.mask()));
            code = body.bin(Bin::And, code, mask);
        }
        let code = body.fit(mem, code);
        self.lazy_after(mem, &dims, body, code, product)
    }

    pub(super) fn dynamic_scale(
        &mut self,
        g: &Graph,
        x: ValueId,
        to: Scheme,
        out: &TensorTy,
    ) -> Result<Value> {
        Err(Diag::target(format!(
            "`dynamic_scale` to `{to}` has no kernel for graphs over arrays: operand {} makes {out}",
            g.ty(x)
        ))
        .help("use scales from calibration"))
    }

    pub(super) fn bitcast(&mut self, g: &Graph, q: ValueId) -> Result<Value> {
        let scheme = g.ty(q).elem.scheme().ok_or_else(|| Diag::bug("codes without a scheme"))?;
        let value = self.value(g, q)?;
        let dims = value.dims().to_vec();
        let mask = i64::from(scheme.format.mask());
        self.elementwise(&dims, num_mem(Num::I32), &[value], |b, x| {
            let mask = b.int(Num::I32, mask);
            b.bin(Bin::And, x[0], mask)
        })
    }
}
