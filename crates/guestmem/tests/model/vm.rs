//! A machine of one page with two lines, two vCPUs, and devices.
//!
//! The guest's own loads and stores are plain x86 accesses: acquire and release. The bytes of a line are a number that grows.

use std::ops::Range;

use guestmem::protocol::{Everybody, PageTrace, Unsettled};
use guestmem::sync::{AtomicU32, Ordering};
use guestmem::{Gfn, Invalidation, Requests};
use loom::sync::Arc;

/// The page.
const PAGE: Range<Gfn> = Gfn(1)..Gfn(2);
const LINES: usize = 2;

/// The rule that is broken, if any.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    Nothing,
    /// A decoder reads bytes, then traces their line, and does not compare.
    ReadBeforeTracing,
    /// Whoever traces lines waits for no writer.
    NobodyWaits,
    /// Lines are cleared before everybody was told (INV-TR-3).
    ClearBeforeTelling,
    /// A vCPU writes on the fast way that it has just got without acting on what it was told (`callout::missed`).
    FillsWithoutLooking,
    /// Translated code writes beside code though the alarm rings (`exec::traced`).
    PassesWithoutLooking,
    /// The dispatcher enters code without a look at what was told while it was traced (`BtVcpu::run_loop`).
    EntersWithoutLooking,
    /// A signal that is pending does not ring the alarm again (`Signals::raise`).
    RingsOnlyFirst,
}

/// What others see of a vCPU: `x86_interp::holder::VcpuHolder` and `engine::Signals`.
pub struct Shared {
    pub requests: Requests,
    /// `Signal::INVALIDATE` of the pending word.
    pending: AtomicU32,
    /// The frame's alarm.
    alarm: AtomicU32,
    rings_only_first: bool,
}

impl Shared {
    fn new(broken: Broken) -> Self {
        Self {
            requests: Requests::default(),
            pending: AtomicU32::new(0),
            alarm: AtomicU32::new(0),
            rings_only_first: broken == Broken::RingsOnlyFirst,
        }
    }

    /// `Signals::raise`.
    fn raise(&self) {
        let pending = self.pending.fetch_or(1, Ordering::SeqCst);
        if pending == 0 || !self.rings_only_first {
            self.alarm.store(1, Ordering::SeqCst);
        }
    }

    /// `BtVcpu::with_knobs`.
    pub fn watch(&self) {
        self.requests.watch_code();
    }

    /// The lines told of.
    pub fn take_written(&self) -> u64 {
        self.requests.take_written().into_iter().fold(0, |lines, (_, more)| lines | more)
    }
}

/// What all threads share.
pub struct Vm {
    pub page: PageTrace,
    unsettled: Unsettled,
    pub vcpus: [Shared; 2],
    bytes: [AtomicU32; LINES],
    /// Where a writer of line 0 says which bytes it has written; in another page.
    announced: AtomicU32,
    broken: Broken,
    /// What happened, in the order of this run: who (2: a device), what, at which line, with which bytes.
    history: std::sync::Mutex<Vec<(usize, &'static str, usize, u32)>>,
}

/// `guestmem::trace::Frame`, with `guestmem::holder` for two holders.
struct Both<'a> {
    vm: &'a Vm,
    except: Option<usize>,
}

impl Everybody for Both<'_> {
    fn write_protect(&self) {
        if self.vm.broken == Broken::NobodyWaits {
            return;
        }
        for (_, vcpu) in self.vm.vcpus.iter().enumerate().filter(|(n, _)| Some(*n) != self.except) {
            vcpu.requests.ask((PAGE, Invalidation::WriteProtect), || vcpu.raise());
        }
    }

    fn code_changed(&self, lines: u64) {
        if self.vm.broken != Broken::ClearBeforeTelling {
            self.vm.tell(lines);
        }
    }
}

impl Vm {
    pub fn new(broken: Broken) -> Arc<Self> {
        Arc::new(Self {
            page: PageTrace::default(),
            unsettled: Unsettled::default(),
            vcpus: [Shared::new(broken), Shared::new(broken)],
            bytes: [AtomicU32::new(0), AtomicU32::new(0)],
            announced: AtomicU32::new(0),
            broken,
            history: std::sync::Mutex::default(),
        })
    }

    fn happened(&self, who: usize, what: &'static str, line: usize, bytes: u32) {
        self.history.lock().unwrap().push((who, what, line, bytes));
    }

    fn history(&self) -> String {
        let history = self.history.lock().unwrap();
        history.iter().map(|(who, what, line, bytes)| format!("\n  {who}: {what} {line} ({bytes})")).collect()
    }

