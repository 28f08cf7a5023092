//! Crash points: places where tests kill the process, as the end of a worker or a power cut would.
//!
//! `crash::point!("uid reserved")` stands after each step that another process can observe: a file
//! is made, a record is replaced, a QMP command is sent. Most points are in the few functions that
//! all such steps call, so a new verb gets its points without naming one. Points exist only in
//! builds with debug assertions; a release build contains neither points nor names.
//!
//! Two environment variables control them. Supervisors inherit both ([`environment`]); QEMU does
//! not:
//!
//! ```text
//! BOSH_QEMU_CPI_CRASH_LOG=<file>           appends the name of each point that the process reaches
//! BOSH_QEMU_CPI_CRASH_AT=<name>[#<n>][;…]  SIGKILL when one process reaches a point the n-th time;
//!                                          n is 1 if left out
//! ```
//!
//! The names of a supervisor's points begin with `supervisor: `.

/// A crash point. Takes the arguments of `format!`; a release build does not evaluate them.
macro_rules! point {
    ($($name:tt)+) => {{
        #[cfg(debug_assertions)]
        $crate::crash::reached(&format!($($name)+));
    }};
}
pub(crate) use point;

#[cfg(debug_assertions)]
pub use armed::{environment, reached};

/// Returns the variables that a supervisor inherits: none in a release build.
#[cfg(not(debug_assertions))]
pub fn environment() -> impl Iterator<Item = (&'static str, std::ffi::OsString)> {
    std::iter::empty()
}

#[cfg(debug_assertions)]
mod armed {
    use std::collections::BTreeMap;
    use std::ffi::OsString;
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::sync::{LazyLock, Mutex};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::getpid;

    const LOG: &str = "BOSH_QEMU_CPI_CRASH_LOG";
    const AT: &str = "BOSH_QEMU_CPI_CRASH_AT";

    static ROLE: LazyLock<&str> = LazyLock::new(|| {
        if std::env::args().any(|word| word == "supervise") { "supervisor: " } else { "" }
    });
    static PASSED: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

    /// Returns the variables that a supervisor inherits: those that control crash points.
    pub fn environment() -> impl Iterator<Item = (&'static str, OsString)> {
        [LOG, AT].into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)))
    }

    /// Records that the process is at the point `name`, and kills the process if a test asked for
    /// it.
    pub fn reached(name: &str) {
        let (log, at) = (std::env::var_os(LOG), std::env::var(AT).ok());
        if log.is_none() && at.is_none() {
            return;
        }
        let name = format!("{}{name}", *ROLE);
        if let Some(log) = log {
            let file = OpenOptions::new().create(true).append(true).open(log);
            file.and_then(|mut file| file.write_all(format!("{name}\n").as_bytes()))
                .expect("the log of crash points");
        }
        let passed = {
            let mut passed = PASSED.lock().expect("no panic");
            let times = passed.entry(name.clone()).or_default();
            *times += 1;
            *times
        };
        if at.is_some_and(|at| at.split(';').any(|at| parse(at) == (&name, passed))) {
            // Cannot fail: a process may always signal itself.
            let _ = kill(getpid(), Signal::SIGKILL);
        }
    }

    /// Splits `<name>[#<n>]` into the point's name and n.
    fn parse(at: &str) -> (&str, u32) {
        let numbered =
            at.rsplit_once('#').and_then(|(name, times)| Some((name, times.parse().ok()?)));
        numbered.unwrap_or((at, 1))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn parse_defaults_to_the_first_time() {
            assert_eq!(parse("uid reserved"), ("uid reserved", 1));
            assert_eq!(parse("uid reserved#3"), ("uid reserved", 3));
            assert_eq!(parse("supervisor: qmp cont: sent#12"), ("supervisor: qmp cont: sent", 12));
        }
    }
}
