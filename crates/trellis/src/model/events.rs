//! What a workload does that a hypervisor may have to see, per operation.

use serde::Serialize;
use serde_json::Value;

/// Counts per operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Events {
    /// Guest instructions.
    pub instructions: f64,
    /// SYSCALL, SYSENTER, INT n.
    pub system_calls: f64,
    /// SYSRET, SYSEXIT, IRET: ways back from the kernel.
    pub returns: f64,
    /// Page faults that the guest's kernel sees.
    pub page_faults: f64,
    /// Other exceptions.
    pub exceptions: f64,
    /// External interrupts.
    pub interrupts: f64,
    /// Entries that shadow page tables lack: hidden page faults.
    pub shadow_fills: f64,
    /// Writes to page tables that shadow page tables must hear of.
    pub traced_writes: f64,
    /// MOV to CR3: address spaces switched to, and flushes.
    pub cr3_writes: f64,
    /// INVLPG, INVPCID.
    pub page_flushes: f64,
    /// CLI, STI, POPF, CLTS, SWAPGS and other instructions of the kernel that VT-x runs without an exit.
    pub harmless: f64,
    /// Writes of CR0, CR4 and debug registers.
    pub control_writes: f64,
    /// CPUID.
    pub cpuids: f64,
    /// RDMSR and WRMSR.
    pub msrs: f64,
    /// IN and OUT.
    pub ports: f64,
    /// Accesses to device memory, the local APIC among it.
    pub device_accesses: f64,
    /// HLT and MWAIT that slept.
    pub halts: f64,
    /// Walks of a TLB with 512 entries, of data.
    pub walks: f64,
    /// Those of them that end at a large page.
    pub large_walks: f64,
}

impl Events {
    /// What lies between two statistics (`trellis stat --json`), by `operations`. `None` if there was no census.
    #[must_use]
    pub fn between(before: &Value, after: &Value, operations: f64) -> Option<Self> {
        let engine = |name: &str| difference(before, after, &["engine", name]);
        let exit = |name: &str| difference(before, after, &["exits", name]).unwrap_or(0.0);
        let instruction =
            |name: &str| difference(before, after, &["engine", "system_instructions", name]).unwrap_or(0.0);
        let sum = |names: &[&str]| names.iter().map(|name| instruction(name)).sum::<f64>();
        let walks = engine("page_walks")?;
        let all = Self {
            instructions: difference(before, after, &["instructions"]).unwrap_or(0.0),
            system_calls: sum(&["SYSCALL", "SYSENTER", "INT"]),
            returns: sum(&["SYSRET", "SYSRETQ", "SYSEXIT", "SYSEXITQ", "IRET", "IRETD", "IRETQ"]),
            page_faults: exit("true-page-fault"),
            exceptions: exit("exception"),
            interrupts: exit("interrupt") + exit("nmi"),
            shadow_fills: engine("shadow_fills").unwrap_or(0.0),
            traced_writes: engine("traced_table_writes").unwrap_or(0.0),
            cr3_writes: instruction("MOV CR3"),
            page_flushes: sum(&["INVLPG", "INVPCID"]),
            harmless: sum(&[
                "CLI", "STI", "POPF", "POPFD", "POPFQ", "CLTS", "SWAPGS", "WRFSBASE", "WRGSBASE",
            ]),
            control_writes: sum(&["MOV CR0", "MOV CR4", "MOV DR7", "LMSW"]),
            cpuids: instruction("CPUID"),
            msrs: sum(&["RDMSR", "WRMSR"]),
            ports: exit("port-read") + exit("port-write"),
            device_accesses: exit("mmio-read") + exit("mmio-write"),
            halts: exit("halt"),
            walks,
            large_walks: engine("page_walks_to_large_pages").unwrap_or(0.0),
        };
        Some(all.map(|count| count.max(0.0) / operations.max(1.0)))
    }

    fn map(self, of: impl Fn(f64) -> f64) -> Self {
        Self {
            instructions: of(self.instructions),
            system_calls: of(self.system_calls),
            returns: of(self.returns),
            page_faults: of(self.page_faults),
            exceptions: of(self.exceptions),
            interrupts: of(self.interrupts),
            shadow_fills: of(self.shadow_fills),
            traced_writes: of(self.traced_writes),
            cr3_writes: of(self.cr3_writes),
            page_flushes: of(self.page_flushes),
            harmless: of(self.harmless),
            control_writes: of(self.control_writes),
            cpuids: of(self.cpuids),
            msrs: of(self.msrs),
            ports: of(self.ports),
            device_accesses: of(self.device_accesses),
            halts: of(self.halts),
            walks: of(self.walks),
            large_walks: of(self.large_walks),
        }
    }

    /// Name and count of each, for tables.
    #[must_use]
    pub fn rows(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("instructions", self.instructions),
            ("system calls", self.system_calls),
            ("returns from the kernel", self.returns),
            ("page faults", self.page_faults),
            ("other exceptions", self.exceptions),
            ("interrupts", self.interrupts),
            ("shadow fills", self.shadow_fills),
            ("traced page-table writes", self.traced_writes),
            ("MOV to CR3", self.cr3_writes),
            ("INVLPG, INVPCID", self.page_flushes),
            ("CLI, STI, POPF, SWAPGS…", self.harmless),
            ("MOV to CR0, CR4, DR7", self.control_writes),
            ("CPUID", self.cpuids),
            ("RDMSR, WRMSR", self.msrs),
            ("IN, OUT", self.ports),
            ("device-memory accesses", self.device_accesses),
            ("halts", self.halts),
            ("page walks (TLB of 512)", self.walks),
            ("…to large pages", self.large_walks),
        ]
    }
}

/// How much more a number is in the later statistics; `None` if it is not in them.
pub fn difference(before: &Value, after: &Value, path: &[&str]) -> Option<f64> {
    let number = |mut value: &Value| {
        for name in path {
            value = value.get(name)?;
        }
        value.as_f64()
    };
    Some(number(after)? - number(before).unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn counts_are_of_one_operation() {
        let before = json!({"instructions": 100, "exits": {"port-write": 3},
            "engine": {"page_walks": 10, "system_instructions": {"SYSCALL": 5}}});
        let after = json!({"instructions": 1100, "exits": {"port-write": 5, "true-page-fault": 20},
            "engine": {"page_walks": 60, "shadow_fills": 10, "traced_table_writes": 30,
                       "system_instructions": {"SYSCALL": 15, "SYSRETQ": 10, "MOV CR3": 20, "MOV CR8": 7}}});
        let events = Events::between(&before, &after, 10.0).unwrap();
        assert_eq!((events.instructions, events.system_calls, events.returns), (100.0, 1.0, 1.0));
        assert_eq!((events.page_faults, events.traced_writes, events.cr3_writes), (2.0, 3.0, 2.0));
        assert_eq!((events.walks, events.shadow_fills, events.ports), (5.0, 1.0, 0.2));
        assert_eq!(events.rows().len(), 19);
    }

    #[test]
    fn without_a_census_there_are_no_events() {
        assert_eq!(Events::between(&json!({}), &json!({"instructions": 5}), 1.0), None);
    }
}
