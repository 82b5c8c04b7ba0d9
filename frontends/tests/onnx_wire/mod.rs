//! A writer of ONNX files for tests, field by field, so that files can say whatever a test wants.
#![allow(dead_code, reason = "each test file uses a part of this")]

/// A message under construction.
#[derive(Clone, Debug, Default)]
pub struct Msg(pub Vec<u8>);

/// A number as a varint.
pub fn varint(mut n: u64, out: &mut Vec<u8>) {
    while n >= 128 {
        out.push(n as u8 | 128);
        n >>= 7;
    }
    out.push(n as u8);
}

impl Msg {
    /// An integer field.
    pub fn int(mut self, tag: u64, value: i64) -> Msg {
        varint(tag << 3, &mut self.0);
        varint(value as u64, &mut self.0);
        self
    }
    /// Integer fields of one number.
    pub fn ints(self, tag: u64, values: &[i64]) -> Msg {
        values.iter().fold(self, |m, &v| m.int(tag, v))
    }
    /// A field of bytes.
    pub fn bytes(mut self, tag: u64, value: &[u8]) -> Msg {
        varint(tag << 3 | 2, &mut self.0);
        varint(value.len() as u64, &mut self.0);
        self.0.extend_from_slice(value);
        self
    }
    /// A text field.
    pub fn text(self, tag: u64, value: &str) -> Msg {
        self.bytes(tag, value.as_bytes())
    }
    /// Text fields of one number.
    pub fn texts(self, tag: u64, values: &[&str]) -> Msg {
        values.iter().fold(self, |m, v| m.text(tag, v))
    }
    /// A field that is a message.
    pub fn msg(self, tag: u64, value: Msg) -> Msg {
        self.bytes(tag, &value.0)
    }
    /// Fields of one number that are messages.
    pub fn msgs(self, tag: u64, values: &[Msg]) -> Msg {
        values.iter().fold(self, |m, v| m.msg(tag, v.clone()))
    }
    /// A float field.
    pub fn float(mut self, tag: u64, value: f32) -> Msg {
        varint(tag << 3 | 5, &mut self.0);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
}

/// The number of an element type.
pub const FLOAT: i64 = 1;
/// The number of an element type.
pub const UINT8: i64 = 2;
/// The number of an element type.
pub const INT64: i64 = 7;
/// The number of an element type.
pub const BOOL: i64 = 9;

/// An attribute: its name, the number of its type, and its value.
pub fn attr(name: &str, kind: i64, value: Msg) -> Msg {
    let mut m = Msg::default().text(1, name).int(20, kind);
    m.0.extend(value.0);
    m
}

/// An attribute that is an integer.
pub fn attr_int(name: &str, value: i64) -> Msg {
    attr(name, 2, Msg::default().int(3, value))
}

/// An attribute that is integers.
pub fn attr_ints(name: &str, values: &[i64]) -> Msg {
    attr(name, 7, Msg::default().ints(8, values))
}

/// An attribute that is a text.
pub fn attr_text(name: &str, value: &str) -> Msg {
    attr(name, 3, Msg::default().text(4, value))
}

/// An attribute that is a graph.
pub fn attr_graph(name: &str, graph: Msg) -> Msg {
    attr(name, 5, Msg::default().msg(6, graph))
}

/// A node; its name is the operator's with a number of the caller.
pub fn node(name: &str, op: &str, inputs: &[&str], outputs: &[&str], attrs: &[Msg]) -> Msg {
    Msg::default().texts(1, inputs).texts(2, outputs).text(3, name).text(4, op).msgs(5, attrs)
}

/// A tensor with raw data.
pub fn tensor(name: &str, kind: i64, dims: &[i64], raw: &[u8]) -> Msg {
    Msg::default().ints(1, dims).int(2, kind).text(8, name).bytes(9, raw)
}

/// A list of i64.
pub fn list(name: &str, values: &[i64]) -> Msg {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    tensor(name, INT64, &[values.len() as i64], &raw)
}

/// Floats.
pub fn floats(name: &str, dims: &[i64], values: &[f32]) -> Msg {
    let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    tensor(name, FLOAT, dims, &raw)
}

/// A tensor whose bytes lie in another file.
pub fn external(name: &str, dims: &[i64], entries: &[(&str, &str)]) -> Msg {
    let entry = |&(k, v): &(&str, &str)| Msg::default().text(1, k).text(2, v);
    let entries: Vec<Msg> = entries.iter().map(entry).collect();
    Msg::default().ints(1, dims).int(2, FLOAT).text(8, name).msgs(13, &entries).int(14, 1)
}

/// A named value: extents are numbers, or names when they are written so.
pub fn value(name: &str, kind: i64, dims: &[&str]) -> Msg {
    let dim = |d: &&str| match d.parse::<i64>() {
        Ok(n) => Msg::default().int(1, n),
        Err(_) => Msg::default().text(2, d),
    };
    let dims: Vec<Msg> = dims.iter().map(dim).collect();
    let ty = Msg::default().int(1, kind).msg(2, Msg::default().msgs(1, &dims));
    Msg::default().text(1, name).msg(2, Msg::default().msg(1, ty))
}

/// A graph.
pub fn graph(nodes: &[Msg], initializers: &[Msg], inputs: &[Msg], outputs: &[&str]) -> Msg {
    let outputs: Vec<Msg> = outputs.iter().map(|o| Msg::default().text(1, o)).collect();
    Msg::default().msgs(1, nodes).text(2, "g").msgs(5, initializers).msgs(11, inputs).msgs(12, &outputs)
}

/// The version of a domain's operators.
pub fn opset(domain: &str, version: i64) -> Msg {
    Msg::default().text(1, domain).int(2, version)
}

/// A function of the domain `f`.
pub fn function(name: &str, inputs: &[&str], outputs: &[&str], nodes: &[Msg]) -> Msg {
    let m = Msg::default().text(1, name).texts(4, inputs).texts(5, outputs).msgs(7, nodes);
    m.msg(9, opset("", 17)).msg(9, opset("f", 1)).text(10, "f")
}

/// A node that calls a function of the domain `f`.
pub fn call(name: &str, function: &str, inputs: &[&str], outputs: &[&str]) -> Msg {
    node(name, function, inputs, outputs, &[]).text(7, "f")
}

/// A model of version 17.
pub fn model(graph: Msg) -> Msg {
    Msg::default().int(1, 8).msg(8, opset("", 17)).msg(7, graph)
}
