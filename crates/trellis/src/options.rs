//! What a virtual machine is to be: [`VmFlags`] as the user wrote it (command line or file, everything optional), and
//! [`VmOptions`] with the defaults filled in.
//!
//! One parser a value, used by the command line and by `VM.toml` alike.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use vmm::{DiskBus, ImageFormat, MAX_DISK_QUEUES, MAX_SHARE_TAG};
use x86::cpuid::{CpuModel, ModelError};

use crate::control::ControlTarget;
use crate::extras::ExtraFlags;
use crate::gdb::GdbTarget;
use crate::inside::InsideFlags;
use crate::net::NetFlags;
use crate::suggest;

/// Guest memory without `--memory`.
pub const DEFAULT_MEMORY_BYTES: u64 = 512 << 20;

/// The most vCPUs of a machine.
pub const MAX_CPUS: u32 = 16;

/// The least memory that any guest starts in: the first mebibyte of a PC and some above it.
const MIN_MEMORY_BYTES: u64 = 2 << 20;

/// The models of `--cpu`.
const CPU_MODELS: &[&str] = &["max", "host", "x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"];

/// What executes guest instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// The interpreter.
    Interp,
    /// The binary translator.
    Bt,
    /// Linux's KVM (/dev/kvm), whatever stands behind it.
    Kvm,
    /// KVM where hardware virtualization stands behind it, else bt.
    #[value(alias = "automatic")]
    Auto,
    /// `--virtual-exec software`.
    #[value(skip)]
    Software,
    /// `--virtual-exec hardware`.
    #[value(skip)]
    Hardware,
}

/// What translates guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MmuChoice {
    /// Shadow structures kept by software.
    Software,
    /// Nested paging of the host CPU.
    Hardware,
    /// The best that is there.
    #[value(alias = "automatic")]
    Auto,
}

/// The values of `monitor.virtual_exec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VirtualExec {
    /// Binary translation, or the interpreter where it is not there.
    Software,
    /// KVM with VT-x or AMD-V behind it.
    Hardware,
    /// Hardware where there is some, else software.
    #[value(alias = "auto")]
    Automatic,
}

impl From<VirtualExec> for EngineChoice {
    /// The technique; which engine carries it out is decided when the host is known.
    fn from(exec: VirtualExec) -> Self {
        match exec {
            VirtualExec::Software => Self::Software,
            VirtualExec::Hardware => Self::Hardware,
            VirtualExec::Automatic => Self::Auto,
        }
    }
}

/// Where guest time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ClockChoice {
    /// The host's clock.
    Host,
    /// The count of executed instructions: reproducible bit for bit.
    Icount,
}

/// The display.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VgaChoice {
    /// VGA text mode, shown in the terminal.
    Text,
    /// No VGA.
    None,
}

/// Where a character device of the guest leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CharTarget {
    /// Standard input and output.
    Stdio,
    /// Output into a file.
    File(PathBuf),
    /// Nowhere.
    None,
}

/// Where `--stats` goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StatsTarget {
    /// A table on standard error.
    Print,
    /// JSON into a file.
    File(PathBuf),
}

/// One `--disk`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image file, or block device.
    pub path: PathBuf,
    /// The guest may not write it.
    pub read_only: bool,
    /// Its format; by its name if that is not said.
    pub format: Option<ImageFormat>,
    /// What the guest writes is lost at the end.
    pub snapshot: bool,
    /// What the guest reads as its serial number.
    pub serial: Option<String>,
    /// Request queues; one for each vCPU if that is not said.
    pub queues: Option<u16>,
    /// How it is attached.
    pub bus: DiskBus,
}

impl DiskSpec {
    /// `--cdrom FILE`.
    #[must_use]
    pub fn cdrom(path: PathBuf) -> Self {
        Self { path, read_only: true, format: Some(ImageFormat::Raw), bus: DiskBus::Cdrom, ..Self::default() }
    }
}

