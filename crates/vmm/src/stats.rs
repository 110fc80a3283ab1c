//! Where the time went: instructions, exits by cause, device counters.

use std::fmt;
use std::time::Duration;

use engine::cost::Table;
use engine::{ExitStats, Report, Vcpu};
use serde_json::{Value, json};

use crate::{account, clock, profile, report};

/// One vCPU's counts, over all lives of the machine.
#[derive(Clone, Debug, Default)]
pub struct VcpuStats {
    /// Instructions executed; with [`Report::interpreted_only`], those that were interpreted.
    pub instructions: u64,
    /// Time that it did not sleep in HLT.
    pub busy: Duration,
    /// Time that it did.
    pub asleep: Duration,
    /// CPU time that its thread had: less than `busy` where the host had other work, or a device waited.
    pub cpu: Duration,
    /// Time of `busy` in which its thread waited for a CPU of the host.
    pub waiting: Duration,
    /// Exits and other events by cause.
    pub exits: ExitStats,
    /// What the engine says of its own work.
    pub engine: Report,
}

impl VcpuStats {
    /// Adds what `vcpu` did in its life.
    pub(crate) fn add(&mut self, vcpu: &dyn Vcpu) {
        self.instructions += vcpu.instructions();
        self.exits.add(vcpu.stats());
        self.engine.add(&vcpu.report());
    }

    /// Where the time went, in ticks of the host's time-stamp counter, of which there are `hz` in a second.
    #[must_use]
    pub fn account(&self, hz: f64) -> Table {
        let mut rows = self.exits.rows();
        engine::cost::add_rows(&mut rows, &self.engine.costs);
        let waiting = self.waiting.as_secs_f64() * hz;
        Table { waiting, ..Table::new(self.busy.as_secs_f64() * hz, rows, self.exits.meter.measurements) }
    }

    /// As [`VcpuStats::add`], for a vCPU whose life ends.
    pub(crate) fn add_ended(&mut self, vcpu: &dyn Vcpu) {
        self.instructions += vcpu.instructions();
        self.exits.add(vcpu.stats());
        self.engine.add(&vcpu.report().ended());
    }
}

