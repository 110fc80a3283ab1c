//! The chipset's own functions: the host bridge (82441FX) and the ISA bridge (82371SB, PIIX3), of which guests use the
//! identity and the interrupt routing registers PIRQRC\[A:D\] (82371SB datasheet 2.3.8: 0x60–0x63).

use std::sync::Arc;

use super::{Bdf, PciDevice, PciFunction, PciIdentity};

/// Where firmware and kernels expect the ISA bridge.
pub const ISA_BRIDGE: Bdf = Bdf { device: 1, function: 0 };

/// First of the four routing registers.
const PIRQRC: u16 = 0x60;
/// Bit 7 of a routing register: the link is not routed.
const NOT_ROUTED: u8 = 0x80;
/// Routes that firmware chooses (as SeaBIOS does): away from the ACPI interrupt 9.
pub(super) const FIRMWARE_ROUTES: [u8; 4] = [10, 10, 11, 11];

/// The host bridge, function 00.0.
pub struct HostBridge(PciFunction);

impl Default for HostBridge {
    fn default() -> Self {
        Self(PciFunction::new(PciIdentity {
            vendor: 0x8086,
            device: 0x1237,
            class: 0x06_0000,
            revision: 2,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }))
    }
}

impl PciDevice for HostBridge {
    fn function(&self) -> &PciFunction {
        &self.0
    }
    fn function_mut(&mut self) -> &mut PciFunction {
        &mut self.0
    }
}

/// The board's switch from PCI links A–D (0–3) to ISA interrupts.
pub trait PirqRoutes: Send + Sync {
    /// Link `pirq` goes to ISA interrupt `irq`, or nowhere.
    fn route(&self, pirq: u8, irq: Option<u8>);
}

/// The ISA bridge, function 01.0.
pub struct IsaBridge {
    function: PciFunction,
    routes: Arc<dyn PirqRoutes>,
}

impl IsaBridge {
    /// An ISA bridge that steers `routes`, set up as firmware leaves it.
    #[must_use]
    pub fn new(routes: Arc<dyn PirqRoutes>) -> Self {
        let mut function = PciFunction::new(PciIdentity {
            vendor: 0x8086,
            device: 0x7000,
            class: 0x06_0100,
            revision: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        function.set_multifunction();
        function.set_writable(usize::from(PIRQRC), &[0x8f; 4]);
        let mut bridge = Self { function, routes };
        bridge.set_firmware_routes();
        bridge
    }

    fn set_firmware_routes(&mut self) {
        self.function.set_bytes(usize::from(PIRQRC), &FIRMWARE_ROUTES);
        self.apply_routes();
    }

    fn apply_routes(&self) {
        for (pirq, value) in (0u8..).zip(self.function.bytes::<4>(usize::from(PIRQRC))) {
            // IRQs 0, 1, 2, 8 and 13 are reserved (82371SB 2.3.8).
            let irq = value & 0xf;
            let routed = value & NOT_ROUTED == 0 && !matches!(irq, 0..=2 | 8 | 13);
            self.routes.route(pirq, routed.then_some(irq));
        }
    }
}

impl PciDevice for IsaBridge {
    fn function(&self) -> &PciFunction {
        &self.function
    }
    fn function_mut(&mut self) -> &mut PciFunction {
        &mut self.function
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data);
        if (PIRQRC..PIRQRC + 4).contains(&offset) {
            self.apply_routes();
        }
    }
    fn config_restored(&mut self) {
        self.apply_routes();
    }
    /// The machine has no firmware that would route again after a reset, so the routes come back as firmware's.
    fn reset(&mut self) {
        self.function.reset();
        self.set_firmware_routes();
    }
}
