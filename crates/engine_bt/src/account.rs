//! What the work around translated code costs (`engine::account`), by cause: visits of accesses that missed, instructions that the interpreter
//! does, the dispatcher from a leave of the cache to the next entry, translation, interpretation of cold code. Device accesses and the delivery of
//! interrupts and exceptions inside of them are accounts of their own (`engine::ExitStats`).
//!
//! INV-ACC-2: whenever Rust runs between two stretches of translated code, exactly one of these spans is the outermost: `slow` and `callout` begin one
//! when they are called, the dispatcher's lasts from each leave to the next entry. What is left over of a vCPU's time is translated code and the
//! assembly around it; the switches between that and Rust are counted here and calibrated (`switch_cost`).

use bt::frame;
use engine::Cause as Exit;
use engine::account::{Entry, Span};
use engine::cost::Row;
use iced_x86::Code;
use rustc_hash::FxHashMap;

use crate::BtVcpu;
use crate::adapt::Cause;
use crate::listing::form_of;
use crate::sample::Activity;
use crate::switch_cost::SwitchCost;
use crate::trace::Leave;

/// Misses that were filled, behind the causes of the others.
const FILL: usize = Cause::ALL.len();
/// The dispatcher at the beginning of a run, behind the leaves.
pub(crate) const START: usize = Leave::ALL.len();
/// The dispatcher behind code that it interpreted.
pub(crate) const COLD: usize = START + 1;

/// What the spans here have in them already.
const WITHIN: &[Exit] = &[
    Exit::TlbFill,
    Exit::Msr,
    Exit::Cpuid,
    Exit::ControlRegister,
    Exit::TlbFlush,
    Exit::CodeDecode,
    Exit::Native,
];

/// The instructions that assembly does, in the order of [`frame::COUNT_HELPED`].
pub(crate) const HELPED: [&str; 6] = [
    "CPUID in the TC",
    "XSAVEC in the TC",
    "XRSTOR in the TC",
    "MOV to CR3 in the TC",
    "INVLPG in the TC",
    "RDMSR and WRMSR in the TC",
];

/// The accounts.
#[derive(Default)]
pub(crate) struct Account {
    /// Decides which misses are timed: what becomes of one is known behind it.
    visits: Entry,
    misses: [Entry; FILL + 1],
    outcome: usize,
    /// Instructions that the interpreter did for fragments.
    callouts: FxHashMap<Code, Entry>,
    /// Fragments' own calls for instructions.
    calls: u64,
    /// Calls for which vector registers were stored and loaded.
    vector: u64,
    dispatch: [Entry; COLD + 1],
    /// The dispatcher's span, and its place there.
    dispatching: (usize, Span),
    translation: Entry,
    cold: Entry,
}

impl Account {
    /// Instructions that the interpreter did, and how often.
    pub fn callouts(&self) -> impl Iterator<Item = (Code, u64)> + '_ {
        self.callouts.iter().map(|(code, entry)| (*code, entry.count))
    }
}

impl BtVcpu {
    /// Before the first span.
    pub(crate) fn begin_accounting(&mut self) {
        self.interp.cpu().stats.mute(WITHIN);
    }

    /// An access that missed has come to Rust.
    pub(crate) fn begin_visit(&mut self) -> Span {
        self.account.outcome = FILL;
        self.does(Activity::Miss);
        self.interp.cpu().stats.meter.begin(&mut self.account.visits)
    }

    /// It was more than a fill.
    pub(crate) const fn visit_was(&mut self, cause: Cause) {
        self.account.outcome = cause as usize;
    }

    /// It goes on. `vector`: with the guest's vector registers.
    pub(crate) fn end_visit(&mut self, span: Span, vector: bool) {
        self.account.vector += u64::from(vector);
        let entry = &mut self.account.misses[self.account.outcome];
        entry.count += 1;
        self.interp.cpu().stats.meter.end(entry, span);
        self.does(Activity::Fragments);
    }

    /// A fragment has called for an instruction.
    pub(crate) fn begin_call(&mut self, code: Code) -> Span {
        self.account.calls += 1;
        self.does(Activity::Callout);
        self.begin_callout(code)
    }

