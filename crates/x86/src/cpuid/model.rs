//! CPU models: names and parsing, and the register bits that follow from a model's features.

use serde::{Deserialize, Serialize};

use super::features::{Class, Feature, FeatureSet, Info, Maker, TABLE, nearest};
use super::host::{Host, Identity, Vendor};
use crate::bits::{cr4, efer};

/// EFER.AIBRSE, Automatic IBRS (APM 2 3.1.7).
pub const EFER_AIBRSE: u64 = 1 << 21;

/// Bits of `IA32_SPEC_CTRL` (SDM 4 table 2-2, APM 2 3.2.9).
#[expect(missing_docs, reason = "the manual's names")]
pub mod spec_ctrl {
    pub const IBRS: u64 = 1 << 0;
    pub const STIBP: u64 = 1 << 1;
    pub const SSBD: u64 = 1 << 2;
    pub const PSFD: u64 = 1 << 7;
}

/// Bits of `IA32_ARCH_CAPABILITIES` (SDM 4 table 2-2).
#[expect(missing_docs, reason = "the manual's names")]
pub mod arch_capabilities {
    pub const RDCL_NO: u64 = 1 << 0;
    pub const IBRS_ALL: u64 = 1 << 1;
    pub const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    pub const SSB_NO: u64 = 1 << 4;
    pub const MDS_NO: u64 = 1 << 5;
    pub const IF_PSCHANGE_MC_NO: u64 = 1 << 6;
    pub const TAA_NO: u64 = 1 << 8;
    pub const SBDR_SSDP_NO: u64 = 1 << 13;
    pub const FBSDP_NO: u64 = 1 << 14;
    pub const PSDP_NO: u64 = 1 << 15;
    pub const BHI_NO: u64 = 1 << 20;
    pub const PBRSB_NO: u64 = 1 << 24;
    pub const GDS_NO: u64 = 1 << 26;
    pub const RFDS_NO: u64 = 1 << 27;
    pub const ITS_NO: u64 = 1 << 62;
    /// What our models announce: nothing to mitigate, and Enhanced IBRS.
    pub const UNAFFECTED: u64 = RDCL_NO
        | IBRS_ALL
        | SKIP_L1DFL_VMENTRY
        | SSB_NO
        | MDS_NO
        | IF_PSCHANGE_MC_NO
        | TAA_NO
        | SBDR_SSDP_NO
        | FBSDP_NO
        | PSDP_NO
        | BHI_NO
        | PBRSB_NO
        | GDS_NO
        | RFDS_NO
        | ITS_NO;
}

/// Why there is no such model, or not here.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ModelError {
    /// No model of that name.
    #[error("unknown CPU model `{name}`{}; there are max, host, x86-64-v1, x86-64-v2, x86-64-v3, x86-64-v4", hint(.nearest))]
    UnknownModel {
        /// As the user wrote it.
        name: String,
        /// The nearest that exists.
        nearest: Option<&'static str>,
    },
    /// No feature of that name.
    #[error("unknown CPU feature `{name}`{}; `--cpu help` lists them", hint(.nearest))]
    UnknownFeature {
        /// As the user wrote it.
        name: String,
        /// The nearest that exists.
        nearest: Option<&'static str>,
    },
    /// Neither `+feature` nor `-feature`.
    #[error("`{item}` in the CPU model is neither +feature nor -feature")]
    Syntax {
        /// As the user wrote it.
        item: String,
    },
    /// The host lacks a feature whose instructions it would have to execute.
    #[error("this host's CPU lacks {}, which CPU model `{spec}` needs; take a smaller model or leave it out", names(.missing))]
    NotOnHost {
        /// The model as the user wrote it.
        spec: String,
        /// What the host lacks.
        missing: Vec<Feature>,
    },
    /// We do not implement the feature.
    #[error("CPU feature `{}` is not implemented by this VMM; remove it from the CPU model", .feature.name())]
    NotImplemented {
        /// The feature.
        feature: Feature,
    },
    /// The feature is another maker's.
    #[error("CPU feature `{}` exists on {maker:?}'s processors only, and this host's is another's", .feature.name())]
    OtherMaker {
        /// The feature.
        feature: Feature,
        /// Whose it is.
        maker: Maker,
    },
    /// The host lays XSAVE state out otherwise than the model says (a snapshot from another host).
    #[error("this host keeps XSAVE component {index} elsewhere than the CPU model says; the snapshot needs a host like the one it was taken on, or a model without {feature}", feature = if *.index == 2 { "avx" } else { "avx512f" })]
    XsaveLayout {
        /// Bit in XCR0.
        index: u8,
    },
}

