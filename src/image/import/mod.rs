//! Imports a stemcell's `image` file: turns the file BOSH hands over into the sparse raw file that
//! VMs are based on.
//!
//! ```text
//!              ┌ gzip ┐  ┌ tar: root.img | disk.raw ┐  ┌ qcow2 ─▶ decode ─┐
//!  source ─────┤      ├──┤                          ├──┤                  ├──▶ .import-… ─▶ target
//!              └ none ┘  └ none                     ┘  └ raw ─────────────┘    sparse      rename,
//!         (a reader thread)     (this thread unpacks, decodes, writes)       mode 0600    0444
//! ```
//!
//! The import takes one pass and no third copy. Some qcow2 files cannot be decoded as a stream:
//! their tables lie behind their data, or they use zstd. Such a file is read a second time, into an
//! unnamed temporary file, which `qemu-img` checks and converts.
//!
//! The source is hostile: `LARGEST`, memory limits and the deadline bound every size in it, and
//! [`Import::grant`] the space. A failed import leaves no file; SIGKILL may leave the `.import-…`
//! file beside the target.

mod archive;
pub(super) mod header_check;
mod invalid_image;
mod output;
mod source;
mod stream;
#[cfg(test)]
mod tests;

use std::fs::{File, Permissions};
use std::io::{self, Cursor, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Instant;

pub use self::invalid_image::InvalidImage;
use self::invalid_image::{LARGEST, printable};
pub use self::output::Grant;
use self::output::Output;
pub use self::source::{ImageFile, ImageSource, read_by_deadline};
use crate::crash;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::qcow2::decode::{DecodeError, decode};
use crate::image::qcow2::map::mapped_size;
use crate::image::qcow2::{Header, HeaderError};
use crate::image::qemu_img::QemuImg;
use crate::image::{Format, parent_of};
use crate::store::beneath::{self, NewFile};
use crate::units::Bytes;

/// Called now and then with the number of bytes read from the source file.
pub type Progress<'a> = &'a mut dyn FnMut(Bytes);

/// An import to run.
#[derive(Clone, Copy)]
pub struct Import<'a> {
    /// The stemcell's `image`. Read during [`Import::run`] only.
    pub source: &'a dyn ImageSource,
    /// The format that the stemcell declares, if it declares one.
    pub declared: Option<Format>,
    /// The raw image to create. The file must not exist; its directory must.
    pub target: &'a Path,
    /// Converts images that cannot be decoded in one pass.
    pub qemu_img: &'a QemuImg,
    /// Asked for space before the image takes more than it granted, also for a temporary copy.
    pub grant: Grant<'a>,
    /// When the import fails with a timeout.
    pub deadline: Instant,
}

/// Result of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// The format of the target: raw, whatever the source was.
    pub format: Format,
    /// Virtual size: a multiple of 512 bytes.
    pub virtual_size: Bytes,
    /// SHA-256 of the source file, not of the target.
    pub digest: Digest,
}

