//! Everything that acts on a real host: kernel, processes, files.

mod network;
mod release;
mod support;
