//! Where a mode's time went: parts that were measured or predicted each on its own, and what is left when they are taken from the clock's.
//!
//! With the translator, `explained = native time × path lengthening + exits × cost + translation + idle`. The first term does not come from the
//! time that is to be explained: native time was measured on the host, and the lengthening comes from instructions (of fragments, weighted by
//! samples) or from what the sampled instructions are for. So the remainder can be large, and of either sign; it is printed as it is. Where
//! the host gave the processor to others meanwhile, what was measured by the time-stamp counter has that in it: it is counted once, in a part of
//! its own, and all that was measured so is shortened alike. Where there is no native time, what the samples found in translated code takes the term's place, which is a measurement of its own too.

use serde::Serialize;

use super::account::{Account, Row};

/// Where a part's number comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// By the clock or the time-stamp counter.
    Measured,
    /// By samples at fixed intervals of CPU time.
    Sampled,
    /// From native time and the lengthening of the path.
    Predicted,
}

/// A part of the time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// What.
    pub what: String,
    /// How often, if that says something.
    pub count: Option<f64>,
    /// How long all of it took.
    pub seconds: f64,
    /// Where the number comes from.
    pub basis: Basis,
    /// What it is made of, dearest first.
    pub rows: Vec<Row>,
}

/// Which lengthening of the path was taken.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Lengthening {
    /// Host instructions by guest instruction.
    pub by_instructions: Option<f64>,
    /// Samples in translated code by samples in the guest's own instructions.
    pub by_samples: Option<f64>,
}

/// Where the time went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// All of it, by the host's clock.
    pub seconds: f64,
    /// Its parts.
    pub parts: Vec<Part>,
    /// What none of them explains; below zero if they are more than there was.
    pub unexplained: f64,
    /// Time in translated code as the samples have it, beside what was predicted.
    pub sampled: Option<f64>,
    /// How much longer the path is.
    pub lengthening: Lengthening,
}

/// Kinds of rows and what they are called, in the order to show.
const KINDS: [(&str, &str); 9] = [
    ("translation", "translation"),
    ("interpretation", "cold code, interpreted"),
    ("callout", "callouts: instructions done by the interpreter"),
    ("miss", "accesses that missed in translated code"),
    ("exit", "exits: devices, interrupts, page walks"),
    ("dispatch", "the dispatcher, between fragments"),
    ("switch", "to and from translated code"),
    ("kvm", "exits of KVM, handled"),
    ("kvm-run", "inside of KVM"),
];

/// Explains `seconds` of a mode whose engine made `account`; `native` is how long the same took natively.
#[must_use]
pub fn explain(seconds: f64, account: &Account, native: Option<f64>) -> Explanation {
    let account = &running(account);
    let lengthening = lengthening(account);
    let sampled = account.profile.as_ref().map(super::account::Profile::in_translated_code);
    let mut parts: Vec<Part> = KINDS.iter().filter_map(|(kind, what)| part(account, kind, what)).collect();
    let known: Vec<&str> = KINDS.iter().map(|(kind, _)| *kind).collect();
    let mut others: Vec<&str> = account.rows.iter().map(|row| row.kind.as_str()).collect();
    others.sort_unstable();
    others.dedup();
    let others = others.into_iter().filter(|kind| !known.contains(kind));
    parts.extend(others.filter_map(|kind| part(account, kind, kind)));
    parts.extend(own_code(account, native, lengthening, sampled));
    if let Some(cpu) = account.cpu.filter(|cpu| account.busy > *cpu) {
        parts.push(plain("the host ran something else", account.busy - cpu));
    }
    // What lies outside of the work is asleep as well; the vCPU's threads were busy for all but this.
    let idle = (seconds - account.busy).max(0.0);
    parts.push(plain("idle: the guest slept", idle.min(account.asleep.max(0.0))));
    parts.retain(|part| part.seconds > 0.0);
    parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let explained: f64 = parts.iter().map(|part| part.seconds).sum();
    Explanation { seconds, parts, unexplained: seconds - explained, sampled, lengthening }
}

/// The guest's own instructions: predicted if there is something to predict from, sampled if there are samples.
fn own_code(
    account: &Account,
    native: Option<f64>,
    lengthening: Lengthening,
    sampled: Option<f64>,
) -> Option<Part> {
    let part = |what: String, seconds, basis| Part { what, count: None, seconds, basis, rows: Vec::new() };
    let factor = lengthening.by_samples.or(lengthening.by_instructions);
    match (native, factor, sampled, account.instructions) {
        (Some(native), Some(factor), ..) => {
            let what =
                format!("native time ({}) × path lengthening ({factor:.2})", super::text::time(native));
            Some(part(what, native * factor, Basis::Predicted))
        }
        (_, _, Some(sampled), _) => Some(part("translated code".to_owned(), sampled, Basis::Sampled)),
        (_, _, None, Some(count)) => {
            let rest = account.rest?;
            let what = format!("interpreted instructions, {:.1} ns each", rest / count.max(1.0) * 1e9);
            Some(Part { count: Some(count), ..part(what, rest, Basis::Measured) })
        }
        _ => None,
    }
}

/// The account with its rows as long as they would be on a processor that is ours: preemption is taken to have met all alike.
fn running(account: &Account) -> Account {
    let share = account.cpu.map_or(1.0, |cpu| (cpu / account.busy.max(f64::MIN_POSITIVE)).min(1.0));
    let mut account = account.clone();
    for row in &mut account.rows {
        row.seconds = row.seconds.map(|seconds| seconds * share);
    }
    account.rest = account.rest.map(|rest| rest * share);
    account
}

