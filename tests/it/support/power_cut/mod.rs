//! Power cuts: records what a call does to the filesystem, and computes what a power cut can leave.

pub mod filesystem_model;
pub mod recorder;

use std::path::PathBuf;
use std::sync::Arc;

/// One step of a call that changes names or contents, or makes a change durable. Paths are relative
/// to the recorded directory.
#[derive(Debug, Clone)]
pub enum Step {
    /// Creates an empty file.
    Create(PathBuf),
    /// Creates a directory.
    MakeDir(PathBuf),
    /// Creates a symbolic link: its target, its path.
    Symlink(PathBuf, PathBuf),
    /// Creates a hard link: the existing path, the new path.
    Link(PathBuf, PathBuf),
    /// Renames an entry: the old path, the new path.
    Rename(PathBuf, PathBuf),
    /// Removes a file, a link or a directory.
    Remove(PathBuf),
    /// Changes a part of a file's content.
    Write(PathBuf),
    /// Makes the content of a file durable, but not its names.
    Sync(PathBuf, Arc<Vec<u8>>),
    /// Makes the names in a directory durable.
    SyncDir(PathBuf),
}