fn hint(nearest: &Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |n| format!(" (did you mean `{n}`?)"))
}

fn names(features: &[Feature]) -> String {
    features.iter().map(|f| f.name()).collect::<Vec<_>>().join(", ")
}

/// The models' names, what each announces of class `Native`, and what `--cpu help` says.
struct Base {
    name: &'static str,
    level: Option<&'static [&'static [Feature]]>,
    about: &'static str,
}

/// Micro-architecture levels (x86-64 psABI 1.0 table 3.1); level 1 is the platform's features alone.
const V2: &[Feature] = {
    use Feature::*;
    &[Cx16, LahfLm, Popcnt, Sse3, Ssse3, Sse41, Sse42]
};
const V3: &[Feature] = {
    use Feature::*;
    &[Xsave, Avx, Avx2, Bmi1, Bmi2, F16c, Fma, Lzcnt, Movbe]
};
const V4: &[Feature] = {
    use Feature::*;
    &[Avx512f, Avx512bw, Avx512cd, Avx512dq, Avx512vl]
};

const BASES: &[Base] = &[
    Base { name: "max", level: None, about: "everything that this host and this VMM can do (the default)" },
    Base { name: "host", level: None, about: "the same under the host processor's name" },
    Base { name: "x86-64-v1", level: Some(&[]), about: "psABI level 1: SSE2" },
    Base { name: "x86-64-v2", level: Some(&[V2]), about: "psABI level 2: SSE4.2, POPCNT, CMPXCHG16B" },
    Base { name: "x86-64-v3", level: Some(&[V2, V3]), about: "psABI level 3: AVX2, FMA, BMI, MOVBE" },
    Base { name: "x86-64-v4", level: Some(&[V2, V3, V4]), about: "psABI level 4: AVX-512 F, BW, CD, DQ, VL" },
];

/// A processor as the guest sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CpuModel {
    spec: String,
    pub(super) features: FeatureSet,
    pub(super) identity: Identity,
}

impl CpuModel {
    /// The model that `spec` names, on this host: a model's name, then `,+feature` and `,-feature` in any number
    /// (`feature=on` and `feature=off` too), applied from left to right. Adding a feature adds what it needs; removing
    /// one removes what needs it. An empty spec is `max`.
    ///
    /// # Errors
    /// An unknown name, a feature that the host lacks or that is not implemented.
    pub fn parse(spec: &str) -> Result<Self, ModelError> {
        Self::parse_for(spec, Host::get())
    }

