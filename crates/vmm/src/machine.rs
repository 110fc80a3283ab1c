//! The board: every device of the PC and the wires between them. A machine is built for one life from power-on to reset;
//! a reset builds another.
//!
//! | address | device | interrupt |
//! |---|---|---|
//! | ports 0x20, 0xa0, 0x4d0 | 8259 pair | to LINT0 and IO-APIC pin 0 |
//! | 0x40–0x43, 0x61 | 8254 | GSI 2 |
//! | 0x60, 0x64 | i8042: keyboard, mouse | 1, 12 |
//! | 0x70–0x71 | RTC and CMOS | 8 |
//! | 0x80, 0xed; 0x402, 0xe9 | POST codes; debug console | |
//! | 0x92 | fast A20 and reset | |
//! | 0xf4, 0xf5 | isa-debug-exit, save marker | |
//! | 0x3b4–0x3df; 0xa0000 | VGA, text mode | |
//! | 0x3f8 | COM1 | 4 |
//! | 0x510–0x51b | fw_cfg | |
//! | 0x600–0x60b | ACPI PM1a, PM timer | 9 |
//! | 0xcf8–0xcff (0xcf9) | PCI configuration (reset register) | |
//! | 0xfec00000 | IO-APIC | |
//! | 0xfed00000 | HPET | 2, 8, 16–23 |
//! | 0xfee00000 | the accessing vCPU's local APIC ([`MachineIo`]) | |
//! | PCI 00.0, 01.0 | host bridge, ISA bridge | |
//! | PCI 02.0 … | virtio disks, shared directories, network cards, sockets, balloon, random generator, channel, console; AHCI; e1000 | 16–23 |
//!
//! There are no cycles of owners: dropping the machine frees memory, disks and their locks.

use std::sync::{Arc, Mutex, MutexGuard};

use devices::ahci::{Ahci, Drive};
use devices::bus::{Bus, lock};
use devices::chipset::acpi_pm::{AcpiPm, ResetRegister};
use devices::chipset::debug_ports::{DebugConsole, ExitPort, PostPorts};
use devices::chipset::fw_cfg::{self, FwCfg};
use devices::chipset::hpet::Hpet;
use devices::chipset::i8042::I8042;
use devices::chipset::ioapic::{IOAPIC_BASE, IOAPIC_LEN, IoApic, IoApicMmio};
use devices::chipset::irq_router::{IrqRouter, PicWire};
use devices::chipset::lapic::{ApicModel, Apics, EoiSink};
use devices::chipset::pic::Pic;
use devices::chipset::pit::Pit;
use devices::chipset::port92::Port92;
use devices::chipset::rtc::{CmosConfig, Rtc};
use devices::chipset::serial::{COM1, Serial};
use devices::chipset::vga::Vga;
use devices::chipset::{A20, LegacyGate, PowerControl, TimeBase};
use devices::clock::{Clock, TimerQueue};
use devices::dma::DmaMemory;
use devices::irq::{CpuSignal, IrqLine};
use devices::net::e1000::E1000;
use devices::pci::{Bdf, HostBridge, ISA_BRIDGE, IsaBridge, PciHost, PciPorts, SharedPci};
use devices::snapshot::{RestoreError, Snapshot, StateBlob};
use devices::virtio::balloon::{Balloon, BalloonHandle, BalloonOptions};
use devices::virtio::block::{Block, BlockOptions};
use devices::virtio::channel::{Channel, ChannelHandle};
use devices::virtio::console::{Console, ConsoleHandle};
use devices::virtio::net::Net;
use devices::virtio::rng::{Entropy, Rng};
use devices::virtio::share::{Share, ShareOptions};
use devices::virtio::vsock::Vsock;
use devices::virtio::{Flavor, VirtioDevice, VirtioPci};
use engine::{Signals, Vcpu};
use engine_bt::perf_map::Profile;
use engine_bt::trace::Trace;
use engine_kvm::{KvmVcpu, KvmVm};
use guestmem::{Gpa, GuestMemory, HOLE_END, HOLE_START};
use x86::cpuid::{CpuModel, Feature};
use x86_interp::{Interp, Parts};

