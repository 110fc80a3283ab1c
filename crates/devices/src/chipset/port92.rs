//! System control port A (port 0x92, "PS/2 Hardware Interface Technical Reference"): fast A20 and fast reset.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::{A20, BytePorts, PowerControl, attach_ports};
use crate::bus::{Bus, Overlap};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

const FAST_RESET: u8 = 0x01;
const A20_OPEN: u8 = 0x02;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    /// Bits 0 and 3–7 as written; bit 1 is the gate's.
    value: u8,
    /// The gate, which the i8042 shares.
    a20: bool,
}

/// Port 0x92.
pub struct Port92 {
    value: u8,
    a20: Arc<A20>,
    power: Arc<dyn PowerControl>,
}

impl Port92 {
    const NAME: &'static str = "port92";
    const VERSION: u32 = 1;

    /// The port, driving `a20` and asking `power` for a reset.
    pub fn new(a20: Arc<A20>, power: Arc<dyn PowerControl>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { value: 0, a20, power }))
    }

    /// Puts the port on the bus.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        attach_ports(bus, this, &[(0x92, 1)])
    }

    /// The state after a machine reset.
    pub fn reset(&mut self) {
        self.value = 0;
        self.a20.set(true);
    }
}

impl BytePorts for Port92 {
    fn read8(&mut self, _port: u16) -> u8 {
        self.value & !A20_OPEN | if self.a20.is_open() { A20_OPEN } else { 0 }
    }

    fn write8(&mut self, _port: u16, value: u8) {
        let reset = value & !self.value & FAST_RESET != 0;
        self.value = value;
        self.a20.set(value & A20_OPEN != 0);
        if reset {
            self.power.reset();
        }
    }
}

impl Snapshot for Port92 {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &State { value: self.value, a20: self.a20.is_open() })
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: State = from_blob(Self::NAME, Self::VERSION, blob)?;
        self.value = state.value;
        self.a20.set(state.a20);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, Wishes, hammer_ports};
    use super::*;
    use crate::bus::lock;

    #[test]
    fn write_bits_move_a20_and_reset_once() {
        let wishes = Arc::new(Wishes::default());
        let a20 = Arc::new(A20::default());
        let port = Port92::new(Arc::clone(&a20), Arc::clone(&wishes) as _);
        lock(&port).write8(0x92, 0);
        assert!(!a20.is_open());
        lock(&port).write8(0x92, 3);
        lock(&port).write8(0x92, 3);
        assert!(a20.is_open());
        assert_eq!(wishes.take(), ["reset"]);
        assert_eq!(lock(&port).read8(0x92), 3);
        hammer_ports(&Bench::new(), &port, &[0x92], 1000);
    }
}
