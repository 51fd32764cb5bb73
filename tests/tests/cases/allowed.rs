//! What the operator of the shared host allows: all of it is the guest's.

use anyhow::{Result, ensure};
use serde_json::json;
use tests::{pod::Pod, stage::Stage};

use super::SAY_HELLO;

pub(crate) fn what_is_allowed_is_the_guests_and_never_the_hosts(stage: &mut Stage) -> Result<()> {
    let tools = stage.tools();
    let host = &stage.host;
    let mount = |name: &str, path: &str| json!({ "name": name, "mountPath": path });
    let pod = Pod::new("open")
        .with("hostPID", json!(true))
        .with("hostNetwork", json!(true))
        .with(
            "securityContext",
            json!({ "sysctls": [
                { "name": "net.core.somaxconn", "value": "4242" },
                { "name": "vm.max_map_count", "value": "300000" },
                { "name": "net/ipv4/tcp_keepalive_time", "value": "77" },
            ] }),
        )
        .with(
            "volumes",
            json!([
                { "name": "root", "hostPath": { "path": "/" } },
                { "name": "lib", "hostPath": { "path": "/var/lib/common", "type": "DirectoryOrCreate" } },
            ]),
        )
        .container_with(
            "all",
            &tools,
            SAY_HELLO,
            json!({
                "securityContext": { "privileged": true },
                "volumeMounts": [mount("root", "/host"), mount("lib", "/common")],
            }),
        )
        .container_with(
            "plain",
            &tools,
            SAY_HELLO,
            json!({ "volumeMounts": [mount("lib", "/common")] }),
        );
    host.create(&pod)?;
    for (container, script, expected) in [
        (
            "all",
            "cat /proc/1/comm; [ -d /proc/2 ] && [ ! -s /proc/2/cmdline ] && echo kernel",
            "init\nkernel\n",
        ),
        (
            "all",
            "grep -E '^(CapEff|Seccomp):' /proc/self/status | tr -d '\\t'",
            "CapEff:000001ffffffffff\nSeccomp:0\n",
        ),
        (
            "plain",
            "grep -E '^(CapEff|Seccomp):' /proc/self/status | tr -d '\\t'",
            "CapEff:00000000a80425fb\nSeccomp:2\n",
        ),
        (
            "all",
            "cd /proc/sys; cat net/core/somaxconn vm/max_map_count net/ipv4/tcp_keepalive_time",
            "4242\n300000\n77\n",
        ),
        (
            "all",
            "echo 1 >/proc/sys/net/ipv4/ip_forward && mkdir /sys/fs/cgroup/mine && mount -t tmpfs x /tmp && echo writable",
            "writable\n",
        ),
        (
            "plain",
            "(echo 0 >/proc/sys/net/ipv4/ip_forward) 2>/dev/null || cat /proc/sys/net/ipv4/ip_forward",
            "1\n",
        ),
        (
            "all",
            "set -- /dev/vdb[0-9]*; [ -b $1 ] && [ -c /dev/kmsg ] && head -c 4096 $1 | wc -c",
            "4096\n",
        ),
        ("plain", "[ -e /dev/vda ] || echo none", "none\n"),
        (
            "all",
            "echo hello >/common/word; ls /host /host/var/lib",
            "/host:\nvar\n\n/host/var/lib:\ncommon\n",
        ),
        ("plain", "cat /common/word", "hello\n"),
        ("all", "hostname changed && echo done", "done\n"),
        ("plain", "hostname", "changed\n"),
    ] {
        let finished = host.exec("open", container, &["/bin/sh", "-c", script])?;
        ensure!(finished.stdout == expected, "{container}: {script}: {finished:?}");
    }
    // A process of the one is the other's to see.
    let seen = "grep -ls sleep /proc/[0-9]*/cmdline | wc -l";
    let seen = host.exec("open", "plain", &["/bin/sh", "-c", seen])?.success()?;
    ensure!(seen.trim().parse::<u32>()? >= 2, "{seen}");
    host.remove("open")
}
