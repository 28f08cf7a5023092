//! Kills a call at each of its crash points. A first run of the call reports its points.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use serde_json::Value;

use super::answer::{Answer, run};
use super::host::{Host, request};

/// A call that was killed, or whose supervisor was killed.
pub struct Crash<'a> {
    /// The crash point and the number of the passing: `qmp device_add: sent#1`.
    pub point: &'a str,
    /// The call's arguments.
    pub arguments: &'a Value,
    /// The answer of the call; `None` if the call was killed.
    pub answer: Option<Answer>,
}

/// Runs `method` once to learn its crash points, then once for each point, killed there.
///
/// `prepare` makes the objects of the call and returns its arguments. `check` inspects the host
/// afterwards, fails the test if the state is wrong, and describes it in a few words. Each point is
/// printed with that description.
///
/// The number of times that a call waits for its guest varies. A point that is not passed again is
/// left out.
pub fn for_each_crash_point(
    host: &Host,
    method: &str,
    prepare: impl Fn() -> Value,
    check: impl Fn(&Crash<'_>) -> String,
) {
    let (arguments, log) = (prepare(), host.path("crash-points"));
    let answer = call_with_crash(host, method, &arguments, [("LOG", log.to_str().unwrap())]);
    let points = first_two_and_last(take_passed_points(&log));
    assert!(points.len() > 1, "{method} has crash points: {points:?}");
    let width = points.iter().map(String::len).max().unwrap_or_default();
    print(&format!("{method}: killed at each of {} points", points.len()));
    print(&format!(
        "  {:width$}  {}",
        "nowhere",
        check(&Crash { point: "nowhere", arguments: &arguments, answer })
    ));
    let mut passings = 0;
    for point in points {
        let arguments = prepare();
        let answer = call_with_crash(
            host,
            method,
            &arguments,
            [("LOG", log.to_str().unwrap()), ("AT", &point)],
        );
        let passed = take_passed_points(&log).contains(&point);
        assert!(passed || answer.is_some(), "{method} died before {point}");
        // A supervisor's death does not kill the call.
        let is_of_call = !point.starts_with("supervisor: ");
        assert!(!(passed && is_of_call && answer.is_some()), "{method} was not killed at {point}");
        passings += usize::from(passed);
        let outcome = check(&Crash { point: &point, arguments: &arguments, answer });
        print(&format!("  {point:width$}  {}{outcome}", if passed { "" } else { "not passed; " }));
    }
    assert!(passings > 0, "{method} passed no crash point again");
}

#[allow(clippy::print_stdout)]
fn print(line: &str) {
    println!("{line}");
}

/// Reads and removes the log of passed crash points, each with the number of its passing.
pub fn take_passed_points(log: &Path) -> Vec<String> {
    let passed = numbered(&fs::read_to_string(log).unwrap());
    fs::remove_file(log).unwrap();
    passed
}

/// Keeps the first two passings and the last of each point. A loop that waits for a guest passes
/// its points many times.
fn first_two_and_last(mut points: Vec<String>) -> Vec<String> {
    let parts = |point: &str| {
        point
            .rsplit_once('#')
            .map(|(name, n)| (name.to_owned(), n.parse::<u32>().unwrap()))
            .unwrap()
    };
    let last: BTreeMap<_, _> = points.iter().map(|point| parts(point)).collect();
    points.retain(|point| {
        let (name, n) = parts(point);
        n <= 2 || n == last[&name]
    });
    points
}

/// Numbers the passings: `a b a` becomes `a#1 b#1 a#2`.
fn numbered(log: &str) -> Vec<String> {
    let mut times = BTreeMap::<&str, u32>::new();
    let number = |name| {
        let times = times.entry(name).or_default();
        *times += 1;
        format!("{name}#{times}")
    };
    log.lines().map(number).collect()
}

/// Makes a call with the variables `BOSH_QEMU_CPI_CRASH_<name>` set. Returns its answer, or `None`
/// if the call was killed.
pub fn call_with_crash<'a>(
    host: &Host,
    method: &str,
    arguments: &Value,
    variables: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Option<Answer> {
    let mut command = host.cpi();
    command.envs(
        variables.into_iter().map(|(name, value)| (format!("BOSH_QEMU_CPI_CRASH_{name}"), value)),
    );
    let output = host.namespace().run(|| run(command, request(method, arguments).as_bytes()));
    host.track_vms(&String::from_utf8_lossy(&output.stdout));
    (output.status.signal() != Some(nix::libc::SIGKILL)).then(|| Answer::of(&output))
}
