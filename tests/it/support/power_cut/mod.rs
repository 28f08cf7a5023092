//! Power cuts: what a call does to the filesystem, recorded, and what a power cut can leave of it.

pub mod filesystem_model;
pub mod recorder;

use std::path::PathBuf;
use std::sync::Arc;

/// One step of a call that changes names or contents, or makes a change durable. Paths are relative to the recorded
/// directory.
#[derive(Debug, Clone)]
pub enum Step {
    /// A new, empty file.
    Create(PathBuf),
    /// A new directory.
    MakeDir(PathBuf),
    /// A symbolic link with this text.
    Symlink(PathBuf, PathBuf),
    /// Another name of a file.
    Link(PathBuf, PathBuf),
    /// Another name instead of one.
    Rename(PathBuf, PathBuf),
    /// A name less, of a file, a link or a directory.
    Remove(PathBuf),
    /// Some of a file's content is another now.
    Write(PathBuf),
    /// A file is durable as it is, but for its names.
    Sync(PathBuf, Arc<Vec<u8>>),
    /// The names in a directory are durable.
    SyncDir(PathBuf),
}
