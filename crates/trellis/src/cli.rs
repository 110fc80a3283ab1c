//! The command line, as clap sees it, and clap's errors as one line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueHint};

use crate::bakeoff::BakeoffArgs;
use crate::bench::BenchArgs;
use crate::control::{self, ControlTarget};
use crate::dump::DumpArgs;
use crate::exec::ExecArgs;
use crate::extras::{ExtraFlags, parse_balloon_size};
use crate::gdb::{self, GdbTarget};
use crate::image::Arch;
use crate::image::rootfs::RootfsOptions;
use crate::inside::InsideFlags;
use crate::metrics;
use crate::net::{NetFlags, NetSpec, parse_forward, parse_net};
use crate::options::{
    CharTarget, ClockChoice, DiskSpec, EngineChoice, MmuChoice, ShareSpec, StatsTarget, VgaChoice,
    VirtualExec, VmFlags, parse_char_target, parse_cpu, parse_cpus, parse_disk, parse_disk_format,
    parse_disk_size, parse_memory, parse_root, parse_share, parse_stats, parse_timeout,
};
use crate::top::TopArgs;
use hostnet::Forward;
use vmm::ImageFormat;

const EXAMPLES: &str = "\
Examples:
  trellis boot                                     Debian to a shell (fetched once, by apt)
  trellis boot debian --cpus 2 --memory 1G         the same, larger
  trellis boot --kernel /boot/vmlinuz --append console=ttyS0
                                                   a kernel of this host
  trellis boot contract                            the built-in contract tests
  trellis run my-vm.toml --stats                   a machine described in a file
  trellis exec -- make test                        a command of this host, in a VM that cannot change its files
  trellis list                                     running machines; see also stat, screendump, quit
  trellis image list                               what can be booted";

const BOOT_EXAMPLES: &str = "\
Examples:
  trellis boot
      Boots Debian's cloud kernel to a busybox shell; fetches it first if it is not there.
  trellis boot debian --append 'console=ttyS0 trellis.run=\"cat /proc/cpuinfo\"' --stats
      Runs one command in the guest, powers off, says where the time went.
  trellis boot --kernel vmlinuz --disk root.img --disk data.img,ro --append 'console=ttyS0 root=/dev/vda'
      A kernel and disks of your own; docs/guide/disks.md tells of qcow2, --snapshot and more.
  trellis boot debian --net user --forward tcp:2222:22
      A network behind this host, without any rights; port 2222 here is port 22 there. See docs/guide/network.md.
  trellis boot debian-rootfs --cpus 2 --memory 1G --forward tcp:2222:22
      A whole Debian on a disk of its own (built first, once); then: ssh -p 2222 root@127.0.0.1
  trellis boot --kernel xen --initrd 'vmlinuz console=hvc0,initrd' --append com1=115200
      A multiboot kernel with modules: --initrd 'FILE ARGS,FILE ARGS'.
  trellis boot --gdb-wait
      Waits for gdb before the first instruction: gdb -ex 'target remote :1234'. See docs/debugging.md.
  trellis boot debian-memtest86+-amd64 --vga text --memory 64M
      An image by its name in `trellis image list`.

Keys on a terminal: Ctrl-A X quits, Ctrl-A H shows the others. Ctrl-C goes to the guest.

Exit status: 0 guest powered off (or reset, with --no-reboot); 3 triple fault; 124 time-out;
(v << 1) | 1 for v written to port 0xf4 with --isa-debug-exit; 1 failure; 2 usage.";

