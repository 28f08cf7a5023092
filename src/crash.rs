//! Crash points: places where tests have a process die, as a killed worker or a power cut would.
//!
//! `crash::point!("uid claimed")` stands after every step that others can see: a file made, a record replaced, a QMP
//! command sent. Most stand in the few functions all such steps go through, so a new verb has its points without naming
//! one. They exist in builds with debug assertions only; a release build contains neither points nor names.
//!
//! Two variables steer them, handed down to supervisors ([`environment`]) and never to QEMU:
//!
//! ```text
//! BOSH_QEMU_CPI_CRASH_LOG=<file>         appends the name of each point that is passed
//! BOSH_QEMU_CPI_CRASH_AT=<name>[#<n>][;…]  SIGKILL at the n-th passing in one process, n = 1 if left out, or at another
//! ```
//!
//! Names of a supervisor's points begin with `supervisor: `.

/// A place to die. Takes what `format!` takes; evaluates nothing in a release build.
macro_rules! point {
    ($($name:tt)+) => {{
        #[cfg(debug_assertions)]
        $crate::crash::reached(&format!($($name)+));
    }};
}
pub(crate) use point;

#[cfg(debug_assertions)]
pub use armed::{environment, reached};

/// What of the environment a supervisor is to have: nothing.
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

    /// What of the environment a supervisor is to have.
    pub fn environment() -> impl Iterator<Item = (&'static str, OsString)> {
        [LOG, AT].into_iter().filter_map(|name| Some((name, std::env::var_os(name)?)))
    }

    /// The process is at the point `name`.
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
            // Never seen to fail: a process may always end itself.
            let _ = kill(getpid(), Signal::SIGKILL);
        }
    }

    /// A point's name and the passing that is meant.
    fn parse(at: &str) -> (&str, u32) {
        let numbered =
            at.rsplit_once('#').and_then(|(name, times)| Some((name, times.parse().ok()?)));
        numbered.unwrap_or((at, 1))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn the_first_passing_is_meant_unless_another_is_named() {
            assert_eq!(parse("uid claimed"), ("uid claimed", 1));
            assert_eq!(parse("uid claimed#3"), ("uid claimed", 3));
            assert_eq!(parse("supervisor: qmp cont: sent#12"), ("supervisor: qmp cont: sent", 12));
        }
    }
}