    /// As [`Self::parse`], on a given host.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_for(spec: &str, host: &Host) -> Result<Self, ModelError> {
        let mut items = spec.split(',').map(str::trim);
        let base = find_base(items.next().unwrap_or_default())?;
        let mut model = Self {
            spec: if spec.trim().is_empty() { base.name.to_owned() } else { spec.trim().to_owned() },
            features: base_features(base, host),
            identity: identity(base, host),
        };
        for item in items.filter(|i| !i.is_empty()) {
            model.apply(item)?;
        }
        model.check_host_features(host)?;
        Ok(model)
    }

    fn apply(&mut self, item: &str) -> Result<(), ModelError> {
        let (add, name) = parse_item(item)?;
        let feature = Feature::by_name(name).ok_or_else(|| ModelError::UnknownFeature {
            name: name.to_owned(),
            nearest: Feature::nearest(name),
        })?;
        if !add {
            self.features.remove(feature);
            self.features.close();
            return Ok(());
        }
        let info = feature.info();
        if info.class == Class::Never {
            return Err(ModelError::NotImplemented { feature });
        }
        if !made_by(info, self.vendor()) {
            return Err(ModelError::OtherMaker { feature, maker: info.maker });
        }
        self.features.insert_closed(feature);
        Ok(())
    }

    /// As the user named it.
    #[must_use]
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// Whether the guest is shown the feature.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }

    /// Every feature that the guest is shown.
    #[must_use]
    pub fn features(&self) -> &FeatureSet {
        &self.features
    }

    /// Takes away the announced features of which `lacks` says so, and what needs them: an engine that cannot run them is below. What is gone.
    pub fn take_away(&mut self, lacks: impl Fn(&Info) -> bool) -> Vec<Feature> {
        let before = self.features;
        before.iter().filter(|f| lacks(f.info())).for_each(|f| self.features.remove(f));
        self.features.close();
        before.iter().filter(|f| !self.features.has(*f)).collect()
    }

    /// Whether the user asked for the feature by name, or for a model that must have it.
    #[must_use]
    pub fn insists_on(&self, feature: Feature) -> bool {
        let mut items = self.spec.split(',').map(str::trim);
        let level = find_base(items.next().unwrap_or_default()).ok().and_then(|base| base.level);
        let of_level = level.is_some_and(|level| level.iter().any(|part| part.contains(&feature)));
        let named = |item: &str| {
            parse_item(item).is_ok_and(|(add, name)| add && Feature::by_name(name) == Some(feature))
        };
        of_level || items.any(named)
    }

    /// Who the processor is and how its state is laid out.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whose conventions the processor follows.
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        self.identity.vendor()
    }

    /// Width of guest-physical addresses in bits, 36 to 46: the host's within these bounds. Guest memory is not
    /// mapped by the host's page tables, so a narrow host does not limit us; more than 46 bits would only make page
    /// tables with reserved bits rarer than on most processors.
    #[must_use]
    pub fn phys_bits(&self) -> u8 {
        self.identity.phys_bits.clamp(36, 46)
    }

    /// Width of linear addresses in bits: 48, because five-level paging is not announced.
    #[must_use]
    pub const fn linear_bits(&self) -> u8 {
        48
    }

    /// Whether this host can run the model: it has the features that run natively, and its XSAVE layout is the
    /// model's. For models that came from a snapshot.
    ///
    /// # Errors
    /// What the host lacks.
    pub fn check_host(&self) -> Result<(), ModelError> {
        self.check_on(Host::get())
    }

    /// As [`Self::check_host`], on a given host.
    ///
    /// # Errors
    /// What the host lacks.
    pub fn check_on(&self, host: &Host) -> Result<(), ModelError> {
        self.check_host_features(host)?;
        let of = |identity: &Identity, index| identity.xsave.iter().find(|c| c.index == index).copied();
        let mask = self.xcr0_mask();
        let differs = |&index: &u8| {
            of(&self.identity, index).is_none() || of(&self.identity, index) != of(&host.identity, index)
        };
        match (2..64).filter(|i| mask >> i & 1 != 0).find(differs) {
            Some(index) => Err(ModelError::XsaveLayout { index }),
            None => Ok(()),
        }
    }

    fn check_host_features(&self, host: &Host) -> Result<(), ModelError> {
        let missing: Vec<Feature> = self
            .features
            .iter()
            .filter(|f| f.info().class == Class::Native && !host.features.has(*f))
            .collect();
        if missing.is_empty() {
            Ok(())
        } else {
            Err(ModelError::NotOnHost { spec: self.spec.clone(), missing })
        }
    }

    /// Bits of CR4 that may be set (SDM 3A 2.5). CR4.PCE may always: RDPMC exists without counters.
    #[must_use]
    pub fn cr4_mask(&self) -> u64 {
        let bits = [
            (Feature::Vme, cr4::VME | cr4::PVI),
            (Feature::Tsc, cr4::TSD),
            (Feature::De, cr4::DE),
            (Feature::Pse, cr4::PSE),
            (Feature::Pae, cr4::PAE),
            (Feature::Mce, cr4::MCE),
            (Feature::Pge, cr4::PGE),
            (Feature::Fxsr, cr4::OSFXSR),
            (Feature::Sse, cr4::OSXMMEXCPT),
            (Feature::Umip, cr4::UMIP),
            (Feature::Fsgsbase, cr4::FSGSBASE),
            (Feature::Pcid, cr4::PCIDE),
            (Feature::Xsave, cr4::OSXSAVE),
            (Feature::Smep, cr4::SMEP),
            (Feature::Smap, cr4::SMAP),
        ];
        cr4::PCE | self.mask_of(&bits)
    }

    /// Bits of EFER that may be set in a value written. LMA is among them: it is read-only, and a write of what was
    /// read must not fault (APM 2 3.1.7).
    #[must_use]
    pub fn efer_mask(&self) -> u64 {
        self.mask_of(&[
            (Feature::Syscall, efer::SCE),
            (Feature::Lm, efer::LME | efer::LMA),
            (Feature::Nx, efer::NXE),
            (Feature::AutoIbrs, EFER_AIBRSE),
        ])
    }

    /// Bits of XCR0 that may be set; 0 without XSAVE. Bits 5 to 7 (AVX-512) come together.
    #[must_use]
    pub fn xcr0_mask(&self) -> u64 {
        self.mask_of(&[(Feature::Xsave, 3), (Feature::Avx, 1 << 2), (Feature::Avx512f, 7 << 5)])
    }

    /// Bits of IA32_XSS that may be set: none, since no supervisor component is announced.
    #[must_use]
    pub const fn xss_mask(&self) -> u64 {
        0
    }

    /// Bits of IA32_SPEC_CTRL that may be set; with none, the register does not exist (#GP).
    #[must_use]
    pub fn spec_ctrl_mask(&self) -> u64 {
        self.mask_of(&[
            (Feature::SpecCtrl, spec_ctrl::IBRS),
            (Feature::AmdIbrs, spec_ctrl::IBRS),
            (Feature::Stibp, spec_ctrl::STIBP),
            (Feature::AmdStibp, spec_ctrl::STIBP),
            (Feature::Ssbd, spec_ctrl::SSBD),
            (Feature::AmdSsbd, spec_ctrl::SSBD),
            (Feature::AmdPsfd, spec_ctrl::PSFD),
        ])
    }

    /// Bits of IA32_PRED_CMD that may be written (IBPB); with none, the register does not exist (#GP).
    #[must_use]
    pub fn pred_cmd_mask(&self) -> u64 {
        self.mask_of(&[(Feature::SpecCtrl, 1), (Feature::AmdIbpb, 1)])
    }

    /// The value of IA32_ARCH_CAPABILITIES, if the register exists.
    #[must_use]
    pub fn arch_capabilities(&self) -> Option<u64> {
        self.has(Feature::ArchCapabilities).then_some(arch_capabilities::UNAFFECTED)
    }

    fn mask_of(&self, bits: &[(Feature, u64)]) -> u64 {
        bits.iter().filter(|(f, _)| self.has(*f)).fold(0, |mask, (_, bit)| mask | bit)
    }

    /// What `--cpu help` prints of this model.
    #[must_use]
    pub fn summary(&self) -> Vec<String> {
        let id = &self.identity;
        let [family, number, stepping] = family_model_stepping(id.signature);
        let mut lines = vec![
            format!("{}: {}", self.spec, id.brand),
            format!(
                "  {} family {family:#x} model {number:#x} stepping {stepping}, {} physical and {} linear address bits",
                String::from_utf8_lossy(&id.vendor),
                self.phys_bits(),
                self.linear_bits()
            ),
        ];
        lines.extend(wrap(self.features.iter().map(Feature::name)));
        lines
    }

    /// What `--cpu help` prints: the models, what `max` announces here, and what else can be added.
    #[must_use]
    pub fn help() -> Vec<String> {
        let host = Host::get();
        let mut lines = vec!["CPU models (--cpu MODEL[,+feature][,-feature]...):".to_owned()];
        for base in BASES {
            let missing = Self::parse_for(base.name, host)
                .err()
                .map_or_else(String::new, |_| " [not on this host]".to_owned());
            lines.push(format!("  {:<10} {}{missing}", base.name, base.about));
        }
        if let Ok(max) = Self::parse_for("max", host) {
            lines.extend(max.summary());
            let addable = |i: &&Info| i.class == Class::OptIn && made_by(i, max.vendor());
            lines.push("can be added:".to_owned());
            lines.extend(wrap(TABLE.iter().filter(addable).map(|i| i.name)));
        }
        lines
    }
}

