//! Behaviour of PCI as a guest sees it through the ports, the ECAM window and the bus.

use std::sync::Mutex;

use x86::addr::Gpa;

use super::*;
use crate::bus::{Bus, PortDevice, lock};
use crate::chipset::testing::Noise;
use crate::irq::IrqSink;
use crate::snapshot::RestoreError;

const COMMAND: u8 = 0x04;
const BAR: [u8; 6] = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24];

/// Records messages and counts pulls per link.
#[derive(Default)]
struct Sink {
    messages: Mutex<Vec<(u64, u32)>>,
    pulls: Mutex<[i32; 8]>,
    routes: Mutex<[Option<u8>; 4]>,
}

impl IrqSink for Sink {
    fn set_gsi(&self, _gsi: u32, _level: bool) {}
    fn msi(&self, address: u64, data: u32) {
        lock(&self.messages).push((address, data));
    }
}
impl IntxSink for Sink {
    fn pull(&self, link: u8, asserted: bool) {
        lock(&self.pulls)[usize::from(link)] += if asserted { 1 } else { -1 };
    }
}
impl PirqRoutes for Sink {
    fn route(&self, pirq: u8, irq: Option<u8>) {
        lock(&self.routes)[usize::from(pirq)] = irq;
    }
}

impl Sink {
    fn sent(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut *lock(&self.messages))
    }
}

/// BAR 0: 64-bit memory with registers and MSI-X, BAR 2: ports, BAR 3: 32-bit memory.
struct Card {
    function: PciFunction,
    log: Vec<(usize, u64, Vec<u8>)>,
}

impl Card {
    fn new() -> Self {
        let mut function = PciFunction::new(PciIdentity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_8000,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 2,
        });
        function.set_interrupt_pin(1);
        function.add_bar(0, BarKind::Memory64 { prefetchable: true }, 0x4000);
        function.add_bar(2, BarKind::Io, 0x20);
        function.add_bar(3, BarKind::Memory32, 0x1000);
        function.add_msix(3, 0, 0x2000, 0x3000);
        function.add_msi(4);
        Self { function, log: Vec::new() }
    }
}

impl PciDevice for Card {
    fn function(&self) -> &PciFunction {
        &self.function
    }
    fn function_mut(&mut self) -> &mut PciFunction {
        &mut self.function
    }
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(bar << 4).unwrap() | u8::try_from(offset & 0xf).unwrap());
    }
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.log.push((bar, offset, data.to_vec()));
    }
}

struct Machine {
    bus: Arc<Bus>,
    host: Arc<PciHost>,
    sink: Arc<Sink>,
    card: Arc<Mutex<Card>>,
    bdf: Bdf,
}

fn machine() -> Machine {
    let bus = Arc::new(Bus::default());
    let sink = Arc::new(Sink::default());
    let host = PciHost::new(
        &bus,
        Arc::clone(&sink) as _,
        Arc::clone(&sink) as _,
        vec![0..0xa_0000, 0x10_0000..0x2000_0000],
    );
    host.add(Some(Bdf { device: 0, function: 0 }), Arc::new(Mutex::new(HostBridge::default()))).unwrap();
    host.add(Some(ISA_BRIDGE), Arc::new(Mutex::new(IsaBridge::new(Arc::clone(&sink) as _)))).unwrap();
    let card = Arc::new(Mutex::new(Card::new()));
    let bdf = host.add(None, Arc::<Mutex<Card>>::clone(&card)).unwrap();
    bus.add_ports(PciPorts::FIRST, 8, Arc::new(Mutex::new(PciPorts::new(Arc::clone(&host), None)))).unwrap();
    Machine { bus, host, sink, card, bdf }
}

