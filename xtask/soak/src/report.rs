//! What the guest's lines say: which stressors ran and how, whether the kernel complained, how time went.

use std::collections::BTreeMap;
use std::time::Instant;

/// How a stressor came out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It ran, verified what it did, and made progress.
    Passed,
    /// It cannot run there: no such thing in this kernel, or no resources (statuses 3 and 4 of stress-ng(1)).
    Skipped,
    /// It ended well but counted no operation: the host was busy, or the engine is slow.
    Idle,
    /// Why it failed.
    Failed(String),
}

/// A stressor's end.
#[derive(Clone, PartialEq, Debug)]
pub struct Ended {
    /// stress-ng's name of it.
    pub name: String,
    /// How.
    pub verdict: Verdict,
    /// Operations that it counted.
    pub operations: Option<u64>,
    /// Guest seconds.
    pub seconds: f64,
}

/// What a line meant.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// So many stressors of so many seconds.
    Plan(usize, u64),
    /// A stressor begins.
    Begin(String),
    /// A stressor ended; it is the last of [`Soak::ended`].
    End,
    /// All are through.
    Done,
    /// The kernel complains.
    Complaint,
    /// Nothing to be told.
    Nothing,
}

/// Everything that was read.
#[derive(Debug, Default)]
pub struct Soak {
    /// Stressors in order.
    pub ended: Vec<Ended>,
    /// Lines of the kernel that must not be.
    pub complaints: Vec<String>,
    /// Whether the last line came.
    pub complete: bool,
    current: Option<(String, f64)>,
    operations: BTreeMap<String, u64>,
    /// What stressors said went wrong, of the one that runs.
    errors: Vec<String>,
    /// The guest's clock and the host's at the first and the last mark.
    marks: Option<((f64, Instant), (f64, Instant))>,
}

/// What the kernel says when something is wrong.
const COMPLAINTS: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops",
    "soft lockup",
    "hard LOCKUP",
    "rcu: INFO",
    "detected stall",
    "Call Trace",
    "Kernel panic",
    "Unable to handle",
    "TSC unstable",
    "Marking clocksource",
];

/// How stress-ng says that something is wrong.
const ERRORS: &[&str] = &["stress-ng: fail:", "stress-ng: error:", "unrecognized option"];

impl Soak {
    /// Takes a line of the console.
    pub fn take(&mut self, text: &str, when: Instant) -> Event {
        if let Some(rest) = text.split("soak: ").nth(1) {
            return self.mark(rest, when);
        }
        if !text.contains("stress-ng: ") && COMPLAINTS.iter().any(|c| text.contains(c)) {
            self.complaints.push(text.to_owned());
            return Event::Complaint;
        }
        if let Some((name, operations)) = metric(text) {
            self.operations.insert(name, operations);
        } else if ERRORS.iter().any(|e| text.contains(e)) {
            self.errors.push(text.to_owned());
        }
        Event::Nothing
    }

    fn mark(&mut self, rest: &str, when: Instant) -> Event {
        let words: Vec<&str> = rest.split_whitespace().collect();
        match words[..] {
            ["plan", count, share] => {
                Event::Plan(count.parse().unwrap_or_default(), share.parse().unwrap_or_default())
            }
            ["begin", name, up] => {
                self.time(up, when);
                self.current = Some((name.to_owned(), up.parse().unwrap_or_default()));
                self.errors.clear();
                Event::Begin(name.to_owned())
            }
            ["end", name, status, up] => {
                self.time(up, when);
                self.end(name, status, up.parse().unwrap_or_default());
                Event::End
            }
            ["done", up] => {
                self.time(up, when);
                self.complete = true;
                Event::Done
            }
            _ => Event::Nothing,
        }
    }

    fn time(&mut self, up: &str, when: Instant) {
        let Ok(up) = up.parse::<f64>() else { return };
        let first = self.marks.map_or((up, when), |m| m.0);
        self.marks = Some((first, (up, when)));
    }