const RUN_EXAMPLES: &str = "\
A file looks like this; every key is optional, and paths are relative to the file:
  kernel = \"vmlinuz\"               # or: image = \"debian\"
  initrd = \"initrd.img\"
  append = \"console=ttyS0\"
  memory = \"1G\"
  cpus = 2
  cpu = \"max,-avx512f\"
  disk = [\"root.qcow2\", \"data.img,ro\"]
  snapshot = false
  net = \"user\"                     # see docs/guide/network.md
  forward = [\"tcp:2222:22\"]
  rtc = \"base=localtime\"            # see docs/guide/devices.md
  balloon = true
  vsock = \"cid=3,socket=vm.sock\"
  shutdown_grace = 10
  serial = \"stdio\"
  share = [\"src:src:ro\"]
  root = \"rootfs\"                   # a directory as root file system, with a kernel of ours
  monitor.virtual_exec = \"automatic\"   # software, hardware, automatic
  monitor.virtual_mmu = \"automatic\"";

const EXEC_EXAMPLES: &str = "\
Examples:
  trellis exec uname -a
  trellis exec --rw . -- make test                 may write here, and nowhere else on this host
  trellis exec -- sh -c 'rm -rf /usr; ls /usr'     changes are in the guest's memory and gone at the end
  git diff | trellis exec -- wc -l                 input, output, errors and signals as without a VM

The command has this host's files, working directory, environment and user, a kernel of its own, and no network.

Exit status: the command's; 128 + n if signal n ended it; 127 if there is no such command, 126 if it cannot be run; 124
time-out; 1 failure of the VM, said in one line; 2 usage.";

const FETCH_EXAMPLES: &str = "\
Examples:
  trellis image fetch debian                       the cloud kernel, amd64
  trellis image fetch debian --flavour generic     the kernel for all machines
  trellis image fetch debian --flavour 686-pae     a 32-bit kernel
  trellis image fetch debian --flavour memtest86+  the memory tester
  trellis image fetch debian --flavour 6.12-cloud  any linux-image-FLAVOUR-ARCH that your package sources have
  trellis image fetch debian --mirror http://mirror.example/debian --suite bookworm
  trellis image fetch debian --rootfs              a whole system on a disk; then: trellis boot debian-rootfs
  trellis image fetch debian --rootfs --size 20G --include gcc,libc6-dev,git
                                                   a larger one, with a compiler; see docs/guide/distribution.md

Packages come from the sources in /etc/apt, through a private apt state: no root, and nothing of the machine's own
apt changes. Images are kept in $XDG_CACHE_HOME/trellis (~/.cache/trellis).";

const TYPE_EXAMPLES: &str = "\
Examples:
  trellis type 'root\\n'                   on the keyboard of the only machine
  trellis type web --serial 'uname -a\\n'  on the serial line of the machine 'web'";

const BALLOON_EXAMPLES: &str = "\
Examples (of a machine that was started with --balloon):
  trellis balloon                         how large it is, and what the guest says of its memory
  trellis balloon web --size 256M         the guest is to do without 256 MiB; they are this host's
  trellis balloon web --size 0            it gets them back";

const TOP_EXAMPLES: &str = "\
Examples:
  trellis top                     on a terminal: q quits, the arrows choose a machine
  trellis top --once              one frame as text, of a second's rates
  trellis top -b -n 60 -d 5 > log six frames a minute, for five minutes

LOAD is time not asleep, in percent of one CPU; IN GUEST what of it was the guest's own code, the rest being exits.";

const BAKEOFF_EXAMPLES: &str = "\
Examples:
  trellis bakeoff -- gzip -c big.txt               a program of this host, its libraries, and the files it names
  trellis bakeoff --with /usr/lib/python3.11 -- python3 job.py
  trellis bakeoff --modes bt,tcg --runs 5 --input words.txt -- sort
  trellis bakeoff --kernel vmlinuz --initrd initrd --append console=ttyS0 --until login:
  trellis bakeoff --json --modes native,bt -- ./server-test > result.json

Each mode runs the same files: natively in a root of their own, in guests as an initramfs. Beside the times stands
where they went: exits by cause, translation, translated code, idle, the dearest guest functions, and what remains
unexplained; then what other ways of virtualization are predicted to make of it, and advice. docs/measuring.md teaches to
read it.

Exit status: 0 all ran (a mode that this host lacks is left out with a line); 1 something failed; 2 usage.";

const BENCH_EXAMPLES: &str = "\
Examples:
  trellis bench --quick                            everything, in a few minutes
  trellis bench --only sum,getppid,forkwait --modes native,interp,tcg
  trellis bench --quick --save new.json --compare old.json
  trellis bench --json > result.json               for programs; progress goes to standard error
  trellis bench --list                             what there is

Values are nanoseconds per operation (cycles of single operations, nano-*), medians on the host's clock; percent of
native is native time by this time. A report with plots is written beside; its path is printed.

Exit status: 0 all was measured (a mode that this host lacks is left out with a line); 1 something failed; 2 usage.";

const DUMP_EXAMPLES: &str = "\
Examples:
  trellis dump --bytes '48 01 d8 48 8b 4f 08 c3'   a few instructions, as a kernel's
  trellis dump --bytes '48 8b 4f 08' --user        as a program's: its address is not known
  trellis dump --file /bin/true                    the first unit of a program
  trellis dump --file vmlinux --symbol do_syscall_64
                                                   a function, unit by unit
  trellis dump --file code.bin --offset 1f0 --rip ffffffff81000000 --units 3 --json

Guest code is on the left, the host code made of it on the right; then what is seldom executed, exits, places that
call out. Addresses are hexadecimal. docs/inside.md explains how to read it.";

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// Runs unmodified x86 operating systems in an ordinary process, with or without hardware virtualization.
#[derive(Debug, Parser)]
#[command(name = "trellis", version, styles = STYLES, after_help = EXAMPLES, max_term_width = 110)]
#[command(arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a guest: Debian, the contract tests, or a kernel of yours
    #[command(after_help = BOOT_EXAMPLES)]
    Boot {
        /// debian, contract, or a name of `trellis image list`; without it and without --kernel: debian
        #[arg(value_name = "IMAGE")]
        image: Option<String>,
        /// The machine.
        #[command(flatten)]
        machine: Box<MachineArgs>,
    },
    /// Boot the machine that a TOML file describes, or a directory with --root; options override the file
    #[command(after_help = RUN_EXAMPLES)]
    Run {
        /// The file; not needed with --root
        #[arg(value_name = "VM.toml", value_hint = ValueHint::FilePath, required_unless_present = "root")]
        file: Option<PathBuf>,
        /// The machine.
        #[command(flatten)]
        machine: Box<MachineArgs>,
    },
    /// Run a command of this host in a VM that sees the host's files and cannot change them
    #[command(after_help = EXEC_EXAMPLES)]
    Exec {
        /// What to run, and how.
        #[command(flatten)]
        exec: ExecArgs,
    },
    /// Show and fetch bootable images
    Image {
        /// What to do.
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// Show the running machines
    List {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Show where the time of a running machine goes: exits by cause and what they cost, by CPU
    Stat {
        /// Its name in `trellis list`; not needed when only one is running
        vm: Option<String>,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Watch the running machines: load, exits by cause and what they cost, memory
    #[command(after_help = TOP_EXAMPLES)]
    Top {
        /// How.
        #[command(flatten)]
        top: TopArgs,
    },
    /// Print the VGA text screen of a running machine
    Screendump {
        /// Its name in `trellis list`; not needed when only one is running
        vm: Option<String>,
    },
    /// Type on the keyboard of a running machine
    #[command(override_usage = "trellis type [--serial] [VM] TEXT", after_help = TYPE_EXAMPLES)]
    Type {
        /// The machine's name, unless only one is running; what to type: \n is Enter, \t Tab, \b Backspace, \e Escape
        #[arg(value_name = "TEXT", required = true, num_args = 1..=2)]
        words: Vec<String>,
        /// On the serial line instead of the PS/2 keyboard
        #[arg(long)]
        serial: bool,
    },
    /// Show the memory balloon of a running machine, or take memory from the guest by its size
    #[command(after_help = BALLOON_EXAMPLES)]
    Balloon {
        /// Its name in `trellis list`; not needed when only one is running
        vm: Option<String>,
        /// The memory that is to be taken from the guest, as in 256M; 0 gives all back
        #[arg(long, short = 's', value_name = "SIZE", value_parser = parse_balloon_size, allow_hyphen_values = true)]
        size: Option<u64>,
    },
    /// Press the power button of a running machine: its system may shut down
    Powerdown {
        /// Its name in `trellis list`; not needed when only one is running
        vm: Option<String>,
    },
    /// End a running machine at once
    Quit {
        /// Its name in `trellis list`; not needed when only one is running
        vm: Option<String>,
    },
    /// Send a non-maskable interrupt to a running machine
    Nmi {
        /// Its name in `trellis list`; not needed when only one is running
        vm: Option<String>,
    },
    /// Stop a running machine and its clock
    Pause {
        /// Its name in `trellis list`; not needed when only one is running
        vm: Option<String>,
    },
    /// Let a paused machine go on
    Resume {
        /// Its name in `trellis list`; not needed when only one is running
        vm: Option<String>,
    },
    /// Measure the same programs natively and under each engine, side by side
    #[command(after_help = BENCH_EXAMPLES)]
    Bench {
        /// What to measure.
        #[command(flatten)]
        bench: BenchArgs,
    },
    /// Run your own command or machine in each mode, side by side, and say where the time goes
    #[command(after_help = BAKEOFF_EXAMPLES, override_usage = "trellis bakeoff [OPTIONS] -- CMD [ARG…]\n       trellis bakeoff [OPTIONS] --kernel FILE [--initrd FILE] [--disk FILE] [--until TEXT]")]
    Bakeoff {
        /// What to run.
        #[command(flatten)]
        bakeoff: Box<BakeoffArgs>,
    },
    /// Say what this host offers: virtualization, /dev/kvm, huge pages, … and what `automatic` takes
    Host {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Show what the binary translator makes of code
    #[command(after_help = DUMP_EXAMPLES)]
    Dump {
        /// What to translate.
        #[command(flatten)]
        dump: Box<DumpArgs>,
    },
    /// Print a completion script for your shell
    #[command(
        after_help = "Example:\n  trellis completions bash > ~/.local/share/bash-completion/completions/trellis"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(
        after_help = "Examples:\n  trellis man | man -l -\n  trellis man --output ~/.local/share/man/man1"
    )]
    Man {
        /// Write the pages of all subcommands into this directory instead
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        output: Option<PathBuf>,
    },
}

/// `trellis image …`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Show what is cached and what can be fetched
    List {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Fetch a kernel and busybox with apt, and build an initramfs
    #[command(after_help = FETCH_EXAMPLES)]
    Fetch {
        /// debian (on Ubuntu: Ubuntu's kernel), or a name of `trellis image list`
        #[arg(value_name = "IMAGE")]
        image: String,
        /// Take the packages from this archive instead of the sources in /etc/apt
        #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
        mirror: Option<String>,
        /// The suite of the mirror, as in bookworm; without it this machine's
        #[arg(long, requires = "mirror")]
        suite: Option<String>,
        /// Architecture of the kernel
        #[arg(long)]
        arch: Option<Arch>,
        /// Which kernel: cloud, generic, rt, 686-pae, 686, memtest86+, or the middle of a package name
        #[arg(long)]
        flavour: Option<String>,
        /// The disk.
        #[command(flatten)]
        disk: RootfsArgs,
    },
}

/// The options of a disk that is built.
#[derive(Args, Debug, Default)]
pub struct RootfsArgs {
    /// Build a disk with the whole system: systemd, network, ssh, apt
    #[arg(long, help_heading = "System on a disk")]
    pub rootfs: bool,
    /// Size of the disk, as in 4G; its file takes what is written [default: 8G]
    #[arg(long, value_name = "SIZE", value_parser = parse_disk_size, requires = "rootfs", help_heading = "System on a disk")]
    size: Option<u64>,
    /// How the disk lies in its file: raw or qcow2 [default: raw]
    #[arg(long, value_name = "FORMAT", value_parser = parse_disk_format, requires = "rootfs", help_heading = "System on a disk")]
    format: Option<ImageFormat>,
    /// Packages to install beyond the usual, as in gcc,libc6-dev
    #[arg(
        long,
        value_name = "PACKAGE,…",
        value_delimiter = ',',
        requires = "rootfs",
        help_heading = "System on a disk"
    )]
    include: Vec<String>,
    /// A public key that may log in by ssh as root; again for more [default: those in ~/.ssh]
    #[arg(long = "ssh-key", value_name = "FILE", value_hint = ValueHint::FilePath, requires = "rootfs", help_heading = "System on a disk")]
    ssh_keys: Vec<PathBuf>,
    /// Build it again if it is there; what guests wrote to the old disk is lost
    #[arg(long, requires = "rootfs", help_heading = "System on a disk")]
    anew: bool,
}

impl RootfsArgs {
    /// What is to be built.
    #[must_use]
    pub fn into_options(self) -> RootfsOptions {
        let default = RootfsOptions::default();
        RootfsOptions {
            size_bytes: self.size.unwrap_or(default.size_bytes),
            format: self.format.unwrap_or(default.format),
            include: self.include,
            ssh_keys: self.ssh_keys,
            anew: self.anew,
        }
    }
}

/// The options that describe a machine.
#[derive(Args, Debug, Default)]
pub struct MachineArgs {
    /// Kernel: bzImage, ELF (PVH or plain), or multiboot
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Guest")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; multiboot modules as 'FILE ARGS,FILE ARGS'
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Guest")]
    initrd: Option<String>,
    /// Kernel command line
    #[arg(long, value_name = "STRING", allow_hyphen_values = true, help_heading = "Guest")]
    append: Option<String>,
    /// A disk: an image file or block device, and ,ro ,format=raw|qcow2 ,snapshot=on ,serial=S ,queues=N ,if=virtio|ahci; again for more
    #[arg(long = "disk", value_name = "FILE[,OPTION…]", value_parser = parse_disk, help_heading = "Guest")]
    disks: Vec<DiskSpec>,
    /// A CD-ROM with this image in it, on the AHCI controller; again for more
    #[arg(long = "cdrom", value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Guest")]
    cdroms: Vec<PathBuf>,
    /// What the guest writes to disks goes to temporary files and is lost at the end
    #[arg(long, help_heading = "Guest")]
    snapshot: bool,
    /// A directory of this host in the guest, mounted there by its tag [default: share0 …] with -t virtiofs; again for more
    #[arg(long = "share", value_name = "DIR[:TAG][:ro]", value_parser = parse_share, help_heading = "Guest")]
    shares: Vec<ShareSpec>,
    /// A directory of this host as the guest's root file system; with :ro its changes are in guest memory
    #[arg(long, value_name = "DIR[:ro]", value_parser = parse_root, conflicts_with_all = ["kernel", "initrd"], help_heading = "Guest")]
    root: Option<ShareSpec>,
    /// A network card: user (needs no rights), tap=NAME, socket=PATH or none; and ,mac=M ,model=e1000 and switches (docs/guide/network.md); user has ,forward=tcp:2222:22 ,loopback=off ,restrict=on [default: none]
    #[arg(long = "net", value_name = "KIND[,OPTION…]", value_parser = parse_net, help_heading = "Guest")]
    nets: Vec<NetSpec>,
    /// A port of this host that leads to one of the guest, as in tcp:2222:22; --net user is assumed
    #[arg(long = "forward", value_name = "PROTOCOL:[ADDRESS:]PORT:PORT", value_parser = parse_forward, help_heading = "Guest")]
    forwards: Vec<Forward>,
    /// Guest memory, as in 512M or 2G; a number alone is MiB [default: 512M]
    #[arg(long, short = 'm', value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true, help_heading = "Machine")]
    memory: Option<u64>,
    /// Number of CPUs, 1 to 16 [default: 1]
    #[arg(long, value_name = "N", value_parser = parse_cpus, allow_hyphen_values = true, help_heading = "Machine")]
    cpus: Option<u32>,
    /// CPU model: max, host, x86-64-v1 … v4, and features as in max,-avx512f; help lists them [default: max]
    #[arg(long, value_name = "MODEL[,+F,-F]", value_parser = parse_cpu, help_heading = "Machine")]
    cpu: Option<String>,
    /// What executes guest instructions, by name: the precise way of --virtual-exec [default: auto]
    #[arg(long, help_heading = "Machine", conflicts_with = "virtual_exec")]
    engine: Option<EngineChoice>,
    /// The technique (monitor.virtual_exec): software takes bt, hardware KVM with VT-x or AMD-V behind it [default: automatic]
    #[arg(long, help_heading = "Machine")]
    virtual_exec: Option<VirtualExec>,
    /// What translates guest addresses: software, or nested paging, which KVM alone has [default: auto]
    #[arg(long, visible_alias = "virtual-mmu", help_heading = "Machine")]
    mmu: Option<MmuChoice>,
    /// Guest time: the host's, or counted instructions, which is reproducible [default: host]
    #[arg(long, help_heading = "Machine")]
    clock: Option<ClockChoice>,
    /// The first serial port: stdio, file:FILE, none [default: stdio]
    #[arg(long, value_name = "TARGET", value_parser = parse_char_target, help_heading = "Devices")]
    serial: Option<CharTarget>,
    /// VGA text mode in the terminal [default: none]
    #[arg(long, help_heading = "Devices")]
    vga: Option<VgaChoice>,
    /// The debug console (ports 0x402 and 0xe9): stdio, file:FILE, none [default: none]
    #[arg(long, value_name = "TARGET", value_parser = parse_char_target, help_heading = "Devices")]
    debugcon: Option<CharTarget>,
    /// A write of v to port 0xf4 ends with status (v << 1) | 1
    #[arg(long, help_heading = "Devices")]
    isa_debug_exit: bool,
    /// A reset of the guest ends the run
    #[arg(long, help_heading = "Run")]
    no_reboot: bool,
    /// What the machine is called for `trellis stat`, `quit` and others [default: vm-PID]
    #[arg(long, value_parser = control::parse_name, help_heading = "Run")]
    name: Option<String>,
    /// Where its control socket is: a path, or none [default: in $XDG_RUNTIME_DIR/trellis]
    #[arg(long, value_name = "PATH", value_parser = control::parse_target, help_heading = "Run")]
    control: Option<ControlTarget>,
    /// Serve statistics to Prometheus, over HTTP at /metrics; a port alone is one of 127.0.0.1
    #[arg(long, value_name = "ADDR:PORT", value_parser = metrics::parse_address, allow_hyphen_values = true, help_heading = "Run")]
    metrics: Option<SocketAddr>,
    /// End after so many seconds, with status 124
    #[arg(long, value_name = "SECONDS", value_parser = parse_timeout, allow_hyphen_values = true, help_heading = "Run")]
    timeout: Option<f64>,
    /// Let gdb attach: at a port, HOST:PORT or a path [default with --gdb alone: 127.0.0.1:1234]
    #[arg(long, short = 's', value_name = "WHERE", value_parser = gdb::parse_target, num_args = 0..=1,
          require_equals = true, default_missing_value = "", help_heading = "Run")]
    gdb: Option<GdbTarget>,
    /// Stop before the first instruction until gdb has attached; --gdb without it is assumed
    #[arg(long, short = 'S', help_heading = "Run")]
    gdb_wait: bool,
    /// Say at the end where the time went; with =FILE as JSON
    #[arg(long, value_name = "FILE", value_parser = parse_stats, num_args = 0..=1, require_equals = true,
          default_missing_value = "-", help_heading = "Run")]
    stats: Option<StatsTarget>,
    /// Smaller devices.
    #[command(flatten)]
    extras: ExtraFlags,
    /// What looks inside.
    #[command(flatten)]
    inside: InsideFlags,
    /// Save and restore the whole machine whenever the guest asks for it
    #[arg(long, hide = true)]
    save_at_marker: bool,
}

