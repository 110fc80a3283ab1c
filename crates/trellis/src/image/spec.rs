//! Which image: architecture and flavour, their spelling in names, and the packages to ask apt for.

use std::fmt;

use super::error::ImageError;
use crate::suggest;

/// Architecture of a guest system, in Debian's words.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// 64-bit.
    Amd64,
    /// 32-bit.
    I386,
}

impl Arch {
    /// Debian's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::I386 => "i386",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Whose packages the machine's apt fetches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// Debian and everything that names its kernels as Debian does.
    Debian,
    /// Ubuntu and its derivatives.
    Ubuntu,
}

impl Distribution {
    /// Reads it from the text of `/etc/os-release`.
    #[must_use]
    pub fn from_os_release(text: &str) -> Self {
        let ids = os_release_value(text, "ID").into_iter().chain(os_release_value(text, "ID_LIKE"));
        if ids
            .flat_map(|value| value.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            .any(|id| id == "ubuntu")
        {
            Self::Ubuntu
        } else {
            Self::Debian
        }
    }

    /// This host's.
    #[must_use]
    pub fn of_host() -> Self {
        Self::from_os_release(&os_release())
    }

    /// As it stands in the manifest.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian => "debian",
            Self::Ubuntu => "ubuntu",
        }
    }
}

/// The text of this host's os-release, empty where there is none.
#[must_use]
pub fn os_release() -> String {
    let paths = ["/etc/os-release", "/usr/lib/os-release"];
    paths.iter().find_map(|path| std::fs::read_to_string(path).ok()).unwrap_or_default()
}

/// The unquoted value of `key` in an os-release text (os-release(5)).
#[must_use]
pub fn os_release_value(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
    Some(line.trim().trim_matches(['"', '\'']).to_owned())
}

/// One image that can be fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// Architecture of the kernel.
    pub arch: Arch,
    /// `cloud`, `generic`, `rt`, `686-pae`, `686`, `memtest86+`, or the middle of a package name (`6.12-cloud`).
    pub flavour: String,
    /// With a disk that holds the whole system, not the kernel alone.
    pub rootfs: bool,
}

/// The flavours with a name of their own, and what `trellis image list` says about them.
const FLAVOURS: &[(Arch, &str, &str)] = &[
    (Arch::Amd64, "cloud", "small kernel for virtual machines (the default)"),
    (Arch::Amd64, "generic", "kernel for all machines, most drivers as modules"),
    (Arch::Amd64, "rt", "fully preemptible (PREEMPT_RT) kernel"),
    (Arch::Amd64, "memtest86+", "memory test, needs no operating system"),
    (Arch::I386, "686-pae", "32-bit kernel with PAE"),
    (Arch::I386, "686", "32-bit kernel without PAE"),
    (Arch::I386, "memtest86+", "memory test, 32-bit"),
];

/// What stands in the name of an image that has a disk.
const ROOTFS: &str = "rootfs";

/// The flavour of a memory tester, which has neither modules nor an initramfs.
pub const MEMTEST: &str = "memtest86+";

impl ImageSpec {
    /// The image that `trellis boot` takes by itself.
    #[must_use]
    pub fn default_debian() -> Self {
        Self { arch: Arch::Amd64, flavour: "cloud".to_owned(), rootfs: false }
    }