use crate::clock::GuestClock;
use crate::config::{
    CardModel, ClockMode, DiskBus, DiskConfig, EngineKind, NetConfig, RtcBase, TraceWhat, VsockConfig,
};
use crate::control::Control;
use crate::error::VmError;
use crate::input::Input;
use crate::io::{MachineIo, VcpuSignal};
use crate::sink::SharedSink;
use crate::trace::Tracer;

/// Seed of the random generator with `icount`.
const ICOUNT_SEED: u64 = 0x7472_656c_6c69_7321;

/// What stays the same from one life of the machine to the next.
pub(crate) struct Blueprint {
    pub memory_bytes: u64,
    pub cpus: usize,
    pub model: Arc<CpuModel>,
    pub engine: EngineKind,
    pub disks: Vec<DiskConfig>,
    pub shares: Vec<ShareOptions>,
    pub nets: Vec<NetConfig>,
    pub vsock: Option<VsockConfig>,
    pub balloon: Option<BalloonOptions>,
    pub rtc: RtcBase,
    pub channel: Option<(String, SharedSink)>,
    pub serial: Option<SharedSink>,
    pub debugcon: Option<SharedSink>,
    pub virtio_console: Option<SharedSink>,
    pub isa_debug_exit: bool,
    pub save_at_marker: bool,
    pub tracer: Option<Arc<Tracer>>,
    pub trace_what: TraceWhat,
    pub profile: Option<Shared<Profile>>,
    pub sampling_hz: Option<u32>,
    pub control: Arc<Control>,
    pub input: Arc<Input>,
}

/// Guest memory as a simple bus master sees it.
struct Dma(Arc<GuestMemory>);

impl DmaMemory for Dma {
    fn read(&self, gpa: Gpa, data: &mut [u8]) -> bool {
        self.0.read(gpa, data).is_ok()
    }
    fn write(&self, gpa: Gpa, data: &[u8]) -> bool {
        self.0.write(gpa, data).is_ok()
    }
}

type Shared<D> = Arc<Mutex<D>>;
/// Where the user types and looks.
type Consoles = (Shared<Serial>, Shared<I8042>, Shared<Vga>);

/// The user's ends of virtio devices.
#[derive(Default)]
pub(crate) struct Ends {
    pub console: Option<ConsoleHandle>,
    pub channel: Option<ChannelHandle>,
    pub balloon: Option<BalloonHandle>,
}

/// One life of the board.
pub(crate) struct Machine {
    pub mem: Arc<GuestMemory>,
    pub clock: Arc<GuestClock>,
    pub timers: Arc<TimerQueue>,
    pub signals: Vec<Arc<Signals>>,
    pub serial: Shared<Serial>,
    pub keyboard: Shared<I8042>,
    pub vga: Shared<Vga>,
    pub ends: Ends,
    pub rtc: Shared<Rtc>,
    pub power_button: Shared<AcpiPm>,
    router: Arc<IrqRouter>,
    pic: Shared<Pic>,
    virtio: Vec<Shared<VirtioPci>>,
    ahci: Option<Shared<Ahci>>,
    e1000: Vec<Shared<E1000>>,
    io: Arc<MachineIo>,
    /// Everything with state, in the order of restoring (see `devices::chipset::irq_router`).
    stateful: Vec<Shared<dyn Snapshot>>,
}

/// What the building of a board hands around.
struct Builder<'a> {
    plan: &'a Blueprint,
    mem: Arc<GuestMemory>,
    clock: Arc<GuestClock>,
    time: TimeBase,
    bus: Arc<Bus>,
    router: Arc<IrqRouter>,
    power: Arc<dyn PowerControl>,
    stateful: Vec<Shared<dyn Snapshot>>,
}

