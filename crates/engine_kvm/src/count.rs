//! Exits by KVM's own reasons, and what they cost outside of the guest: each from KVM's return to the next KVM_RUN. Device accesses and
//! deliveries inside of that are accounts of their own (`engine::ExitStats`). The time in KVM_RUN, which is the guest's and the host kernel's, is an account too.

use std::collections::BTreeMap;

use engine::Report;
use engine::account::{Entry, Meter, Span};
use engine::cost::Row;
use engine::report::{Breakdown, Unit};

use crate::exit::{self, REASONS};

/// Of one vCPU.
#[derive(Clone, Debug)]
pub struct Counts {
    /// By place in [`REASONS`]; behind them all others, and what comes before the first entry.
    by_reason: [Entry; REASONS.len() + 2],
    /// The exit that is dealt with.
    handling: (usize, Span),
    /// Entries into the guest.
    pub entries: u64,
    /// Times that the state went over to KVM or came back.
    pub transfers: u64,
    /// Interrupts and NMIs handed to KVM.
    pub injections: u64,
    inside: Entry,
}

const OTHER: usize = REASONS.len();
const START: usize = OTHER + 1;

impl Default for Counts {
    fn default() -> Self {
        Self {
            by_reason: std::array::from_fn(|_| Entry::default()),
            handling: (START, Span::NONE),
            entries: 0,
            transfers: 0,
            injections: 0,
            inside: Entry::default(),
        }
    }
}

impl Counts {
    /// The vCPU is about to run.
    pub fn start(&mut self, meter: &mut Meter) {
        self.begin(START, meter);
    }

    /// Counts an exit.
    pub fn count(&mut self, reason: u32, meter: &mut Meter) {
        self.begin(REASONS.iter().position(|r| r.0 == reason).unwrap_or(OTHER), meter);
    }

    fn begin(&mut self, at: usize, meter: &mut Meter) {
        let span = meter.begin(&mut self.by_reason[at]);
        self.handling = (at, span);
    }

    /// What it asked for is done, or the run ends.
    pub fn handled(&mut self, meter: &mut Meter) {
        let (at, span) = std::mem::replace(&mut self.handling, (START, Span::NONE));
        meter.end(&mut self.by_reason[at], span);
    }

    /// KVM_RUN begins.
    pub fn enter(&mut self, meter: &mut Meter) -> Span {
        meter.begin(&mut self.inside)
    }

    /// It has ended.
    pub fn leave(&mut self, span: Span, meter: &mut Meter) {
        meter.end(&mut self.inside, span);
    }

    /// For the statistics.
    #[must_use]
    pub fn report(&self) -> Report {
        // Nobody counts what the processor executes.
        let mut report = Report { interpreted_only: true, ..Report::default() };
        report.count("entries into the guest", Unit::Count, self.entries);
        report.count("interrupts handed to KVM", Unit::Count, self.injections);
        report.count("states moved", Unit::Count, self.transfers);
        let mut rows: BTreeMap<String, u64> = REASONS
            .iter()
            .zip(&self.by_reason)
            .filter(|(_, e)| e.count > 0)
            .map(|(r, e)| (r.1.to_owned(), e.count))
            .collect();
        if self.by_reason[OTHER].count > 0 {
            rows.insert(exit::reason_name(u32::MAX).to_owned(), self.by_reason[OTHER].count);
        }
        report.breakdowns.push(Breakdown { name: "KVM exits by reason", rows });
        report.costs = self.costs();
        report
    }

    fn costs(&self) -> Vec<Row> {
        let names = REASONS.iter().map(|r| r.1).chain([exit::reason_name(u32::MAX), "start"]);
        let rows = names.zip(&self.by_reason).map(|(name, entry)| Row::of("kvm", name, entry));
        rows.chain([Row::of("kvm-run", "KVM_RUN", &self.inside)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_has_the_reasons_that_happened() {
        let (mut counts, mut meter) = (Counts::default(), Meter::new());
        [kvm_bindings::KVM_EXIT_IO, kvm_bindings::KVM_EXIT_IO, 4711].into_iter().for_each(|r| {
            counts.count(r, &mut meter);
            counts.handled(&mut meter);
        });
        let rows = &counts.report().breakdowns[0].rows;
        assert_eq!(*rows, BTreeMap::from([("io".to_owned(), 2), ("other".to_owned(), 1)]));
        let costs = counts.costs();
        let of = |cause: &str| costs.iter().find(|r| r.cause == cause).map(|r| (r.count, r.measured));
        assert_eq!((of("io"), of("other"), of("hlt")), (Some((2, 2)), Some((1, 1)), Some((0, 0))));
    }
}
