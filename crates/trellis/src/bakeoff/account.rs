//! What a machine's statistics say between two moments: the accounting of exits and the samples of the profile, as differences.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use crate::model::events::difference;

/// Rows of the accounting by kind and cause: how often, and cycles if they are known.
type Rows = BTreeMap<(String, String), (f64, Option<f64>)>;

/// A row of the accounting.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// What sort of event.
    pub kind: String,
    /// Which.
    pub cause: String,
    /// How often.
    pub count: f64,
    /// How long all of them took; none where they are only counted.
    pub seconds: Option<f64>,
}

/// A place in guest code.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Site {
    /// Address of the instruction.
    pub rip: u64,
    /// Privilege level.
    pub cpl: u64,
    /// The address space.
    pub cr3: u64,
}

/// Samples of the host's instruction pointer in a vCPU's thread.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Profile {
    /// Samples a second of CPU time.
    pub hz: f64,
    /// All of them.
    pub samples: f64,
    /// By where: `translated`, `assembly`, `engine`.
    pub places: BTreeMap<String, f64>,
    /// Those in translated code by what the instruction is for.
    pub categories: BTreeMap<String, f64>,
    /// By guest instruction.
    #[serde(skip)]
    pub sites: Vec<(Site, f64)>,
    /// Guest and host instructions of the path through translated code.
    pub path: Option<(f64, f64)>,
}

/// What happened between two statistics.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Account {
    /// Not asleep, in seconds.
    pub busy: f64,
    /// Asleep.
    pub asleep: f64,
    /// CPU time of the vCPU threads, as the host's kernel says.
    pub cpu: Option<f64>,
    /// Guest instructions, where they are counted.
    pub instructions: Option<f64>,
    /// The accounting, dearest first; empty where there is none.
    pub rows: Vec<Row>,
    /// What of the time is in no row: the guest's own code.
    pub rest: Option<f64>,
    /// The profile, if there was one.
    pub profile: Option<Profile>,
}

impl Account {
    /// The difference of two statistics as `trellis stat --json` and `--stats=FILE` give them; `before` may be `null`.
    #[must_use]
    pub fn between(before: &Value, after: &Value) -> Self {
        let accounting = |name: &str| difference(before, after, &["accounting", name]);
        let hz = after.pointer("/accounting/tsc_hz").and_then(Value::as_f64).unwrap_or(1e9).max(1.0);
        let early = rows(before);
        let row = |((kind, cause), (count, cycles)): ((String, String), (f64, Option<f64>))| {
            let (count_before, cycles_before) =
                early.get(&(kind.clone(), cause.clone())).copied().unwrap_or_default();
            let seconds = cycles.map(|cycles| ((cycles - cycles_before.unwrap_or(0.0)) / hz).max(0.0));
            Row { kind, cause, count: (count - count_before).max(0.0), seconds }
        };
        let mut rows: Vec<Row> = rows(after).into_iter().map(row).filter(|row| row.count > 0.0).collect();
        rows.sort_by(|a, b| b.seconds.unwrap_or(-1.0).total_cmp(&a.seconds.unwrap_or(-1.0)));
        Self {
            busy: difference(before, after, &["busy_seconds"]).unwrap_or(0.0),
            asleep: accounting("asleep_seconds").unwrap_or(0.0),
            cpu: accounting("cpu_seconds"),
            instructions: difference(before, after, &["instructions"]),
            rows,
            rest: accounting("guest_cycles").map(|cycles| cycles / hz),
            profile: profile(before, after),
        }
    }

    /// CPU time if it is known, else what was not asleep.
    #[must_use]
    pub fn cpu_or_busy(&self) -> f64 {
        self.cpu.unwrap_or(self.busy)
    }

    /// Seconds of all rows of a kind.
    #[must_use]
    pub fn kind(&self, kind: &str) -> f64 {
        self.rows.iter().filter(|row| row.kind == kind).filter_map(|row| row.seconds).sum()
    }

    /// Seconds of all rows.
    #[must_use]
    pub fn all(&self) -> f64 {
        self.rows.iter().filter_map(|row| row.seconds).sum()
    }
}

fn rows(statistics: &Value) -> Rows {
    let rows = statistics.pointer("/accounting/exits").and_then(Value::as_array);
    let text = |row: &Value, name: &str| row.get(name).and_then(Value::as_str).unwrap_or("").to_owned();
    let number = |row: &Value, name: &str| row.get(name).and_then(Value::as_f64);
    let entry = |row: &Value| {
        let key = (text(row, "kind"), text(row, "cause"));
        (key, (number(row, "count").unwrap_or(0.0), number(row, "total_cycles")))
    };
    rows.into_iter().flatten().map(entry).collect()
}

