//! Groups that go on from where another one was.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::{host::Host, pod::Pod, process::Background, stage::Stage};

use super::SAY_HELLO;

/// Counts in memory, by a timer.
const COUNTER: &str = "n=0; while :; do n=$((n+1)); echo count $n; sleep 1; done";
/// Prints what comes over one connection. (Without input that lasts, nc would close its side.)
const SERVER: &str = "sleep 100000 | nc -l -p 7000";
/// Opens that connection once somebody listens (port 7000 is 1B58), and sends numbered lines as long as it is open.
const CLIENT: &str = "until grep -q :1B58 /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done; \
                      n=0; while :; do n=$((n+1)); echo line $n; sleep 1; done | nc 127.0.0.1 7000";
/// Has a file open that has no name any more, and goes on with it when told.
const OPEN_FILE: &str = "exec 3<>/tmp/kept; rm /tmp/kept; mkfifo /tmp/go; echo before >&3; echo ready; \
                         read word </tmp/go; \
                         echo after >&3; cat /proc/self/fd/3; exec sleep 100000";

fn busy_pod(stage: &Stage, name: &str) -> Pod {
    // Together the smallest size there is.
    let small = json!({ "resources": { "limits": { "cpu": "50m", "memory": "64Mi" } } });
    [
        ("counter", COUNTER),
        ("server", SERVER),
        ("client", CLIENT),
        ("file", OPEN_FILE),
        ("idle", SAY_HELLO),
    ]
    .into_iter()
    .fold(Pod::new(name), |pod, (container, script)| {
        pod.container_with(container, &stage.tools(), script, small.clone())
    })
}

/// The number at the end of a line such as `count 7`.
fn number(line: &str, word: &str) -> Result<u64> {
    line.strip_prefix(word)
        .and_then(|rest| rest.trim().parse().ok())
        .with_context(|| format!("{line:?} is not {word:?} and a number"))
}

/// Follows a log of numbered lines and checks that none is missing; the first and the last number of `n` lines.
fn follow_numbers(host: &Host, group: &str, container: &str, word: &str, n: usize) -> Result<(u64, u64)> {
    let mut log = host.follow(group, container)?;
    let mut numbers: Vec<u64> = Vec::new();
    while numbers.len() < n {
        let line = next_line(&mut log, word)?;
        numbers.push(number(&line, word)?);
    }
    ensure!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{container} of {group} printed {numbers:?}"
    );
    Ok((numbers[0], numbers[n - 1]))
}

fn next_line(log: &mut Background, word: &str) -> Result<String> {
    log.wait_line(word, |line| line.starts_with(word))
}

