//! The facts, read from CPUID, `/dev/kvm`, `/sys` and `/proc`. Nothing on the host is changed.

use std::fs;

use engine_kvm::probe::{self, Device, Extension, KvmHost};
use serde_json::{Value, json};
use x86::cpuid::{Feature, Host};

use crate::choice::{self, Choice, Wish};
use crate::options::{ClockChoice, EngineChoice, MmuChoice};

/// Pages of one size that were set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Bytes of a page.
    pub page_bytes: u64,
    /// How many there are.
    pub total: u64,
    /// How many are free.
    pub free: u64,
}

/// Who may use userfaultfd(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Userfaultfd {
    /// The kernel has none.
    Absent,
    /// For faults of user mode only (or with privileges, or `/dev/userfaultfd`).
    UserFaults,
    /// Everyone, for all faults.
    All,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The processor's name.
    pub processor: String,
    /// KVM and what is behind it.
    pub kvm: KvmHost,
    /// The module's parameter `nested`: guests may have virtualization themselves.
    pub nested: Option<bool>,
    /// `avx`, `avx2`, `avx512f` as far as the host has them.
    pub avx: Vec<&'static str>,
    /// Programs may use RDFSBASE and kin.
    pub fsgsbase: bool,
    /// Transparent huge pages: the setting in force for anonymous memory, and for shared memory.
    pub thp: [Option<String>; 2],
    /// Huge pages set aside.
    pub pools: Vec<Pool>,
    /// userfaultfd(2).
    pub userfaultfd: Userfaultfd,
    /// vm.max_map_count.
    pub max_map_count: Option<u64>,
    /// MemTotal and MemAvailable.
    pub memory_bytes: [Option<u64>; 2],
    /// Processors that this process may use.
    pub processors: usize,
    /// What `automatic` takes.
    pub automatic: Result<Choice, String>,
}