impl Builder<'_> {
    fn line(&self, gsi: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.router) as _, gsi)
    }

    fn keep<D: Snapshot + 'static>(&mut self, device: &Shared<D>) {
        self.stateful.push(Arc::clone(device) as _);
    }

    fn timers_and_power(&mut self) -> Result<(Shared<Rtc>, Shared<AcpiPm>), VmError> {
        let legacy = Arc::new(LegacyGate::default());
        let pit = Pit::new(self.time.clone(), self.line(2), Arc::clone(&legacy));
        let router = Arc::clone(&self.router);
        lock(&pit).set_probe(Box::new(move || router.line_state(2)));
        Pit::attach(&pit, &self.bus)?;
        let high = self.mem.ram().last().map_or(0, |r| r.end).saturating_sub(HOLE_END);
        let cmos = CmosConfig {
            ram_below_4g: self.plan.memory_bytes.min(HOLE_START),
            ram_above_4g: high,
            cpus: u8::try_from(self.plan.cpus).unwrap_or(u8::MAX),
        };
        let rtc = Rtc::new(self.time.clone(), self.line(8), Arc::clone(&legacy), cmos);
        lock(&rtc).set_offset_ns(self.rtc_offset_ns());
        Rtc::attach(&rtc, &self.bus)?;
        let hpet = Hpet::new(self.time.clone(), Arc::clone(&self.router) as _, legacy);
        Hpet::attach(&hpet, &self.bus)?;
        let pm = AcpiPm::new(self.time.clone(), self.line(9), Arc::clone(&self.power), WIDE_PM_TIMER);
        AcpiPm::attach(&pm, &self.bus)?;
        self.keep(&pit);
        self.keep(&rtc);
        self.keep(&hpet);
        self.keep(&pm);
        Ok((rtc, pm))
    }

    /// How far the real-time clock is ahead of UTC.
    fn rtc_offset_ns(&self) -> i64 {
        const SECOND_NS: i64 = 1_000_000_000;
        match self.plan.rtc {
            RtcBase::Utc => 0,
            RtcBase::Ahead(seconds) => seconds.saturating_mul(SECOND_NS),
            RtcBase::At(moment) => {
                let now = i64::try_from(self.clock.wall_ns()).unwrap_or(i64::MAX);
                moment.saturating_mul(SECOND_NS).saturating_sub(now)
            }
        }
    }

    fn consoles(&mut self) -> Result<Consoles, VmError> {
        let sink = match &self.plan.serial {
            Some(sink) => sink.boxed(),
            None => Box::new(std::io::sink()),
        };
        let serial = Serial::new("com1", self.time.clone(), self.line(4), sink);
        Serial::attach(&serial, &self.bus, COM1)?;
        let a20 = Arc::new(A20::default());
        let keyboard = I8042::new(self.line(1), self.line(12), Arc::clone(&a20), Arc::clone(&self.power));
        I8042::attach(&keyboard, &self.bus)?;
        let port92 = Port92::new(a20, Arc::clone(&self.power));
        Port92::attach(&port92, &self.bus)?;
        let vga = Vga::new();
        Vga::attach(&vga, &self.bus)?;
        lock(&serial).set_room_callback(self.room());
        lock(&keyboard).set_room_callback(self.room());
        self.keep(&serial);
        self.keep(&keyboard);
        self.keep(&port92);
        self.keep(&vga);
        Ok((serial, keyboard, vga))
    }

    /// What a device calls when it may accept input again.
    fn room(&self) -> Box<dyn Fn() + Send> {
        let (control, input) = (Arc::clone(&self.plan.control), Arc::clone(&self.plan.input));
        Box::new(move || {
            if input.is_waiting() {
                control.note_input();
            }
        })
    }

    fn firmware_devices(&mut self) -> Result<(), VmError> {
        let fw_cfg = FwCfg::new(Arc::new(Dma(Arc::clone(&self.mem))));
        let cpus = u16::try_from(self.plan.cpus).unwrap_or(u16::MAX).to_le_bytes().to_vec();
        lock(&fw_cfg).add_item(fw_cfg::NB_CPUS, cpus.clone());
        lock(&fw_cfg).add_item(fw_cfg::MAX_CPUS, cpus);
        FwCfg::attach(&fw_cfg, &self.bus)?;
        let post = PostPorts::new();
        PostPorts::attach(&post, &self.bus)?;
        if let Some(sink) = &self.plan.debugcon {
            DebugConsole::attach(&DebugConsole::new(sink.boxed()), &self.bus)?;
        }
        let (exit, marker) = (self.plan.isa_debug_exit, self.plan.save_at_marker);
        if exit || marker {
            ExitPort::attach(&ExitPort::new(Arc::clone(&self.power), exit, marker), &self.bus)?;
        }
        self.keep(&fw_cfg);
        self.keep(&post);
        Ok(())
    }

    /// The virtio devices: disks first, so that they are the first that a driver finds.
    fn virtio(&self) -> Result<(Vec<Shared<VirtioPci>>, Ends), VmError> {
        let icount = self.clock.mode() == ClockMode::Icount;
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        let virtio = |(_, disk): &(usize, &DiskConfig)| disk.bus == DiskBus::Virtio;
        for (index, disk) in self.plan.disks.iter().enumerate().filter(virtio) {
            let cpus = u16::try_from(self.plan.cpus).unwrap_or(u16::MAX);
            let options = BlockOptions {
                synchronous: icount,
                serial: disk.serial.clone().unwrap_or_else(|| format!("trellis{index}")),
                queues: disk.queues.unwrap_or(cpus),
                ..BlockOptions::new(&disk.image)
            };
            devices.push(Box::new(Block::new(&format!("virtio-blk.{index}"), &options)?));
        }
        for (index, share) in self.plan.shares.iter().enumerate() {
            devices.push(Box::new(Share::new(&format!("share.{index}"), share, icount)?));
        }
        for (index, net) in self.cards_of(CardModel::Virtio) {
            let name = format!("virtio-net.{index}");
            let card = Net::new(&name, net.mac, &net.plug, net.options).map_err(VmError::Net)?;
            devices.push(Box::new(card));
        }
        if let Some(vsock) = &self.plan.vsock {
            devices.push(Box::new(Vsock::new("vsock", vsock.cid, &vsock.plug).map_err(VmError::Net)?));
        }
        let mut ends = Ends::default();
        if let Some(options) = self.plan.balloon {
            let (balloon, end) = Balloon::new("balloon", options);
            devices.push(Box::new(balloon));
            ends.balloon = Some(end);
        }
        let entropy =
            if icount { Entropy::seeded(ICOUNT_SEED) } else { Entropy::host().map_err(VmError::Entropy)? };
        devices.push(Box::new(Rng::new("virtio-rng", entropy)));
        if let Some((port, sink)) = &self.plan.channel {
            let (channel, end) = Channel::new("virtio-channel", port, sink.boxed());
            devices.push(Box::new(channel));
            ends.channel = Some(end);
        }
        if let Some(sink) = &self.plan.virtio_console {
            let (console, end) = Console::new("virtio-console", sink.boxed(), 80, 25);
            devices.push(Box::new(console));
            ends.console = Some(end);
        }
        let behind_pci = |device: Box<dyn VirtioDevice>| {
            let memory = Arc::clone(&self.mem);
            // A kind that is younger than the legacy interface has no number there.
            let old = device.kind().transitional_id != 0;
            let flavor = if old { Flavor::Transitional } else { Flavor::Modern };
            Arc::new(Mutex::new(VirtioPci::new(device, memory, flavor)))
        };
        Ok((devices.into_iter().map(behind_pci).collect(), ends))
    }

    /// The AHCI controller, if there is a drive for it.
    fn ahci(&self) -> Result<Option<Shared<Ahci>>, VmError> {
        let drive = |(index, disk): (usize, &DiskConfig)| Drive {
            image: Arc::clone(&disk.image),
            cdrom: disk.bus == DiskBus::Cdrom,
            serial: disk.serial.clone().unwrap_or_else(|| format!("trellis{index}")),
        };
        let disks = self.plan.disks.iter().enumerate().filter(|(_, disk)| disk.bus != DiskBus::Virtio);
        let drives: Vec<Drive> = disks.map(drive).collect();
        if drives.is_empty() {
            return Ok(None);
        }
        let icount = self.clock.mode() == ClockMode::Icount;
        let controller = Ahci::new(&drives, &self.mem, icount).map_err(VmError::Thread)?;
        Ok(Some(Arc::new(Mutex::new(controller))))
    }

    /// Network cards of a model, with their numbers.
    fn cards_of(&self, model: CardModel) -> impl Iterator<Item = (usize, &NetConfig)> {
        self.plan.nets.iter().enumerate().filter(move |(_, net)| net.model == model)
    }

    fn e1000(&self) -> Result<Vec<Shared<E1000>>, VmError> {
        let card = |(index, net): (usize, &NetConfig)| {
            let memory = Arc::clone(&self.mem);
            let card = E1000::new(&format!("e1000.{index}"), net.mac, &net.plug, net.options, memory);
            card.map(|card| Arc::new(Mutex::new(card))).map_err(VmError::Net)
        };
        self.cards_of(CardModel::E1000).map(card).collect()
    }

    /// PCI bus 0, set up as firmware leaves it.
    fn pci(
        &mut self,
        virtio: &[Shared<VirtioPci>],
        ahci: Option<&Shared<Ahci>>,
        e1000: &[Shared<E1000>],
    ) -> Result<(), VmError> {
        let (messages, pins) = (Arc::clone(&self.router) as _, Arc::clone(&self.router) as _);
        let host = PciHost::new(&self.bus, messages, pins, self.mem.ram().to_vec());
        let reset = ResetRegister::new(Arc::clone(&self.power));
        let ports = PciPorts::new(Arc::clone(&host), Some(Arc::clone(&reset) as _));
        self.bus.add_ports(PciPorts::FIRST, 8, Arc::new(Mutex::new(ports)))?;
        let bridge: SharedPci = Arc::new(Mutex::new(HostBridge::default()));
        host.add(Some(Bdf { device: 0, function: 0 }), bridge)?;
        let isa: SharedPci = Arc::new(Mutex::new(IsaBridge::new(Arc::clone(&self.router) as _)));
        host.add(Some(ISA_BRIDGE), isa)?;
        for device in virtio {
            host.add(None, Arc::clone(device) as _)?;
            self.keep(device);
        }
        if let Some(controller) = ahci {
            host.add(None, Arc::clone(controller) as _)?;
            self.keep(controller);
        }
        for card in e1000 {
            host.add(None, Arc::clone(card) as _)?;
            self.keep(card);
        }
        host.place_bars()?;
        self.keep(&reset);
        self.keep(&Arc::new(Mutex::new(host)));
        Ok(())
    }
}

