//! The filter of a container whose specification has none.
//!
//! It has the effect of containerd's default: every call a program needs, and none that reaches a kernel facility
//! containers do not share fairly (keys, modules, clocks, swap, tracing across users). Calls that a capability guards
//! are let through with the capability. It is written as what is taken away from the calls known by name, so that
//! calls newer than that table are refused (`EPERM`) until somebody has looked at them.

use rustix::thread::CapabilitySet;

use super::syscalls;
use crate::container::spec::{Seccomp, SeccompArg, SeccompRule};

/// Never allowed: dead entry points, and kernel state without a namespace.
const REFUSED: &[&str] = &[
    "_sysctl",
    "add_key",
    "afs_syscall",
    "getpmsg",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "nfsservctl",
    "pivot_root",
    "putpmsg",
    "request_key",
    "security",
    "swapoff",
    "swapon",
    "sysfs",
    "tuxcall",
    "uselib",
    "userfaultfd",
    "ustat",
    "vserver",
];

/// Allowed with a capability.
const GUARDED: &[(CapabilitySet, &[&str])] = &[
    (CapabilitySet::DAC_READ_SEARCH, &["open_by_handle_at"]),
    (
        CapabilitySet::SYS_ADMIN,
        &[
            "bpf",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "name_to_handle_at",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "umount2",
            "unshare",
        ],
    ),
    (CapabilitySet::SYS_BOOT, &["reboot"]),
    (CapabilitySet::SYS_CHROOT, &["chroot"]),
    (
        CapabilitySet::SYS_MODULE,
        &["delete_module", "finit_module", "init_module"],
    ),
    (
        CapabilitySet::SYS_NICE,
        &[
            "get_mempolicy",
            "mbind",
            "migrate_pages",
            "move_pages",
            "set_mempolicy",
            "set_mempolicy_home_node",
        ],
    ),
    (CapabilitySet::SYS_PACCT, &["acct"]),
    (
        CapabilitySet::SYS_PTRACE,
        &[
            "kcmp",
            "pidfd_getfd",
            "process_madvise",
            "process_vm_readv",
            "process_vm_writev",
            "ptrace",
        ],
    ),
    (CapabilitySet::SYS_RAWIO, &["ioperm", "iopl"]),
    (
        CapabilitySet::SYS_TIME,
        &["clock_adjtime", "clock_settime", "settimeofday"],
    ),
    (CapabilitySet::SYS_TTY_CONFIG, &["vhangup"]),
];

/// Allowed with some arguments only; see [`profile`].
const BY_ARGUMENT: &[&str] = &["clone", "clone3", "personality", "socket"];

/// Namespace flags of `clone`.
const NAMESPACE_FLAGS: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP;

/// The default filter for a process with the bounding set `bounding`.
#[must_use]
pub fn profile(bounding: CapabilitySet) -> Seccomp {
    let guarded = |name: &str| {
        GUARDED
            .iter()
            .any(|(capability, names)| names.contains(&name) && !bounding.contains(*capability))
    };
    let names = syscalls::names()
        .filter(|name| !REFUSED.contains(name) && !BY_ARGUMENT.contains(name) && !guarded(name))
        .map(ToString::to_string)
        .collect();
    let mut syscalls = vec![allow(names, Vec::new())];
    // Linux, Linux with short reads of /proc (UNAME26 and ADDR_NO_RANDOMIZE are not among them), and asking.
    for personality in [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff] {
        syscalls.push(allow(vec!["personality".into()], vec![equal(0, personality)]));
    }
    // AF_VSOCK is the way to the host: no container needs it.
    let vsock = u64::from(libc::AF_VSOCK.cast_unsigned());
    syscalls.push(allow(
        vec!["socket".into()],
        vec![SeccompArg {
            op: "SCMP_CMP_NE".into(),
            is_int: true,
            ..equal(0, vsock)
        }],
    ));
    if bounding.contains(CapabilitySet::SYS_ADMIN) {
        syscalls.push(allow(vec!["clone".into(), "clone3".into()], Vec::new()));
    } else {
        let mask = u64::from(NAMESPACE_FLAGS.cast_unsigned());
        let no_namespaces = SeccompArg {
            index: 0,
            value: mask,
            value_two: 0,
            op: "SCMP_CMP_MASKED_EQ".into(),
            is_int: false,
        };
        syscalls.push(allow(vec!["clone".into()], vec![no_namespaces]));
        // Its flags lie in memory, out of a filter's reach. The C library falls back to clone on ENOSYS.
        syscalls.push(SeccompRule {
            names: vec!["clone3".into()],
            action: "SCMP_ACT_ERRNO".into(),
            errno_ret: Some(libc::ENOSYS.cast_unsigned()),
            args: Vec::new(),
        });
    }
    Seccomp {
        default_action: "SCMP_ACT_ERRNO".into(),
        default_errno_ret: None,
        syscalls,
    }
}

fn allow(names: Vec<String>, args: Vec<SeccompArg>) -> SeccompRule {
    SeccompRule {
        names,
        action: "SCMP_ACT_ALLOW".into(),
        errno_ret: None,
        args,
    }
}

fn equal(index: u8, value: u64) -> SeccompArg {
    SeccompArg {
        index,
        value,
        value_two: 0,
        op: "SCMP_CMP_EQ".into(),
        is_int: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(profile: &Seccomp, name: &str) -> bool {
        profile
            .syscalls
            .iter()
            .any(|rule| rule.action == "SCMP_ACT_ALLOW" && rule.names.iter().any(|known| known == name))
    }

    #[test]
    fn every_name_in_the_lists_exists() {
        let guarded = GUARDED.iter().flat_map(|(_, names)| names.iter());
        for name in REFUSED.iter().chain(guarded).chain(BY_ARGUMENT) {
            assert!(syscalls::number(name).is_some(), "{name}");
        }
    }

    #[test]
    fn capabilities_open_calls() {
        let plain = profile(CapabilitySet::empty());
        assert!(allows(&plain, "read") && allows(&plain, "execve"));
        assert!(!allows(&plain, "mount") && !allows(&plain, "clone3") && !allows(&plain, "keyctl"));
        let admin = profile(CapabilitySet::SYS_ADMIN);
        assert!(allows(&admin, "mount") && allows(&admin, "clone3") && !allows(&admin, "keyctl"));
    }

    #[test]
    fn it_compiles_to_a_short_program() {
        for bounding in [CapabilitySet::empty(), CapabilitySet::SYS_ADMIN] {
            let program = super::super::compile(&profile(bounding)).unwrap().unwrap();
            assert!(program.len() < 200, "{} instructions", program.len());
        }
    }
}
