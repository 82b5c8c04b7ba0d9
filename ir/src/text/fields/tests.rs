//! What is read, what is refused and where, and that everything reads back.

use super::*;
use crate::diag::Loc;
use crate::ops::{Op, OpKind, Real, RopeScaling, RopeTable};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Options {
    alpha: f32,
    wide: f64,
    count: u8,
    signed: i64,
    on: bool,
    name: String,
    names: Vec<String>,
    maybe: Option<String>,
    scaling: RopeScaling,
    shape: Shape,
    pairs: Vec<(u32, f64)>,
    by_name: std::collections::BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Shape {
    #[default]
    Point,
    Round(f64),
    Box(u32, u32),
    Named {
        label: String,
    },
    Inner(Inner),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Inner {
    depth: Option<u32>,
}

fn read(text: &str) -> Result<Options> {
    from_fields(&Fields::parse(text)?)
}

fn refusal(text: &str) -> (String, Loc) {
    let e = read(text).unwrap_err();
    (e.message, e.loc)
}

#[test]
fn values_of_every_kind() {
    let o = read("{alpha=1, wide=-1e-3, on, name=@l0, maybe=none, scaling=llama3{factor=8, low=1.0, high=4.0, original=8192}, shape=box[3, 4], names=[a-b.c, \"x y\", !q<int8:f32 token>, 7]}").unwrap();
    assert_eq!((o.alpha, o.wide, o.on, o.name.as_str(), o.maybe), (1.0, -1e-3, true, "l0", None));
    let factor = Real(8.0);
    assert_eq!(o.scaling, RopeScaling::Llama3 { factor, low: Real(1.0), high: Real(4.0), original: 8192 });
    assert_eq!(o.shape, Shape::Box(3, 4));
    assert_eq!(o.names, ["a-b.c", "x y", "!q<int8:f32 token>", "7"]);
}

#[test]
fn errors_point_at_the_token() {
    let at = |col| Loc::Text { line: 1, col };
    let (message, loc) = refusal("{alhpa=0.5}");
    assert!(message.starts_with("unknown field `alhpa`, expected one of `alpha`, `wide`"), "{message}");
    assert_eq!(loc, at(2));
    assert_eq!(read("{alhpa=0.5}").unwrap_err().help.unwrap(), "did you mean `alpha`?");
    assert_eq!(refusal("{alpha=\"x\"}"), ("field `alpha`: expected a number, got `x`".into(), at(8)));
    assert_eq!(
        refusal("{count=256}"),
        ("field `count`: expected a whole number of type u8, got `256`".into(), at(8))
    );
    assert_eq!(
        refusal("{scaling=lama3{factor=8.0}}"),
        ("field `scaling`: unknown word `lama3`, expected one of `none`, `linear`, `llama3`".into(), at(10))
    );
    assert_eq!(
        refusal("{scaling=linear{factr=8.0}}"),
        ("unknown field `factr`, expected `factor`".into(), at(17))
    );
    assert_eq!(refusal("{scaling=linear{}}").0, "the field `factor` is missing");
    assert_eq!(refusal("{names=[a, 1.5]}"), ("field `names`: expected a string, got `1.5`".into(), at(12)));
    assert_eq!(
        refusal("{alpha=1,\n alpha=2}"),
        ("the field `alpha` is given twice".into(), Loc::Text { line: 2, col: 2 })
    );
    assert_eq!(refusal("{alpha=1e999}").1, at(8));
    assert_eq!(refusal("{on").0, "expected `,` or `}`, got the end of the text");
    assert_eq!(refusal("{on} x").0, "unexpected `x` after the fields");
    assert!(Fields::parse(&format!("{{a={}", "[".repeat(100_000))).is_err());
}

#[test]
fn only_what_differs_is_written() {
    let table =
        RopeTable { size: 4, scaling: RopeScaling::Linear { factor: Real(2.0) }, ..RopeTable::default() };
    let text = to_fields_without_defaults(&table, &RopeTable::default()).to_string();
    assert_eq!(text, "{size=4, scaling=linear{factor=2.0}}");
    assert_eq!(from_fields::<RopeTable>(&Fields::parse(&text).unwrap()).unwrap(), table);
}

#[test]
fn defaults_of_every_op_read_back() {
    for &kind in OpKind::ALL {
        let op = Op::default_of(kind);
        let fields = collect(op.write(Writer));
        let again = Fields::parse(&fields.to_string()).unwrap();
        assert_eq!(again, fields);
        assert_eq!(kind.read(Reader::of(&again)).unwrap(), op, "{fields}");
    }
}

#[test]
fn prefixes_are_read_in_place() {
    let text = "gptq{bits=4},x";
    let at = Pos { byte: 4, line: 1, col: 5 };
    let (fields, end) = Fields::parse_at(text, at).unwrap();
    assert_eq!((fields.to_string().as_str(), end.byte), ("{bits=4}", 12));
    assert_eq!(fields.entries[0].item.pos.col, 11);
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z*?][a-z0-9.*?-]{0,6}",
        any::<String>(),
        "(none|true|inf|1e5|!q<int8:f32 token>|-?[0-9]{1,3})"
    ]
}

