//! Volumes and what containers see of them.

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tests::{host::Host, pod::Pod, stage::Stage};

use super::SAY_HELLO;

/// What a shell command says in a container of a group.
fn said(host: &Host, group: &str, container: &str, script: &str) -> Result<String> {
    host.exec(group, container, &["/bin/sh", "-c", script])?
        .success()
        .with_context(|| format!("run {script:?} in {container}"))
}

/// The Secret's value, which nobody but its containers may see.
const PASSWORD: &str = "correct-horse-battery";

pub(crate) fn files_of_a_manifest_arrive_and_secrets_stay_secret(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let pod = Pod::new("files")
        .spec(json!({
            "volumes": [
                { "name": "conf", "configMap": { "name": "conf", "items": [
                    { "key": "app.ini", "path": "d/app.ini", "mode": 0o640 }, { "key": "raw", "path": "raw" }] } },
                { "name": "login", "secret": { "secretName": "login", "defaultMode": 0o400 } },
                { "name": "pod", "downwardAPI": { "items": [
                    { "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } },
                    { "path": "memory", "resourceFieldRef": {
                        "containerName": "main", "resource": "limits.memory", "divisor": "1Mi" } }] } },
            ],
        }))
        .label("app", "files")
        .container_with(
            "main",
            &stage.tools(),
            SAY_HELLO,
            json!({
                "env": [{ "name": "PASSWORD", "valueFrom": { "secretKeyRef": { "name": "login", "key": "password" } } }],
                "envFrom": [{ "configMapRef": { "name": "text" }, "prefix": "T_" }],
                "volumeMounts": [
                    { "name": "conf", "mountPath": "/conf" },
                    { "name": "login", "mountPath": "/login" },
                    { "name": "login", "mountPath": "/etc/only", "subPath": "password" },
                    { "name": "pod", "mountPath": "/pod" },
                ],
            }),
        );
    let manifest = format!(
        "{}\n---\n{}\n---\n{}\n---\n{}\n",
        pod.manifest(),
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "conf" },
            "data": { "app.ini": "a=b\n" }, "binaryData": { "raw": "AP8=" } }),
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "text" }, "data": { "one": "$(PATH)" } }),
        json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "login" },
            "stringData": { "password": PASSWORD } }),
    );
    // Without its Secret it is refused.
    let without = manifest.replace("\"login\"},\"stringData", "\"other\"},\"stringData");
    ensure!(
        without != manifest,
        "the manifest is not written as expected: {manifest}"
    );
    host.ecictl_with(&["create", "-f", "-"], without.as_bytes())?
        .refused(1, &["secret", "\"login\"", "no such Secret"])?;
    host.ecictl_with(&["create", "-f", "-"], manifest.as_bytes())?
        .success()?;

    for (script, expected) in [
        ("cat /conf/d/app.ini", "a=b\n"),
        ("stat -L -c '%a %u %g' /conf/d/app.ini", "640 0 0\n"),
        ("od -An -tx1 /conf/raw", " 00 ff\n"),
        ("readlink /conf/d", "..data/d\n"),
        (
            "cat /login/password /etc/only",
            "correct-horse-batterycorrect-horse-battery",
        ),
        ("stat -L -c %a /login/password", "400\n"),
        ("cat /pod/labels /pod/memory", "app=\"files\"128"),
        (
            "echo $PASSWORD; echo \"$T_one\"",
            "correct-horse-battery\n$(PATH)\n",
        ),
        // Nobody writes to them, and they are in memory.
        ("touch /conf/x 2>/dev/null || echo no", "no\n"),
        ("echo x 2>/dev/null > /etc/only || echo no", "no\n"),
        ("stat -f -c %T /login | grep -c ext", "0\n"),
    ] {
        let script = format!("{script} || true");
        let found = said(host, "files", "main", &script)?;
        ensure!(found == expected, "{script:?} says {found:?}, not {expected:?}");
    }
    let described = host.ecictl(&["describe", "files"])?.success()?;
    let status = host.group("files")?.to_string();
    let encoded = "Y29ycmVjdC1ob3JzZS1iYXR0ZXJ5";
    for text in [&described, &status, &host.last_log_lines(100_000)] {
        ensure!(
            !text.contains(PASSWORD) && !text.contains(encoded),
            "the secret is in {text}"
        );
    }
    host.remove("files")
}