/// FADT flag TMR_VAL_EXT, as `firmware::acpi` says: the timer counts in 32 bits.
const WIDE_PM_TIMER: bool = true;
/// An environment variable with the value `census` asks the interpreter to count what hardware would meet (`x86_interp::census`).
const CENSUS: &str = "TRELLIS_INTERP";

impl Machine {
    /// A machine at power-on: memory zero, devices as after reset and firmware's set-up, the clock standing.
    ///
    /// # Errors
    /// When the host cannot give what it needs.
    pub fn new(plan: &Blueprint, mem: Arc<GuestMemory>, clock: Arc<GuestClock>) -> Result<Self, VmError> {
        let signals: Vec<Arc<Signals>> = (0..plan.cpus).map(|_| Arc::default()).collect();
        let timers = Arc::new(TimerQueue::default());
        let shared_clock: Arc<dyn Clock> = Arc::clone(&clock) as _;
        let wires = signals.iter().map(|s| Arc::new(VcpuSignal(Arc::clone(s))) as Arc<dyn CpuSignal>);
        let apics = Apics::new(apic_model(&plan.model), &shared_clock, &timers, wires.collect());
        let ioapic = IoApic::new(Arc::clone(&apics));
        let eoi_sink: std::sync::Weak<dyn EoiSink> = Arc::downgrade(&ioapic) as _;
        apics.set_eoi_sink(eoi_sink);
        let pic = Pic::new(Arc::new(PicWire::new(Arc::clone(&ioapic), Arc::clone(&apics))));
        let router = IrqRouter::new(Arc::clone(&pic) as _, Arc::clone(&ioapic), Arc::clone(&apics));
        let bus = Arc::new(Bus::default());
        Pic::attach(&pic, &bus)?;
        bus.add_mmio(IOAPIC_BASE, IOAPIC_LEN, Arc::new(Mutex::new(IoApicMmio(Arc::clone(&ioapic)))))?;

        let mut build = Builder {
            plan,
            mem: Arc::clone(&mem),
            clock: Arc::clone(&clock),
            time: TimeBase { clock: shared_clock, timers: Arc::clone(&timers) },
            bus,
            router: Arc::clone(&router),
            power: Arc::clone(&plan.control) as _,
            stateful: Vec::new(),
        };
        let (virtio, ends) = build.virtio()?;
        let ahci = build.ahci()?;
        let e1000 = build.e1000()?;
        build.pci(&virtio, ahci.as_ref(), &e1000)?;
        let (rtc, power_button) = build.timers_and_power()?;
        let (serial, keyboard, vga) = build.consoles()?;
        build.firmware_devices()?;
        let Builder { bus, mut stateful, .. } = build;
        stateful.push(Arc::new(Mutex::new(Arc::clone(&router))));
        stateful.push(Arc::clone(&pic) as _);
        stateful.push(Arc::new(Mutex::new(ioapic)));
        for lapic in apics.lapics() {
            stateful.push(Arc::new(Mutex::new(Arc::clone(lapic))));
        }
        let io = Arc::new(MachineIo::new(bus, Arc::clone(&router), Arc::clone(&clock), plan.event_tracer()));
        Ok(Self {
            mem,
            clock,
            timers,
            signals,
            serial,
            keyboard,
            vga,
            ends,
            rtc,
            power_button,
            router,
            pic,
            virtio,
            ahci,
            e1000,
            io,
            stateful,
        })
    }