/// One `--share`, or `--root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareSpec {
    /// The directory.
    pub path: PathBuf,
    /// The name that the guest mounts it by; `share0`, `share1`, … if that is not said.
    pub tag: Option<String>,
    /// The guest may not change it.
    pub read_only: bool,
    /// virtio-9p instead of virtio-fs.
    pub p9: bool,
}

/// The options as written. `None` and an empty list are "not said".
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VmFlags {
    /// An image of `trellis image list`, `debian` or `contract`.
    pub image: Option<String>,
    /// Kernel file.
    pub kernel: Option<PathBuf>,
    /// Initrd file; for multiboot kernels `FILE ARGS,FILE ARGS`.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub append: Option<String>,
    /// Disks.
    pub disks: Vec<DiskSpec>,
    /// What the guest writes to any disk is lost at the end.
    pub snapshot: bool,
    /// Shared directories.
    pub shares: Vec<ShareSpec>,
    /// The directory that is the guest's root file system.
    pub root: Option<ShareSpec>,
    /// Network cards.
    pub net: NetFlags,
    /// Guest memory.
    pub memory_bytes: Option<u64>,
    /// vCPUs.
    pub cpus: Option<u32>,
    /// CPU model and features.
    pub cpu: Option<String>,
    /// Engine.
    pub engine: Option<EngineChoice>,
    /// MMU.
    pub mmu: Option<MmuChoice>,
    /// COM1.
    pub serial: Option<CharTarget>,
    /// Display.
    pub vga: Option<VgaChoice>,
    /// The debug ports 0x402 and 0xe9.
    pub debugcon: Option<CharTarget>,
    /// Port 0xf4 ends the run.
    pub isa_debug_exit: bool,
    /// A reset ends the run.
    pub no_reboot: bool,
    /// The run ends after so many seconds.
    pub timeout_seconds: Option<f64>,
    /// What the machine is called.
    pub name: Option<String>,
    /// Its control socket.
    pub control: Option<ControlTarget>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Where gdb is waited for.
    pub gdb: Option<GdbTarget>,
    /// Nothing runs before gdb has attached.
    pub gdb_wait: bool,
    /// Statistics at the end.
    pub stats: Option<StatsTarget>,
    /// Smaller devices.
    pub extras: ExtraFlags,
    /// Traces, and files for perf.
    pub inside: InsideFlags,
    /// Clock.
    pub clock: Option<ClockChoice>,
    /// Save and restore the whole machine whenever the guest asks (contract suite).
    pub save_at_marker: bool,
}

