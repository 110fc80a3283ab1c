//! What the host's CPUID says: its identity, its features, its XSAVE layout and caches.

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::features::{Feature, FeatureSet, Register, TABLE};
use super::leaves::CpuidResult;

/// Whose conventions a processor follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Vendor {
    /// GenuineIntel.
    Intel,
    /// AuthenticAMD, and HygonGenuine, which follows it in all that matters here.
    Amd,
    /// Others; they follow Intel's conventions.
    Other,
}

/// A component of the XSAVE area, as CPUID 0DH subleaf `index` gives it (SDM 1 13.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct XsaveComponent {
    /// Bit in XCR0, 2 to 62.
    pub index: u8,
    /// Bytes.
    pub size: u32,
    /// Bytes from the start of the area in the standard format.
    pub offset: u32,
    /// Whether it begins at a multiple of 64 bytes in the compacted format.
    pub align64: bool,
}

/// The part of a model that is no feature: who the processor is and how its state and caches are laid out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// Twelve letters of leaf 0.
    pub vendor: [u8; 12],
    /// Family, model and stepping: EAX of leaf 1.
    pub signature: u32,
    /// The brand string, at most 47 bytes of ASCII.
    pub brand: String,
    /// Width of physical addresses, bits.
    pub phys_bits: u8,
    /// Components of the XSAVE area beyond x87 and SSE that the host has enabled, by index.
    pub xsave: Vec<XsaveComponent>,
    /// Cache descriptors in the form of leaf 4 and 8000001DH, without the counts of who shares them.
    pub caches: Vec<[u32; 4]>,
    /// Leaf 80000005H (AMD): L1 caches and TLBs.
    pub l1: [u32; 4],
    /// Leaf 80000006H: L2 and L3 caches and TLBs.
    pub l2: [u32; 4],
    /// Leaf 8000001AH EAX (AMD): width of the FP units.
    pub fp_hints: u32,
}

impl Identity {
    /// Whose conventions the processor follows.
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        match &self.vendor {
            b"GenuineIntel" => Vendor::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            _ => Vendor::Other,
        }
    }
}

/// What the host's operating system enabled of the processor's state (XCR0), which CPUID alone does not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OsState {
    /// YMM state.
    pub avx: bool,
    /// Opmask and ZMM state.
    pub avx512: bool,
}

/// The processor below us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Host {
    /// Who it is.
    pub identity: Identity,
    /// Every bit of [`TABLE`] that it announces and its operating system enabled.
    pub features: FeatureSet,
}

/// CPUID of `leaf`, `subleaf` where the host has that leaf.
type Reader<'a> = &'a dyn Fn(u32, u32) -> CpuidResult;

impl Host {
    /// This host, read once.
    #[must_use]
    pub fn get() -> &'static Self {
        static HOST: OnceLock<Host> = OnceLock::new();
        HOST.get_or_init(|| {
            let read = |leaf, subleaf| {
                let r = __cpuid_count(leaf, subleaf);
                CpuidResult { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
            };
            let os = OsState {
                avx: std::is_x86_feature_detected!("avx"),
                avx512: std::is_x86_feature_detected!("avx512f"),
            };
            Self::read(&read, os)
        })
    }

    /// A host from what its CPUID instruction returns and what its operating system enabled.
    #[must_use]
    pub fn read(cpuid: &dyn Fn(u32, u32) -> CpuidResult, os: OsState) -> Self {
        let max_basic = cpuid(0, 0).eax;
        let max_extended = cpuid(0x8000_0000, 0).eax;
        let read = |leaf: u32, subleaf: u32| {
            let max = if leaf >= 0x8000_0000 { max_extended } else { max_basic };
            if leaf <= max { cpuid(leaf, subleaf) } else { CpuidResult::default() }
        };
        let features = read_features(&read, os);
        let mut identity = Identity {
            vendor: vendor_letters(read(0, 0)),
            signature: read(1, 0).eax,
            brand: read_brand(&read),
            phys_bits: read_phys_bits(&read),
            xsave: read_xsave(&read, &features),
            caches: Vec::new(),
            l1: read(0x8000_0005, 0).words(),
            l2: read(0x8000_0006, 0).words(),
            fp_hints: read(0x8000_001a, 0).eax & 7,
        };
        identity.caches = read_caches(&read, if identity.vendor() == Vendor::Amd { 0x8000_001d } else { 4 });
        Self { identity, features }
    }
}