pub(crate) fn volumes_belong_to_the_group_of_the_pod(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let fields = json!({
        "volumeMounts": [
            { "name": "disk", "mountPath": "/disk" },
            { "name": "memory", "mountPath": "/memory" },
            { "name": "login", "mountPath": "/login" },
            { "name": "disk", "mountPath": "/new", "subPathExpr": "made/$(WHERE)" },
            { "name": "disk", "mountPath": "/still", "readOnly": true, "recursiveReadOnly": "Enabled" },
        ],
        "env": [{ "name": "WHERE", "value": "here" }],
    });
    let pod = Pod::new("owners")
        .spec(json!({
            "securityContext": { "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 2000, "supplementalGroups": [3000] },
            "volumes": [
                { "name": "disk", "emptyDir": {} },
                { "name": "memory", "emptyDir": { "medium": "Memory", "sizeLimit": "1Mi" } },
                { "name": "login", "secret": { "secretName": "login", "defaultMode": 0o400 } },
            ],
        }))
        .container_with("main", &stage.tools(), SAY_HELLO, fields);
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "login" },
        "stringData": { "password": PASSWORD } });
    let manifest = format!("---\n{}\n---\n{secret}\n", pod.manifest());
    host.ecictl_with(&["create", "-f", "-"], manifest.as_bytes())?
        .success()?;
    for (script, expected) in [
        ("id -G", "1000 2000 3000\n"),
        (
            "echo x > /disk/f; echo y > /memory/f; stat -c %g /disk/f /memory/f",
            "2000\n2000\n",
        ),
        // Made through the volume, with its owner and permissions.
        (
            "echo z > /new/f && stat -c '%a %g' /disk/made/here; cat /disk/made/here/f",
            "2777 2000\nz\n",
        ),
        ("touch /still/f 2>/dev/null || echo no", "no\n"),
        // The group can read what only its owner, root, could.
        ("cat /login/password", PASSWORD),
        (
            "dd if=/dev/zero of=/memory/big bs=64k count=32 2>&1 | grep -c 'No space'",
            "1\n",
        ),
    ] {
        let found = said(host, "owners", "main", script)?;
        ensure!(found == expected, "{script:?} says {found:?}, not {expected:?}");
    }
    host.remove("owners")
}

pub(crate) fn a_link_does_not_lead_out_of_a_volume(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    // The first run puts a link to the guest's root where the next run's mount is to come from.
    let plant = "mv /v/part /v/old && ln -s /proc/1/root /v/part; exit 1";
    let mounts = json!([
        { "name": "v", "mountPath": "/v" },
        { "name": "v", "mountPath": "/part", "subPath": "part/etc" },
    ]);
    let pod = Pod::new("escape")
        .spec(json!({ "restartPolicy": "OnFailure", "volumes": [{ "name": "v", "emptyDir": {} }] }))
        .container_with("main", &stage.tools(), plant, json!({ "volumeMounts": mounts }));
    host.ecictl_with(&["create", "--no-wait", "-f", "-"], pod.manifest().as_bytes())?
        .success()?;
    host.wait_group("escape", "the refusal of the link", |group| {
        group.to_string().contains("leads out of the volume")
    })?;
    host.remove("escape")
}

