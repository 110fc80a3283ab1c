//! Advice in words. Each rule looks at numbers of this run and says them; a rule whose numbers are small says nothing.

use crate::bench::table::{duration, percent};
use crate::model::predict::{Prediction, Technique};
use crate::model::table::Predicted;

use super::explain::Explanation;
use super::report::{Bakeoff, ModeResult};

/// From this share of the time on, something is worth a word.
const WORTH: f64 = 0.10;
/// A remainder that is larger than this explains nothing.
const MAX_UNEXPLAINED: f64 = 10.0;
/// A first run that is so many times as long as the others.
const COLD: f64 = 1.3;

/// All that can be said.
#[must_use]
pub fn advise(bakeoff: &Bakeoff) -> Vec<String> {
    let mut advice = Vec::new();
    advice.extend(which_mode(bakeoff));
    advice.extend(bakeoff.predicted.as_ref().and_then(hardware));
    for mode in &bakeoff.modes {
        if let Some(explanation) = &mode.explanation {
            advice.extend(busy_host(mode, explanation));
            advice.extend(idle(mode, explanation));
            if mode.name == "bt" {
                advice.extend(translation(mode, explanation));
                advice.extend(devices(mode, explanation));
                advice.extend(memory(mode, explanation));
                advice.extend(callouts(mode, explanation));
            }
            advice.extend(unexplained(mode, explanation));
        }
    }
    advice.extend(bakeoff.predicted.as_ref().and_then(large_pages));
    advice
}

/// The quickest mode, and by how much.
fn which_mode(bakeoff: &Bakeoff) -> Option<String> {
    let mut measured: Vec<(&ModeResult, f64)> = bakeoff
        .modes
        .iter()
        .filter(|mode| mode.name != "native")
        .filter_map(|mode| Some((mode, mode.seconds?)))
        .collect();
    measured.sort_by(|a, b| a.1.total_cmp(&b.1));
    let ((best, seconds), (second, more)) = (*measured.first()?, *measured.get(1)?);
    let native =
        best.percent_of_native.map_or_else(String::new, |share| format!(", {} of native", percent(share)));
    // Closer than their spread is a draw.
    let spread = best.spread.unwrap_or(0.0).max(second.spread.unwrap_or(0.0)) / 100.0;
    if more / seconds < 1.0 + spread {
        return Some(format!(
            "{} and {} do not differ by more than their spread ({:.0} %); take {}{native}.",
            best.name,
            second.name,
            spread * 100.0,
            best.name
        ));
    }
    Some(format!(
        "Take {}: {} a run{native}, {:.1} times as fast as {}.",
        best.name,
        duration(seconds * 1e9),
        more / seconds,
        second.name
    ))
}

/// What hardware virtualization would make of it, if that is another matter.
fn hardware(predicted: &Predicted) -> Option<String> {
    let find = |technique, processor| predicted.find(technique, processor);
    let shadow = find(Technique::Shadow, "Sandy Bridge")?;
    let nested = find(Technique::Nested, "Sandy Bridge")?;
    let dearest = |prediction: &Prediction| {
        prediction.terms.first().map_or_else(String::new, |term| format!(" (mostly {})", term.event))
    };
    let (s, n) = (shadow.percent, nested.percent);
    let words = if (s / n).ln().abs() < 1.05f64.ln() {
        format!(
            "Shadow or nested paging would make no difference with VT-x: {s:.0} and {n:.0} % of native are predicted."
        )
    } else if n > s {
        format!(
            "With VT-x, nested paging is the better choice: {n:.0} % of native are predicted, {s:.0} % with shadow paging{}.",
            dearest(shadow)
        )
    } else {
        format!(
            "With VT-x, shadow paging is the better choice: {s:.0} % of native are predicted, {n:.0} % with nested paging{}.",
            dearest(nested)
        )
    };
    Some(words)
}

/// Walks that nested paging makes dear.
fn large_pages(predicted: &Predicted) -> Option<String> {
    let events = &predicted.events;
    let small = events.walks - events.large_walks;
    let each = predicted.native_cycles / small.max(1e-9);
    // A walk of a few tens of cycles is a tenth of the time then.
    (each < 300.0 && small > 0.0).then(|| {
        format!(
            "A page of 4 KiB is walked for every {each:.0} cycles: large pages (2 MiB) would help in any mode, and with nested paging \
             most of all."
        )
    })
}

