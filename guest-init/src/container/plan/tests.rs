use proptest::prelude::*;

use super::*;
use crate::container::user;

fn places() -> Places {
    Places {
        rootfs: "/run/eci/containers/c1/rootfs".into(),
        identity_files: "/run/eci/etc".into(),
        devices: "/run/eci/containers/c1/devices".into(),
        termination_message: None,
    }
}

fn spec(json: &str) -> spec::Spec {
    serde_json::from_str(json).unwrap()
}

fn plan(json: &str) -> Result<Vec<String>> {
    let spec = spec(json);
    let program = init(&spec, &user::by_ids("", 0, 0, &[]), &places(), Stdio::Terminal)?;
    Ok(program.steps.iter().map(ToString::to_string).collect())
}

fn position(steps: &[String], step: &str) -> usize {
    steps
        .iter()
        .position(|text| text.starts_with(step))
        .unwrap_or_else(|| panic!("{step:?} is in {steps:#?}"))
}

const SMALL: &str = r#"{"process":{"args":["sh"],"cwd":"/","terminal":true}}"#;

#[test]
fn a_small_specification_gets_everything_a_program_expects() {
    let steps = plan(SMALL).unwrap();
    for step in [
        "mount proc at /proc",
        "mount tmpfs at /dev",
        "mount devpts at /dev/pts",
        "bind /dev/shm to /dev/shm",
        "mount mqueue at /dev/mqueue",
        "mount sysfs at /sys",
        "mount cgroup2 at /sys/fs/cgroup",
        "bind /dev/null to /dev/null",
        "make the symbolic link /dev/ptmx",
        "bind /run/eci/etc/hosts to /etc/hosts",
        "install the system call filter",
        "execute sh found through PATH",
    ] {
        position(&steps, step);
    }
}

#[test]
fn the_order_keeps_the_guest_out_of_reach() {
    let json = r#"{"process":{"args":["/bin/sh"],"cwd":"/w"},"root":{"readonly":true},
        "linux":{"maskedPaths":["/proc/kcore"],"readonlyPaths":["/proc/sys"],"sysctl":{"net.core.somaxconn":"1"}}}"#;
    let steps = plan(json).unwrap();
    let order = [
        "write \"1\" to /proc/sys/net/core/somaxconn",
        "make all mounts private",
        "open the root",
        "mount proc",
        "make the working directory /w",
        "open a terminal",
        "make /proc/sys read-only",
        "mask /proc/kcore",
        "make the root file system read-only",
        "change the root",
        "change to the working directory /w",
        "install the system call filter",
        "drop capabilities",
        "become user 0",
        "set capabilities",
        "execute /bin/sh",
    ];
    let positions: Vec<_> = order.iter().map(|step| position(&steps, step)).collect();
    assert!(positions.is_sorted(), "{steps:#?}");
}

#[test]
fn with_no_new_privileges_the_filter_comes_last() {
    let steps = plan(r#"{"process":{"args":["sh"],"cwd":"/","noNewPrivileges":true}}"#).unwrap();
    assert!(
        steps[steps.len() - 2].starts_with("install the system call filter"),
        "{steps:#?}"
    );
    assert!(
        steps[steps.len() - 3].starts_with("set no_new_privs"),
        "{steps:#?}"
    );
}

#[test]
fn namespaces_with_a_path_are_the_sandboxes() {
    let given = |json: &str| namespaces(&spec(json)).unwrap();
    let own = given(
        r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"uts"},{"type":"network"},{"type":"ipc"}]}}"#,
    );
    assert_eq!(own, libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS);
    let shared = given(r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#);
    assert_eq!(shared, libc::CLONE_NEWNS);
    assert!(namespaces(&spec(r#"{"linux":{"namespaces":[{"type":"user"}]}}"#)).is_err());
}

#[test]
fn bad_fields_are_named() {
    for (json, field) in [
        ("{}", "process is missing"),
        (r#"{"process":{"args":[],"cwd":"/"}}"#, "process.args"),
        (r#"{"process":{"args":["a"],"cwd":"w"}}"#, "process.cwd is \"w\""),
        (r#"{"process":{"args":["a\u0000"],"cwd":"/"}}"#, "process.args"),
        (
            r#"{"process":{"args":["a"],"cwd":"/","oomScoreAdj":2000}}"#,
            "process.oomScoreAdj is 2000",
        ),
        (
            r#"{"process":{"args":["a"],"cwd":"/","rlimits":[{"type":"RLIMIT_X","hard":1,"soft":1}]}}"#,
            "process.rlimits[0].type is \"RLIMIT_X\"",
        ),
        (
            r#"{"process":{"args":["a"],"cwd":"/"},"linux":{"sysctl":{"../x":"1"}}}"#,
            "linux.sysctl: \"../x\"",
        ),
        (
            r#"{"process":{"args":["a"],"cwd":"/"},"linux":{"maskedPaths":["proc"]}}"#,
            "linux.maskedPaths is \"proc\"",
        ),
    ] {
        let message = plan(json).unwrap_err().to_string();
        assert!(message.starts_with(field), "{json}: {message}");
    }
}

proptest! {
    #[test]
    fn no_path_leaves_the_root(path in "(/|\\.|\\.\\.|[a-c]){0,12}") {
        if let Some(parsed) = InRoot::parse(&path) {
            prop_assert!(path.starts_with('/'));
            let shown = parsed.to_string();
            prop_assert!(shown.split('/').all(|part| part != ".."), "{shown}");
        }
    }

    #[test]
    fn sysctls_stay_below_proc_sys(name in "[a-z./]{0,16}") {
        if let Ok(path) = sysctl_path(&name) {
            let path = path.to_str().unwrap().to_owned();
            prop_assert!(path.starts_with("/proc/sys/"));
            prop_assert!(path.split('/').skip(1).all(|part| !part.is_empty() && part != ".."), "{path}");
        }
    }
}