fn lengthening(account: &Account) -> Lengthening {
    let profile = account.profile.as_ref();
    let by_instructions = profile.and_then(|profile| profile.path).map(|(guest, host)| host / guest);
    let own = profile.and_then(|profile| profile.share("guest")).filter(|share| *share > 0.0);
    // Beside translated code there is the assembly that it calls, which is lengthening too.
    let around = profile.map_or(1.0, |profile| {
        let translated = profile.translated() / profile.hz;
        if translated > 0.0 { profile.in_translated_code() / translated } else { 1.0 }
    });
    Lengthening { by_instructions, by_samples: own.map(|share| around / share) }
}

fn plain(what: &str, seconds: f64) -> Part {
    Part { what: what.to_owned(), count: None, seconds, basis: Basis::Measured, rows: Vec::new() }
}

/// All rows of a kind; rows that are only counted are in other parts' time.
fn part(account: &Account, kind: &str, what: &str) -> Option<Part> {
    let rows: Vec<Row> = account.rows.iter().filter(|row| row.kind == kind).cloned().collect();
    let timed = || rows.iter().filter(|row| row.seconds.is_some());
    let count: f64 = timed().map(|row| row.count).sum();
    let seconds: f64 = timed().filter_map(|row| row.seconds).sum();
    (count > 0.0).then(|| Part {
        what: what.to_owned(),
        count: Some(count),
        seconds,
        basis: Basis::Measured,
        rows,
    })
}

impl Explanation {
    /// What is not explained, in percent of all.
    #[must_use]
    pub fn unexplained_percent(&self) -> f64 {
        self.unexplained / self.seconds.max(f64::MIN_POSITIVE) * 100.0
    }

    /// The share of the time that the parts named so have, from 0 to 1.
    #[must_use]
    pub fn share(&self, what: &str) -> f64 {
        let seconds: f64 =
            self.parts.iter().filter(|part| part.what.starts_with(what)).map(|part| part.seconds).sum();
        seconds / self.seconds.max(f64::MIN_POSITIVE)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::account::tests::{after, before};
    use super::*;

    fn account() -> Account {
        Account::between(&before(), &after())
    }

    fn find<'a>(explanation: &'a Explanation, what: &str) -> Option<&'a Part> {
        explanation.parts.iter().find(|part| part.what.starts_with(what))
    }

    #[test]
    fn parts_and_remainder_are_the_whole() {
        let explanation = explain(1.1, &account(), Some(0.25));
        let sum: f64 = explanation.parts.iter().map(|part| part.seconds).sum();
        assert!((sum + explanation.unexplained - 1.1).abs() < 1e-9);
        assert!((find(&explanation, "translation").unwrap().seconds - 0.19).abs() < 1e-9);
        assert!((find(&explanation, "callouts").unwrap().seconds - 0.095).abs() < 1e-9);
        assert!((find(&explanation, "the host ran").unwrap().seconds - 0.05).abs() < 1e-9);
        // A tenth of a second longer than the vCPU was busy, and it did sleep.
        assert!((find(&explanation, "idle").unwrap().seconds - 0.1).abs() < 1e-9);
    }

    #[test]
    fn own_code_is_predicted_from_native_time_and_not_from_the_rest() {
        // 550 translated samples and 50 around; half of those with a purpose are the guest's own.
        let explanation = explain(1.1, &account(), Some(0.25));
        let part = find(&explanation, "native time").unwrap();
        let factor = 600.0 / 550.0 / 0.5;
        assert!((part.seconds - 0.25 * factor).abs() < 1e-9, "{part:?}");
        assert_eq!((part.basis, explanation.lengthening.by_instructions), (Basis::Predicted, Some(2.5)));
        // Twice the native time is that much more, whatever the rest is.
        let twice = explain(1.1, &account(), Some(0.5));
        assert!((explanation.unexplained - twice.unexplained - 0.25 * factor).abs() < 1e-9);
    }

    #[test]
    fn without_native_time_samples_say_what_translated_code_took() {
        let explanation = explain(1.1, &account(), None);
        let part = find(&explanation, "translated code").unwrap();
        assert_eq!(part.basis, Basis::Sampled);
        assert!((part.seconds - 0.6).abs() < 1e-9);
        assert!((explanation.unexplained - 0.065).abs() < 1e-9, "{}", explanation.unexplained);
    }

    #[test]
    fn interpreter_says_what_an_instruction_costs() {
        let after = json!({"busy_seconds": 1.0, "instructions": 1e8,
            "accounting": {"tsc_hz": 1e9, "guest_cycles": 9e8, "asleep_seconds": 0.0, "exits":
                [{"kind": "exit", "cause": "port-write", "count": 10, "total_cycles": 1e8}]}});
        let explanation = explain(1.0, &Account::between(&Value::Null, &after), Some(0.1));
        assert!(find(&explanation, "interpreted instructions, 9.0 ns each").is_some(), "{explanation:?}");
        assert!(explanation.unexplained.abs() < 1e-9);
    }

    #[test]
    fn without_accounting_all_is_unexplained_but_sleep() {
        let explanation = explain(2.0, &Account::default(), Some(1.0));
        assert_eq!((explanation.unexplained, explanation.parts.len()), (2.0, 0));
        assert_eq!(explanation.unexplained_percent(), 100.0);
    }
}
