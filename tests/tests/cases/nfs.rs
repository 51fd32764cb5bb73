//! Volumes on NFS servers.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::{
    host::Host,
    nfs::{NOBODY, NfsServer, SERVER},
    pod::Pod,
    stage::Stage,
};

use super::SAY_HELLO;

/// Longest removal of a group whose server is gone: what a guest gives its servers and the host its guests, in an emulated
/// machine.
const REMOVAL: Duration = Duration::from_secs(60);

fn said(host: &Host, group: &str, container: &str, script: &str) -> Result<String> {
    host.exec(group, container, &["/bin/sh", "-c", script])?
        .success()
        .with_context(|| format!("run {script:?} in {container} of {group}"))
}

fn volume(name: &str, path: &str, read_only: bool) -> Value {
    json!({ "name": name, "nfs": { "server": SERVER.to_string(), "path": path, "readOnly": read_only } })
}

/// A group that mounts all that is served as `data`. All such groups have one host name.
fn sharing(name: &str, volumes: &Value) -> Pod {
    Pod::new(name).spec(json!({
        "hostname": "twin",
        "securityContext": { "fsGroup": 2000 },
        "volumes": volumes,
    }))
}

pub(crate) fn groups_share_a_servers_files_and_bear_its_silence(stage: &mut Stage) -> Result<()> {
    let server = NfsServer::start(stage.dir())?;
    let host = &stage.host;
    fs::create_dir(server.path("shelf")).context("make a directory on the server")?;
    fs::write(server.path("shelf/book"), "read me").context("write a file on the server")?;
    let mounts = json!({ "volumeMounts": [
        { "name": "data", "mountPath": "/data" },
        { "name": "data", "mountPath": "/part", "subPath": "made/here" },
    ] });
    let readers = json!({ "volumeMounts": [
        { "name": "data", "mountPath": "/data", "readOnly": true },
        { "name": "still", "mountPath": "/still" },
        { "name": "still", "mountPath": "/book", "subPath": "book" },
    ] });
    let first = sharing(
        "first",
        &json!([volume("data", "/", false), volume("still", "/shelf", true)]),
    )
    .container_with("main", &stage.tools(), SAY_HELLO, mounts)
    .container_with("reader", &stage.tools(), SAY_HELLO, readers);
    host.create(&first)?;
    let second = sharing("second", &json!([volume("data", "/", false)])).container_with(
        "main",
        &stage.tools(),
        SAY_HELLO,
        json!({ "volumeMounts": [{ "name": "data", "mountPath": "/data" }] }),
    );
    host.create(&second)?;

    for (group, container, script, expected) in [
        (
            "first",
            "main",
            "echo one > /data/a; echo two > /part/b; cat /data/made/here/b",
            "two\n",
        ),
        (
            "first",
            "reader",
            "cat /data/a /still/book /book",
            "one\nread meread me",
        ),
        (
            "second",
            "main",
            "cat /data/a /data/made/here/b; echo three > /data/c",
            "one\ntwo\n",
        ),
        ("first", "reader", "cat /data/c", "three\n"),
        // Ids are numbers, whoever knows of names.
        (
            "second",
            "main",
            "chown 1234:2345 /data/c && stat -c '%u %g' /data/c",
            "1234 2345\n",
        ),
        // Nobody writes where it says so, and the group of the Pod is not the files'.
        (
            "first",
            "reader",
            "touch /data/x 2>&1 | grep -c 'Read-only'; touch /still/x 2>&1 | grep -c 'Read-only'",
            "1\n1\n",
        ),
        (
            "first",
            "main",
            "stat -c '%a %g' /data /data/made/here; id -G | grep -c 2000",
            "755 0\n755 0\n1\n",
        ),
        (
            "first",
            "main",
            "grep -c ' nfs4 .*vers=4.2,.*hard,.*timeo=600,.*sec=sys' /proc/mounts",
            "2\n",
        ),
    ] {
        let found = said(host, group, container, script)?;
        ensure!(
            found == expected,
            "{script:?} says {found:?} in {container} of {group}, not {expected:?}"
        );
    }
    let owner = fs::metadata(server.path("c")).context("look at a file on the server")?;
    ensure!(
        (owner.uid(), owner.gid()) == (1234, 2345),
        "for the server the file is {}:{}'s",
        owner.uid(),
        owner.gid()
    );
    ensure!(
        fs::read_to_string(server.path("c"))? == "three\n" && !server.path("x").exists(),
        "the server has what was written, and no more"
    );
    // Both have one host name, and are two clients all the same; as one, each would end what the other holds open.
    let clients = server.clients()?;
    ensure!(
        clients.len() == 2 && clients.iter().all(|client| client.ends_with("/twin\"")),
        "the server knows the clients {clients:?}"
    );
    host.ecictl(&["snapshot", "create", "first"])?
        .refused(1, &["no snapshot", "on a server"])?;

    // A server that is not there is named, and the group goes on trying, whatever its restart policy.
    let lost = Pod::new("lost")
        .spec(json!({ "volumes": [{ "name": "gone", "nfs": { "server": NOBODY.to_string(), "path": "/gone" } }] }))
        .container_with(
            "main",
            &stage.tools(),
            SAY_HELLO,
            json!({ "volumeMounts": [{ "name": "gone", "mountPath": "/gone" }] }),
        );
    let named = format!("{NOBODY}:/gone");
    host.try_create(&lost)?.refused(
        1,
        &["FailedMount", "Mounting volume gone", &named, "It goes on trying"],
    )?;
    let group = host.group("lost")?;
    let events = group["status"]["events"].as_array().context("it has events")?;
    ensure!(
        events
            .iter()
            .any(|event| event["reason"] == "FailedMount" && event["kind"] == "Warning"),
        "no event of a failed mount: {group}"
    );
    ensure!(
        group["status"]["containers"][0]["restart_count"] == 0,
        "it never ran: {group}"
    );
    host.remove("lost")?;

    server.set_silent(true)?;
    // It does not answer, which is told in time; meanwhile the same guest starts what does not need it.
    let waiting = sharing(
        "waiting",
        &json!([volume("data", "/", false), { "name": "own", "emptyDir": {} }]),
    )
    .container_with(
        "main",
        &stage.tools(),
        SAY_HELLO,
        json!({ "volumeMounts": [{ "name": "data", "mountPath": "/data" }] }),
    )
    .container_with(
        "free",
        &stage.tools(),
        SAY_HELLO,
        json!({ "volumeMounts": [{ "name": "own", "mountPath": "/own" }] }),
    );
    host.ecictl_with(&["create", "--no-wait", "-f", "-"], waiting.manifest().as_bytes())?
        .success()?;
    host.wait_group("waiting", "the container without the volume", |group| {
        group["status"]["containers"][1]["state"]["Running"].is_object()
    })?;
    ensure!(
        said(host, "waiting", "free", "echo x > /own/f; cat /own/f")? == "x\n",
        "it works"
    );
    host.wait_group("waiting", "the news of the server", |group| {
        let text = group["status"]["message"].to_string();
        group["status"]["reason"] == "FailedMount" && text.contains("did not answer within 30 s")
    })?;
    // Who waits for the server waits alone.
    let stuck =
        "(dd if=/dev/zero of=/data/big bs=64k count=16; cat /data/shelf/book) </dev/null >/dev/null 2>&1 &";
    said(host, "second", "main", stuck)?;
    ensure!(
        said(host, "second", "main", "echo here")? == "here\n",
        "it answers"
    );
    for group in ["second", "waiting"] {
        let begun = Instant::now();
        host.remove(group)?;
        let took = begun.elapsed();
        eprintln!("nfs: {group} was removed in {:.1} s", took.as_secs_f64());
        ensure!(took < REMOVAL, "{group} was removed in {} s", took.as_secs());
    }

    // When it is back, all goes on.
    server.set_silent(false)?;
    let found = said(host, "first", "main", "cat /data/c")?;
    ensure!(found == "three\n", "after the silence: {found:?}");
    host.remove("first")
}
