//! What stands behind `/dev/kvm`: asked once, without changing anything on the host.
//!
//! A KVM without hardware virtualization (PVM and kin) runs guests by emulation and has to be told from a real one. There is no flag for that;
//! what there is: the processor shows neither `vmx` nor `svm`, and yet a VM can be made; and the module that did it, by name.

use std::path::Path;
use std::sync::OnceLock;

use kvm_ioctls::Kvm;

/// How `/dev/kvm` answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Device {
    /// There is none.
    Absent,
    /// It cannot be opened.
    Closed {
        /// The kernel's reason.
        why: String,
        /// Not enough rights, rather than nothing behind it.
        rights: bool,
    },
    /// It opens, and no VM can be made.
    Barren {
        /// The kernel's reason.
        why: String,
    },
    /// A VM can be made.
    Works,
}

/// Hardware virtualization as the processor shows it (CPUID; what a hypervisor below hides is not there).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extension {
    /// Intel's.
    Vmx,
    /// AMD's.
    Svm,
}

impl Extension {
    /// As the makers call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vmx => "VT-x",
            Self::Svm => "AMD-V",
        }
    }

    /// The flag in `/proc/cpuinfo`.
    #[must_use]
    pub const fn flag(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
        }
    }

    /// Linux's module for it.
    #[must_use]
    pub const fn module(self) -> &'static str {
        match self {
            Self::Vmx => "kvm_intel",
            Self::Svm => "kvm_amd",
        }
    }
}

/// What there is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KvmHost {
    /// The device.
    pub device: Device,
    /// What CPUID shows.
    pub cpuid: Option<Extension>,
    /// What `/proc/cpuinfo` shows: the kernel takes the flag away where firmware has switched it off.
    pub cpuinfo: Option<Extension>,
    /// Modules of `/sys/module` whose names begin with `kvm_`.
    pub modules: Vec<String>,
    /// The module's parameter `ept` or `npt`.
    pub nested_paging: Option<bool>,
    /// CPUID says that a hypervisor is below this host.
    pub virtual_host: bool,
}

impl KvmHost {
    /// Whether VMs work, but not by hardware.
    #[must_use]
    pub fn is_software(&self) -> bool {
        self.device == Device::Works && (self.cpuid.is_none() || self.module().is_none())
    }

    /// Whether VMs work by hardware.
    #[must_use]
    pub fn is_hardware(&self) -> bool {
        self.device == Device::Works && !self.is_software()
    }

    /// The module of the processor's maker, if it is loaded.
    #[must_use]
    pub fn module(&self) -> Option<&'static str> {
        let module = self.cpuid?.module();
        self.modules.iter().any(|m| m == module).then_some(module)
    }

    /// How one knows that no hardware stands behind KVM, in words.
    #[must_use]
    pub fn why_software(&self) -> Option<String> {
        if !self.is_software() {
            return None;
        }
        let others: Vec<&str> = self
            .modules
            .iter()
            .map(String::as_str)
            .filter(|m| !["kvm_intel", "kvm_amd"].contains(m))
            .collect();
        let module =
            if others.is_empty() { String::new() } else { format!("; the module is {}", others.join(", ")) };
        Some(match self.cpuid {
            None => format!("the processor shows neither vmx nor svm, and yet KVM_CREATE_VM works{module}"),
            Some(e) => format!(
                "the processor shows {}, but {} is not loaded, and KVM_CREATE_VM works{module}",
                e.flag(),
                e.module()
            ),
        })
    }
}

/// What CPUID shows. Its leaf 1 ECX bit 5 is VMX (SDM 2A), leaf 8000_0001H ECX bit 2 SVM (APM 3 E.4.2).
#[must_use]
pub fn extension(leaf_1_ecx: u32, extended_1_ecx: u32) -> Option<Extension> {
    if leaf_1_ecx >> 5 & 1 != 0 {
        Some(Extension::Vmx)
    } else if extended_1_ecx >> 2 & 1 != 0 {
        Some(Extension::Svm)
    } else {
        None
    }
}

/// What the first `flags` line of `/proc/cpuinfo` shows.
#[must_use]
pub fn extension_in(cpuinfo: &str) -> Option<Extension> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags"))?;
    [Extension::Vmx, Extension::Svm].into_iter().find(|e| flags.split_whitespace().any(|f| f == e.flag()))
}

