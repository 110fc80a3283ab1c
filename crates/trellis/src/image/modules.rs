//! Kernel modules for the initramfs: finds them in an unpacked kernel package, closes over their dependencies, and
//! writes the `modules.dep` and `modules.alias` that modprobe reads.
//!
//! Kernel packages carry no `modules.dep` (depmod makes it at installation), so the dependencies are read where depmod
//! reads them: the NUL-separated `key=value` strings of each module's `.modinfo` section.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::error::{ImageError, IoContext as _};

/// Modules that are tried; one that a kernel has built in, or has not, is no fault.
pub const WANTED: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "ahci",
    "sd_mod",
    "sr_mod",
    "virtio_console",
    "virtio_rng",
    "virtio_net",
    "e1000",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "9pnet_virtio",
    "9p",
    "overlay",
    "ext4",
    "crc32c_generic",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "isofs",
    "loop",
    "button",
    "evdev",
    "i8042",
    "atkbd",
];

/// One module, decompressed.
#[derive(Debug)]
pub struct Module {
    /// Name with underscores, as the kernel shows it.
    pub name: String,
    /// The ELF file, decompressed.
    pub content: Vec<u8>,
    depends: Vec<String>,
    aliases: Vec<String>,
}

/// The modules of one initramfs, dependencies included.
#[derive(Debug, Default)]
pub struct ModuleSet {
    modules: BTreeMap<String, Module>,
}

impl ModuleSet {
    /// Reads `wanted` and everything they depend on from `directory` (`…/lib/modules/RELEASE`).
    ///
    /// # Errors
    /// A module file that is there but cannot be read or decompressed.
    pub fn collect(directory: &Path, wanted: &[&str]) -> Result<Self, ImageError> {
        let mut files = BTreeMap::new();
        index(directory, &mut files).at("reading", directory)?;
        let mut set = Self::default();
        let mut todo: Vec<String> = wanted.iter().map(|name| normal(name)).collect();
        while let Some(name) = todo.pop() {
            if set.modules.contains_key(&name) {
                continue;
            }
            let Some(path) = files.get(&name) else { continue };
            let content = read_module(path).at("decompressing", path)?;
            let module = Module::parse(name.clone(), content);
            todo.extend(module.depends.iter().cloned());
            set.modules.insert(name, module);
        }
        Ok(set)
    }

    /// The modules, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Module> {
        self.modules.values()
    }

    /// The text of `modules.dep`: each module with all it needs, to be loaded from the right to the left.
    #[must_use]
    pub fn modules_dep(&self) -> String {
        let mut text = String::new();
        for name in self.modules.keys() {
            let mut order = Vec::new();
            self.dependencies_first(name, &mut order);
            order.pop(); // the module itself
            text.push_str(&format!("{name}.ko:"));
            for dependency in order.iter().rev() {
                text.push_str(&format!(" {dependency}.ko"));
            }
            text.push('\n');
        }
        text
    }

    /// The text of `modules.alias`.
    #[must_use]
    pub fn modules_alias(&self) -> String {
        let lines =
            self.iter().flat_map(|module| module.aliases.iter().map(move |alias| (alias, &module.name)));
        lines.map(|(alias, name)| format!("alias {alias} {name}\n")).collect()
    }

    /// Appends `name` after everything that it depends on. `order` doubles as the visited set; the kernel allows no
    /// cycles, and a cycle in a broken package ends at the depth limit.
    fn dependencies_first(&self, name: &str, order: &mut Vec<String>) {
        self.visit(name, order, 0);
    }

    fn visit(&self, name: &str, order: &mut Vec<String>, depth: u32) {
        let Some(module) = self.modules.get(name) else { return };
        if depth > 32 || order.iter().any(|done| done == name) {
            return;
        }
        for dependency in &module.depends {
            self.visit(dependency, order, depth + 1);
        }
        order.push(name.to_owned());
    }
}

