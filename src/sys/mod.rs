//! The only home of `unsafe`: system calls that no safe crate wraps. One file each, with a safe function on top.

pub mod tun;
