//! create_stemcell, delete_stemcell.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value};

use super::Cpi;
use crate::cid::StemcellCid;
use crate::crash;
use crate::digest::Digest;
use crate::document;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::host::clock;
use crate::image;
use crate::image::import::{ImageSource, Import, answered};
use crate::image::qemu_img::QemuImg;
use crate::schema::{Property, SchemaError};
use crate::store::layout::{SCHEMA, STEMCELL_IMAGE};
use crate::store::record::{Format, Source};
use crate::store::{Phase, Rank, StemcellRecord, VmRecord, atomic};
use crate::units::Bytes;

document! {
    /// What a light stemcell's manifest says instead of carrying an image (format `qemu-light`).
    pub struct LightStemcell {
        /// The image, already on the host: qcow2 or raw. It stays the operator's; VMs are overlays of it.
        image_path: PathBuf;
        /// Its SHA-256, 64 hexadecimal digits.
        sha256: Digest;
    }
}

impl Property for Digest {
    const EXPECTED: crate::schema::Expected =
        crate::schema::Expected::text("a SHA-256 digest: 64 hexadecimal digits");

    fn from_json(value: &Value) -> Result<Self, SchemaError> {
        let digest = value.as_str().and_then(|text| text.parse().ok());
        digest.ok_or_else(|| SchemaError::value(Self::EXPECTED, value))
    }
}

/// The image a stemcell ends up with.
struct Image {
    format: Format,
    virtual_size: Bytes,
    /// The operator's file, for a light stemcell.
    path: Option<PathBuf>,
    /// What it was imported from, for a heavy one.
    source: Option<Source>,
}

impl Cpi {
    pub(super) fn import_stemcell(
        &self,
        image: &dyn ImageSource,
        properties: &Map<String, Value>,
    ) -> Result<StemcellCid> {
        let deadline = self.deadline("create_stemcell");
        self.can_be_everywhere(properties)?;
        self.store.prepare()?;
        self.clear_leftovers(deadline);
        let cid = self.new_cid::<StemcellRecord>()?;
        let lock = self.begin::<StemcellRecord>(Rank::Stemcell, &cid, deadline)?;
        let mut record = StemcellRecord {
            schema: SCHEMA,
            cid: cid.clone(),
            phase: Phase::Creating,
            created_at: clock::now(),
            format: Format::Raw,
            virtual_size: Bytes(0),
            image_path: None,
            pool: self.config.stemcell_pool.clone(),
            source: None,
            cloud_properties: properties.clone(),
            newer: Map::new(),
        };
        // Compressed data will take more, and the import tells if that does not fit.
        let takes = image.takes(deadline);
        let admitted = takes.and_then(|takes| {
            let need = Self::need_of_import(takes);
            self.admit(record.pool.as_deref(), need, deadline, || self.store.write(&record))
        });
        let made = admitted.and_then(|()| {
            let image = self.make_image(&record, image, properties, deadline)?;
            self.untold::<StemcellRecord>(&cid)?;
            record.phase = Phase::Ready;
            record.format = image.format;
            record.virtual_size = image.virtual_size;
            record.image_path = image.path;
            record.source = image.source;
            self.store.write(&record)?;
            self.settled(&cid)
        });
        match made {
            Ok(()) => Ok(cid),
            Err(error) => Err(self.undone::<StemcellRecord>(&cid, lock, error)),
        }
    }

    /// Whether no other host can have a directory for the same cid where this one has its images.
    ///
    /// # Errors
    /// [`ErrorKind::BadConfig`] if that pool is shared.
    fn can_be_everywhere(&self, properties: &Map<String, Value>) -> Result<()> {
        let is_light = properties.contains_key("image_path");
        let others = self.afar.as_ref().is_some_and(|afar| afar.everywhere);
        match self.config.stemcell_pool.as_deref() {
            Some(pool)
                if others
                    && !is_light
                    && self.store.pools().shared().any(|shared| shared == pool) =>
            {
                let message = format!(
                    "stemcell_pool: pool '{pool}' is shared, and the other hosts of the group get the same"
                );
                Err(Error::new(ErrorKind::BadConfig, message).hint(
                    "stemcells of a group are on each of its hosts: give each a stemcell_pool that it does not share",
                ))
            }
            _ => Ok(()),
        }
    }

