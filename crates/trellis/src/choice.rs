//! Which engine and which MMU a machine gets: the user's wish against what this host has.
//!
//! `--engine` names an engine; `--virtual-exec` (`monitor.virtual_exec`) names a technique and leaves the engine to us: software is the translator, or the
//! interpreter where only that can do what is asked for; hardware is KVM with VT-x or AMD-V behind it, never a KVM without. `--mmu` and `--virtual-mmu`
//! are the same. Automatic takes hardware where there really is some.

use engine_kvm::probe::{Device, KvmHost};
use vmm::EngineKind;

use crate::options::{ClockChoice, EngineChoice, MmuChoice};
use crate::prepare::PrepareError;
use PrepareError::{Failure, Usage};

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// Engine or technique.
    pub engine: EngineChoice,
    /// Who translates guest addresses.
    pub mmu: MmuChoice,
    /// Only the interpreter counts instructions.
    pub clock: ClockChoice,
    /// Something only the translator can do was asked for.
    pub translator: bool,
}

/// What the machine gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Engine.
    pub engine: EngineKind,
    /// Nested paging, or tables kept by software (ours, or KVM's shadow pages).
    pub hardware_mmu: bool,
    /// Why, in words.
    pub why: String,
}

/// Decides.
///
/// # Errors
/// One line: what cannot be, why, and what can.
pub fn decide(wish: Wish, host: &KvmHost) -> Result<Choice, PrepareError> {
    match wish.engine {
        EngineChoice::Interp => software(wish, EngineKind::Interp, "it was asked for"),
        EngineChoice::Bt => software(wish, EngineKind::Bt, "it was asked for"),
        EngineChoice::Kvm => kvm(wish, host, "it was asked for"),
        EngineChoice::Hardware => {
            usable_hardware(host)?;
            kvm(wish, host, "hardware virtualization was asked for")
        }
        EngineChoice::Software => best_software(wish, "software was asked for"),
        EngineChoice::Auto => automatic(wish, host),
    }
}

fn automatic(wish: Wish, host: &KvmHost) -> Result<Choice, PrepareError> {
    if wish.clock == ClockChoice::Icount || wish.translator {
        return best_software(wish, "only it can do what was asked for");
    }
    if wish.mmu == MmuChoice::Hardware {
        usable_hardware(host)?;
        return kvm(wish, host, "nested paging was asked for");
    }
    if !host.is_hardware() {
        return best_software(wish, &no_hardware(host));
    }
    if wish.mmu == MmuChoice::Software && nested(host) {
        return best_software(wish, "KVM would take nested paging, and a software MMU was asked for");
    }
    kvm(wish, host, "hardware virtualization stands behind /dev/kvm")
}

fn best_software(wish: Wish, why: &str) -> Result<Choice, PrepareError> {
    let engine = if wish.clock == ClockChoice::Icount { EngineKind::Interp } else { EngineKind::Bt };
    software(wish, engine, why)
}

fn software(wish: Wish, engine: EngineKind, why: &str) -> Result<Choice, PrepareError> {
    if wish.mmu == MmuChoice::Hardware {
        return Err(Usage(format!(
            "the hardware MMU translates for the engine kvm only, not for {}; use --mmu software, or --engine kvm",
            engine.name()
        )));
    }
    Ok(Choice { engine, hardware_mmu: false, why: why.to_owned() })
}

fn kvm(wish: Wish, host: &KvmHost, why: &str) -> Result<Choice, PrepareError> {
    if wish.clock == ClockChoice::Icount {
        return Err(Usage(
            "the clock icount counts instructions, which the engine kvm does not; give --engine interp or --clock host".to_owned(),
        ));
    }
    opens(host)?;
    let nested = nested(host);
    match wish.mmu {
        MmuChoice::Hardware if !nested => return Err(Failure(no_nested_paging(host))),
        MmuChoice::Software if nested => return Err(Failure(always_nested(host))),
        _ => {}
    }
    Ok(Choice { engine: EngineKind::Kvm, hardware_mmu: nested, why: why.to_owned() })
}

/// Whether KVM translates guest addresses by nested paging here. Where the module says nothing, it is what processors have had since 2008.
#[must_use]
pub fn nested(host: &KvmHost) -> bool {
    host.is_hardware() && host.nested_paging != Some(false)
}

fn parameter(host: &KvmHost) -> &'static str {
    if host.module() == Some("kvm_amd") { "npt" } else { "ept" }
}

fn no_nested_paging(host: &KvmHost) -> String {
    match host.module().filter(|_| host.is_hardware()) {
        Some(module) => {
            let parameter = parameter(host);
            format!(
                "KVM keeps shadow pages here ({module} has {parameter}=N); load it with {parameter}=1, or use --mmu software"
            )
        }
        None => format!("there is no nested paging: {}; use --mmu software", no_hardware(host)),
    }
}

fn always_nested(host: &KvmHost) -> String {
    let (module, parameter) = (host.module().unwrap_or("its module"), parameter(host));
    format!(
        "KVM takes nested paging here; load {module} with {parameter}=0 for a software MMU, or use --engine bt, or --mmu hardware"
    )
}

/// Refuses a KVM that cannot be used at all.
fn opens(host: &KvmHost) -> Result<(), PrepareError> {
    match &host.device {
        Device::Works => Ok(()),
        Device::Absent => {
            Err(Failure("the engine kvm needs /dev/kvm, which this host has not; use --engine bt".to_owned()))
        }
        Device::Closed { why, rights: true } => Err(Failure(format!(
            "the engine kvm cannot open /dev/kvm ({why}); add yourself to its group (see `ls -l /dev/kvm`) and log in anew, or use --engine bt"
        ))),
        Device::Closed { why, .. } => {
            Err(Failure(format!("the engine kvm cannot open /dev/kvm ({why}); use --engine bt")))
        }
        Device::Barren { why } => {
            Err(Failure(format!("/dev/kvm makes no VM ({why}): nothing stands behind it; use --engine bt")))
        }
    }
}