    /// What firmware does to the interrupt controllers before it starts a kernel (MP 1.4 3.6.2.2, virtual wire mode).
    pub fn firmware_setup(&self) {
        lock(&self.pic).firmware_init();
        if let Some(bootstrap) = self.router.apics().lapic(0) {
            bootstrap.set_virtual_wire();
        }
    }

    /// The vCPUs, in their reset state.
    pub fn vcpus(&self, plan: &Blueprint) -> Result<Vec<Box<dyn Vcpu>>, VmError> {
        let parts = |(index, signals): (usize, &Arc<Signals>)| Parts {
            index,
            vcpus: plan.cpus,
            mem: Arc::clone(&self.mem),
            io: Arc::clone(&self.io) as _,
            signals: Arc::clone(signals),
            model: Arc::clone(&plan.model),
        };
        let kvm = match plan.engine {
            EngineKind::Kvm => Some(KvmVm::new(Arc::clone(&self.mem))?),
            EngineKind::Interp | EngineKind::Bt => None,
        };
        let vcpu = |parts| self.vcpu(plan, parts, kvm.as_ref());
        self.signals.iter().enumerate().map(parts).map(vcpu).collect()
    }

    /// An engine's vCPU.
    fn vcpu(
        &self,
        plan: &Blueprint,
        parts: Parts,
        kvm: Option<&Arc<KvmVm>>,
    ) -> Result<Box<dyn Vcpu>, VmError> {
        let index = parts.index;
        Ok(match (plan.engine, kvm) {
            (_, Some(kvm)) => Box::new(KvmVcpu::new(kvm, parts)?),
            (EngineKind::Interp | EngineKind::Kvm, None) => {
                let mut vcpu = Interp::new(parts);
                if std::env::var_os(CENSUS).is_some_and(|wanted| wanted == "census") {
                    vcpu.take_census();
                }
                Box::new(vcpu)
            }
            (EngineKind::Bt, None) => {
                let mut vcpu = engine_bt::BtVcpu::new(parts).map_err(|e| VmError::CodeMemory(e.into()))?;
                vcpu.observe(plan.engine_trace(index, &self.clock), plan.profile.clone());
                if plan.sampling_hz.is_some_and(|hz| !vcpu.profile(hz)) {
                    tracing::warn!("no signal handler for samples can be set; there is no profile");
                }
                Box::new(vcpu)
            }
        })
    }

