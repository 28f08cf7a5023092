//! Why an image is rejected.

use crate::error::ErrorKind;
use crate::image::Format;
use crate::image::qcow2::HeaderError;
use crate::units::Bytes;

/// Hint for an image of 0 bytes.
pub(super) const LIGHT_STEMCELL_HINT: &str = "a light stemcell names an image that is already on \
     this host: set 'image_path' and 'sha256' in its cloud_properties";

/// Largest virtual size of an image, 1 TiB. The stemcell builder makes images of 5 GiB. Bounds the
/// time of an import whose holes or tables take no space.
pub(super) const LARGEST: Bytes = Bytes(1 << 40);

/// What is wrong with a stemcell's image. It is the source of the error that
/// [`Import::run`](super::Import::run) returns.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidImage {
    /// The file is empty, as the image of a light stemcell is.
    #[error("it is empty (0 bytes), as in a light stemcell")]
    Empty,
    /// A directory, a pipe, …
    #[error("it is not a regular file")]
    NoFile,
    /// gzip cannot decompress the data, or its checksum is wrong.
    #[error("its gzip data is damaged: {0}")]
    Gzip(String),
    /// The file, the archive or the gzip data is truncated.
    #[error("{0} ends early: the file is truncated")]
    Truncated(&'static str),
    /// The tar structure is damaged.
    #[error("its tar archive is damaged: {0}")]
    Archive(String),
    /// A member's path leads out of the archive.
    #[error("the archive has a member '{0}' with an absolute path or '..'")]
    MemberPath(String),
    /// A member is a link, a device or a pipe.
    #[error("the archive has a member '{name}' that is a {kind}")]
    MemberKind {
        /// Its path.
        name: String,
        /// Its file type.
        kind: &'static str,
    },
    /// No member is an image.
    #[error("the archive has neither 'root.img' nor 'disk.raw' at its top level, but {0}")]
    NoImage(String),
    /// More than one member is an image.
    #[error("the archive has a second image, '{0}'")]
    TwoImages(String),
    /// Data other than padding follows the end of the archive.
    #[error("the archive has data after its end")]
    Trailing,
    /// An image of another hypervisor, or one that is compressed a second time.
    #[error("it is {0}")]
    Foreign(&'static str),
    /// Neither qcow2 nor a disk with a boot signature, and the stemcell declares no format.
    #[error("it is neither qcow2 nor a disk with a boot signature (55 aa at byte 510)")]
    Unknown,
    /// The stemcell declares one format, the header has another.
    #[error("the stemcell declares format {declared}, but the image is {found}")]
    Declared {
        /// The format the stemcell declares.
        declared: Format,
        /// The format the header has.
        found: Format,
    },
    /// The qcow2 header is invalid or uses unknown features.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A qcow2 feature that refers to other files or hides the data.
    #[error("the qcow2 image {0}")]
    Feature(&'static str),
    /// The qcow2 tables contradict the file.
    #[error("the qcow2 image is damaged: {0}")]
    Damaged(String),
    /// The virtual size is zero.
    #[error("its virtual size is 0 bytes")]
    NoSize,
    /// The virtual size is above `LARGEST`.
    #[error("its virtual size is larger than {LARGEST}, and no stemcell's is")]
    TooLarge,
    /// Two entries of the qcow2 tables name the same cluster.
    #[error("two entries of the qcow2 image name the same cluster, at byte {0:#x}")]
    SharedCluster(u64),
    /// The image within an archive's member is invalid.
    #[error("member '{name}': {problem}")]
    Member {
        /// Its path.
        name: String,
        /// What is wrong with it.
        problem: Box<InvalidImage>,
    },
}

impl InvalidImage {
    /// The kind of the error: a valid image that no import supports, or an invalid one.
    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            Self::TooLarge | Self::SharedCluster(_) => ErrorKind::NotSupported,
            Self::Member { problem, .. } => problem.kind(),
            _ => ErrorKind::BadRequest,
        }
    }

    /// The operator's next step.
    pub(super) fn hint(&self) -> &'static str {
        match self {
            Self::Empty => LIGHT_STEMCELL_HINT,
            Self::NoFile
            | Self::Gzip(_)
            | Self::Truncated(_)
            | Self::Archive(_)
            | Self::Trailing => "download the stemcell again and compare its checksum",
            Self::Declared { .. } => "correct disk_format in the stemcell's cloud_properties",
            Self::Member { problem, .. } => problem.hint(),
            _ => {
                "use an openstack-kvm stemcell: its image is a gzipped tar with root.img, qcow2 \
                 or raw"
            }
        }
    }
}

/// A name from an archive, as shown in a message: 64 characters, control characters escaped.
pub(super) fn printable(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(64).flat_map(char::escape_debug).collect()
}