pub(crate) fn a_full_volume_is_an_error_of_its_writer(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let mounts = |paths: &[(&str, &str)]| {
        let mount = |(name, path): &(&str, &str)| json!({ "name": name, "mountPath": path });
        json!({ "volumeMounts": paths.iter().map(mount).collect::<Vec<_>>() })
    };
    let pod = Pod::new("limits")
        .spec(json!({
            "securityContext": { "fsGroup": 2000 },
            "volumes": [
                { "name": "small", "emptyDir": { "sizeLimit": "16Mi" } },
                { "name": "memory", "emptyDir": { "medium": "Memory", "sizeLimit": "1Mi" } },
                { "name": "shm", "emptyDir": { "medium": "Memory", "sizeLimit": "2Mi" } },
                { "name": "wide", "emptyDir": {} },
            ],
        }))
        .container_with(
            "main",
            &stage.tools(),
            SAY_HELLO,
            mounts(&[
                ("small", "/small"),
                ("memory", "/memory"),
                ("shm", "/dev/shm"),
                ("wide", "/wide"),
            ]),
        )
        .container_with("other", &stage.tools(), SAY_HELLO, mounts(&[("small", "/small")]));
    host.ecictl_with(&["create", "-f", "-"], pod.manifest().as_bytes())?
        .success()?;
    let id = host.group("limits")?["id"]
        .as_str()
        .context("the group has an id")?
        .to_owned();
    let [state_dir, ..] = host.dirs();
    let directory = state_dir.join("scratch").join(format!("{id}.volumes"));
    ensure!(
        directory.join("small.ext4").exists(),
        "the volume has a file of its own"
    );
    let full = |path: &str, mib: u32| {
        format!(
            "dd if=/dev/zero of={path}/big bs=64k count={} 2>&1 | grep -c 'No space'",
            mib * 16
        )
    };
    for (container, script, expected) in [
        ("main", "ls -A /small | wc -l; stat -c '%a %g' /small".to_owned(), "0\n2777 2000\n"),
        ("main", "n=$(df -k /small | tail -1 | awk '{print $2}'); [ $n -gt 14000 ] && [ $n -le 16384 ] && echo fits".to_owned(), "fits\n"),
        ("main", full("/small", 20), "1\n"),
        ("main", full("/memory", 2), "1\n"),
        ("main", full("/dev/shm", 3), "1\n"),
        // The others have room, and what is in a full volume is there for both.
        ("main", "dd if=/dev/zero of=/wide/big bs=64k count=320 2>/dev/null && echo fits".to_owned(), "fits\n"),
        ("other", "[ $(stat -c %s /small/big) -gt 14000000 ] && rm /small/big && echo x > /small/f && cat /small/f".to_owned(), "x\n"),
        ("other", "df -k /dev/shm | tail -1 | awk '{print $2}'".to_owned(), "65536\n"),
    ] {
        let found = said(host, "limits", container, &script)?;
        ensure!(found == expected, "{script:?} says {found:?}, not {expected:?}");
    }
    let group = host.group("limits")?;
    for container in group["status"]["containers"]
        .as_array()
        .context("it has containers")?
    {
        ensure!(
            container["restart_count"] == 0,
            "a container was ended: {container}"
        );
    }
    host.ecictl(&["snapshot", "create", "limits"])?
        .refused(1, &["small", "not captured"])?;
    host.remove("limits")?;
    ensure!(!directory.exists(), "{} is left", directory.display());
    Ok(())
}

pub(crate) fn a_disk_outlives_its_group_and_grows(stage: &mut Stage) -> Result<()> {
    let tools = stage.tools();
    let host = &mut stage.host;
    let [state_dir, ..] = host.dirs();
    let disks = state_dir.join("disks");
    let pod = |name: &str, volumes: serde_json::Value| {
        Pod::new(name).spec(json!({ "volumes": volumes })).container_with(
            "main",
            &tools,
            SAY_HELLO,
            json!({ "volumeMounts": [{ "name": "d", "mountPath": "/d" }, { "name": "e", "mountPath": "/e" }] }),
        )
    };
    let disk = |name: &str, options: serde_json::Value| json!({ "name": name, "flexVolume": { "driver": "alicloud/disk", "options": options } });
    let goes = || disk("e", json!({ "volumeSize": "20", "deleteWithInstance": "true" }));
    // All that is wrong with it, at once.
    let wrong = pod(
        "disks",
        json!([disk("d", json!({ "volumeSize": "1", "colour": "red" })), goes()]),
    );
    host.try_create(&wrong)?.refused(
        1,
        &[
            "volumes[0].flexVolume.options.volumeSize",
            "20 to 32768",
            "options.colour",
        ],
    )?;
    host.create(&pod(
        "disks",
        json!([disk("d", json!({ "volumeSize": "20Gi" })), goes()]),
    ))?;
    let gib = "df -k /d | tail -1 | awk '{print int($2 / 1048576 + 0.9)}'";
    let found = said(
        host,
        "disks",
        "main",
        "echo kept > /d/f; echo gone > /e/f; sync; cat /d/f",
    )?;
    ensure!(found == "kept\n", "{found}");
    let found = said(host, "disks", "main", gib)?;
    ensure!(found == "20\n", "the disk has {found} GiB");
    let group = host.group("disks")?;
    let id_of = |group: &serde_json::Value, index: usize| -> Result<String> {
        let id = &group["spec"]["volumes"][index]["source"]["Disk"]["id"];
        Ok(id
            .as_str()
            .with_context(|| format!("no disk in {group}"))?
            .to_owned())
    };
    let (kept, gone) = (id_of(&group, 0)?, id_of(&group, 1)?);
    let here = |id: &str| disks.join(format!("{id}.ext4")).exists();
    ensure!(here(&kept) && here(&gone), "both disks are files");
    let old = |name: &str| pod(name, json!([disk("d", json!({ "volumeId": kept })), goes()]));
    host.try_create(&old("second"))?
        .refused(1, &["is used by container group", &kept])?;

    host.ecictl(&["disk", "rm", &kept])?
        .refused(1, &["is used by container group", &kept])?;

    // An agent that is killed knows its disks again, and a disk grows under its user.
    host.kill_agent()?;
    host.restart_agent()?;
    host.try_create(&old("second"))?
        .refused(1, &["is used by container group", &kept])?;
    host.ecictl(&["resize", "disks", "d", "22"])?.success()?;
    let found = said(host, "disks", "main", gib)?;
    ensure!(found == "22\n", "the disk has {found} GiB after it grew");
    host.ecictl(&["resize", "disks", "d", "21"])?
        .refused(1, &["can only grow"])?;
    host.remove("disks")?;
    ensure!(here(&kept) && !here(&gone), "the one is kept, the other gone");

    // What was kept is there for the next.
    host.create(&old("third"))?;
    let found = said(host, "third", "main", &format!("cat /d/f; {gib}"))?;
    ensure!(found == "kept\n22\n", "the kept disk says {found:?}");
    host.remove("third")?;
    let last = pod(
        "last",
        json!([
            disk("d", json!({ "volumeId": kept, "deleteWithInstance": "true" })),
            goes()
        ]),
    );
    host.create(&last)?;
    host.remove("last")?;
    let left: Vec<_> = std::fs::read_dir(&disks)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    ensure!(left.is_empty(), "disks are left: {left:?}");
    host.try_create(&old("never"))?.refused(1, &["no disk", &kept])
}

