//! Persistent disks in pools that several hosts reach: whose they are.
//!
//! Beside such a disk's images is one file, the mark. It says whose the disk is by its name, which a rename changes: the
//! filesystem lets one host do that, and of several one. It also has the disk's record, for the next host.
//!
//! ```text
//!   <pool>/<cid>/host-<id>     that host's, whatever a record elsewhere says
//!   <pool>/<cid>/moving-<id>   the same, but on its way to or from there: it is in use nowhere
//!   <pool>/<cid>/host-none     nobody's: the first host that is asked for the disk takes it
//!
//!   on A            in the pool      on B
//!   a record        host-<A>                       in use on A
//!   a record        moving-<A>                     A was asked to give it up
//!   –               moving-<A>                     killed here, A has it when it is asked again
//!   –               host-none                      anybody may have it
//!   –               moving-<B>                     killed here, B has it when it is asked again
//!   –               moving-<B>       a record
//!   –               host-<B>         a record      in use on B
//! ```
//!
//! A disk without a mark, of a version that made none, is its record's. Nobody opens an image of a disk that is another
//! host's: see [`Store::ensure_owned`].

use std::path::{Path, PathBuf};

use super::Store;
use super::atomic;
use super::record::{DiskRecord, Phase, Record};
use crate::cid::{Cid, DiskCid};
use crate::crash;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// How the name of a mark begins of a disk that is a host's.
const HOST: &str = "host-";
/// The same of one on its way.
const MOVING: &str = "moving-";
/// The mark of a disk that is nobody's.
const NOBODYS: &str = "host-none";
/// Where the state directory says which host it is to others.
const HOST_ID: &str = "host-id";

/// What to do with what is here of a disk whose image in force was given up or taken.
const OUTDATED: &str =
    "what is here of it is out of date: detach it from its VM, then `bosh-qemu-cpi gc` forgets it";
/// The same where that was an older image.
const NEWER: &str = "an update_disk had moved it out of that pool, and what is here is newer: delete it on that host, or \
                     remove its directory here by hand";

/// Whose a disk is, by its mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// Its record's: a version that made no marks made it, or it is being made.
    Unsaid,
    /// Nobody's.
    Nobodys,
    /// This host's.
    Ours,
    /// This host's, on its way to or from it.
    Moving,
    /// Another host's.
    Others,
}

/// A disk's directory in a shared pool, as it was when it was looked at.
struct Place<'a> {
    pool: &'a str,
    dir: PathBuf,
    /// The mark's file name, if there is one.
    mark: Option<String>,
    whose: Whose,
}

impl Place<'_> {
    /// Whether the image in force of the disk is here.
    fn is_in_force(&self, disk: &DiskRecord) -> bool {
        disk.pool.as_deref() == Some(self.pool)
    }

    /// What there is of the mark, in words.
    fn has(&self) -> String {
        format!("'{}' has '{}'", self.dir.display(), self.mark.as_deref().unwrap_or_default())
    }

    fn rename(&self, from: &str, to: &str) -> Result<bool> {
        let (from, to) = (self.dir.join(from), self.dir.join(to));
        match std::fs::rename(&from, &to) {
            Ok(()) => {}
            // Over a network, a rename may be told twice.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && to.exists() => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error).at("make", &to),
        }
        atomic::sync_dir(&self.dir)?;
        crash::point!("disk's mark renamed");
        Ok(true)
    }

    fn record(&self, mark: &str, cid: &DiskCid) -> Result<DiskRecord> {
        let path = self.dir.join(mark);
        let corrupt = |why: String| {
            Error::new(
                ErrorKind::Corrupt,
                format!("the disk's record '{}' can not be used: {why}", path.display()),
            )
            .hint("restore the file from a backup; nothing beside it was touched")
        };
        let text = std::fs::read(&path).at("read", &path)?;
        let record: DiskRecord = super::objects::understood(&text, cid).map_err(corrupt)?;
        let pool = Some(self.pool.to_owned());
        // Nothing uses it, and no call about it was cut short: nobody writes this down of any other disk.
        Ok(DiskRecord {
            vm: None,
            inactive_image: None,
            resize_target: None,
            phase: Phase::Ready,
            pool,
            ..record
        })
    }
}

