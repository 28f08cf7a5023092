//! How a persistent disk's image is made and opened: words of the disk's cloud properties, kept in its record.

use crate::choice;

choice! {
    /// Who caches a disk's writes, in QEMU's words. All keep what a guest flushed over a power cut; QEMU's `unsafe`,
    /// which does not, is no choice.
    #[derive(Default)]
    pub enum Cache ("\"none\", \"writeback\", \"directsync\" or \"writethrough\"") {
        /// Not the host's page cache. The guest flushes the disk's own cache.
        #[default]
        None = "none",
        /// The host's page cache. The guest flushes it.
        Writeback = "writeback",
        /// Nobody: each write is on the disk before the guest hears of it, past the host's page cache.
        Directsync = "directsync",
        /// As `directsync`, but the host's page cache serves reads.
        Writethrough = "writethrough",
    }
}

impl Cache {
    /// Whether the host's page cache is bypassed where the filesystem can (`cache.direct`).
    pub fn bypasses_page_cache(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether the guest sees a disk with a cache that it must flush (the device's `write-cache`). Otherwise QEMU flushes
    /// after each write.
    pub fn has_write_cache(self) -> bool {
        matches!(self, Self::None | Self::Writeback)
    }
}

choice! {
    /// What becomes of blocks the guest discards, in QEMU's words.
    #[derive(Default)]
    pub enum Discard ("\"unmap\" or \"ignore\"") {
        /// Their space goes back to the host; so does that of blocks written with zeros.
        #[default]
        Unmap = "unmap",
        /// Nothing.
        Ignore = "ignore",
    }
}

choice! {
    /// How much of an image is there before the guest writes, in QEMU's words.
    #[derive(Default)]
    pub enum Preallocation ("\"off\", \"metadata\", \"falloc\" or \"full\"") {
        /// Nothing: the image grows as the guest writes.
        #[default]
        Off = "off",
        /// qcow2's tables; the data's space is not reserved.
        Metadata = "metadata",
        /// All space is reserved, nothing is written.
        Falloc = "falloc",
        /// All space is written with zeros.
        Full = "full",
    }
}

impl Preallocation {
    /// Whether all space is the image's from the beginning.
    pub fn reserves_space(self) -> bool {
        matches!(self, Self::Falloc | Self::Full)
    }
}