/// `+name`, `-name`, `name=on`, `name=off`.
fn parse_item(item: &str) -> Result<(bool, &str), ModelError> {
    let parsed = match (item.split_at_checked(1), item.split_once('=')) {
        (Some(("+", name)), _) => Some((true, name)),
        (Some(("-", name)), _) => Some((false, name)),
        (_, Some((name, "on"))) => Some((true, name)),
        (_, Some((name, "off"))) => Some((false, name)),
        _ => None,
    };
    parsed.ok_or_else(|| ModelError::Syntax { item: item.to_owned() })
}

fn find_base(name: &str) -> Result<&'static Base, ModelError> {
    let wanted = match name {
        "" => "max".to_owned(),
        "v1" | "v2" | "v3" | "v4" => format!("x86-64-{name}"),
        "x86-64" => "x86-64-v1".to_owned(),
        other => other.to_ascii_lowercase(),
    };
    BASES.iter().find(|b| b.name == wanted).ok_or_else(|| ModelError::UnknownModel {
        name: name.to_owned(),
        nearest: nearest(name, BASES.iter().map(|b| b.name)),
    })
}

fn made_by(info: &Info, vendor: Vendor) -> bool {
    match info.maker {
        Maker::Any => true,
        Maker::Amd => vendor == Vendor::Amd,
        Maker::Intel => vendor != Vendor::Amd,
    }
}

