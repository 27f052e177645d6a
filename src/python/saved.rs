//! Saved states as Python's dicts.

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use serde_json::{Map, Number, Value};

use crate::irqfd::SavedState;

/// Deeper than any state: a list could contain itself.
const DEPTH: usize = 8;

/// The dict that is this JSON.
pub(super) fn to_dict(py: Python<'_>, state: String) -> PyResult<Bound<'_, PyAny>> {
    py.import("json")?.call_method1("loads", (state,))
}

pub(super) fn from_dict<T: SavedState>(state: &Bound<'_, PyAny>) -> PyResult<T> {
    let Ok(items) = state.cast::<PyDict>() else {
        return Err(PyTypeError::new_err(format!(
            "state must be a dict, as save() returns it, not {}",
            shown(state)
        )));
    };
    Ok(T::from_json(fields(items, "", DEPTH)?)?)
}

/// The values of a dict, by key.
fn fields(dict: &Bound<'_, PyDict>, path: &str, depth: usize) -> PyResult<Map<String, Value>> {
    let mut fields = Map::new();
    // A copy: what runs below may change the dict.
    for item in dict.items() {
        let (key, item): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item.extract()?;
        let Ok(key) = key.extract::<String>() else {
            let at = if path.is_empty() { "the state" } else { path };
            return Err(PyTypeError::new_err(format!("{at}: key {} is not a str", shown(&key))));
        };
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        fields.insert(key, value(&item, &path, depth - 1)?);
    }
    Ok(fields)
}

/// A value that JSON has. `path` is where it is in the state.
fn value(object: &Bound<'_, PyAny>, path: &str, depth: usize) -> PyResult<Value> {
    if depth == 0 {
        return Err(PyValueError::new_err(format!("{path} is nested too deeply for a state")));
    }
    if object.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(flag) = object.cast::<PyBool>() {
        return Ok(Value::Bool(flag.is_true()));
    }
    if object.is_instance_of::<PyInt>() {
        let number =
            object.extract::<u64>().map(Number::from).or_else(|_| object.extract::<i64>().map(Number::from));
        let too_large = |_| PyOverflowError::new_err(format!("{path}: {} does not fit in 64 bits", shown(object)));
        return number.map(Value::Number).map_err(too_large);
    }
    if let Ok(float) = object.cast::<PyFloat>() {
        let not_finite = || PyValueError::new_err(format!("{path}: {} is not a number of JSON", shown(object)));
        return Number::from_f64(float.extract()?).map(Value::Number).ok_or_else(not_finite);
    }
    if let Ok(text) = object.cast::<PyString>() {
        // A lone surrogate is no text that JSON can carry.
        let text = text.to_str().map_err(|error| PyValueError::new_err(format!("{path}: {error}")))?;
        return Ok(Value::String(text.into()));
    }
    if let Ok(items) = object.cast::<PyDict>() {
        return Ok(Value::Object(fields(items, path, depth)?));
    }
    if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
        let mut items = Vec::new();
        for (at, item) in object.try_iter()?.enumerate() {
            items.push(value(&item?, &format!("{path}[{at}]"), depth - 1)?);
        }
        return Ok(Value::Array(items));
    }
    Err(PyTypeError::new_err(format!("{path}: {} is not a value of JSON", shown(object))))
}

fn shown(object: &Bound<'_, PyAny>) -> String {
    let Ok(text) = object.repr() else {
        // Python refuses to print an int of thousands of digits.
        return object.get_type().name().map_or_else(|_| "this object".into(), |name| format!("this {name}"));
    };
    let text = text.to_string();
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
