//! Everything between the options and the machine: files are read, disks opened and locked, memory held against what the
//! host has. What comes out can be assembled without another question to the file system.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Read as _};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmm::{
    DiskBus, DiskConfig, EngineKind, Image, ImageOptions, MAX_AHCI_DRIVES, NetConfig, ShareOptions,
    ShareProtocol, VsockConfig,
};

use crate::choice::{self, Wish};
use crate::control::ControlTarget;
use crate::extras::ExtraFlags;
use crate::gdb::GdbTarget;
use crate::image::{self, ImageSpec, Progress};
use crate::inside::InsideFlags;
use crate::options::{
    CharTarget, ClockChoice, DiskSpec, ShareSpec, StatsTarget, VgaChoice, VmOptions, parse_memory,
};

/// Why the program ends before the guest starts.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The user asked for something that makes no sense: status 2.
    #[error("{0}")]
    Usage(String),
    /// Something that this host cannot give: status 1.
    #[error("{0}")]
    Failure(String),
}

use PrepareError::{Failure, Usage};

/// How long somebody may take to open his end of a pipe.
const PIPE_PATIENCE: Duration = Duration::from_secs(3);
/// How often we look for him.
const PIPE_LOOK: Duration = Duration::from_millis(20);

/// An initrd or multiboot module, in memory.
#[derive(Debug)]
pub struct Module {
    /// Where it came from.
    pub path: PathBuf,
    /// Its command line as multiboot passes it: path and arguments as written.
    pub command_line: String,
    /// Its content.
    pub content: Vec<u8>,
}

/// A machine that is ready to be assembled.
#[derive(Debug)]
pub struct Prepared {
    /// What is booted, for messages: a path or a name.
    pub kernel_name: String,
    /// The kernel file.
    pub kernel: Vec<u8>,
    /// Where it can be read again.
    pub kernel_file: Option<File>,
    /// Initrd (the first) or multiboot modules.
    pub modules: Vec<Module>,
    /// Kernel command line.
    pub append: String,
    /// Guest memory.
    pub memory_bytes: u64,
    /// vCPUs.
    pub cpus: u32,
    /// CPU model and features.
    pub cpu: String,
    /// The engine, decided.
    pub engine: EngineKind,
    /// Disks in the order given, open and locked.
    pub disks: Vec<DiskConfig>,
    /// Shared directories.
    pub shares: Vec<ShareOptions>,
    /// Network cards, plugged in.
    pub nets: Vec<NetConfig>,
    /// Sockets, plugged in.
    pub vsock: Option<VsockConfig>,
    /// Smaller devices.
    pub extras: ExtraFlags,
    /// COM1.
    pub serial: Output,
    /// Debug console.
    pub debugcon: Output,
    /// Display.
    pub vga: VgaChoice,
    /// Port 0xf4 ends the run.
    pub isa_debug_exit: bool,
    /// A reset ends the run.
    pub no_reboot: bool,
    /// The run ends after so many seconds.
    pub timeout_seconds: Option<f64>,
    /// What the machine is called, if it was said.
    pub name: Option<String>,
    /// Its control socket.
    pub control: ControlTarget,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Where gdb is waited for.
    pub gdb: Option<GdbTarget>,
    /// Nothing runs before gdb has attached.
    pub gdb_wait: bool,
    /// Statistics at the end.
    pub stats: Option<StatsTarget>,
    /// Traces, and files for perf.
    pub inside: InsideFlags,
    /// The file of the trace, open.
    pub trace_file: Option<File>,
    /// Clock.
    pub clock: ClockChoice,
    /// Save and restore the machine at the guest's marker.
    pub save_at_marker: bool,
    /// Whether this is the embedded contract suite.
    pub is_contract: bool,
}

/// Where the guest's output goes.
#[derive(Debug)]
pub enum Output {
    /// The terminal.
    Stdio,
    /// A file, open.
    File(File),
    /// Nowhere.
    None,
}

/// The guest that the options name.
struct Guest {
    name: String,
    kernel: Vec<u8>,
    kernel_file: Option<File>,
    initrd: Option<String>,
    append: String,
    /// The disk that it starts from.
    disk: Option<DiskSpec>,
    is_contract: bool,
}

