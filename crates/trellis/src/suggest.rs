//! "Did you mean …?" for everything that a user can misspell: options of files, image names, values.

/// `; did you mean 'NEAREST'?` if one of `known` is near enough to `word`.
pub fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(word, known).map(|name| format!("; did you mean '{name}'?"))
}

/// The nearest of `known` by Jaro-Winkler distance, with the threshold that clap uses for options.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let scored = known.into_iter().map(|name| (strsim::jaro_winkler(word, name), name));
    scored.filter(|(score, _)| *score > 0.7).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_a_misspelling() {
        assert_eq!(nearest("memroy", ["memory", "cpus"]), Some("memory"));
        assert_eq!(did_you_mean("zzz", ["memory", "cpus"]), None);
    }
}