fn profile(before: &Value, after: &Value) -> Option<Profile> {
    let now = after.get("profile").filter(|profile| profile.is_object())?;
    let counts = |name: &str| -> BTreeMap<String, f64> {
        let names = now.get(name).and_then(Value::as_object).into_iter().flat_map(|counts| counts.keys());
        let count = |key: &String| difference(before, after, &["profile", name, key]).unwrap_or(0.0);
        names.map(|key| (key.clone(), count(key))).collect()
    };
    let path =
        |name: &str| difference(before, after, &["profile", "path", name]).filter(|count| *count > 0.0);
    let early = sites(before);
    let mut sites: Vec<(Site, f64)> = sites(after)
        .into_iter()
        .map(|(site, samples)| {
            let samples = samples - early.get(&site).copied().unwrap_or(0.0);
            (site, samples)
        })
        .filter(|(_, samples)| *samples > 0.0)
        .collect();
    sites.sort_by(|a, b| b.1.total_cmp(&a.1));
    Some(Profile {
        hz: now.get("hz").and_then(Value::as_f64).unwrap_or(1.0).max(1e-9),
        samples: difference(before, after, &["profile", "samples"]).unwrap_or(0.0),
        places: counts("places"),
        categories: counts("categories"),
        sites,
        path: path("guest_instructions").zip(path("host_instructions")),
    })
}

fn sites(statistics: &Value) -> BTreeMap<Site, f64> {
    let sites = statistics.pointer("/profile/sites").and_then(Value::as_array);
    let address = |site: &Value, name: &str| {
        let value = site.get(name)?;
        value.as_u64().or_else(|| u64::from_str_radix(value.as_str()?.trim_start_matches("0x"), 16).ok())
    };
    let entry = |site: &Value| {
        let place = Site {
            rip: address(site, "rip")?,
            cpl: address(site, "cpl").unwrap_or(0),
            cr3: address(site, "cr3").unwrap_or(0),
        };
        Some((place, site.get("samples")?.as_f64()?))
    };
    sites.into_iter().flatten().filter_map(entry).collect()
}

impl Profile {
    /// The share of a place, of `cpu` seconds.
    #[must_use]
    pub fn seconds_at(&self, place: &str, cpu: f64) -> f64 {
        self.places.get(place).copied().unwrap_or(0.0) / self.samples.max(1.0) * cpu
    }

    /// The share of translated code and the assembly around it, of `cpu` seconds.
    #[must_use]
    pub fn in_translated_code(&self, cpu: f64) -> f64 {
        self.seconds_at("translated", cpu) + self.seconds_at("assembly", cpu)
    }

    /// The part of translated code that has a purpose, of all samples in it.
    #[must_use]
    pub fn share(&self, category: &str) -> Option<f64> {
        let all: f64 = self.categories.values().sum();
        (all > 0.0).then(|| self.categories.get(category).copied().unwrap_or(0.0) / all)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A second of a vCPU: ten callouts of 0.1 s together, translation of 0.2 s, 0.6 s of code.
    pub fn after() -> Value {
        json!({
            "busy_seconds": 2.0, "instructions": null,
            "accounting": {
                "tsc_hz": 1e9, "busy_cycles": 2e9, "asleep_seconds": 5.0, "cpu_seconds": 1.9, "guest_cycles": 1.6e9,
                "exits": [
                    {"kind": "callout", "cause": "CPUID", "count": 15, "total_cycles": 1.5e8},
                    {"kind": "translation", "cause": "fragments", "count": 100, "total_cycles": 2e8},
                    {"kind": "assembly", "cause": "TLB refill", "count": 7, "total_cycles": null},
                ]},
            "profile": {
                "hz": 1000, "samples": 1900,
                "places": {"translated": 1500, "assembly": 50, "engine": 350},
                "categories": {"guest": 750, "check": 750},
                "sites": [{"rip": "0xffffffff81000010", "cpl": 0, "cr3": "0x1000", "samples": 900},
                          {"rip": "0x401000", "cpl": 3, "cr3": "0x2000", "samples": 600}],
                "path": {"guest_instructions": 1000, "host_instructions": 2500, "lengthening": 2.5}}
        })
    }

    /// The same earlier.
    pub fn before() -> Value {
        json!({
            "busy_seconds": 1.0,
            "accounting": {
                "tsc_hz": 1e9, "asleep_seconds": 4.0, "cpu_seconds": 0.95, "guest_cycles": 1e9,
                "exits": [{"kind": "callout", "cause": "CPUID", "count": 5, "total_cycles": 5e7}]},
            "profile": {"hz": 1000, "samples": 950, "places": {"translated": 950},
                "sites": [{"rip": "0xffffffff81000010", "cpl": 0, "cr3": "0x1000", "samples": 900}]}
        })
    }

    #[test]
    fn account_is_the_difference() {
        let account = Account::between(&before(), &after());
        assert_eq!((account.busy, account.asleep), (1.0, 1.0));
        assert!((account.cpu.unwrap() - 0.95).abs() < 1e-9 && (account.rest.unwrap() - 0.6).abs() < 1e-9);
        assert_eq!(account.rows[0].kind, "translation");
        assert!((account.kind("callout") - 0.1).abs() < 1e-9 && (account.all() - 0.3).abs() < 1e-9);
        assert_eq!(account.rows[2].seconds, None);
        let profile = account.profile.unwrap();
        assert_eq!(profile.sites.len(), 1, "the other had no new samples");
        assert_eq!((profile.sites[0].0.rip, profile.path), (0x40_1000, Some((1000.0, 2500.0))));
        assert!((profile.in_translated_code(0.95) - 0.6).abs() < 1e-9);
        assert_eq!(profile.share("check"), Some(0.5));
    }

    #[test]
    fn statistics_without_accounting_give_times_only() {
        let account = Account::between(&Value::Null, &json!({"busy_seconds": 3.0}));
        assert_eq!((account.busy, account.rest, account.rows.len()), (3.0, None, 0));
        assert_eq!(account.profile, None);
    }
}