impl VmFlags {
    /// `self` where it says something, `file` elsewhere. Disks of both, those of the file first; what names the guest
    /// (image or kernel) on the command line replaces what names it in the file.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        let names_guest = self.image.is_some() || self.kernel.is_some();
        Self {
            image: if names_guest { self.image } else { file.image },
            kernel: if names_guest { self.kernel } else { file.kernel },
            initrd: self.initrd.or(file.initrd),
            append: self.append.or(file.append),
            disks: file.disks.into_iter().chain(self.disks).collect(),
            snapshot: self.snapshot || file.snapshot,
            shares: file.shares.into_iter().chain(self.shares).collect(),
            root: self.root.or(file.root),
            net: self.net.or(file.net),
            memory_bytes: self.memory_bytes.or(file.memory_bytes),
            cpus: self.cpus.or(file.cpus),
            cpu: self.cpu.or(file.cpu),
            engine: self.engine.or(file.engine),
            mmu: self.mmu.or(file.mmu),
            serial: self.serial.or(file.serial),
            vga: self.vga.or(file.vga),
            debugcon: self.debugcon.or(file.debugcon),
            isa_debug_exit: self.isa_debug_exit || file.isa_debug_exit,
            no_reboot: self.no_reboot || file.no_reboot,
            timeout_seconds: self.timeout_seconds.or(file.timeout_seconds),
            name: self.name.or(file.name),
            control: self.control.or(file.control),
            metrics: self.metrics.or(file.metrics),
            gdb: self.gdb.or(file.gdb),
            gdb_wait: self.gdb_wait || file.gdb_wait,
            stats: self.stats.or(file.stats),
            extras: self.extras.or(file.extras),
            inside: self.inside.or(file.inside),
            clock: self.clock.or(file.clock),
            save_at_marker: self.save_at_marker || file.save_at_marker,
        }
    }

    /// Fills in the defaults.
    #[must_use]
    pub fn resolve(self) -> VmOptions {
        VmOptions {
            image: self.image,
            kernel: self.kernel,
            initrd: self.initrd,
            append: self.append,
            disks: self.disks,
            snapshot: self.snapshot,
            shares: self.shares,
            root: self.root,
            net: self.net,
            memory_bytes: self.memory_bytes.unwrap_or(DEFAULT_MEMORY_BYTES),
            cpus: self.cpus.unwrap_or(1),
            cpu: self.cpu.unwrap_or_else(|| "max".to_owned()),
            engine: self.engine.unwrap_or(EngineChoice::Auto),
            mmu: self.mmu.unwrap_or(MmuChoice::Auto),
            serial: self.serial.unwrap_or(CharTarget::Stdio),
            vga: self.vga.unwrap_or(VgaChoice::None),
            debugcon: self.debugcon.unwrap_or(CharTarget::None),
            isa_debug_exit: self.isa_debug_exit,
            no_reboot: self.no_reboot,
            timeout_seconds: self.timeout_seconds,
            name: self.name,
            control: self.control.unwrap_or_default(),
            metrics: self.metrics,
            gdb: self.gdb.or_else(|| self.gdb_wait.then(GdbTarget::default)),
            gdb_wait: self.gdb_wait,
            // Samples are of no use untold.
            stats: self.stats.or_else(|| self.inside.profile.map(|_| StatsTarget::Print)),
            extras: self.extras,
            inside: self.inside,
            clock: self.clock.unwrap_or(ClockChoice::Host),
            save_at_marker: self.save_at_marker,
        }
    }
}

/// The options of a machine, complete. Fields as in [`VmFlags`].
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the fields are those of VmFlags, documented there")]
pub struct VmOptions {
    pub image: Option<String>,
    pub kernel: Option<PathBuf>,
    pub initrd: Option<String>,
    pub append: Option<String>,
    pub disks: Vec<DiskSpec>,
    pub snapshot: bool,
    pub shares: Vec<ShareSpec>,
    pub root: Option<ShareSpec>,
    pub net: NetFlags,
    pub memory_bytes: u64,
    pub cpus: u32,
    pub cpu: String,
    pub engine: EngineChoice,
    pub mmu: MmuChoice,
    pub serial: CharTarget,
    pub vga: VgaChoice,
    pub debugcon: CharTarget,
    pub isa_debug_exit: bool,
    pub no_reboot: bool,
    pub timeout_seconds: Option<f64>,
    pub name: Option<String>,
    pub control: ControlTarget,
    pub metrics: Option<SocketAddr>,
    pub gdb: Option<GdbTarget>,
    pub gdb_wait: bool,
    pub stats: Option<StatsTarget>,
    pub extras: ExtraFlags,
    pub inside: InsideFlags,
    pub clock: ClockChoice,
    pub save_at_marker: bool,
}

/// Parses `512M`, `1G`, `65536K`, `1T`, `16777216B`, or MiB without a suffix; returns bytes.
///
/// # Errors
/// One line: what is wrong, and an example.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    const EXAMPLE: &str = "give a size as in 512M or 1G (a number alone is MiB)";
    let trimmed = text.trim();
    let digits = trimmed.len() - trimmed.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = trimmed.split_at(digits);
    let unit = suffix.to_ascii_uppercase();
    let shift = match unit.trim_end_matches("IB") {
        "B" => 0,
        "K" | "KB" => 10,
        "" | "M" | "MB" => 20,
        "G" | "GB" => 30,
        "T" | "TB" => 40,
        _ => return Err(format!("'{text}' is no size of memory; {EXAMPLE}")),
    };
    if number.is_empty() {
        return Err(format!("'{text}' is no size of memory; {EXAMPLE}"));
    }
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    let bytes = bytes.ok_or_else(|| format!("memory of {text} is more than any machine has; {EXAMPLE}"))?;
    if bytes < MIN_MEMORY_BYTES {
        return Err(format!(
            "memory of {text} is too little for any guest; give at least {}M",
            MIN_MEMORY_BYTES >> 20
        ));
    }
    if bytes % 4096 != 0 {
        return Err(format!("memory of {text} is not whole pages of 4 KiB; give it in M or G"));
    }
    Ok(bytes)
}