pub(crate) fn a_kept_disk_is_listed_deleted_and_never_made_anew(stage: &mut Stage) -> Result<()> {
    let tools = stage.tools();
    let host = &stage.host;
    let pod = Pod::new("keeper")
        .spec(
            json!({ "restartPolicy": "Always", "volumes": [{ "name": "d", "flexVolume": {
            "driver": "alicloud/disk", "options": { "volumeSize": "20" } } }] }),
        )
        .container_with(
            "main",
            &tools,
            SAY_HELLO,
            json!({ "volumeMounts": [{ "name": "d", "mountPath": "/d" }] }),
        );
    let disks = || -> Result<Vec<(String, Option<String>)>> {
        let text = host.ecictl(&["disk", "ls", "-o", "json"])?.success()?;
        let disks: Vec<serde_json::Value> = serde_json::from_str(&text)?;
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        disks
            .iter()
            .map(|disk| {
                Ok((
                    text(&disk["id"]).context("a disk has an id")?,
                    text(&disk["group"]),
                ))
            })
            .collect()
    };
    host.create(&pod)?;
    said(host, "keeper", "main", "echo mine > /d/f; sync")?;
    let id = host.group("keeper")?["id"]
        .as_str()
        .context("the group has an id")?
        .to_owned();
    let listed = disks()?;
    let [(disk, Some(group))] = &listed[..] else {
        bail!("there is not one disk: {listed:?}");
    };
    ensure!(*group == id, "{disk} is said to be {group}'s, not {id}'s");
    host.ecictl(&["disk", "rm", disk])?
        .refused(1, &["is used by container group", &id])?;

    // Its file is taken away, and its sandbox ends: there is no disk then, not an empty one.
    let [state_dir, ..] = host.dirs();
    let file = state_dir.join("disks").join(format!("{disk}.ext4"));
    let aside = stage.dir().join("aside.ext4");
    std::fs::rename(&file, &aside).with_context(|| format!("take {} away", file.display()))?;
    let processes = host.processes_of("keeper")?;
    let vmm = rustix::process::Pid::from_raw(processes.vmm).context("read a process id")?;
    rustix::process::kill_process(vmm, rustix::process::Signal::KILL).context("kill the VMM")?;
    host.wait_group("keeper", "the error that names the file", |group| {
        let message = group["status"]["message"].to_string();
        group["status"]["reason"] == "FailedMount" && message.contains(&file.display().to_string())
    })?;
    ensure!(!file.exists(), "{} was made anew", file.display());
    std::fs::rename(&aside, &file).with_context(|| format!("put {} back", file.display()))?;
    host.wait_group("keeper", "the container to run again", |group| {
        group["status"]["containers"][0]["state"]["Running"].is_object()
    })?;
    let found = said(host, "keeper", "main", "cat /d/f")?;
    ensure!(found == "mine\n", "the disk that was put back says {found:?}");

    host.remove("keeper")?;
    ensure!(
        disks()? == [(disk.clone(), None)],
        "the disk was kept: {:?}",
        disks()?
    );
    let table = host.ecictl(&["disk", "ls"])?.success()?;
    ensure!(table.contains("20.0GiB"), "{table}");
    let removed = host.ecictl(&["disk", "rm", disk])?.success()?;
    ensure!(removed.trim() == disk && !file.exists(), "removed {removed:?}");
    host.ecictl(&["disk", "rm", disk])?.refused(1, &["no disk", disk])
}