impl Store {
    /// The shared pools that have a directory of the disk.
    fn places(&self, cid: &DiskCid) -> Result<Vec<Place<'_>>> {
        let mut places = Vec::new();
        for pool in self.pools().shared() {
            let dir = self.pools().dir(pool)?.join(cid);
            if atomic::entry_exists(&dir) {
                places.push(self.look(pool, dir)?);
            }
        }
        Ok(places)
    }

    /// The same of the pools that its record names. One that has no more than an image which is not used, and can not be
    /// looked at, is left out.
    fn places_of(&self, disk: &DiskRecord) -> Result<Vec<Place<'_>>> {
        let (named, mut places) = (disk.pools(), Vec::new());
        for pool in self.pools().shared().filter(|pool| named.contains(pool)) {
            match self.pools().dir(pool) {
                Ok(dir) => places.push(self.look(pool, dir.join(&disk.cid))?),
                Err(error) if disk.pool.as_deref() == Some(pool) => return Err(error),
                Err(_) => {}
            }
        }
        Ok(places)
    }

    fn look<'a>(&self, pool: &'a str, dir: PathBuf) -> Result<Place<'a>> {
        let mut marks = atomic::names(&dir)?;
        marks.retain(|name| is_mark(name));
        if marks.len() > 1 {
            let message =
                format!("'{}' says of more than one host that the disk is its own", dir.display());
            return Err(Error::new(ErrorKind::Corrupt, message)
                .hint("leave the file of the host that is to have it, and remove the others"));
        }
        let mark = marks.pop();
        let whose = match (&mark, self.known_marks()?) {
            (None, _) => Whose::Unsaid,
            (Some(mark), _) if mark == NOBODYS => Whose::Nobodys,
            (Some(mark), Some(ours)) if *mark == ours.host => Whose::Ours,
            (Some(mark), Some(ours)) if *mark == ours.moving => Whose::Moving,
            (Some(_), _) => Whose::Others,
        };
        Ok(Place { pool, dir, mark, whose })
    }

    /// Whether other hosts reach the images of the disk, whoever has it.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`].
    pub fn is_in_shared_pool(&self, cid: &DiskCid) -> Result<bool> {
        self.places(cid).map(|places| !places.is_empty())
    }

    /// Whether a disk without a record here can be had: it is nobody's, or on its way to or from this host.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`]: a pool that can not be looked at may have it.
    pub fn can_take(&self, cid: &DiskCid) -> Result<bool> {
        Ok(self
            .places(cid)?
            .iter()
            .any(|place| matches!(place.whose, Whose::Nobodys | Whose::Moving)))
    }

    /// Whether no other host has a disk that has no record here.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if one has it. Those of [`super::Pools::dir`].
    pub fn ensure_not_owned_elsewhere(&self, cid: &DiskCid) -> Result<()> {
        let places = self.places(cid)?;
        let Some(other) = places.iter().find(|place| place.whose == Whose::Others) else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Conflict,
            format!("disk '{cid}' is another host's: {}", other.has()),
        )
        .hint(format!(
            "ask that host; if it is gone for good, `bosh-qemu-cpi disk take {cid}` here"
        )))
    }

    /// Whether a disk that has a record here is this host's.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if it was given up or another host has taken it; [`ErrorKind::Corrupt`] if this host does not
    /// know any more who it is.
    pub fn ensure_owned(&self, disk: &DiskRecord) -> Result<()> {
        self.ensure_owned_in(disk, &self.places_of(disk)?)
    }

    fn ensure_owned_in(&self, disk: &DiskRecord, places: &[Place<'_>]) -> Result<()> {
        for place in places {
            let (cid, has) = (&disk.cid, place.has());
            let now = match place.whose {
                Whose::Unsaid | Whose::Ours | Whose::Moving => continue,
                Whose::Nobodys => "nobody's",
                Whose::Others if self.known_marks()?.is_none() => {
                    let file = self.host_id_file();
                    let message = format!(
                        "whose disk '{cid}' is can not be told: '{}' is missing",
                        file.display()
                    );
                    let hint = format!(
                        "{has}: if that is this host's, write what stands after the '-' into the file"
                    );
                    return Err(Error::new(ErrorKind::Corrupt, message).hint(hint));
                }
                Whose::Others => "another host's",
            };
            let hint = if place.is_in_force(disk) { OUTDATED } else { NEWER };
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("disk '{cid}' is {now} now: {has}"),
            )
            .hint(hint));
        }
        Ok(())
    }

    /// Whether a disk that has a record here is known not to be this host's any more.
    pub fn is_no_longer_owned(&self, disk: &DiskRecord) -> bool {
        self.ensure_owned(disk).is_err_and(|error| error.kind() == ErrorKind::Conflict)
    }

    /// Whether what is here of a disk that is not this host's any more is out of date. It is not, if a copy out of the pool
    /// had become the disk.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`].
    pub fn is_outdated(&self, disk: &DiskRecord) -> Result<bool> {
        let is_lost = |place: &Place<'_>| matches!(place.whose, Whose::Nobodys | Whose::Others);
        Ok(self.places_of(disk)?.iter().any(|place| place.is_in_force(disk) && is_lost(place)))
    }

    /// Whether a disk that has a record here was given up since that was written.
    ///
    /// # Errors
    /// Those of [`super::Pools::dir`].
    pub fn has_no_owner(&self, disk: &DiskRecord) -> Result<bool> {
        let is_free = |place: &Place<'_>| place.whose == Whose::Nobodys && place.is_in_force(disk);
        Ok(self.places_of(disk)?.iter().any(is_free))
    }

    /// Ends a move of this host's disk that was cut short: the disk stays. The caller holds its lock.
    ///
    /// # Errors
    /// As [`Self::ensure_owned`].
    pub fn cancel_move(&self, disk: &DiskRecord) -> Result<()> {
        let places = self.places_of(disk)?;
        self.ensure_owned_in(disk, &places)?;
        for place in places.iter().filter(|place| place.whose == Whose::Moving) {
            let ours = self.own_marks()?;
            place.rename(&ours.moving, &ours.host)?;
        }
        Ok(())
    }

    /// Notes in the shared pool where the image in force is, if it is in one, that the disk is this host's, and what it is.
    ///
    /// # Errors
    /// As [`Self::ensure_owned`].
    pub fn write_owner_file(&self, disk: &DiskRecord) -> Result<()> {
        let Some(pool) = disk.pool.as_deref().filter(|pool| self.pools().is_shared(pool)) else {
            return Ok(());
        };
        let ours = self.own_marks()?;
        self.cancel_move(disk)?;
        atomic::write_json(&self.pools().dir(pool)?.join(&disk.cid).join(ours.host), disk)
    }

    /// Writes the record of a disk that is whole, and for the next host beside its image in a shared pool. Durable when it
    /// returns.
    pub fn write_disk(&self, disk: &DiskRecord) -> Result<()> {
        self.write_owner_file(disk)?;
        self.write(disk)
    }

    /// Gives up a disk that nothing here uses, whose locks the caller holds: from then on it is nobody's, and not here.
    pub fn release(&self, disk: &DiskRecord) -> Result<()> {
        let metadata = self.disk_metadata(disk)?;
        // The record, too: what is beside it goes first.
        self.write_disk(&DiskRecord { vm: None, metadata, ..disk.clone() })?;
        let ours = self.own_marks()?;
        for place in self.places_of(disk)? {
            place.rename(&ours.host, &ours.moving)?;
        }
        self.remove_record::<DiskRecord>(&disk.cid)?;
        self.finish_release(&disk.cid)
    }

    /// Removes what this host alone has of a disk that is not its own any more.
    pub fn remove_local(&self, cid: &DiskCid) -> Result<()> {
        for pool in self.read::<DiskRecord>(cid)?.iter().flat_map(Record::pools) {
            if !self.pools().is_shared(pool) {
                atomic::remove_dir(&self.pools().dir(pool)?.join(cid))?;
            }
        }
        self.remove_record::<DiskRecord>(cid)
    }

    /// Makes a disk that is on its way to or from this host, without a record here, nobody's.
    pub fn finish_release(&self, cid: &DiskCid) -> Result<()> {
        for place in self.places(cid)?.iter().filter(|place| place.whose == Whose::Moving) {
            place.rename(&self.own_marks()?.moving, NOBODYS)?;
        }
        Ok(())
    }

    /// Makes a disk this host's that is nobody's. The caller holds its lock. Whether there was one.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] if another host was faster.
    pub fn take_unowned(&self, cid: &DiskCid) -> Result<bool> {
        let ours = self.own_marks()?;
        for place in self.places(cid)? {
            match place.whose {
                Whose::Nobodys => {
                    if !place.rename(NOBODYS, &ours.moving)? {
                        return Err(just_taken(cid));
                    }
                }
                Whose::Moving => {}
                Whose::Unsaid | Whose::Ours | Whose::Others => continue,
            }
            self.write(&place.record(&ours.moving, cid)?)?;
            return place.rename(&ours.moving, &ours.host);
        }
        Ok(false)
    }

    /// Makes a disk this host's, whosever it is, if `judge` has nothing against it, who is given its image: that host is gone
    /// for good. The caller holds its lock.
    ///
    /// # Errors
    /// [`ErrorKind::DiskNotFound`], [`ErrorKind::Corrupt`] if it can not be told what the disk is, and those of `judge`.
    pub fn take_from_lost_host(
        &self,
        cid: &DiskCid,
        judge: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let ours = self.own_marks()?;
        let places = self.places(cid)?;
        let Some(place) = places.first() else {
            let pools: Vec<_> = self.pools().shared().map(|pool| format!("'{pool}'")).collect();
            let message =
                format!("no shared pool has a disk '{cid}'; this host has [{}]", pools.join(", "));
            return Err(Error::new(ErrorKind::DiskNotFound, message)
                .hint("see 'pools' of its configuration"));
        };
        let unknown = |why: &str| {
            let message =
                format!("'{}' {why}, so nobody can tell what the disk is", place.dir.display());
            Error::new(ErrorKind::Corrupt, message).hint(
                "put the disk's record of the other host into this state directory, from a backup",
            )
        };
        let mark = place.mark.as_ref().ok_or_else(|| unknown("has no record of it"))?;
        let record = place.record(mark, cid)?;
        let mut images = atomic::names(&place.dir)?;
        images.retain(|name| !is_mark(name) && !name.starts_with(atomic::NEW));
        if places.len() > 1 || images != [record.image()] {
            let why = format!(
                "and other pools have [{}], not '{}' alone",
                images.join(", "),
                record.image()
            );
            return Err(unknown(&why));
        }
        judge(&place.dir.join(record.image()))?;
        // One of before must not be taken for that of a disk that is ours.
        self.remove_record::<DiskRecord>(cid)?;
        if *mark != ours.moving && !place.rename(mark, &ours.moving)? {
            return Err(just_taken(cid));
        }
        self.write(&record)?;
        place.rename(&ours.moving, &ours.host).map(drop)
    }

    /// The disks on their way to or from this host, in all shared pools that can be looked at.
    pub fn moving_disks(&self) -> Result<Vec<DiskCid>> {
        let Some(ours) = self.known_marks()? else { return Ok(Vec::new()) };
        let mut disks = Vec::new();
        for pool in self.pools().shared() {
            let Ok(dir) = self.pools().dir(pool) else { continue };
            let cids =
                atomic::names(dir)?.into_iter().filter_map(|name| DiskCid::parse(&name).ok());
            disks.extend(cids.filter(|cid| dir.join(cid).join(&ours.moving).exists()));
        }
        Ok(disks)
    }

    /// This host's marks, if it has an id.
    fn known_marks(&self) -> Result<Option<Marks>> {
        let path = self.host_id_file();
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.at("read", &path)?,
        };
        let id = text.trim();
        let hint = "write into it what stands after the '-' in the name of 'host-…' beside this host's disks in shared pools";
        match DiskCid::parse_generated(&format!("{}-{id}", DiskCid::PREFIX)) {
            Ok(_) => {
                Ok(Some(Marks { host: format!("{HOST}{id}"), moving: format!("{MOVING}{id}") }))
            }
            Err(_) => {
                Err(Error::new(ErrorKind::Corrupt, format!("'{}' is no host's id", path.display()))
                    .hint(hint))
            }
        }
    }

    /// The same. A host gets its id when it first needs one.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if disks here say that it had one.
    fn own_marks(&self) -> Result<Marks> {
        loop {
            if let Some(marks) = self.known_marks()? {
                return Ok(marks);
            }
            self.list_readable::<DiskRecord>()?
                .iter()
                .try_for_each(|disk| self.ensure_owned(disk))?;
            let random = DiskCid::random();
            let (_, id) = random.as_str().split_once('-').expect("a cid has a dash");
            atomic::write_once(&self.host_id_file(), format!("{id}\n").as_bytes())?;
        }
    }

    fn host_id_file(&self) -> PathBuf {
        self.state_dir().join(HOST_ID)
    }
}

/// The file names of one host's marks.
struct Marks {
    host: String,
    moving: String,
}

fn just_taken(disk: &DiskCid) -> Error {
    Error::new(ErrorKind::Conflict, format!("another host has just taken disk '{disk}'"))
        .hint("ask that host for it, or have BOSH repeat what it did")
}

fn is_mark(name: &str) -> bool {
    name.starts_with(HOST) || name.starts_with(MOVING)
}
