//! `trellis dump`: what the translator makes of guest code, without a guest.
//!
//! The way of the data: [`code`] reads bytes, a flat file or an ELF file → units are formed and translated one after the other, as the
//! engine would → `engine_bt::listing` puts guest and host code side by side → text or JSON.

mod code;

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::bail;
use bt::{Facts, FpLevel, Variant};
use clap::{Args, ValueEnum, ValueHint};
use engine_bt::listing::{HostLine, Listing, Source};
use serde_json::{Value, json};
use x86::cpuid::{CpuModel, Gate, Vendor};

use crate::inside::parse_address;
use crate::options::parse_cpu;
use code::Code;

const PAGE: u64 = 4096;
/// Units shown at most when nothing else says how many.
const MANY: usize = 1000;

/// x87 and vector state that the code may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FpChoice {
    /// None: such instructions call out.
    None,
    /// x87 and MMX.
    X87,
    /// Legacy SSE.
    Sse,
    /// AVX, AVX2, FMA.
    Avx,
    /// AVX-512.
    Avx512,
}

impl From<FpChoice> for FpLevel {
    fn from(choice: FpChoice) -> Self {
        match choice {
            FpChoice::None => Self::None,
            FpChoice::X87 => Self::X87,
            FpChoice::Sse => Self::Sse,
            FpChoice::Avx => Self::Avx,
            FpChoice::Avx512 => Self::Avx512,
        }
    }
}

/// What to translate, and as what.
#[derive(Args, Debug)]
pub struct DumpArgs {
    /// The code, in hexadecimal
    #[arg(long, value_name = "HEX", required_unless_present = "file", conflicts_with = "file")]
    bytes: Option<String>,
    /// A file with code: ELF, or flat
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,
    /// In a flat file: where the code begins, in hexadecimal [default: 0]
    #[arg(long, value_name = "HEX", value_parser = parse_address, requires = "file")]
    offset: Option<u64>,
    /// In an ELF file: the function
    #[arg(long, value_name = "NAME", requires = "file", conflicts_with_all = ["offset", "rip"])]
    symbol: Option<String>,
    /// The code's address; in an ELF file, where to begin [default: the entry point]
    #[arg(long, value_name = "HEX", value_parser = parse_address)]
    rip: Option<u64>,
    /// Show so many units [default: all of --bytes or of the symbol, else 1]
    #[arg(long, value_name = "N")]
    units: Option<usize>,
    /// Instructions in a unit at most
    #[arg(long, value_name = "N", default_value_t = bt::unit::MAX_INSTRUCTIONS)]
    limit: usize,
    /// As code of level 3, not of level 0
    #[arg(long)]
    user: bool,
    /// As code of level 0 with RFLAGS.AC set under SMAP
    #[arg(long, conflicts_with = "user")]
    ac: bool,
    /// Every memory access with a check of its own
    #[arg(long)]
    plain: bool,
    /// x87 and vector state that is enabled
    #[arg(long, value_enum, default_value_t = FpChoice::Avx)]
    fp: FpChoice,
    /// CPU model, as trellis boot takes it
    #[arg(long, value_name = "MODEL[,+F,-F]", value_parser = parse_cpu, default_value = "max")]
    cpu: String,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

/// Carries out the command; the text for standard output.
///
/// # Errors
/// What cannot be read, found or decoded.
pub fn run(args: &DumpArgs) -> anyhow::Result<String> {
    let code = Code::read(args)?;
    let listings = Translator::new(args)?.listings(&code, args)?;
    if args.json {
        let units: Vec<Value> = listings.iter().map(to_json).collect();
        return Ok(format!("{:#}\n", json!({ "units": units })));
    }
    let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut text: Vec<String> = listings.iter().map(|l| l.render(colours)).collect();
    if listings.len() > 1 {
        text.push(totals(&listings));
    }
    Ok(text.join("\n"))
}

/// What stays the same from unit to unit.
struct Translator {
    model: CpuModel,
    facts: Facts,
    limit: usize,
}

impl Translator {
    fn new(args: &DumpArgs) -> anyhow::Result<Self> {
        let model = CpuModel::parse(&args.cpu)?;
        let variant = match (args.user, args.ac) {
            (true, _) => Variant::User,
            (false, true) => Variant::SupervisorAc,
            (false, false) => Variant::Supervisor,
        };
        let facts = Facts {
            variant,
            fp: args.fp.into(),
            amd: model.vendor() == Vendor::Amd,
            bmi2: std::is_x86_feature_detected!("bmi2"),
            plain: args.plain,
            ..Facts::MODERN
        };
        Ok(Self { model, facts, limit: args.limit })
    }