    /// From `--arch` and `--flavour`, each optional.
    ///
    /// # Errors
    /// A flavour that could not be part of a package name.
    pub fn from_options(arch: Option<Arch>, flavour: Option<&str>) -> Result<Self, ImageError> {
        let arch = arch.unwrap_or_else(|| default_arch(flavour));
        let flavour = flavour.unwrap_or(match arch {
            Arch::Amd64 => "cloud",
            Arch::I386 => "686-pae",
        });
        let spelled = !flavour.is_empty()
            && flavour.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b));
        let beginning = flavour.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !spelled || !beginning {
            return Err(ImageError::Unknown(format!(
                "'{flavour}' is no flavour of a kernel{}",
                suggestion(flavour)
            )));
        }
        if arch == Arch::I386 && flavour == "cloud" {
            return Err(ImageError::Unknown(
                "there is no cloud kernel for i386; use --flavour 686-pae".to_owned(),
            ));
        }
        Ok(Self { arch, flavour: flavour.to_owned(), rootfs: false })
    }

    /// From a name as `trellis image list` shows it (`debian-generic-amd64`), from `debian` alone, or from a known
    /// flavour without the architecture (`generic`, `debian-rootfs-generic`, `memtest86+`).
    ///
    /// # Errors
    /// Anything else, with the nearest name.
    pub fn from_name(name: &str) -> Result<Self, ImageError> {
        if name == "debian" {
            return Ok(Self::default_debian());
        }
        if let "rootfs" | "debian-rootfs" = name {
            return Self::default_debian().with_rootfs();
        }
        // Flavours that have a name here need no architecture beside it.
        let short = name.strip_prefix("debian-").unwrap_or(name);
        let (of_disk, flavour) = short.strip_prefix("rootfs-").map_or((false, short), |f| (true, f));
        if FLAVOURS.iter().any(|&(_, known, _)| known == flavour) {
            let spec = Self::from_options(None, Some(flavour))?;
            return if of_disk { spec.with_rootfs() } else { Ok(spec) };
        }
        let parts = name.strip_prefix("debian-").and_then(|rest| rest.rsplit_once('-'));
        let arch = match parts {
            Some((_, "amd64")) => Arch::Amd64,
            Some((_, "i386")) => Arch::I386,
            _ => return Err(ImageError::Unknown(format!("'{name}' is no image{}", name_suggestion(name)))),
        };
        match parts.and_then(|(flavour, _)| flavour.strip_prefix(ROOTFS)) {
            Some("") => Self::from_options(Some(arch), None)?.with_rootfs(),
            Some(flavour) if flavour.starts_with('-') => {
                Self::from_options(Some(arch), Some(&flavour[1..]))?.with_rootfs()
            }
            _ => Self::from_options(Some(arch), parts.map(|(flavour, _)| flavour)),
        }
    }

    /// The same with a disk that holds the whole system.
    ///
    /// # Errors
    /// What is no Linux for amd64.
    pub fn with_rootfs(self) -> Result<Self, ImageError> {
        if self.arch != Arch::Amd64 || !self.is_linux() {
            return Err(ImageError::Unknown(format!(
                "a system on a disk is made for amd64 with a Linux kernel, not for {}; drop --arch, or take another --flavour",
                self.name()
            )));
        }
        Ok(Self { rootfs: true, ..self })
    }

    /// The name of the image and of its directory.
    #[must_use]
    pub fn name(&self) -> String {
        match (self.rootfs, self.flavour.as_str()) {
            (false, flavour) => format!("debian-{flavour}-{}", self.arch),
            (true, "cloud") => format!("debian-{ROOTFS}-{}", self.arch),
            (true, flavour) => format!("debian-{ROOTFS}-{flavour}-{}", self.arch),
        }
    }

    /// Whether it is a Linux kernel, that is whether it wants an initramfs.
    #[must_use]
    pub fn is_linux(&self) -> bool {
        self.flavour != MEMTEST
    }

    /// The packages to look for, best first.
    #[must_use]
    pub fn packages(&self, distribution: Distribution) -> Vec<String> {
        let arch = self.arch.name();
        let names: Vec<String> = match (distribution, self.flavour.as_str()) {
            (_, MEMTEST) => vec![MEMTEST.to_owned()],
            (Distribution::Ubuntu, "cloud") => {
                ["kvm", "virtual", "generic"].map(|name| format!("linux-image-{name}")).to_vec()
            }
            (Distribution::Debian, "generic") => vec![format!("linux-image-{arch}")],
            (Distribution::Debian, "rt") if self.arch == Arch::I386 => {
                vec!["linux-image-rt-686-pae".to_owned()]
            }
            (_, flavour) => vec![format!("linux-image-{flavour}-{arch}"), format!("linux-image-{flavour}")],
        };
        names
    }

    /// All flavours with a name of their own, with a word on each.
    #[must_use]
    pub fn known() -> Vec<(Self, &'static str)> {
        FLAVOURS
            .iter()
            .map(|(arch, flavour, about)| {
                (Self { arch: *arch, flavour: (*flavour).to_owned(), rootfs: false }, *about)
            })
            .chain([(Self { rootfs: true, ..Self::default_debian() }, "a whole Debian system on a disk")])
            .collect()
    }
}