    fn make_image(
        &self,
        stemcell: &StemcellRecord,
        source: &dyn ImageSource,
        properties: &Map<String, Value>,
        deadline: Instant,
    ) -> Result<Image> {
        if properties.contains_key("image_path") {
            let light = light_stemcell(properties)?;
            let allowed = self.afar.as_ref().map(|_| self.config.remote_callers.image_dirs.clone());
            return answered(&light.image_path.clone(), deadline, move || {
                light_image(&light, allowed.as_deref())
            })?;
        }
        let declared = declared_format(properties)?;
        let target = self
            .store
            .make_images_dir(&stemcell.cid, stemcell.pool.as_deref())?
            .join(STEMCELL_IMAGE);
        let size = source.size();
        if let Some(size) = size
            && let Some(other) = self.share_image(stemcell, source, size, &target, deadline)?
        {
            let StemcellRecord { format, virtual_size, source, .. } = other;
            return Ok(Image { format, virtual_size, path: None, source });
        }
        let mut shown = 0;
        let mut progress = |read: Bytes| {
            // One line for 256 MiB: the Director reads standard error byte by byte.
            if read.get() >> 28 > shown {
                shown = read.get() >> 28;
                tracing::info!(mib_read = read.get() >> 20, "importing");
            }
        };
        let qemu_img = QemuImg::new(&self.config.qemu.img_binary);
        let import = Import { source, declared, target: &target, qemu_img: &qemu_img, deadline };
        let imported = import.run(&mut progress)?;
        let source = size.map(|size| Source { sha256: imported.digest.to_string(), size });
        Ok(Image {
            format: imported.format,
            virtual_size: imported.virtual_size,
            path: None,
            source,
        })
    }

    /// Links `target` to the image of a stemcell that was made of the same file, so that both share one copy and each can
    /// be deleted without the other. Returns the other's record; `None` if there is no such stemcell.
    fn share_image(
        &self,
        stemcell: &StemcellRecord,
        source: &dyn ImageSource,
        size: Bytes,
        target: &Path,
        deadline: Instant,
    ) -> Result<Option<StemcellRecord>> {
        let declared = declared_format(&stemcell.cloud_properties)?;
        let alike = |other: &StemcellRecord| {
            let same_file = other.source.as_ref().is_some_and(|source| source.size == size);
            let same_reading =
                declared_format(&other.cloud_properties).is_ok_and(|other| other == declared);
            other.phase == Phase::Ready && other.pool == stemcell.pool && same_file && same_reading
        };
        let others = self.store.list::<StemcellRecord>()?;
        let mut others: Vec<_> =
            others.iter().filter_map(|cid| self.store.read(cid).ok().flatten()).collect();
        others.retain(alike);
        if others.is_empty() {
            // Most often. A digest takes as long as an import.
            return Ok(None);
        }
        let sha256 = source.digest(deadline)?.to_string();
        for other in others
            .into_iter()
            .filter(|other| other.source.as_ref().is_some_and(|s| s.sha256 == sha256))
        {
            // Its image is whole as long as it is ready. Nobody who holds a ready stemcell waits for another.
            let lock = self.store.lock(Rank::Stemcell, &other.cid, deadline)?;
            if !self.store.find::<StemcellRecord>(&other.cid)?.is_some_and(|other| alike(&other)) {
                lock.unlink()?;
                continue;
            }
            let image =
                self.store.images_dir(&other.cid, other.pool.as_deref())?.join(STEMCELL_IMAGE);
            match std::fs::hard_link(&image, target) {
                Ok(()) => {
                    crash::point!("another stemcell's image linked");
                    atomic::sync_dir(target.parent().expect("an image is in a directory"))?;
                    tracing::info!(cid = %stemcell.cid, with = %other.cid, "the image is here already and is shared");
                    return Ok(Some(other));
                }
                Err(error) => {
                    tracing::warn!(%error, image = %image.display(), "can not share the image: importing")
                }
            }
        }
        Ok(None)
    }

