//! Instructions that KVM has to emulate and cannot: the interpreter executes them, one at a time, and they are counted by name.
//!
//! A real KVM comes to this seldom (an SSE store to device memory, odd code in real mode); one without hardware behind it, for SIMD, x87 and others
//! at level 0, at every turn. `TRELLIS_KVM=interpret=off` ends the machine instead, with the instruction by name.

use std::collections::BTreeMap;

use engine::report::{Breakdown, Report};
use iced_x86::{Decoder, DecoderOptions};

/// Names that are kept apart; a guest may try them all, but there are not more of them.
const MAX_NAMES: usize = 4096;

/// Of one vCPU.
#[derive(Clone, Debug)]
pub struct Fallback {
    /// Not `interpret=off`.
    pub enabled: bool,
    by_name: BTreeMap<String, u64>,
}

impl Fallback {
    /// As `TRELLIS_KVM` says.
    #[must_use]
    pub fn of_environment() -> Self {
        let knobs = std::env::var("TRELLIS_KVM").unwrap_or_default();
        Self::new(!knobs.split(',').any(|knob| knob.trim() == "interpret=off"))
    }

    /// Enabled or not.
    #[must_use]
    pub const fn new(enabled: bool) -> Self {
        Self { enabled, by_name: BTreeMap::new() }
    }

    /// Counts an instruction; its name if it is the first of all.
    pub fn count(&mut self, bytes: &[u8], bits: u32) -> Option<&str> {
        let name = mnemonic(bytes, bits);
        let first = self.by_name.is_empty();
        if self.by_name.len() < MAX_NAMES || self.by_name.contains_key(&name) {
            *self.by_name.entry(name).or_default() += 1;
        }
        if first { self.by_name.keys().next().map(String::as_str) } else { None }
    }

    /// Adds the counts to a report.
    pub fn report(&self, report: &mut Report) {
        let rows = self.by_name.clone();
        report.breakdowns.push(Breakdown { name: "instructions KVM cannot emulate", rows });
    }
}

/// The name of the instruction that `bytes` begin with, in code of `bits`.
#[must_use]
pub fn mnemonic(bytes: &[u8], bits: u32) -> String {
    if bytes.is_empty() {
        return "unreadable".to_owned();
    }
    let instruction = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
    if instruction.is_invalid() {
        return "undefined".to_owned();
    }
    format!("{:?}", instruction.mnemonic()).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_counted_by_name_and_the_first_is_told() {
        let mut fallback = Fallback::new(true);
        assert_eq!(fallback.count(&[0x0f, 0x57, 0xc0], 64), Some("xorps"));
        assert_eq!(fallback.count(&[0x0f, 0xae, 0x28], 64), None);
        fallback.count(&[0x0f, 0x57, 0xc9], 64);
        let mut report = Report::default();
        fallback.report(&mut report);
        let rows = &report.breakdowns[0].rows;
        assert_eq!(*rows, BTreeMap::from([("xorps".to_owned(), 2), ("xrstor".to_owned(), 1)]));
    }

    #[test]
    fn what_is_no_instruction_has_a_name_too() {
        assert_eq!(
            (mnemonic(&[], 64), mnemonic(&[0xff, 0xff], 32)),
            ("unreadable".to_owned(), "undefined".to_owned())
        );
    }
}