impl Import<'_> {
    /// Runs the import. On success the target is complete and durable, with mode 0444; after an
    /// error it does not exist.
    ///
    /// # Errors
    /// - [`ErrorKind::BadRequest`] or [`ErrorKind::NotSupported`] with an [`InvalidImage`] as
    ///   source: the image is rejected.
    /// - [`ErrorKind::NoDiskSpace`], with the space the image may need where that is known.
    /// - [`ErrorKind::Timeout`] at the deadline.
    /// - [`ErrorKind::Conflict`] if the target exists. It is never overwritten: VMs may run on it.
    /// - [`ErrorKind::Host`] for every other failure.
    pub fn run(&self, progress: Progress<'_>) -> Result<Imported> {
        if self.target.symlink_metadata().is_ok() {
            return Err(self.already_exists());
        }
        let directory = parent_of(self.target);
        let new = beneath::create_new(&directory.join(beneath::temporary_name(".import-")))?;
        let output = Output::new(new.as_file(), self.grant);
        let done = match self.read(&output, progress) {
            Err(ImportError::NotStreamable(why)) => {
                tracing::info!("qemu-img converts '{}': {why}", self.source.name());
                self.convert(&new, output, progress)
            }
            done => done.map_err(|failure| self.error(failure, &output)),
        };
        let (size, digest) = done?;
        self.source.verify_digest(&digest)?;
        let virtual_size = Bytes(size.get().next_multiple_of(512));
        self.publish(new, virtual_size)?;
        Ok(Imported { format: Format::Raw, virtual_size, digest })
    }

    /// Reads the source once, from the file to the image in it.
    fn read(
        &self,
        output: &Output<'_>,
        progress: Progress<'_>,
    ) -> Result<(Bytes, Digest), ImportError> {
        stream::read(self.source, self.deadline, progress, |stream| {
            let block = read_up_to(stream, 512)?;
            let is_archive = archive::is_archive(&block);
            let mut content = Cursor::new(block).chain(stream);
            if is_archive {
                return archive::read(content, self.deadline, |member, size| {
                    self.import_image(member, Some(size), output)
                });
            }
            let size = self.import_image(&mut content, None, output)?;
            io::copy(&mut content, &mut io::sink())?;
            Ok(size)
        })
    }

    /// Imports the image `content`, a file of `size` bytes if the size is known.
    fn import_image(
        &self,
        content: &mut dyn Read,
        size: Option<Bytes>,
        output: &Output<'_>,
    ) -> Result<Bytes, ImportError> {
        let head = read_up_to(content, HEAD)?;
        if head.is_empty() {
            return Err(InvalidImage::NoSize.into());
        }
        let format = header_check::detect_format(&head, self.declared)?;
        let mut whole = Cursor::new(&head).chain(content);
        if format == Format::Raw {
            size.map_or(Ok(()), ensure_not_too_large)?;
            output.size.set(size);
            return self.copy_raw(&mut whole, output);
        }
        let header = header_check::check_qcow2_header(&head)?;
        ensure_not_too_large(header.virtual_size)?;
        size.map_or(Ok(()), |size| header.check_offsets(size.get()))?;
        output.size.set(Some(header.virtual_size));
        match output.spool {
            None => {
                let mut write = |offset, data: &[u8]| output.write(offset, data, self.target);
                decode(&header, whole, &mut write, self.deadline).map_err(decode_failure)?;
            }
            Some(spool) => self.spool(&mut whole, spool, output)?,
        }
        Ok(header.virtual_size)
    }

    fn copy_raw(&self, content: &mut dyn Read, output: &Output<'_>) -> Result<Bytes, ImportError> {
        let mut size = 0;
        let mut buffer = Vec::with_capacity(BUFFER_SIZE);
        loop {
            buffer.clear();
            content.take(BUFFER_SIZE as u64).read_to_end(&mut buffer)?;
            if buffer.is_empty() {
                return Ok(Bytes(size));
            }
            ensure_not_too_large(Bytes(size + buffer.len() as u64))?;
            output.write(size, &buffer, self.target)?;
            size += buffer.len() as u64;
        }
    }

    fn spool(
        &self,
        content: &mut dyn Read,
        mut spool: &File,
        output: &Output<'_>,
    ) -> Result<(), ImportError> {
        let mut buffer = vec![0; BUFFER_SIZE];
        loop {
            let count = content.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            io::Write::write_all(&mut spool, &buffer[..count])
                .at("write a temporary copy beside", self.target)?;
            output.take(count as u64)?;
        }
    }

    /// The second pass: `qemu-img` converts an image that the first pass could not decode.
    fn convert(
        &self,
        new: &NewFile,
        output: Output<'_>,
        progress: Progress<'_>,
    ) -> Result<(Bytes, Digest)> {
        // Frees the space that the first pass used.
        new.as_file().set_len(0).at("empty", new.path())?;
        let directory = parent_of(self.target);
        let spool = directory.join(beneath::temporary_name(".import-"));
        let spool = beneath::create_new(&spool)?.unnamed()?;
        let mut output = output;
        output.spool = Some(&spool);
        let (size, digest) =
            self.read(&output, progress).map_err(|failure| self.error(failure, &output))?;
        self.take_mapped(&spool, &output).map_err(|failure| self.error(failure, &output))?;
        let handle = || spool.try_clone().at("duplicate the temporary copy beside", self.target);
        // `qemu-img convert` reads zeros where a cluster lies beyond the end of a truncated file,
        // so check first.
        let found = self.qemu_img.check_file(handle()?, self.deadline)?;
        if found.corruptions > 0 {
            let reason = InvalidImage::Damaged(format!(
                "qemu-img check finds {} corruptions",
                found.corruptions
            ));
            return Err(self.error(reason.into(), &output));
        }
        let converted = self.qemu_img.convert_file(handle()?, new, self.deadline);
        converted.map_err(|error| self.error(ImportError::Failed(error), &output))?;
        Ok((size, digest))
    }

    /// Takes space for all data of the qcow2 file `spool`: `qemu-img` does not ask.
    fn take_mapped(&self, mut spool: &File, output: &Output<'_>) -> Result<(), ImportError> {
        let rewound = io::Seek::rewind(&mut spool).and_then(|()| read_up_to(&mut spool, HEAD));
        let head = rewound.at("read the temporary copy beside", self.target)?;
        let size = mapped_size(&Header::parse(&head)?, spool, self.deadline);
        Ok(output.take(size.map_err(decode_failure)?.get())?)
    }

    /// Gives the finished file its name, durably.
    fn publish(&self, new: NewFile, size: Bytes) -> Result<()> {
        let file = new.as_file();
        file.set_len(size.get()).at("set the size of", self.target)?;
        file.set_permissions(Permissions::from_mode(0o444)).at("protect", self.target)?;
        file.sync_all().at("fsync", self.target)?;
        crash::point!("image imported");
        if !new.publish(self.target)? {
            return Err(self.already_exists());
        }
        crash::point!("image published");
        beneath::sync_dir(parent_of(self.target)).inspect_err(|_| {
            // The import fails, so the target must not remain. The caller needs the first error
            // only.
            let _ = beneath::remove_file(self.target);
        })
    }

    fn already_exists(&self) -> Error {
        Error::new(
            ErrorKind::Conflict,
            format!("the image '{}' exists already", self.target.display()),
        )
    }

    /// Converts to the error that the caller gets.
    fn error(&self, failure: ImportError, output: &Output<'_>) -> Error {
        let source = self.source.name();
        match failure {
            ImportError::Invalid(reason) => {
                let hint = reason.hint();
                Error::new(reason.kind(), format!("the image '{source}' is refused"))
                    .because(reason)
                    .hint(hint)
            }
            ImportError::NotStreamable(why) => {
                Error::new(ErrorKind::Internal, format!("'{source}' must be read twice: {why}"))
            }
            ImportError::TimedOut => {
                let message = format!("import of '{source}' was stopped at its deadline");
                Error::new(ErrorKind::Timeout, message)
                    .hint("raise the seconds of create_stemcell in 'deadlines'")
            }
            ImportError::Failed(error) if error.kind() == ErrorKind::NoDiskSpace => {
                error.during(format!("import '{source}'")).hint(self.space_hint(output))
            }
            ImportError::Failed(error) => error.during(format!("import '{source}'")),
        }
    }

    /// The space the image may need, and the free space, counting the space this import uses as
    /// free.
    fn space_hint(&self, output: &Output<'_>) -> String {
        let directory = parent_of(self.target);
        let need = output
            .size
            .get()
            .map_or("as much as its data".to_owned(), |size| format!("up to {size}"));
        let used = [Some(output.raw), output.spool]
            .into_iter()
            .flatten()
            .filter_map(|file| file.metadata().ok());
        let used: u64 = used.map(|meta| meta.blocks() * 512).sum();
        match rustix::fs::statvfs(directory) {
            Ok(stat) => {
                let free = Bytes(stat.f_bavail.saturating_mul(stat.f_frsize).saturating_add(used));
                format!(
                    "the image needs {need}, '{}' has {} free",
                    directory.display(),
                    free.rounded()
                )
            }
            Err(_) => format!("the image needs {need} in '{}'", directory.display()),
        }
    }
}

