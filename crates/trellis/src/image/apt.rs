//! apt with a private state: an ordinary user refreshes package lists and downloads packages without touching the
//! machine's own lists, cache, locks or installed packages.
//!
//! Only the *sources*, keys, proxies and preferences are the machine's (`/etc/apt`). Everything that apt writes lives below
//! one directory of ours. Hooks of the machine's configuration are cleared: they are meant for the machine's state.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use super::Progress;
use super::error::{ImageError, IoContext as _};
use super::spec::{Arch, Distribution, os_release, os_release_value};

/// Where packages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sources {
    /// The sources that this machine's apt is set up with.
    Host,
    /// One archive, named by the user.
    Mirror {
        /// `http://…`, `https://…` or `file:…`.
        url: String,
        /// The suite (`bookworm`); `None` takes the codename of this machine.
        suite: Option<String>,
    },
}

impl Sources {
    /// Whose packages these are: a mirror tells by its address, if it does.
    #[must_use]
    pub fn distribution(&self) -> Distribution {
        match self {
            Self::Mirror { url, .. } if url.contains("ubuntu") => Distribution::Ubuntu,
            Self::Mirror { url, .. } if url.contains("debian") => Distribution::Debian,
            _ => Distribution::of_host(),
        }
    }
}

/// What apt knows about the candidate version of a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Name.
    pub name: String,
    /// Candidate version.
    pub version: String,
    /// `Depends`, each as its alternatives, without version restrictions.
    pub depends: Vec<Vec<String>>,
}

/// apt, run on a private state.
#[derive(Debug)]
pub struct Apt {
    root: PathBuf,
    arch: Arch,
    /// What `update` complained about; reported if a package is then not found.
    complaints: Vec<String>,
}

impl Apt {
    /// Lays the private state below `root`.
    ///
    /// # Errors
    /// apt is not installed, or `root` cannot be written.
    pub fn new(root: &Path, arch: Arch, sources: &Sources) -> Result<Self, ImageError> {
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            if !is_installed(program) {
                return Err(ImageError::NoProgram { program });
            }
        }
        for directory in ["lists/partial", "cache/archives/partial", "log"] {
            let path = root.join(directory);
            fs::create_dir_all(&path).at("creating", &path)?;
        }
        let write = |name: &str, text: &str| {
            let path = root.join(name);
            fs::write(&path, text).at("writing", &path)
        };
        write("status", "")?;
        let mut configuration = configuration(root, arch);
        if let Sources::Mirror { url, suite } = sources {
            write("sources.list", &mirror_line(url, suite.as_deref(), &os_release())?)?;
            configuration.push_str(&format!(
                "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"/dev/null\";\n",
                root.join("sources.list").display()
            ));
        }
        write("apt.conf", &configuration)?;
        Ok(Self { root: root.to_owned(), arch, complaints: Vec::new() })
    }

    /// Refreshes the package lists. A source that fails is remembered, not fatal: the others may have what is wanted.
    ///
    /// # Errors
    /// apt cannot be started.
    pub fn update(&mut self, progress: &Progress) -> Result<(), ImageError> {
        let mut command = self.command("apt-get");
        command.args(["update", "-o", "APT::Status-Fd=1"]);
        let (status, complaints) = run_with_progress(command, "apt-get", progress)?;
        self.complaints = complaints;
        if !status.success() && self.complaints.is_empty() {
            self.complaints.push(format!("apt-get update: {status}"));
        }
        Ok(())
    }

    /// The candidate version of `name`, or `None` if no source has it.
    ///
    /// # Errors
    /// apt cannot be started.
    pub fn show(&self, name: &str) -> Result<Option<Package>, ImageError> {
        let mut command = self.command("apt-cache");
        command.args(["show", "--no-all-versions", name]);
        let output = command.output().at("running", Path::new("apt-cache"))?;
        Ok(parse_record(name, &String::from_utf8_lossy(&output.stdout)))
    }

    /// The first of `names` that a source has.
    ///
    /// # Errors
    /// None of them; the message tells a dead network from an unknown package.
    pub fn first_of(&self, names: &[String]) -> Result<Package, ImageError> {
        for name in names {
            if let Some(package) = self.show(name)? {
                return Ok(package);
            }
        }
        Err(self.not_found(names))
    }

    /// Downloads `package` into `directory` and returns its file.
    ///
    /// # Errors
    /// Network and disk.
    pub fn download(
        &self,
        package: &Package,
        directory: &Path,
        progress: &Progress,
    ) -> Result<PathBuf, ImageError> {
        let target = directory.join(&package.name);
        fs::create_dir_all(&target).at("creating", &target)?;
        let mut command = self.command("apt-get");
        command
            .args(["download", "-o", "APT::Status-Fd=1"])
            .arg(format!("{}={}", package.name, package.version));
        command.current_dir(&target);
        let (status, complaints) = run_with_progress(command, "apt-get", progress)?;
        let mut entries =
            fs::read_dir(&target).at("reading", &target)?.filter_map(Result::ok).map(|entry| entry.path());
        match entries.find(|path| path.extension().is_some_and(|extension| extension == "deb")) {
            Some(file) if status.success() => Ok(file),
            _ if is_network_trouble(&complaints) => {
                Err(ImageError::NoNetwork { detail: first_line(&complaints) })
            }
            _ => Err(ImageError::Tool {
                program: "apt-get download",
                status: status.to_string(),
                detail: first_line(&complaints),
            }),
        }
    }

    /// The archives that the lists are of, a line each in `format` (`apt-get indextargets`, sources.list(5)).
    ///
    /// # Errors
    /// apt cannot be started.
    pub fn index_targets(&self, format: &str) -> Result<String, ImageError> {
        let mut command = self.command("apt-get");
        command.args(["indextargets", "--format", format, "Created-By: Packages"]);
        let output = command.output().at("running", Path::new("apt-get"))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Why there is no archive of `distribution` among the sources.
    #[must_use]
    pub fn no_archive(&self, distribution: &str) -> ImageError {
        self.not_found(&[format!("the archive of {distribution}")])
    }

    fn not_found(&self, names: &[String]) -> ImageError {
        if is_network_trouble(&self.complaints) {
            return ImageError::NoNetwork { detail: first_line(&self.complaints) };
        }
        let detail = match self.complaints.first() {
            Some(_) => format!(" ({})", first_line(&self.complaints)),
            None => String::new(),
        };
        ImageError::NoPackage { wanted: names.join(" or "), arch: self.arch.name(), detail }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(self.root.join("apt.conf"))
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command.stdin(Stdio::null());
        command
    }
}

