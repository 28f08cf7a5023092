//! Owns one VM's QEMU process: starts it, records its events and exit, restarts it after a crash.
//!
//! Each VM has one supervisor process, `bosh-qemu-cpi supervise CID`. It goes through these states:
//!
//! ```text
//!     supervise CID                                      supervise CID --adopt
//!          │                                                      │
//!          ▼                                                      │
//!    ┌───────────┐  no record, not enough memory                  │
//!    │ Preparing ├──────────────────────────────┐                 │
//!    └─────┬─────┘                              │                 │
//!          │ supervisor.pid is locked           │                 │
//!          ▼                                    ▼                 │
//!    ┌───────────┐  cancelled, no boot slot ┌────────┐  no QEMU   │
//!  ┌►│  Queued   ├─────────────────────────►│ Failed │◄───────────┤
//!  │ └─────┬─────┘                          └────────┘            │
//!  │       │ boot slot acquired                 ▲                 │
//!  │       ▼                                    │                 │
//!  │ ┌───────────┐  cancelled, QEMU fails       │                 │
//!  │ │ Launching ├──────────────────────────────┘                 │
//!  │ └─────┬─────┘                                                │
//!  │       │ `cont`                                               │ monitor connected
//!  │       ▼                                                      │
//!  │ ┌───────────┐◄───────────────────────────────────────────────┘
//!  │ │  Running  │◄─┐ SIGTERM: press the power button until QEMU exits
//!  │ │           ├──┘ image filesystem full: wait for space, then `cont`
//!  │ └─────┬─────┘
//!  │       │ QEMU exits, exit.json is written
//!  │       ▼
//!  │ ┌───────────┐  powered off, stopped, deleted, crashed too often ┌───────┐
//!  │ │  Exited   ├──────────────────────────────────────────────────►│ Ended │
//!  │ └─────┬─────┘                                                   └───────┘
//!  │       │ crashed, `restart: on-crash`, record still wants this run
//!  │       ▼
//!  │ ┌───────────┐
//!  └─┤  BackOff  │ 1, 5 or 15 s; then the VM's lock is acquired
//!    └───────────┘
//! ```
//!
//! - **Preparing**: the supervisor locks `supervisor.pid`, reads the VM's record and checks that
//!   the host has the memory (`memory`).
//! - **Queued**: it waits for one of the host's boot slots (`boot_slots`).
//! - **Launching**: it enters the VM's control groups (`limits`), opens files and taps
//!   (`resources`), and starts QEMU with `-S` (`launch`). It checks QEMU and the VM's addresses
//!   (`address_probe`), then sends `cont`. Killing one process undoes everything before `cont`:
//!   taps are not persistent, sockets are in the run directory, and images are unchanged.
//! - **Failed**: QEMU is killed, its taps are closed, and the call gets the error. After the first
//!   launch the supervisor ends. A failed restart counts as a crash instead and goes to BackOff.
//! - **Running**: events go to `events.jsonl`, console output to `console.log` (`capped_log`). A
//!   guest that QEMU paused on a full filesystem continues once there is space (`enospc`).
//! - **Exited**: `exit.json` records how QEMU ended (`exit`). For a VM in deletion it is not
//!   written.
//! - **BackOff**: at most three restarts in ten minutes (`restart`). SIGTERM ends the supervisor.
//!
//! SIGTERM presses the power button of a running guest, because the host shuts down; in any other
//! state it ends the supervisor. SIGUSR1 cancels a launch and does nothing to a running guest.
//!
//! The contract with CPI calls is files, locks and QMP. The one exception is the launch: the call
//! that started the supervisor waits on a pipe for one line ([`StartResult`]). The supervisor owns
//! the taps, the console log and the exit record. It only reads `vm.json`, which calls write.
//!
//! QEMU outlives a supervisor that dies, and calls still work. Console log, exit record and restart
//! are missing until a call that changes the VM, or `host start`, starts a supervisor with
//! `--adopt`. Console output of that gap is lost. So is the exit status, which only a parent
//! process can read.

mod address_probe;
mod boot_slots;
mod capped_log;
mod daemon;
mod enospc;
mod exit;
mod launch;
mod limits;
mod memory;
mod power;
mod qemu_log;
mod qemu_process;
mod resources;
mod restart;
mod signals;
mod spawn;
mod status;

pub use boot_slots::count as boot_slots;
pub use daemon::{StartMode, report_failure, supervise};
pub use exit::{Ending, ExitRecord};
pub use memory::{ensure_memory, largest_vm};
pub use power::{PowerState, StopMode, cancel_launch, power_state, stop};
pub use resources::open_file;
pub use spawn::{Adoption, adopt, start};
pub use status::{State, Status, status};

use serde::{Deserialize, Serialize};

use crate::cid::VmCid;
use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::store::{Store, VmPaths};

/// The line that a supervisor sends once to the call that started it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartResult {
    /// The guest runs: QEMU executed `cont`, or an adopted QEMU answered.
    Running,
    /// The launch failed; none of its processes and taps remains.
    Failed {
        /// The error's kind, for the call to act on.
        kind: ErrorKind,
        /// The error's text, with its causes and hint.
        report: String,
    },
}

impl StartResult {
    fn failed(error: &Error) -> Self {
        Self::Failed { kind: error.kind(), report: error.report() }
    }
}

/// The VM that a supervisor is for, with the configuration and files it needs.
#[derive(Debug)]
pub struct VmContext {
    /// The configuration when the supervisor was started.
    pub config: Config,
    /// The store.
    pub store: Store,
    /// The VM.
    pub cid: VmCid,
    /// The VM's files.
    pub paths: VmPaths,
}

impl VmContext {
    /// Makes the context of the VM `cid` under `config`.
    pub fn new(config: Config, cid: VmCid) -> Self {
        let store = Store::from_config(&config);
        let paths = store.vm(&cid);
        Self { config, store, cid, paths }
    }
}