/// Parses the number of vCPUs.
///
/// # Errors
/// One line with the range.
pub fn parse_cpus(text: &str) -> Result<u32, String> {
    match text.trim().parse::<u32>() {
        Ok(cpus) if (1..=MAX_CPUS).contains(&cpus) => Ok(cpus),
        _ => Err(format!("a machine cannot have {text} CPUs; give a number from 1 to {MAX_CPUS}")),
    }
}

/// Checks `MODEL[,+feature,-feature…]`, or `help`; whether this host has the features is checked where the CPU is made.
///
/// # Errors
/// One line with the nearest model or feature.
pub fn parse_cpu(text: &str) -> Result<String, String> {
    if text == "help" {
        return Ok(text.to_owned());
    }
    let mut parts = text.split(',');
    let model = parts.next().unwrap_or_default();
    let full =
        if let "v1" | "v2" | "v3" | "v4" = model { format!("x86-64-{model}") } else { model.to_owned() };
    if !CPU_MODELS.contains(&full.as_str()) {
        let hint = suggest::did_you_mean(model, CPU_MODELS.iter().copied())
            .unwrap_or_else(|| format!("; use one of {}", CPU_MODELS.join(", ")));
        return Err(format!("there is no CPU model '{model}'{hint}"));
    }
    let mut cpu = full;
    for feature in parts {
        if !feature.starts_with(['+', '-']) || feature.len() < 2 {
            return Err(format!(
                "CPU feature '{feature}' needs a sign; write +{feature} or -{feature}",
                feature = feature.trim()
            ));
        }
        cpu.push(',');
        cpu.push_str(feature);
    }
    match CpuModel::parse(&cpu) {
        Err(ModelError::UnknownFeature { name, nearest }) => {
            let hint = nearest.map_or_else(
                || "; trellis boot --cpu help lists them".to_owned(),
                |nearest| format!("; did you mean '{nearest}'?"),
            );
            return Err(format!("there is no CPU feature '{}'{hint}", name.escape_debug()));
        }
        Err(error @ (ModelError::Syntax { .. } | ModelError::UnknownModel { .. })) => {
            return Err(error.to_string());
        }
        // What this host lacks is no mistake in writing.
        Ok(_) | Err(_) => {}
    }
    Ok(cpu)
}

const DISK_USAGE: &str =
    "write --disk FILE, and behind it ,ro ,format=raw|qcow2 ,snapshot=on ,serial=S ,queues=N ,if=virtio|ahci";

/// Parses `FILE[,ro][,format=raw|qcow2][,snapshot=on][,serial=S][,queues=N][,if=virtio|ahci]`; `path=FILE` will do, too. A comma may be part of
/// the name of a file that exists.
///
/// # Errors
/// One line for an option that there is not.
pub fn parse_disk(text: &str) -> Result<DiskSpec, String> {
    let mut disk = DiskSpec::default();
    let mut name = text;
    while !Path::new(name).exists()
        && let Some((before, option)) = name.rsplit_once(',')
    {
        set_disk_option(&mut disk, option)?;
        name = before;
    }
    if !Path::new(name).exists() {
        name = name.strip_prefix("path=").unwrap_or(name);
    }
    if name.is_empty() {
        return Err(format!("a disk needs a file; {DISK_USAGE}"));
    }
    if disk.bus == DiskBus::Ahci && disk.queues.is_some() {
        return Err("a disk with if=ahci has one queue; drop queues= or if=ahci".to_owned());
    }
    disk.path = PathBuf::from(name);
    Ok(disk)
}

