//! One port: its registers, its command list, and the thread that executes commands (AHCI 3.3, 5.3).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use guestmem::{Gpa, GuestMemory};
use serde::{Deserialize, Serialize};

use super::ata::Disk;
use super::atapi::{Cdrom, Sense};
use super::registers::{cmd, event, reg, status};
use super::transfer::{Places, Trouble};
use super::{Drive, Lines};
use crate::bus::lock;

/// Device present, first generation speed, active (AHCI 3.3.10).
const LINK_UP: u32 = 0x113;
/// Task file after a reset: ready; error 1 says that the device's own test passed (ATA8-ACS 7.9).
const AFTER_RESET: u16 = 0x0100 | status::GOOD as u16;
/// Signatures (AHCI 3.3.9).
const DISK_SIGNATURE: u32 = 0x0000_0101;
const CDROM_SIGNATURE: u32 = 0xeb14_0101;
/// Offsets of FISes in the area where they are received (AHCI 4.2.1).
const PIO_SETUP_AT: u64 = 0x20;
const REGISTER_AT: u64 = 0x40;
const DEVICE_BITS_AT: u64 = 0x58;
/// SRST in the device control register (ATA8-ACS 7.9).
const SRST: u8 = 1 << 2;

/// A command as its FIS says it (SATA 3.0 10.3.4).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Command {
    pub command: u8,
    pub features: u16,
    /// 48 bits.
    pub lba: u64,
    pub device: u8,
    pub count: u16,
    /// The packet, for PACKET.
    pub packet: [u8; 16],
}

/// How a command that went well is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tell {
    /// By a register FIS.
    Register,
    /// By a PIO set-up FIS: data was read by "programmed I/O".
    Pio,
    /// By a set-device-bits FIS, for the tag of a queued command.
    Queued(u8),
}

/// A command that went well.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reply {
    pub tell: Tell,
    /// The count that the registers show afterwards.
    pub count: u16,
}

/// A command that did not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    /// The error register.
    pub error: u8,
    /// Events of the adapter itself.
    pub events: u32,
    /// The tag, if the command was queued.
    pub queued: Option<u8>,
}

impl Refusal {
    pub const fn error(error: u8) -> Self {
        Self { error, events: 0, queued: None }
    }
}

impl From<Trouble> for Refusal {
    fn from(trouble: Trouble) -> Self {
        let events = match trouble {
            Trouble::Overflow => event::OFS,
            Trouble::NoMemory => event::HBFS,
        };
        Self { error: status::ABRT, events, queued: None }
    }
}

/// What a drive did, for the statistics.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub commands: AtomicU64,
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
    pub failures: AtomicU64,
}

/// What is behind the port.
enum Device {
    Disk(Disk),
    Cdrom(Cdrom),
}

impl Device {
    fn new(drive: &Drive, counters: &Arc<Counters>) -> Self {
        if drive.cdrom {
            Self::Cdrom(Cdrom::new(&drive.image, &drive.serial, counters))
        } else {
            Self::Disk(Disk::new(&drive.image, &drive.serial, counters))
        }
    }

    fn signature(&self) -> u32 {
        match self {
            Self::Disk(_) => DISK_SIGNATURE,
            Self::Cdrom(_) => CDROM_SIGNATURE,
        }
    }

    fn execute(&mut self, command: &Command, places: &mut Places) -> Result<Reply, Refusal> {
        match self {
            Self::Disk(disk) => disk.execute(command, places),
            Self::Cdrom(cdrom) => cdrom.execute(command, places),
        }
    }

    fn reset(&mut self) {
        match self {
            Self::Disk(disk) => disk.reset(),
            Self::Cdrom(cdrom) => cdrom.reset(),
        }
    }

    fn sync(&self) -> io::Result<()> {
        match self {
            Self::Disk(disk) => disk.sync(),
            Self::Cdrom(_) => Ok(()),
        }
    }
}

/// The device's part of a snapshot.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct DeviceState {
    write_cache: bool,
    failed_tag: Option<u8>,
    sense: Sense,
}

/// A port's registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PortState {
    clb: u64,
    fb: u64,
    is: u32,
    ie: u32,
    cmd: u32,
    /// Status, and error in the high byte.
    tfd: u16,
    sig: u32,
    sctl: u32,
    sact: u32,
    ci: u32,
    /// A software reset was begun.
    srst: bool,
    /// A command failed: nothing is executed before the guest has stopped and started the list (AHCI 6.2.2).
    halted: bool,
    /// The slot that was executed last.
    last: u8,
    sectors: u64,
    cdrom: bool,
    device: DeviceState,
}

