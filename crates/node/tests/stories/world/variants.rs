//! Every way in which one field of a message may differ from what was said.

use minicbor::data::{Int, Type};
use minicbor::{Decoder, Encoder};

#[derive(Debug, Clone, PartialEq)]
enum Value {
    Number(i128),
    Bytes(Vec<u8>),
    Text(String),
    Truth(bool),
    Nothing,
    List(Vec<Value>),
    Map(Vec<(Value, Value)>),
}

/// All messages that differ from this one in one place of their structure: in a field's value or kind, in an element that
/// lacks, is there twice or has changed places, or in the name of a field.
pub(crate) fn variants(message: &[u8]) -> Vec<Vec<u8>> {
    let value = read(&mut Decoder::new(message));
    assert_eq!(encoded(&value), message, "it is read whole");
    let mut all: Vec<_> = changed(&value).iter().map(encoded).collect();
    all.sort();
    all.dedup();
    all.retain(|one| one != message);
    all
}

fn read(decoder: &mut Decoder<'_>) -> Value {
    match decoder.datatype().unwrap() {
        Type::Bytes => Value::Bytes(decoder.bytes().unwrap().to_vec()),
        Type::String => Value::Text(decoder.str().unwrap().to_owned()),
        Type::Bool => Value::Truth(decoder.bool().unwrap()),
        Type::Null => {
            decoder.null().unwrap();
            Value::Nothing
        }
        Type::Array => {
            let count = decoder.array().unwrap().unwrap();
            Value::List((0..count).map(|_| read(decoder)).collect())
        }
        Type::Map => {
            let count = decoder.map().unwrap().unwrap();
            Value::Map((0..count).map(|_| (read(decoder), read(decoder))).collect())
        }
        _ => Value::Number(decoder.int().unwrap().into()),
    }
}

fn encoded(value: &Value) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new());
    write(&mut encoder, value);
    encoder.into_writer()
}

fn write(encoder: &mut Encoder<Vec<u8>>, value: &Value) {
    match value {
        Value::Number(number) => drop(encoder.int(Int::try_from(*number).unwrap()).unwrap()),
        Value::Bytes(bytes) => drop(encoder.bytes(bytes).unwrap()),
        Value::Text(text) => drop(encoder.str(text).unwrap()),
        Value::Truth(truth) => drop(encoder.bool(*truth).unwrap()),
        Value::Nothing => drop(encoder.null().unwrap()),
        Value::List(items) => {
            encoder.array(items.len() as u64).unwrap();
            for item in items {
                write(encoder, item);
            }
        }
        Value::Map(fields) => {
            encoder.map(fields.len() as u64).unwrap();
            for (name, field) in fields {
                write(encoder, name);
                write(encoder, field);
            }
        }
    }
}

/// The values that differ in one place.
fn changed(value: &Value) -> Vec<Value> {
    let mut all = match value {
        Value::Number(number) => numbers(*number),
        Value::Bytes(bytes) => bytes_like(bytes).into_iter().map(Value::Bytes).collect(),
        Value::Text(text) => texts(text).into_iter().map(Value::Text).collect(),
        Value::Truth(truth) => vec![Value::Truth(!truth)],
        Value::Nothing => vec![Value::Number(1), Value::Text("x".into()), Value::List(Vec::new())],
        Value::List(items) => rearranged(items, changed).into_iter().map(Value::List).collect(),
        Value::Map(fields) => rearranged(fields, |(name, field)| {
            let renamed = changed(name).into_iter().map(|name| (name, field.clone()));
            renamed.chain(changed(field).into_iter().map(|field| (name.clone(), field))).collect()
        })
        .into_iter()
        .map(Value::Map)
        .collect(),
    };
    all.push(Value::Nothing);
    all.push(Value::Bytes(encoded(value)));
    all
}

fn numbers(number: i128) -> Vec<Value> {
    let all = [number + 1, number - 1, 0, number * 2, -1, u64::MAX.into()];
    all.into_iter().filter(|number| *number <= u64::MAX.into()).map(Value::Number).collect()
}

fn bytes_like(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut all = vec![Vec::new(), [bytes, &[0]].concat()];
    if !bytes.is_empty() {
        all.push(bytes[..bytes.len() - 1].to_vec());
        for position in [0, bytes.len() / 2, bytes.len() - 1] {
            let mut flipped = bytes.to_vec();
            flipped[position] ^= 1;
            all.push(flipped);
        }
    }
    all
}

fn texts(text: &str) -> Vec<String> {
    let mut shorter = text.to_owned();
    shorter.pop();
    vec![String::new(), shorter, format!("{text}x"), format!("x{text}"), text.to_uppercase()]
}

/// Lists of which one element is changed, lacks, is there twice, or has changed places with the next.
fn rearranged<T: Clone>(items: &[T], changed: impl Fn(&T) -> Vec<T>) -> Vec<Vec<T>> {
    let mut all = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let with = |others: Vec<T>| [&items[..index], &others, &items[index + 1..]].concat();
        all.extend(changed(item).into_iter().map(|other| with(vec![other])));
        all.push(with(Vec::new()));
        all.push(with(vec![item.clone(), item.clone()]));
        let mut swapped = items.to_vec();
        swapped.swap(index, (index + 1) % items.len());
        all.push(swapped);
    }
    all
}