fn value() -> impl Strategy<Value = super::Value> {
    use super::Value;
    let word =
        "[a-z_][a-z0-9_]{0,5}".prop_filter("not a literal", |w| matches!(word_value(w), Value::Word(_)));
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<i128>().prop_map(Value::Int),
        any::<f64>().prop_filter("nan is not equal", |x| !x.is_nan()).prop_map(Value::Float),
        word.prop_map(Value::Word),
        any::<String>().prop_map(Value::Str),
        any::<String>().prop_map(Value::Name),
        Just(Value::Scheme("!q<int4:f16 block 128@1>".into())),
    ];
    leaf.prop_recursive(4, 24, 5, |inner| {
        let list =
            prop::collection::vec(inner.clone().prop_map(Item::from), 0..5).prop_map(Value::List).boxed();
        let map = prop::collection::btree_map(text(), inner, 0..5).prop_map(|entries| {
            let mut fields = Fields::default();
            entries.into_iter().for_each(|(k, v)| fields.push(k, v));
            Value::Map(fields)
        });
        let map = map.boxed();
        let held = prop_oneof![list.clone(), map.clone()];
        let variant = ("[a-z]{1,4}", held).prop_map(|(n, v)| Value::Variant(n, Box::new(v)));
        prop_oneof![list, map, variant]
    })
}

fn shape() -> impl Strategy<Value = Shape> {
    prop_oneof![
        Just(Shape::Point),
        any::<f64>().prop_map(Shape::Round),
        any::<(u32, u32)>().prop_map(|(a, b)| Shape::Box(a, b)),
        text().prop_map(|label| Shape::Named { label }),
        any::<Option<u32>>().prop_map(|depth| Shape::Inner(Inner { depth })),
    ]
}

prop_compose! {
    fn options()(
        (alpha, wide) in (any::<f32>(), any::<f64>()),
        (count, signed, on) in any::<(u8, i64, bool)>(),
        name in text(),
        names in prop::collection::vec(text(), 0..4),
        maybe in prop::option::of(text()),
        shape in shape(),
        pairs in prop::collection::vec(any::<(u32, f64)>(), 0..3),
        by_name in prop::collection::btree_map(text(), any::<u64>(), 0..3),
    ) -> Options {
        let scaling = RopeScaling::Linear { factor: Real(wide) };
        Options { alpha, wide, count, signed, on, name, names, maybe, scaling, shape, pairs, by_name }
    }
}

proptest! {
    #[test]
    fn trees_read_back(v in value()) {
        let mut fields = Fields::default();
        fields.push("k", v);
        let text = fields.to_string();
        prop_assert_eq!(Fields::parse(&text).unwrap(), fields, "{}", text);
    }

    #[test]
    fn structs_read_back(o in options()) {
        let text = to_fields(&o).to_string();
        prop_assert_eq!(read(&text).map_err(|e| TestCaseError::fail(format!("{e}: {text}")))?, o);
    }

    #[test]
    fn any_text_is_read_or_refused(t in any::<String>(), u in "[{}\\[\\]=,a-c0-9.\"@%!q<>\\- ]{0,40}") {
        for text in [t, u.clone(), format!("{{{u}")] {
            match Fields::parse(&text) {
                Ok(fields) => prop_assert_eq!(Fields::parse(&fields.to_string()).unwrap().to_string(), fields.to_string()),
                Err(e) => prop_assert_ne!(e.loc, Loc::None),
            }
        }
    }
}