/// What tells one group from another, read in it.
fn identity(host: &Host, group: &str) -> Result<Vec<String>> {
    let script = "cat /etc/machine-id /etc/hostname /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid \
                  /sys/class/net/eth0/address; cat /run/eci/generation; head -c 16 /dev/urandom | md5sum; \
                  ip -4 -o addr show dev eth0 | tr -s ' ' | cut -d ' ' -f 4";
    let text = host.exec(group, "idle", &["/bin/sh", "-c", script])?.success()?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn ensure_all_differ(identities: &[Vec<String>]) -> Result<()> {
    let n_lines = identities[0].len();
    ensure!(n_lines >= 8, "an identity is {:?}", identities[0]);
    for line in 0..n_lines {
        let different: BTreeSet<_> = identities.iter().map(|identity| identity.get(line)).collect();
        ensure!(
            different.len() == identities.len(),
            "some have the same in line {line}: {identities:?}"
        );
    }
    Ok(())
}

fn statuses(group: &Value) -> &Value {
    &group["status"]["containers"]
}

pub(crate) fn a_fork_of_five_busy_containers_keeps_all_they_have(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    host.create(&busy_pod(stage, "busy"))?;
    host.exec(
        "busy",
        "idle",
        &["/bin/sh", "-c", "head -c 2000000 /dev/urandom >/dev/shm/blob"],
    )?
    .success()?;
    let digest = |group: &str| {
        host.exec(group, "idle", &["/bin/md5sum", "/dev/shm/blob"])?
            .success()
    };
    let blob = digest("busy")?;
    let (_, sent) = follow_numbers(host, "busy", "server", "line", 3)?;
    let (_, counted) = follow_numbers(host, "busy", "counter", "count", 3)?;
    let before = host.group("busy")?;

    host.ecictl(&["fork", "-n", "2", "--name", "twin", "busy"])?
        .success()?;
    for twin in ["twin-1", "twin-2"] {
        let (first, _) = follow_numbers(host, twin, "counter", "count", 4)?;
        ensure!(
            first > counted,
            "{twin} counts from {first}, the parent was at {counted}"
        );
        // Each line the client had sent and the server had not printed yet, and all later ones.
        let (first, last) = follow_numbers(host, twin, "server", "line", 4)?;
        ensure!(first > sent, "{twin} got line {first}, the parent had {sent}");
        ensure!(last >= first + 3);
        ensure!(digest(twin)? == blob, "the memory of {twin} is another");
        host.exec(twin, "file", &["/bin/sh", "-c", "echo go >/tmp/go"])?
            .success()?;
        let mut log = host.follow(twin, "file")?;
        next_line(&mut log, "before")?;
        next_line(&mut log, "after")?;
        let events = host.ecictl(&["events", twin])?.success()?;
        ensure!(events.contains("Restored"), "the events of {twin}:\n{events}");
        let group = host.group(twin)?;
        for status in statuses(&group).as_array().context("containers")? {
            ensure!(status["restart_count"] == 0, "{twin}: {status}");
        }
    }
    let all = ["busy", "twin-1", "twin-2"];
    let identities = all.map(|group| identity(host, group));
    ensure_all_differ(&identities.into_iter().collect::<Result<Vec<_>>>()?)?;
    // The parent noticed nothing: none of its files is another's, none of its lines is lost.
    ensure!(
        statuses(&host.group("busy")?) == statuses(&before),
        "the parent's containers changed"
    );
    let log = host.ecictl(&["logs", "-c", "server", "busy"])?.success()?;
    for (at, line) in log.lines().enumerate() {
        ensure!(number(line, "line")? == at as u64 + 1, "the parent's log:\n{log}");
    }
    // A clone is a group like any other: a container that ends in it is told so, new processes have their streams.
    host.exec("twin-1", "idle", &["/bin/sh", "-c", "kill -TERM 1"])?;
    host.wait_group("twin-1", "the end of one container", |group| {
        statuses(group)[4]["state"]["Terminated"]["exit_code"] == 0
    })?;
    for group in all {
        host.remove(group)?;
    }
    Ok(())
}

fn snapshot_of(host: &Host, group: &str) -> Result<String> {
    let id = host.ecictl(&["snapshot", "create", group])?.success()?;
    Ok(id.trim().to_owned())
}

fn file_of(host: &Host, snapshot: &str, name: &str) -> PathBuf {
    let [state, ..] = host.dirs();
    state.join("snapshots").join(snapshot).join(name)
}

pub(crate) fn a_snapshot_outlives_its_group_and_is_refused_when_it_was_touched(
    stage: &mut Stage,
) -> Result<()> {
    let host = &stage.host;
    let pod = Pod::new("first").container("counter", &stage.tools(), COUNTER);
    host.create(&pod)?;
    let (_, counted) = follow_numbers(host, "first", "counter", "count", 2)?;
    let snapshot = snapshot_of(host, "first")?;
    host.remove("first")?;
    let listed = host.ecictl(&["snapshot", "ls"])?.success()?;
    ensure!(
        listed.contains(&snapshot) && listed.contains("default/first"),
        "{listed}"
    );

    let restore = |arguments: &[&str]| {
        let mut all = vec!["restore", "--name", "again"];
        all.extend(arguments);
        all.push(&snapshot);
        host.ecictl(&all)
    };
    restore(&["--namespace", "other"])?.refused(1, &["belongs to namespace default", "not other"])?;
    restore(&["-n", "0"])?.refused(1, &["count is 0", "1 to 1000"])?;
    // One bit of the guest's memory, where the kernel's code is.
    let memory = File::options()
        .read(true)
        .write(true)
        .open(file_of(host, &snapshot, "memory"))
        .context("open the memory of a snapshot")?;
    let at = 17 << 20;
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at)?;
    memory.write_all_at(&[byte[0] ^ 1], at)?;
    restore(&[])?.refused(1, &["memory is not what was sealed"])?;
    memory.write_all_at(&byte, at)?;
    let state = file_of(host, &snapshot, "state");
    let intact = fs::read(&state).context("read the state of a snapshot")?;
    fs::write(&state, &intact[..intact.len() - 1]).context("truncate it")?;
    restore(&[])?.refused(1, &["state is not what was sealed"])?;
    fs::write(&state, &intact).context("mend it")?;
    ensure!(host.group_names()?.is_empty(), "a refused restore left a group");

    restore(&[])?.success()?;
    let (first, _) = follow_numbers(host, "again", "counter", "count", 3)?;
    ensure!(
        first > counted,
        "it counts from {first}, {counted} had been reached"
    );
    let described = host.ecictl(&["describe", "again"])?.success()?;
    ensure!(described.contains("Restored"), "{described}");
    host.remove("again")?;
    host.ecictl(&["snapshot", "rm", &snapshot])?.success()?;
    host.ecictl(&["restore", &snapshot])?
        .refused(1, &["no snapshot"])?;
    host.ecictl(&["fork", "first"])?
        .refused(1, &["No container group"])
}

