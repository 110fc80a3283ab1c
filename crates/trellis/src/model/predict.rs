//! From events and costs to percent of native.

use serde::Serialize;

use super::costs::{Processor, translator, walk};
use super::events::Events;

/// A way to virtualize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Technique {
    /// The guest's kernel at a lower privilege level: whatever is privileged traps, page tables are shadowed. No x86 before 2005
    /// let it be done, for some of its instructions do not trap; the model lets them.
    Classical,
    /// VMware's binary translator: kernel code is translated, user code runs directly, page tables are shadowed.
    Translation,
    /// VT-x or AMD-V of the first generation, page tables are shadowed.
    Shadow,
    /// With a second page table that the processor walks.
    Nested,
}

impl Technique {
    /// All, in the order of tables.
    pub const ALL: [Self; 4] = [Self::Classical, Self::Translation, Self::Shadow, Self::Nested];

    /// Its name for tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Classical => "trap-and-emulate",
            Self::Translation => "binary translation",
            Self::Shadow => "VT-x, shadow paging",
            Self::Nested => "nested paging",
        }
    }
}

/// A part of the overhead.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Term {
    /// What happens.
    pub event: &'static str,
    /// How often in an operation.
    pub count: f64,
    /// Cycles each time.
    pub cost: f64,
}

impl Term {
    /// Cycles of an operation.
    #[must_use]
    pub fn cycles(&self) -> f64 {
        self.count * self.cost
    }
}

/// What is predicted of a workload under a technique.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// How.
    pub technique: Technique,
    /// On what.
    pub processor: &'static str,
    /// Native time by predicted time. Where walks count, with the walker's caches empty.
    pub percent_low: f64,
    /// With the walker's caches always hit; the same as `percent_low` where walks do not count.
    pub percent: f64,
    /// What it is made of, dearest first; walks at their cheaper cost.
    pub terms: Vec<Term>,
}

/// Predicts: `native` is what an operation takes natively, in cycles.
#[must_use]
pub fn predict(events: &Events, native: f64, technique: Technique, processor: &Processor) -> Prediction {
    let mut terms = match technique {
        Technique::Classical => classical(events, processor.trap.cycles),
        Technique::Translation => translation(events),
        Technique::Shadow => shadow(events, processor.exit.cycles),
        Technique::Nested => nested(events, processor.exit.cycles),
    };
    terms.retain(|term| term.cycles() > 0.0);
    let base: f64 = terms.iter().map(Term::cycles).sum();
    let (mut low, mut high) = (base, base);
    if technique == Technique::Nested {
        let reference = processor.reference.cycles;
        let extra = Term { event: "two-dimensional walk", count: events.walks, cost: 0.0 };
        let cheap = Term { cost: (walk::NESTED_CACHED - walk::CACHED) * reference, ..extra };
        let dear = Term { cost: (walk::NESTED - walk::LEVELS) * reference, ..extra };
        high += cheap.cycles();
        low += dear.cycles();
        terms.push(cheap);
    }
    terms.sort_by(|a, b| b.cycles().total_cmp(&a.cycles()));
    let percent = |overhead: f64| native / (native + overhead).max(f64::MIN_POSITIVE) * 100.0;
    Prediction {
        technique,
        processor: processor.name,
        percent_low: percent(low),
        percent: percent(high),
        terms,
    }
}

const fn term(event: &'static str, count: f64, cost: f64) -> Term {
    Term { event, count, cost }
}

/// Each event that is privileged traps.
fn classical(e: &Events, trap: f64) -> Vec<Term> {
    vec![
        term("system call", e.system_calls, trap),
        term("return from the kernel", e.returns, trap),
        term("page fault", e.page_faults, trap),
        term("other exception", e.exceptions, trap),
        term("interrupt", e.interrupts, trap),
        term("shadow fill", e.shadow_fills, trap),
        term("traced page-table write", e.traced_writes, trap),
        term("MOV to CR3", e.cr3_writes, trap),
        term("INVLPG", e.page_flushes, trap),
        term("CLI, STI, POPF, SWAPGS", e.harmless, trap),
        term("other privileged instruction", e.control_writes + e.msrs, trap),
        term("CPUID", e.cpuids, trap),
        term("device access", e.ports + e.device_accesses, trap),
        term("halt", e.halts, trap),
    ]
}