impl Machine {
    fn select(&self, register: u8) {
        let address = 1 << 31 | u32::from(self.bdf.device) << 11 | u32::from(register & 0xfc);
        self.bus.port_write(0xcf8, 4, address);
    }
    fn get(&self, register: u8) -> u32 {
        self.select(register);
        self.bus.port_read(0xcfc, 4)
    }
    fn put(&self, register: u8, value: u32) {
        self.select(register);
        self.bus.port_write(0xcfc, 4, value);
    }
    fn put16(&self, register: u8, value: u16) {
        self.select(register);
        self.bus.port_write(0xcfc + u16::from(register & 2), 2, u32::from(value));
    }
    fn byte(&self, at: u64) -> u8 {
        let mut data = [0];
        self.bus.mmio_read(Gpa(at), &mut data);
        data[0]
    }
    fn dword(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.mmio_read(Gpa(at), &mut data);
        u32::from_le_bytes(data)
    }
    fn store(&self, at: u64, value: u32) {
        self.bus.mmio_write(Gpa(at), &value.to_le_bytes());
    }
    fn capability(&self, id: u8) -> u8 {
        let mut at = self.get(0x34).to_le_bytes()[0];
        for _ in 0..48 {
            let [found, next, ..] = self.get(at).to_le_bytes();
            if found == id {
                return at;
            }
            at = next;
        }
        panic!("no capability {id:#x}");
    }
    /// MSI-X on, vector 1 set to a message.
    fn msix(&self) -> (Arc<Msix>, u64) {
        self.host.place_bars().unwrap();
        let table = (u64::from(self.get(BAR[1])) << 32 | u64::from(self.get(BAR[0]) & !15)) + 0x2000;
        self.put16(COMMAND, 6);
        self.put16(self.capability(0x11) + 2, 0x8000);
        self.store(table + 16, 0xfee0_1000);
        self.store(table + 24, 0x41);
        self.store(table + 28, 0);
        (Arc::clone(lock(&self.card).function.msix().unwrap()), table)
    }
}

#[test]
fn config_mechanism_finds_functions_and_nothing_else() {
    let m = machine();
    assert_eq!(m.bdf, Bdf { device: 2, function: 0 });
    assert_eq!(m.get(0), 0x1042_1af4);
    assert_eq!(m.get(8), 0x0180_0001);
    assert_eq!(m.bus.port_read(0xcf8, 4), 0x8000_1008);
    m.bus.port_write(0xcf8, 4, 0x8000_0000);
    assert_eq!(m.bus.port_read(0xcfc, 4), 0x1237_8086);
    assert_eq!(m.bus.port_read(0xcfe, 2), 0x1237);
    assert_eq!(m.bus.port_read(0xcff, 1), 0x12);
    m.bus.port_write(0xcf8, 4, 0x8000_0800);
    assert_eq!(m.bus.port_read(0xcfc, 4), 0x7000_8086);
    for absent in [0x8000_f800, 0x8001_0000, 0x0000_0000, 0x8000_1100] {
        m.bus.port_write(0xcf8, 4, absent);
        assert_eq!(m.bus.port_read(0xcfc, 4), u32::MAX, "{absent:#x}");
        m.bus.port_write(0xcfc, 4, 0);
    }
    // Linux's test for mechanism #1: byte writes do not reach CONFIG_ADDRESS.
    m.bus.port_write(0xcf8, 4, 0x8000_0000);
    m.bus.port_write(0xcfb, 1, 1);
    assert_eq!(m.bus.port_read(0xcf8, 4), 0x8000_0000);
    assert_eq!(m.bus.port_read(0xcfb, 1), 0xff);
}

