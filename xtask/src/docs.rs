//! Tests of the documents: links lead somewhere, and what must be listed is.

use std::fs;
use std::path::{Path, PathBuf};

use crate::steps::root;

/// Files below `directory` whose name ends with `ending`, sorted; build directories are left out.
fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(directory) else { return found };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with('.') && !name.starts_with("target") {
            found.extend(files(&path, ending));
        } else if name.ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Targets of `[text](target)` that are paths.
fn links(text: &str) -> Vec<&str> {
    let targets = text.match_indices("](").filter_map(|(at, _)| text[at + 2..].split(')').next());
    targets.filter(|target| !target.contains("://") && !target.starts_with('#')).collect()
}

#[test]
fn links_of_all_documents_lead_somewhere() {
    for document in files(&root(), ".md") {
        let text = fs::read_to_string(&document).unwrap();
        for link in links(&text) {
            let path = document.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(path.exists(), "{}: {link} leads nowhere", document.display());
        }
    }
}

#[test]
fn every_deviation_is_listed() {
    let listed = fs::read_to_string(root().join("docs/deviations.md")).unwrap();
    for source in files(&root().join("crates"), ".rs") {
        let text = fs::read_to_string(&source).unwrap();
        if text.contains("DEVIATION:") {
            let name = source.strip_prefix(root().join("crates")).unwrap().display().to_string();
            assert!(listed.contains(&name), "{name} has a deviation that docs/deviations.md does not list");
        }
    }
}

#[test]
fn every_decision_is_in_the_index_and_has_its_parts() {
    let directory = root().join("docs/decisions");
    let index = fs::read_to_string(directory.join("README.md")).unwrap();
    for path in files(&directory, ".md") {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name == "README.md" {
            continue;
        }
        assert!(index.contains(&name), "{name} is not in the index");
        let text = fs::read_to_string(&path).unwrap();
        for part in ["**Context.**", "**Options.**", "**Choice.**", "**Evidence.**", "**Revisit**"] {
            assert!(text.contains(part), "{name} lacks {part}");
        }
    }
}

#[test]
fn files_named_in_the_architecture_exist() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let sources = files(&root().join("crates"), ".rs");
    let named = text.split('`').filter(|word| word.ends_with(".rs") && !word.contains(' '));
    for name in named {
        assert!(
            sources.iter().any(|path| path.ends_with(name)),
            "ARCHITECTURE.md names {name}, which is not there"
        );
    }
}