fn busy_host(mode: &ModeResult, explanation: &Explanation) -> Option<String> {
    let share = explanation.share("the host ran something else");
    (share >= WORTH).then(|| {
        format!(
            "{}: the host gave the processor to others for {} of the time; measure again when it is quiet.",
            mode.name,
            percent(share * 100.0)
        )
    })
}

fn idle(mode: &ModeResult, explanation: &Explanation) -> Option<String> {
    let share = explanation.share("idle");
    (share >= 3.0 * WORTH).then(|| {
        format!(
            "{}: the guest slept for {} of the time. A faster engine does not help with that; look at what it waits for.",
            mode.name,
            percent(share * 100.0)
        )
    })
}

fn translation(mode: &ModeResult, explanation: &Explanation) -> Option<String> {
    let share = explanation.share("translation") + explanation.share("cold code");
    let (first, others) = mode.times.split_first()?;
    let later = crate::bench::stats::median(others);
    let cold = later.filter(|later| *first > later * COLD).map(|later| {
        format!(" The first run took {}, later ones {}.", duration(first * 1e9), duration(later * 1e9))
    });
    (share >= WORTH).then(|| {
        format!(
            "bt: {} of the time goes into code that is new. It pays off in longer runs: keep processes alive instead of starting \
             them anew, and measure more runs.{}",
            percent(share * 100.0),
            cold.unwrap_or_default()
        )
    })
}

fn devices(mode: &ModeResult, explanation: &Explanation) -> Option<String> {
    let is_device = |cause: &str| ["port-", "mmio-"].iter().any(|kind| cause.starts_with(kind));
    let rows = || {
        explanation
            .parts
            .iter()
            .flat_map(|part| &part.rows)
            .filter(|row| row.kind == "exit" && is_device(&row.cause))
    };
    let seconds: f64 = rows().filter_map(|row| row.seconds).sum();
    let count: f64 = rows().map(|row| row.count).sum();
    let share = seconds / explanation.seconds;
    let dearest = rows().max_by(|a, b| a.seconds.unwrap_or(0.0).total_cmp(&b.seconds.unwrap_or(0.0)))?;
    (share >= WORTH).then(|| {
        format!(
            "{}: device accesses take {} of the time, {count:.0} of them, most by {}: fewer touches would help (virtio instead of \
             emulated devices, larger blocks, less on the serial line).",
            mode.name,
            percent(share * 100.0),
            dearest.cause
        )
    })
}

/// Checks of accesses and TLB misses.
fn memory(mode: &ModeResult, explanation: &Explanation) -> Option<String> {
    let walks: f64 = explanation
        .parts
        .iter()
        .flat_map(|part| &part.rows)
        .filter(|row| row.cause == "tlb-fill" || row.kind == "miss")
        .filter_map(|row| row.seconds)
        .sum();
    let share = walks / explanation.seconds;
    if share >= WORTH {
        return Some(format!(
            "bt: {} of the time goes into accesses that miss the software TLB: touch fewer pages, or more of each before the next; fewer \
             switches of the address space help too.",
            percent(share * 100.0)
        ));
    }
    let profile = mode.profile.as_ref()?;
    let checks = profile.share("check").unwrap_or(0.0) + profile.share("address").unwrap_or(0.0);
    let lookups = profile.share("lookup").unwrap_or(0.0);
    if lookups > checks && lookups >= WORTH {
        Some(format!(
            "bt: {} of the time in translated code is spent looking up targets of jumps: indirect calls, returns and virtual functions are what \
             this workload pays for.",
            percent(lookups * 100.0)
        ))
    } else if checks >= 2.0 * WORTH {
        Some(format!(
            "bt: {} of the time in translated code checks memory accesses. Hardware does that for nothing: where there is VT-x or AMD-V, \
             use it for this.",
            percent(checks * 100.0)
        ))
    } else {
        None
    }
}

fn callouts(mode: &ModeResult, explanation: &Explanation) -> Option<String> {
    let share = explanation.share("callouts");
    let rows = explanation.parts.iter().flat_map(|part| &part.rows).filter(|row| row.kind == "callout");
    let dearest = rows.max_by(|a, b| a.seconds.unwrap_or(0.0).total_cmp(&b.seconds.unwrap_or(0.0)))?;
    (share >= WORTH).then(|| {
        format!(
            "{}: {} of the time goes into instructions that are not translated, most into {} ({:.0} times).",
            mode.name,
            percent(share * 100.0),
            dearest.cause,
            dearest.count
        )
    })
}

