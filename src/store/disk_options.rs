//! Choices of how a persistent disk's image is made and opened. They come from its cloud properties
//! and are recorded.

use crate::choice;

choice! {
    /// QEMU's cache mode of a disk. In every mode, data that the guest flushed survives a power
    /// cut. QEMU's `unsafe` is not offered, because it loses such data.
    #[derive(Default)]
    pub enum Cache ("\"none\", \"writeback\", \"directsync\" or \"writethrough\"") {
        /// Bypasses the host's page cache. The guest flushes the disk's own cache.
        #[default]
        None = "none",
        /// Uses the host's page cache. The guest flushes it.
        Writeback = "writeback",
        /// Bypasses the host's page cache. QEMU flushes each write before it completes.
        Directsync = "directsync",
        /// Uses the host's page cache for reads. QEMU flushes each write before it completes.
        Writethrough = "writethrough",
    }
}

impl Cache {
    /// Whether QEMU bypasses the host's page cache (`cache.direct`, O_DIRECT), if the filesystem
    /// supports it.
    pub fn bypasses_page_cache(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether the guest's disk has a write cache that the guest must flush (the device's
    /// `write-cache`). Without it, QEMU flushes after each write.
    pub fn has_write_cache(self) -> bool {
        matches!(self, Self::None | Self::Writeback)
    }
}

choice! {
    /// QEMU's handling of blocks that the guest discards.
    #[derive(Default)]
    pub enum Discard ("\"unmap\" or \"ignore\"") {
        /// Frees their space on the host, and that of blocks the guest fills with zeros.
        #[default]
        Unmap = "unmap",
        /// Keeps their space.
        Ignore = "ignore",
    }
}

choice! {
    /// QEMU's preallocation of a new image.
    #[derive(Default)]
    pub enum Preallocation ("\"off\", \"metadata\", \"falloc\" or \"full\"") {
        /// None: the image grows as the guest writes.
        #[default]
        Off = "off",
        /// Writes qcow2's tables. Space for data is not reserved.
        Metadata = "metadata",
        /// Reserves all space with fallocate(2).
        Falloc = "falloc",
        /// Writes zeros to all of the image.
        Full = "full",
    }
}

impl Preallocation {
    /// Whether the new image occupies all of its space.
    pub fn reserves_space(self) -> bool {
        matches!(self, Self::Falloc | Self::Full)
    }
}