/// Checks and opens everything that `options` name.
///
/// # Errors
/// One line, with the status it stands for.
pub fn prepare(options: VmOptions) -> Result<Prepared, PrepareError> {
    let wish = Wish {
        engine: options.engine,
        mmu: options.mmu,
        clock: options.clock,
        translator: options.inside.needs_translator().is_some(),
    };
    let choice = choice::decide(wish, engine_kvm::probe::host())?;
    tracing::info!(
        "engine {}, {} MMU: {}",
        choice.engine.name(),
        if choice.hardware_mmu { "hardware" } else { "software" },
        choice.why
    );
    let engine = choice.engine;
    check_memory(options.memory_bytes, host_memory_bytes())?;
    if options.serial == CharTarget::Stdio && options.debugcon == CharTarget::Stdio {
        tracing::info!("serial port and debug console share the terminal");
    }
    let on_ahci = options.disks.iter().filter(|disk| disk.bus != DiskBus::Virtio).count();
    if on_ahci > MAX_AHCI_DRIVES {
        return Err(Usage(format!(
            "the AHCI controller has {MAX_AHCI_DRIVES} ports, not {on_ahci}; attach some disks without if=ahci"
        )));
    }
    let disks = options.disks.iter().map(|disk| open_disk(disk, options.snapshot));
    let mut disks = disks.collect::<Result<Vec<_>, _>>()?;
    let mut guest = find_guest(&options)?;
    let shares = shares(&options)?;
    let mut net = options.net.clone();
    if let Some(disk) = &guest.disk {
        disks.insert(0, open_disk(disk, options.snapshot)?);
        net = if options.clock == ClockChoice::Host { net.or_user() } else { net };
    }
    let nets = net.plug_in(options.clock)?;
    options.extras.check_balloon(options.memory_bytes)?;
    let vsock = options.extras.plug_in(options.clock)?;
    let modules = match options.initrd.as_deref().or(guest.initrd.as_deref()) {
        Some(text) => read_modules(text, options.memory_bytes)?,
        None => Vec::new(),
    };
    let modules = match &options.root {
        Some(root) => root_modules(root, &mut guest, modules)?,
        None if guest.disk.is_some() && options.initrd.is_none() => disk_modules(modules),
        None => modules,
    };
    check_fits(&guest, &modules, options.memory_bytes)?;
    if let (Some(option), true) = (options.inside.needs_translator(), engine != EngineKind::Bt) {
        return Err(Usage(format!(
            "{option} is of the translator's work; give --engine bt (it has no --clock icount)"
        )));
    }
    let trace_file = options.inside.trace.as_ref().and_then(|trace| trace.file.as_deref());
    let trace_file = trace_file.map(|path| create(path, "trace")).transpose()?;
    if let Some(StatsTarget::File(path)) = &options.stats {
        // Better now than after an hour's run.
        create(path, "statistics")?;
    }
    Ok(Prepared {
        kernel_name: guest.name,
        kernel: guest.kernel,
        kernel_file: guest.kernel_file,
        modules,
        append: options.append.unwrap_or(guest.append),
        memory_bytes: options.memory_bytes,
        cpus: options.cpus,
        cpu: options.cpu,
        engine,
        disks,
        shares,
        nets,
        vsock,
        extras: options.extras,
        serial: open_output(&options.serial)?,
        debugcon: open_output(&options.debugcon)?,
        vga: options.vga,
        isa_debug_exit: options.isa_debug_exit || guest.is_contract,
        no_reboot: options.no_reboot,
        timeout_seconds: options.timeout_seconds,
        name: options.name,
        control: options.control,
        metrics: options.metrics,
        gdb: options.gdb,
        gdb_wait: options.gdb_wait,
        stats: options.stats,
        inside: options.inside,
        trace_file,
        clock: options.clock,
        save_at_marker: options.save_at_marker,
        is_contract: guest.is_contract,
    })
}