/// A flavour that exists for one architecture only implies it.
fn default_arch(flavour: Option<&str>) -> Arch {
    match flavour {
        Some(flavour) if flavour.ends_with("686") || flavour.ends_with("686-pae") => Arch::I386,
        _ => Arch::Amd64,
    }
}

/// `; did you mean …?` for a flavour, or the list of them.
pub fn suggestion(flavour: &str) -> String {
    let known = FLAVOURS.iter().map(|(_, name, _)| *name);
    suggest::did_you_mean(flavour, known).unwrap_or_else(|| "; `trellis image list` shows them".to_owned())
}

fn name_suggestion(name: &str) -> String {
    let names: Vec<String> = ImageSpec::known().iter().map(|(spec, _)| spec.name()).collect();
    let known = names.iter().map(String::as_str).chain(["debian", "contract"]);
    suggest::did_you_mean(name, known)
        .unwrap_or_else(|| "; use debian, contract, or a name of `trellis image list`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flavour_alone_is_a_name() {
        let name = |n| ImageSpec::from_name(n).map(|spec| spec.name());
        assert_eq!(name("memtest86+").unwrap(), "debian-memtest86+-amd64");
        assert_eq!(name("686-pae").unwrap(), "debian-686-pae-i386");
        assert_eq!(name("debian-rootfs").unwrap(), "debian-rootfs-amd64");
        assert_eq!(name("debian-rootfs-generic-amd64").unwrap(), "debian-rootfs-generic-amd64");
        assert_eq!(name("debian-rootfs-generic").unwrap(), "debian-rootfs-generic-amd64");
        assert_eq!(name("rootfs-rt").unwrap(), "debian-rootfs-rt-amd64");
        assert_eq!(name("debian-686-pae").unwrap(), "debian-686-pae-i386");
        assert!(name("debian-rootfs-686-pae").is_err() && name("debian-rootfs-amd46").is_err());
        assert!(
            name("debian-rootfs-686-pae-i386").is_err() && name("debian-rootfs-memtest86+-amd64").is_err()
        );
        assert!(name("686-pea").is_err());
    }

    #[test]
    fn name_round_trips() {
        for (spec, _) in ImageSpec::known() {
            assert_eq!(ImageSpec::from_name(&spec.name()).unwrap(), spec);
        }
        assert_eq!(ImageSpec::from_name("debian").unwrap().name(), "debian-cloud-amd64");
    }

    #[test]
    fn unknown_name_suggests_the_nearest() {
        let message = ImageSpec::from_name("debian-clud-amd46").unwrap_err().to_string();
        assert!(message.contains("debian-cloud-amd64"), "{message}");
        assert!(ImageSpec::from_name("debain").unwrap_err().to_string().contains("did you mean 'debian'"));
    }

    #[test]
    fn flavour_implies_architecture() {
        let spec = ImageSpec::from_options(None, Some("686-pae")).unwrap();
        assert_eq!(spec.arch, Arch::I386);
        assert_eq!(ImageSpec::from_options(Some(Arch::I386), None).unwrap().flavour, "686-pae");
        assert!(ImageSpec::from_options(Some(Arch::I386), Some("cloud")).is_err());
    }

    #[test]
    fn flavour_with_shell_characters_is_refused() {
        for flavour in ["", "-x", "a b", "../x", "a;b", "a=1"] {
            assert!(ImageSpec::from_options(None, Some(flavour)).is_err(), "{flavour}");
        }
    }

    #[test]
    fn packages_follow_the_distribution() {
        let cloud = ImageSpec::default_debian();
        assert_eq!(cloud.packages(Distribution::Debian)[0], "linux-image-cloud-amd64");
        assert_eq!(cloud.packages(Distribution::Ubuntu)[1], "linux-image-virtual");
        let generic = ImageSpec::from_options(None, Some("generic")).unwrap();
        assert_eq!(generic.packages(Distribution::Debian), ["linux-image-amd64"]);
    }

    #[test]
    fn os_release_tells_ubuntu_from_debian() {
        assert_eq!(Distribution::from_os_release("ID=debian\n"), Distribution::Debian);
        assert_eq!(Distribution::from_os_release("ID=ubuntu\nID_LIKE=debian\n"), Distribution::Ubuntu);
        assert_eq!(
            Distribution::from_os_release("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"),
            Distribution::Ubuntu
        );
        assert_eq!(Distribution::from_os_release("ID=fedora\n"), Distribution::Debian);
    }
}
