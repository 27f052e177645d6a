//! Conversions of arguments that several calls share.

use std::borrow::Cow;
use std::ops::Range;
use std::os::fd::RawFd;
use std::time::Duration;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMapping, PyRange, PyRangeMethods};

use super::errors::bad_integer;
use crate::hypervisor::trigger::Trigger;
use crate::hypervisor::{MAX_GSIS, RawMsi};
use crate::irqfd::{self, VpSet};

/// The address and data of an MSI.
pub(super) fn address_and_data(address: &Bound<'_, PyAny>, data: &Bound<'_, PyAny>) -> PyResult<irqfd::MsiRoute> {
    let number = |value: &Bound<'_, PyAny>, name, range| {
        value.extract::<u64>().map_err(|error| bad_integer(&error, value, name, range))
    };
    let address = number(address, "MSI address", "x86 MSI addresses are 0xFEE00000-0xFEEFFFFF")?;
    let data = number(data, "MSI data", "MSI data is 16 bits")?;
    Ok(irqfd::MsiRoute::new(address, data).map_err(irqfd::Error::from)?)
}

/// A file descriptor, or an object with `fileno()`.
pub(super) fn descriptor(value: &Bound<'_, PyAny>) -> PyResult<RawFd> {
    let range = "give a file descriptor or an object with fileno()";
    let number = match value.getattr_opt(intern!(value.py(), "fileno"))? {
        Some(fileno) => fileno.call0()?,
        None => value.clone(),
    };
    match number.extract::<i32>().map_err(|error| bad_integer(&error, value, "file descriptor", range))? {
        fd @ 0.. => Ok(fd),
        fd => Err(PyValueError::new_err(format!("file descriptor {fd} is negative; {range}"))),
    }
}

/// The trigger of a doorbell.
pub(super) fn trigger(
    address: &Bound<'_, PyAny>,
    length: &Bound<'_, PyAny>,
    datamatch: Option<&Bound<'_, PyAny>>,
    port: bool,
) -> PyResult<Trigger> {
    let address = self::address("doorbell address", address)?;
    let lengths = "give 1, 2, 4 or 8 bytes, or 0 for writes of any size";
    let length =
        length.extract::<u32>().map_err(|error| bad_integer(&error, length, "doorbell length", lengths))?;
    let value = |value: &Bound<'_, PyAny>| {
        value.extract::<u64>().map_err(|error| bad_integer(&error, value, "datamatch", "give a value of 64 bits"))
    };
    Ok(Trigger { address, length, datamatch: datamatch.map(value).transpose()?, port })
}

/// A guest-physical address.
pub(super) fn address(name: &str, value: &Bound<'_, PyAny>) -> PyResult<u64> {
    value.extract::<u64>().map_err(|error| bad_integer(&error, value, name, "addresses have 64 bits"))
}

/// GSIs: a `range` with step 1.
pub(super) fn gsis(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Range<u32>> {
    let range = value.cast::<PyRange>().map_err(|_| {
        let shown = value.repr().map_or_else(|_| "?".into(), |text| text.to_string());
        PyTypeError::new_err(format!("{name} must be a range such as range(24, 2072), not {shown}"))
    })?;
    let bounds = (range.start()?, range.stop()?);
    if range.step()? != 1 {
        return Err(PyValueError::new_err(format!("{name} {value} has a step; give a range with step 1")));
    }
    match bounds {
        (start @ 0.., stop) if start.max(stop) <= MAX_GSIS as isize => Ok(start as u32..stop.max(0) as u32),
        _ => Err(PyValueError::new_err(format!(
            "{name} {value} goes outside 0-{}, the GSIs that kernels accept",
            MAX_GSIS - 1
        ))),
    }
}

/// VPs: their number (indexes from 0 up), or an iterable of their indexes.
pub(super) fn vps(value: &Bound<'_, PyAny>) -> PyResult<VpSet> {
    let range = "VP indexes are 0 to 254";
    let index = |value: &Bound<'_, PyAny>, name: &str, most: i64| {
        let number = value.extract::<i64>().map_err(|error| bad_integer(&error, value, name, range))?;
        if (0..=most).contains(&number) {
            Ok(number as u8)
        } else {
            Err(PyValueError::new_err(format!("{name} {number} is out of range; {range}")))
        }
    };
    if let Ok(items) = value.try_iter() {
        let mut all = VpSet::default();
        for item in items {
            all.insert(index(&item?, "VP index", VpSet::MAX.into())?);
        }
        return Ok(all);
    }
    let count = index(value, "vps", i64::from(VpSet::MAX) + 1)?;
    Ok((0..count).collect())
}

