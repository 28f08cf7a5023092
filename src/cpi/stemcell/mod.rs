//! Stemcells.

pub mod create;