/// What a port's thread and the register accesses share.
struct Live {
    state: PortState,
    /// INV-AHCI-1.
    busy: bool,
    /// Changes when commands are given up: what one that is still under way says then concerns nobody.
    epoch: u32,
    bus_master: bool,
    paused: bool,
    stop: bool,
}

struct Shared {
    index: usize,
    memory: Arc<GuestMemory>,
    lines: Arc<Lines>,
    live: Mutex<Live>,
    device: Mutex<Device>,
    counters: Arc<Counters>,
    work: Condvar,
    rested: Condvar,
}

/// A command taken from the list.
struct Job {
    slot: u8,
    epoch: u32,
    header: u64,
    fb: Option<u64>,
}

/// What became of it.
enum Outcome {
    /// A FIS was sent, or none: registers of the device, events.
    Done {
        tfd: Option<u16>,
        queued: Option<u8>,
        events: u32,
    },
    /// A software reset begins or ends.
    Reset {
        begins: bool,
    },
    Failed {
        tfd: u16,
        events: u32,
    },
}

fn wait<'a>(condition: &Condvar, guard: MutexGuard<'a, Live>) -> MutexGuard<'a, Live> {
    condition.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

impl Live {
    fn take(&mut self) -> Option<Job> {
        let state = &mut self.state;
        let ready = self.bus_master && !self.busy && !self.paused && !self.stop && !state.halted;
        if !ready || state.cmd & cmd::ST == 0 || state.ci == 0 {
            return None;
        }
        // Round and round, so that no slot starves.
        let turn = u32::from(state.last) + 1;
        let next = (state.ci.rotate_right(turn % 32).trailing_zeros() + turn) % 32;
        let slot = u8::try_from(next).unwrap_or(0);
        state.last = slot;
        self.busy = true;
        let fb = (state.cmd & cmd::FRE != 0).then_some(state.fb);
        let header = state.clb.wrapping_add(32 * u64::from(slot));
        Some(Job { slot, epoch: self.epoch, header, fb })
    }
}

impl Shared {
    fn assert_events(&self, state: &mut PortState, events: u32) {
        let new = events & !state.is;
        state.is |= events;
        self.lines.port(self.index, state.is & state.ie != 0, new & state.ie != 0);
    }

    /// The thread's life.
    fn run(&self) {
        let mut live = lock(&self.live);
        while !live.stop {
            live = match live.take() {
                Some(job) => self.work_off(live, &job),
                None => wait(&self.work, live),
            };
        }
    }

    /// Everything that is there to do, in the calling thread.
    fn run_here(&self) {
        let mut live = lock(&self.live);
        while let Some(job) = live.take() {
            live = self.work_off(live, &job);
        }
    }

    fn work_off<'a>(&'a self, live: MutexGuard<'a, Live>, job: &Job) -> MutexGuard<'a, Live> {
        drop(live);
        let outcome = self.execute(job);
        let mut live = lock(&self.live);
        live.busy = false;
        self.rested.notify_all();
        if live.epoch == job.epoch {
            self.conclude(&mut live.state, job, &outcome);
        }
        live
    }

    fn conclude(&self, state: &mut PortState, job: &Job, outcome: &Outcome) {
        match *outcome {
            Outcome::Done { tfd, queued, events } => {
                state.ci &= !(1 << job.slot);
                if let Some(tag) = queued {
                    state.sact &= !(1u32 << tag);
                }
                state.tfd = tfd.unwrap_or(state.tfd);
                self.assert_events(state, events);
            }
            Outcome::Reset { begins } => {
                state.ci &= !(1 << job.slot);
                if state.srst && !begins {
                    state.tfd = AFTER_RESET;
                    state.sig = lock(&self.device).signature();
                }
                state.srst = begins;
            }
            Outcome::Failed { tfd, events } => {
                state.tfd = tfd;
                state.halted = true;
                self.assert_events(state, events);
            }
        }
    }