/// The word in brackets, as in `always [madvise] never`.
#[must_use]
pub fn in_force(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// A line of `/proc/meminfo`, in bytes.
#[must_use]
pub fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn number(path: &str) -> Option<u64> {
    read(path)?.parse().ok()
}

fn pools() -> Vec<Pool> {
    let directory = "/sys/kernel/mm/hugepages";
    let names = fs::read_dir(directory)
        .map(|d| d.flatten().filter_map(|e| e.file_name().into_string().ok()).collect());
    let names: Vec<String> = names.unwrap_or_default();
    let pool = |name: &String| {
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let of = |file: &str| number(&format!("{directory}/{name}/{file}")).unwrap_or(0);
        Some(Pool {
            page_bytes: kib.checked_mul(1024)?,
            total: of("nr_hugepages"),
            free: of("free_hugepages"),
        })
    };
    let mut pools: Vec<Pool> = names.iter().filter_map(pool).collect();
    pools.sort_by_key(|pool| pool.page_bytes);
    pools
}

fn userfaultfd() -> Userfaultfd {
    match number("/proc/sys/vm/unprivileged_userfaultfd") {
        None if !std::path::Path::new("/dev/userfaultfd").exists() => Userfaultfd::Absent,
        Some(1) => Userfaultfd::All,
        _ => Userfaultfd::UserFaults,
    }
}

/// The kernel lets programs use RDFSBASE (`HWCAP2_FSGSBASE`, Linux `arch/x86/include/uapi/asm/hwcap2.h`).
fn fsgsbase() -> bool {
    rustix::param::linux_hwcap().1 & 2 != 0
}

impl Facts {
    /// This host's.
    #[must_use]
    pub fn of_this_host() -> Self {
        let (host, kvm) = (Host::get(), probe::host().clone());
        let avx = [(Feature::Avx, "avx"), (Feature::Avx2, "avx2"), (Feature::Avx512f, "avx512f")];
        let thp = ["enabled", "shmem_enabled"];
        let memory = read("/proc/meminfo").unwrap_or_default();
        let wish = Wish {
            engine: EngineChoice::Auto,
            mmu: MmuChoice::Auto,
            clock: ClockChoice::Host,
            translator: false,
        };
        Self {
            processor: host.identity.brand.clone(),
            nested: kvm.module().and_then(|module| {
                Some(matches!(read(&format!("/sys/module/{module}/parameters/nested"))?.as_str(), "Y" | "1"))
            }),
            automatic: choice::decide(wish, &kvm).map_err(|error| error.to_string()),
            kvm,
            avx: avx.into_iter().filter(|(f, _)| host.features.has(*f)).map(|(_, name)| name).collect(),
            fsgsbase: fsgsbase(),
            thp: thp.map(|file| in_force(&read(&format!("/sys/kernel/mm/transparent_hugepage/{file}"))?)),
            pools: pools(),
            userfaultfd: userfaultfd(),
            max_map_count: number("/proc/sys/vm/max_map_count"),
            memory_bytes: ["MemTotal", "MemAvailable"].map(|key| meminfo(&memory, key)),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// For programs.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let kvm = &self.kvm;
        let (device, reason) = match &kvm.device {
            Device::Absent => ("absent", None),
            Device::Closed { why, .. } => ("closed", Some(why)),
            Device::Barren { why } => ("barren", Some(why)),
            Device::Works => ("works", None),
        };
        let automatic = match &self.automatic {
            Ok(choice) => {
                json!({"engine": choice.engine.name(), "mmu": if choice.hardware_mmu { "hardware" } else { "software" }, "why": choice.why})
            }
            Err(error) => json!({"error": error}),
        };
        json!({
            "processor": self.processor,
            "processors": self.processors,
            "virtual_host": kvm.virtual_host,
            "extension": kvm.cpuid.map(Extension::name),
            "extension_enabled": kvm.cpuid.is_some() && kvm.cpuid == kvm.cpuinfo,
            "dev_kvm": device,
            "dev_kvm_reason": reason,
            "kvm_modules": kvm.modules,
            "kvm_hardware": (kvm.device == Device::Works).then(|| kvm.is_hardware()),
            "kvm_software_because": kvm.why_software(),
            "nested_paging": (kvm.device == Device::Works).then(|| choice::nested(kvm)),
            "nested_virtualization": self.nested,
            "avx": self.avx,
            "fsgsbase": self.fsgsbase,
            "transparent_huge_pages": self.thp[0],
            "transparent_huge_pages_shared": self.thp[1],
            "huge_page_pools": self.pools.iter().map(|p| json!({"page_bytes": p.page_bytes, "total": p.total, "free": p.free})).collect::<Vec<_>>(),
            "userfaultfd": match self.userfaultfd {
                Userfaultfd::Absent => "absent",
                Userfaultfd::UserFaults => "user-faults",
                Userfaultfd::All => "all",
            },
            "max_map_count": self.max_map_count,
            "memory_bytes": self.memory_bytes[0],
            "memory_available_bytes": self.memory_bytes[1],
            "automatic": automatic,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_and_sizes_are_read_as_the_kernel_writes_them() {
        assert_eq!(in_force("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(in_force("none"), None);
        assert_eq!(meminfo("MemTotal:       24576 kB\nMemFree: 1 kB\n", "MemTotal"), Some(24576 << 10));
        assert_eq!(meminfo("MemTotalX: 1 kB\n", "MemTotal"), None);
    }

    #[test]
    fn this_host_has_a_name_memory_and_a_choice() {
        let facts = Facts::of_this_host();
        assert!(!facts.processor.is_empty() && facts.memory_bytes[0] > Some(1 << 20));
        let choice = facts.automatic.as_ref().unwrap();
        assert_eq!(choice.engine == vmm::EngineKind::Kvm, facts.kvm.is_hardware());
        assert_eq!(facts.to_json()["automatic"]["engine"], choice.engine.name());
    }
}