/// Refuses a KVM without hardware.
fn usable_hardware(host: &KvmHost) -> Result<(), PrepareError> {
    opens(host)?;
    match host.why_software() {
        Some(why) => Err(Failure(format!(
            "there is no hardware virtualization behind this host's KVM: {why}; use software, or --engine kvm to take it as it is"
        ))),
        None => Ok(()),
    }
}

/// Why automatic does not take KVM, in words.
#[must_use]
pub fn no_hardware(host: &KvmHost) -> String {
    match (&host.device, host.why_software()) {
        (_, Some(why)) => format!("KVM has no hardware behind it ({why})"),
        (Device::Absent, _) => "there is no /dev/kvm".to_owned(),
        (Device::Closed { why, .. }, _) => format!("/dev/kvm cannot be opened ({why})"),
        (Device::Barren { why }, _) => format!("/dev/kvm makes no VM ({why})"),
        (Device::Works, None) => "hardware virtualization is there".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_kvm::probe::Extension;

    const WISH: Wish = Wish {
        engine: EngineChoice::Auto,
        mmu: MmuChoice::Auto,
        clock: ClockChoice::Host,
        translator: false,
    };

    fn host(device: Device, cpuid: Option<Extension>, nested_paging: Option<bool>) -> KvmHost {
        let modules = vec![cpuid.map_or("kvm_pvm", Extension::module).to_owned()];
        KvmHost { device, cpuid, cpuinfo: cpuid, modules, nested_paging, virtual_host: false }
    }

    fn real() -> KvmHost {
        host(Device::Works, Some(Extension::Vmx), Some(true))
    }

    fn pvm() -> KvmHost {
        host(Device::Works, None, None)
    }

    fn chosen(wish: Wish, host: &KvmHost) -> (EngineKind, bool) {
        let choice = decide(wish, host).unwrap();
        (choice.engine, choice.hardware_mmu)
    }

    fn refused(wish: Wish, host: &KvmHost) -> (u8, String) {
        match decide(wish, host).unwrap_err() {
            Failure(text) => (1, text),
            Usage(text) => (2, text),
        }
    }

    #[test]
    fn automatic_takes_hardware_only_where_there_is_some() {
        assert_eq!(chosen(WISH, &real()), (EngineKind::Kvm, true));
        assert_eq!(chosen(WISH, &pvm()), (EngineKind::Bt, false));
        assert!(decide(WISH, &pvm()).unwrap().why.contains("no hardware behind it"));
        assert_eq!(chosen(WISH, &host(Device::Absent, Some(Extension::Svm), None)), (EngineKind::Bt, false));
        let icount = Wish { clock: ClockChoice::Icount, ..WISH };
        assert_eq!(chosen(icount, &real()), (EngineKind::Interp, false));
        assert_eq!(chosen(Wish { translator: true, ..WISH }, &real()), (EngineKind::Bt, false));
    }

    #[test]
    fn hardware_is_refused_on_a_kvm_without_and_taken_by_name() {
        let hardware = Wish { engine: EngineChoice::Hardware, ..WISH };
        let (status, text) = refused(hardware, &pvm());
        assert!(status == 1 && text.contains("neither vmx nor svm"), "{text}");
        assert_eq!(chosen(Wish { engine: EngineChoice::Kvm, ..WISH }, &pvm()), (EngineKind::Kvm, false));
        assert_eq!(chosen(hardware, &real()), (EngineKind::Kvm, true));
        assert_eq!(chosen(Wish { engine: EngineChoice::Software, ..WISH }, &real()), (EngineKind::Bt, false));
    }

    #[test]
    fn mmu_is_what_the_module_says() {
        let with = |engine, mmu| Wish { engine, mmu, ..WISH };
        let shadow = host(Device::Works, Some(Extension::Svm), Some(false));
        assert_eq!(chosen(with(EngineChoice::Kvm, MmuChoice::Software), &shadow), (EngineKind::Kvm, false));
        assert!(
            refused(with(EngineChoice::Kvm, MmuChoice::Hardware), &shadow).1.contains("kvm_amd has npt=N")
        );
        assert!(refused(with(EngineChoice::Kvm, MmuChoice::Software), &real()).1.contains("ept=0"));
        assert_eq!(chosen(with(EngineChoice::Auto, MmuChoice::Software), &real()), (EngineKind::Bt, false));
        assert_eq!(chosen(with(EngineChoice::Auto, MmuChoice::Software), &shadow), (EngineKind::Kvm, false));
        assert_eq!(refused(with(EngineChoice::Bt, MmuChoice::Hardware), &real()).0, 2);
        assert_eq!(refused(with(EngineChoice::Auto, MmuChoice::Hardware), &pvm()).0, 1);
    }

    #[test]
    fn kvm_that_does_not_open_is_refused_with_advice() {
        let wish = Wish { engine: EngineChoice::Kvm, ..WISH };
        for (device, advice) in [
            (Device::Absent, "has not"),
            (Device::Closed { why: "EACCES".to_owned(), rights: true }, "group"),
            (Device::Closed { why: "ENODEV".to_owned(), rights: false }, "--engine bt"),
            (Device::Barren { why: "EINVAL".to_owned() }, "nothing stands behind"),
        ] {
            let (status, text) = refused(wish, &host(device, None, None));
            assert!(status == 1 && text.contains(advice) && !text.contains('\n'), "{text}");
        }
        assert_eq!(refused(Wish { clock: ClockChoice::Icount, ..wish }, &real()).0, 2);
    }
}