/// The caller's own entries, which every push keeps.
pub(super) fn keep(value: &Bound<'_, PyAny>) -> PyResult<Vec<(u32, RawMsi)>> {
    value
        .try_iter()?
        .map(|entry| {
            let entry = entry?;
            let shape = "keep takes RoutingEntry(gsi, address, data), of 32-bit integers";
            type Fields<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>);
            let (gsi, address, data): Fields<'_> = entry
                .extract()
                .map_err(|_| PyTypeError::new_err(format!("keep: {entry} is not an entry; {shape}")))?;
            let number = |value: &Bound<'_, PyAny>, name| {
                value.extract::<u32>().map_err(|error| bad_integer(&error, value, name, shape))
            };
            let msi = RawMsi { address: number(&address, "address")?, data: number(&data, "data")? };
            Ok((number(&gsi, "GSI")?, msi))
        })
        .collect()
}

/// A timeout in seconds.
pub(super) fn timeout(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|_| {
        PyValueError::new_err(format!(
            "timeout {seconds} is not a valid number of seconds; give a finite number, 0 or more"
        ))
    })
}

/// The offset or size of a guest's access. One that 64 bits can't hold lies outside every structure, as the largest one
/// that they can hold does.
pub(super) fn access(value: &Bound<'_, PyAny>, name: &str) -> PyResult<u64> {
    value.extract::<u64>().or_else(|error| {
        let error = bad_integer(&error, value, name, "give an int");
        if error.is_instance_of::<PyOverflowError>(value.py()) { Ok(u64::MAX) } else { Err(error) }
    })
}

/// The bytes that a guest writes.
pub(super) fn bytes<'a>(value: &'a Bound<'_, PyAny>) -> PyResult<Cow<'a, [u8]>> {
    if let Ok(bytes) = value.cast::<PyBytes>() {
        return Ok(Cow::Borrowed(bytes.as_bytes()));
    }
    match PyBuffer::<u8>::get(value) {
        Ok(buffer) => Ok(Cow::Owned(buffer.to_vec(value.py())?)),
        Err(_) => Err(PyTypeError::new_err(format!("data must be bytes, not {}", value.get_type().name()?))),
    }
}

/// A number of which a rule says more than that it is not negative and has at most 64 bits.
pub(super) fn number(value: &Bound<'_, PyAny>, name: &str, range: &str) -> PyResult<u64> {
    value.extract::<u64>().map_err(|error| match bad_integer(&error, value, name, range) {
        error if error.is_instance_of::<PyOverflowError>(value.py()) => {
            PyValueError::new_err(error.value(value.py()).to_string())
        }
        error => error,
    })
}

/// A caller's eventfds by vector: a mapping, or a sequence with `None` for vectors without.
pub(super) fn events(value: &Bound<'_, PyAny>) -> PyResult<Vec<(usize, RawFd)>> {
    if let Ok(mapping) = value.cast::<PyMapping>() {
        let vector = |key: &Bound<'_, PyAny>| number(key, "events: vector", "vectors count from 0");
        return mapped(mapping, |key| Ok(vector(key)?.try_into().unwrap_or(usize::MAX)));
    }
    let mut events = Vec::new();
    for (vector, event) in value.try_iter()?.enumerate() {
        let event = event?;
        if !event.is_none() {
            events.push((vector, descriptor(&event)?));
        }
    }
    Ok(events)
}

/// A caller's eventfds by GSI: a mapping.
pub(super) fn events_by_gsi(value: &Bound<'_, PyAny>) -> PyResult<Vec<(u32, RawFd)>> {
    let mapping = value.cast::<PyMapping>().map_err(|_| {
        let shown = value.repr().map_or_else(|_| "?".into(), |text| text.to_string());
        PyTypeError::new_err(format!("events must be a mapping from GSIs to eventfds, not {shown}"))
    })?;
    let gsi = |key: &Bound<'_, PyAny>| number(key, "events: GSI", "kernels accept 0 to 4095");
    mapped(mapping, |key| Ok(gsi(key)?.try_into().unwrap_or(u32::MAX)))
}

fn mapped<K>(
    mapping: &Bound<'_, PyMapping>,
    key: impl Fn(&Bound<'_, PyAny>) -> PyResult<K>,
) -> PyResult<Vec<(K, RawFd)>> {
    let pair = |item: PyResult<Bound<'_, PyAny>>| {
        let (of, event): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item?.extract()?;
        Ok((key(&of)?, descriptor(&event)?))
    };
    mapping.items()?.try_iter()?.map(pair).collect()
}
