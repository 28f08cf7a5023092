//! Helpers that several tests share: hosts, networks, filesystems, faults and readers of answers.

pub mod answer;
pub mod crash_points;
pub mod disks;
pub mod filesystem;
pub mod frames;
pub mod host;
pub mod hung_filesystem;
pub mod images;
pub mod installation;
mod leaks;
pub mod netns;
pub mod nftables;
pub mod power_cut;
pub mod remote;
pub mod tmpfs;
pub mod topology;
pub mod vm_list;

/// Prints that the current test is skipped, and why. `./test` counts these lines.
#[allow(clippy::print_stderr)]
pub fn skip(reason: &str) {
    eprintln!("SKIP {}: {reason}", std::thread::current().name().unwrap_or("test"));
}