fn set_disk_option(disk: &mut DiskSpec, option: &str) -> Result<(), String> {
    const NAMES: [&str; 8] = ["ro", "rw", "readonly", "format", "snapshot", "serial", "queues", "if"];
    let (name, value) = option.split_once('=').unwrap_or((option, ""));
    let switch = || match value {
        "" | "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err(format!("a disk's {name} is on or off, not '{value}'")),
    };
    match name {
        "ro" | "readonly" => disk.read_only = switch()?,
        "rw" => disk.read_only = !switch()?,
        "snapshot" => disk.snapshot = switch()?,
        "if" => {
            disk.bus = match value {
                "virtio" => DiskBus::Virtio,
                "ahci" | "sata" => DiskBus::Ahci,
                _ => return Err(format!("a disk's if is virtio or ahci, not '{value}'")),
            };
        }
        "format" => {
            disk.format = Some(parse_disk_format(value)?);
        }
        "serial" if !value.is_empty() && value.len() <= 20 => disk.serial = Some(value.to_owned()),
        "serial" => return Err("a disk's serial number has 1 to 20 characters; write serial=S".to_owned()),
        "queues" => {
            let count = value.parse().ok().filter(|count| (1..=MAX_DISK_QUEUES).contains(count));
            let wrong = || format!("a disk cannot have '{value}' queues; give 1 to {MAX_DISK_QUEUES}");
            disk.queues = Some(count.ok_or_else(wrong)?);
        }
        _ => {
            let hint = suggest::did_you_mean(name, NAMES).unwrap_or_else(|| format!("; {DISK_USAGE}"));
            return Err(format!("a disk has no option '{name}'{hint}"));
        }
    }
    Ok(())
}

/// Parses the size of a disk, as in `4G`; returns bytes.
///
/// # Errors
/// One line with an example.
pub fn parse_disk_size(text: &str) -> Result<u64, String> {
    parse_memory(text).map_err(|_reason| format!("'{text}' is no size of a disk; give one as in 4G or 800M"))
}

/// Parses `raw` or `qcow2`.
///
/// # Errors
/// One line for anything else.
pub fn parse_disk_format(text: &str) -> Result<ImageFormat, String> {
    match text {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        _ => Err(format!("a disk's format is raw or qcow2, not '{text}'")),
    }
}

/// Parses `DIR[:TAG][:ro][:9p]`. A colon may be part of the name of a directory that exists.
///
/// # Errors
/// One line for a tag that cannot be.
pub fn parse_share(text: &str) -> Result<ShareSpec, String> {
    let mut share = ShareSpec { path: PathBuf::new(), tag: None, read_only: false, p9: false };
    let mut path = text;
    while !Path::new(path).exists()
        && let Some((before, word)) = path.rsplit_once(':')
    {
        match word {
            "ro" => share.read_only = true,
            "rw" => share.read_only = false,
            "9p" => share.p9 = true,
            tag if share.tag.is_some() || tag.is_empty() || tag.len() > MAX_SHARE_TAG => {
                return Err(format!(
                    "'{tag}' is no name for a share; write DIR:TAG:ro, the tag 1 to {MAX_SHARE_TAG} characters long"
                ));
            }
            tag => share.tag = Some(tag.to_owned()),
        }
        path = before;
    }
    if path.is_empty() {
        return Err("a share needs a directory; write DIR, DIR:ro or DIR:TAG:ro".to_owned());
    }
    share.path = PathBuf::from(path);
    Ok(share)
}

/// Parses `DIR[:ro]`.
///
/// # Errors
/// One line for what is more than that, and for the host's own root.
pub fn parse_root(text: &str) -> Result<ShareSpec, String> {
    let root = parse_share(text)?;
    if root.tag.is_some() || root.p9 {
        return Err(format!("'{text}' is no root; write DIR or DIR:ro"));
    }
    if root.path.canonicalize().is_ok_and(|path| path == Path::new("/")) && !root.read_only {
        return Err("the guest would change this host's own root; write --root /:ro".to_owned());
    }
    Ok(root)
}

