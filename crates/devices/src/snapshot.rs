//! Saving and restoring device state as plain versioned data.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// One device's state: who, which layout, what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StateBlob {
    /// Stable name of the device, e.g. `pic` or `virtio-blk.0`.
    pub name: String,
    /// Layout version of `data`; a change of layout raises it.
    pub version: u32,
    /// The state itself.
    pub data: serde_json::Value,
}

/// A state that could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Made by another version of this device.
    #[error("state of {name} has layout version {found}, this program knows {known}")]
    Version {
        /// Device name.
        name: String,
        /// Version found in the snapshot.
        found: u32,
        /// Version of this program.
        known: u32,
    },
    /// Not this device's state, or damaged.
    #[error("state of {name} is damaged: {source}")]
    Damaged {
        /// Device name.
        name: String,
        /// What the decoder said.
        #[source]
        source: serde_json::Error,
    },
    /// The snapshot holds no state for this device.
    #[error("the snapshot has no state for {0}")]
    Missing(String),
    /// The values contradict the machine that restores them.
    #[error("state of {name} does not fit this machine: {why}")]
    Unfit {
        /// Device name.
        name: String,
        /// What does not fit.
        why: String,
    },
}

/// A part of the machine with state. `restore` treats the blob as untrusted input.
pub trait Snapshot: Send {
    /// The state now.
    fn save(&self) -> StateBlob;
    /// Takes on a saved state, re-arming timers and lines as it says.
    ///
    /// # Errors
    /// When the blob is of another version, damaged or does not fit; the device is unchanged then.
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError>;
}

/// Makes a blob of any serialisable state.
///
/// # Panics
/// Never: device states are plain data (no maps with odd keys), which JSON can always hold.
pub fn to_blob<T: Serialize>(name: &str, version: u32, state: &T) -> StateBlob {
    let data = serde_json::to_value(state).expect("plain data serialises");
    StateBlob { name: name.to_owned(), version, data }
}

/// The state in a blob, after checking name and version.
///
/// # Errors
/// See [`RestoreError`].
pub fn from_blob<T: DeserializeOwned>(name: &str, version: u32, blob: &StateBlob) -> Result<T, RestoreError> {
    if blob.name != name {
        return Err(RestoreError::Missing(name.to_owned()));
    }
    if blob.version != version {
        return Err(RestoreError::Version { name: name.to_owned(), found: blob.version, known: version });
    }
    T::deserialize(&blob.data).map_err(|source| RestoreError::Damaged { name: name.to_owned(), source })
}