/// What a base model announces on `host`; a level announces its features even where the host lacks them, which is an
/// error that [`CpuModel::parse_for`] reports unless the user took them away.
fn base_features(base: &Base, host: &Host) -> FeatureSet {
    let vendor = host.identity.vendor();
    let mut set: FeatureSet = TABLE
        .iter()
        .filter(|i| made_by(i, vendor))
        .filter(|i| match i.class {
            Class::Platform => true,
            Class::Soft => base.level.is_none(),
            Class::Native => base.level.is_none() && host.features.has(i.feature),
            Class::OptIn | Class::Never => false,
        })
        .map(|i| i.feature)
        .collect();
    for feature in base.level.unwrap_or_default().iter().copied().flatten() {
        set.insert(*feature);
    }
    set.close();
    set
}

fn identity(base: &Base, host: &Host) -> Identity {
    let mut identity = host.identity.clone();
    if base.name != "host" {
        identity.brand = format!("Trellis Virtual CPU ({})", base.name);
    }
    identity
}

/// Displayed family, model and stepping of a signature (SDM 2A "CPUID", figure 3-6).
fn family_model_stepping(signature: u32) -> [u32; 3] {
    let family = signature >> 8 & 0xf;
    let model = signature >> 4 & 0xf;
    let extended_model = if family == 6 || family == 15 { signature >> 12 & 0xf0 } else { 0 };
    let extended_family = if family == 15 { signature >> 20 & 0xff } else { 0 };
    [family + extended_family, model | extended_model, signature & 0xf]
}

/// Words in lines of at most 100 columns, indented.
fn wrap<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut lines = vec![String::from(" ")];
    for word in words {
        if lines.last().is_some_and(|l| l.len() + 1 + word.len() > 100) {
            lines.push(String::from(" "));
        }
        if let Some(line) = lines.last_mut() {
            line.push(' ');
            line.push_str(word);
        }
    }
    lines
}