/// Parses `stdio`, `none` or `file:F`.
///
/// # Errors
/// One line with the choices.
pub fn parse_char_target(text: &str) -> Result<CharTarget, String> {
    match text {
        "stdio" => Ok(CharTarget::Stdio),
        "none" => Ok(CharTarget::None),
        _ => match text.strip_prefix("file:") {
            Some("") => Err("'file:' needs a name; write file:NAME".to_owned()),
            Some(path) => Ok(CharTarget::File(PathBuf::from(path))),
            None => {
                let hint = suggest::did_you_mean(text, ["stdio", "none", "file:NAME"]).unwrap_or_default();
                Err(format!("'{text}' is not one of stdio, file:NAME, none{hint}"))
            }
        },
    }
}

/// Parses the seconds of `--timeout`.
///
/// # Errors
/// One line.
pub fn parse_timeout(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(seconds) if seconds.is_finite() && seconds > 0.0 && seconds < 1e9 => Ok(seconds),
        _ => Err(format!("'{text}' is no time-out; give seconds, as in 60 or 0.5")),
    }
}

/// The value of `--stats[=F]`; `-` is the table.
///
/// # Errors
/// Never.
pub fn parse_stats(text: &str) -> Result<StatsTarget, String> {
    Ok(if matches!(text, "-" | "") { StatsTarget::Print } else { StatsTarget::File(PathBuf::from(text)) })
}

