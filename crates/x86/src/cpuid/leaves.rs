//! The CPUID instruction: every leaf of a model (SDM 2A "CPUID", APM 3 appendix E).
//!
//! Feature bits come from the table in `features`; this file adds what is no feature bit: identity, topology, caches,
//! sizes, frequencies. All vCPUs are single-threaded cores of one package, whose APIC IDs are 0 to `vcpus - 1`.

use super::features::{Feature, Register};
use super::host::{Vendor, XsaveComponent};
use super::model::CpuModel;
use crate::bits::cr4;

/// What CPUID returns.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[expect(missing_docs, reason = "the manual's names")]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl CpuidResult {
    /// EAX, EBX, ECX, EDX.
    #[must_use]
    pub const fn words(self) -> [u32; 4] {
        [self.eax, self.ebx, self.ecx, self.edx]
    }

    /// One of the four.
    #[must_use]
    pub const fn register(self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }
}

impl From<[u32; 4]> for CpuidResult {
    fn from([eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self { eax, ebx, ecx, edx }
    }
}

/// What CPUID depends on beside the model.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct CpuidContext {
    /// The vCPU's (x2)APIC ID.
    pub apic_id: u32,
    /// vCPUs of the machine, from 1.
    pub vcpus: u32,
    /// CR4 of the vCPU: OSXSAVE is mirrored in leaf 1.
    pub cr4: u64,
    /// XCR0 of the vCPU: leaf 0DH gives sizes by it.
    pub xcr0: u64,
    /// IA32_XSS of the vCPU.
    pub xss: u64,
    /// The guest's TSC frequency in Hz.
    pub tsc_hz: u64,
    /// Whether IA32_APIC_BASE enables the local APIC; leaf 1 hides it otherwise.
    pub apic_enabled: bool,
}

/// Frequency of the local APIC's timer before its divider, in Hz: the crystal clock of leaf 15H, which Linux takes for
/// the APIC's, and the bus clock of leaf 40000010H. The device must count at it.
pub const APIC_BUS_HZ: u64 = 1_000_000_000;

/// Whether a leaf is known to say the same whatever ECX is, on every model: programs that ask for it leave anything there.
#[must_use]
pub const fn ignores_subleaf(leaf: u32) -> bool {
    matches!(leaf, 0..=3 | 5 | 6 | EXTENDED..=0x8000_0008)
}

const KVM_BASE: u32 = 0x4000_0000;
const KVM_MAX: u32 = KVM_BASE + 0x10;
const EXTENDED: u32 = 0x8000_0000;

impl CpuModel {
    /// What the CPUID instruction returns with `leaf` in EAX and `subleaf` in ECX. Leaves beyond the last return what
    /// the vendor's processors do: zeros (AMD), or the last basic leaf's data (Intel; SDM 2A "CPUID").
    #[must_use]
    pub fn cpuid(&self, leaf: u32, subleaf: u32, ctx: &CpuidContext) -> CpuidResult {
        let hypervisor = self.has(Feature::Hypervisor);
        match leaf {
            0..=0xffff if leaf <= self.max_basic() => self.basic_leaf(leaf, subleaf, ctx),
            KVM_BASE..=0x4000_ffff if hypervisor => self.hypervisor_leaf(leaf, ctx),
            EXTENDED..=0x8000_ffff if leaf <= self.max_extended() => self.extended_leaf(leaf, subleaf, ctx),
            _ if self.vendor() == Vendor::Amd => CpuidResult::default(),
            _ => self.basic_leaf(self.max_basic(), subleaf, ctx),
        }
    }

    /// AMD's last basic leaf is 0DH; Intel's is 1FH, the V2 extended topology.
    fn max_basic(&self) -> u32 {
        if self.vendor() == Vendor::Amd { 0xd } else { 0x1f }
    }

    fn max_extended(&self) -> u32 {
        if self.vendor() == Vendor::Amd { 0x8000_0021 } else { 0x8000_0008 }
    }

    /// The feature bits of a register.
    fn bits(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.features
            .iter()
            .map(Feature::info)
            .filter(|i| i.leaf == leaf && i.subleaf == subleaf && i.register == register)
            .fold(0, |bits, i| bits | 1 << i.bit)
    }