    /// `GuestMemory::tell_code_changed`.
    pub fn tell(&self, lines: u64) {
        for vcpu in &self.vcpus {
            vcpu.requests.code_changed(PAGE.start, lines, || vcpu.raise());
        }
    }

    /// `GuestMemory::trace_code`.
    pub fn trace(&self, line: usize, me: Option<usize>) -> bool {
        self.page.trace(1 << line, &self.unsettled, &Both { vm: self, except: me })
    }

    /// `GuestMemory::note_write`.
    fn note_write(&self, line: usize) -> bool {
        let hit = self.page.note_write(1 << line, &self.unsettled, &Both { vm: self, except: None });
        if hit && self.broken == Broken::ClearBeforeTelling {
            self.tell(1 << line);
        }
        hit
    }

    /// `GuestMemory::untrace`.
    pub fn untrace(&self) {
        self.page.clear(u64::MAX, &self.unsettled, &Both { vm: self, except: None });
    }

    /// `GuestMemory::write`: a device, or an instruction that the interpreter does.
    pub fn dma(&self, line: usize, value: u32) -> bool {
        self.bytes[line].store(value, Ordering::Release);
        self.happened(2, "slow write of", line, value);
        let hit = self.note_write(line);
        self.happened(2, if hit { "has told of" } else { "hit nothing in" }, line, value);
        hit
    }

    /// The guest says that line 0 is written: a store to a page without code.
    pub fn announce(&self, value: u32) {
        self.announced.store(value, Ordering::Release);
    }

    fn bytes(&self, line: usize) -> u32 {
        self.bytes[line].load(Ordering::Acquire)
    }
}

/// A fragment.
#[derive(Clone, Copy)]
struct Fragment {
    made_of: u32,
    /// `cache::State::Live`, against suspended.
    live: bool,
}

/// A vCPU that translates, one fragment for each line.
pub struct Vcpu {
    pub vm: Arc<Vm>,
    me: usize,
    /// Both TLBs let it write the page.
    fast: bool,
    fragments: [Option<Fragment>; LINES],
    /// The oldest bytes of each line that it may execute.
    at_least: [u32; LINES],
}

impl Vcpu {
    /// `BtVcpu::with_knobs`.
    pub fn new(vm: &Arc<Vm>, me: usize) -> Self {
        let vcpu =
            Self { vm: Arc::clone(vm), me, fast: false, fragments: [None; LINES], at_least: [0; LINES] };
        vcpu.shared().watch();
        vcpu
    }

    /// Two that run the same guest.
    pub fn both(vm: &Arc<Vm>) -> [Self; 2] {
        [Self::new(vm, 0), Self::new(vm, 1)]
    }

    fn shared(&self) -> &Shared {
        &self.vm.vcpus[self.me]
    }

    /// `Cpu::serve_invalidations` with `VcpuHolder::take`.
    fn serve(&mut self) {
        self.shared().pending.swap(0, Ordering::SeqCst);
        let (number, requests) = self.shared().requests.take();
        if !requests.is_empty() {
            self.fast = false;
        }
        self.shared().requests.done(number);
    }

    /// `BtVcpu::absorb`: what was told of suspends fragments.
    fn absorb(&mut self) {
        loop {
            let lines = self.shared().take_written();
            if lines == 0 {
                return;
            }
            for (line, f) in self.fragments.iter_mut().enumerate() {
                if let Some(f) = f.as_mut().filter(|_| lines >> line & 1 != 0) {
                    f.live = false;
                    self.vm.happened(self.me, "suspends", line, f.made_of);
                }
            }
        }
    }

    /// Between two fragments: the head of `BtVcpu::run_loop`.
    pub fn boundary(&mut self) {
        self.shared().alarm.store(0, Ordering::SeqCst);
        if self.signalled() {
            self.serve();
        }
        self.absorb();
    }

    /// `Cpu::poll`.
    fn signalled(&self) -> bool {
        self.shared().pending.load(Ordering::Relaxed) != 0
    }

    /// What translated code polls.
    fn is_alarmed(&self) -> bool {
        self.shared().alarm.load(Ordering::Relaxed) != 0
    }

    /// `Cpu::trace_code`.
    fn trace(&mut self, line: usize) {
        if self.vm.page.are_traced(1 << line, &self.vm.unsettled) {
            return;
        }
        self.shared().requests.leave();
        if self.vm.trace(line, Some(self.me)) {
            self.fast = false;
        }
        self.shared().requests.enter();
        self.serve();
    }