/// Parses one of the names of `T`, with the nearest on a mistake; for files (clap does it on the command line).
///
/// # Errors
/// One line with the choices.
pub fn parse_choice<T: ValueEnum>(text: &str) -> Result<T, String> {
    T::from_str(text, false).map_err(|_| {
        let names: Vec<String> = T::value_variants()
            .iter()
            .filter_map(|v| v.to_possible_value())
            .map(|v| v.get_name().to_owned())
            .collect();
        let hint = suggest::did_you_mean(text, names.iter().map(String::as_str)).unwrap_or_default();
        format!("'{text}' is not one of {}{hint}", names.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_takes_suffixes_as_qemu_does() {
        for (text, bytes) in
            [("512M", 512 << 20), ("1G", 1 << 30), ("65536K", 64 << 20), ("512", 512 << 20), ("1T", 1 << 40)]
        {
            assert_eq!(parse_memory(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse_memory("1gib"), Ok(1 << 30));
        assert_eq!(parse_memory("16MiB"), Ok(16 << 20));
        assert_eq!(parse_memory("16777216B"), Ok(16 << 20));
    }

    #[test]
    fn memory_nonsense_is_one_line() {
        for text in [
            "0",
            "1B",
            "64K",
            "",
            "M",
            "-1",
            "1.5G",
            "x",
            "99999999999999999999",
            "20000000T",
            "4194305B",
            "1Q",
        ] {
            let error = parse_memory(text).unwrap_err();
            assert!(!error.contains('\n') && error.contains(';'), "{text}: {error}");
        }
    }

    #[test]
    fn cpus_range_is_1_to_16() {
        assert_eq!(parse_cpus("16"), Ok(16));
        for text in ["0", "17", "1000", "-1", "two", ""] {
            assert!(parse_cpus(text).unwrap_err().contains("from 1 to 16"));
        }
    }

    #[test]
    fn cpu_model_is_checked_and_completed() {
        assert_eq!(parse_cpu("v3,+avx512f,-hypervisor").unwrap(), "x86-64-v3,+avx512f,-hypervisor");
        assert!(parse_cpu("hots").unwrap_err().contains("'host'"));
        assert!(parse_cpu("max,avx").unwrap_err().contains("+avx"));
        assert!(parse_cpu("max,+avx5124f").unwrap_err().contains("did you mean 'avx512f'"));
        assert!(parse_cpu("max,+zzzzzz").unwrap_err().contains("--cpu help"));
    }

    #[test]
    fn disk_option_is_told_from_a_comma_in_the_name() {
        let spec = DiskSpec { path: "a.img".into(), read_only: true, ..DiskSpec::default() };
        assert_eq!(parse_disk("a.img,ro").unwrap(), spec);
        assert_eq!(parse_disk("path=a.img,readonly=on").unwrap(), spec);
        assert!(!parse_disk("a.img").unwrap().read_only);
        let directory = tempfile::tempdir().unwrap();
        let odd = directory.path().join("a,b");
        std::fs::write(&odd, b"").unwrap();
        assert_eq!(parse_disk(odd.to_str().unwrap()).unwrap().path, odd);
    }

    #[test]
    fn disk_options_are_read_and_mistakes_named() {
        let spec = parse_disk("a.img,format=qcow2,snapshot=on,serial=S1,queues=2").unwrap();
        let expected = DiskSpec {
            path: "a.img".into(),
            read_only: false,
            format: Some(ImageFormat::Qcow2),
            snapshot: true,
            serial: Some("S1".to_owned()),
            queues: Some(2),
            bus: DiskBus::Virtio,
        };
        assert_eq!(spec, expected);
        for (text, expected) in [
            ("a.img,rx", "'rx'"),
            ("a.img,fromat=raw", "did you mean 'format'"),
            ("a.img,format=vmdk", "raw or qcow2"),
            ("a.img,queues=0", "1 to 16"),
            ("a.img,queues=", "1 to 16"),
            ("a.img,serial=", "1 to 20"),
            ("a.img,snapshot=maybe", "on or off"),
            ("", "needs a file"),
            (",ro", "needs a file"),
        ] {
            let error = parse_disk(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn shares_are_directories_with_tags() {
        let share = parse_share("/tmp:work:ro:9p").unwrap();
        let expected =
            ShareSpec { path: "/tmp".into(), tag: Some("work".to_owned()), read_only: true, p9: true };
        assert_eq!(share, expected);
        assert_eq!(parse_share("/tmp").unwrap().tag, None);
        let directory = tempfile::tempdir().unwrap();
        let odd = directory.path().join("a:ro");
        std::fs::create_dir(&odd).unwrap();
        let share = parse_share(odd.to_str().unwrap()).unwrap();
        assert!(share.path == odd && !share.read_only);
        for text in ["", ":ro", "/tmp:a:b", "/tmp::ro", &format!("/tmp:{}", "x".repeat(37))] {
            assert!(!parse_share(text).unwrap_err().contains('\n'), "{text}");
        }
        assert!(parse_root("/:ro").unwrap().read_only);
        assert!(parse_root("/").unwrap_err().contains("--root /:ro"));
        assert!(parse_root("/tmp:tag").unwrap_err().contains("DIR:ro"));
    }

    #[test]
    fn char_target_suggests() {
        assert_eq!(parse_char_target("file:x"), Ok(CharTarget::File("x".into())));
        assert!(parse_char_target("stido").unwrap_err().contains("'stdio'"));
        assert!(parse_char_target("file:").is_err());
    }

    #[test]
    fn timeout_must_be_positive() {
        assert_eq!(parse_timeout("0.5"), Ok(0.5));
        for text in ["0", "-1", "inf", "nan", "x", "1e300"] {
            assert!(parse_timeout(text).is_err(), "{text}");
        }
    }

    #[test]
    fn flags_override_the_file() {
        let file = VmFlags {
            kernel: Some("k".into()),
            cpus: Some(2),
            append: Some("a".into()),
            disks: vec![parse_disk("one").unwrap()],
            ..VmFlags::default()
        };
        let flags = VmFlags {
            image: Some("debian".into()),
            cpus: Some(4),
            disks: vec![parse_disk("two").unwrap()],
            ..VmFlags::default()
        };
        let options = flags.or(file).resolve();
        assert_eq!(
            (options.kernel, options.cpus, options.append.as_deref(), options.disks.len()),
            (None, 4, Some("a"), 2)
        );
    }

    #[test]
    fn choice_accepts_both_spellings_of_automatic() {
        assert_eq!(parse_choice::<EngineChoice>("automatic"), Ok(EngineChoice::Auto));
        assert_eq!(parse_choice::<VirtualExec>("auto"), Ok(VirtualExec::Automatic));
        assert!(parse_choice::<MmuChoice>("sofware").unwrap_err().contains("did you mean 'software'"));
    }
}
