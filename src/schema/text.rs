//! Text of others in messages: which characters a message may not show, and their escapes.

use std::borrow::Cow;

/// Whether a terminal or a log viewer acts on `c` instead of showing it: the control characters of
/// ASCII and of Latin-1 (C0, DEL, C1), the line separators and the directional formatting
/// characters of Unicode (UAX #9), which display text in another order than it has.
pub fn is_control(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}'
                | '\u{200e}'
                | '\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2066}'..='\u{2069}'
        )
}

/// A key for a message: at most 64 characters, with control characters escaped.
pub fn printable(key: &str) -> String {
    key.chars().take(64).flat_map(char::escape_debug).collect()
}

/// Text of an untrusted host for a message: control characters except line ends become spaces.
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if is_control(c) && c != '\n' { ' ' } else { c }).collect()
}

/// A message as it leaves the program: control characters are escaped, except for its line ends.
pub fn escaped(text: &str) -> Cow<'_, str> {
    escaped_with(text, |c| c == '\n', |c| c.escape_debug().to_string())
}

/// A line of the log, without its line end: all control characters are escaped.
pub fn escaped_line(text: &str) -> Cow<'_, str> {
    escaped_with(text, |_| false, |c| c.escape_debug().to_string())
}

/// A line of JSON: control characters, which are in its strings only, are escaped as JSON does.
pub fn escaped_json(text: &str) -> Cow<'_, str> {
    // All control characters are in the Basic Multilingual Plane: four digits hold them.
    escaped_with(text, |_| false, |c| format!("\\u{:04x}", u32::from(c)))
}

fn escaped_with(
    text: &str,
    stays: impl Fn(char) -> bool,
    escape: impl Fn(char) -> String,
) -> Cow<'_, str> {
    let must_go = |c: char| is_control(c) && !stays(c);
    if !text.contains(must_go) {
        return Cow::Borrowed(text);
    }
    let mut result = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if must_go(c) { result.push_str(&escape(c)) } else { result.push(c) }
    }
    Cow::Owned(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each class: C0, DEL, C1, separators, directional marks, overrides, isolates.
    const CONTROLS: &str =
        "\0\u{7}\t\r\u{1b}\u{7f}\u{85}\u{9b}\u{2028}\u{61c}\u{200f}\u{202e}\u{2066}";

    #[test]
    fn escaped_text_has_no_control_character_but_its_line_ends() {
        let text = format!("a{CONTROLS}b\nHint: ä\u{1F600} \\");
        let message = escaped(&text);
        assert!(!message.chars().any(|c| is_control(c) && c != '\n'), "{message:?}");
        assert!(message.starts_with("a\\0\\u{7}\\t\\r\\u{1b}\\u{7f}"), "{message}");
        assert!(message.ends_with("\\u{202e}\\u{2066}b\nHint: ä\u{1F600} \\"), "{message}");
        assert_eq!(escaped_line("a\nb"), "a\\nb");
        assert!(!plain(&text).chars().any(|c| is_control(c) && c != '\n'));
    }

    #[test]
    fn escaped_json_has_the_same_value() {
        let json = serde_json::to_string(CONTROLS).unwrap();
        let line = escaped_json(&json);
        assert!(!line.contains(is_control), "{line:?}");
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), CONTROLS);
    }

    #[test]
    fn text_without_control_characters_is_not_copied() {
        assert!(matches!(escaped("vm 'vm-1'\nHint: ü"), Cow::Borrowed(_)));
    }
}
