//! The images of a new VM: its base, root and ephemeral disk, and config drive.

use std::collections::BTreeSet;

use serde_json::value::to_raw_value;

use crate::agent::{config_drive, settings};
use crate::cid::Cid;
use crate::cpi::context::Context;
use crate::cpi::contract::CreateVm;
use crate::cpi::properties::VmCloudProperties;
use crate::crash;
use crate::error::{Error, ErrorKind, Result};
use crate::host::uids;
use crate::image::UnsyncedFile;
use crate::image::qcow2::{self, Backing};
use crate::store::layout::{BASE_IMAGE, EPHEMERAL_IMAGE, ROOT_IMAGE, STEMCELL_IMAGE};
use crate::store::record::{Base, Format, StemcellRecord};
use crate::store::{Record, VmRecord, atomic, beneath};
use crate::units::Bytes;

/// Makes the images; [`sync`] makes them durable.
pub(super) fn make(
    cx: &Context,
    vm: &VmRecord,
    stemcell: &StemcellRecord,
    call: &CreateVm,
) -> Result<Vec<UnsyncedFile>> {
    if stemcell.image_path.is_none() {
        link_base(cx, vm, stemcell)?;
    }
    let dir = cx.store.make_images_dir(&vm.cid, vm.pool.as_deref())?;
    // For `qemu-img info` only: QEMU is given the base as a node of its own and ignores the header.
    let base = match vm.base.pool == vm.pool {
        true => vm.base.path.clone(),
        false => cx.store.base_image(vm)?,
    };
    let backing = Backing { file_name: &base.to_string_lossy(), format: vm.base.format };
    let mut made = vec![qcow2::create(&dir.join(ROOT_IMAGE), vm.root_size, Some(backing))?];
    if let Some(ephemeral) = &vm.ephemeral {
        let path = dir.join(EPHEMERAL_IMAGE);
        made.push(qcow2::create(&path, ephemeral.size.bytes(), None)?);
    }
    made.push(write_config_drive(cx, vm, call)?);
    Ok(made)
}

/// Gives the stemcell's image a second name in the VM's directory, so that delete_stemcell does not
/// take it away.
fn link_base(cx: &Context, vm: &VmRecord, stemcell: &StemcellRecord) -> Result<()> {
    let dir = cx.store.images_dir(&stemcell.cid, stemcell.pool.as_deref())?;
    let image = dir.join(STEMCELL_IMAGE);
    cx.store.make_images_dir(&vm.cid, vm.base.pool.as_deref())?;
    beneath::hard_link(&image, &cx.store.base_image(vm)?)?;
    crash::point!("stemcell's image linked");
    Ok(())
}

fn write_config_drive(cx: &Context, vm: &VmRecord, call: &CreateVm) -> Result<UnsyncedFile> {
    let networks = to_raw_value(&call.networks.for_agent())
        .map_err(|e| Error::new(ErrorKind::Internal, "write the networks as JSON").because(e))?;
    let input = settings::SettingsInput {
        agent_id: &vm.agent_id,
        vm: vm.cid.as_str(),
        networks: &networks,
        ephemeral: vm.ephemeral.as_ref().map(|ephemeral| ephemeral.serial.as_str()),
        env: call.env.get(),
    };
    let settings = settings::to_json(input, &cx.config.agent);
    config_drive::write(&cx.store.vm(&vm.cid).config_drive(), &settings)
}

/// Makes durable what the record in phase `ready` will name.
pub(super) fn sync(cx: &Context, vm: &VmRecord, images: Vec<UnsyncedFile>) -> Result<()> {
    images.into_iter().try_for_each(UnsyncedFile::sync)?;
    // The write of the record syncs the directory beside it.
    for pool in BTreeSet::from_iter(vm.pools()) {
        beneath::sync_dir(&cx.store.images_dir(&vm.cid, Some(pool))?)?;
    }
    // The pending note first: a reservation without one would keep the address until an operator
    // calls `gc`.
    atomic::sync_dir(&cx.store.pending_dir())?;
    uids::sync(cx.store.state_dir())?;
    cx.store.sync_reservations()
}

/// The base image of a VM's root disk: a light stemcell's own file, or a link to the imported
/// image.
pub(super) fn base_of(stemcell: &StemcellRecord) -> Base {
    match &stemcell.image_path {
        Some(path) => Base {
            path: path.clone(),
            pool: None,
            format: stemcell.format,
            verified: stemcell.verified.clone(),
        },
        None => Base {
            path: BASE_IMAGE.into(),
            pool: stemcell.pool.clone(),
            format: Format::Raw,
            verified: None,
        },
    }
}

/// The size of a VM's root disk: `root_disk`, but at least that of the stemcell's image.
pub(super) fn root_size(stemcell: &StemcellRecord, properties: &VmCloudProperties) -> Bytes {
    let image = stemcell.virtual_size;
    properties.root_disk.map_or(image, |asked| asked.bytes().max(image))
}
