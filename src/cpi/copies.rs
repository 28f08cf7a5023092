//! Copying a disk into another image of another format, in another pool, … : by QEMU while a VM uses the disk, by us
//! while nobody does.
//!
//! A disk's record names the image in force and at most one other, the leftover. Exactly one write of the record makes
//! the copy the disk ([`DiskRecord::switch`]); before it the copy is the leftover, after it what the disk was:
//!
//! ```text
//!   in force   leftover     what                                   killed here, the next call on the disk …
//!   old        –
//!   old        new          the record names the copy              removes the copy
//!   old        new          the image is made, data is copied      ends the job, removes the copy
//!   old        new          ready; pending: I/O waits, the same    ends the job (I/O goes on), removes the copy
//!                           data is in both, durably
//!   new        old          the switch                             has the job finalized, removes the old
//!   new        old          finalized: QEMU works on the new       removes the old
//!   new        –
//! ```
//!
//! The copy has a note in `pending/`, so that any create is such a call, too: a guest whose I/O waits must not wait for
//! somebody to ask for this very disk.
//!
//! A VM that is off can be started while its disk is copied, and is on the old image then. The copy sees that in the end, when
//! it has the VM's lock again, and is given up.
//!
//! While a QEMU runs, it is asked which image its device is on: nodes are named after images, and that one is put in
//! force, whatever the record says. The VM's lock is kept from `pending` to the end, so that no QEMU starts on one image
//! while the record comes to name the other.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::json;

use super::Cpi;
use super::attachments::{DYING, grace, hot_disk, hot_image};
use super::resize::Place;
use super::space::need_of_full;
use crate::cid::{DiskCid, VmCid};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::image::qemu_img::{Existing, QemuImg};
use crate::qemu::{FileNeed, blockdev};
use crate::qmp::error::MonitorError;
use crate::qmp::hotplug::{self, HotDisk, HotplugError};
use crate::qmp::job;
use crate::qmp::monitor::Monitor;
use crate::qmp::query::QueryBlock;
use crate::store::record::{Discard, DiskImage, DiskRecord, Format};
use crate::store::{DiskKey, Guard, VmRecord, atomic};
use crate::supervisor::{PowerState, open_file, power_state};
use crate::units::{Bytes, MiB};
use crate::{crash, image};

/// What the job that copies a disk is for.
const COPY: &str = "copy";

impl Cpi {
    /// Whether the disk can become `next`, being `size` large then, as far as that can be known.
    pub(super) fn can_copy(
        &self,
        disk: &DiskRecord,
        next: &DiskRecord,
        size: MiB,
        deadline: Instant,
    ) -> Result<()> {
        if let Some(left) = &disk.inactive_image {
            let path = self.store.disk_image_at(&disk.cid, left)?;
            return Err(Error::new(
                ErrorKind::Host,
                format!("'{}' can not be removed", path.display()),
            )
            .hint("an earlier copy left it: see the log of this call"));
        }
        if next.encrypted {
            DiskKey::from_config(&self.config).create_if_missing(&self.store, deadline)?;
        }
        let need = self.need_of_update(disk, next, size)?;
        self.admit(next.pool.as_deref(), need, deadline, || Ok(()))
    }

    /// Makes the disk what `next` is: the same with another image, and whatever else is to change with it. The caller
    /// holds the disk's lock, and [`Self::can_copy`] was asked. Of a copy that fails nothing is left, and the disk is what it was.
    pub(super) fn copy_into(
        &self,
        disk: &mut DiskRecord,
        next: &DiskRecord,
        deadline: Instant,
    ) -> Result<()> {
        let image = next.current();
        let mut place = self.place(disk, deadline)?;
        let size = self.virtual_size(disk, &mut place)?;
        let named = DiskRecord { inactive_image: Some(image.clone()), ..disk.clone() };
        let need = self.need_of_update(disk, next, disk.size)?;
        self.note(&disk.cid)?;
        self.admit(image.pool.as_deref(), need, deadline, || self.store.write(&named))
            .or_else(|error| self.settled(&disk.cid).and(Err(error)))?;
        *disk = named;
        let dir = self.store.make_images_dir(&disk.cid, image.pool.as_deref());
        let copied =
            dir.and_then(|dir| self.make_disk_image(&dir, &image, size, deadline)).and_then(|()| {
                match place {
                    Place { vm: Some(vm), monitor: Some(monitor), lock } => {
                        self.start_mirror(monitor, disk, next)?;
                        // Others may use the VM meanwhile; the disk they can not.
                        drop(lock);
                        self.switch_live(disk, next, &vm, deadline)
                            .map_err(|error| self.ended(&vm.cid, error))
                    }
                    place => self.copy_offline(disk, next, place, deadline),
                }
            });
        // Settles a copy that failed as it does one that was killed, and after one that worked it removes the old image.
        let settled = self.settle_copy(disk, grace(deadline));
        copied.and(settled)
    }

