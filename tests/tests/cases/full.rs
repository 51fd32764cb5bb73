//! A group of as many containers and volumes as there may be, some of which take all they can get.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::{
    host::{Host, TOKEN},
    nfs::{NfsServer, SERVER},
    pod::Pod,
    process,
    stage::Stage,
};

use super::SAY_HELLO;

const GROUP: &str = "full";
/// Containers that only answer.
const N_STEADY: usize = 13;
/// Containers that take without end, what they do when told to, and how they end; the others go on.
const HOGS: [(&str, &str, Option<&str>); 5] = [
    (
        "disk",
        "dd if=/dev/zero of=/v06/big bs=64k count=320 2>&1 | grep -c 'No space'",
        None,
    ),
    (
        "memory",
        "dd if=/dev/zero of=/dev/null bs=256M count=1",
        Some("OOMKilled"),
    ),
    // Each is charged to its container, whose memory is soon all used.
    (
        "forks",
        "mkfifo /tmp/f; while :; do read word </tmp/f & done 2>/dev/null",
        Some("OOMKilled"),
    ),
    // Thousands of them, held open until the group ends.
    (
        "files",
        "tail -s 100000 -f $(yes /dev/null | head -n 4000) </dev/null >/dev/null 2>&1 & \
         until [ $(awk '{print $1}' /proc/sys/fs/file-nr) -gt 4000 ]; do sleep 1; done",
        None,
    ),
    ("cpu", "(while :; do :; done) </dev/null >/dev/null 2>&1 &", None),
];

fn steady() -> impl Iterator<Item = (usize, String)> {
    (0..N_STEADY).map(|index| (index, format!("steady-{index}")))
}

/// The limit of a steady container, MiB: each has its own.
fn limit_mib(index: usize) -> usize {
    32 + index
}

/// What a container that takes all it can get may have, MiB.
const HOG_MIB: usize = 32;

fn resources(cpu: &str, mib: usize) -> Value {
    json!({ "limits": { "cpu": cpu, "memory": format!("{mib}Mi") } })
}

/// The volumes `v00` to `v19`, of every kind.
fn volumes() -> Vec<Value> {
    let labels = json!({ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } });
    let kinds = [
        (5, json!({ "emptyDir": {} })),
        (3, json!({ "emptyDir": { "sizeLimit": "16Mi" } })),
        (
            2,
            json!({ "emptyDir": { "medium": "Memory", "sizeLimit": "1Mi" } }),
        ),
        (3, json!({ "configMap": { "name": "conf" } })),
        (2, json!({ "secret": { "secretName": "login" } })),
        (1, json!({ "nfs": { "server": SERVER.to_string(), "path": "/" } })),
        (1, json!({ "downwardAPI": { "items": [labels.clone()] } })),
        (
            2,
            json!({ "projected": { "sources": [
                { "configMap": { "name": "conf" } }, { "secret": { "name": "login" } },
                { "downwardAPI": { "items": [labels] } } ] } }),
        ),
        (
            1,
            json!({ "flexVolume": { "driver": "alicloud/disk",
                "options": { "volumeSize": "20", "deleteWithInstance": "true" } } }),
        ),
    ];
    let all = kinds
        .into_iter()
        .flat_map(|(n, kind)| std::iter::repeat_n(kind, n));
    all.enumerate()
        .map(|(at, mut volume)| {
            volume["name"] = volume_name(at).into();
            volume
        })
        .collect()
}

fn volume_name(at: usize) -> String {
    format!("v{at:02}")
}

fn manifest(stage: &Stage) -> String {
    let volumes = volumes();
    let mounts: Vec<_> = (0..volumes.len())
        .map(|at| json!({ "name": volume_name(at), "mountPath": format!("/{}", volume_name(at)) }))
        .collect();
    let with_mounts = |cpu, mib| json!({ "resources": resources(cpu, mib), "volumeMounts": mounts });
    let mut pod = Pod::new(GROUP)
        .label("app", "full")
        .spec(json!({ "volumes": volumes }))
        .init_container(
            "first",
            &stage.tools(),
            "echo first > /v00/order",
            with_mounts("50m", HOG_MIB),
        )
        .init_container(
            "side",
            &stage.tools(),
            SAY_HELLO,
            json!({ "restartPolicy": "Always", "resources": resources("50m", HOG_MIB) }),
        );
    for (hog, ..) in HOGS {
        pod = pod.container_with(hog, &stage.tools(), SAY_HELLO, with_mounts("200m", HOG_MIB));
    }
    for (index, name) in steady() {
        let mut fields = with_mounts("50m", limit_mib(index));
        fields["readinessProbe"] = json!({ "exec": { "command": ["/bin/cat", "/v00/order"] }, "periodSeconds": 60, "timeoutSeconds": 60 });
        pod = pod.container_with(&name, &stage.tools(), SAY_HELLO, fields);
    }
    format!(
        "{}\n---\n{}\n---\n{}\n",
        pod.manifest(),
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "conf" }, "data": { "a": "1" } }),
        json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "login" }, "stringData": { "b": "2" } }),
    )
}

