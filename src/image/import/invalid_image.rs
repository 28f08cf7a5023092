//! Why an image is not taken.

use crate::image::Format;
use crate::image::qcow2::HeaderError;
use crate::units::MiB;

/// What is wrong with a stemcell's image, and where. The source of the error that
/// [`import`](super::Import::run) returns for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidImage {
    /// The file has no byte: that is how light stemcells look.
    #[error("it is empty (0 bytes), as in a light stemcell")]
    Empty,
    /// A directory, a pipe, …
    #[error("it is no regular file")]
    NoFile,
    /// gzip does not decompress, or its checksum is wrong.
    #[error("its gzip data is damaged: {0}")]
    Gzip(String),
    /// Something ends before it should.
    #[error("{0} ends early: the file was cut off")]
    Truncated(&'static str),
    /// The tar structure is damaged.
    #[error("its tar archive is damaged: {0}")]
    Archive(String),
    /// A member's path leads out of the archive.
    #[error("the archive has a member '{0}' with an absolute path or '..'")]
    MemberPath(String),
    /// Links and devices have no business in an image archive.
    #[error("the archive has a member '{name}' that is a {kind}")]
    MemberKind {
        /// Its path.
        name: String,
        /// What it is.
        kind: &'static str,
    },
    /// Nothing in the archive is an image.
    #[error("the archive has neither 'root.img' nor 'disk.raw' at its top, but {0}")]
    NoImage(String),
    /// More than one.
    #[error("the archive has a second image, '{0}'")]
    TwoImages(String),
    /// What follows the end of the archive is no padding.
    #[error("there is something behind the end of the archive")]
    Trailing,
    /// An image, but one of another hypervisor, or compressed once more.
    #[error("it is {0}")]
    Foreign(&'static str),
    /// Neither qcow2 nor a disk, and nobody said that it is one.
    #[error("it is neither qcow2 nor a disk with a boot signature (55 aa at byte 510)")]
    Unknown,
    /// The stemcell says one format, the header another.
    #[error("it is said to be {declared}, but is {found}")]
    Declared {
        /// What was said.
        declared: Format,
        /// What is.
        found: Format,
    },
    /// The qcow2 header makes no sense or asks for what is not known.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A feature that would reach out of the image or hide its data.
    #[error("the qcow2 image {0}")]
    Feature(&'static str),
    /// The qcow2 tables contradict the file.
    #[error("the qcow2 image is damaged: {0}")]
    Damaged(String),
    /// A disk of no byte.
    #[error("its disk has no size")]
    NoSize,
    /// More than any disk here can have.
    #[error("its disk is larger than {}", MiB::MAX)]
    TooLarge,
    /// The same, within an archive's member.
    #[error("member '{name}': {problem}")]
    Member {
        /// Its path.
        name: String,
        /// What is wrong with it.
        problem: Box<InvalidImage>,
    },
}

impl InvalidImage {
    /// What the operator can do.
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::Empty => super::LIGHT_STEMCELL_HINT,
            Self::NoFile
            | Self::Gzip(_)
            | Self::Truncated(_)
            | Self::Archive(_)
            | Self::Trailing => "download the stemcell again and compare its checksum",
            Self::Declared { .. } => "correct disk_format in the stemcell's cloud_properties",
            Self::Member { problem, .. } => problem.hint(),
            _ => {
                "use an openstack-kvm stemcell: its image is a gzip tar around root.img, qcow2 or raw"
            }
        }
    }
}

/// A name out of an archive as it may stand in a message: cut, control characters escaped.
pub(super) fn printable(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(64).flat_map(char::escape_debug).collect()
}