/// Refuses guest memory that the host has not.
fn check_memory(wanted_bytes: u64, host_bytes: Option<u64>) -> Result<(), PrepareError> {
    match host_bytes {
        Some(host) if wanted_bytes > host => Err(Failure(format!(
            "guest memory of {} is more than this host has ({}); give a smaller --memory",
            mebibytes(wanted_bytes),
            mebibytes(host)
        ))),
        _ => Ok(()),
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// Memory and swap of this host, or the limit of the control group that we run in, whichever is less.
fn host_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    let host = (kib("MemTotal:")? + kib("SwapTotal:").unwrap_or(0)) << 10;
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let limit =
        limits.iter().filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()).min();
    Some(limit.map_or(host, |limit| host.min(limit)))
}

/// What to say of a name that looks like the value of an option before it, which takes one only behind `=`.
fn misplaced(options: &VmOptions, name: &str) -> Option<String> {
    let is_place = name.contains(':') || name.parse::<u16>().is_ok();
    let meant = if options.extras.balloon.is_some() && parse_memory(name).is_ok() {
        format!("the balloon's size, write --balloon={name}")
    } else if options.gdb.is_some() && is_place {
        format!("where gdb attaches, write --gdb={}", name.trim_start_matches("tcp:"))
    } else {
        return None;
    };
    Some(format!("'{name}' is no image; if it is {meant}"))
}

/// What to boot: a kernel file, the contract suite, a fetched image; by default Debian, or the contract suite where
/// Debian cannot be had.
fn find_guest(options: &VmOptions) -> Result<Guest, PrepareError> {
    if let Some(error) = options.image.as_deref().and_then(|name| misplaced(options, name)) {
        return Err(Usage(error));
    }
    match (options.image.as_deref(), options.kernel.as_deref()) {
        (Some(image), Some(_)) => {
            Err(Usage(format!("'{image}' and --kernel both name a guest; give one of them")))
        }
        (None, Some(path)) => Ok(Guest {
            name: path.display().to_string(),
            kernel: read_file(path, "kernel", options.memory_bytes)?,
            kernel_file: regular(path),
            initrd: None,
            append: String::new(),
            disk: None,
            is_contract: false,
        }),
        (Some("contract"), None) => Ok(contract()),
        (Some(name), None) => {
            let spec = ImageSpec::from_name(name).map_err(|error| Usage(error.to_string()))?;
            fetched(&spec, options)
        }
        (None, None) => fetched(&ImageSpec::default_debian(), options).or_else(|error| {
            crate::terminal::tell(&format!(
                "trellis: cannot boot Debian: {error}\ntrellis: booting the built-in contract tests instead\n"
            ));
            Ok(contract())
        }),
    }
}

fn contract() -> Guest {
    Guest {
        name: "contract".to_owned(),
        kernel: guest_embed::CONTRACT.to_vec(),
        kernel_file: None,
        initrd: None,
        append: String::new(),
        disk: None,
        is_contract: true,
    }
}

/// An image of the cache, fetched first if need be.
fn fetched(spec: &ImageSpec, options: &VmOptions) -> Result<Guest, PrepareError> {
    // The kernels for virtual machines have no driver of this card, in whatever image.
    let e1000 = options.net.has_e1000() && !spec.flavour.contains("cloud");
    let image = if e1000 {
        image::ensure_module(spec, "e1000", Progress::new)
    } else {
        image::ensure(spec, Progress::new)
    };
    let image = image.map_err(|error| Failure(error.to_string()))?;
    let mut append = image.manifest.append.clone();
    if spec.is_linux() && options.vga == VgaChoice::Text {
        append = append.replace("console=ttyS0", "console=ttyS0 console=tty0");
    } else if spec.is_linux() && options.serial == CharTarget::Stdio && !spec.rootfs {
        append.push_str(&terminal_size_word());
    }
    Ok(Guest {
        name: spec.name(),
        kernel: read_file(&image.kernel, "kernel", options.memory_bytes)?,
        kernel_file: regular(&image.kernel),
        initrd: image.initrd.map(|path| path.display().to_string()),
        append,
        disk: image.disk.map(|path| DiskSpec { path, ..DiskSpec::default() }),
        is_contract: false,
    })
}

