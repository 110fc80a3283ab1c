//! The translator that is tested, with a watch over it: it may not run for ever.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::signals::Signal;
use engine::{Signals, Vcpu, VcpuExit};
use engine_bt::{BtVcpu, Knobs, TlbKnob};
use x86::CpuState;

use crate::machine::{Image, Machine};

/// How often the watch looks; a run that is still on at the second look is stopped.
const PATROL: Duration = Duration::from_secs(3);
/// Runs after which the vCPU is made anew under knobs that let code warm up.
const LIFETIME: u64 = 200;

/// The translator and its machine.
pub struct Subject {
    machine: Machine,
    vcpu: BtVcpu,
    knobs: Knobs,
    runs: u64,
    totals: [u64; 4],
    /// Accesses that crossed pages in a second form.
    together: u64,
    watch: Arc<Watch>,
}

struct Watch {
    signals: Mutex<Arc<Signals>>,
    /// Number of the run that is on; 0 between runs.
    current: AtomicU64,
    over: AtomicBool,
}

impl Subject {
    pub fn new(knobs: Knobs) -> Self {
        let machine = Machine::new();
        let vcpu = BtVcpu::with_knobs(machine.parts(), knobs).unwrap();
        let signals = Mutex::new(Arc::clone(&machine.signals));
        let watch = Arc::new(Watch { signals, current: AtomicU64::new(0), over: AtomicBool::new(false) });
        let watched = Arc::clone(&watch);
        std::thread::spawn(move || {
            let mut seen = 0;
            while !watched.over.load(Ordering::Relaxed) {
                std::thread::sleep(PATROL);
                let now = watched.current.load(Ordering::SeqCst);
                if now != 0 && now == seen {
                    watched.signals.lock().unwrap().raise(Signal::KICK);
                }
                seen = now;
            }
        });
        Self { machine, vcpu, knobs, runs: 0, totals: [0; 4], together: 0, watch }
    }

    fn count(&mut self) {
        let s = self.vcpu.bt;
        let report = self.vcpu.report();
        let adapted = report.breakdowns.iter().find(|b| b.name == "visits by adapted sites").unwrap();
        self.together += adapted.rows.get("page crossing").copied().unwrap_or(0);
        for (total, n) in self.totals.iter_mut().zip([s.fragments, s.entries, s.callouts, s.links]) {
            *total += n;
        }
    }

    /// Runs a program: state, memory, and whether it had to be stopped.
    pub fn run(&mut self, image: &Image<'_>) -> (CpuState, Vec<u8>, bool) {
        self.runs += 1;
        if self.knobs.warm > 0 && self.runs.is_multiple_of(LIFETIME) {
            self.renew();
        }
        let state = self.machine.lay(image);
        self.vcpu.restore(&state);
        self.watch.current.store(self.runs, Ordering::SeqCst);
        let exit = self.vcpu.run(u64::MAX);
        self.watch.current.store(0, Ordering::SeqCst);
        let stuck = match exit {
            VcpuExit::Halted | VcpuExit::TripleFault => false,
            VcpuExit::Kicked => true,
            other => panic!("the translator left with {other:?}"),
        };
        (self.vcpu.save(), self.machine.snapshot(), stuck)
    }

    /// A new vCPU: its memory of what is warm is gone.
    fn renew(&mut self) {
        self.count();
        self.machine.signals = Arc::new(Signals::default());
        *self.watch.signals.lock().unwrap() = Arc::clone(&self.machine.signals);
        self.vcpu = BtVcpu::with_knobs(self.machine.parts(), self.knobs).unwrap();
    }

    /// What the translator did, in all.
    pub fn report(&mut self) -> String {
        self.count();
        let [fragments, entries, callouts, links] = self.totals;
        let together = self.together;
        if self.knobs.adapt == u32::MAX && self.knobs.tlb == TlbKnob::All {
            assert!(together > self.runs / 8, "second forms ran: {together} in {} runs", self.runs);
        }
        format!(
            "{fragments} fragments, {entries} entries, {callouts} callouts, {links} links, {together} together"
        )
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        self.watch.over.store(true, Ordering::Relaxed);
    }
}