#[test]
fn reset_control_byte_access_passes_through() {
    struct Latch(u32);
    impl PortDevice for Latch {
        fn port_read(&mut self, _offset: u16, _size: u8) -> u32 {
            self.0
        }
        fn port_write(&mut self, _offset: u16, _size: u8, value: u32) {
            self.0 = value;
        }
    }
    let m = machine();
    m.bus.remove_ports(PciPorts::FIRST);
    let latch: crate::bus::SharedPort = Arc::new(Mutex::new(Latch(0)));
    let ports = PciPorts::new(Arc::clone(&m.host), Some(latch));
    m.bus.add_ports(PciPorts::FIRST, 8, Arc::new(Mutex::new(ports))).unwrap();
    m.bus.port_write(0xcf9, 1, 6);
    assert_eq!(m.bus.port_read(0xcf9, 1), 6);
    m.bus.port_write(0xcf8, 4, 0x8000_0000);
    assert_eq!((m.bus.port_read(0xcf9, 1), m.bus.port_read(0xcf8, 4)), (6, 0x8000_0000));
}

#[test]
fn bar_sizing_shows_length_and_type() {
    let m = machine();
    for (bar, expected) in BAR.into_iter().zip([0xffff_c00c, 0xffff_ffff, 0xffff_ffe1, 0xffff_f000, 0, 0]) {
        m.put(bar, u32::MAX);
        assert_eq!(m.get(bar), expected, "{bar:#x}");
    }
    m.put(0, 0);
    m.put(8, 0);
    assert_eq!((m.get(0), m.get(8)), (0x1042_1af4, 0x0180_0001));
}

#[test]
fn bar_move_takes_the_range_along_on_the_bus() {
    let m = machine();
    m.put(BAR[3], 0xe100_0000);
    assert_eq!(m.byte(0xe100_0001), 0xff, "memory decoding is off");
    m.put16(COMMAND, 2);
    assert_eq!(m.byte(0xe100_0001), 0x31);
    m.put(BAR[3], 0xe200_0000);
    assert_eq!((m.byte(0xe100_0001), m.byte(0xe200_0001)), (0xff, 0x31));
    m.put(BAR[1], 0x12);
    m.put(BAR[0], 0x4000_0000);
    assert_eq!(m.byte(0x12_4000_0003), 0x03);
    m.put(BAR[2], 0xd000);
    assert_eq!(m.bus.port_read(0xd005, 1), 0xff, "port decoding is off");
    m.put16(COMMAND, 3);
    assert_eq!(m.bus.port_read(0xd005, 2), 0x2525);
    m.put16(COMMAND, 0);
    assert_eq!((m.byte(0xe200_0001), m.bus.port_read(0xd005, 1)), (0xff, 0xff));
}

#[test]
fn bar_over_ram_apics_or_another_bar_is_not_mapped_until_the_place_is_free() {
    let m = machine();
    m.put16(COMMAND, 2);
    for forbidden in [0x1fff_f000, 0xfec0_0000, 0xfee0_0000, 0xffff_f000, 0] {
        m.put(BAR[3], forbidden);
        assert_eq!(m.byte(u64::from(forbidden)), 0xff, "{forbidden:#x}");
    }
    m.put(BAR[1], u32::MAX);
    m.put(BAR[0], u32::MAX);
    let second = Arc::new(Mutex::new(Card::new()));
    let bdf = m.host.add(None, Arc::<Mutex<Card>>::clone(&second)).unwrap();
    m.put(BAR[3], 0xe100_0000);
    m.host.config_write(bdf, 0x04, &[2, 0]);
    m.host.config_write(bdf, 0x1c, &0xe100_0000u32.to_le_bytes());
    m.bus.mmio_write(Gpa(0xe100_0000), &[1]);
    assert_eq!((lock(&m.card).log.len(), lock(&second).log.len()), (1, 0));
    m.put(BAR[3], 0xe300_0000);
    m.bus.mmio_write(Gpa(0xe100_0000), &[1]);
    assert_eq!((lock(&m.card).log.len(), lock(&second).log.len()), (1, 1));
}