/// How many clones of one group are compared; `ECI_TEST_CLONES` says how many others.
const N_CLONES: usize = 4;
/// As many at once as a small host has room for.
const AT_ONCE: usize = 4;

pub(crate) fn no_two_clones_have_a_secret_in_common(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let n_clones = std::env::var("ECI_TEST_CLONES").map_or(Ok(N_CLONES), |text| text.parse())?;
    host.create(&Pod::new("parent").container("idle", &stage.tools(), SAY_HELLO))?;
    let snapshot = snapshot_of(host, "parent")?;
    let mut identities = vec![identity(host, "parent")?];
    while identities.len() <= n_clones {
        let n = AT_ONCE.min(n_clones + 1 - identities.len()).to_string();
        host.ecictl(&["restore", "-n", &n, "--name", "clone", &snapshot])?
            .success()?;
        let clones: Vec<String> = host
            .group_names()?
            .into_iter()
            .filter(|name| name.starts_with("clone"))
            .collect();
        for clone in &clones {
            identities.push(identity(host, clone)?);
            let clock = host.exec(clone, "idle", &["/bin/date", "+%s"])?.success()?;
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
            let apart = now.as_secs().abs_diff(clock.trim().parse()?);
            ensure!(apart <= 5, "the clock of {clone} is {apart} s off");
        }
        for clone in &clones {
            host.remove(clone)?;
        }
    }
    // Addresses are used again once their group is gone, names are those of the batch.
    let secrets: Vec<Vec<String>> = identities
        .into_iter()
        .map(|lines| {
            [0, 2, 3, 5, 6]
                .iter()
                .filter_map(|at| lines.get(*at).cloned())
                .collect()
        })
        .collect();
    ensure!(secrets.iter().all(|lines| lines.len() == 5), "{secrets:?}");
    for line in 0..5 {
        let different: BTreeSet<_> = secrets.iter().map(|lines| &lines[line]).collect();
        ensure!(
            different.len() == secrets.len(),
            "only {} of {} differ in line {line}",
            different.len(),
            secrets.len()
        );
    }
    host.remove("parent")?;
    host.ecictl(&["snapshot", "rm", &snapshot])?.success().map(|_| ())
}