/// Tells our `/init` how large the terminal is: a serial line has no other way to say it.
fn terminal_size_word() -> String {
    let stdout = io::stdout();
    match rustix::termios::tcgetwinsize(&stdout) {
        Ok(size) if stdout.is_terminal() && size.ws_col > 0 && size.ws_row > 0 => {
            format!(" trellis.size={}x{}", size.ws_col, size.ws_row)
        }
        _ => String::new(),
    }
}

/// A file that can be read again, unlike a pipe.
fn regular(path: &Path) -> Option<File> {
    let is_file = std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    is_file.then(|| File::open(path).ok()).flatten()
}

/// Reads a whole file of at most `limit_bytes`; pipes will do.
fn read_file(path: &Path, what: &str, limit_bytes: u64) -> Result<Vec<u8>, PrepareError> {
    let cannot = |error: &io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => format!("; name an existing file with --{what}"),
            io::ErrorKind::PermissionDenied => "; make it readable (chmod, or a copy of your own)".to_owned(),
            _ => String::new(),
        };
        Failure(format!("cannot read the {what} {}: {error}{hint}", path.display()))
    };
    let file = open_input(path).map_err(|error| cannot(&error))?;
    if path.is_dir() {
        return Err(Failure(format!(
            "the {what} {} is a directory; name a file with --{what}",
            path.display()
        )));
    }
    let mut content = Vec::new();
    file.take(limit_bytes + 1).read_to_end(&mut content).map_err(|error| cannot(&error))?;
    if content.is_empty() {
        return Err(Failure(format!(
            "the {what} {} is empty; name another file with --{what}",
            path.display()
        )));
    }
    if content.len() as u64 > limit_bytes {
        return Err(Failure(format!(
            "the {what} {} is larger than guest memory ({}); give more with --memory",
            path.display(),
            mebibytes(limit_bytes)
        )));
    }
    Ok(content)
}

/// A file to be read, behind what was read of it already.
pub type Input = io::Chain<io::Cursor<Vec<u8>>, File>;

/// Opens a file to be read. A named pipe to which nobody writes for [`PIPE_PATIENCE`] is an error, a slow writer is not.
///
/// # Errors
/// As [`File::open`].
pub fn open_input(path: &Path) -> io::Result<Input> {
    let begun = |bytes: &[u8], file| Ok(io::Cursor::new(bytes.to_vec()).chain(file));
    if !std::fs::metadata(path)?.file_type().is_fifo() {
        return begun(&[], File::open(path)?);
    }
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let deadline = Instant::now() + PIPE_PATIENCE;
    let mut first = [0; 1];
    loop {
        match file.read(&mut first) {
            Ok(0) if Instant::now() > deadline => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody writes to this pipe"));
            }
            // Nobody writes, or he takes his time (pipe(7)).
            Ok(0) => std::thread::sleep(PIPE_LOOK),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(PIPE_LOOK),
            Ok(_) => break,
            Err(error) => return Err(error),
        }
    }
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags - rustix::fs::OFlags::NONBLOCK)?;
    begun(&first, file)
}

/// Reads `FILE`, or `FILE ARGS,FILE ARGS` (QEMU's way to name multiboot modules).
fn read_modules(text: &str, limit_bytes: u64) -> Result<Vec<Module>, PrepareError> {
    let module = |text: &str, path: &str| {
        let path = PathBuf::from(path);
        Ok(Module { content: read_file(&path, "initrd", limit_bytes)?, path, command_line: text.to_owned() })
    };
    if Path::new(text).exists() {
        return Ok(vec![module(text, text)?]);
    }
    text.split(',').map(|text| module(text, text.split(' ').next().unwrap_or(text))).collect()
}

/// Refuses what cannot possibly fit; the loader places it exactly.
fn check_fits(guest: &Guest, modules: &[Module], memory_bytes: u64) -> Result<(), PrepareError> {
    let len = |bytes: &Vec<u8>| bytes.len() as u64;
    let total: u64 = len(&guest.kernel) + modules.iter().map(|module| len(&module.content)).sum::<u64>();
    if total <= memory_bytes {
        return Ok(());
    }
    Err(Failure(format!(
        "kernel and initrd ({}) are larger than guest memory ({}); give more with --memory",
        mebibytes(total + (1 << 20) - 1),
        mebibytes(memory_bytes)
    )))
}

