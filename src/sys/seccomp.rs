//! A seccomp filter for QEMU, below QEMU's own (`-sandbox`): it refuses system calls that no VM of
//! this program needs and that a broken QEMU could use against others.
//!
//! - socket, socketpair, connect, bind: world-writable unix sockets, AF_VSOCK, netlink. With the
//!   profile `user`, internet sockets are allowed.
//! - ioctls of links and of a tap's settings: a tap with the MAC of another VM makes the bridge
//!   forget that VM.
//! - bpf, perf_event_open, the key store, userfaultfd and others: parts of the kernel that had
//!   holes.
//! - ptrace, process_vm_readv and others: memory of other processes.
//! - new namespaces: a user namespace gives capabilities. clone3's flags are in memory that a
//!   filter cannot read; the C library then uses clone.
//!
//! A refused call fails with EPERM, clone3 with ENOSYS. A call of another architecture kills QEMU.
//! No filter sees the requests of io_uring.

use nix::libc::{self, sock_filter};

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const X86_64: u32 = 0xc000_003e;
/// From this number on, system calls are of the x32 ABI.
const X32_CALLS: u32 = 0x4000_0000;
/// Offsets in struct seccomp_data (linux/seccomp.h). An argument's low half comes first.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENT_0: u32 = 16;
const ARGUMENT_1: u32 = 24;

/// Type of KVM's ioctls, which vCPUs make all the time.
const KVM_TYPE: u32 = 0xae;
/// Type of the ioctls of links: `SIOCSIFHWADDR` and others.
const LINK_TYPE: u32 = 0x89;
/// ioctls that change a tap (linux/if_tun.h), and `TIOCSTI`, which types into a terminal. QEMU
/// makes other ones of a tap's: offload, header size, queues, send buffer.
const REFUSED_IOCTLS: [u32; 14] = [
    0x4004_54c9, // TUNSETDEBUG
    0x4004_54ca, // TUNSETIFF
    0x4004_54cb, // TUNSETPERSIST
    0x4004_54cc, // TUNSETOWNER
    0x4004_54cd, // TUNSETLINK
    0x4004_54ce, // TUNSETGROUP
    0x4004_54d1, // TUNSETTXFILTER
    0x4010_54d5, // TUNATTACHFILTER
    0x4010_54d6, // TUNDETACHFILTER
    0x4004_54da, // TUNSETIFINDEX
    0x8004_54e0, // TUNSETSTEERINGEBPF
    0x8004_54e1, // TUNSETFILTEREBPF
    0x4004_54e2, // TUNSETCARRIER
    0x5412,      // TIOCSTI
];

const REFUSED_CALLS: [libc::c_long; 36] = [
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_userfaultfd,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_vmsplice,
    libc::SYS_socketpair,
];

/// Flags of clone(2) for new namespaces: cgroup, uts, ipc, user, pid, net, mount.
const NEW_NAMESPACES: u32 = 0x7e02_0000;

/// The filter's program.
#[derive(Debug)]
pub(super) struct Filter(Vec<sock_filter>);

impl Filter {
    /// Makes the filter of a QEMU. With `keeps_network` it may make internet sockets.
    pub(super) fn new(keeps_network: bool) -> Self {
        let mut filter = Self(Vec::with_capacity(160));
        filter.load(ARCHITECTURE);
        filter.when(EQUAL, X86_64, 1, 0);
        filter.end(libc::SECCOMP_RET_KILL_PROCESS);
        filter.load(NUMBER);
        filter.refuse_if(AT_LEAST, X32_CALLS);
        // First, because vCPUs make them all the time.
        filter.on_call(libc::SYS_ioctl, |filter| {
            filter.load(ARGUMENT_1);
            filter.0.push(instruction(libc::BPF_ALU | libc::BPF_RSH, 8, 0, 0));
            filter.0.push(instruction(libc::BPF_ALU | libc::BPF_AND, 0xff, 0, 0));
            filter.when(EQUAL, KVM_TYPE, 0, 1);
            filter.end(libc::SECCOMP_RET_ALLOW);
            filter.refuse_if(EQUAL, LINK_TYPE);
            filter.load(ARGUMENT_1);
            for ioctl in REFUSED_IOCTLS {
                filter.refuse_if(EQUAL, ioctl);
            }
        });
        filter.on_call(libc::SYS_clone, |filter| {
            filter.load(ARGUMENT_0);
            filter.refuse_if(ANY_BIT, NEW_NAMESPACES);
        });
        filter.on_call(libc::SYS_clone3, |filter| filter.end(fail_with(libc::ENOSYS)));
        if keeps_network {
            filter.on_call(libc::SYS_socket, |filter| {
                filter.load(ARGUMENT_0);
                filter.when(EQUAL, libc::AF_INET as u32, 2, 0);
                filter.when(EQUAL, libc::AF_INET6 as u32, 1, 0);
                filter.end(fail_with(libc::EPERM));
            });
        } else {
            for call in [libc::SYS_socket, libc::SYS_connect, libc::SYS_bind] {
                filter.refuse_if(EQUAL, call as u32);
            }
        }
        for call in REFUSED_CALLS {
            filter.refuse_if(EQUAL, call as u32);
        }
        filter.end(libc::SECCOMP_RET_ALLOW);
        filter
    }

    /// Loads 32 bits of struct seccomp_data.
    fn load(&mut self, offset: u32) {
        self.0.push(instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0, 0));
    }

    /// Compares the loaded value, and skips `yes` or `no` instructions.
    fn when(&mut self, comparison: u32, value: u32, yes: u8, no: u8) {
        self.0.push(instruction(libc::BPF_JMP | comparison, value, yes, no));
    }

    fn end(&mut self, action: u32) {
        self.0.push(instruction(libc::BPF_RET, action, 0, 0));
    }

    fn refuse_if(&mut self, comparison: u32, value: u32) {
        self.when(comparison, value, 0, 1);
        self.end(fail_with(libc::EPERM));
    }

    /// Adds the instructions of one system call, which are allowed unless `check` refuses.
    fn on_call(&mut self, call: libc::c_long, check: impl FnOnce(&mut Self)) {
        let begin = self.0.len();
        self.when(EQUAL, call as u32, 0, 0);
        check(self);
        self.end(libc::SECCOMP_RET_ALLOW);
        self.0[begin].jf = u8::try_from(self.0.len() - begin - 1).expect("a short program");
    }

    /// Installs the filter for this thread and the program it starts. Makes only a system call.
    #[allow(unsafe_code)]
    pub(super) fn install(&self) -> std::io::Result<()> {
        let program =
            libc::sock_fprog { len: self.0.len() as u16, filter: self.0.as_ptr().cast_mut() };
        // SAFETY: the kernel reads the program and its instructions, both live, and changes
        // neither.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
        };
        if result == -1 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }
}

const EQUAL: u32 = libc::BPF_JEQ;
const AT_LEAST: u32 = libc::BPF_JGE;
const ANY_BIT: u32 = libc::BPF_JSET;

fn fail_with(errno: libc::c_int) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}
