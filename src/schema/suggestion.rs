//! Suggestions for mistyped words.

/// The word of `known` that is similar to a mistyped `name`.
pub fn suggest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let short: String = name.chars().take(64).collect();
    known
        .iter()
        // Jaro-Winkler rates two swapped letters in a short word low, and the edit distance rates
        // an extra suffix low.
        .filter(|word| {
            strsim::jaro_winkler(&short, word) > 0.8 || strsim::osa_distance(&short, word) == 1
        })
        .map(|word| (strsim::jaro_winkler(&short, word), *word))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, word)| word)
}