    fn execute(&self, job: &Job) -> Outcome {
        self.counters.commands.fetch_add(1, Ordering::Relaxed);
        let no_memory = Outcome::Failed { tfd: AFTER_RESET, events: event::HBFS };
        // The command header (AHCI 4.2.2).
        let (mut header, mut fis) = ([0; 16], [0; 64]);
        if self.memory.read(Gpa(job.header), &mut header).is_err() {
            return no_memory;
        }
        let [_, _, l0, l1, _, _, _, _, t0, t1, t2, t3, t4, t5, t6, t7] = header;
        let table = u64::from_le_bytes([t0, t1, t2, t3, t4, t5, t6, t7]) & !0x7f;
        let mut command = Command::default();
        let readable = self.memory.read(Gpa(table), &mut fis).is_ok()
            && self.memory.read(Gpa(table.wrapping_add(0x40)), &mut command.packet).is_ok();
        if !readable {
            return no_memory;
        }
        if fis[0] != 0x27 {
            return self.failed(job, Refusal::error(status::ABRT));
        }
        if fis[1] & 0x80 == 0 {
            return Outcome::Reset { begins: self.control(fis[15]) };
        }
        let byte = |at: usize| u64::from(fis[at]);
        command.command = fis[2];
        command.features = u16::from_le_bytes([fis[3], fis[11]]);
        command.lba = byte(4) | byte(5) << 8 | byte(6) << 16 | byte(8) << 24 | byte(9) << 32 | byte(10) << 40;
        command.device = fis[7];
        command.count = u16::from_le_bytes([fis[12], fis[13]]);
        let mut places = Places::new(&self.memory, table, u16::from_le_bytes([l0, l1]));
        let result = lock(&self.device).execute(&command, &mut places);
        // PRDBC: how much was moved. A header that is no memory any more is the guest's own doing.
        let moved = u32::try_from(places.done).unwrap_or(u32::MAX).to_le_bytes();
        let _gone = self.memory.write(Gpa(job.header.wrapping_add(4)), &moved);
        match result {
            Ok(reply) => self.done(job, &command, reply, places.done),
            Err(refusal) => self.failed(job, refusal),
        }
    }

    /// The device control register; says whether it asks for a reset.
    fn control(&self, control: u8) -> bool {
        let resets = control & SRST != 0;
        if resets {
            lock(&self.device).reset();
        }
        resets
    }

    fn done(&self, job: &Job, command: &Command, reply: Reply, moved: u64) -> Outcome {
        let tfd = u16::from(status::GOOD);
        match reply.tell {
            Tell::Register => {
                self.post(job, REGISTER_AT, &register_fis(tfd, command, reply.count));
                Outcome::Done { tfd: Some(tfd), queued: None, events: event::DHRS }
            }
            Tell::Pio => {
                let mut fis = register_fis(tfd, command, reply.count);
                (fis[0], fis[1], fis[2]) = (0x5f, 0x60, status::DRDY | status::DRQ);
                fis[15] = status::GOOD;
                fis[16..18].copy_from_slice(&u16::try_from(moved).unwrap_or(0).to_le_bytes());
                self.post(job, PIO_SETUP_AT, &fis);
                Outcome::Done { tfd: Some(tfd), queued: None, events: event::PSS }
            }
            Tell::Queued(tag) => {
                self.post(job, DEVICE_BITS_AT, &device_bits_fis(tfd, 1 << tag));
                // Status and error only; BSY and DRQ are not touched (SATA 3.0 10.3.6).
                Outcome::Done { tfd: Some(tfd), queued: Some(tag), events: event::SDBS }
            }
        }
    }

    fn failed(&self, job: &Job, refusal: Refusal) -> Outcome {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        let tfd = u16::from_le_bytes([status::GOOD | status::ERR, refusal.error]);
        let told = if refusal.queued.is_some() {
            self.post(job, DEVICE_BITS_AT, &device_bits_fis(tfd, 0));
            event::SDBS
        } else {
            self.post(job, REGISTER_AT, &register_fis(tfd, &Command::default(), 0));
            event::DHRS
        };
        Outcome::Failed { tfd, events: told | event::TFES | refusal.events }
    }

    /// A FIS to the guest, if it takes any. An area that is no memory is the guest's own loss.
    fn post(&self, job: &Job, at: u64, fis: &[u8]) {
        if let Some(fb) = job.fb {
            let _lost = self.memory.write(Gpa(fb.wrapping_add(at)), fis);
        }
    }

    /// Gives commands up and waits for the one under way.
    fn rest(&self) -> MutexGuard<'_, Live> {
        let mut live = lock(&self.live);
        live.epoch = live.epoch.wrapping_add(1);
        while live.busy {
            live = wait(&self.rested, live);
        }
        live
    }
}

/// SATA 3.0 10.3.5.
fn register_fis(tfd: u16, command: &Command, count: u16) -> [u8; 20] {
    let mut fis = [0; 20];
    let [state, error] = tfd.to_le_bytes();
    fis[..4].copy_from_slice(&[0x34, 0x40, state, error]);
    let lba = command.lba.to_le_bytes();
    fis[4..7].copy_from_slice(&lba[..3]);
    fis[7] = command.device;
    fis[8..11].copy_from_slice(&lba[3..6]);
    fis[12..14].copy_from_slice(&count.to_le_bytes());
    fis
}