pub(crate) fn a_disk_as_a_device_keeps_what_is_written_to_it(stage: &mut Stage) -> Result<()> {
    let tools = stage.tools();
    let host = &stage.host;
    let pod = |name: &str, options: serde_json::Value| {
        let volumes =
            json!([{ "name": "d", "flexVolume": { "driver": "alicloud/disk", "options": options } }]);
        Pod::new(name)
            .spec(json!({ "restartPolicy": "Always", "volumes": volumes }))
            .container_with(
                "main",
                &tools,
                SAY_HELLO,
                json!({ "volumeDevices": [{ "name": "d", "devicePath": "/dev/xvda" }] }),
            )
    };
    host.create(&pod("device", json!({ "volumeSize": "20" })))?;
    let write = "i=0; while [ $i -lt 65536 ]; do echo $i; i=$((i + 1)); done > /tmp/w && stat -c %s /tmp/w && \
                 dd if=/tmp/w of=/dev/xvda bs=4096 seek=1000000 conv=notrunc,fsync 2>/dev/null && sha256sum < /tmp/w";
    let read =
        |n: &str| format!("dd if=/dev/xvda bs=4096 skip=1000000 2>/dev/null | head -c {n} | sha256sum");
    for (script, expected) in [
        ("stat -c '%F %a %u %g' /dev/xvda", "block special file 660 0 6\n"),
        // No file system is on it, and none is mounted from it.
        (
            "dd if=/dev/xvda bs=65536 count=16 2>/dev/null | tr -d '\\0' | wc -c",
            "0\n",
        ),
        ("grep -c ext4.*xvda /proc/mounts || true", "0\n"),
        (
            "dd if=/dev/xvda bs=1M skip=20479 2>/dev/null | wc -c",
            "1048576\n",
        ),
    ] {
        let found = said(host, "device", "main", script)?;
        ensure!(found == expected, "{script:?} says {found:?}, not {expected:?}");
    }
    let written = said(host, "device", "main", write)?;
    let (n_bytes, sum) = written.split_once('\n').context("two lines")?;

    // Across a restart of the container, and in the next group that has the disk.
    // It may end with what it killed before it is asked how it ended.
    host.exec("device", "main", &["/bin/sh", "-c", "kill 1"])?;
    let group = host.wait_group("device", "its container to run again", |group| {
        let container = &group["status"]["containers"][0];
        container["restart_count"] == 1 && container["state"]["Running"].is_object()
    })?;
    let found = said(host, "device", "main", &read(n_bytes))?;
    ensure!(found == sum, "after the restart: {found:?}, not {sum:?}");
    host.ecictl(&["resize", "device", "d", "21"])?.success()?;
    let found = said(
        host,
        "device",
        "main",
        "dd if=/dev/xvda bs=1M skip=21503 2>/dev/null | wc -c",
    )?;
    ensure!(found == "1048576\n", "after it grew: {found:?}");
    host.remove("device")?;
    let disk = group["spec"]["volumes"][0]["source"]["Disk"]["id"]
        .as_str()
        .with_context(|| format!("no disk in {group}"))?;
    host.create(&pod(
        "next",
        json!({ "volumeId": disk, "deleteWithInstance": "true" }),
    ))?;
    let found = said(host, "next", "main", &read(n_bytes))?;
    ensure!(found == sum, "in the next group: {found:?}, not {sum:?}");
    host.remove("next")?;
    let left = host.ecictl(&["disk", "ls", "-o", "json"])?.success()?;
    ensure!(left.trim() == "[]", "disks are left: {left}");
    Ok(())
}
