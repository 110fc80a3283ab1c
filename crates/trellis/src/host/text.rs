//! The facts in plain words.

use std::fmt::Write as _;

use engine_kvm::probe::{Device, KvmHost};

use super::facts::{Facts, Pool, Userfaultfd};
use crate::choice;

/// The whole page.
pub fn of(facts: &Facts) -> String {
    let mut page = String::new();
    let mut line = |name: &str, text: String| {
        let _ = writeln!(page, "{name:<15} {text}");
    };
    line("processor", processor(facts));
    line("virtualization", extension(&facts.kvm));
    line("/dev/kvm", device(&facts.kvm.device));
    if facts.kvm.device == Device::Works {
        line("behind it", behind(&facts.kvm));
        line("guest paging", paging(&facts.kvm));
    }
    if let Some(nested) = facts.nested {
        let words = if nested {
            "guests of KVM may have virtualization themselves"
        } else {
            "guests of KVM see no virtualization"
        };
        line("nested", words.to_owned());
    }
    line("instructions", instructions(facts));
    line("huge pages", huge_pages(facts));
    line("userfaultfd", userfaultfd(facts.userfaultfd).to_owned());
    line("mappings", mappings(facts.max_map_count));
    line("memory", memory(facts));
    line("automatic", automatic(facts));
    page
}

fn processor(facts: &Facts) -> String {
    let place =
        if facts.kvm.virtual_host { "this host is a virtual machine itself" } else { "no hypervisor below" };
    format!("{}; {} usable; {place}", facts.processor, facts.processors)
}

fn extension(kvm: &KvmHost) -> String {
    match (kvm.cpuid, kvm.cpuinfo) {
        (None, _) if kvm.virtual_host => {
            "none: neither VT-x nor AMD-V is shown to this host; the hypervisor below does not pass it on"
                .to_owned()
        }
        (None, _) => "none: the processor shows neither VT-x nor AMD-V".to_owned(),
        (Some(e), None) => format!(
            "{}, but the kernel hides it (/proc/cpuinfo has no {}): switch it on in the firmware's setup",
            e.name(),
            e.flag()
        ),
        (Some(e), Some(_)) => e.name().to_owned(),
    }
}

fn device(device: &Device) -> String {
    match device {
        Device::Absent => {
            "not there: no KVM in this kernel, its module is not loaded, or a container without the device"
                .to_owned()
        }
        Device::Closed { why, rights: true } => {
            format!(
                "there, but you may not open it ({why}): add yourself to its group (`ls -l /dev/kvm`) and log in anew"
            )
        }
        Device::Closed { why, .. } => format!("there, but it does not open ({why})"),
        Device::Barren { why } => format!("opens, but makes no VM ({why}): nothing stands behind it"),
        Device::Works => "there, opens, makes VMs".to_owned(),
    }
}

fn behind(kvm: &KvmHost) -> String {
    match (kvm.why_software(), kvm.cpuid) {
        (Some(why), _) => {
            format!("no hardware: kernel code of guests is emulated and slow; known because {why}")
        }
        (None, extension) => {
            format!("{} by {}", extension.map_or("hardware", |e| e.name()), kvm.module().unwrap_or("KVM"))
        }
    }
}

fn paging(kvm: &KvmHost) -> String {
    let name = if kvm.module() == Some("kvm_amd") { "npt" } else { "ept" };
    match (kvm.is_hardware(), kvm.nested_paging) {
        (false, _) => "shadow pages, kept by software".to_owned(),
        (true, Some(false)) => format!("shadow pages ({name}=N)"),
        (true, Some(true)) => format!("nested paging ({name}=Y)"),
        (true, None) => format!("nested paging, as far as can be told (the module does not say {name})"),
    }
}

fn instructions(facts: &Facts) -> String {
    let avx = if facts.avx.is_empty() { "no AVX".to_owned() } else { facts.avx.join(", ") };
    let fsgsbase = if facts.fsgsbase { "FSGSBASE for programs" } else { "no FSGSBASE for programs" };
    format!("{avx}; {fsgsbase}")
}

fn huge_pages(facts: &Facts) -> String {
    let setting = |s: &Option<String>| s.clone().unwrap_or_else(|| "not there".to_owned());
    let pool =
        |p: &Pool| format!("{} of {} free", p.free, p.total) + &format!(" of {} MiB", p.page_bytes >> 20);
    let used: Vec<String> = facts.pools.iter().filter(|p| p.total > 0).map(pool).collect();
    let set_aside =
        if used.is_empty() { "none set aside".to_owned() } else { format!("set aside: {}", used.join(", ")) };
    format!(
        "transparent: {}; of shared memory: {}; {set_aside}",
        setting(&facts.thp[0]),
        setting(&facts.thp[1])
    )
}

const fn userfaultfd(u: Userfaultfd) -> &'static str {
    match u {
        Userfaultfd::Absent => "not there",
        Userfaultfd::UserFaults => {
            "for faults of programs; for the kernel's only with privileges or /dev/userfaultfd"
        }
        Userfaultfd::All => "for everyone",
    }
}

fn mappings(max: Option<u64>) -> String {
    max.map_or_else(
        || "vm.max_map_count is not told".to_owned(),
        |n| format!("at most {n} a process (vm.max_map_count)"),
    )
}

fn memory(facts: &Facts) -> String {
    let mib = |bytes: Option<u64>| bytes.map_or_else(|| "?".to_owned(), |b| (b >> 20).to_string());
    format!("{} MiB, {} MiB available", mib(facts.memory_bytes[0]), mib(facts.memory_bytes[1]))
}

fn automatic(facts: &Facts) -> String {
    match &facts.automatic {
        Ok(choice) => {
            let mmu = if choice.hardware_mmu { "hardware" } else { "software" };
            let why =
                if facts.kvm.is_hardware() { choice.why.clone() } else { choice::no_hardware(&facts.kvm) };
            format!("takes the engine {} with a {mmu} MMU: {why}", choice.engine.name())
        }
        Err(error) => format!("nothing: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_kvm::probe::Extension;

    fn facts(device: Device, cpuid: Option<Extension>, cpuinfo: Option<Extension>) -> Facts {
        let modules = cpuid.map(|e| e.module().to_owned()).into_iter().collect();
        let kvm = KvmHost { device, cpuid, cpuinfo, modules, nested_paging: Some(true), virtual_host: true };
        Facts { kvm, ..Facts::of_this_host() }
    }

    #[test]
    fn page_tells_hidden_hardware_missing_rights_and_emulation() {
        let hidden = of(&facts(Device::Absent, Some(Extension::Vmx), None));
        assert!(hidden.contains("the kernel hides it") && hidden.contains("not there"), "{hidden}");
        let closed = Device::Closed { why: "EACCES".to_owned(), rights: true };
        assert!(
            of(&facts(closed, Some(Extension::Svm), Some(Extension::Svm)))
                .contains("add yourself to its group")
        );
        let emulated = of(&facts(Device::Works, None, None));
        assert!(emulated.contains("no hardware") && emulated.contains("neither vmx nor svm"), "{emulated}");
        assert!(emulated.contains("shadow pages"), "{emulated}");
    }

    #[test]
    fn page_tells_real_hardware_with_nested_paging() {
        let real = of(&facts(Device::Works, Some(Extension::Svm), Some(Extension::Svm)));
        assert!(real.contains("AMD-V by kvm_amd") && real.contains("nested paging (npt=Y)"), "{real}");
    }
}