    fn copy_offline(
        &self,
        disk: &mut DiskRecord,
        next: &DiskRecord,
        place: Place,
        deadline: Instant,
    ) -> Result<()> {
        let (from, to) = (self.store.disk_image(disk)?, self.store.disk_image(next)?);
        let source = image::Source::open(&from)?;
        // A VM that is off may be started meanwhile, on the old image.
        drop(place);
        let filled = self.fill(&from, &disk.current(), &to, &next.current(), deadline);
        // What is read of an image that changes is worth nothing, nor is what is said of it.
        source.unchanged().map_err(started)?;
        filled.and_then(|()| image::sync(&to))?;
        // Until the switch is done, no QEMU starts.
        let place = self.place(disk, deadline)?;
        if let Place { vm: Some(vm), monitor: Some(_), .. } = &place {
            let message = format!("VM '{}' was started while the disk was copied", vm.cid);
            return Err(started(Error::new(ErrorKind::Conflict, message)));
        }
        source.unchanged().map_err(started)?;
        self.switch(disk, next)
    }

    /// The one step between the old image and the new.
    fn switch(&self, disk: &mut DiskRecord, next: &DiskRecord) -> Result<()> {
        let switched = DiskRecord { inactive_image: Some(disk.current()), ..next.clone() };
        self.store.write(&switched)?;
        *disk = switched;
        Ok(())
    }

    /// Copies the data of the image `source` into the empty one `target`. Nobody may have either open.
    pub(super) fn fill(
        &self,
        from: &Path,
        source: &DiskImage,
        to: &Path,
        target: &DiskImage,
        deadline: Instant,
    ) -> Result<()> {
        let key = DiskKey::from_config(&self.config);
        let source = Existing {
            path: from,
            format: source.format,
            key: source.encrypted.then(|| key.path()),
        };
        let target =
            Existing { path: to, format: target.format, key: target.encrypted.then(|| key.path()) };
        QemuImg::new(&self.config.qemu.img_binary).fill(&source, &target, deadline)?;
        crash::point!("image converted");
        Ok(())
    }

    fn start_mirror(
        &self,
        mut monitor: Monitor,
        disk: &DiskRecord,
        next: &DiskRecord,
    ) -> Result<()> {
        let need = FileNeed::disk(&self.store, next)?;
        self.open_in_qemu(&mut monitor, &need, &disk.cid)?;
        let hot = hot_disk(disk);
        let mirror = json!({
            "job-id": hot.job(COPY), "device": hot.node, "target": need.node, "sync": "full",
            "auto-finalize": false, "auto-dismiss": false,
        });
        monitor.raw("blockdev-mirror", &mirror)?;
        Ok(())
    }

    /// Waits until both images are the same, and switches.
    fn switch_live(
        &self,
        disk: &mut DiskRecord,
        next: &DiskRecord,
        vm: &VmRecord,
        deadline: Instant,
    ) -> Result<()> {
        let job = hot_disk(disk).job(COPY);
        // At the deadline the job is looked at once more.
        let connect = || Monitor::connect(&self.store.vm(&vm.cid).qmp(), grace(deadline));
        drop(job::follow(
            &connect,
            &job,
            "ready",
            deadline,
            &mut progress(format!("copy of disk {}", disk.cid)),
        )?);
        // Most of it now: while the job is pending, the guest's I/O waits for the rest.
        image::sync(&self.store.disk_image(next)?)?;
        let (_lock, _) = self.locked_vm(&vm.cid, deadline)?;
        let mut monitor = connect()?;
        monitor.execute(&qmp::job_complete { id: job.clone() })?;
        job::wait(&mut monitor, &job, "pending", deadline)?;
        // QEMU has flushed what it wrote; the file's length and blocks are the filesystem's.
        image::sync(&self.store.disk_image(next)?)?;
        self.switch(disk, next)?;
        monitor.execute(&qmp::job_finalize { id: job.clone() })?;
        job::wait(&mut monitor, &job, "concluded", grace(deadline))?;
        Ok(job::dismiss(&mut monitor, &job)?)
    }

