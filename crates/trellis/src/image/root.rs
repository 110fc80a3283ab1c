//! An initramfs whose `/init` takes a directory of the host, shared by virtio-fs, as root file system: the image's own one with a
//! second archive behind it, whose files replace those of the first (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::path::Path;

use super::cpio::Archive;

/// The name under which the root is shared.
pub const TAG: &str = "trellis.root";
const INIT: &[u8] = include_bytes!("root.sh");

/// What is to happen with the root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootPlan {
    /// What is written goes to the guest's memory.
    pub overlay: bool,
    /// Name of the guest, if it gets one.
    pub hostname: String,
    /// The first program, with its arguments: words without blanks.
    pub program: String,
    /// Shares to mount: tag, directory in the root, and whether it may be written.
    pub mounts: Vec<(String, String, bool)>,
}

/// `text` as one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

impl RootPlan {
    /// The shell's variables and the function `extra`.
    fn conf(&self) -> String {
        let mut text = format!(
            "overlay={}\nhostname={}\nprogram={}\nextra() {{\n:\n",
            u8::from(self.overlay),
            quoted(&self.hostname),
            quoted(&self.program)
        );
        for (tag, directory, writable) in &self.mounts {
            let options = if *writable { "rw" } else { "ro" };
            let place = quoted(&format!("/new{directory}"));
            text += &format!(
                "mkdir -p {place} 2>/dev/null\nshare {tag} {place} {options} || fail \"cannot mount a directory\"\n"
            );
        }
        text + "}\n"
    }

    /// `initrd`, then what replaces parts of it.
    #[must_use]
    pub fn initramfs(&self, initrd: &[u8]) -> Vec<u8> {
        let mut archive = Archive::new();
        archive.file("init", 0o755, INIT);
        archive.file("trellis.conf", 0o644, self.conf().as_bytes());
        let mut whole = initrd.to_vec();
        whole.resize(whole.len().next_multiple_of(4), 0);
        whole.extend(archive.finish());
        whole
    }
}

/// Whether an initramfs of ours has a module.
#[must_use]
pub fn has_module(initrd: &[u8], name: &str) -> bool {
    let file = format!("/{name}.ko\0");
    initrd.windows(file.len()).any(|window| window == file.as_bytes())
}

/// The guest's first program for a root of the user's: what he names, else what systems have.
#[must_use]
pub fn first_program(root: &Path) -> Option<&'static str> {
    let there = |path: &&&str| root.join(path.trim_start_matches('/')).symlink_metadata().is_ok();
    ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"].iter().find(there).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conf_quotes_what_the_user_chose() {
        let plan = RootPlan {
            overlay: true,
            hostname: "it's".to_owned(),
            program: "/bin/sh".to_owned(),
            mounts: vec![("rw0".to_owned(), "/a b/$(x)".to_owned(), true)],
        };
        let conf = plan.conf();
        assert!(conf.contains("hostname='it'\\''s'\n") && conf.contains("'/new/a b/$(x)'"), "{conf}");
        let whole = plan.initramfs(b"abc");
        assert!(whole.starts_with(b"abc\x000707010000"), "the second archive begins at a multiple of four");
        assert!(String::from_utf8_lossy(&whole).contains("switch_root"));
    }

    #[test]
    fn modules_are_found_by_their_file() {
        assert!(has_module(b"x/lib/modules/6.1/overlay.ko\0\0", "overlay"));
        assert!(!has_module(b"x/lib/modules/6.1/myoverlay.ko\0", "overlay"));
    }

    #[test]
    fn first_program_is_one_that_is_there() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(first_program(directory.path()), None);
        std::fs::create_dir(directory.path().join("bin")).unwrap();
        std::fs::write(directory.path().join("bin/sh"), b"").unwrap();
        assert_eq!(first_program(directory.path()), Some("/bin/sh"));
    }
}
