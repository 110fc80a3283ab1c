//! Where a mode's time went: parts that were measured each on its own, and what is left when they are taken from the clock's.
//!
//! Nothing is "the rest" of something else with the translator. Exits, translation and the engine's other work are measured by the time-stamp
//! counter; time in translated code is the share of samples in it, of the CPU time that the host's kernel says the vCPU's thread had; so are its
//! parts by what the sampled instruction is for: the guest's own work, and the lengthening of its path. Sleep is what the machine says. So
//! the remainder can be large, and of either sign; it is printed as it is.
//!
//! Beside it stands a second remainder, with a **prediction** in the place of the samples' time: native CPU time × path lengthening, where the
//! first factor comes from another run altogether and the second is a ratio of samples, or of instructions in fragments.
//!
//! What the time-stamp counter measured has in it what the host gave to others meanwhile: that is a part of its own, and all that was
//! measured so is shortened alike.

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
}

/// What native time says of the time in translated code.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// CPU time of the same runs natively.
    pub native: f64,
    /// Native time × lengthening.
    pub seconds: f64,
    /// What is not explained if this stands for the samples' time.
    pub unexplained: f64,
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
    /// Time in translated code, as the samples have it.
    pub sampled: Option<f64>,
    /// The same as native time predicts it.
    pub predicted: Option<Prediction>,
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

/// What a sampled instruction is for, and what that is called.
const PURPOSES: [(&str, &str); 7] = [
    ("check", "checks of accesses"),
    ("address", "addresses for them"),
    ("lookup", "lookups of jump targets"),
    ("flags", "saving flags"),
    ("registers", "registers kept in memory"),
    ("poll", "polls"),
    ("other", "other"),
];

/// Explains `seconds` of a mode whose engine made `account`; `native` is how much CPU time the same took natively.
#[must_use]
pub fn explain(seconds: f64, account: &Account, native: Option<f64>) -> Explanation {
    let account = &running(account);
    let lengthening = lengthening(account);
    let sampled = account.profile.as_ref().map(|profile| profile.in_translated_code(account.cpu_or_busy()));
    let mut parts: Vec<Part> = KINDS.iter().filter_map(|(kind, what)| part(account, kind, what)).collect();
    let known: Vec<&str> = KINDS.iter().map(|(kind, _)| *kind).collect();
    let mut others: Vec<&str> = account.rows.iter().map(|row| row.kind.as_str()).collect();
    others.sort_unstable();
    others.dedup();
    let others = others.into_iter().filter(|kind| !known.contains(kind));
    parts.extend(others.filter_map(|kind| part(account, kind, kind)));
    parts.extend(translated(account));
    parts.extend(interpreted(account));
    if let Some(cpu) = account.cpu.filter(|cpu| account.busy > *cpu) {
        parts.push(plain("the host ran something else", account.busy - cpu));
    }
    // What lies outside of the work is asleep as well; the vCPU's threads were busy for all but this.
    let idle = (seconds - account.busy).max(0.0);
    parts.push(plain("idle: the guest slept", idle.min(account.asleep.max(0.0))));
    parts.retain(|part| part.seconds > 0.0);
    parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    let explained: f64 = parts.iter().map(|part| part.seconds).sum();
    let unexplained = seconds - explained;
    let factor = lengthening.by_samples.or(lengthening.by_instructions);
    let predicted = match (native, factor, sampled) {
        (Some(native), Some(factor), Some(sampled)) => {
            let seconds = native * factor;
            Some(Prediction { native, seconds, unexplained: unexplained + sampled - seconds })
        }
        _ => None,
    };
    Explanation { seconds, parts, unexplained, sampled, predicted, lengthening }
}

/// Translated code by what its instructions are for, and the assembly that it calls.
fn translated(account: &Account) -> Vec<Part> {
    let Some(profile) = &account.profile else { return Vec::new() };
    let cpu = account.cpu_or_busy();
    let sampled = |what: &str, seconds, rows| Part {
        what: what.to_owned(),
        count: None,
        seconds,
        basis: Basis::Sampled,
        rows,
    };
    let code = profile.seconds_at("translated", cpu);
    let Some(own) = profile.share("guest") else {
        return vec![sampled("translated code", profile.in_translated_code(cpu), Vec::new())];
    };
    let row = |cause: &str, seconds: f64| Row {
        kind: "lengthening".into(),
        cause: cause.into(),
        count: 0.0,
        seconds: Some(seconds),
    };
    let purposes = PURPOSES.iter().map(|(name, what)| row(what, code * profile.share(name).unwrap_or(0.0)));
    let mut rows: Vec<Row> = purposes.collect();
    rows.push(row("refills and lookups in assembly", profile.seconds_at("assembly", cpu)));
    rows.retain(|row| row.seconds.is_some_and(|seconds| seconds > 0.0));
    rows.sort_by(|a, b| b.seconds.unwrap_or(0.0).total_cmp(&a.seconds.unwrap_or(0.0)));
    let longer = rows.iter().filter_map(|row| row.seconds).sum();
    vec![
        sampled("the guest's own instructions", code * own, Vec::new()),
        sampled("path lengthening", longer, rows),
    ]
}

/// Without translated code, what is in no row of an engine that counts instructions are those.
fn interpreted(account: &Account) -> Option<Part> {
    let (count, rest) = (account.instructions?, account.rest?);
    let what = format!("interpreted instructions, {:.1} ns each", rest / count.max(1.0) * 1e9);
    Some(Part { count: Some(count), ..plain(&what, rest) })
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
        let translated = profile.seconds_at("translated", 1.0);
        if translated > 0.0 { profile.in_translated_code(1.0) / translated } else { 1.0 }
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

    /// What is not explained if native time predicts the time in translated code, in percent of all.
    #[must_use]
    pub fn predicted_percent(&self) -> Option<f64> {
        self.predicted.map(|predicted| predicted.unexplained / self.seconds.max(f64::MIN_POSITIVE) * 100.0)
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
    fn translated_code_is_sampled_and_split_by_purpose() {
        // Of 950 new samples 550 are in translated code, half of it the guest's own, and 50 around it; 0.95 s of CPU time.
        let explanation = explain(1.1, &account(), None);
        let own = find(&explanation, "the guest's own").unwrap();
        assert!((own.seconds - 0.275).abs() < 1e-9, "{own:?}");
        let longer = find(&explanation, "path lengthening").unwrap();
        assert!((longer.seconds - 0.325).abs() < 1e-9 && longer.basis == Basis::Sampled, "{longer:?}");
        assert_eq!(longer.rows[0].cause, "checks of accesses");
        assert!((explanation.sampled.unwrap() - 0.6).abs() < 1e-9);
        assert_eq!(explanation.predicted, None);
    }

    #[test]
    fn prediction_comes_from_native_time_and_has_a_remainder_of_its_own() {
        let explanation = explain(1.1, &account(), Some(0.25));
        let predicted = explanation.predicted.unwrap();
        let factor = 600.0 / 550.0 / 0.5;
        assert!((predicted.seconds - 0.25 * factor).abs() < 1e-9, "{predicted:?}");
        assert_eq!(explanation.lengthening.by_instructions, Some(2.5));
        assert!((predicted.unexplained - explanation.unexplained - (0.6 - predicted.seconds)).abs() < 1e-9);
        // The measured parts do not know of native time.
        assert_eq!(explanation.parts, explain(1.1, &account(), Some(0.5)).parts);
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