    /// Brings a copy of the disk, whose lock the caller holds, to one of its two ends. An image that can not be removed,
    /// in a pool that is not mounted, stays named by the record for the next call.
    pub(super) fn settle_copy(&self, disk: &mut DiskRecord, deadline: Instant) -> Result<()> {
        if disk.inactive_image.is_none() {
            return Ok(());
        }
        self.store.ensure_owned(disk)?;
        if let Some(vm) = disk.vm.clone() {
            self.settle_in_qemu(disk, &vm, deadline)
                .map_err(|e| e.during(format!("settle an earlier copy of disk '{}'", disk.cid)))?;
        }
        let left = disk.inactive_image.as_ref().expect("looked at above");
        let removed = self.store.disk_image_at(&disk.cid, left).and_then(|path| {
            atomic::remove_file(&path)?;
            crash::point!("old image removed");
            if left.pool.is_some() && left.pool != disk.pool {
                let dir = self.store.images_dir(&disk.cid, left.pool.as_deref())?;
                atomic::remove_dir(&dir)?;
            }
            Ok(())
        });
        if let Err(error) = removed {
            tracing::warn!(disk = %disk.cid, error = error.report(), "an image that is not used can not be removed yet");
            return self.store.write_owner_file(disk).and_then(|()| self.settled(&disk.cid));
        }
        disk.inactive_image = None;
        self.store.write_disk(disk)?;
        self.settled(&disk.cid)
    }

    fn settle_in_qemu(&self, disk: &mut DiskRecord, vm: &VmCid, deadline: Instant) -> Result<()> {
        let Some((_lock, mut monitor)) = self.running_vm(vm, deadline)? else { return Ok(()) };
        let left = disk.inactive_image.clone().expect("the caller looked");
        let hot = hot_image(&disk.cid, &left.node(&disk.cid));
        let job = hot.job(COPY);
        let is_switched = disk.generation == left.generation.wrapping_add(1);
        if is_switched && job::find(&mut monitor, &job)?.is_some_and(|job| job.status == "pending")
        {
            monitor.execute(&qmp::job_finalize { id: job.clone() })?;
            job::wait(&mut monitor, &job, "concluded", deadline)?;
        }
        job::end_all(&mut monitor, |id| id == job, deadline)?;
        if device_node(&mut monitor, &disk.cid)?.is_some_and(|node| node == hot.node) {
            disk.switch_image();
            self.store.write(disk)?;
        }
        let left = disk.inactive_image.as_ref().expect("switched or not");
        Ok(hotplug::close(&mut monitor, &hot_image(&disk.cid, &left.node(&disk.cid)), deadline)?)
    }