    /// It goes on.
    pub(crate) fn end_call(&mut self, code: Code, span: Span, vector: bool) {
        self.account.vector += u64::from(vector);
        self.end_callout(code, span);
        self.does(Activity::Fragments);
    }

    /// The interpreter is to do an instruction.
    pub(crate) fn begin_callout(&mut self, code: Code) -> Span {
        let entry = self.account.callouts.entry(code).or_default();
        self.interp.cpu().stats.meter.begin(entry)
    }

    /// It has.
    #[inline]
    pub(crate) fn end_callout(&mut self, code: Code, span: Span) {
        if span.is_timed() {
            let entry = self.account.callouts.entry(code).or_default();
            self.interp.cpu().stats.meter.end(entry, span);
        }
    }

    /// The dispatcher has something to do.
    pub(crate) fn begin_dispatch(&mut self, why: usize) {
        let span = self.interp.cpu().stats.meter.begin(&mut self.account.dispatch[why]);
        self.account.dispatching = (why, span);
        self.does(Activity::Dispatch);
    }

    /// It has done it.
    pub(crate) fn end_dispatch(&mut self) {
        let (why, span) = self.account.dispatching;
        self.interp.cpu().stats.meter.end(&mut self.account.dispatch[why], span);
    }

    /// A unit is to be translated.
    pub(crate) fn begin_translation(&mut self) -> Span {
        self.interp.cpu().stats.meter.begin(&mut self.account.translation)
    }

    /// It is, or cannot be.
    pub(crate) fn end_translation(&mut self, span: Span) {
        self.interp.cpu().stats.meter.end(&mut self.account.translation, span);
    }

    /// The interpreter is to run cold code.
    pub(crate) fn begin_cold(&mut self) -> Span {
        self.interp.cpu().stats.meter.begin(&mut self.account.cold)
    }

    /// It has.
    pub(crate) fn end_cold(&mut self, span: Span) {
        self.interp.cpu().stats.meter.end(&mut self.account.cold, span);
    }

    /// All of it.
    pub(crate) fn cost_rows(&self) -> Vec<Row> {
        let a = &self.account;
        let names = Cause::ALL.iter().map(|c| c.name()).chain(["fill"]);
        let mut rows: Vec<_> = names.zip(&a.misses).map(|(name, e)| Row::of("miss", name, e)).collect();
        let names = Leave::ALL.iter().map(|l| l.name()).chain(["start", "cold code"]);
        rows.extend(names.zip(&a.dispatch).map(|(name, e)| Row::of("dispatch", name, e)));
        rows.push(Row::of("translation", "fragments", &a.translation));
        rows.push(Row::of("interpretation", "cold code", &a.cold));
        rows.extend(self.switch_rows());
        rows.extend(self.assembly_rows());
        let callouts: Vec<_> =
            a.callouts.iter().map(|(code, e)| Row::of("callout", form_of(*code), e)).collect();
        // Forms that are written alike are one row.
        engine::cost::add_rows(&mut rows, &callouts);
        rows
    }

    fn switch_rows(&self) -> [Row; 3] {
        let (a, cost) = (&self.account, SwitchCost::get());
        let calls = a.visits.count + a.calls;
        [
            Row::calibrated("switch", "enter and leave", self.bt.entries, cost.entry),
            Row::calibrated("switch", "to Rust and back", calls.saturating_sub(a.vector), cost.callout),
            Row::calibrated("switch", "with vector registers", a.vector, cost.vector),
        ]
    }

    /// What assembly does is counted only; its time is the guest's.
    fn assembly_rows(&self) -> Vec<Row> {
        let count = |name: &'static str, at| Row::counted("assembly", name, self.frame.get(at));
        let helped = HELPED.iter().zip((frame::COUNT_HELPED..).step_by(8)).map(|(name, at)| count(name, at));
        let others = [
            ("jump-cache refills", frame::COUNT_LOOKUPS),
            ("TLB refills", frame::COUNT_REFILLS),
            ("writes beside code", frame::COUNT_PASSED),
            ("accesses on two pages", frame::COUNT_SPLITS),
        ];
        helped.chain(others.map(|(name, at)| count(name, at))).collect()
    }
}