fn said(host: &Host, container: &str, script: &str) -> Result<String> {
    host.exec(GROUP, container, &["/bin/sh", "-c", script])?
        .success()
        .with_context(|| format!("run {script:?} in {container}"))
}

/// The status of one container.
fn status_of<'a>(group: &'a Value, name: &str) -> Result<&'a Value> {
    group["status"]["containers"]
        .as_array()
        .and_then(|all| all.iter().find(|status| status["name"] == name))
        .with_context(|| format!("no container {name} in {group}"))
}

/// A metric of a container, as port 10250 has it.
fn metric(text: &str, name: &str, container: &str) -> Result<f64> {
    let start = format!("{name}{{container=\"{container}\",namespace=\"default\",pod=\"{GROUP}\"}} ");
    text.lines()
        .find_map(|line| line.strip_prefix(&start)?.split(' ').next()?.parse().ok())
        .with_context(|| format!("no {start} in:\n{text}"))
}

fn scrape(host: &Host, what: &str) -> Result<String> {
    process::run(
        Command::new("curl")
            .args(["-sSk", "-H", &format!("Authorization: Bearer {TOKEN}")])
            .arg(format!("https://{}/metrics/{what}", host.kubelet())),
        b"",
    )?
    .success()
}

pub(crate) fn twenty_containers_and_volumes_bear_each_others_excesses(stage: &mut Stage) -> Result<()> {
    let server = NfsServer::start(stage.dir())?;
    std::fs::write(server.path("served"), "by a server\n").context("write a file on the server")?;
    let host = &stage.host;
    host.ecictl_with(&["create", "-f", "-"], manifest(stage).as_bytes())?
        .success()?;
    let before = host.wait_group(GROUP, "all probes to pass", |group| {
        steady().all(|(_, name)| status_of(group, &name).is_ok_and(|status| status["ready"] == true))
    })?;

    // Every volume is there, as what it is.
    let expected = "16384\n16384\n16384\n1024\n1024\n1\n1\n1\n2\n2\nby a server\napp=\"full\"\n12app=\"full\"\n12app=\"full\"\n20\n";
    let found = said(
        host,
        "steady-0",
        "for v in 05 06 07 08 09; do n=$(df -k /v$v | tail -1 | awk '{print $2}'); [ $n -le 16384 ] && [ $n -gt 14000 ] && n=16384; echo $n; done
         for v in 10 11 12; do cat /v$v/a; echo; done; for v in 13 14; do cat /v$v/b; echo; done; cat /v15/served
         cat /v16/labels; echo; for v in 17 18; do cat /v$v/a /v$v/b /v$v/labels; echo; done
         df -k /v19 | tail -1 | awk '{print int($2 / 1048576 + 0.9)}'
         for v in 00 01 02 03 04; do echo x > /v$v/steady || exit 1; done",
    )?;
    ensure!(found == expected, "the volumes say {found:?}, not {expected:?}");
    let found = said(
        host,
        "cpu",
        "cat /proc/sys/fs/file-max /proc/sys/kernel/pid_max; awk '/^Max processes/{print $3}' /proc/self/limits",
    )?;
    ensure!(
        found == "9223372036854775807\n4194304\nunlimited\n",
        "the guest's own bounds are {found:?}"
    );

    for (hog, script, reason) in HOGS {
        eprintln!("{GROUP}: {hog} takes all it can get");
        let ended = host.exec(GROUP, hog, &["/bin/sh", "-c", script])?;
        match reason {
            None => {
                ended.success().with_context(|| format!("run {hog}"))?;
            }
            Some(reason) => {
                let group = host.wait_group(GROUP, &format!("the end of {hog}"), |group| {
                    status_of(group, hog).is_ok_and(|status| status["state"]["Terminated"].is_object())
                })?;
                let end = &status_of(&group, hog)?["state"]["Terminated"];
                ensure!(end["reason"] == reason, "{hog} ended so: {end}");
            }
        }
        let answer = said(host, "steady-1", "echo here")?;
        ensure!(answer == "here\n", "after {hog}: {answer:?}");
    }

    // All others answer beside the one that still spins, within their own limits, and were never touched.
    for (index, name) in steady() {
        let found = said(host, &name, "cat /sys/fs/cgroup/memory.max /v00/order")?;
        let limit = limit_mib(index) << 20;
        ensure!(found == format!("{limit}\nfirst\n"), "{name} says {found:?}");
    }
    let after = host.group(GROUP)?;
    for (_, name) in steady().chain([
        (0, "side".to_owned()),
        (0, "disk".to_owned()),
        (0, "files".to_owned()),
        (0, "cpu".to_owned()),
    ]) {
        ensure!(
            status_of(&after, &name)? == status_of(&before, &name)?,
            "{name} was touched"
        );
    }

    // Metrics are the guest's own figures, and name who spins.
    let usage = || -> Result<f64> {
        let text = said(
            host,
            "steady-2",
            "grep usage_usec /sys/fs/cgroup/cpu.stat | head -1",
        )?;
        let us = text.trim().strip_prefix("usage_usec ").context("cpu.stat")?;
        Ok(us.parse::<f64>()? / 1e6)
    };
    let (least, text, most) = (usage()?, scrape(host, "resource")?, usage()?);
    const CPU: &str = "container_cpu_usage_seconds_total";
    let told = metric(&text, CPU, "steady-2")?;
    ensure!(
        least <= told && told <= most,
        "{CPU} is {told}, the guest has {least} before and {most} after"
    );
    let spinner = metric(&text, CPU, "cpu")?;
    for (_, name) in steady() {
        let other = metric(&text, CPU, &name)?;
        ensure!(other < spinner, "{name} used {other} s, the spinner {spinner} s");
    }
    let working = said(
        host,
        "steady-2",
        "c=$(cat /sys/fs/cgroup/memory.current); i=$(awk '/^inactive_file /{print $2}' /sys/fs/cgroup/memory.stat); echo $((c - i))",
    )?;
    let (working, told): (f64, f64) = (
        working.trim().parse()?,
        metric(&text, "container_memory_working_set_bytes", "steady-2")?,
    );
    ensure!(
        told > 0.0 && (working - told).abs() < 2_097_152.0,
        "the working set is {told}, the guest says {working}"
    );
    counters_are_those_of_the_guest(host)?;
    host.remove(GROUP)
}