    fn end(&mut self, name: &str, status: &str, up: f64) {
        let begun = self.current.take().filter(|c| c.0 == name).map_or(up, |c| c.1);
        let operations = self.operations.remove(name);
        let said = self.errors.first().cloned().unwrap_or_default();
        // What stress-ng says of a stressor that it counts among the pathological ones, that needs what is not there, or that it does not know yet.
        let none = ["No stress workers invoked", "unrecognized option"].iter().any(|t| said.contains(t));
        let verdict = match (status, operations) {
            ("3" | "4", _) => Verdict::Skipped,
            _ if none => Verdict::Skipped,
            // A stressor that finds nothing to do there says so and ends with 0.
            ("0", None) => Verdict::Skipped,
            ("0", Some(0)) if said.is_empty() => Verdict::Idle,
            ("0", Some(_)) if said.is_empty() => Verdict::Passed,
            _ => Verdict::Failed(format!("status {status} {said}")),
        };
        self.ended.push(Ended { name: name.to_owned(), verdict, operations, seconds: up - begun });
    }

    /// Seconds of the guest's clock and of the host's between the first and the last mark.
    pub fn clocks(&self) -> Option<(f64, f64)> {
        let (first, last) = self.marks?;
        Some((last.0 - first.0, (last.1 - first.1).as_secs_f64()))
    }

    /// How many came out so.
    pub fn count(&self, like: impl Fn(&Verdict) -> bool) -> usize {
        self.ended.iter().filter(|e| like(&e.verdict)).count()
    }
}

/// Name and bogus operations of a line of metrics: `stress-ng: metrc: [123] memcpy  456  2.00 …` (`info:` before 0.15.03).
fn metric(text: &str) -> Option<(String, u64)> {
    let rest = text.split("stress-ng: metrc:").nth(1).or_else(|| text.split("stress-ng: info:").nth(1))?;
    let mut words = rest.split_whitespace().skip(1);
    let (name, operations) = (words.next()?, words.next()?);
    // Real time follows; other lines have words there.
    words.next()?.parse::<f64>().ok()?;
    Some((name.to_owned(), operations.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Soak {
        let mut soak = Soak::default();
        for line in lines {
            soak.take(line, Instant::now());
        }
        soak
    }

    #[test]
    fn verdict_follows_status_and_metrics() {
        let metric = "stress-ng: metrc: [9] a  12  2.00  3.9  0.0  6.0  3.0";
        let soak = read(&[
            "soak: begin a 1.00",
            metric,
            "soak: end a 0 3.00",
            "soak: begin b 3.00",
            "soak: end b 4 3.50",
            "soak: begin c 4.00",
            "stress-ng: fail:  [7] c: checksum differs",
            "soak: end c 2 6.00",
            "soak: begin a 6.00",
            "stress-ng: metrc: [9] a  0  2.00  3.9  0.0  6.0  3.0",
            "soak: end a 0 8.00",
            "soak: begin d 8.00",
            "stress-ng: error: [5] No stress workers invoked",
            "soak: end d 1 8.00",
            "soak: done 8.00",
        ]);
        assert_eq!(soak.ended[0].verdict, Verdict::Passed);
        assert_eq!((soak.ended[0].operations, soak.ended[0].seconds), (Some(12), 2.0));
        assert_eq!(soak.ended[1].verdict, Verdict::Skipped);
        assert!(matches!(&soak.ended[2].verdict, Verdict::Failed(why) if why.contains("checksum")));
        assert_eq!(soak.ended[3].verdict, Verdict::Idle);
        assert!(soak.complete && soak.count(|v| *v == Verdict::Skipped) == 2);
        assert_eq!(soak.clocks().map(|c| c.0), Some(7.0));
    }

    #[test]
    fn kernel_complaints_are_kept() {
        let soak = read(&[
            "[  1.0] watchdog: BUG: soft lockup - CPU#0 stuck",
            "[ 2.0] eth0: up",
            "stress-ng: warn: [1] env: WARNING: early",
        ]);
        assert_eq!(soak.complaints.len(), 1);
        assert!(!soak.complete);
    }

    #[test]
    fn heads_of_the_table_of_metrics_are_none() {
        assert_eq!(metric("stress-ng: metrc: [9] stressor       bogo ops real time  usr time"), None);
        assert_eq!(metric("stress-ng: info:  [9] dispatching hogs: 2 cpu"), None);
    }
}