#[test]
fn place_bars_gives_every_bar_a_place_and_an_interrupt_line() {
    let m = machine();
    m.host.place_bars().unwrap();
    let memory = u64::from(m.get(BAR[1])) << 32 | u64::from(m.get(BAR[0]) & !15);
    assert!(MMIO_HOLE.contains(&memory) && memory.is_multiple_of(0x4000));
    assert_eq!(m.byte(memory + 2), 2);
    assert_eq!(m.byte(u64::from(m.get(BAR[3])) + 2), 0x32);
    let port = u16::try_from(m.get(BAR[2]) & !3).unwrap();
    assert!(port >= 0xc000);
    assert_eq!(m.bus.port_read(port, 1), 0x20);
    assert_eq!(m.get(0x3c), 0x010b, "link 2 is PIRQ C: IRQ 11");
    assert_eq!(gsi_of_intx(2, 1), 18);
    assert_eq!(m.get(COMMAND) & 7, 3);
}

#[test]
fn place_bars_without_room_is_an_error() {
    let m = machine();
    let mut big = Card::new();
    big.function = PciFunction::new(PciIdentity::default());
    big.function.add_bar(0, BarKind::Memory64 { prefetchable: false }, 1 << 32);
    let bdf = m.host.add(None, Arc::new(Mutex::new(big))).unwrap();
    assert_eq!(m.host.place_bars(), Err(PciError::NoRoom { bdf, bar: 0, len: 1 << 32 }));
}

#[test]
fn add_to_taken_or_missing_slot_is_an_error() {
    let m = machine();
    let card = || Arc::new(Mutex::new(Card::new()));
    assert_eq!(m.host.add(Some(m.bdf), card()), Err(PciError::Taken(m.bdf)));
    let none = Bdf { device: 32, function: 0 };
    assert_eq!(m.host.add(Some(none), card()), Err(PciError::NoSlot(none)));
    while m.host.add(None, card()).is_ok() {}
    assert_eq!(m.host.add(None, card()), Err(PciError::Full));
    assert_eq!(m.host.slots().len(), 32);
}

#[test]
fn intx_follows_level_disable_bit_and_msi() {
    let m = machine();
    let intx = Arc::clone(lock(&m.card).function.intx());
    let pulls = || lock(&m.sink.pulls)[2];
    intx.set(true);
    intx.set(true);
    assert_eq!((pulls(), m.get(COMMAND) >> 16 & 8), (1, 8));
    m.put16(COMMAND, 1 << 10);
    assert_eq!((pulls(), m.get(COMMAND) >> 16 & 8), (0, 8));
    m.put16(COMMAND, 0);
    assert_eq!(pulls(), 1);
    m.put16(m.capability(0x11) + 2, 0x8000);
    assert_eq!(pulls(), 0);
    m.put16(m.capability(0x11) + 2, 0);
    intx.set(false);
    assert_eq!(pulls(), 0);
}

#[test]
fn msix_vector_masked_is_pending_and_sent_once_on_unmask() {
    let m = machine();
    let (msix, table) = m.msix();
    let vector = msix.vector(1);
    vector.fire();
    assert_eq!(m.sink.sent(), [(0xfee0_1000, 0x41)]);
    m.store(table + 28, 1);
    vector.fire();
    vector.fire();
    assert!(m.sink.sent().is_empty());
    assert_eq!(m.dword(table + 0x1000), 2);
    m.store(table + 0x1000, 0); // read-only
    assert_eq!(m.dword(table + 0x1000), 2);
    m.store(table + 24, 0x42);
    m.store(table + 28, 0);
    assert_eq!((m.sink.sent(), m.dword(table + 0x1000)), (vec![(0xfee0_1000, 0x42)], 0));
}

#[test]
fn msix_function_mask_and_bus_master_hold_messages() {
    let m = machine();
    let (msix, _) = m.msix();
    let control = m.capability(0x11) + 2;
    m.put16(control, 0xc000);
    msix.fire(1);
    msix.fire(0); // masked itself too
    assert!(m.sink.sent().is_empty());
    m.put16(control, 0x8000);
    assert_eq!(m.sink.sent(), [(0xfee0_1000, 0x41)]);
    m.put16(COMMAND, 2);
    msix.fire(1);
    m.put16(COMMAND, 6);
    assert!(m.sink.sent().is_empty(), "lost without bus master");
    m.put16(control, 0);
    msix.fire(1);
    assert!(m.sink.sent().is_empty() && !msix.enabled());
    msix.vector(999).fire();
}

