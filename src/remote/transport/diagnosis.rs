//! What a failed ssh means: the cause and the operator's next step, from ssh's log, its exit status
//! and the standard error of the host's command.

use super::channel::ChannelFailure;

/// ssh exits with this status when ssh itself fails, whatever the host's command returned.
pub(super) const SSH_FAILED: i32 = 255;

/// Shells exit with this status when they do not find the command.
const COMMAND_NOT_FOUND: i32 = 127;

/// The most characters of one line that a message quotes.
const MAX_QUOTED: usize = 200;

const CHANGED_KEY: (&str, Option<&str>) = (
    "the host's key is not the one in 'host_key'",
    Some(
        "if the host was reinstalled, put its new key in 'host_key'; if not, another machine \
         answers at its address",
    ),
);

const CLOSED: (&str, Option<&str>) = (
    "the host closed the connection",
    Some("its sshd may have more unauthenticated connections than MaxStartups: raise it"),
);

/// A part of ssh's log, and its meaning. The first match counts.
const MEANINGS: [(&str, (&str, Option<&str>)); 12] = [
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", CHANGED_KEY),
    ("Host key verification failed", CHANGED_KEY),
    ("No ECDSA host key is known", ("the host has no key of the kind in 'host_key'", None)),
    (
        "Permission denied",
        (
            "the host refuses the key in 'private_key'",
            Some(
                "add its public half to the user's authorized_keys there: bosh-qemu-cpi host \
                 authorize prints the line",
            ),
        ),
    ),
    (
        "Load key",
        (
            "ssh cannot read the key in 'private_key'",
            Some("it must be a private key without a passphrase"),
        ),
    ),
    (
        "Connection refused",
        ("connection refused", Some("check that sshd runs there and listens on this port")),
    ),
    ("No route to host", ("no route to the host", None)),
    ("Network is unreachable", ("no route to the host", None)),
    (
        "timed out",
        (
            "the host does not answer",
            Some("check that the host is up and reachable from this network"),
        ),
    ),
    ("Could not resolve hostname", ("the host's name is unknown here", None)),
    ("reset by peer", CLOSED),
    ("Connection closed", CLOSED),
];

/// Returns what exit status `code`, ssh's `log` and the `stderr` of the host's command mean. `None`
/// if they show no failure.
pub(super) fn explain(code: Option<i32>, log: &str, stderr: &str) -> Option<ChannelFailure> {
    let failure = |cause: String, hint| Some(ChannelFailure { cause, hint });
    // "Load key" is a warning; the refusal that follows from it comes after it in the log.
    let unreadable = MEANINGS.iter().find(|(words, _)| *words == "Load key" && log.contains(words));
    let known = unreadable.or_else(|| MEANINGS.iter().find(|(words, _)| log.contains(words)));
    if let Some((_, (cause, hint))) = known {
        return failure((*cause).to_owned(), *hint);
    }
    match (code, last_line(stderr), last_line(log)) {
        (Some(COMMAND_NOT_FOUND), line, _) => {
            let line = line.map(|line| format!(": {line}")).unwrap_or_default();
            failure(
                format!("the program is not there{line}"),
                Some("install it: bosh-qemu-cpi host install"),
            )
        }
        (Some(0), ..) | (None, None, None) => None,
        (Some(SSH_FAILED), _, Some(log)) => failure(format!("ssh: {log}"), None),
        (Some(SSH_FAILED), ..) => failure("the connection broke".to_owned(), None),
        (_, Some(line), _) => failure(format!("the host reports: {line}"), None),
        (code, None, _) => code
            .and_then(|code| failure(format!("the host's command ended with status {code}"), None)),
    }
}

/// Returns the last line of `text` that is not blank, shortened, with control characters escaped.
fn last_line(text: &str) -> Option<String> {
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty())?;
    Some(line.chars().take(MAX_QUOTED).flat_map(char::escape_debug).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(code: i32, log: &str, stderr: &str) -> String {
        explain(Some(code), log, stderr).map(|failure| failure.cause).unwrap_or_default()
    }

    #[test]
    fn what_ssh_says_is_told_in_words_of_this_configuration() {
        let changed = "@@@@\r\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\r\n\
                       Host key verification failed.\r\n";
        assert_eq!(cause(255, changed, ""), "the host's key is not the one in 'host_key'");
        let refused = "root@h: Permission denied (publickey).\r\n";
        assert_eq!(cause(255, refused, ""), "the host refuses the key in 'private_key'");
        let bad = "Load key \"/proc/1/fd/3\": error in libcrypto\r\n\
                   root@h: Permission denied (publickey).\r\n";
        assert_eq!(cause(255, bad, ""), "ssh cannot read the key in 'private_key'");
        assert_eq!(
            cause(255, "ssh: connect to host h port 22: Connection refused\r\n", ""),
            "connection refused"
        );
        assert_eq!(cause(255, "something new\r\n", ""), "ssh: something new");
    }

    #[test]
    fn what_the_host_says_is_told_and_kept_on_one_line() {
        assert_eq!(
            cause(127, "", "bash: line 1: bosh-qemu-cpi: command not found\n"),
            "the program is not there: bash: line 1: bosh-qemu-cpi: command not found"
        );
        assert_eq!(cause(1, "", "\u{1b}[31mno\n"), "the host reports: \\u{1b}[31mno");
        assert_eq!(explain(Some(0), "", ""), None);
    }
}