/// Bytes read and written at once where data is only copied. A multiple of every block size, so
/// that holes stay aligned.
const BUFFER_SIZE: usize = 256 * 1024;

/// Bytes of a file in which its format and its qcow2 header lie.
const HEAD: u64 = Header::PREFIX as u64;

fn ensure_not_too_large(size: Bytes) -> Result<(), InvalidImage> {
    if size > LARGEST { Err(InvalidImage::TooLarge) } else { Ok(()) }
}

fn decode_failure(error: DecodeError) -> ImportError {
    match error {
        DecodeError::NotStreamable(why) => ImportError::NotStreamable(why),
        DecodeError::Damaged { .. } => InvalidImage::Damaged(error.to_string()).into(),
        DecodeError::Shared(at) => InvalidImage::SharedCluster(at).into(),
        DecodeError::TooManyClusters => {
            InvalidImage::Feature("has more than 16 million clusters with data").into()
        }
        DecodeError::Deadline => ImportError::TimedOut,
        DecodeError::Read(error) => error.into(),
        DecodeError::Write(error) => error.into(),
    }
}

/// Why an import failed.
#[derive(Debug)]
pub enum ImportError {
    /// The image is rejected.
    Invalid(InvalidImage),
    /// The image cannot be decoded in one pass.
    NotStreamable(&'static str),
    /// The deadline passed.
    TimedOut,
    /// The host failed.
    Failed(Error),
}

impl ImportError {
    fn in_member(self, name: &[u8]) -> Self {
        match self {
            Self::Invalid(reason) => Self::Invalid(InvalidImage::Member {
                name: printable(name),
                problem: Box::new(reason),
            }),
            other => other,
        }
    }
}

impl From<InvalidImage> for ImportError {
    fn from(reason: InvalidImage) -> Self {
        Self::Invalid(reason)
    }
}

impl From<HeaderError> for ImportError {
    fn from(error: HeaderError) -> Self {
        Self::Invalid(error.into())
    }
}

impl From<Error> for ImportError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Errors of the stream and of the tar crate that reads it. `stream::read` reports those of the
/// source itself.
impl From<io::Error> for ImportError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::UnexpectedEof => InvalidImage::Truncated("it").into(),
            _ => InvalidImage::Archive(error.to_string()).into(),
        }
    }
}

/// The first `length` bytes of `content`, fewer if it ends before.
fn read_up_to(content: &mut (impl Read + ?Sized), length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    content.take(length).read_to_end(&mut bytes)?;
    Ok(bytes)
}
