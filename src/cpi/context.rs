//! The input of every verb: configuration, state directory, caller.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use crate::cid::VmCid;
use crate::config::Config;
use crate::cpi::deadlines::default_timeout;
use crate::cpi::marker::Marker;
use crate::error::Result;
use crate::image::import::ImageSource;
use crate::store::{Phase, Record, Store};
use crate::supervisor::VmContext;

/// One call on this host.
pub struct Context {
    /// The configuration, with the overrides of the call's `context`.
    pub config: Config,
    /// The file that the configuration was read from, which supervisors read again.
    pub config_file: Option<PathBuf>,
    /// The state directory.
    pub store: Store,
    /// Uuid of the Director that calls.
    pub director: Option<String>,
    /// What a CPI on another machine sends with the call that it forwards; `None` for a call made
    /// here.
    pub remote: Option<RemoteCall>,
    /// Marker of the object that this call has created.
    pub(super) marker: OnceLock<Marker>,
    /// When the call began.
    began: Instant,
}

/// What a CPI on another machine sends beside the request that it forwards.
#[derive(Default)]
pub struct RemoteCall {
    /// The cid of the object to create.
    pub cid: Option<String>,
    /// How many VMs of the new VM's group this host had when the scheduler chose it.
    pub same_group: Option<usize>,
    /// Whether other hosts create the same object under the same cid.
    pub replicated: bool,
    /// Whether this delete cancels a create that may not have begun.
    pub cancels: bool,
    /// The image for create_stemcell: the path in its request is one of the caller's machine.
    pub image: Option<Box<dyn ImageSource>>,
}

impl Context {
    /// A call under `config`, which was read from `config_file`. The deadline counts from here.
    pub fn new(config: Config, config_file: Option<PathBuf>) -> Self {
        let store = Store::from_config(&config);
        Self {
            config,
            config_file,
            store,
            director: None,
            remote: None,
            marker: OnceLock::new(),
            began: Instant::now(),
        }
    }

    /// The same call, made by the Director with this uuid.
    #[must_use]
    pub fn called_by(self, director: Option<&str>) -> Self {
        Self { director: director.map(str::to_owned), ..self }
    }

    /// The same call, forwarded by a CPI on another machine: it cannot name files of this one.
    #[must_use]
    pub fn remote(self, remote: RemoteCall) -> Self {
        Self { remote: Some(remote), ..self }
    }

    /// When the call of `method` must have ended.
    pub(crate) fn deadline(&self, method: &str) -> Instant {
        self.began + self.config.deadline(method, default_timeout(method))
    }

    /// The context of the VM's supervisor.
    pub(crate) fn vm_context(&self, cid: &VmCid) -> VmContext {
        VmContext::new(self.config.clone(), cid.clone())
    }

    /// The file that supervisors read the configuration from.
    pub(crate) fn config_file(&self) -> Option<&Path> {
        self.config_file.as_deref()
    }

    /// The record of an object that is complete and not being deleted.
    ///
    /// # Errors
    /// As [`Store::find`].
    pub(super) fn ready<R: Record>(&self, cid: &R::Cid) -> Result<Option<R>> {
        Ok(self.store.find::<R>(cid)?.filter(|record| record.phase() == Phase::Ready))
    }
}
