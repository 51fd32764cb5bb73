//! The filter of a container whose specification has none.
//!
//! It has the effect of containerd's default: every call a program needs, and none that reaches a kernel facility
//! containers do not share fairly (keys, modules, clocks, swap, tracing across users). Calls that a capability guards
//! are let through with the capability. It is written as what is taken away from the calls known by name, so that
//! calls newer than that table are refused (`EPERM`) until somebody has looked at them.

use std::collections::BTreeMap;

use rustix::thread::CapabilitySet;

use super::{
    bpf::{Action, Comparison, Condition, Rule, Rules},
    syscalls,
};

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

/// Allowed with some arguments only; see [`rules`].
const BY_ARGUMENT: &[&str] = &["clone", "clone3", "personality", "socket"];

/// Namespace flags of `clone`.
const NAMESPACE_FLAGS: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP;

/// For calls without a rule.
pub(super) const OTHERWISE: Action = libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned();

/// The rules for a process with the bounding set `bounding`. Made for every process: by number, without a name being
/// compared more often than it takes to find it.
pub(super) fn rules(bounding: CapabilitySet) -> Rules {
    let guarded = GUARDED
        .iter()
        .filter(|(capability, _)| !bounding.contains(*capability));
    let refused = REFUSED
        .iter()
        .chain(BY_ARGUMENT)
        .chain(guarded.flat_map(|(_, names)| *names));
    let mut rules: BTreeMap<_, _> = syscalls::numbers()
        .map(|number| (number, vec![allow_if(None)]))
        .collect();
    for number in refused.filter_map(|name| syscalls::number(name)) {
        rules.remove(&number);
    }
    let mut add = |name, rule| {
        let number = syscalls::number(name).expect("the calls named here are in the table");
        rules.entry(number).or_default().push(rule);
    };
    // Linux, Linux with short reads of /proc (UNAME26 and ADDR_NO_RANDOMIZE are not among them), and asking.
    for personality in [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff] {
        add(
            "personality",
            allow_if(Some(first(Comparison::Equal, personality, false))),
        );
    }
    // AF_VSOCK is the way to the host: no container needs it.
    let vsock = u64::from(libc::AF_VSOCK.cast_unsigned());
    add("socket", allow_if(Some(first(Comparison::NotEqual, vsock, true))));
    if bounding.contains(CapabilitySet::SYS_ADMIN) {
        add("clone", allow_if(None));
        add("clone3", allow_if(None));
    } else {
        let mask = u64::from(NAMESPACE_FLAGS.cast_unsigned());
        add(
            "clone",
            allow_if(Some(first(Comparison::MaskedEqual(mask), 0, false))),
        );
        // Its flags lie in memory, out of a filter's reach. The C library falls back to clone on ENOSYS.
        let action = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
        add(
            "clone3",
            Rule {
                conditions: Vec::new(),
                action,
            },
        );
    }
    rules
}

fn allow_if(condition: Option<Condition>) -> Rule {
    Rule {
        conditions: condition.into_iter().collect(),
        action: libc::SECCOMP_RET_ALLOW,
    }
}

/// A condition on the first argument.
fn first(comparison: Comparison, value: u64, is_int: bool) -> Condition {
    Condition {
        index: 0,
        comparison,
        value,
        is_int,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(rules: &Rules, name: &str) -> bool {
        rules
            .get(&syscalls::number(name).unwrap())
            .is_some_and(|rules| rules[0].action == libc::SECCOMP_RET_ALLOW)
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
        let plain = rules(CapabilitySet::empty());
        assert!(allows(&plain, "read") && allows(&plain, "execve") && allows(&plain, "socket"));
        assert!(!allows(&plain, "mount") && !allows(&plain, "clone3") && !allows(&plain, "keyctl"));
        let admin = rules(CapabilitySet::SYS_ADMIN);
        assert!(allows(&admin, "mount") && allows(&admin, "clone3") && !allows(&admin, "keyctl"));
    }

    #[test]
    fn it_compiles_to_a_short_program() {
        for bounding in [CapabilitySet::empty(), CapabilitySet::SYS_ADMIN] {
            let program = super::super::compile_default(bounding).unwrap();
            assert!(program.len() < 200, "{} instructions", program.len());
        }
    }
}
