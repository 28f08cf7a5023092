//! Integration tests: the built binary from outside, everything that acts on a real host, and rules about the source.

mod contract;
mod door;
mod layers;
mod network;
mod release;
mod support;
