//! `trellis image list`: what is cached and what can be fetched, as a table or as JSON.

use serde_json::json;

use super::cache::Cache;
use super::spec::ImageSpec;

/// One line of the list.
struct Row {
    name: String,
    version: String,
    size: String,
    place: String,
}

/// The list for people.
#[must_use]
pub fn table(cache: &Cache) -> String {
    let mut rows = vec![Row {
        name: "NAME".into(),
        version: "VERSION".into(),
        size: "SIZE".into(),
        place: "WHERE".into(),
    }];
    for manifest in cache.list() {
        rows.push(Row {
            version: manifest.version().to_owned(),
            size: format!(
                "{:.1} MiB",
                (manifest.len_bytes() + cache.disk_bytes(&manifest)) as f64 / f64::from(1 << 20)
            ),
            place: cache.image_directory(&manifest.name).display().to_string(),
            name: manifest.name,
        });
    }
    for (spec, about) in ImageSpec::known() {
        if cache.load(&spec.name()).is_none() {
            rows.push(Row {
                name: spec.name(),
                version: "-".into(),
                size: "-".into(),
                place: format!("{} # {about}", fetch_command(&spec)),
            });
        }
    }
    rows.push(Row {
        name: "contract".into(),
        version: "-".into(),
        size: "-".into(),
        place: "built in # contract tests: trellis boot contract".into(),
    });
    render(&rows)
}

/// The list for programs.
#[must_use]
pub fn json(cache: &Cache) -> serde_json::Value {
    let cached: Vec<_> = cache
        .list()
        .into_iter()
        .map(|manifest| {
            let directory = cache.image_directory(&manifest.name);
            json!({ "name": manifest.name, "version": manifest.version(), "len_bytes": manifest.len_bytes(), "path": directory, "manifest": manifest })
        })
        .collect();
    let fetchable: Vec<_> = ImageSpec::known()
        .into_iter()
        .map(|(spec, about)| json!({ "name": spec.name(), "about": about, "command": fetch_command(&spec) }))
        .collect();
    json!({ "cached": cached, "fetchable": fetchable })
}

/// How to fetch `spec`.
fn fetch_command(spec: &ImageSpec) -> String {
    let mut command = "trellis image fetch debian".to_owned();
    if spec.rootfs {
        command.push_str(" --rootfs");
    }
    if spec.flavour != "cloud" {
        command.push_str(&format!(" --flavour {}", spec.flavour));
    }
    if ImageSpec::from_options(None, Some(&spec.flavour)).is_ok_and(|implied| implied.arch != spec.arch) {
        command.push_str(&format!(" --arch {}", spec.arch));
    }
    command
}

/// Columns as wide as their widest cell.
fn render(rows: &[Row]) -> String {
    let width = |cell: fn(&Row) -> &str| rows.iter().map(|row| cell(row).len()).max().unwrap_or(0);
    let (name, version, size) = (width(|row| &row.name), width(|row| &row.version), width(|row| &row.size));
    rows.iter()
        .map(|row| {
            format!("{:name$}  {:version$}  {:>size$}  {}\n", row.name, row.version, row.size, row.place)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_of_an_empty_cache_shows_how_to_fetch() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let text = table(&cache);
        assert!(text.contains("trellis image fetch debian --flavour 686-pae #"), "{text}");
        assert!(text.contains("trellis image fetch debian --flavour memtest86+ --arch i386"), "{text}");
        assert_eq!(json(&cache)["cached"].as_array().unwrap().len(), 0);
    }
}