/// SATA 3.0 10.3.6.
fn device_bits_fis(tfd: u16, finished: u32) -> [u8; 8] {
    let [state, error] = tfd.to_le_bytes();
    let [f0, f1, f2, f3] = finished.to_le_bytes();
    [0xa1, 0x40, state & 0x77, error, f0, f1, f2, f3]
}

/// A port with its drive.
pub(super) struct Port {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Port {
    pub fn new(
        index: usize,
        drive: &Drive,
        memory: &Arc<GuestMemory>,
        lines: &Arc<Lines>,
        synchronous: bool,
    ) -> io::Result<Self> {
        let counters = Arc::<Counters>::default();
        let device = Device::new(drive, &counters);
        let state = PortState {
            clb: 0,
            fb: 0,
            is: 0,
            ie: 0,
            cmd: 0,
            tfd: AFTER_RESET,
            sig: device.signature(),
            sctl: 0,
            sact: 0,
            ci: 0,
            srst: false,
            halted: false,
            last: 31,
            sectors: drive.image.sectors(),
            cdrom: drive.cdrom,
            device: DeviceState::default(),
        };
        let live = Live { state, busy: false, epoch: 0, bus_master: false, paused: false, stop: false };
        let shared = Arc::new(Shared {
            index,
            memory: Arc::clone(memory),
            lines: Arc::clone(lines),
            live: Mutex::new(live),
            device: Mutex::new(device),
            counters,
            work: Condvar::new(),
            rested: Condvar::new(),
        });
        let thread = if synchronous {
            None
        } else {
            let ours = Arc::clone(&shared);
            Some(std::thread::Builder::new().name(format!("ahci/{index}")).spawn(move || ours.run())?)
        };
        Ok(Self { shared, thread })
    }

    pub fn counters(&self) -> [u64; 4] {
        let c = &self.shared.counters;
        [&c.commands, &c.bytes_read, &c.bytes_written, &c.failures].map(|n| n.load(Ordering::Relaxed))
    }

    fn kick(&self) {
        if self.thread.is_some() { self.shared.work.notify_one() } else { self.shared.run_here() }
    }

    pub fn set_bus_master(&self, on: bool) {
        let mut live = lock(&self.shared.live);
        let rises = on && !live.bus_master;
        live.bus_master = on;
        drop(live);
        if rises {
            self.kick();
        }
    }

    pub fn read(&self, register: u64) -> u32 {
        let live = lock(&self.shared.live);
        let state = &live.state;
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        match register {
            reg::CLB => low(state.clb),
            reg::CLBU => low(state.clb >> 32),
            reg::FB => low(state.fb),
            reg::FBU => low(state.fb >> 32),
            reg::IS => state.is,
            reg::IE => state.ie,
            reg::CMD => {
                let runs = state.cmd & cmd::ST != 0;
                let fr = if state.cmd & cmd::FRE != 0 { cmd::FR } else { 0 };
                let cr = if runs || live.busy { cmd::CR } else { 0 };
                let slot = if runs { u32::from(state.last % 32) << 8 } else { 0 };
                state.cmd | cmd::SUD_POD | fr | cr | slot
            }
            reg::TFD => state.tfd.into(),
            reg::SIG => state.sig,
            reg::SSTS => LINK_UP,
            reg::SCTL => state.sctl,
            reg::SERR => 0,
            reg::SACT => state.sact,
            reg::CI => state.ci,
            _ => 0,
        }
    }

    pub fn write(&self, register: u64, value: u32) {
        let mut live = lock(&self.shared.live);
        let state = &mut live.state;
        let high = u64::from(value) << 32;
        match register {
            // A list is 1 KiB and aligned to that, a FIS area 256 bytes.
            reg::CLB => state.clb = state.clb & !0xffff_ffff | u64::from(value & !0x3ff),
            reg::CLBU => state.clb = state.clb & 0xffff_ffff | high,
            reg::FB => state.fb = state.fb & !0xffff_ffff | u64::from(value & !0xff),
            reg::FBU => state.fb = state.fb & 0xffff_ffff | high,
            reg::IS => {
                state.is &= !value;
                self.shared.assert_events(state, 0);
            }
            reg::IE => {
                let new = value & event::ALL & !state.ie & state.is != 0;
                state.ie = value & event::ALL;
                self.shared.lines.port(self.shared.index, state.is & state.ie != 0, new);
            }
            reg::CMD => self.command(&mut live, value),
            reg::SCTL => {
                let resets = state.sctl & 0xf == 1 && value & 0xf != 1;
                state.sctl = value & 0xfff;
                drop(live);
                if resets {
                    self.reset_device();
                }
                return;
            }
            reg::SACT if state.cmd & cmd::ST != 0 => state.sact |= value,
            reg::CI if state.cmd & cmd::ST != 0 => state.ci |= value,
            _ => {}
        }
        drop(live);
        if matches!(register, reg::CI | reg::CMD) {
            self.kick();
        }
    }

