//! A profile as it is shown: a table for people, JSON for programs.

use std::collections::BTreeMap;
use std::fmt;

use engine::profile::{Profile, Site};
use serde_json::{Value, json};

/// Sites that the table shows, and JSON.
const SHOWN: usize = 16;
const TOLD: usize = 4096;

/// The sites with most samples.
fn hottest(profile: &Profile, most: usize) -> Vec<(&Site, u64)> {
    let mut sites: Vec<_> = profile.sites.iter().map(|(site, n)| (site, *n)).collect();
    sites.sort_by_key(|&(site, n)| (std::cmp::Reverse(n), site));
    sites.truncate(most);
    sites
}

/// Writes the table.
pub(crate) fn table(profile: &Profile, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(f, "profile: {} samples, {} a second", profile.samples, profile.hz)?;
    if profile.lost > 0 {
        writeln!(f, "  {} of them lost", profile.lost)?;
    }
    for (name, group) in [
        ("where", &profile.places),
        ("host instructions of translated code by purpose", &profile.categories),
        ("assembly", &profile.assembly),
        ("engine", &profile.engine),
    ] {
        shares(name, group, f)?;
    }
    if let Some(lengthening) = profile.lengthening() {
        writeln!(f, "host instructions for a guest instruction, as executed {lengthening:>12.2}")?;
    }
    writeln!(f, "hottest guest instructions")?;
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let percent = |n: u64| 100.0 * n as f64 / profile.samples.max(1) as f64;
    for (site, n) in hottest(profile, SHOWN) {
        let level = if site.user { "user" } else { "kernel" };
        writeln!(f, "  {level:<6} {:016x}{n:>26}{:>8.1} %", site.rip, percent(n))?;
    }
    Ok(())
}

fn shares(name: &str, group: &BTreeMap<&str, u64>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let all: u64 = group.values().sum();
    if all == 0 {
        return Ok(());
    }
    writeln!(f, "{name}")?;
    let mut rows: Vec<_> = group.iter().collect();
    rows.sort_by_key(|&(_, n)| std::cmp::Reverse(*n));
    for (name, n) in rows {
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let percent = 100.0 * *n as f64 / all as f64;
        writeln!(f, "  {name:<30}{n:>18}{percent:>8.1} %")?;
    }
    Ok(())
}

/// For programs.
pub(crate) fn to_json(profile: &Profile) -> Value {
    let site = |(site, n): (&Site, u64)| {
        json!({
            "rip": format!("{:#x}", site.rip),
            "cpl": if site.user { 3 } else { 0 },
            "cr3": format!("{:#x}", site.cr3),
            "samples": n,
        })
    };
    json!({
        "hz": profile.hz,
        "samples": profile.samples,
        "lost": profile.lost,
        "places": profile.places,
        "categories": profile.categories,
        "assembly": profile.assembly,
        "engine": profile.engine,
        "sites": hottest(profile, TOLD).into_iter().map(site).collect::<Vec<_>>(),
        "path": {
            "guest_instructions": profile.guest_instructions,
            "host_instructions": profile.host_instructions,
            "lengthening": profile.lengthening(),
            "exact": false,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Shown(Profile);

    impl fmt::Display for Shown {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            table(&self.0, f)
        }
    }

    fn profile() -> Profile {
        let mut p = Profile {
            hz: 997,
            samples: 10,
            guest_instructions: 2.0,
            host_instructions: 8.0,
            ..Profile::default()
        };
        p.places.insert("translated", 8);
        p.places.insert("engine", 2);
        (0..8).for_each(|n| p.at(Site { rip: 0x1000 + n / 6, user: true, cr3: 0x5000 }));
        p
    }

    #[test]
    fn table_and_json_have_the_hottest_first() {
        let text = Shown(profile()).to_string();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert!(lines.contains(&vec!["translated", "8", "80.0", "%"]), "{text}");
        assert!(lines.contains(&vec!["user", "0000000000001000", "6", "60.0", "%"]), "{text}");
        assert!(text.contains("as executed         4.00"), "{text}");
        let json = to_json(&profile());
        assert_eq!(json["sites"][0], json!({"rip": "0x1000", "cpl": 3, "cr3": "0x5000", "samples": 6}));
        assert_eq!(json["path"]["lengthening"], 4.0);
    }
}