impl MachineArgs {
    /// The options as [`VmFlags`].
    #[must_use]
    pub fn into_flags(self, image: Option<String>) -> VmFlags {
        VmFlags {
            image,
            kernel: self.kernel,
            initrd: self.initrd,
            append: self.append,
            disks: self.disks.into_iter().chain(self.cdroms.into_iter().map(DiskSpec::cdrom)).collect(),
            snapshot: self.snapshot,
            shares: self.shares,
            root: self.root,
            net: NetFlags { nets: self.nets, forwards: self.forwards },
            memory_bytes: self.memory,
            cpus: self.cpus,
            cpu: self.cpu,
            engine: self.engine.or(self.virtual_exec.map(VirtualExec::into)),
            mmu: self.mmu,
            serial: self.serial,
            vga: self.vga,
            debugcon: self.debugcon,
            isa_debug_exit: self.isa_debug_exit,
            no_reboot: self.no_reboot,
            timeout_seconds: self.timeout,
            name: self.name,
            control: self.control,
            metrics: self.metrics,
            gdb: self.gdb,
            gdb_wait: self.gdb_wait,
            stats: self.stats,
            extras: self.extras,
            inside: self.inside,
            clock: self.clock,
            save_at_marker: self.save_at_marker,
        }
    }
}

/// Writes the completion script for `shell`.
pub fn completions(shell: clap_complete::Shell, output: &mut dyn std::io::Write) {
    clap_complete::generate(shell, &mut Cli::command(), "trellis", output);
}

