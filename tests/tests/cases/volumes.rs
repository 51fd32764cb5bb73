//! Volumes and what containers see of them.

use anyhow::{Context, Result, ensure};
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