    /// `BtVcpu::find`: the fragment of a line is there and live, or is compared, or is made; tried again if bytes change meanwhile.
    fn find(&mut self, line: usize) {
        if self.fragments[line].is_some_and(|f| f.live) {
            return;
        }
        // `translate`, or `compare` with what an older fragment was made of.
        let made_of = self.fragments[line].map_or_else(|| self.vm.bytes(line), |f| f.made_of);
        self.trace(line);
        let unchanged = self.vm.broken == Broken::ReadBeforeTracing || self.vm.bytes(line) == made_of;
        self.fragments[line] = unchanged.then_some(Fragment { made_of, live: true });
        self.vm.happened(self.me, if unchanged { "has code of" } else { "gives up code of" }, line, made_of);
    }

    /// `BtVcpu::run_loop` up to the entry of a fragment.
    pub fn dispatch(&mut self, line: usize) {
        loop {
            self.boundary();
            self.find(line);
            if self.shared().requests.has_written() && self.vm.broken != Broken::EntersWithoutLooking {
                continue;
            }
            if self.fragments[line].is_some() {
                return;
            }
        }
    }

    /// A direct jump to the fragment of a line; where it is suspended its entry leads to the dispatcher.
    pub fn execute(&mut self, line: usize) {
        if self.fragments[line].is_none_or(|f| !f.live) {
            self.dispatch(line);
        }
        let made_of = self.fragments[line].unwrap().made_of;
        let known = self.at_least[line];
        assert!(made_of >= known, "INV-SMC: executes {made_of}, knows of {known}{}", self.vm.history());
    }

    /// Reads what the writer of line 0 says.
    pub fn listen(&mut self) {
        let announced = self.vm.announced.load(Ordering::Acquire);
        self.at_least[0] = self.at_least[0].max(announced);
    }

    /// A serialising instruction in the cache (`cpuid.rs`, `switch.rs`, `invlpg.rs`; IRET and jumps back poll, too): if the alarm rings the interpreter does it, and
    /// `BtVcpu::interpret` leaves if a signal waits.
    pub fn poll(&mut self) {
        if self.is_alarmed() && self.signalled() {
            self.boundary();
        }
    }

    /// A store of translated code.
    pub fn write(&mut self, line: usize, value: u32) {
        if self.fast {
            return self.write_fast(line, value);
        }
        // `exec::traced` and `exec::pass`, if the second TLB knows the page.
        if self.vm.page.is_shared() {
            let lines = self.vm.page.lines();
            let quiet = self.vm.broken == Broken::PassesWithoutLooking || !self.is_alarmed();
            if lines != 0 && quiet && lines >> line & 1 == 0 {
                return self.write_fast(line, value);
            }
        }
        // `callout::missed`: `Cpu::remember` grants the fast way if the page is not traced.
        self.fast = self.vm.page.lines() == 0;
        let looks = self.vm.broken != Broken::FillsWithoutLooking;
        if self.fast && !(looks && self.shared().requests.has_written()) {
            return self.write_fast(line, value);
        }
        // `BtVcpu::interpret`, which leaves the fragment if code was hit or a signal waits.
        let hit = self.vm.dma(line, value);
        self.overwrote(line);
        if hit || self.signalled() {
            self.boundary();
        }
    }

    /// What stood there at the start must not be executed any more; another may have written more meanwhile.
    fn overwrote(&mut self, line: usize) {
        self.at_least[line] = self.at_least[line].max(1);
    }

    /// The store itself, without another look.
    fn write_fast(&mut self, line: usize, value: u32) {
        self.vm.bytes[line].store(value, Ordering::Release);
        self.vm.happened(self.me, "fast write of", line, value);
        self.overwrote(line);
        let traced = self.vm.page.are_traced(1 << line, &self.vm.unsettled);
        let history = self.vm.history();
        assert!(
            !traced,
            "INV-TR: written the fast way while it is traced, and everybody respects it{history}"
        );
    }

    /// The start of `BtVcpu::run`.
    pub fn start(&mut self) {
        self.shared().requests.enter();
        self.serve();
        self.boundary();
    }

    /// Its end.
    pub fn stop(&self) {
        self.shared().requests.leave();
    }

    /// When all threads have ended: what is live is made of what is there.
    pub fn settle(mut self) {
        self.start();
        for (line, f) in self.fragments.iter().enumerate() {
            if let Some(f) = f.filter(|f| f.live) {
                let bytes = self.vm.bytes(line);
                let history = self.vm.history();
                assert_eq!(f.made_of, bytes, "INV-SMC: code is live, its bytes were changed{history}");
            }
        }
    }
}