impl Module {
    fn parse(name: String, content: Vec<u8>) -> Self {
        let mut depends: Vec<String> = Vec::new();
        for list in modinfo(&content, b"depends=") {
            depends.extend(list.split(',').filter(|word| !word.is_empty()).map(normal));
        }
        for soft in modinfo(&content, b"softdep=") {
            let pre = soft.split_whitespace().skip_while(|word| *word != "pre:").skip(1);
            depends.extend(pre.take_while(|word| *word != "post:").map(normal));
        }
        let aliases = modinfo(&content, b"alias=");
        Self { name, content, depends, aliases }
    }
}

/// Module names are written with either sign; the kernel compares them with underscores.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// All values of `key` among the NUL-separated strings of `content`.
fn modinfo(content: &[u8], key: &[u8]) -> Vec<String> {
    let strings = content.split(|byte| *byte == 0);
    strings
        .filter_map(|string| string.strip_prefix(key))
        .map(|value| String::from_utf8_lossy(value).into_owned())
        .collect()
}

/// Maps normalized module names to their files below `directory`.
fn index(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            index(&entry.path(), files)?;
        } else if let Some((stem, rest)) = entry.file_name().to_string_lossy().split_once(".ko")
            && matches!(rest, "" | ".xz" | ".zst")
        {
            files.insert(normal(stem), entry.path());
        }
    }
    Ok(())
}

/// The content of a module file, decompressed according to its name.
fn read_module(path: &Path) -> io::Result<Vec<u8>> {
    let bytes = fs::read(path)?;
    let mut content = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => lzma_rs::xz_decompress(&mut bytes.as_slice(), &mut content)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{error:?}")))?,
        Some("zst") => {
            ruzstd::decoding::StreamingDecoder::new(bytes.as_slice())
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?
                .read_to_end(&mut content)?;
        }
        _ => content = bytes,
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory_with(modules: &[(&str, &[u8])]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in modules {
            fs::create_dir_all(directory.path().join("kernel/drivers")).unwrap();
            fs::write(directory.path().join("kernel/drivers").join(name), content).unwrap();
        }
        directory
    }

    #[test]
    fn collect_takes_dependencies_and_no_more() {
        let directory = directory_with(&[
            ("virtio-blk.ko", b"\x7fELF\0alias=virtio:d2v*\0depends=virtio,virtio_ring\0"),
            ("virtio.ko", b"\x7fELF\0depends=virtio_ring\0"),
            ("virtio_ring.ko", b"\x7fELF\0depends=\0"),
            ("other.ko", b"\x7fELF\0depends=\0"),
        ]);
        let set = ModuleSet::collect(directory.path(), &["virtio_blk", "not_there"]).unwrap();
        let names: Vec<_> = set.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["virtio", "virtio_blk", "virtio_ring"]);
        assert_eq!(set.modules_alias(), "alias virtio:d2v* virtio_blk\n");
    }

    #[test]
    fn modules_dep_loads_from_right_to_left() {
        let directory = directory_with(&[
            ("a.ko", b"\0depends=c,b\0"),
            ("b.ko", b"\0depends=c\0softdep=pre: d post: e\0"),
            ("c.ko", b"\0depends=\0"),
            ("d.ko", b"\0depends=\0"),
        ]);
        let set = ModuleSet::collect(directory.path(), &["a"]).unwrap();
        assert!(set.modules_dep().contains("a.ko: b.ko d.ko c.ko\n"), "{}", set.modules_dep());
    }

    #[test]
    fn dependency_cycle_ends() {
        let directory = directory_with(&[("a.ko", b"\0depends=b\0"), ("b.ko", b"\0depends=a\0")]);
        let set = ModuleSet::collect(directory.path(), &["a"]).unwrap();
        assert!(set.modules_dep().contains("a.ko:"));
    }

    #[test]
    fn xz_module_is_decompressed() {
        let mut packed = Vec::new();
        lzma_rs::xz_compress(&mut b"\x7fELF\0depends=\0".as_slice(), &mut packed).unwrap();
        let directory = directory_with(&[("a.ko.xz", &packed)]);
        let set = ModuleSet::collect(directory.path(), &["a"]).unwrap();
        assert_eq!(set.iter().next().unwrap().content, b"\x7fELF\0depends=\0");
    }
}
