//! Guests of Trellis and of QEMU with iperf3 inside, and iperf3 on this host.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use trellis::image::cpio::Archive;
use trellis::image::programs::{self, BINARIES, LIBRARIES, LOADER, Programs};
use trellis::image::{self, Arch, ImageSpec, Progress};

use crate::Cli;
use crate::measure::{Case, Outcome, Plug};

const QEMU: &str = "qemu-system-x86_64";
/// The kernel that has drivers of both cards.
const FLAVOUR: &str = "generic";
/// How long a guest may take beyond the measurement: boot, on a busy host, by TCG.
const GRACE: u64 = 120;

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// This project.
    Trellis,
    /// QEMU's TCG.
    Qemu,
}

/// All that measurements need.
pub struct Bench {
    program: PathBuf,
    engine: String,
    seconds: u64,
    kernel: PathBuf,
    directory: tempfile::TempDir,
    port: u16,
    server: Child,
}

/// A machine that runs, whose output goes to a file.
struct Machine {
    child: Child,
    output: PathBuf,
    deadline: Instant,
}

impl Bench {
    /// Fetches what is missing, lays the initramfs, starts this host's iperf3.
    ///
    /// # Errors
    /// Nothing to fetch from, or no place for it.
    pub fn prepare(cli: &Cli, program: PathBuf) -> anyhow::Result<Self> {
        let spec = ImageSpec { arch: Arch::Amd64, flavour: FLAVOUR.to_owned(), rootfs: false };
        let image = image::ensure_module(&spec, "e1000", Progress::new)?;
        let iperf = programs::ensure(&programs::NETWORK, Progress::new)?;
        let directory = tempfile::TempDir::with_prefix("trellis-net-")?;
        let base = image.initrd.context("the image has no initramfs")?;
        let mut bytes = fs::read(&base).with_context(|| format!("reading {}", base.display()))?;
        // The kernel unpacks one archive after another.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(archive(&iperf)?);
        fs::write(directory.path().join("initrd"), bytes)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let own = &iperf.directory;
        // Files of the cache are no programs: the loader is made one here, and loads the rest.
        let loader = directory.path().join("loader");
        fs::copy(own.join(LOADER), &loader).context("copying the loader")?;
        fs::set_permissions(&loader, fs::Permissions::from_mode(0o755))?;
        let server = Command::new(loader)
            .arg("--library-path")
            .arg(own.join(LIBRARIES))
            .arg(own.join(BINARIES).join("iperf3"))
            .args(["-s", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("starting iperf3")?;
        let (engine, seconds) = (cli.engine.clone(), cli.seconds);
        Ok(Self { program, engine, seconds, kernel: image.kernel, directory, port, server })
    }

    /// Whether there is a QEMU.
    pub fn has_qemu(&self) -> bool {
        Command::new(QEMU).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    }

    /// Runs a case.
    ///
    /// # Errors
    /// The program does not start.
    pub fn measure(&self, case: &Case, by: Monitor) -> anyhow::Result<Outcome> {
        let client = format!("-t {} -i 0 {}", self.seconds, case.load.options());
        let text = match &case.plug {
            Plug::User => {
                let script = format!(
                    "ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2; \
                     iperf3 -c 10.0.2.2 -p {} {client}",
                    self.port
                );
                self.start(case, by, "user", &script, "a")?.finish()?
            }
            Plug::Tap(name, address) => {
                let guest = address.rsplit_once('.').map_or("", |(net, _)| net);
                let script = format!(
                    "ip addr add {guest}.77/24 dev eth0; iperf3 -c {address} -p {} {client}",
                    self.port
                );
                let net = match by {
                    Monitor::Trellis => format!("tap={name}"),
                    Monitor::Qemu => format!("tap,ifname={name},script=no,downscript=no"),
                };
                self.start(case, by, &net, &script, "a")?.finish()?
            }
            Plug::Link => {
                let path = self.directory.path().join("link");
                let _old = fs::remove_file(&path);
                let net = |server: bool| match by {
                    Monitor::Trellis => format!("socket={}", path.display()),
                    Monitor::Qemu => {
                        let server = if server { "on" } else { "off" };
                        format!("stream,addr.type=unix,addr.path={},server={server}", path.display())
                    }
                };
                let listens = "ip addr add 10.9.0.1/24 dev eth0; timeout 110 iperf3 -s -1 -i 0";
                let server = self.start(case, by, &net(true), listens, "b")?;
                let start = Instant::now();
                while !path.exists() && start.elapsed() < Duration::from_secs(20) {
                    std::thread::sleep(Duration::from_millis(50));
                }
                let connects = format!(
                    "ip addr add 10.9.0.2/24 dev eth0; \
                     for i in 1 2 3 4 5 6 7 8 9; do iperf3 -c 10.9.0.1 {client} && break; sleep 1; done"
                );
                let text = self.start(case, by, &net(false), &connects, "a")?.finish()?;
                server.finish()?;
                text
            }
        };
        Ok(Outcome::parse(&text))
    }

    fn start(
        &self,
        case: &Case,
        by: Monitor,
        net: &str,
        script: &str,
        name: &str,
    ) -> anyhow::Result<Machine> {
        let append = format!(
            "console=ttyS0 quiet panic=-1 trellis.run=\"ip link set lo up; ip link set eth0 up; {script}\""
        );
        let initrd = self.directory.path().join("initrd");
        let limit = self.seconds + GRACE;
        let mut command = match by {
            Monitor::Trellis => {
                let mut net = format!("{net},model={}", case.model);
                if !case.switches.is_empty() {
                    net = format!("{net},{}", case.switches);
                }
                let mut command = Command::new(&self.program);
                command.args([
                    "boot",
                    "--engine",
                    &self.engine,
                    "--stats",
                    "--memory",
                    "512M",
                    "--net",
                    &net,
                ]);
                command.args(["--timeout", &limit.to_string(), "--kernel"]);
                command.arg(&self.kernel).arg("--initrd").arg(&initrd).arg("--append");
                command
            }
            Monitor::Qemu => {
                let device = if case.model == "virtio" { "virtio-net-pci" } else { case.model };
                let mut command = Command::new(QEMU);
                command.args([
                    "-accel",
                    "tcg,thread=multi",
                    "-cpu",
                    "max",
                    "-m",
                    "512",
                    "-nographic",
                    "-no-reboot",
                ]);
                command.args(["-netdev", &format!("{net},id=n"), "-device", &format!("{device},netdev=n")]);
                command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&initrd).arg("-append");
                command
            }
        };
        let output = self.directory.path().join(name);
        let file = File::create(&output)?;
        command.arg(append).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        // A machine that does not end by its own time-out is ended.
        Ok(Machine { child, output, deadline: Instant::now() + Duration::from_secs(limit + 20) })
    }
}

impl Machine {
    /// Waits for its end; what it wrote.
    fn finish(mut self) -> anyhow::Result<String> {
        while self.child.try_wait()?.is_none() {
            if Instant::now() > self.deadline {
                eprintln!("net: a guest did not end in time");
                self.child.kill()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(String::from_utf8_lossy(&fs::read(&self.output)?).into_owned())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Gone already, unless the run was broken off.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// The archive behind the image's own: iperf3 and its libraries.
fn archive(iperf: &Programs) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["usr", BINARIES, "usr/lib", LIBRARIES, "usr/lib64"] {
        archive.directory(directory);
    }
    archive.symlink("lib64", "usr/lib64");
    for (path, content) in iperf.read()? {
        archive.file(&path, 0o755, &content);
    }
    Ok(archive.finish())
}