fn unexplained(mode: &ModeResult, explanation: &Explanation) -> Option<String> {
    let remainder = explanation.unexplained_percent();
    (remainder.abs() > MAX_UNEXPLAINED).then(|| {
        format!(
            "{}: {remainder:+.0} % of the time is not explained by the parts above. Take its explanation as a hint only{}.",
            mode.name,
            if remainder < 0.0 { ": the parts are more than the whole" } else { "" }
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::account::{Account, Row};
    use super::super::explain::explain;
    use super::*;
    use crate::model::events::Events;

    fn mode(name: &'static str, times: &[f64], account: Option<&Account>) -> ModeResult {
        let mut mode = ModeResult::of_times(name, times, Some(0.5));
        mode.explanation = account.map(|account| explain(times.iter().sum(), account, None));
        mode
    }

    fn bakeoff(modes: Vec<ModeResult>) -> Bakeoff {
        Bakeoff { modes, ..Bakeoff::default() }
    }

    fn account(rows: &[(&str, &str, f64, f64)]) -> Account {
        let row = |(kind, cause, count, seconds): &(&str, &str, f64, f64)| Row {
            kind: (*kind).to_owned(),
            cause: (*cause).to_owned(),
            count: *count,
            seconds: Some(*seconds),
        };
        let rows: Vec<Row> = rows.iter().map(row).collect();
        Account { busy: 1.0, cpu: Some(1.0), rows, ..Account::default() }
    }

    fn says(bakeoff: &Bakeoff, wanted: &str) -> bool {
        advise(bakeoff).iter().any(|line| line.contains(wanted))
    }

    #[test]
    fn quickest_mode_is_named_with_its_lead() {
        let both =
            bakeoff(vec![mode("native", &[0.5], None), mode("bt", &[1.0], None), mode("tcg", &[4.0], None)]);
        assert!(
            says(&both, "Take bt: 1.00 s a run, 50 % of native, 4.0 times as fast as tcg."),
            "{:?}",
            advise(&both)
        );
        let close = bakeoff(vec![mode("bt", &[1.0, 1.4], None), mode("tcg", &[1.3, 1.2], None)]);
        assert!(says(&close, "do not differ by more than their spread"), "{:?}", advise(&close));
        assert!(advise(&bakeoff(vec![mode("bt", &[1.0], None)])).is_empty());
    }

    #[test]
    fn large_parts_get_a_word_and_small_ones_none() {
        let large = account(&[
            ("translation", "fragments", 10.0, 0.3),
            ("exit", "port-write", 1000.0, 0.25),
            ("callout", "CPUID", 77.0, 0.2),
            ("miss", "fill", 5.0, 0.2),
        ]);
        let bad = bakeoff(vec![mode("bt", &[1.0], Some(&large))]);
        for wanted in
            ["code that is new", "most by port-write", "most into CPUID (77 times)", "miss the software TLB"]
        {
            assert!(says(&bad, wanted), "{wanted}: {:?}", advise(&bad));
        }
        let small = account(&[("translation", "fragments", 10.0, 0.03), ("exit", "port-write", 1.0, 0.02)]);
        let good = bakeoff(vec![mode("bt", &[1.0], Some(&small))]);
        assert!(!says(&good, "new") && !says(&good, "device"), "{:?}", advise(&good));
        assert!(says(&good, "is not explained"), "nothing says where 95 % went");
    }

    #[test]
    fn busy_host_and_sleep_are_told() {
        let account = Account { busy: 0.5, cpu: Some(0.3), asleep: 9.0, ..Account::default() };
        let both = bakeoff(vec![mode("bt", &[1.0], Some(&account))]);
        assert!(says(&both, "to others for 20 %") && says(&both, "slept for 50 %"), "{:?}", advise(&both));
    }

    #[test]
    fn prediction_chooses_the_paging_and_counts_walks() {
        let with = |events: Events| Bakeoff {
            predicted: Some(Predicted::new("x", "run", events, 1e6)),
            ..Bakeoff::default()
        };
        let updates = with(Events { traced_writes: 500.0, ..Events::default() });
        assert!(says(&updates, "nested paging is the better choice"), "{:?}", advise(&updates));
        let walks = with(Events { walks: 20_000.0, ..Events::default() });
        assert!(says(&walks, "shadow paging is the better choice"), "{:?}", advise(&walks));
        assert!(says(&walks, "for every 50 cycles"));
        let neither = with(Events::default());
        assert!(says(&neither, "would make no difference") && !says(&neither, "large pages"));
    }
}