#[test]
fn msix_table_masks_reserved_bits_and_hides_from_device() {
    let m = machine();
    let (_, table) = m.msix();
    lock(&m.card).log.clear();
    m.bus.mmio_write(Gpa(table), &[0xff; 16]);
    let mut data = [0; 16];
    m.bus.mmio_read(Gpa(table), &mut data);
    assert_eq!(data, [0xfc, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0]);
    assert!(lock(&m.card).log.is_empty());
    m.bus.mmio_write(Gpa(table + 48), &[7]); // past the third entry
    assert_eq!(lock(&m.card).log, [(0, 0x2030, vec![7])]);
}

#[test]
fn msi_sends_vector_bits_and_honours_mask() {
    let m = machine();
    let at = m.capability(0x05);
    m.put16(COMMAND, 4);
    m.put(at + 4, 0xfee0_2003);
    m.put(at + 12, 0x4060);
    m.put(at + 16, 2);
    m.put16(at + 2, 1 | 2 << 4);
    let msi = Arc::clone(lock(&m.card).function.msi().unwrap());
    msi.fire(3);
    msi.vector(9).fire();
    msi.fire(1);
    assert_eq!(m.sink.sent(), [(0xfee0_2000, 0x4063), (0xfee0_2000, 0x4063)]);
    assert_eq!(m.get(at + 20), 2);
    m.put(at + 16, 0);
    assert_eq!((m.sink.sent(), m.get(at + 20)), (vec![(0xfee0_2000, 0x4061)], 0));
}

#[test]
fn isa_bridge_routes_pirqs_as_registers_say() {
    let m = machine();
    assert_eq!(*lock(&m.sink.routes), [Some(10), Some(10), Some(11), Some(11)]);
    m.host.config_write(ISA_BRIDGE, 0x60, &[0x05, 0x80, 0x02, 0xff]);
    assert_eq!(*lock(&m.sink.routes), [Some(5), None, None, None]);
    m.host.reset();
    assert_eq!(*lock(&m.sink.routes), [Some(10), Some(10), Some(11), Some(11)]);
}

#[test]
fn ecam_reads_and_writes_config_space() {
    let m = machine();
    let ecam = Ecam::new(Arc::clone(&m.host), Gpa(0xe000_0000));
    m.bus.add_mmio(Gpa(0xe000_0000), Ecam::LEN, Arc::new(Mutex::new(ecam))).unwrap();
    assert_eq!(m.dword(0xe000_0000 + (2 << 15)), 0x1042_1af4);
    assert_eq!(m.dword(0xe000_0000 + (2 << 15) + 0x100), 0);
    assert_eq!(m.dword(0xe000_0000 + (9 << 15)), u32::MAX);
    m.store(0xe000_0000 + (2 << 15) + 0x1c, 0xe100_0000);
    m.store(0xe000_0000 + (2 << 15) + 4, 2);
    assert_eq!(m.byte(0xe100_0000), 0x30);
    m.host.place_bars().unwrap();
    assert!(m.get(BAR[0]) >= 0xe010_0000);
    // An access across two registers.
    let mut data = [0; 8];
    m.bus.mmio_read(Gpa(0xe000_0000 + (2 << 15)), &mut data);
    assert_eq!(data[..4], 0x1042_1af4u32.to_le_bytes());
    m.bus.mmio_read(Gpa(0xe000_0000 + (2 << 15) + 3), &mut data[..2]);
    assert_eq!(data[0], 0x10);
}

