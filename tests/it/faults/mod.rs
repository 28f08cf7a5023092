//! Injected faults: killed calls, power cuts, panics, damage, hung and full filesystems, many
//! callers.

mod call_crash_points;
mod concurrency;
mod copy_crash_points;
mod damaged_files;
pub mod damaged_records;
mod deadlines;
mod enospc;
mod hostile_requests;
mod interrupted_callers;
mod panics;
mod power_cuts;
mod resource_limits;
mod state_directories;
