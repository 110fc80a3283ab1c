//! The machine and its life: power-on, running, reset, save and restore, end.
//!
//! Everything that changes the machine as a whole happens in the thread that called [`Vm::run`], with all vCPUs at rest:
//! it starts the vCPU threads, sleeps until [`Control`] has an event, stops and joins them, acts, and starts them again.
//! Lock order: slot → device → interrupt controllers → local APIC → control.

use std::any::Any;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use devices::bus::lock;
use devices::clock::Clock;
use devices::snapshot::{Snapshot as _, StateBlob};
use engine::signals::Signal;
use engine::{Signals, Vcpu};
use engine_bt::perf_map::Profile;
use guestmem::GuestMemory;
use x86::cpuid::CpuModel;

use crate::boot::{self, BootError, BootSource, Platform};
use crate::clock::{GuestClock, HostCounter};
use crate::config::{ClockMode, VmConfig};
use crate::control::{Event, Woken};
use crate::debug::Debugging;
use crate::error::VmError;
use crate::handle::{Paused, VmHandle};
use crate::machine::{Blueprint, Machine};
use crate::sink::SharedSink;
use crate::snapshot::{SavedVcpu, Snapshot, SnapshotError, State};
use crate::stats::{Stats, VcpuStats};
use crate::trace::Tracer;
use crate::vcpu::{self, Alarm, Icount, Seat};

/// Why a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The guest powered the machine off.
    PoweredOff,
    /// The guest reset the machine and [`VmConfig::no_reboot`] is set.
    Reset,
    /// The guest wrote this to port 0xf4 and [`VmConfig::isa_debug_exit`] is set.
    DebugExit(u32),
    /// A vCPU met a fault while it handled a double fault (SDM 3A 6.15, interrupt 8).
    TripleFault {
        /// Which vCPU.
        vcpu: usize,
        /// Its RIP.
        rip: u64,
    },
    /// [`VmConfig::timeout`] ran out.
    Timeout,
    /// Somebody called [`VmHandle::quit`].
    Quit,
    /// With `icount`: the guest waits for an interrupt that can never come.
    Stuck {
        /// RIP of the waiting vCPU.
        rip: u64,
    },
}

/// How often a machine that is paused looks for requests.
const PAUSE_LOOK: Duration = Duration::from_millis(20);

/// Requests that a snapshot must not lose; interrupts come back from the local APICs' state.
const KEPT_SIGNALS: u32 = Signal::NMI.0 | Signal::INIT.0 | Signal::SIPI.0 | 0xff << 24;

/// Where the current machine is, for other threads.
pub(crate) type Slot = Arc<Mutex<Option<Machine>>>;

/// A virtual machine.
pub struct Vm {
    pub(crate) plan: Blueprint,
    source: BootSource,
    vga: bool,
    no_reboot: bool,
    timeout: Option<Duration>,
    input_possible: bool,
    clock_mode: ClockMode,
    pub(crate) slot: Slot,
    pub(crate) vcpus: Vec<Box<dyn Vcpu>>,
    /// What a debugger wants of them.
    pub(crate) debugging: Debugging,
    /// Counts of vCPUs that are gone, and of the whole.
    past: Stats,
}

impl Vm {
    /// A machine at power-on, its kernel loaded.
    ///
    /// # Errors
    /// When the configuration makes no machine, or the host cannot give what it needs.
    pub fn new(config: VmConfig) -> Result<Self, VmError> {
        HostCounter::prepare();
        let mut vm = Self::unbuilt(config)?;
        let mem = GuestMemory::new(vm.plan.memory_bytes)?;
        vm.power_on(mem, None)?;
        Ok(vm)
    }

    /// A machine that goes on where a saved one stopped. Memory size, CPUs, CPU model and disks of `config` must be those
    /// of the saved machine.
    ///
    /// # Errors
    /// As [`Vm::new`], and when the snapshot does not fit.
    pub fn restore(config: VmConfig, snapshot: &Snapshot) -> Result<Self, VmError> {
        HostCounter::prepare();
        let mut vm = Self::unbuilt(config)?;
        vm.rebuild(snapshot)?;
        Ok(vm)
    }