    fn listings(&self, code: &Code, args: &DumpArgs) -> anyhow::Result<Vec<Listing>> {
        let wanted = args.units.unwrap_or(if code.end.is_some() { MANY } else { 1 });
        let (mut rip, mut listings) = (code.start, Vec::new());
        while listings.len() < wanted && code.end.is_none_or(|end| rip < end) {
            let Some((listing, next)) = self.listing(code, rip) else {
                if listings.is_empty() {
                    bail!("there is no 64-bit instruction at {rip:#x}");
                }
                break;
            };
            listings.push(listing);
            rip = next;
        }
        Ok(listings)
    }

    /// The unit at `rip`, translated, and where the next begins.
    fn listing(&self, code: &Code, rip: u64) -> Option<(Listing, u64)> {
        let page_rip = rip & !(PAGE - 1);
        let (page, next) = (code.page(page_rip), code.page(page_rip.wrapping_add(PAGE)));
        let offset = usize::try_from(rip - page_rip).ok()?;
        let mut reader = bt::unit::Reader::new(&page, self.facts.decoding());
        let mut unit = reader.form(offset, self.limit);
        let mut bytes = page.get(offset..)?.to_vec();
        if unit.instructions.is_empty() {
            let mut head = [0; bt::unit::MAX_LEN];
            head.copy_from_slice(next.get(..bt::unit::MAX_LEN)?);
            unit = bt::unit::form_crossing(&page, &head, offset, self.facts.decoding());
            bytes.extend_from_slice(&head);
        }
        if unit.instructions.is_empty() {
            return None;
        }
        let user = self.facts.variant == Variant::User;
        let facts = Facts { page_rip: (!user).then_some(page_rip), ..self.facts };
        let announced = |i: &_| self.model.gate(i) == Gate::Announced;
        let fragment = bt::translate(&unit, &mut reader, facts, 0, 0, &announced);
        let source = Source {
            unit: &unit,
            bytes: &bytes,
            fragment: &fragment,
            page_rip,
            variant: facts.variant,
            bases: (0, 0),
        };
        Some((Listing::new(&source), page_rip.wrapping_add(unit.end as u64)))
    }
}

fn totals(listings: &[Listing]) -> String {
    let sum = |of: &dyn Fn(&Listing) -> usize| listings.iter().map(of).sum::<usize>();
    let (guest, host) = (sum(&|l| l.lines.len()), sum(&Listing::straight_instructions));
    #[expect(clippy::cast_precision_loss, reason = "counts of a listing")]
    let ratio = host as f64 / guest.max(1) as f64;
    format!(
        "{} units: {guest} guest instructions, {host} host instructions on straight lines, {ratio:.2} for a guest instruction; {} call out\n",
        listings.len(),
        sum(&|l| l.callouts),
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn to_json(l: &Listing) -> Value {
    let host = |h: &HostLine| json!({"at": h.at, "bytes": hex(&h.bytes), "text": h.text, "note": h.note});
    let hosts = |lines: &[HostLine]| lines.iter().map(host).collect::<Vec<_>>();
    let address = |a: u64| format!("{a:#x}");
    json!({
        "rip": address(l.rip),
        "rights": l.rights,
        "guest_instructions": l.lines.len(),
        "guest_bytes": l.guest_bytes(),
        "host_bytes": l.host_bytes,
        "straight_host_instructions": l.straight_instructions(),
        "host_per_guest": l.host_per_guest(),
        "callouts": l.callouts,
        "entry": hosts(&l.entry),
        "lines": l.lines.iter().map(|line| json!({
            "rip": address(line.rip),
            "bytes": hex(&line.bytes),
            "text": line.text,
            "host": hosts(&line.host),
        })).collect::<Vec<_>>(),
        "outside": hosts(&l.outside),
        "exits": l.exits.iter().map(|e| json!({
            "number": e.number,
            "place": e.place,
            "target": address(e.target),
        })).collect::<Vec<_>>(),
        "sites": l.sites.iter().map(|s| json!({
            "number": s.number,
            "rip": address(s.rip),
            "instruction": s.instruction,
            "why": s.why,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: DumpArgs,
    }

    fn dump(arguments: &[&str]) -> anyhow::Result<String> {
        let line = Line::try_parse_from(std::iter::once(&"dump").chain(arguments))?;
        run(&line.args)
    }

    fn json_of(arguments: &[&str]) -> Value {
        serde_json::from_str(&dump(&[&["--json"], arguments].concat()).unwrap()).unwrap()
    }

    #[test]
    fn register_instruction_is_itself_again() {
        let unit = &json_of(&["--bytes", "48 01 d8"])["units"][0];
        assert_eq!(unit["rip"], "0xffffffff81000000");
        assert_eq!(unit["lines"][0]["text"], "add rax, rbx");
        assert_eq!(unit["lines"][0]["host"][0]["bytes"], "4801d8");
        assert_eq!(unit["callouts"], 0);
    }

    #[test]
    fn all_bytes_are_shown_unit_by_unit() {
        // nop; ret; add eax, ebx; jmp to itself
        let all = json_of(&["--bytes", "90c3 01d8 ebfe", "--rip", "0x1000", "--user"]);
        let starts: Vec<&Value> = all["units"].as_array().unwrap().iter().map(|u| &u["rip"]).collect();
        assert_eq!(starts, ["0x1000", "0x1002"]);
        assert_eq!(all["units"][1]["rights"], "user");
        assert_eq!(
            json_of(&["--bytes", "90c3 01d8 ebfe", "--units", "1"])["units"].as_array().unwrap().len(),
            1
        );
        assert!(dump(&["--bytes", "90c3 01d8 ebfe"]).unwrap().contains("2 units: 4 guest instructions"));
    }

    #[test]
    fn instruction_across_two_pages_is_one_unit() {
        let all = json_of(&["--bytes", "48 b8 01 02 03 04 05 06 07 08 90", "--rip", "1ffd"]);
        assert_eq!(all["units"][0]["lines"][0]["bytes"], "48b80102030405060708");
        assert_eq!(all["units"][1]["rip"], "0x2007");
    }

    #[test]
    fn options_change_the_code() {
        let callouts = |fp| json_of(&["--bytes", "0f 58 c1", "--fp", fp])["units"][0]["callouts"].clone();
        assert_eq!((callouts("sse"), callouts("none")), (json!(0), json!(1)));
        let old = json_of(&["--bytes", "c5 fc 58 c1", "--cpu", "x86-64-v2"]);
        assert_eq!(old["units"][0]["callouts"], 1);
    }

    #[test]
    fn nonsense_is_an_error() {
        for (arguments, expected) in [
            (&["--bytes", "06"][..], "no 64-bit instruction"),
            (&["--bytes", "xy"], "hexadecimal"),
            (&["--bytes", ""], "hexadecimal"),
            (&["--bytes", "4"], "hexadecimal"),
            (&["--file", "/nonexistent"], "/nonexistent"),
        ] {
            let error = format!("{:#}", dump(arguments).unwrap_err());
            assert!(error.contains(expected), "{arguments:?}: {error}");
        }
    }
}
