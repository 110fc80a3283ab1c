//! Rates of what the machines count, between two looks at them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::control::{Info, client};

/// For so long a machine that has ended is mentioned.
const MENTIONED: Duration = Duration::from_secs(5);

/// A cause of exits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cause {
    /// Kind and name.
    pub name: String,
    /// Exits a second.
    pub rate: f64,
    /// Cycles of one; None where it is only counted.
    pub cycles: Option<f64>,
    /// Percent of the time that the CPUs did not sleep.
    pub share: Option<f64>,
}

/// A virtual CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cpu {
    /// Percent of the time that it did not sleep.
    pub load: f64,
    /// Percent of that in the guest's code.
    pub guest: f64,
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Machine {
    /// What it says of itself.
    pub info: Info,
    /// Why it says no more.
    pub error: Option<String>,
    /// Percent of one CPU.
    pub load: f64,
    /// Percent of that in the guest's code.
    pub guest: f64,
    /// Exits a second, all causes.
    pub exits: f64,
    /// Guest memory that the host holds.
    pub resident_bytes: u64,
    /// Each CPU.
    pub cpus: Vec<Cpu>,
    /// The causes that happened, by descending share.
    pub causes: Vec<Cause>,
}

/// A look at all machines.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// Those that run.
    pub machines: Vec<Machine>,
    /// Those that ran when they were last looked at.
    pub ended: Vec<String>,
}

/// What a machine had counted.
struct Reading {
    at: Instant,
    pid: u32,
    stats: Value,
}

/// Looks at machines again and again.
#[derive(Default)]
pub struct Watcher {
    readings: HashMap<String, Reading>,
    ended: Vec<(Instant, String)>,
}

impl Watcher {
    /// What they did since the last look; those that are new, since their start.
    pub fn look(&mut self) -> Frame {
        self.frame(client::survey(), Instant::now())
    }

    fn frame(&mut self, surveyed: Vec<client::Surveyed>, now: Instant) -> Frame {
        let mut readings = HashMap::new();
        let mut machines = Vec::new();
        for (name, said) in surveyed {
            let before = self.readings.remove(&name);
            match said {
                Ok((info, stats)) => {
                    let same = before.as_ref().filter(|b| b.pid == info.pid);
                    machines.push(machine(info.clone(), &stats, same.map(|b| (now - b.at, &b.stats))));
                    readings.insert(name, Reading { at: now, pid: info.pid, stats });
                }
                Err(error) => {
                    let info = Info { name: name.clone(), ..Info::default() };
                    machines.push(Machine { info, error: Some(error), ..Machine::default() });
                    // It may answer again.
                    readings.extend(before.map(|reading| (name, reading)));
                }
            }
        }
        let gone = std::mem::replace(&mut self.readings, readings);
        self.ended.extend(gone.into_keys().map(|name| (now, name)));
        self.ended.retain(|(at, name)| now - *at < MENTIONED && !self.readings.contains_key(name));
        Frame { machines, ended: self.ended.iter().map(|(_, name)| name.clone()).collect() }
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// Part of a whole in percent.
fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (100.0 * part / whole).clamp(0.0, 100.0) } else { 0.0 }
}

/// The growth of a number since the last look.
fn growth(new: &Value, old: Option<&Value>) -> f64 {
    (number(new) - old.map_or(0.0, number)).max(0.0)
}

/// The rates of a machine since the last look, or since its start.
fn machine(info: Info, stats: &Value, before: Option<(Duration, &Value)>) -> Machine {
    let old = before.map(|(_, stats)| stats);
    // While a machine is paused, or stops to be asked, its CPUs cannot run.
    let passed = before.map_or_else(|| number(&stats["elapsed_seconds"]), |(passed, _)| passed.as_secs_f64());
    let passed = passed.max(1e-3);
    let (accounting, old_accounting) = (&stats["accounting"], old.map(|o| &o["accounting"]));
    let busy_cycles = growth(&accounting["busy_cycles"], old_accounting.map(|o| &o["busy_cycles"]));
    let causes = causes(accounting, old_accounting, passed, busy_cycles);
    let vcpus = stats["vcpus"].as_array().map_or(&[][..], Vec::as_slice);
    let cpus: Vec<_> =
        vcpus.iter().enumerate().map(|(n, v)| cpu(v, old.map(|o| &o["vcpus"][n]), passed)).collect();
    Machine {
        info,
        error: None,
        load: cpus.iter().map(|cpu| cpu.load).sum(),
        guest: guest(accounting, old_accounting),
        exits: causes.iter().map(|cause| cause.rate).sum(),
        resident_bytes: stats["memory_resident_bytes"].as_u64().unwrap_or(0),
        cpus,
        causes,
    }
}

fn cpu(stats: &Value, old: Option<&Value>, passed: f64) -> Cpu {
    let busy = growth(&stats["busy_seconds"], old.map(|o| &o["busy_seconds"]));
    Cpu { load: percent(busy, passed), guest: guest(&stats["accounting"], old.map(|o| &o["accounting"])) }
}

/// Percent of the time not asleep that was the guest's.
fn guest(accounting: &Value, old: Option<&Value>) -> f64 {
    let grown = |key: &str| growth(&accounting[key], old.map(|o| &o[key]));
    percent(grown("guest_cycles"), grown("busy_cycles"))
}

