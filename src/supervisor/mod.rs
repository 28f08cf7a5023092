//! One small process per VM: it starts QEMU, writes down what happens, and starts it again after a crash.
//!
//! ```text
//!                    ┌────────────── crash, restart allowed: back-off ──────────────┐
//!                    ▼                                                              │
//!  spawned ──► launching ──► running ──► QEMU gone ──► exit.json written ──► decide ┤
//!                 │ (-S … cont)   ▲ │                                               │
//!                 │               │ └ guest reboots: same process                   ▼
//!                 └─ failed: QEMU killed, taps gone, caller told             supervisor ends
//! ```
//!
//! - Before it launches, it asks whether the host has the memory (`memory`) and waits for its turn (`boot`). The
//!   VM's processes are in control groups with `limits`.
//! - The contract with CPI calls is files, locks and QMP. The one exception is the launch: the call that spawned us
//!   waits on a pipe for one line ([`Launched`]).
//! - While the guest waits for room on a full filesystem, it looks whether there is some (`full`).
//! - It owns the taps, the console log and the exit record. It only reads `vm.json`: calls write that.
//! - It dies without harm. QEMU lives on, calls still work; only log, exit record and restart are missing, until the
//!   next call that changes the VM, or `host start`, gives it a supervisor that adopts it. What it printed meanwhile
//!   is lost, and so is the exit status, which only a parent learns.
//! - All that happens before `cont` is undone by killing one process: taps are not persistent, sockets are in the run
//!   directory, images are untouched.

mod boot;
mod conflict;
mod console_log;
mod daemon;
mod exit;
mod full;
mod launch;
mod limits;
mod memory;
mod power;
mod resources;
mod restart;
mod spawn;
mod status;
mod watched;

pub use boot::slots as boot_slots;
pub use daemon::{Begin, refuse, supervise};
pub use exit::{Ending, ExitRecord};
pub use memory::{admit, largest_vm};
pub use power::{Button, PowerState, call_off, power_state, stop};
pub use resources::open_file;
pub use spawn::{Adoption, adopt, start};
pub use status::{State, Status, status};

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cid::VmCid;
use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::store::{Store, VmPaths};

/// The line a supervisor sends up the pipe once, when the guest runs or the launch failed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launched {
    /// `cont` was given.
    Running,
    /// Nothing of the launch is left.
    Failed {
        /// What a caller may act on.
        kind: ErrorKind,
        /// Why it failed, for a person.
        report: String,
    },
}

impl Launched {
    fn failed(error: &Error) -> Self {
        Self::Failed { kind: error.kind(), report: error.report() }
    }
}

/// What a supervisor works with.
#[derive(Debug)]
pub struct Scope {
    /// The configuration at the time it was spawned.
    pub config: Config,
    /// The store.
    pub store: Store,
    /// The VM.
    pub cid: VmCid,
    /// The VM's files.
    pub paths: VmPaths,
}

impl Scope {
    /// The scope of the VM `cid` under `config`.
    pub fn new(config: Config, cid: VmCid) -> Self {
        let store = Store::from_config(&config);
        let paths = store.vm(&cid);
        Self { config, store, cid, paths }
    }

    /// Moves `path` to `path.1`, so that a start begins with a file of its own.
    fn rotate(path: &PathBuf) {
        let mut old = path.clone().into_os_string();
        old.push(".1");
        // Absent at the first start; a log that can not be moved is appended to.
        let _ = std::fs::rename(path, old);
    }
}