    /// The feature bits of all four registers.
    fn feature_leaf(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx]
            .map(|r| self.bits(leaf, subleaf, r))
            .into()
    }

    fn basic_leaf(&self, leaf: u32, subleaf: u32, ctx: &CpuidContext) -> CpuidResult {
        let intel = self.vendor() != Vendor::Amd;
        match leaf {
            0 => self.vendor_leaf(self.max_basic()),
            1 => self.leaf_1(ctx),
            // "Use leaf 4" for caches, "use leaf 18H" for TLBs, 64-byte prefetch (SDM 2A table 3-12).
            2 if intel => [0x00fe_ff01, 0xf0, 0, 0].into(),
            4 if intel => self.cache_leaf(subleaf, ctx, true),
            // Smallest and largest monitor line 64 bytes; extensions, and interrupts break even if masked.
            5 if self.has(Feature::Monitor) => [64, 64, 3, 0].into(),
            6 => self.feature_leaf(6, 0),
            7 => self.leaf_7(subleaf),
            0xb => topology_leaf(subleaf, ctx),
            0x1f if intel => topology_leaf(subleaf, ctx),
            0xd => self.leaf_d(subleaf, ctx),
            0x15 if self.has(Feature::Invtsc) => leaf_15(ctx.tsc_hz),
            0x16 => leaf_16(ctx.tsc_hz),
            // No PMU (0AH), RDT (0FH, 10H), SGX (12H), PT (14H), TLB parameters (18H), key locker (19H).
            _ => CpuidResult::default(),
        }
    }

    /// A largest leaf and the vendor's letters, in EBX, EDX, ECX.
    fn vendor_leaf(&self, max: u32) -> CpuidResult {
        let v = &self.identity.vendor;
        let word = |i: usize| u32::from_le_bytes([v[i], v[i + 1], v[i + 2], v[i + 3]]);
        [max, word(0), word(8), word(4)].into()
    }

    /// Features of leaf 1's EDX as they are now: APIC follows IA32_APIC_BASE, HTT the number of vCPUs.
    fn edx_1(&self, ctx: &CpuidContext) -> u32 {
        let mut edx = self.bits(1, 0, Register::Edx);
        if !ctx.apic_enabled {
            edx &= !(1 << Feature::Apic.info().bit);
        }
        if ctx.vcpus <= 1 {
            edx &= !(1 << Feature::Ht.info().bit);
        }
        edx
    }

    fn leaf_1(&self, ctx: &CpuidContext) -> CpuidResult {
        const OSXSAVE: u32 = 1 << 27;
        let clflush_quadwords = if self.has(Feature::Clfsh) { 8 } else { 0 };
        let logical = ctx.vcpus.clamp(1, 255);
        let mut ecx = self.bits(1, 0, Register::Ecx);
        if self.has(Feature::Xsave) && ctx.cr4 & cr4::OSXSAVE != 0 {
            ecx |= OSXSAVE;
        }
        CpuidResult {
            eax: self.identity.signature,
            ebx: ctx.apic_id << 24 | logical << 16 | clflush_quadwords << 8,
            ecx,
            edx: self.edx_1(ctx),
        }
    }

    fn leaf_7(&self, subleaf: u32) -> CpuidResult {
        match subleaf {
            0 => CpuidResult { eax: 1, ..self.feature_leaf(7, 0) },
            1 => self.feature_leaf(7, 1),
            _ => CpuidResult::default(),
        }
    }

    /// A cache: the host's descriptor, with who shares it as our topology has it. The last of several levels (L3) is
    /// the package's, the others a core's. Leaf 4 (SDM) also says how many cores the package has.
    fn cache_leaf(&self, subleaf: u32, ctx: &CpuidContext, count_cores: bool) -> CpuidResult {
        let cache = usize::try_from(subleaf).ok().and_then(|i| self.identity.caches.get(i));
        let Some(&[eax, ebx, ecx, edx]) = cache else {
            return CpuidResult::default();
        };
        let level = eax >> 5 & 7;
        let vcpus = ctx.vcpus.clamp(1, 4096);
        let sharing = match (level >= 3, count_cores) {
            (false, _) => 1,
            (true, true) => vcpus.next_power_of_two(),
            (true, false) => vcpus,
        };
        let cores = if count_cores { vcpus.next_power_of_two().min(64) } else { 1 };
        CpuidResult { eax: eax & 0x3fff | (cores - 1) << 26 | (sharing - 1) << 14, ebx, ecx, edx }
    }

    /// XSAVE components, sizes and offsets (SDM 1 13.2); INV-CPUID-2.
    fn leaf_d(&self, subleaf: u32, ctx: &CpuidContext) -> CpuidResult {
        let mask = self.xcr0_mask();
        match subleaf {
            _ if mask == 0 => CpuidResult::default(),
            0 => CpuidResult {
                eax: low(mask),
                ebx: self.standard_size(ctx.xcr0 & mask),
                ecx: self.standard_size(mask),
                edx: high(mask),
            },
            1 => CpuidResult {
                eax: self.bits(0xd, 1, Register::Eax),
                ebx: self.compacted_size(ctx.xcr0 & mask | ctx.xss & self.xss_mask()),
                ecx: low(self.xss_mask()),
                edx: high(self.xss_mask()),
            },
            _ => self
                .xsave_components(mask)
                .find(|c| u32::from(c.index) == subleaf)
                .map_or_else(CpuidResult::default, |c| {
                    [c.size, c.offset, u32::from(c.align64) << 1, 0].into()
                }),
        }
    }

    /// Components beyond x87 and SSE that are in `mask`.
    fn xsave_components(&self, mask: u64) -> impl Iterator<Item = &XsaveComponent> {
        self.identity
            .xsave
            .iter()
            .filter(move |c| 1u64.checked_shl(u32::from(c.index)).is_some_and(|bit| mask & bit != 0))
    }

    /// Bytes of a standard-format XSAVE area with the components of `xcr0`: legacy region, header, furthest end.
    #[must_use]
    pub fn standard_size(&self, xcr0: u64) -> u32 {
        self.xsave_components(xcr0).map(|c| c.offset.saturating_add(c.size)).fold(512 + 64, u32::max)
    }

    /// Bytes of a compacted-format XSAVE area with the components of `mask` (SDM 1 13.4.3). Zero where the processor
    /// has no compacted format.
    #[must_use]
    pub fn compacted_size(&self, mask: u64) -> u32 {
        if !self.has(Feature::Xsavec) {
            return 0;
        }
        let mut size: u32 = 512 + 64;
        for component in self.xsave_components(mask) {
            if component.align64 {
                size = size.saturating_add(63) & !63;
            }
            size = size.saturating_add(component.size);
        }
        size
    }

    /// KVM's leaves (Linux `Documentation/virt/kvm/x86/cpuid.rst`) and the frequencies at +10H that VMware introduced
    /// and KVM's user spaces follow: TSC and APIC bus in kHz.
    fn hypervisor_leaf(&self, leaf: u32, ctx: &CpuidContext) -> CpuidResult {
        let letters = |s: &[u8; 4]| u32::from_le_bytes(*s);
        match leaf {
            KVM_BASE => [KVM_MAX, letters(b"KVMK"), letters(b"VMKV"), letters(b"M\0\0\0")].into(),
            0x4000_0001 => self.feature_leaf(leaf, 0),
            KVM_MAX if self.has(Feature::Invtsc) => {
                [saturated(ctx.tsc_hz / 1000), saturated(APIC_BUS_HZ / 1000), 0, 0].into()
            }
            _ => CpuidResult::default(),
        }
    }

    fn extended_leaf(&self, leaf: u32, subleaf: u32, ctx: &CpuidContext) -> CpuidResult {
        let amd = self.vendor() == Vendor::Amd;
        match leaf {
            // Intel leaves the letters out (SDM 2A); AMD repeats them.
            EXTENDED if amd => self.vendor_leaf(self.max_extended()),
            EXTENDED => [self.max_extended(), 0, 0, 0].into(),
            0x8000_0001 => self.leaf_8000_0001(ctx),
            0x8000_0002..=0x8000_0004 => self.brand_leaf(leaf - 0x8000_0002),
            0x8000_0005 if amd => self.identity.l1.into(),
            0x8000_0006 if amd => self.identity.l2.into(),
            0x8000_0006 => [0, 0, self.identity.l2[2], 0].into(),
            0x8000_0007 => self.feature_leaf(leaf, 0),
            0x8000_0008 => self.address_sizes(ctx),
            // FP256 only with AVX2 (APM 3 E.4.19).
            0x8000_001a => {
                [self.identity.fp_hints & if self.has(Feature::Avx2) { 7 } else { 3 }, 0, 0, 0].into()
            }
            0x8000_001d if self.has(Feature::Topoext) => self.cache_leaf(subleaf, ctx, false),
            // One thread a core, one node a package; the core's ID is the APIC ID.
            0x8000_001e if self.has(Feature::Topoext) => [ctx.apic_id, ctx.apic_id & 0xff, 0, 0].into(),
            0x8000_0021 => self.feature_leaf(leaf, 0),
            _ => CpuidResult::default(),
        }
    }

    /// DEVIATION: SYSCALL is announced in every mode; Intel's processors announce it in 64-bit mode only (SDM 2A). KVM
    /// does the same, and no guest is known to mind.
    fn leaf_8000_0001(&self, ctx: &CpuidContext) -> CpuidResult {
        // Bits of leaf 1's EDX that AMD repeats (APM 3 E.4.2): 0 to 9, 12 to 17, 23, 24.
        const REPEATED: u32 = 0x0183_f3ff;
        let mut result = self.feature_leaf(0x8000_0001, 0);
        if self.vendor() == Vendor::Amd {
            result.eax = self.identity.signature;
            result.edx |= self.edx_1(ctx) & REPEATED;
        }
        if ctx.vcpus <= 1 {
            result.ecx &= !(1 << Feature::CmpLegacy.info().bit);
        }
        result
    }

    /// Sixteen bytes of the brand string.
    fn brand_leaf(&self, part: u32) -> CpuidResult {
        let mut text = [0u8; 48];
        for (to, from) in text[..47].iter_mut().zip(self.identity.brand.bytes()) {
            *to = from;
        }
        let start = if part < 3 { part as usize * 16 } else { 0 };
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(text[start..start + 16].as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words.into()
    }

    /// Address widths; for AMD also the number of cores and the width of their part of the APIC ID.
    fn address_sizes(&self, ctx: &CpuidContext) -> CpuidResult {
        let widths = u32::from(self.phys_bits()) | u32::from(self.linear_bits()) << 8;
        let cores = if self.vendor() == Vendor::Amd {
            core_id_bits(ctx.vcpus) << 12 | (ctx.vcpus.clamp(1, 256) - 1)
        } else {
            0
        };
        CpuidResult { eax: widths, ecx: cores, ..self.feature_leaf(0x8000_0008, 0) }
    }
}