fn vendor_letters(leaf0: CpuidResult) -> [u8; 12] {
    let mut letters = [0; 12];
    for (chunk, word) in letters.chunks_exact_mut(4).zip([leaf0.ebx, leaf0.edx, leaf0.ecx]) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    letters
}

fn read_features(read: Reader<'_>, os: OsState) -> FeatureSet {
    let mut set = FeatureSet::new();
    // Hosts without leaf 7.1 return zeros for it, so subleaves need no bound of their own.
    for info in TABLE.iter().filter(|i| !(0x4000_0000..0x8000_0000).contains(&i.leaf)) {
        let result = read(info.leaf, info.subleaf);
        if result.register(info.register) >> info.bit & 1 != 0 {
            set.insert(info.feature);
        }
    }
    let osxsave = read(1, 0).register(Register::Ecx) >> 27 & 1 != 0;
    for (enabled, feature) in
        [(osxsave, Feature::Xsave), (os.avx, Feature::Avx), (os.avx512, Feature::Avx512f)]
    {
        if !enabled {
            set.remove(feature);
        }
    }
    set.close();
    set
}

fn read_brand(read: Reader<'_>) -> String {
    let bytes: Vec<u8> =
        (0x8000_0002..=0x8000_0004).flat_map(|l| read(l, 0).words()).flat_map(u32::to_le_bytes).collect();
    let text: String =
        bytes.iter().take_while(|&&b| b != 0).filter(|b| b.is_ascii()).map(|&b| char::from(b)).collect();
    text.trim().to_owned()
}

/// 36 bits where the host does not say (SDM 2A, leaf 80000008H).
fn read_phys_bits(read: Reader<'_>) -> u8 {
    match read(0x8000_0008, 0).eax.to_le_bytes()[0] {
        0 => 36,
        bits => bits,
    }
}

/// Components 2 to 7 (YMM, MPX, AVX-512) that belong to features of the host.
fn read_xsave(read: Reader<'_>, features: &FeatureSet) -> Vec<XsaveComponent> {
    let supported = read(0xd, 0).eax;
    let wanted = if features.has(Feature::Avx) { 1 << 2 } else { 0 }
        | if features.has(Feature::Avx512f) { 7 << 5 } else { 0 };
    (2..8u8)
        .filter(|i| supported & wanted >> i & 1 != 0)
        .map(|index| {
            let r = read(0xd, u32::from(index));
            XsaveComponent { index, size: r.eax, offset: r.ebx, align64: r.ecx & 2 != 0 }
        })
        .collect()
}

/// Cache descriptors without the fields that say who shares a cache (EAX bits 31 to 14).
fn read_caches(read: Reader<'_>, leaf: u32) -> Vec<[u32; 4]> {
    let caches: Vec<[u32; 4]> = (0..8)
        .map(|subleaf| read(leaf, subleaf).words())
        .take_while(|words| words[0] & 0x1f != 0)
        .map(|[eax, ebx, ecx, edx]| [eax & 0x3fff, ebx, ecx, edx])
        .collect();
    if caches.is_empty() { USUAL_CACHES.to_vec() } else { caches }
}

/// For hosts that hide theirs: L1D and L1I of 32 KiB in 8 ways, L2 of 1 MiB in 16, L3 of 16 MiB in 16; lines of 64.
const USUAL_CACHES: [[u32; 4]; 4] = [
    [0x121, 7 << 22 | 63, 63, 0],
    [0x122, 7 << 22 | 63, 63, 0],
    [0x143, 15 << 22 | 63, 1023, 0],
    [0x163, 15 << 22 | 63, 16383, 0],
];
