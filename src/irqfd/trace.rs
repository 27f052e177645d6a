//! A record of the calls into the kernel and of the reasons for them, for whoever logs them.
//!
//! Calls are recorded only while `calls` is set, refused ones always. Whoever makes calls takes the record afterwards,
//! when no lock is held: a log may do anything.

use std::fmt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::sync::{AtomicBool, Mutex};

/// So many events are kept for whoever takes them. More than the calls of one push, with every GSI armed.
const MOST: usize = 1 << 16;

/// The reason for a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reason {
    /// The caller set an MSI, or unmasked.
    #[default]
    Wanted,
    /// The caller masked the route, or took its MSI away.
    Unwanted,
    /// The kernel has the message at another GSI.
    Moves,
    /// Another eventfd takes the place of its own.
    Replaced,
    /// The kernel's table lacks a message.
    Missing,
    /// No push may meet an armed irqfd.
    Quiesced,
    /// The push for which it was disarmed is over.
    PushIsOver,
    /// An earlier call could not arm it again.
    Waited,
    /// A later call of the same change failed.
    RolledBack,
    /// Its counter could not be drained.
    Undrained,
    /// The kernel has to raise what it has taken from the eventfds.
    Flushed,
    /// The state is being saved: the eventfd is looked at.
    Saved,
    /// The caller closed the route.
    Closed,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wanted => "it has an MSI and is not masked",
            Self::Unwanted => "it is masked, or has no MSI",
            Self::Moves => "the table has its MSI at another GSI",
            Self::Replaced => "it gets another eventfd",
            Self::Missing => "the table lacks an MSI",
            Self::Quiesced => "a push follows",
            Self::PushIsOver => "the push is over",
            Self::Waited => "it waited to be re-armed since an earlier failure",
            Self::RolledBack => "a call failed, and the change is undone",
            Self::Undrained => "its eventfd could not be drained",
            Self::Flushed => "the interrupts on their way are waited for",
            Self::Saved => "the state is being saved",
            Self::Closed => "it is closed",
        })
    }
}

/// A call into the kernel, or what became of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Pushed {
        entries: usize,
        reason: Reason,
    },
    Armed {
        gsi: u32,
        place: u32,
        reason: Reason,
    },
    Disarmed {
        gsi: u32,
        place: u32,
        reason: Reason,
    },
    /// A device's vector stays disarmed.
    Fault {
        text: String,
    },
    Failed {
        text: String,
    },
    /// Nobody took the events in time.
    Dropped {
        events: u64,
    },
}

impl Event {
    /// Whether the kernel refused something.
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |gsi: &u32, place: &u32| if gsi == place { String::new() } else { format!(" at GSI {place}") };
        match self {
            Self::Pushed { entries, reason } => write!(f, "pushed {entries} entries: {reason}"),
            Self::Armed { gsi, place, reason } => write!(f, "armed GSI {gsi}{}: {reason}", at(gsi, place)),
            Self::Disarmed { gsi, place, reason } => write!(f, "disarmed GSI {gsi}{}: {reason}", at(gsi, place)),
            Self::Fault { text } | Self::Failed { text } => f.write_str(text),
            Self::Dropped { events } => write!(f, "{events} events were not logged: too many at once"),
        }
    }
}

/// The events that nobody has taken yet. Its lock is the last of all.
#[derive(Debug, Default)]
pub struct Trace {
    calls: AtomicBool,
    waiting: AtomicBool,
    events: Mutex<(Vec<Event>, u64)>,
}

impl Trace {
    /// Whether calls are recorded.
    pub fn calls(&self) -> bool {
        self.calls.load(Ordering::Relaxed)
    }

    pub fn set_calls(&self, calls: bool) {
        self.calls.store(calls, Ordering::Relaxed);
    }

    /// Records an event, if calls are recorded.
    pub(crate) fn call(&self, event: impl FnOnce() -> Event) {
        if self.calls() {
            self.record(event());
        }
    }

    pub(super) fn record(&self, event: Event) {
        let mut kept = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.0.len() < MOST {
            kept.0.push(event)
        } else {
            kept.1 += 1
        }
        self.waiting.store(true, Ordering::Release);
    }

    /// Whether there is anything to take. Takes no lock.
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// Takes the events so far.
    pub fn take(&self) -> Vec<Event> {
        let mut kept = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.store(false, Ordering::Release);
        let (mut events, dropped) = std::mem::take(&mut *kept);
        if dropped > 0 {
            events.push(Event::Dropped { events: dropped });
        }
        events
    }
}