    fn unbuilt(config: VmConfig) -> Result<Self, VmError> {
        let cpus = usize::try_from(config.cpus).unwrap_or(usize::MAX);
        if !(1..=boot::MAX_CPUS).contains(&config.cpus) {
            return Err(BootError::Cpus { cpus: config.cpus, max: boot::MAX_CPUS }.into());
        }
        if config.clock == ClockMode::Icount && cpus != 1 {
            return Err(VmError::IcountCpus(config.cpus));
        }
        if config.engine != crate::EngineKind::Interp && config.clock == ClockMode::Icount {
            return Err(VmError::NoIcount(config.engine.name()));
        }
        if (!config.nets.is_empty() || config.vsock.is_some()) && config.clock == ClockMode::Icount {
            return Err(VmError::IcountNet);
        }
        let mut model = CpuModel::parse(&config.cpu)?;
        if config.engine == crate::EngineKind::Kvm {
            engine_kvm::cpuid::limit(&mut model)?;
        }
        let plan = Blueprint {
            memory_bytes: config.memory_bytes,
            cpus,
            model: Arc::new(model),
            engine: config.engine,
            disks: config.disks,
            shares: config.shares,
            nets: config.nets,
            vsock: config.vsock,
            balloon: config.balloon,
            rtc: config.rtc,
            channel: config.channel.map(|(port, sink)| (port, SharedSink::new(sink))),
            serial: config.serial.map(SharedSink::new),
            debugcon: config.debugcon.map(SharedSink::new),
            virtio_console: config.virtio_console.map(SharedSink::new),
            isa_debug_exit: config.isa_debug_exit,
            save_at_marker: config.save_at_marker,
            tracer: config.trace.map(|sink| Arc::new(Tracer::new(sink))),
            trace_what: config.trace_what,
            sampling_hz: config.sampling_hz,
            profile: profile(config.perf_map, config.jitdump.as_deref())?,
            control: Arc::default(),
            input: Arc::default(),
        };
        Ok(Self {
            past: Stats { vcpus: vec![VcpuStats::default(); plan.cpus], ..Stats::default() },
            plan,
            source: config.source,
            vga: config.vga,
            no_reboot: config.no_reboot,
            timeout: config.timeout,
            input_possible: config.input,
            clock_mode: config.clock,
            slot: Slot::default(),
            vcpus: Vec::new(),
            debugging: Debugging::default(),
        })
    }

    /// A way for other threads to reach the machine.
    #[must_use]
    pub fn handle(&self) -> VmHandle {
        VmHandle::new(Arc::clone(&self.plan.control), Arc::clone(&self.plan.input), Arc::clone(&self.slot))
    }

    // ---- building -------------------------------------------------------------------------------------------