    /// Removes a stemcell. VMs made of it keep the image: each has a link of its own (`store::layout`).
    pub(super) fn remove_stemcell(&self, cid: &StemcellCid) -> Result<()> {
        if !atomic::entry_exists(&self.store.stemcell_dir(cid))
            && !self.store.has_lock(Rank::Stemcell, cid)
        {
            return self.store.ensure_mounted();
        }
        let lock = self.store.lock(Rank::Stemcell, cid, self.deadline("delete_stemcell"))?;
        if let Some(mut record) = self.store.find::<StemcellRecord>(cid)? {
            self.tell_users(&record)?;
            record.phase = Phase::Deleting;
            self.store.write_deleting(&record)?;
        }
        self.store.remove::<StemcellRecord>(cid)?;
        lock.unlink()
    }

    /// Says who keeps the image: it goes when the last of them does.
    fn tell_users(&self, stemcell: &StemcellRecord) -> Result<()> {
        let vms = self.store.list::<VmRecord>()?.into_iter().filter(|vm| {
            let record = self.store.find::<VmRecord>(vm);
            record.is_ok_and(|vm| vm.is_some_and(|vm| vm.stemcell == stemcell.cid))
        });
        let vms: Vec<_> = vms.map(|vm| vm.to_string()).collect();
        let image =
            self.store.images_dir(&stemcell.cid, stemcell.pool.as_deref())?.join(STEMCELL_IMAGE);
        // A light stemcell's image is the operator's, in any case.
        let links = image.metadata().map_or(0, |meta| meta.nlink().saturating_sub(1));
        if links > 0 || !vms.is_empty() {
            let vms = vms.join(", ");
            tracing::info!(cid = %stemcell.cid, vms, links, "the image stays until nobody uses it");
        }
        Ok(())
    }

    /// The record of a stemcell VMs can be made of.
    pub(super) fn stemcell(&self, cid: &StemcellCid) -> Result<StemcellRecord> {
        let record = self.store.find::<StemcellRecord>(cid)?.filter(|s| s.phase == Phase::Ready);
        record.ok_or_else(|| {
            Error::new(ErrorKind::StemcellNotFound, format!("there is no stemcell '{cid}'"))
                .hint("upload it again: `bosh upload-stemcell --fix`")
        })
    }
}

/// Both openstack variants advertise both formats; only `disk_format` says which one this is.
fn declared_format(properties: &Map<String, Value>) -> Result<Option<Format>> {
    match properties.get("disk_format").and_then(Value::as_str) {
        None => Ok(None),
        Some("qcow2") => Ok(Some(Format::Qcow2)),
        Some("raw" | "rawdisk") => Ok(Some(Format::Raw)),
        Some(_) => Err(Error::new(
            ErrorKind::BadRequest,
            "cloud_properties.disk_format: expected \"qcow2\" or \"raw\"",
        )
        .hint("use an openstack-kvm stemcell")),
    }
}

fn light_stemcell(properties: &Map<String, Value>) -> Result<LightStemcell> {
    let keys = ["image_path", "sha256"].iter().filter_map(|key| properties.get_key_value(*key));
    let given = Value::Object(keys.map(|(k, v)| (k.clone(), v.clone())).collect());
    LightStemcell::from_json(&given).map_err(|e| e.in_request("cloud_properties"))
}

/// The image of a light stemcell. It must be in one of the directories `allowed`, if there is such a list.
fn light_image(light: &LightStemcell, allowed: Option<&[PathBuf]>) -> Result<Image> {
    let path = light.image_path.canonicalize().at("resolve", &light.image_path);
    let is_in = |dir: &PathBuf| {
        let dir = dir.canonicalize().ok();
        dir.is_some_and(|dir| path.as_ref().is_ok_and(|path| path.starts_with(dir)))
    };
    if !allowed.is_none_or(|dirs| dirs.iter().any(is_in)) {
        // The same whatever is there: it is nothing that the caller may know.
        let message =
            "cloud_properties.image_path: in none of this host's 'remote_callers.image_dirs'";
        return Err(Error::new(ErrorKind::BadRequest, message)
            .hint("the host's operator decides what may be named"));
    }
    let path = path?;
    // First what it is: reading a pipe or a device would never end.
    let (format, virtual_size) = image::inspect(&path)?;
    light.sha256.ensure_matches(&path)?;
    Ok(Image { format, virtual_size, path: Some(path), source: None })
}
