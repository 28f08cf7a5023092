//! What `audit` reports and `gc` puts right.

mod disks;
mod networks;
mod vms;