fn causes(accounting: &Value, old: Option<&Value>, passed: f64, busy_cycles: f64) -> Vec<Cause> {
    let rows = |value: &Value| value["exits"].as_array().cloned().unwrap_or_default();
    let name = |row: &Value| {
        format!("{} {}", row["kind"].as_str().unwrap_or_default(), row["cause"].as_str().unwrap_or_default())
    };
    let old: HashMap<String, Value> =
        old.map(rows).unwrap_or_default().into_iter().map(|r| (name(&r), r)).collect();
    let cause = |row: Value| {
        let name = name(&row);
        let before = old.get(&name);
        let count = growth(&row["count"], before.map(|b| &b["count"]));
        let cycles = row["total_cycles"]
            .as_f64()
            .map(|_| growth(&row["total_cycles"], before.map(|b| &b["total_cycles"])));
        Cause {
            name,
            rate: count / passed,
            cycles: cycles.filter(|_| count > 0.0).map(|cycles| cycles / count),
            share: cycles.map(|cycles| percent(cycles, busy_cycles)),
        }
    };
    let mut causes: Vec<_> = rows(accounting).into_iter().map(cause).filter(|c| c.rate > 0.0).collect();
    let key = |c: &Cause| (c.share.unwrap_or(-1.0), c.rate);
    causes.sort_by(|a, b| key(b).partial_cmp(&key(a)).unwrap_or(std::cmp::Ordering::Equal));
    causes
}

/// Machines as tests want them.
#[cfg(test)]
pub mod samples {
    use serde_json::json;

    use super::*;

    /// A machine's statistics after so many seconds, in which it was busy for half of the time.
    pub fn stats(seconds: f64) -> Value {
        let (busy, cycles) = (seconds / 2.0, 1e9 * seconds / 2.0);
        let accounting = json!({
            "tsc_hz": 1e9, "busy_cycles": cycles, "guest_cycles": 0.75 * cycles,
            "exits": [
                {"kind": "callout", "cause": "CPUID", "count": 1000.0 * seconds, "total_cycles": 0.2 * cycles},
                {"kind": "assembly", "cause": "TLB refills", "count": 5000.0 * seconds, "total_cycles": null},
                {"kind": "exit", "cause": "halt", "count": 0, "total_cycles": null},
            ],
        });
        json!({
            "elapsed_seconds": seconds, "memory_resident_bytes": 64 << 20, "accounting": accounting,
            "vcpus": [{"busy_seconds": busy, "accounting": accounting}],
        })
    }

    /// What it is.
    pub fn info(name: &str) -> Info {
        Info {
            name: name.into(),
            pid: 7,
            guest: "debian".into(),
            engine: "bt".into(),
            cpus: 1,
            memory_bytes: 512 << 20,
            seconds: 3725,
            ..Info::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(watcher: &mut Watcher, now: Instant, machines: &[(&str, f64)]) -> Frame {
        let said =
            machines.iter().map(|&(name, s)| (name.to_owned(), Ok((samples::info(name), samples::stats(s)))));
        watcher.frame(said.collect(), now)
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks() {
        let (mut watcher, start) = (Watcher::default(), Instant::now());
        let first = look(&mut watcher, start, &[("web", 10.0)]).machines.remove(0);
        let second = look(&mut watcher, start + Duration::from_secs(2), &[("web", 12.0)]).machines.remove(0);
        for m in [first, second] {
            assert!((m.load - 50.0).abs() < 1e-6 && (m.guest - 75.0).abs() < 1e-6, "{m:?}");
            assert!((m.exits - 6000.0).abs() < 1e-6 && m.cpus.len() == 1, "{m:?}");
            let names: Vec<_> = m.causes.iter().map(|c| c.name.as_str()).collect();
            assert_eq!(names, ["callout CPUID", "assembly TLB refills"]);
            assert!((m.causes[0].share.unwrap() - 20.0).abs() < 1e-6 && m.causes[1].share.is_none());
            assert!((m.causes[0].cycles.unwrap() - 1e5).abs() < 1e-3);
        }
    }

    #[test]
    fn machine_that_ends_is_mentioned_for_a_while_and_a_new_one_of_its_name_begins_anew() {
        let (mut watcher, start) = (Watcher::default(), Instant::now());
        look(&mut watcher, start, &[("a", 10.0), ("b", 10.0)]);
        let frame = look(&mut watcher, start + Duration::from_secs(1), &[("a", 11.0)]);
        assert_eq!((frame.machines.len(), frame.ended), (1, vec!["b".to_owned()]));
        let frame = look(&mut watcher, start + Duration::from_secs(2), &[("a", 12.0), ("b", 0.5)]);
        assert_eq!((frame.machines.len(), frame.ended.len()), (2, 0));
        assert!((frame.machines[1].load - 50.0).abs() < 1e-6, "{:?}", frame.machines[1]);
        let later = look(&mut watcher, start + Duration::from_secs(3), &[]);
        assert_eq!(later.ended.len(), 2);
        assert!(look(&mut watcher, start + Duration::from_secs(30), &[]).ended.is_empty());
    }

    #[test]
    fn machine_that_does_not_answer_is_shown_with_its_reason() {
        let (mut watcher, start) = (Watcher::default(), Instant::now());
        look(&mut watcher, start, &[("a", 10.0)]);
        let frame =
            watcher.frame(vec![("a".into(), Err("does not answer".into()))], start + Duration::from_secs(1));
        assert_eq!(frame.machines[0].error.as_deref(), Some("does not answer"));
        let back = look(&mut watcher, start + Duration::from_secs(2), &[("a", 12.0)]);
        assert!((back.machines[0].load - 50.0).abs() < 1e-6);
    }

    #[test]
    fn statistics_of_another_version_are_no_reason_to_fail() {
        let mut watcher = Watcher::default();
        let odd = serde_json::json!({"vcpus": 7, "accounting": {"exits": "x", "busy_cycles": null}});
        let frame = watcher.frame(vec![("a".into(), Ok((Info::default(), odd)))], Instant::now());
        assert_eq!((frame.machines[0].cpus.len(), frame.machines[0].causes.len()), (0, 0));
    }
}