/// Opens and locks a disk image, and what it is based on.
fn open_disk(spec: &DiskSpec, snapshot: bool) -> Result<DiskConfig, PrepareError> {
    let image = Image::open(&ImageOptions {
        path: spec.path.clone(),
        read_only: spec.read_only,
        format: spec.format,
        snapshot: (snapshot || spec.snapshot) && !spec.read_only,
    });
    let image = image.map_err(|error| Failure(error.to_string()))?;
    Ok(DiskConfig {
        serial: spec.serial.clone(),
        queues: spec.queues,
        bus: spec.bus,
        ..DiskConfig::new(image)
    })
}

/// What `--share` and `--root` name.
fn shares(options: &VmOptions) -> Result<Vec<ShareOptions>, PrepareError> {
    let share = |(n, spec): (usize, &ShareSpec)| ShareOptions {
        path: spec.path.clone(),
        tag: spec.tag.clone().unwrap_or_else(|| format!("share{n}")),
        read_only: spec.read_only,
        protocol: if spec.p9 { ShareProtocol::P9 } else { ShareProtocol::Fuse },
        is_static: false,
    };
    let mut all: Vec<ShareOptions> = options.shares.iter().enumerate().map(share).collect();
    if let Some(root) = &options.root {
        // Below an overlay nothing may change.
        let (tag, is_static) = (image::root::TAG.to_owned(), root.read_only);
        all.push(ShareOptions { tag, is_static, ..share((0, root)) });
    }
    for (n, share) in all.iter().enumerate() {
        let path = share.path.display();
        match std::fs::metadata(&share.path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(Failure(format!("cannot share {path}: it is no directory"))),
            Err(error) => return Err(Failure(format!("cannot share {path}: {error}; name a directory"))),
        }
        if all[..n].iter().any(|other| other.tag == share.tag) {
            return Err(Usage(format!("two shares are called '{}'; give one another tag", share.tag)));
        }
    }
    Ok(all)
}

/// The initrd of a guest whose root is a directory of the host.
fn root_modules(
    root: &ShareSpec,
    guest: &mut Guest,
    modules: Vec<Module>,
) -> Result<Vec<Module>, PrepareError> {
    let Ok([mut initrd]) = <[Module; 1]>::try_from(modules) else {
        return Err(Usage("--root needs a Linux image, as in: trellis boot debian --root DIR".to_owned()));
    };
    let program = image::root::first_program(&root.path).ok_or_else(|| {
        Failure(format!(
            "the directory {} has no /sbin/init and no /bin/sh; name one that holds a system",
            root.path.display()
        ))
    })?;
    if root.read_only && !image::root::has_module(&initrd.content, "overlay") {
        let spec = ImageSpec::from_name(&guest.name).map_err(|error| Usage(error.to_string()))?;
        let image = image::ensure_module(&spec, "overlay", Progress::new);
        let image = image.map_err(|error| Failure(error.to_string()))?;
        guest.kernel = read_file(&image.kernel, "kernel", u64::MAX - 1)?;
        guest.kernel_file = regular(&image.kernel);
        let path = image.initrd.unwrap_or(initrd.path);
        initrd = Module { content: read_file(&path, "initrd", u64::MAX - 1)?, path, ..initrd };
    }
    let (overlay, program) = (root.read_only, program.to_owned());
    let plan = image::root::RootPlan { overlay, program, ..Default::default() };
    initrd.content = plan.initramfs(&initrd.content);
    Ok(vec![initrd])
}

/// The initrd of a guest whose root is its own disk.
fn disk_modules(modules: Vec<Module>) -> Vec<Module> {
    let on_disk = |module: Module| Module { content: image::rootfs::initramfs(&module.content), ..module };
    modules.into_iter().map(on_disk).collect()
}

/// Opens what `--serial` or `--debugcon` names.
fn open_output(target: &CharTarget) -> Result<Output, PrepareError> {
    Ok(match target {
        CharTarget::Stdio => Output::Stdio,
        CharTarget::None => Output::None,
        CharTarget::File(path) => Output::File(create(path, "output")?),
    })
}

