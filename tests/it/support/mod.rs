//! What the tests share.

pub mod answer;
pub mod crash;
pub mod doors;
pub mod filesystem;
pub mod frames;
pub mod host;
pub mod images;
pub mod lab;
mod leaks;
pub mod netns;
pub mod nftables;
pub mod power;
pub mod silent;
pub mod small;
pub mod world;

/// Says why a test does nothing here. A runner counts these lines.
#[allow(clippy::print_stderr)]
pub fn skip(reason: &str) {
    eprintln!("SKIP {}: {reason}", std::thread::current().name().unwrap_or("test"));
}
