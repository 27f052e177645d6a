//! The part of a route that its handle and its partition share.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::error::{Error, Result};
use super::events::RouteEvent;
use super::gsi::GsiState;
use super::msi::MsiRoute;
use super::sync::{AtomicU64, Mutex, MutexGuard};
use crate::hypervisor::event::EventFd;

/// The state that the caller wants of a route. The route's lock guards it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Intent {
    pub(super) masked: bool,
    pub(super) msi: Option<MsiRoute>,
    pub(super) closed: bool,
}

impl Intent {
    /// Whether the route is not to be armed.
    pub(super) fn is_idle(self) -> bool {
        self.masked || self.msi.is_none()
    }
}

/// The part of a route that its handle and its partition share.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) gsi: u32,
    pub(super) event: RouteEvent,
    intent: Mutex<Intent>,
    /// The intent and the kernel's state in one word, which readers load without a lock.
    published: AtomicU64,
}

pub(super) const ARMED: u64 = 1 << 63;
const BROKEN: u64 = 1 << 62;
pub(super) const CLOSED: u64 = 1 << 61;
pub(super) const MASKED: u64 = 1 << 60;
pub(super) const HAS_MSI: u64 = 1 << 59;
/// The GSI where it is armed, 12 bits above those of a packed MSI.
const ARMED_AT: u32 = 36;
const OF_PARTITION: u64 = ARMED | BROKEN | 0xFFF << ARMED_AT;

impl Route {
    pub(super) fn new(gsi: u32, event: Arc<EventFd>) -> Self {
        Self { gsi, event: RouteEvent::new(event), intent: Mutex::default(), published: AtomicU64::new(0) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Intent> {
        self.intent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn load(&self) -> u64 {
        self.published.load(Ordering::Acquire)
    }

    fn update(&self, clear: u64, set: u64) {
        // There are two writers. Each owns its own bits, under its own lock.
        let _before =
            self.published.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| Some(bits & !clear | set));
    }

    /// Stores the kernel's state: the GSI where the route is armed. Called under the partition's lock.
    pub(super) fn publish_kernel(&self, armed_at: Option<u16>, broken: bool) {
        let set = armed_at.map_or(0, |gsi| ARMED | u64::from(gsi) << ARMED_AT) | if broken { BROKEN } else { 0 };
        if self.load() & OF_PARTITION != set {
            self.update(OF_PARTITION, set);
        }
    }

    /// Stores a new intent. The caller holds the route's lock, as `intent` shows.
    pub(super) fn set_intent(&self, intent: &mut Intent, new: Intent) {
        *intent = new;
        let flag = |condition, bit| if condition { bit } else { 0 };
        let bits =
            flag(new.closed, CLOSED) | flag(new.masked, MASKED) | new.msi.map_or(0, |msi| HAS_MSI | msi.pack());
        self.update(!OF_PARTITION, bits);
    }

    /// Whether the kernel's state agrees with this intent.
    pub(super) fn is_settled(&self, intent: Intent) -> bool {
        (self.load() & ARMED != 0) == (!intent.masked && intent.msi.is_some())
    }

    pub(super) fn check(&self, intent: &Intent) -> Result {
        if intent.closed {
            return Err(self.closed());
        }
        if self.load() & BROKEN != 0 {
            return Err(Error::Broken(self.gsi));
        }
        Ok(())
    }

    pub(super) fn closed(&self) -> Error {
        Error::Closed(format!("the route that had GSI {} (now unallocated, or another route's)", self.gsi))
    }

    /// The GSI where the route is armed. A broken route counts as not armed, although its irqfd may be registered.
    pub(super) fn armed_gsi(&self) -> Option<u32> {
        let bits = self.load();
        (bits & (ARMED | BROKEN) == ARMED).then_some((bits >> ARMED_AT) as u32 & 0xFFF)
    }

    pub(super) fn state(&self) -> GsiState {
        let bits = self.load();
        if bits & BROKEN != 0 {
            GsiState::Broken
        } else if bits & ARMED != 0 {
            GsiState::Enabled
        } else {
            GsiState::Disabled
        }
    }
}