/// A parameter of a module: `Y`, `1` or `N`, `0`.
fn parameter(module: &str, name: &str) -> Option<bool> {
    let text = std::fs::read_to_string(format!("/sys/module/{module}/parameters/{name}")).ok()?;
    match text.trim() {
        "Y" | "1" => Some(true),
        "N" | "0" => Some(false),
        _ => None,
    }
}

fn device() -> Device {
    if !Path::new("/dev/kvm").exists() {
        return Device::Absent;
    }
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let rights = matches!(error.errno(), libc::EACCES | libc::EPERM);
            return Device::Closed { why: error.to_string(), rights };
        }
    };
    match kvm.create_vm() {
        Ok(_) => Device::Works,
        Err(error) => Device::Barren { why: error.to_string() },
    }
}

fn look() -> KvmHost {
    use std::arch::x86_64::__cpuid;
    let extended = if __cpuid(0x8000_0000).eax > 0x8000_0000 { __cpuid(0x8000_0001).ecx } else { 0 };
    let cpuid = extension(__cpuid(1).ecx, extended);
    let mut modules: Vec<String> = std::fs::read_dir("/sys/module")
        .map(|entries| entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    modules.retain(|name| name.starts_with("kvm_"));
    modules.sort_unstable();
    let nested_paging = match cpuid {
        Some(Extension::Vmx) => parameter("kvm_intel", "ept"),
        Some(Extension::Svm) => parameter("kvm_amd", "npt"),
        None => None,
    };
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| extension_in(&text));
    KvmHost {
        device: device(),
        cpuid,
        cpuinfo,
        modules,
        nested_paging,
        virtual_host: __cpuid(1).ecx >> 31 != 0,
    }
}

/// This host, asked once in the life of the process.
#[must_use]
pub fn host() -> &'static KvmHost {
    static HOST: OnceLock<KvmHost> = OnceLock::new();
    HOST.get_or_init(look)
}

/// This host, if VMs can be made.
#[must_use]
pub fn kvm() -> Option<&'static KvmHost> {
    Some(host()).filter(|host| host.device == Device::Works)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kvm_host(cpuid: Option<Extension>, modules: &[&str]) -> KvmHost {
        KvmHost {
            device: Device::Works,
            cpuid,
            cpuinfo: cpuid,
            modules: modules.iter().map(|&m| m.to_owned()).collect(),
            nested_paging: None,
            virtual_host: true,
        }
    }

    #[test]
    fn kvm_without_a_flag_is_software_and_says_how_it_is_known() {
        let pvm = kvm_host(None, &["kvm_pvm"]);
        assert!(pvm.is_software() && !pvm.is_hardware());
        let why = pvm.why_software().unwrap();
        assert!(why.contains("neither vmx nor svm") && why.contains("kvm_pvm"), "{why}");
        assert!(kvm_host(None, &[]).is_software(), "built in");
    }

    #[test]
    fn kvm_with_flag_and_its_module_is_hardware() {
        assert!(kvm_host(Some(Extension::Vmx), &["kvm_intel"]).is_hardware());
        assert!(kvm_host(Some(Extension::Svm), &["kvm_amd"]).why_software().is_none());
        let other = kvm_host(Some(Extension::Svm), &["kvm_pvm"]);
        assert!(other.is_software() && other.why_software().unwrap().contains("kvm_amd is not loaded"));
    }

    #[test]
    fn device_that_makes_no_vm_is_neither() {
        let host = KvmHost { device: Device::Absent, ..kvm_host(Some(Extension::Vmx), &["kvm_intel"]) };
        assert!(!host.is_software() && !host.is_hardware());
    }

    #[test]
    fn flags_are_found_where_the_manuals_have_them() {
        assert_eq!(extension(1 << 5, 0), Some(Extension::Vmx));
        assert_eq!(extension(0, 1 << 2), Some(Extension::Svm));
        assert_eq!(extension(!(1 << 5), !(1 << 2)), None);
        assert_eq!(extension_in("processor: 0\nflags\t\t: fpu vme svm_lock svm\n"), Some(Extension::Svm));
        assert_eq!(extension_in("flags : fpu vmxoff\n"), None);
    }
}