    /// The lock and the monitor of a VM that may be gone or off.
    pub(super) fn running_vm(
        &self,
        vm: &VmCid,
        deadline: Instant,
    ) -> Result<Option<(Guard, Monitor)>> {
        match self.locked_vm(vm, deadline) {
            Ok((lock, vm)) => Ok(self.monitor(&vm, deadline)?.map(|monitor| (lock, monitor))),
            Err(error) if error.kind() == ErrorKind::VmNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Why a copy by QEMU was not made: the end of its VM says more than that of its monitor.
    pub(super) fn ended(&self, vm: &VmCid, error: Error) -> Error {
        let is_gone = match power_state(&self.store.vm(vm)) {
            Ok(PowerState::On(qemu)) if error.kind() == ErrorKind::Host => {
                qemu.wait_exit(Instant::now() + DYING)
            }
            state => Ok(matches!(state, Ok(PowerState::Off))),
        };
        match is_gone {
            Ok(true) => error.during(format!("VM '{vm}' ended while its disk was copied")),
            _ => error,
        }
    }

    /// Has QEMU open the image `need`, for a job to write it.
    pub(super) fn open_in_qemu(
        &self,
        monitor: &mut Monitor,
        need: &FileNeed,
        disk: &DiskCid,
    ) -> Result<()> {
        let (opened, file) = open_file(&self.config, need.clone())?;
        let open = |monitor: &mut Monitor| -> Result<(), HotplugError> {
            let set = monitor.add_fd(file.as_fd(), &blockdev::opaque(&need.node, need.writable))?;
            for node in blockdev::nodes(&opened, set) {
                monitor.raw("blockdev-add", &node)?;
            }
            Ok(())
        };
        if need.encrypted { self.with_key(monitor, disk, open) } else { Ok(open(monitor)?) }
    }

    fn need_of_update(&self, disk: &DiskRecord, next: &DiskRecord, size: MiB) -> Result<Bytes> {
        // A mirror writes the holes of its source with zeros, which take space in a raw file that discards nothing.
        let writes_zeros =
            disk.vm.is_some() && next.format == Format::Raw && next.discard == Discard::Ignore;
        let full = if writes_zeros { need_of_full(size) } else { Bytes(0) };
        Ok(full.max(self.need_of_copy(
            &self.store.disk_image(disk)?,
            &disk.current(),
            &next.current(),
            size,
        )?))
    }

    /// What a copy of the image `source`, which is at `path`, needs at once when QEMU or `qemu-img` makes it.
    pub(super) fn need_of_copy(
        &self,
        path: &Path,
        source: &DiskImage,
        target: &DiskImage,
        size: MiB,
    ) -> Result<Bytes> {
        // Holes of a LUKS image are noise to who reads it, and nobody can make some in it: all of it is copied.
        let has_no_holes = |image: &DiskImage| image.encrypted && image.format == Format::Raw;
        let full = has_no_holes(source) || has_no_holes(target);
        let data = if full { need_of_full(size) } else { self.need_of_image(path, size)? };
        Ok(data.max(self.need_of_disk(size, target)))
    }

    /// What a thin copy of the image `path` of `size` needs at once: what that takes.
    pub(super) fn need_of_image(&self, path: &Path, size: MiB) -> Result<Bytes> {
        let taken = path.metadata().at("look at", path)?.blocks() * 512;
        Ok(Bytes(
            self.need_of_thin(size.bytes()).get().max(self.need_of_thin(Bytes(0)).get() + taken),
        ))
    }
}

/// The node on which the disk's device is now, if it has one.
fn device_node(monitor: &mut Monitor, disk: &DiskCid) -> Result<Option<String>, MonitorError> {
    let path = format!("/machine/peripheral/{disk}/virtio-backend");
    let devices = monitor.execute(&QueryBlock {})?;
    let device = devices.into_iter().find(|device| device.qdev.as_deref() == Some(&path));
    Ok(device.and_then(|device| device.inserted?.node_name))
}

/// What to do about a copy that a VM got in the way of.
pub(super) fn started(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Conflict => {
            error.hint("its VM was started: repeat the call, and QEMU makes the copy")
        }
        _ => error,
    }
}

/// Says on the log how far a copy is, once it takes longer.
pub(super) fn progress(what: String) -> impl FnMut(u64, u64) {
    every(Duration::from_secs(10), move |percent| tracing::info!(percent, "{what}"))
}

/// Has `say` hear how many percent are done, at most once in `interval`.
fn every(interval: Duration, mut say: impl FnMut(u64)) -> impl FnMut(u64, u64) {
    let mut said = Instant::now();
    move |done, of| {
        if said.elapsed() >= interval {
            said = Instant::now();
            say(done.saturating_mul(100).checked_div(of).unwrap_or(0));
        }
    }
}

/// The names of a copy's target in QEMU: no device has them.
pub(super) fn target(node: &str) -> HotDisk {
    HotDisk {
        device: blockdev::file_node(node),
        node: node.to_owned(),
        below: vec![blockdev::file_node(node)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_a_copy_is_is_said_now_and_then() {
        let said = |interval: Duration| {
            let mut said = Vec::new();
            let mut progress = every(interval, |percent| said.push(percent));
            for (done, of) in [(0, 200), (50, 200), (200, 200), (0, 0), (u64::MAX, u64::MAX)] {
                progress(done, of);
            }
            drop(progress);
            said
        };
        assert_eq!(said(Duration::ZERO), [0, 25, 100, 0, 1]);
        assert!(said(Duration::from_secs(3600)).is_empty());
    }
}