    /// Builds a machine with `mem` and starts its kernel, as firmware would.
    fn power_on(&mut self, mem: Arc<GuestMemory>, wall_base_ns: Option<u64>) -> Result<(), VmError> {
        let cpus = u32::try_from(self.plan.cpus).unwrap_or(u32::MAX);
        self.source.recall()?;
        let entry = boot::load(&mem, &self.source, &Platform { cpus, vga: self.vga, ecam: None })?;
        self.source.let_go();
        let clock = Arc::new(GuestClock::new(self.clock_mode, wall_base_ns));
        let machine = Machine::new(&self.plan, mem, clock)?;
        machine.firmware_setup();
        self.vcpus = machine.vcpus(&self.plan)?;
        let phys_bits = self.plan.model.phys_bits();
        let bootstrap = vcpu::bootstrap_processor(&entry, phys_bits);
        for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
            match index {
                0 => vcpu.restore(&bootstrap),
                _ => vcpu.restore(&vcpu::application_processor(phys_bits)),
            }
        }
        self.debugging.arm(&mut self.vcpus);
        *lock(&self.slot) = Some(machine);
        Ok(())
    }

    /// Builds the machine of a snapshot.
    fn rebuild(&mut self, snapshot: &Snapshot) -> Result<(), VmError> {
        let state = &snapshot.state;
        self.check_fits(state)?;
        let mem = GuestMemory::new(self.plan.memory_bytes)?;
        snapshot.fill(&mem);
        let machine = Machine::new(&self.plan, mem, Arc::new(GuestClock::restore(&state.clock)))?;
        self.vcpus = machine.vcpus(&self.plan)?;
        for (vcpu, saved) in self.vcpus.iter_mut().zip(&state.vcpus) {
            vcpu.restore(&saved.state);
        }
        self.debugging.arm(&mut self.vcpus);
        machine.restore_devices(&state.devices).map_err(SnapshotError::from)?;
        for (signals, saved) in machine.signals.iter().zip(&state.vcpus) {
            signals.raise(Signal(saved.pending & KEPT_SIGNALS));
        }
        *lock(&self.slot) = Some(machine);
        Ok(())
    }

    fn check_fits(&self, state: &State) -> Result<(), SnapshotError> {
        let unfit = |what: &str, saved: &dyn std::fmt::Display, here: &dyn std::fmt::Display| {
            Err(SnapshotError::Unfit(format!("{what}: {saved} was saved, {here} is configured")))
        };
        if state.memory_bytes != self.plan.memory_bytes {
            return unfit("bytes of memory", &state.memory_bytes, &self.plan.memory_bytes);
        }
        if state.vcpus.len() != self.plan.cpus {
            return unfit("CPUs", &state.vcpus.len(), &self.plan.cpus);
        }
        if state.cpu != self.plan.model.spec() {
            return unfit("CPU model", &state.cpu, &self.plan.model.spec());
        }
        if state.clock.mode != self.clock_mode {
            return Err(SnapshotError::Unfit("it was made with another --clock".to_owned()));
        }
        Ok(())
    }

    /// Drops the machine; its counts are kept.
    fn drop_machine(&mut self) {
        for (past, vcpu) in self.past.vcpus.iter_mut().zip(&self.vcpus) {
            past.add_ended(vcpu.as_ref());
        }
        self.vcpus.clear();
        if let Some(machine) = lock(&self.slot).take() {
            machine.shutdown();
            self.past.serial_lost_bytes += lock(&machine.serial).lost_bytes();
        }
    }

    /// A hard reset: memory and CMOS keep their contents, everything else begins anew.
    fn reset(&mut self) -> Result<(), VmError> {
        let kept = lock(&self.slot).as_ref().map(|m| {
            let rtc: StateBlob = lock(&m.rtc).save();
            (Arc::clone(&m.mem), m.clock.wall_ns(), rtc)
        });
        self.drop_machine();
        let (mem, wall_ns, rtc) = kept.ok_or_else(|| VmError::Board("no machine to reset".to_owned()))?;
        self.plan.control.forget_the_guests();
        self.power_on(mem, Some(wall_ns))?;
        if let Some(machine) = lock(&self.slot).as_ref() {
            machine.keep_cmos(&rtc);
        }
        self.past.resets += 1;
        Ok(())
    }

    /// The machine as it is. It does not run meanwhile.
    ///
    /// # Errors
    /// When memory cannot be read, or an earlier error left no machine.
    pub fn save(&mut self) -> Result<Snapshot, SnapshotError> {
        let slot = lock(&self.slot);
        let machine =
            slot.as_ref().ok_or_else(|| SnapshotError::Unfit("there is no machine to save".to_owned()))?;
        // Devices first: disks come to rest and write to memory.
        let devices = machine.save_devices();
        let vcpu = |(vcpu, signals): (&mut Box<dyn Vcpu>, &Arc<Signals>)| SavedVcpu {
            state: vcpu.save(),
            pending: signals.pending() & KEPT_SIGNALS,
        };
        let state = State {
            memory_bytes: self.plan.memory_bytes,
            cpu: self.plan.model.spec().to_owned(),
            clock: machine.clock.state(),
            vcpus: self.vcpus.iter_mut().zip(&machine.signals).map(vcpu).collect(),
            devices,
        };
        Snapshot::new(state, &machine.mem)
    }

    /// Save, drop, restore, in place: what the guest asks for at port 0xf5. Goes through bytes, as a file would.
    fn save_and_restore(&mut self) -> Result<(), VmError> {
        let bytes = self.save()?.to_vec();
        self.drop_machine();
        self.rebuild(&Snapshot::from_slice(&bytes)?)?;
        self.past.restores += 1;
        Ok(())
    }

    // ---- running --------------------------------------------------------------------------------------------

    /// Runs the machine until something ends it. It can be called again after [`Outcome::Timeout`] and
    /// [`Outcome::Quit`]: the machine goes on.
    ///
    /// # Errors
    /// When the host fails us, or a thread of ours panicked.
    pub fn run(&mut self) -> Result<Outcome, VmError> {
        let end = self.timeout.map(|limit| Instant::now() + limit);
        self.plan.control.set_attended(true);
        let outcome = self.run_until(end);
        self.plan.control.set_attended(false);
        if let Some(tracer) = &self.plan.tracer {
            tracer.flush();
        }
        outcome
    }

    fn run_until(&mut self, end: Option<Instant>) -> Result<Outcome, VmError> {
        loop {
            if let Some(outcome) = self.stand_still(end)? {
                return Ok(outcome);
            }
            if let Some(event) = self.plan.control.next() {
                if let Some(outcome) = self.act(event)? {
                    return Ok(outcome);
                }
            } else if self.session(end)? == Woken::Timeout {
                return Ok(Outcome::Timeout);
            }
        }
    }

    fn act(&mut self, event: Event) -> Result<Option<Outcome>, VmError> {
        let end = match event {
            Event::PowerOff => Outcome::PoweredOff,
            Event::Reset if self.no_reboot => Outcome::Reset,
            Event::DebugExit(value) => Outcome::DebugExit(value),
            Event::TripleFault(vcpu) => Outcome::TripleFault { vcpu, rip: self.rip(vcpu) },
            Event::Stuck => Outcome::Stuck { rip: self.rip(0) },
            Event::Quit => Outcome::Quit,
            Event::Reset => {
                self.reset()?;
                return Ok(None);
            }
            Event::SaveMarker => {
                self.save_and_restore()?;
                return Ok(None);
            }
            // Whoever asked may have gone away.
            Event::Stats(to) => {
                let _gone = to.send(self.stats());
                return Ok(None);
            }
            Event::Save(to) => {
                let _gone = to.send(self.save());
                return Ok(None);
            }
            Event::Pause(to) => {
                let _gone = to.send(());
                return Ok(None);
            }
            Event::Debug(vcpu, stop) => {
                self.debugging.report(vcpu, stop, Paused::new(&self.plan.control));
                return Ok(None);
            }
            Event::Order(order) => {
                order(self);
                return Ok(None);
            }
            Event::Failed(why) => return Err(VmError::Engine(why)),
            // Its join has said more by now; a panicking thread cannot be gone without a trace.
            Event::Panic => {
                return Err(VmError::Panic { thread: "a thread".to_owned(), message: "unknown".to_owned() });
            }
        };
        Ok(Some(end))
    }

    /// Waits while the machine is held. Somebody may ask for statistics or a snapshot, or for the end, meanwhile; the end may
    /// come by itself.
    fn stand_still(&mut self, limit: Option<Instant>) -> Result<Option<Outcome>, VmError> {
        while self.plan.control.is_held() {
            while let Some(event) = self.plan.control.next_in_pause() {
                if let Some(outcome) = self.act(event)? {
                    return Ok(Some(outcome));
                }
            }
            if limit.is_some_and(|limit| Instant::now() >= limit) {
                return Ok(Some(Outcome::Timeout));
            }
            self.plan.control.wait_held(PAUSE_LOOK);
        }
        Ok(None)
    }

    fn rip(&mut self, vcpu: usize) -> u64 {
        self.vcpus.get_mut(vcpu).map_or(0, |vcpu| vcpu.save().rip)
    }

    /// Lets the vCPUs run until there is an event or the time is over.
    fn session(&mut self, end: Option<Instant>) -> Result<Woken, VmError> {
        let control = Arc::clone(&self.plan.control);
        let (clock, timers, signals) = match lock(&self.slot).as_ref() {
            Some(m) => (Arc::clone(&m.clock), Arc::clone(&m.timers), m.signals.clone()),
            None => return Err(VmError::Board("there is no machine to run".to_owned())),
        };
        if !control.begin(&signals) {
            return Ok(Woken::Event);
        }
        let started = Instant::now();
        clock.start();
        let mut timer_thread = None;
        if self.clock_mode == ClockMode::Host {
            let (control, clock, timers) = (Arc::clone(&control), Arc::clone(&clock), Arc::clone(&timers));
            let run = move || {
                let _alarm = Alarm(control);
                timers.run_on(&*clock);
            };
            let thread = Builder::new().name("timers".to_owned()).spawn(run);
            timer_thread = Some(thread.map_err(VmError::Thread)?);
        }
        let icount = || {
            (self.clock_mode == ClockMode::Icount).then(|| Icount {
                clock: Arc::clone(&clock),
                timers: Arc::clone(&timers),
                input: self.input_possible,
            })
        };
        let mut threads = Vec::new();
        let mut frozen = Vec::new();
        let mut failure = None;
        for ((index, vcpu), signals) in std::mem::take(&mut self.vcpus).into_iter().enumerate().zip(signals) {
            if self.debugging.is_frozen(index) {
                frozen.push((index, vcpu));
                continue;
            }
            let control = Arc::clone(&control);
            let seat = Seat { index, vcpu, signals, control, icount: icount(), asleep: Duration::ZERO };
            match seat.spawn() {
                Ok(thread) => threads.push((index, thread)),
                Err(error) => failure = Some(VmError::Thread(error)),
            }
        }
        let woken = if failure.is_some() { Woken::Event } else { self.attend(end) };
        control.halt();
        let joined: Vec<_> = threads.into_iter().map(|(index, thread)| (index, join(thread))).collect();
        timers.stop();
        let timers_joined = timer_thread.map(join);
        clock.stop();
        let elapsed = started.elapsed();
        self.past.elapsed += elapsed;
        for (index, left) in joined {
            let left = left?;
            frozen.push((index, left.vcpu));
            if let Some(past) = self.past.vcpus.get_mut(index) {
                let busy = elapsed.saturating_sub(left.asleep);
                past.busy += busy;
                // Behind a wake-up it may have waited asleep.
                past.waiting += left.waiting.min(busy.saturating_sub(left.cpu));
                past.asleep += left.asleep;
                past.cpu += left.cpu;
            }
        }
        let mut back = frozen;
        back.sort_by_key(|&(index, _)| index);
        self.vcpus = back.into_iter().map(|(_, vcpu)| vcpu).collect();
        timers_joined.transpose()?;
        failure.map_or(Ok(woken), Err)
    }

    /// While the vCPUs run: moves input, waits for events.
    fn attend(&self, end: Option<Instant>) -> Woken {
        loop {
            if let Some(machine) = lock(&self.slot).as_ref() {
                machine.feed(&self.plan.input);
            }
            match self.plan.control.wait(end) {
                Woken::Input => {}
                woken => return woken,
            }
        }
    }

    /// Counts so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = self.past.clone();
        for (total, vcpu) in stats.vcpus.iter_mut().zip(&self.vcpus) {
            total.add(vcpu.as_ref());
        }
        stats.memory_bytes = self.plan.memory_bytes;
        if let Some(machine) = lock(&self.slot).as_ref() {
            stats.guest_ns = machine.clock.now().0;
            stats.resident_bytes = machine.mem.resident_bytes();
            stats.devices = machine.counters();
            stats.serial_lost_bytes += lock(&machine.serial).lost_bytes();
        }
        stats
    }
}

/// The files that tell `perf` about fragments, if any are wanted.
fn profile(map: bool, jitdump: Option<&Path>) -> Result<Option<Arc<Mutex<Profile>>>, VmError> {
    if !map && jitdump.is_none() {
        return Ok(None);
    }
    Ok(Some(Arc::new(Mutex::new(Profile::open(map, jitdump)?))))
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.plan.control.set_attended(false);
        self.drop_machine();
    }
}

/// Joins a thread of ours; a panic is told with its message.
fn join<T>(thread: JoinHandle<T>) -> Result<T, VmError> {
    let name = thread.thread().name().unwrap_or("a thread").to_owned();
    thread.join().map_err(|payload| VmError::Panic { thread: name, message: panic_text(payload.as_ref()) })
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
