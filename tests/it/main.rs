//! Integration tests: the built binary from outside, and rules about the source.

mod contract;
mod door;
mod layers;
mod support;
