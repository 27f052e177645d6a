//! The saved state of a device's vectors. That of its registers is beside the registers.

use serde::{Deserialize, Serialize};

use crate::irqfd::{Message, nullable, nullable_dict};

/// The state of a vector that has a route, a signal or a fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorState {
    pub vector: u32,
    /// Its route's GSI, if it has a route.
    #[serde(deserialize_with = "nullable")]
    pub gsi: Option<u32>,
    /// The message that it had when it became live, which may differ from what the registers have now: it is armed with
    /// that unless it has a fault. None if it is not live, or if that is no MSI.
    #[serde(deserialize_with = "nullable_dict")]
    pub msi: Option<Message>,
    /// Whether a signal waits for it to be armed.
    pub pending: bool,
    /// Why it is live and not armed.
    #[serde(deserialize_with = "nullable")]
    pub fault: Option<String>,
}