/// Unpacks a package file without installing it.
///
/// # Errors
/// dpkg-deb cannot be started, or fails.
pub fn unpack(package: &Path, directory: &Path) -> Result<(), ImageError> {
    let output = Command::new("dpkg-deb")
        .arg("-x")
        .arg(package)
        .arg(directory)
        .output()
        .at("running", Path::new("dpkg-deb"))?;
    if output.status.success() {
        return Ok(());
    }
    let lines: Vec<String> = String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect();
    Err(ImageError::Tool {
        program: "dpkg-deb",
        status: output.status.to_string(),
        detail: first_line(&lines),
    })
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// The text of our apt.conf (apt.conf(5)); read after the machine's own, so it wins.
fn configuration(root: &Path, arch: Arch) -> String {
    let root = root.display();
    let hooks = [
        "APT::Update::Pre-Invoke",
        "APT::Update::Post-Invoke",
        "APT::Update::Post-Invoke-Success",
        "DPkg::Post-Invoke",
    ];
    let mut text: String = hooks.iter().map(|hook| format!("#clear {hook};\n")).collect();
    text.push_str(&format!(
        r#"#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages {{ MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages"; flatMetaKey "Packages"; ShortDescription "Packages"; Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages"; flatDescription "$(RELEASE) Packages"; }};
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
APT::Architecture "{arch}";
#clear APT::Architectures;
APT::Architectures {{ "{arch}"; }};
APT::Sandbox::User "";
Debug::NoLocking "1";
Dir::State "{root}";
Dir::State::lists "{root}/lists";
Dir::State::status "{root}/status";
Dir::State::extended_states "{root}/extended_states";
Dir::Cache "{root}/cache";
Dir::Cache::archives "{root}/cache/archives";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Log "{root}/log";
"#
    ));
    text
}

/// The one line of a private sources.list.
fn mirror_line(url: &str, suite: Option<&str>, os_release: &str) -> Result<String, ImageError> {
    let schemes = ["http://", "https://", "file:", "copy:", "ftp://"];
    if !schemes.iter().any(|scheme| url.starts_with(scheme)) || url.contains(char::is_whitespace) {
        return Err(ImageError::Unknown(format!(
            "'{url}' is no mirror; give a URL as in --mirror http://mirror.example/debian"
        )));
    }
    let codename = os_release_value(os_release, "VERSION_CODENAME")
        .or_else(|| os_release_value(os_release, "UBUNTU_CODENAME"));
    let suite = suite
        .map(str::to_owned)
        .or(codename)
        .filter(|suite| !suite.is_empty() && !suite.contains(char::is_whitespace));
    let Some(suite) = suite else {
        return Err(ImageError::Unknown("--mirror needs a suite here, as in --suite bookworm".to_owned()));
    };
    Ok(format!("deb {}{url} {suite} main\n", signed_by()))
}

/// The option of a line of sources.list that names the distributions' own keys, as far as this host has them.
pub(super) fn signed_by() -> String {
    let keyrings =
        ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/ubuntu-archive-keyring.gpg"];
    let present: Vec<&str> = keyrings.into_iter().filter(|path| Path::new(path).is_file()).collect();
    if present.is_empty() { String::new() } else { format!("[signed-by={}] ", present.join(",")) }
}

/// Parses the first paragraph of `apt-cache show` (deb822).
fn parse_record(name: &str, text: &str) -> Option<Package> {
    let paragraph = text.split("\n\n").find(|paragraph| !paragraph.trim().is_empty())?;
    let field = |key: &str| paragraph.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
    let depends = ["Pre-Depends", "Depends"].into_iter().filter_map(field).flat_map(|list| list.split(','));
    Some(Package {
        name: field("Package").unwrap_or(name).to_owned(),
        version: field("Version")?.trim().to_owned(),
        depends: depends.map(|one| one.split('|').filter_map(dependency_name).collect()).collect(),
    })
}

/// `linux-image-6.1 (= 6.1.1)` → `linux-image-6.1`.
fn dependency_name(text: &str) -> Option<String> {
    let word = text.split_whitespace().next()?;
    Some(word.split(':').next().unwrap_or(word).to_owned())
}

/// Runs apt, feeding its `dlstatus` lines to `progress`; returns its status and its `E:`, `W:` and `Err` lines.
fn run_with_progress(
    mut command: Command,
    program: &'static str,
    progress: &Progress,
) -> Result<(std::process::ExitStatus, Vec<String>), ImageError> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().at("running", Path::new(program))?;
    let mut stderr = child.stderr.take().expect("stderr is piped");
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        // A pipe that breaks ends the text; the exit status tells the rest.
        let _ = stderr.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let stdout = child.stdout.take().expect("stdout is piped");
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).at("reading from", Path::new(program))? > 0 {
        if let Some(percent) = download_percent(&String::from_utf8_lossy(&line)) {
            progress.percent(percent);
        }
        line.clear();
    }
    let status = child.wait().at("waiting for", Path::new(program))?;
    let text = errors.join().unwrap_or_default();
    let complaints =
        text.lines().filter(|line| line.starts_with("E: ") || line.starts_with("W: ")).map(str::to_owned);
    Ok((status, complaints.collect()))
}