/// Writes the manual page to `output`, or those of all subcommands into a directory.
///
/// # Errors
/// The output cannot be written.
pub fn man(directory: Option<&std::path::Path>, output: &mut dyn std::io::Write) -> std::io::Result<()> {
    match directory {
        Some(directory) => std::fs::create_dir_all(directory)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), directory)),
        None => clap_mangen::Man::new(Cli::command()).render(output),
    }
}

/// The command whose usage clap shows: `trellis image fetch`, say.
fn command_of(rendered: &str) -> String {
    let usage = rendered.lines().find_map(|line| line.trim().strip_prefix("Usage: ")).unwrap_or("trellis");
    let is_word = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase());
    usage.split(' ').take_while(is_word).collect::<Vec<_>>().join(" ")
}

/// A clap error as one line: what is wrong, the nearest that is right, where the help is.
#[must_use]
pub fn one_line(error: &clap::Error) -> String {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        // The best stands last.
        Some(ContextValue::Strings(texts)) if kind != ContextKind::InvalidArg => texts.last().cloned(),
        Some(ContextValue::Strings(texts)) if !texts.is_empty() => Some(texts.join(", ")),
        _ => None,
    };
    let source = std::error::Error::source(error).map(ToString::to_string);
    if let (ErrorKind::ValueValidation, Some(reason)) = (error.kind(), source) {
        let option = context(ContextKind::InvalidArg).unwrap_or_default();
        return format!("{}: {reason}", option.split(' ').next().unwrap_or_default());
    }
    let rendered = error.render().to_string();
    let first: Vec<&str> = rendered.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    let mut line = first.join(" ").trim_start_matches("error: ").to_owned();
    let nearest = [ContextKind::SuggestedArg, ContextKind::SuggestedValue, ContextKind::SuggestedSubcommand];
    match nearest.into_iter().find_map(context) {
        Some(name) => line.push_str(&format!("; did you mean '{name}'?")),
        None => line.push_str(&format!("; see {} --help", command_of(&rendered))),
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(arguments: &[&str]) -> String {
        let all = std::iter::once("trellis").chain(arguments.iter().copied());
        one_line(&Cli::try_parse_from(all).unwrap_err())
    }

    #[test]
    fn command_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_error_is_one_line_with_advice() {
        let cases: &[(&[&str], &str)] = &[
            (&["boot", "--memroy", "1G"], "--memory"),
            (&["bot"], "did you mean 'boot'"),
            (&["boot", "--engine", "interpp"], "did you mean 'interp'"),
            (&["boot", "--memory", "0"], "too little"),
            (&["boot", "--memory", "1B"], "too little"),
            (&["boot", "--cpus", "1000"], "from 1 to 16"),
            (&["boot", "--cpus", "-1"], "from 1 to 16"),
            (&["boot", "--cpu", "hots"], "did you mean 'host'"),
            (&["boot", "--serial", "stido"], "did you mean 'stdio'"),
            (&["boot", "--timeout", "x"], "seconds"),
            (&["boot", "--metrics", "x"], "127.0.0.1:9100"),
            (&["boot", "--metrics", "1.2.3.4:99999"], "127.0.0.1:9100"),
            (&["top", "--delay", "0"], "seconds"),
            (&["top", "-n", "0"], "1 or more"),
            (&["top", "-d", "-1"], "0.1 to 3600"),
            (&["boot", "debian", "contract"], "contract"),
            (&["run"], "VM.toml"),
            (&["exec"], "see trellis exec --help"),
            (&["exec", "--wr", "."], "see trellis exec --help"),
            (&["image", "fetch"], "see trellis image fetch --help"),
            (&["boot", "--balloon=4K"], "at least 2M"),
            (&["boot", "--vsock", "cid=2,socket=s"], "cid=3 to"),
            (&["boot", "--rtc", "utcc"], "did you mean 'utc'"),
            (&["boot", "--shutdown-grace", "-1"], "from 0 to 86400"),
            (&["balloon", "--size", "-1"], "512M"),
            (&["image", "fetch", "debian", "--arch", "amd46"], "amd64"),
        ];
        for (arguments, expected) in cases {
            let line = error_of(arguments);
            assert!(line.contains(expected) && !line.contains('\n'), "{arguments:?}: {line}");
        }
    }

    #[test]
    fn stats_takes_its_file_only_with_an_equals_sign() {
        let stats = |arguments: &[&str]| match Cli::try_parse_from(arguments).unwrap().command {
            Command::Boot { machine, image } => (machine.stats, image),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            stats(&["trellis", "boot", "--stats", "contract"]),
            (Some(StatsTarget::Print), Some("contract".into()))
        );
        assert_eq!(stats(&["trellis", "boot", "--stats=a.json"]).0, Some(StatsTarget::File("a.json".into())));
    }

    #[test]
    fn command_of_exec_begins_with_its_first_word() {
        for line in [
            &["exec", "--rw", ".", "--", "make", "-j2", "--rw"][..],
            &["exec", "--rw", ".", "make", "-j2", "--rw"],
        ] {
            let all = std::iter::once("trellis").chain(line.iter().copied());
            let Command::Exec { exec } = Cli::try_parse_from(all).unwrap().command else {
                panic!("{line:?}")
            };
            assert_eq!(exec.command(), ["make", "-j2", "--rw"], "{line:?}");
        }
    }

    #[test]
    fn completions_and_man_know_boot() {
        let (mut script, mut page) = (Vec::new(), Vec::new());
        completions(clap_complete::Shell::Bash, &mut script);
        man(None, &mut page).unwrap();
        assert!(String::from_utf8_lossy(&script).contains("boot"));
        assert!(String::from_utf8_lossy(&page).contains("boot"));
    }
}