/// What a container and the network did, as the guest counts it and as port 10250 tells it. Counters only grow: what is told lies
/// between what the guest says before and after.
fn counters_are_those_of_the_guest(host: &Host) -> Result<()> {
    const WRITER: &str = "steady-3";
    let eth0 = |column| format!("awk '/eth0:/{{ sub(/.*eth0:/, \"\"); print ${column} }}' /proc/net/dev");
    let io = |key| {
        format!(
            "awk '{{ for (i = 2; i <= NF; i++) if (sub(/^{key}=/, \"\", $i)) n += $i }} END {{ print n + 0 }}' /sys/fs/cgroup/io.stat"
        )
    };
    // Linux gives what is written later to nobody in particular while it has no memory to note whose it is, which may be so just
    // after others took all of that: then another file is written.
    said(
        host,
        WRITER,
        &format!(
            "for n in 0 1 2 3 4 5 6 7 8 9; do
                dd if=/dev/urandom of=/written-$n bs=1024 count=300 conv=fsync 2>/dev/null || exit 1
                [ $({}) -ge 307200 ] && exit 0
             done; exit 1",
            io("wbytes")
        ),
    )?;
    // The samples begin so, in this order: labels are sorted, more may follow.
    let of_network = |name: &str| format!("container_network_{name}_total{{");
    let of_writer = |name: &str| format!("{name}{{container=\"{WRITER}\",");
    let counters = [
        (of_network("receive_bytes"), eth0(1), 1.0),
        (of_network("receive_packets"), eth0(2), 1.0),
        (of_network("transmit_bytes"), eth0(9), 1.0),
        (of_network("transmit_packets"), eth0(10), 1.0),
        (
            of_writer("container_fs_writes_bytes_total"),
            io("wbytes"),
            300.0 * 1024.0,
        ),
        (of_writer("container_fs_writes_total"), io("wios"), 1.0),
        (of_writer("container_fs_reads_bytes_total"), io("rbytes"), 0.0),
    ];
    let read = || {
        let script: Vec<_> = counters.iter().map(|(_, script, _)| script.as_str()).collect();
        let text = said(host, WRITER, &script.join("; "))?;
        let values: Result<Vec<f64>, _> = text.lines().map(str::parse).collect();
        values.with_context(|| format!("read the guest's counters from {text:?}"))
    };
    let (before, text, after) = (read()?, scrape(host, "cadvisor")?, read()?);
    ensure!(before.len() == counters.len(), "the guest says {before:?}");
    let pod = format!("namespace=\"default\",pod=\"{GROUP}\"}} ");
    let value_of = |start: &str| -> Result<f64> {
        let value = text.lines().find_map(|line| {
            let (_, value) = line.strip_prefix(start)?.split_once(&pod)?;
            value.split(' ').next()?.parse().ok()
        });
        value.with_context(|| format!("no {start} in:\n{text}"))
    };
    for (((start, _, at_least), least), most) in counters.iter().zip(before).zip(after) {
        let told = value_of(start)?;
        ensure!(
            least <= told && told <= most && told >= *at_least,
            "{start} is {told}, the guest has {least} before and {most} after"
        );
    }
    // The writable layer, which no cgroup counts.
    let told = value_of(&of_writer("container_fs_usage_bytes"))?;
    ensure!(
        (300.0 * 1024.0..4_000_000.0).contains(&told),
        "{WRITER} wrote up to 3 MiB and is told to have {told} bytes"
    );
    Ok(())
}