    /// The state of every device. The vCPUs stand still. Requests in flight come to rest first.
    pub fn save_devices(&self) -> Vec<StateBlob> {
        self.stateful.iter().map(|device| lock(device).save()).collect()
    }

    /// Gives every device its state back.
    ///
    /// # Errors
    /// When a blob does not fit; some devices may have changed then.
    pub fn restore_devices(&self, blobs: &[StateBlob]) -> Result<(), RestoreError> {
        if blobs.len() != self.stateful.len() {
            return Err(RestoreError::Unfit {
                name: "machine".to_owned(),
                why: format!("{} devices were saved, this machine has {}", blobs.len(), self.stateful.len()),
            });
        }
        for (device, blob) in self.stateful.iter().zip(blobs) {
            lock(device).restore(blob)?;
        }
        self.io.find_apics();
        Ok(())
    }

    /// Takes over what survives a reset: CMOS memory and the setting of the clock.
    pub fn keep_cmos(&self, saved: &StateBlob) {
        let mut rtc: MutexGuard<'_, Rtc> = lock(&self.rtc);
        if let Err(error) = rtc.restore(saved) {
            tracing::warn!("CMOS memory is lost in the reset: {error}");
        }
        rtc.reset();
    }

    /// Offers waiting input to the devices.
    pub fn feed(&self, input: &Input) {
        input.feed(&self.serial, &self.keyboard);
    }

