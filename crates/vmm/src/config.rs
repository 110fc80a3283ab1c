//! What a VM is to be: plain data.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use devices::net::{CardOptions, Mac, Plug};
use devices::virtio::balloon::BalloonOptions;
use devices::virtio::block::{Image, ImageError, ImageOptions};
use devices::virtio::share::ShareOptions;
use devices::virtio::vsock::{Endpoint, VsockPlug};
use engine_bt::trace::{AddressRange, Levels};

use crate::boot::BootSource;

/// Which engine executes the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineKind {
    /// The interpreter.
    #[default]
    Interp,
    /// The binary translator (host clock).
    Bt,
    /// Linux's KVM (host clock).
    Kvm,
}

impl EngineKind {
    /// Its name, as options have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interp => "interp",
            Self::Bt => "bt",
            Self::Kvm => "kvm",
        }
    }
}

/// Where time comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub enum ClockMode {
    /// The host's clock.
    #[default]
    Host,
    /// One instruction is one nanosecond: reproducible, one vCPU only.
    Icount,
}

/// How a disk is attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DiskBus {
    /// A virtio block device.
    #[default]
    Virtio,
    /// A SATA disk of the AHCI controller.
    Ahci,
    /// A CD-ROM of the AHCI controller.
    Cdrom,
}

/// A disk.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// The image, open and locked: it outlives resets of the machine.
    pub image: Arc<Image>,
    /// What the guest reads as the disk's serial number; without one the disk's number in the machine.
    pub serial: Option<String>,
    /// Request queues; without a number one for each vCPU.
    pub queues: Option<u16>,
    /// How it is attached.
    pub bus: DiskBus,
}

impl DiskConfig {
    /// A disk on `image`.
    #[must_use]
    pub fn new(image: Image) -> Self {
        Self { image: Arc::new(image), serial: None, queues: None, bus: DiskBus::Virtio }
    }

    /// A disk on an image that is opened and locked now.
    ///
    /// # Errors
    /// When the image cannot be used.
    pub fn open(options: &ImageOptions) -> Result<Self, ImageError> {
        Image::open(options).map(Self::new)
    }
}

/// What card a driver finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CardModel {
    /// virtio-net.
    #[default]
    Virtio,
    /// Intel's 82540EM.
    E1000,
}

/// A network card.
#[derive(Clone)]
pub struct NetConfig {
    /// Its kind.
    pub model: CardModel,
    /// How it deals with its driver.
    pub options: CardOptions,
    /// Its address.
    pub mac: Mac,
    /// What it is plugged into: it outlives resets of the machine.
    pub plug: Plug,
}

impl NetConfig {
    /// A card with the address `mac` on `backend`.
    #[must_use]
    pub fn new(mac: Mac, backend: Box<dyn hostnet::Backend>) -> Self {
        Self {
            model: CardModel::default(),
            options: CardOptions::default(),
            mac,
            plug: Arc::new(Mutex::new(backend)),
        }
    }
}

impl std::fmt::Debug for NetConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetConfig")
            .field("mac", &self.mac)
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

/// A socket device.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's address.
    pub cid: u32,
    /// What it is plugged into: it outlives resets of the machine.
    pub plug: VsockPlug,
}

impl VsockConfig {
    /// A device for the guest `cid` on `endpoint`.
    #[must_use]
    pub fn new(cid: u32, endpoint: Endpoint) -> Self {
        Self { cid, plug: Arc::new(Mutex::new(endpoint)) }
    }
}

/// What the real-time clock shows at power-on. It runs with the guest's time from there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RtcBase {
    /// Coordinated universal time.
    #[default]
    Utc,
    /// So many seconds ahead of it: a time zone.
    Ahead(i64),
    /// This moment, in seconds since 1970, whatever the time is.
    At(i64),
}

/// Where a device writes what the guest sends.
pub type Sink = Box<dyn Write + Send>;

/// What is traced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TraceWhat {
    /// Port and device-memory accesses, interrupts.
    pub events: bool,
    /// The translator's doings.
    pub engine: Levels,
    /// Where in the guest the engine is traced.
    pub range: AddressRange,
}

impl Default for TraceWhat {
    fn default() -> Self {
        Self { events: true, engine: Levels::default(), range: AddressRange::default() }
    }
}

/// A VM.
pub struct VmConfig {
    /// Guest memory in bytes: a multiple of 4096, at least 1 MiB.
    pub memory_bytes: u64,
    /// vCPUs, 1 to [`crate::boot::MAX_CPUS`].
    pub cpus: u32,
    /// CPU model and features, as [`x86::cpuid::CpuModel::parse`] takes them.
    pub cpu: String,
    /// Engine.
    pub engine: EngineKind,
    /// What to boot. Kept: a reset boots it again.
    pub source: BootSource,
    /// Disks, in order.
    pub disks: Vec<DiskConfig>,
    /// Shared directories.
    pub shares: Vec<ShareOptions>,
    /// Network cards, in order; not with [`ClockMode::Icount`], for packets come when they like.
    pub nets: Vec<NetConfig>,
    /// A socket device; not with [`ClockMode::Icount`], as network cards.
    pub vsock: Option<VsockConfig>,
    /// A memory balloon.
    pub balloon: Option<BalloonOptions>,
    /// What the real-time clock shows.
    pub rtc: RtcBase,
    /// A channel to a program in the guest: the name of its port, and where it goes that the program sends.
    pub channel: Option<(String, Sink)>,
    /// Output of COM1; without one it goes nowhere (the port is there all the same).
    pub serial: Option<Sink>,
    /// Output of the ports 0x402 and 0xe9; without one the ports are not there.
    pub debugcon: Option<Sink>,
    /// Output of a virtio console (hvc0); without one the device is not there.
    pub virtio_console: Option<Sink>,
    /// The kernel is told of the VGA text display (which is always there).
    pub vga: bool,
    /// A write to port 0xf4 ends the run.
    pub isa_debug_exit: bool,
    /// A reset ends the run.
    pub no_reboot: bool,
    /// The run ends after so long.
    pub timeout: Option<Duration>,
    /// Clock.
    pub clock: ClockMode,
    /// A write of 0x5a to port 0xf5 saves the machine, drops it, restores it and goes on.
    pub save_at_marker: bool,
    /// Somebody may type: with `icount`, a guest that waits for nothing but input is not dead.
    pub input: bool,
    /// A line per event goes here.
    pub trace: Option<Sink>,
    /// Which events.
    pub trace_what: TraceWhat,
    /// `/tmp/perf-PID.map` tells `perf` what fragments are.
    pub perf_map: bool,
    /// `jit-PID.dump` in this directory tells `perf` everything about fragments.
    pub jitdump: Option<PathBuf>,
    /// The translator's vCPUs are sampled so often a second.
    pub sampling_hz: Option<u32>,
}

impl VmConfig {
    /// A machine with `source` and defaults: 128 MiB, one vCPU, no disks, no outputs.
    #[must_use]
    pub fn new(source: BootSource) -> Self {
        Self {
            memory_bytes: 128 << 20,
            cpus: 1,
            cpu: "max".to_owned(),
            engine: EngineKind::default(),
            source,
            disks: Vec::new(),
            shares: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            balloon: None,
            rtc: RtcBase::default(),
            channel: None,
            serial: None,
            debugcon: None,
            virtio_console: None,
            vga: false,
            isa_debug_exit: false,
            no_reboot: false,
            timeout: None,
            clock: ClockMode::default(),
            save_at_marker: false,
            input: false,
            trace: None,
            trace_what: TraceWhat::default(),
            perf_map: false,
            jitdump: None,
            sampling_hz: None,
        }
    }
}