/// What a run cost.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Time that the vCPUs could run.
    pub elapsed: Duration,
    /// Guest time since power-on, reset or restore.
    pub guest_ns: u64,
    /// By vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// Counters by device.
    pub devices: Vec<(String, Vec<(&'static str, u64)>)>,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// How much of it the host really holds, in bytes.
    pub resident_bytes: u64,
    /// Resets that were carried out.
    pub resets: u64,
    /// Saves with restore that the guest asked for.
    pub restores: u64,
    /// Bytes of serial output that the sink did not take.
    pub serial_lost_bytes: u64,
}

impl Stats {
    /// Instructions of all vCPUs.
    #[must_use]
    pub fn instructions(&self) -> u64 {
        self.vcpus.iter().map(|v| v.instructions).sum()
    }

    /// Time that vCPUs did not sleep, all together.
    #[must_use]
    pub fn busy(&self) -> Duration {
        self.vcpus.iter().map(|v| v.busy).sum()
    }

    /// Million instructions a second that a vCPU executes while it does not sleep.
    #[must_use]
    pub fn mips(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let instructions = self.instructions() as f64;
        instructions / self.busy().as_secs_f64().max(1e-9) / 1e6
    }

    /// Exits of all vCPUs.
    #[must_use]
    pub fn exits(&self) -> ExitStats {
        let mut all = ExitStats::default();
        self.vcpus.iter().for_each(|v| all.add(&v.exits));
        all
    }

    /// All vCPUs as one.
    #[must_use]
    pub fn together(&self) -> VcpuStats {
        VcpuStats {
            instructions: self.instructions(),
            busy: self.busy(),
            asleep: self.vcpus.iter().map(|v| v.asleep).sum(),
            cpu: self.vcpus.iter().map(|v| v.cpu).sum(),
            waiting: self.vcpus.iter().map(|v| v.waiting).sum(),
            exits: self.exits(),
            engine: self.engine(),
        }
    }

    /// The engines of all vCPUs.
    #[must_use]
    pub fn engine(&self) -> Report {
        let mut all = Report::default();
        self.vcpus.iter().for_each(|v| all.add(&v.engine));
        all
    }

    /// The counts of instructions. Where only interpreted ones are counted, they are not called `instructions`.
    fn json_of_instructions(&self, engine: &Report) -> Value {
        let (all, interpreted) = (self.instructions(), engine.interpreted_only);
        json!({
            "instructions": (!interpreted).then_some(all),
            "interpreted_instructions": interpreted.then_some(all),
            "mips": (!interpreted).then(|| self.mips()),
        })
    }

    /// Everything, for programs.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let exits = |exits: &ExitStats| -> Value {
            exits.iter().map(|(c, n)| (c.name().to_owned(), json!(n))).collect()
        };
        let hz = clock::host_tsc_hz();
        let vcpu = |v: &VcpuStats| {
            json!({
                "instructions": v.instructions,
                "interpreted_only": v.engine.interpreted_only,
                "busy_seconds": v.busy.as_secs_f64(),
                "exits": exits(&v.exits),
                "accounting": account::to_json(v, hz),
            })
        };
        let device = |(name, counters): &(String, Vec<(&str, u64)>)| -> (String, Value) {
            (name.clone(), counters.iter().map(|&(n, v)| (n.to_owned(), json!(v))).collect())
        };
        let engine = self.engine();
        let mut all = json!({
            "elapsed_seconds": self.elapsed.as_secs_f64(),
            "busy_seconds": self.busy().as_secs_f64(),
            "guest_ns": self.guest_ns,
            "exits": exits(&self.exits()),
            "accounting": account::to_json(&self.together(), hz),
            "engine": report::to_json(&engine, self.busy()),
            "vcpus": self.vcpus.iter().map(vcpu).collect::<Vec<_>>(),
            "devices": self.devices.iter().map(device).collect::<serde_json::Map<_, _>>(),
            "memory_bytes": self.memory_bytes,
            "memory_resident_bytes": self.resident_bytes,
            "resets": self.resets,
            "restores": self.restores,
            "serial_lost_bytes": self.serial_lost_bytes,
        });
        if let (Some(all), Some(profile)) = (all.as_object_mut(), &engine.profile) {
            all.insert("profile".to_owned(), profile::to_json(profile));
        }
        if let (Some(all), Value::Object(counts)) = (all.as_object_mut(), self.json_of_instructions(&engine))
        {
            all.extend(counts);
        }
        all
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "time                {:>18.3} s", self.elapsed.as_secs_f64())?;
        writeln!(f, "  vCPUs not asleep  {:>18.3} s", self.busy().as_secs_f64())?;
        let engine = self.engine();
        if engine.interpreted_only {
            // Translated code does not count what it executes.
            writeln!(f, "interpreted instructions  {:>12}", self.instructions())?;
        } else {
            writeln!(f, "instructions        {:>18}", self.instructions())?;
            writeln!(f, "million per second  {:>18.1}", self.mips())?;
        }
        if self.vcpus.len() > 1 {
            for (index, vcpu) in self.vcpus.iter().enumerate() {
                writeln!(f, "  vcpu{index:<13} {:>18}", vcpu.instructions)?;
            }
        }
        writeln!(f, "guest memory        {:>14} MiB", self.memory_bytes >> 20)?;
        writeln!(f, "  resident          {:>14} MiB", self.resident_bytes >> 20)?;
        for (name, count) in [
            ("resets", self.resets),
            ("restores", self.restores),
            ("serial lost bytes", self.serial_lost_bytes),
        ] {
            if count > 0 {
                writeln!(f, "{name:<19} {count:>18}")?;
            }
        }
        account::table(self, clock::host_tsc_hz(), f)?;
        report::table(&engine, self.busy(), f)?;
        engine.profile.as_ref().map_or(Ok(()), |profile| profile::table(profile, f))?;
        for (name, counters) in &self.devices {
            let used: Vec<_> =
                counters.iter().filter(|(_, v)| *v > 0).map(|(n, v)| format!("{n} {v}")).collect();
            if !used.is_empty() {
                writeln!(f, "{name}: {}", used.join(", "))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::Cause;

    #[test]
    fn table_and_json_show_every_exit_that_happened() {
        let mut exits = ExitStats::default();
        exits.count(Cause::PortWrite);
        let vcpu = VcpuStats {
            instructions: 2_000_000,
            busy: Duration::from_millis(500),
            exits,
            ..VcpuStats::default()
        };
        let stats =
            Stats { elapsed: Duration::from_secs(1), vcpus: vec![vcpu.clone(), vcpu], ..Stats::default() };
        let table = stats.to_string();
        assert!(table.contains("port-write") && !table.contains("port-read"), "{table}");
        let json = stats.to_json();
        assert_eq!(json["exits"]["port-write"], 2);
        assert_eq!(json["vcpus"][1]["instructions"], 2_000_000);
        assert!((stats.mips() - 4.0).abs() < 1e-9);
    }

    #[test]
    fn instructions_that_were_interpreted_only_are_called_so() {
        let mut vcpu = VcpuStats { instructions: 7, ..VcpuStats::default() };
        let of = |vcpu: &VcpuStats| Stats { vcpus: vec![vcpu.clone()], ..Stats::default() };
        assert_eq!(of(&vcpu).to_json()["instructions"], 7);
        assert!(of(&vcpu).to_json()["interpreted_instructions"].is_null());
        vcpu.engine.interpreted_only = true;
        let (json, table) = (of(&vcpu).to_json(), of(&vcpu).to_string());
        assert_eq!(json["interpreted_instructions"], 7);
        assert!(json["instructions"].is_null() && json["mips"].is_null());
        assert!(table.contains("interpreted instructions") && !table.contains("million per second"));
    }
}