#[test]
fn snapshot_round_trip_restores_bars_and_vectors() {
    let m = machine();
    let (msix, table) = m.msix();
    m.store(table + 28, 1);
    msix.fire(1);
    lock(&m.card).function.intx().set(true);
    let blob = m.host.save_state();

    let n = machine();
    n.host.restore_state(&blob).unwrap();
    assert_eq!(n.host.save_state(), blob);
    assert_eq!(n.dword(table + 0x1000), 2);
    n.store(table + 28, 0);
    assert_eq!(n.sink.sent(), [(0xfee0_1000, 0x41)]);

    // Another machine, or a damaged state, is refused and changes nothing.
    let before = n.host.save_state();
    let mut bad = blob.clone();
    bad.data["functions"][2][1]["config"][0] = serde_json::json!(0);
    assert!(matches!(n.host.restore_state(&bad), Err(RestoreError::Unfit { .. })));
    let mut bad = blob.clone();
    bad.data["functions"][2][1]["msix_table"] = serde_json::json!([]);
    assert!(n.host.restore_state(&bad).is_err());
    let mut bad = blob.clone();
    bad.data["functions"] = serde_json::json!([]);
    assert!(n.host.restore_state(&bad).is_err());
    assert_eq!(n.host.save_state(), before);
}

#[test]
fn reset_turns_decoding_and_interrupts_off() {
    let m = machine();
    let (msix, table) = m.msix();
    lock(&m.card).function.intx().set(true);
    m.host.reset();
    assert_eq!((m.dword(table), m.get(COMMAND) & 0xffff, m.get(BAR[0])), (u32::MAX, 0, 0xc));
    assert!(!msix.enabled());
    assert_eq!(*lock(&m.sink.pulls), [0; 8]);
    m.host.place_bars().unwrap();
    assert_ne!(m.get(BAR[0]), 0xc);
}

#[test]
fn nonsense_accesses_are_survived() {
    let m = machine();
    let ecam = Ecam::new(Arc::clone(&m.host), Gpa(0xe000_0000));
    m.bus.add_mmio(Gpa(0xe000_0000), Ecam::LEN, Arc::new(Mutex::new(ecam))).unwrap();
    m.host.place_bars().unwrap();
    let bar = u64::from(m.get(BAR[0]) & !15);
    let mut noise = Noise(0x5eed_5eed_5eed_5eed);
    for _ in 0..100_000 {
        let (a, v) = (noise.next(), noise.next());
        let low = u32::try_from(v & 0xffff_ffff).unwrap();
        let size = [1u8, 2, 4, 4][usize::try_from(a >> 4 & 3).unwrap()];
        let len = usize::try_from(a >> 6 & 63).unwrap();
        match a & 7 {
            0 => m.bus.port_write(0xcf8, 4, 0x8000_0000 | low & 0x3fff),
            1 => m.bus.port_write(0xcf8 + u16::try_from(a >> 16 & 7).unwrap(), size, low),
            2 => drop(m.bus.port_read(0xcf8 + u16::try_from(a >> 16 & 7).unwrap(), size)),
            3 => drop(m.bus.mmio_write(Gpa(0xe000_0000 + (a >> 16 & 0x1_ffff)), &v.to_le_bytes()[..len & 7])),
            4 => drop(m.bus.mmio_read(Gpa(0xe000_0000 + (a >> 16 & 0xf_ffff)), &mut [0; 64][..len])),
            5 => drop(m.bus.mmio_write(Gpa(bar + (a >> 16 & 0x3fff)), &[low.to_le_bytes()[0]; 64][..len])),
            6 => drop(m.bus.mmio_read(Gpa(bar + (a >> 16 & 0x3fff)), &mut [0; 64][..len])),
            _ => lock(&m.card).function.msix().unwrap().fire(u16::try_from(a >> 16 & 3).unwrap()),
        }
    }
    let blob = m.host.save_state();
    m.host.restore_state(&blob).unwrap();
}