    fn command(&self, live: &mut Live, value: u32) {
        let state = &mut live.state;
        let before = state.cmd;
        state.cmd = value & cmd::WRITABLE;
        if value & cmd::CLO != 0 {
            state.tfd &= !u16::from(status::BSY | status::DRQ);
        }
        if before & cmd::ST != 0 && value & cmd::ST == 0 {
            (state.ci, state.sact) = (0, 0);
            live.epoch = live.epoch.wrapping_add(1);
        } else if before & cmd::ST == 0 && value & cmd::ST != 0 {
            state.halted = false;
            state.last = 31;
        }
    }

    /// COMRESET (AHCI 10.4.2): the drive begins anew, the port keeps its addresses.
    fn reset_device(&self) {
        let mut live = self.shared.rest();
        let mut device = lock(&self.shared.device);
        device.reset();
        let state = &mut live.state;
        (state.tfd, state.sig) = (AFTER_RESET, device.signature());
        (state.ci, state.sact, state.srst) = (0, 0, false);
    }

    /// What a reset of the adapter leaves.
    pub fn reset(&self) {
        self.reset_device();
        let mut live = lock(&self.shared.live);
        let state = &mut live.state;
        (state.clb, state.fb, state.is, state.ie) = (0, 0, 0, 0);
        (state.cmd, state.sctl, state.halted, state.last) = (0, 0, false, 31);
        self.shared.lines.port(self.shared.index, false, false);
    }

    pub fn save(&self) -> PortState {
        let mut live = lock(&self.shared.live);
        live.paused = true;
        while live.busy {
            live = wait(&self.shared.rested, live);
        }
        live.paused = false;
        let mut state = live.state.clone();
        state.device = match &*lock(&self.shared.device) {
            Device::Disk(disk) => DeviceState {
                write_cache: disk.write_cache,
                failed_tag: disk.failed_tag,
                sense: Sense::default(),
            },
            Device::Cdrom(cdrom) => DeviceState { sense: cdrom.sense, ..DeviceState::default() },
        };
        drop(live);
        self.kick();
        state
    }

    /// Whether a saved state is of such a port.
    pub fn fits(&self, saved: &PortState) -> Result<(), String> {
        let live = lock(&self.shared.live);
        let (ours, theirs) = ((live.state.sectors, live.state.cdrom), (saved.sectors, saved.cdrom));
        if ours != theirs {
            let named = |(sectors, cdrom): (u64, bool)| {
                format!("a {} of {sectors} sectors", if cdrom { "CD-ROM" } else { "disk" })
            };
            return Err(format!("it had {}, this one has {}", named(theirs), named(ours)));
        }
        if saved.last > 31 || saved.device.failed_tag.is_some_and(|tag| tag > 31) {
            return Err("it speaks of slots that there are not".to_owned());
        }
        Ok(())
    }

    /// Takes on a state that fits.
    pub fn restore(&self, saved: PortState) {
        let mut live = self.shared.rest();
        match &mut *lock(&self.shared.device) {
            Device::Disk(disk) => {
                disk.write_cache = saved.device.write_cache;
                disk.failed_tag = saved.device.failed_tag;
            }
            Device::Cdrom(cdrom) => cdrom.sense = saved.device.sense,
        }
        live.state = saved;
        let is = (live.state.is & live.state.ie) != 0;
        self.shared.lines.port(self.shared.index, is, false);
        drop(live);
        self.kick();
    }

    /// Ends the thread; what was written is made durable.
    pub fn stop(&mut self) {
        {
            let mut live = self.shared.rest();
            if live.stop {
                return;
            }
            live.stop = true;
            self.shared.work.notify_all();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(port = self.shared.index, "the thread of a drive panicked");
        }
        if let Err(error) = lock(&self.shared.device).sync() {
            tracing::error!(port = self.shared.index, %error, "could not make the disk durable");
        }
    }
}