    /// Ends disk requests and makes what was written durable.
    pub fn shutdown(&self) {
        self.virtio.iter().for_each(|device| lock(device).shutdown());
        if let Some(controller) = &self.ahci {
            lock(controller).shutdown();
        }
        self.e1000.iter().for_each(|card| lock(card).shutdown());
    }

    /// Counters of the virtio devices, the AHCI controller and other network cards.
    pub fn counters(&self) -> Vec<(String, Vec<(&'static str, u64)>)> {
        let of = |device: &Shared<VirtioPci>| {
            let device = lock(device);
            (device.device().name().to_owned(), device.counters())
        };
        let ahci = self.ahci.iter().map(|controller| ("ahci".to_owned(), lock(controller).counters()));
        let of_card = |card: &Shared<E1000>| {
            let card = lock(card);
            (card.name().to_owned(), card.counters())
        };
        self.virtio.iter().map(of).chain(ahci).chain(self.e1000.iter().map(of_card)).collect()
    }
}

impl Blueprint {
    /// The tracer, if it wants the devices' events.
    fn event_tracer(&self) -> Option<Arc<Tracer>> {
        self.tracer.clone().filter(|_| self.trace_what.events)
    }

    /// The tracer of a vCPU's engine, if it wants that.
    fn engine_trace(&self, vcpu: usize, clock: &Arc<GuestClock>) -> Option<Trace> {
        let TraceWhat { engine: levels, range, .. } = self.trace_what;
        let (tracer, clock) = (self.tracer.clone().filter(|_| levels.any())?, Arc::clone(clock));
        Some(Trace { levels, range, write: Box::new(move |event| tracer.line(&*clock, vcpu, event)) })
    }
}

fn apic_model(model: &CpuModel) -> ApicModel {
    ApicModel {
        x2apic: model.has(Feature::X2apic),
        tsc_deadline: model.has(Feature::TscDeadline),
        phys_bits: model.phys_bits(),
    }
}
