//! Resource limits (getrlimit(2)): what calls, supervisors and QEMU run with, whatever limits their
//! caller has (`ulimit`, a unit's `LimitFSIZE=`, cron).
//!
//! A process inherits its caller's limits for life. So each process of this program sets all of
//! them, and QEMU gets them again before its exec. Without CAP_SYS_RESOURCE, as in a container, a
//! limit cannot exceed the caller's hard limit: it is as high as possible then, and the supervisor
//! logs it.

use nix::libc;

use super::signals;

/// The limit of a resource.
struct Limit {
    name: &'static str,
    resource: libc::c_uint,
    value: libc::rlim_t,
}

const NONE: libc::rlim_t = libc::RLIM_INFINITY;

/// Every limit that Linux has.
const LIMITS: [Limit; 16] = [
    limit("CPU", libc::RLIMIT_CPU, NONE),
    limit("FSIZE", libc::RLIMIT_FSIZE, NONE),
    limit("DATA", libc::RLIMIT_DATA, NONE),
    // The kernel's default. Without a limit the kernel's layout of the address space is predictable
    // (arch/x86/mm/mmap.c).
    limit("STACK", libc::RLIMIT_STACK, 8 << 20),
    // With 0 the kernel still pipes a core, and so a guest's secrets, to a program in
    // kernel.core_pattern. With 1 it dumps none at all (fs/coredump.c).
    limit("CORE", libc::RLIMIT_CORE, 1),
    limit("RSS", libc::RLIMIT_RSS, NONE),
    // Per uid, and root's is shared with the whole host. `confine` limits QEMU's own uid.
    limit("NPROC", libc::RLIMIT_NPROC, NONE),
    // Sixteen disks need 50 descriptors, and a guest cannot use more disks than it has hot-plug
    // slots.
    limit("NOFILE", libc::RLIMIT_NOFILE, 4096),
    // The kernel's default since Linux 5.16. io_uring needs some before Linux 5.12.
    limit("MEMLOCK", libc::RLIMIT_MEMLOCK, 8 << 20),
    limit("AS", libc::RLIMIT_AS, NONE),
    limit("LOCKS", libc::RLIMIT_LOCKS, NONE),
    // A POSIX timer or a queued signal takes one.
    limit("SIGPENDING", libc::RLIMIT_SIGPENDING, 4096),
    limit("MSGQUEUE", libc::RLIMIT_MSGQUEUE, 0),
    limit("NICE", libc::RLIMIT_NICE, 0),
    limit("RTPRIO", libc::RLIMIT_RTPRIO, 0),
    limit("RTTIME", libc::RLIMIT_RTTIME, NONE),
];

const fn limit(name: &'static str, resource: libc::c_uint, value: libc::rlim_t) -> Limit {
    Limit { name, resource, value }
}

/// Prepares this process: sets its limits, and has a write beyond a file size limit that stays fail
/// with EFBIG instead of ending the process. Forbids core dumps and other users' access to its
/// memory, which holds agent settings, env or keys (prctl(2), `PR_SET_DUMPABLE`). Must be called
/// first.
pub fn prepare_process() {
    let _ = set_all();
    let _ = signals::ignore_file_size_signal();
    let _ = nix::sys::prctl::set_dumpable(false);
}

/// Sets all limits, as high as this process may. Makes only system calls, so it can run between
/// fork and exec.
pub(super) fn set_all() -> std::io::Result<()> {
    LIMITS.iter().try_for_each(|limit| set(limit.resource, limit.value))
}

/// Sets the soft and the hard limit of `resource` to `value`, or to the hard limit if this process
/// may not exceed that. Makes only system calls.
pub(super) fn set(resource: libc::c_uint, value: libc::rlim_t) -> std::io::Result<()> {
    let both = |value| libc::rlimit { rlim_cur: value, rlim_max: value };
    let Err(error) = prlimit(resource, Some(&both(value)), None) else { return Ok(()) };
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(error);
    }
    let mut now = both(0);
    prlimit(resource, None, Some(&mut now))?;
    prlimit(resource, Some(&both(value.min(now.rlim_max))), None)
}

/// Returns the names and values of this process's limits that are lower than a VM needs.
pub fn unmet() -> Vec<(&'static str, u64)> {
    let value_of = |limit: &Limit| {
        let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        prlimit(limit.resource, None, Some(&mut now)).map_or(limit.value, |()| now.rlim_cur)
    };
    let values = LIMITS.iter().map(|limit| (limit, value_of(limit)));
    values.filter(|(limit, now)| *now < limit.value).map(|(limit, now)| (limit.name, now)).collect()
}

/// A raw system call, because the C library's wrappers differ in their types.
#[allow(unsafe_code)]
fn prlimit(
    resource: libc::c_uint,
    new: Option<&libc::rlimit>,
    old: Option<&mut libc::rlimit>,
) -> std::io::Result<()> {
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    let old = old.map_or(std::ptr::null_mut(), std::ptr::from_mut);
    // SAFETY: both pointers are null or to live values of struct rlimit64, whose layout x86-64's
    // struct rlimit has. The kernel reads the first and writes the second. Process 0 is this one.
    let result = unsafe { libc::syscall(libc::SYS_prlimit64, 0, resource, new, old) };
    if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