/// Makes a file, or opens a pipe that somebody reads: it does not wait for him.
fn create(path: &Path, what: &str) -> Result<File, PrepareError> {
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo()) {
        let unread = |_| Failure(format!("nobody reads the pipe {}; start its reader first", path.display()));
        let pipe =
            OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(unread)?;
        let blocking = rustix::fs::fcntl_getfl(&pipe)
            .and_then(|flags| rustix::fs::fcntl_setfl(&pipe, flags - rustix::fs::OFlags::NONBLOCK));
        return match blocking {
            Ok(()) => Ok(pipe),
            Err(error) => Err(Failure(format!("cannot write the {what} file {}: {error}", path.display()))),
        };
    }
    File::create(path).map_err(|error| {
        Failure(format!("cannot write the {what} file {}: {error}; name another", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::VmFlags;

    fn failure(result: Result<impl Sized, PrepareError>) -> String {
        match result {
            Err(Failure(text)) => text,
            Err(Usage(text)) => panic!("usage: {text}"),
            Ok(_) => panic!("no error"),
        }
    }

    fn disk(path: &Path, read_only: bool) -> Result<DiskConfig, PrepareError> {
        open_disk(&DiskSpec { path: path.to_owned(), read_only, ..DiskSpec::default() }, false)
    }

    #[test]
    fn memory_larger_than_the_host_is_refused() {
        assert!(
            failure(check_memory(1 << 40, Some(1 << 34)))
                .contains("1048576 MiB is more than this host has (16384 MiB)")
        );
        assert!(check_memory(1 << 30, Some(1 << 34)).is_ok());
        assert!(host_memory_bytes().unwrap() > 1 << 20);
    }

    #[test]
    fn kernel_missing_empty_directory_or_huge_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let empty = directory.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        assert!(
            failure(read_file(&directory.path().join("none"), "kernel", 1 << 20)).contains("No such file")
        );
        assert!(failure(read_file(&empty, "kernel", 1 << 20)).contains("is empty"));
        assert!(failure(read_file(directory.path(), "kernel", 1 << 20)).contains("is a directory"));
        assert!(
            failure(read_file(Path::new("/dev/zero"), "initrd", 1 << 20))
                .contains("larger than guest memory")
        );
    }

    #[test]
    fn disk_in_use_is_refused_to_a_second_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("d.img");
        assert!(failure(disk(&path, false)).contains("truncate -s 1G"));
        std::fs::write(&path, [0; 1024]).unwrap();
        let first = disk(&path, false).unwrap();
        assert!(failure(disk(&path, false)).contains("in use by"));
        assert!(failure(disk(&path, true)).contains("in use by"));
        drop(first);
        let (_one, _two) = (disk(&path, true).unwrap(), disk(&path, true).unwrap());
        let spec = DiskSpec { path, ..DiskSpec::default() };
        assert!(open_disk(&spec, true).is_ok(), "a snapshot only reads");
    }

    #[test]
    fn modules_are_split_as_qemu_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("m");
        std::fs::write(&path, b"x").unwrap();
        let text = format!("{0} a=1,{0}", path.display());
        let modules = read_modules(&text, 1 << 20).unwrap();
        assert_eq!(modules.len(), 2);
        assert!(modules[0].command_line.ends_with("m a=1"));
        let odd = directory.path().join("a, b");
        std::fs::write(&odd, b"x").unwrap();
        assert_eq!(read_modules(odd.to_str().unwrap(), 1 << 20).unwrap().len(), 1);
    }

    #[test]
    fn image_and_kernel_together_are_a_usage_error() {
        let flags = VmFlags { image: Some("debian".into()), kernel: Some("k".into()), ..VmFlags::default() };
        assert!(matches!(prepare(flags.resolve()), Err(Usage(_))));
    }

    #[test]
    fn contract_is_embedded() {
        let flags = VmFlags { image: Some("contract".into()), ..VmFlags::default() };
        let prepared = prepare(flags.resolve()).unwrap();
        assert!(prepared.is_contract && prepared.isa_debug_exit && !prepared.kernel.is_empty());
    }
}