fn low(value: u64) -> u32 {
    saturated(value & 0xffff_ffff)
}

fn high(value: u64) -> u32 {
    saturated(value >> 32)
}

fn saturated(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// Bits of an APIC ID that number the cores of a package.
fn core_id_bits(vcpus: u32) -> u32 {
    vcpus.clamp(1, 1 << 16).next_power_of_two().trailing_zeros()
}

/// Leaf 0BH and 1FH: a thread level of one, a core level of all vCPUs (SDM 2A; 3A 8.9.1).
fn topology_leaf(subleaf: u32, ctx: &CpuidContext) -> CpuidResult {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let index = subleaf & 0xff;
    let [eax, ebx, ecx] = match subleaf {
        0 => [0, 1, index | THREAD],
        1 => [core_id_bits(ctx.vcpus), ctx.vcpus.clamp(1, 0xffff), index | CORE],
        _ => [0, 0, index],
    };
    CpuidResult { eax, ebx, ecx, edx: ctx.apic_id }
}

/// TSC and crystal (SDM 2A, leaf 15H): TSC = crystal × EBX / EAX. The crystal is [`APIC_BUS_HZ`], because Linux takes
/// it for the APIC timer's clock. Linux multiplies crystal in kHz by EBX in 32 bits, so EBX stays small enough for
/// that and the ratio is the best one within that bound; its error is below 2 ppm.
fn leaf_15(tsc_hz: u64) -> CpuidResult {
    const LARGEST_NUMERATOR: u64 = u32::MAX as u64 / (APIC_BUS_HZ / 1000);
    // A frequency of 2^40 Hz is beyond any processor; the bound keeps the products below 64 bits.
    let tsc_hz = tsc_hz.min(1 << 40);
    let crystal = saturated(APIC_BUS_HZ);
    let candidates = (1..=LARGEST_NUMERATOR).filter_map(|denominator| {
        let numerator = (tsc_hz * denominator + APIC_BUS_HZ / 2) / APIC_BUS_HZ;
        let error = (numerator * APIC_BUS_HZ).abs_diff(tsc_hz * denominator);
        // Errors of different denominators compare as error / denominator; scaled to keep three more digits.
        (1..=LARGEST_NUMERATOR).contains(&numerator).then_some((
            error * 1024 / denominator,
            denominator,
            numerator,
        ))
    });
    match candidates.min() {
        Some((_, denominator, numerator)) => {
            [saturated(denominator), saturated(numerator), crystal, 0].into()
        }
        None => CpuidResult::default(),
    }
}

/// Base, maximum and bus frequency in MHz.
fn leaf_16(tsc_hz: u64) -> CpuidResult {
    let mhz = saturated((tsc_hz.saturating_add(500_000) / 1_000_000).min(0xffff));
    [mhz, mhz, 100, 0].into()
}
