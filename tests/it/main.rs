//! Everything that acts on a real host: kernel, processes, files.

mod disks;
mod docs;
mod hostile;
mod lifecycle;
mod network;
mod supervisor;
mod support;
mod traces;
