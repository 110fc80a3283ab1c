//! How a device reaches its driver: MSI-X vectors for each queue and for configuration changes, or the shared pin with
//! the ISR status register (virtio 1.2 4.1.4.5, 4.1.5.1.2 to 4.1.5.1.4).
//!
//! INV-VINT-1: the pin is high exactly while the ISR status is not 0; both change under one lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::bus::lock;
use crate::pci::{Intx, Msix};

/// `VIRTIO_MSI_NO_VECTOR`.
pub const NO_VECTOR: u16 = 0xffff;
/// ISR status: a queue has news.
pub const ISR_QUEUE: u8 = 1;
/// ISR status: the configuration changed.
pub const ISR_CONFIG: u8 = 2;

/// What must survive a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptState {
    isr: u8,
    generation: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    needs_reset: bool,
}

/// A device's way to interrupt its driver. Usable from any thread.
pub struct Interrupt {
    state: Mutex<InterruptState>,
    ready: AtomicBool,
    sent: AtomicU64,
    intx: Arc<Intx>,
    msix: Arc<Msix>,
}

impl Interrupt {
    pub(super) fn new(queues: usize, intx: Arc<Intx>, msix: Arc<Msix>) -> Self {
        let state = Mutex::new(InterruptState::fresh(queues));
        Self { state, ready: AtomicBool::new(false), sent: AtomicU64::new(0), intx, msix }
    }

    /// Chains of `queue` were used.
    pub fn queue_used(&self, queue: u16) {
        self.sent.fetch_add(1, Ordering::Relaxed);
        let vector = {
            let mut state = lock(&self.state);
            if !self.msix.enabled() {
                state.isr |= ISR_QUEUE;
                self.intx.set(true);
                return;
            }
            state.queue_vectors.get(usize::from(queue)).copied()
        };
        self.fire(vector);
    }

    /// The configuration structure changed; silent before the driver is ready.
    pub fn config_changed(&self) {
        let vector = {
            let mut state = lock(&self.state);
            state.generation = state.generation.wrapping_add(1);
            if !self.ready.load(Ordering::SeqCst) {
                return;
            }
            state.isr |= ISR_CONFIG;
            if !self.msix.enabled() {
                self.intx.set(true);
            }
            state.config_vector
        };
        self.sent.fetch_add(1, Ordering::Relaxed);
        self.fire(self.msix.enabled().then_some(vector));
    }

    fn fire(&self, vector: Option<u16>) {
        if let Some(vector) = vector.filter(|&v| v != NO_VECTOR) {
            self.msix.fire(vector);
        }
    }

    /// The driver broke the protocol: DEVICE_NEEDS_RESET (virtio 1.2 2.1.2).
    pub fn needs_reset(&self) {
        if !std::mem::replace(&mut lock(&self.state).needs_reset, true) {
            self.config_changed();
        }
    }

    /// Interrupts raised so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    // ---- for the transport ----------------------------------------------------------------------------------

    pub(super) fn wants_reset(&self) -> bool {
        lock(&self.state).needs_reset
    }

    pub(super) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
    }

    /// Reads the ISR status, which clears it and lowers the pin.
    pub(super) fn take_isr(&self) -> u8 {
        let mut state = lock(&self.state);
        self.intx.set(false);
        std::mem::take(&mut state.isr)
    }

    pub(super) fn generation(&self) -> u8 {
        lock(&self.state).generation
    }

    pub(super) fn config_vector(&self) -> u16 {
        lock(&self.state).config_vector
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        lock(&self.state).queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR)
    }

    /// A vector that does not exist reads back as none (virtio 1.2 4.1.5.1.2.1).
    fn checked(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.msix.len() { vector } else { NO_VECTOR }
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        lock(&self.state).config_vector = self.checked(vector);
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        let vector = self.checked(vector);
        if let Some(slot) = lock(&self.state).queue_vectors.get_mut(usize::from(queue)) {
            *slot = vector;
        }
    }

    /// Whether the guest uses MSI-X (the legacy interface's layout depends on it).
    pub(super) fn msix_enabled(&self) -> bool {
        self.msix.enabled()
    }

    /// Device reset: no vectors, nothing pending.
    pub(super) fn reset(&self) {
        self.set_ready(false);
        let mut state = lock(&self.state);
        // The generation goes on: a driver that compares it across a reset must see a change, never a repeat.
        let generation = state.generation;
        *state = InterruptState { generation, ..InterruptState::fresh(state.queue_vectors.len()) };
        self.intx.set(false);
    }

    pub(super) fn save(&self) -> InterruptState {
        lock(&self.state).clone()
    }

    pub(super) fn fits(&self, state: &InterruptState) -> bool {
        state.queue_vectors.len() == lock(&self.state).queue_vectors.len()
    }

    /// Takes on a state that [`Interrupt::fits`].
    pub(super) fn restore(&self, saved: &InterruptState) {
        let mut state = lock(&self.state);
        state.clone_from(saved);
        state.config_vector = self.checked(saved.config_vector);
        for vector in &mut state.queue_vectors {
            *vector = self.checked(*vector);
        }
        self.intx.set(state.isr != 0);
    }
}

impl InterruptState {
    fn fresh(queues: usize) -> Self {
        Self {
            isr: 0,
            generation: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
            needs_reset: false,
        }
    }
}