/// The percentage of a `dlstatus:ITEM:PERCENT:TEXT` line (apt's README.progress-reporting).
fn download_percent(line: &str) -> Option<f64> {
    line.strip_prefix("dlstatus:")?.split(':').nth(1)?.parse().ok()
}

/// Whether apt's words speak of the network rather than of packages.
pub(super) fn is_network_trouble(complaints: &[String]) -> bool {
    const SIGNS: &[&str] = &[
        "Could not resolve",
        "Temporary failure resolving",
        "Could not connect",
        "Unable to connect",
        "Cannot initiate the connection",
        "connection timed out",
        "Connection timed out",
        "Connection failed",
        "Network is unreachable",
        "Could not handshake",
        "Something wicked happened",
    ];
    complaints.iter().any(|line| SIGNS.iter().any(|sign| line.contains(sign)))
}

/// The complaint to show: the first that names a cause, errors before warnings, without apt's prefix.
pub(super) fn first_line(complaints: &[String]) -> String {
    let specific = |line: &&String| line.contains("Failed to fetch") || line.contains("Could not");
    let chosen = complaints
        .iter()
        .find(specific)
        .or_else(|| complaints.iter().find(|line| line.starts_with("E: ")))
        .or(complaints.first());
    let text = chosen.map_or("no reason given", String::as_str);
    let text = text.trim_start_matches("E: ").trim_start_matches("W: ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_gives_version_and_alternatives() {
        let text = "Package: linux-image-x\nVersion: 6.1.1-1\nDepends: linux-image-6.1 (= 6.1.1-1) | linux-image-6.1-unsigned, kmod, initramfs-tools:any (>= 1)\nDescription: d\n more\n\nPackage: linux-image-x\nVersion: 5\n";
        let package = parse_record("linux-image-x", text).unwrap();
        assert_eq!(package.version, "6.1.1-1");
        assert_eq!(package.depends[0], ["linux-image-6.1", "linux-image-6.1-unsigned"]);
        assert_eq!(package.depends[2], ["initramfs-tools"]);
    }

    #[test]
    fn record_empty_is_none() {
        assert_eq!(parse_record("x", ""), None);
        assert_eq!(parse_record("x", "N: nothing\n"), None);
    }

    #[test]
    fn status_line_gives_percent() {
        assert_eq!(download_percent("dlstatus:7:90.1364:Retrieving file 7 of 9\n"), Some(90.1364));
        assert_eq!(download_percent("Get:1 http://x\n"), None);
        assert_eq!(download_percent("dlstatus:7:abc:x\n"), None);
    }

    #[test]
    fn network_trouble_is_told_from_a_missing_package() {
        let dead = ["W: Failed to fetch http://x/InRelease  Temporary failure resolving 'x'".to_owned()];
        assert!(is_network_trouble(&dead));
        assert!(first_line(&dead).starts_with("Failed to fetch http://x"));
        assert!(!is_network_trouble(&["E: The repository 'x' is not signed.".to_owned()]));
    }

    #[test]
    fn mirror_line_takes_the_codename() {
        let line = mirror_line("http://m/debian", None, "VERSION_CODENAME=bookworm\n").unwrap();
        assert!(line.ends_with("http://m/debian bookworm main\n"), "{line}");
        assert!(mirror_line("m/debian", None, "").is_err());
        assert!(mirror_line("http://m/debian", None, "").unwrap_err().to_string().contains("--suite"));
    }
}
