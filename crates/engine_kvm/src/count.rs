//! Exits by KVM's own reasons, and what they cost outside of the guest.

use std::collections::BTreeMap;
use std::time::Duration;

use engine::Report;
use engine::report::{Breakdown, Unit};

use crate::exit::{self, REASONS};

/// Of one vCPU.
#[derive(Clone, Debug)]
pub struct Counts {
    by_reason: [u64; REASONS.len()],
    other: u64,
    /// Entries into the guest.
    pub entries: u64,
    /// Times that the state went over to KVM or came back.
    pub transfers: u64,
    /// Interrupts and NMIs handed to KVM.
    pub injections: u64,
    /// Time in KVM_RUN.
    pub inside: Duration,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            by_reason: [0; REASONS.len()],
            other: 0,
            entries: 0,
            transfers: 0,
            injections: 0,
            inside: Duration::ZERO,
        }
    }
}

impl Counts {
    /// Counts an exit.
    pub fn count(&mut self, reason: u32) {
        match REASONS.iter().position(|r| r.0 == reason) {
            Some(at) => self.by_reason[at] += 1,
            None => self.other += 1,
        }
    }

    /// For the statistics.
    #[must_use]
    pub fn report(&self) -> Report {
        // Nobody counts what the processor executes.
        let mut report = Report { interpreted_only: true, ..Report::default() };
        let inside = u64::try_from(self.inside.as_nanos()).unwrap_or(u64::MAX);
        report.count("entries into the guest", Unit::Count, self.entries);
        report.count("time in KVM_RUN", Unit::Nanoseconds, inside);
        report.count("interrupts handed to KVM", Unit::Count, self.injections);
        report.count("states moved", Unit::Count, self.transfers);
        let mut rows: BTreeMap<String, u64> = REASONS
            .iter()
            .zip(self.by_reason)
            .filter(|(_, n)| *n > 0)
            .map(|(r, n)| (r.1.to_owned(), n))
            .collect();
        if self.other > 0 {
            rows.insert(exit::reason_name(u32::MAX).to_owned(), self.other);
        }
        report.breakdowns.push(Breakdown { name: "KVM exits by reason", rows });
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_has_the_reasons_that_happened() {
        let mut counts = Counts::default();
        [kvm_bindings::KVM_EXIT_IO, kvm_bindings::KVM_EXIT_IO, 4711]
            .into_iter()
            .for_each(|r| counts.count(r));
        let rows = &counts.report().breakdowns[0].rows;
        assert_eq!(*rows, BTreeMap::from([("io".to_owned(), 2), ("other".to_owned(), 1)]));
    }
}
