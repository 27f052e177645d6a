//! Saved states as JSON: their kinds and versions, and errors that name the key.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::error::{Error, Result};

/// The version that is written. Every version up to this one is read.
const VERSION: u64 = 1;

/// A state that can be saved: the fields beside `kind` and `version`.
pub trait SavedState: Serialize + DeserializeOwned {
    /// The class that saves and restores it.
    const KIND: &'static str;

    fn to_json(&self) -> Result<String> {
        let tagged = Tagged { kind: Self::KIND, version: VERSION, state: self };
        serde_json::to_string(&tagged).map_err(|error| Error::Invalid(error.to_string()))
    }

    fn from_json(mut fields: Map<String, Value>) -> Result<Self> {
        let mut tag = |key: &str| {
            let missing = || Error::Invalid(format!("the state has no key {key:?}; save() writes it"));
            fields.remove(key).ok_or_else(missing)
        };
        let kind = tag("kind")?;
        if kind != Self::KIND {
            return Err(Error::Invalid(format!(
                "kind: expected {:?}, the class that is restored, not {kind}",
                Self::KIND
            )));
        }
        // A later version changes an older one's fields to its own here, before they are read.
        let version = tag("version")?;
        if version != VERSION {
            return Err(Error::Invalid(format!("version: expected {VERSION}, the only one so far, not {version}")));
        }
        serde_path_to_error::deserialize(Value::Object(fields)).map_err(|error| {
            let path = match error.path().to_string() {
                root if root == "." => "the state".into(),
                path => path,
            };
            Error::Invalid(format!("{path}: {}", error.inner()))
        })
    }
}

#[derive(Serialize)]
struct Tagged<'a, T> {
    kind: &'static str,
    version: u64,
    #[serde(flatten)]
    state: &'a T,
}

/// Reads a field that may be null, but not be missing.
pub fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    field: D,
) -> std::result::Result<Option<T>, D::Error> {
    Option::deserialize(field)
}

/// Reads a dict that may be null, but not be missing.
pub fn nullable_dict<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    field: D,
) -> std::result::Result<Option<T>, D::Error> {
    Ok(Option::<Dict<T>>::deserialize(field)?.map(|dict| dict.0))
}

/// Reads a list of dicts.
pub fn dicts<'de, D: Deserializer<'de>, T: Deserialize<'de>>(field: D) -> std::result::Result<Vec<T>, D::Error> {
    Ok(Vec::<Dict<T>>::deserialize(field)?.into_iter().map(|dict| dict.0).collect())
}

/// A structure that is read from a dict alone. By itself, serde reads it from a list of its values too.
struct Dict<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Dict<T> {
    fn deserialize<D: Deserializer<'de>>(dict: D) -> std::result::Result<Self, D::Error> {
        dict.deserialize_map(DictVisitor(PhantomData))
    }
}

struct DictVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for DictVisitor<T> {
    type Value = Dict<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a dict")
    }

    fn visit_map<A: MapAccess<'de>>(self, fields: A) -> std::result::Result<Self::Value, A::Error> {
        T::deserialize(MapAccessDeserializer::new(fields)).map(Dict)
    }
}