/// What the translation cache does itself is cheap, what the monitor must hear of is a callout, what happens in user code traps.
fn translation(e: &Events) -> Vec<Term> {
    let (trap, callout, in_cache) =
        (translator::TRAP.cycles, translator::CALLOUT.cycles, translator::IN_CACHE.cycles);
    vec![
        term("system call", e.system_calls, trap),
        term("page fault", e.page_faults, trap),
        term("other exception", e.exceptions, trap),
        term("interrupt", e.interrupts, trap),
        term("shadow fill", e.shadow_fills, trap),
        // After adaptation.
        term("traced page-table write", e.traced_writes, callout),
        term("device access", e.ports + e.device_accesses, callout),
        term("MOV to CR3", e.cr3_writes, callout),
        term("INVLPG", e.page_flushes, in_cache),
        term("CPUID", e.cpuids, in_cache),
        term("other privileged instruction", e.control_writes + e.msrs, in_cache),
        term("halt", e.halts, callout),
    ]
}

/// An exit for whatever touches the page tables or a device.
fn shadow(e: &Events, exit: f64) -> Vec<Term> {
    let mut terms = nested(e, exit);
    terms.extend([
        term("page fault", e.page_faults, exit),
        term("shadow fill", e.shadow_fills, exit),
        term("traced page-table write", e.traced_writes, exit),
        term("MOV to CR3", e.cr3_writes, exit),
        term("INVLPG", e.page_flushes, exit),
    ]);
    terms
}

/// An exit for devices and what the processor may not do alone. MSRs of segment bases and system calls need none.
fn nested(e: &Events, exit: f64) -> Vec<Term> {
    vec![
        term("device access", e.ports + e.device_accesses, exit),
        term("interrupt", e.interrupts, exit),
        term("CPUID", e.cpuids, exit),
        term("MOV to CR0, CR4, DR7", e.control_writes, exit),
        term("halt", e.halts, exit),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::costs::PROCESSORS;

    const P4: &Processor = &PROCESSORS[0];
    const BARCELONA: &Processor = &PROCESSORS[2];

    #[test]
    fn nothing_happens_and_all_run_natively() {
        let events = Events { instructions: 1000.0, ..Events::default() };
        for technique in Technique::ALL {
            let prediction = predict(&events, 500.0, technique, P4);
            assert_eq!((prediction.percent, prediction.percent_low), (100.0, 100.0));
        }
    }

    #[test]
    fn system_calls_cost_the_translator_and_nobody_with_vt_x() {
        let events = Events { system_calls: 1.0, returns: 1.0, ..Events::default() };
        let percent = |technique| predict(&events, 2030.0, technique, P4).percent;
        assert!((percent(Technique::Translation) - 50.0).abs() < 1e-9);
        assert!((percent(Technique::Classical) - 100.0 / 3.0).abs() < 1e-9);
        assert_eq!((percent(Technique::Shadow), percent(Technique::Nested)), (100.0, 100.0));
    }

    #[test]
    fn page_tables_cost_shadow_paging_and_not_nested() {
        let events = Events { traced_writes: 10.0, cr3_writes: 2.0, ..Events::default() };
        let shadow = predict(&events, 68_040.0, Technique::Shadow, P4);
        assert!((shadow.percent - 68_040.0 / (68_040.0 + 12.0 * 6804.0) * 100.0).abs() < 1e-9);
        assert_eq!(shadow.terms[0].event, "traced page-table write");
        assert_eq!(predict(&events, 68_040.0, Technique::Nested, BARCELONA).percent, 100.0);
        assert!(predict(&events, 68_040.0, Technique::Translation, P4).percent > shadow.percent);
    }

    #[test]
    fn walks_cost_nested_paging_between_two_bounds() {
        let events = Events { walks: 1.0, ..Events::default() };
        let nested = predict(&events, 30.0, Technique::Nested, BARCELONA);
        assert!((nested.percent - 50.0).abs() < 1e-9, "two references more, of 15 cycles");
        assert!((nested.percent_low - 30.0 / 330.0 * 100.0).abs() < 1e-9, "twenty more");
        assert_eq!(predict(&events, 30.0, Technique::Shadow, BARCELONA).percent, 100.0);
    }
}
