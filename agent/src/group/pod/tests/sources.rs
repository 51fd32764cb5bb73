//! What environment and volumes refer to.

use super::{group, refused};
use crate::group::{
    eci,
    files::{Content, FileItem, FileOrigin, FileSource, FileVolume},
    rules::Rules,
    spec::{EnvValue, GroupSpec, KeyValue, VolumeSource},
};

/// A Pod with these volumes and fields of its container, and the ConfigMap `conf` and the Secret `login`.
fn manifest(volumes: &str, container: &str) -> String {
    format!(
        "apiVersion: v1
kind: ConfigMap
metadata: {{name: conf}}
data: {{app.ini: 'a=$(B)', other: text}}
binaryData: {{raw: AP8=}}
---
apiVersion: v1
kind: Pod
metadata: {{name: web, labels: {{app: web}}}}
spec:
  volumes:
  {volumes}
  containers:
  - name: c
    image: a/b:1
    resources: {{requests: {{cpu: 300m}}, limits: {{cpu: 1500m, memory: 1Gi}}}}
    {container}
  - {{name: d, image: a/b:1}}
---
apiVersion: v1
kind: Secret
metadata: {{name: login, namespace: default}}
type: Opaque
data: {{user: bWU=, password: b2xk}}
stringData: {{password: hunter2}}
"
    )
}

fn content(bytes: &[u8]) -> FileSource {
    FileSource::Content(Content::from(bytes.to_vec()))
}

fn files(group: &GroupSpec, index: usize) -> &FileVolume {
    match &group.volumes[index].source {
        VolumeSource::Files(files) => files,
        other @ (VolumeSource::EmptyDir { .. }
        | VolumeSource::Disk(_)
        | VolumeSource::Nfs(_)
        | VolumeSource::HostPath(_)) => {
            panic!("{other:?} is no volume of files")
        }
    }
}

fn item(path: &str, mode: u32, source: FileSource) -> FileItem {
    FileItem {
        path: path.into(),
        mode,
        source,
    }
}

#[test]
fn volumes_take_their_files_from_the_manifest() {
    let group = group(&manifest(
        "- {name: all, configMap: {name: conf}}
  - {name: some, secret: {secretName: login, defaultMode: 256, items: [{key: password, path: d/p}, {key: user, path: u, mode: 420}]}}
  - {name: none, secret: {secretName: nobody, optional: true}}
  - {name: fields, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}},
      {path: cpu, resourceFieldRef: {containerName: c, resource: limits.cpu}}]}}
  - {name: mix, projected: {defaultMode: 0o444, sources: [{configMap: {name: conf, items: [{key: other, path: x}]}},
      {secret: {name: login, items: [{key: user, path: x}]}}, {downwardAPI: {items: [{path: n, fieldRef: {fieldPath: metadata.name}}]}}]}}",
        "",
    ))
    .unwrap();
    let all = files(&group, 0);
    assert_eq!(all.origin, FileOrigin::Config("conf".into()));
    assert_eq!(
        all.files,
        [
            item("app.ini", 0o644, content(b"a=$(B)")),
            item("other", 0o644, content(b"text")),
            item("raw", 0o644, content(&[0, 255])),
        ]
    );
    let some = files(&group, 1);
    assert_eq!(some.origin, FileOrigin::Secret("login".into()));
    // stringData wins over data.
    let expected = [
        item("d/p", 0o400, content(b"hunter2")),
        item("u", 0o644, content(b"me")),
    ];
    assert_eq!(some.files, expected);
    assert!(files(&group, 2).files.is_empty());
    let labels = FileSource::Field("metadata.labels".into());
    assert_eq!(
        files(&group, 3).files,
        [item("labels", 0o644, labels), item("cpu", 0o644, content(b"2"))]
    );
    // Of two files with one path the later counts.
    let name = FileSource::Field("metadata.name".into());
    assert_eq!(
        files(&group, 4).files,
        [item("x", 0o444, content(b"me")), item("n", 0o444, name)]
    );
}

#[test]
fn environment_takes_its_values_from_the_manifest() {
    let group = group(&manifest(
        "- {name: s, emptyDir: {}}",
        "envFrom: [{prefix: C_, configMapRef: {name: conf, optional: true}}, {secretRef: {name: nobody, optional: true}}]
    env:
    - {name: P, valueFrom: {secretKeyRef: {name: login, key: password}}}
    - {name: NONE, valueFrom: {configMapKeyRef: {name: conf, key: nope, optional: true}}}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
    - {name: REQUEST, valueFrom: {resourceFieldRef: {resource: requests.cpu}}}
    - {name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    - {name: OTHER, valueFrom: {resourceFieldRef: {containerName: d, resource: limits.cpu}}}",
    ));
    // A value that is no text is refused where it is asked for by all of envFrom.
    let text = group.unwrap_err();
    assert!(
        text.contains("envFrom[0].configMapRef.key: \"raw\": its value is no text"),
        "{text}"
    );
    let group = super::group(&manifest(
        "- {name: s, emptyDir: {}}",
        "envFrom: [{prefix: L_, secretRef: {name: login}}, {secretRef: {name: nobody, optional: true}}]
    env:
    - {name: P, valueFrom: {secretKeyRef: {name: login, key: password}}}
    - {name: NONE, valueFrom: {configMapKeyRef: {name: conf, key: nope, optional: true}}}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
    - {name: REQUEST, valueFrom: {resourceFieldRef: {resource: requests.cpu}}}
    - {name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    - {name: OTHER, valueFrom: {resourceFieldRef: {containerName: d, resource: limits.cpu}}}",
    ))
    .unwrap();
    let env = &group.containers[0].env;
    let names: Vec<_> = env.iter().map(|variable| variable.name.as_str()).collect();
    assert_eq!(
        names,
        ["L_password", "L_user", "P", "CPU", "REQUEST", "MEMORY", "OTHER"]
    );
    let password = EnvValue::Key(KeyValue {
        is_secret: true,
        object: "login".into(),
        key: "password".into(),
        value: Content::from(b"hunter2".to_vec()),
    });
    assert_eq!((&env[0].value, &env[2].value), (&password, &password));
    let literals: Vec<_> = env[3..].iter().map(|variable| &variable.value).collect();
    let expected = ["1500", "1", "1024", &(group.size.cpu_milli / 1000).to_string()]
        .map(|text| EnvValue::Literal(text.to_owned()));
    assert_eq!(literals, expected.iter().collect::<Vec<_>>());
    let printed = format!("{group:?}");
    assert!(
        !printed.contains("hunter2") && !printed.contains("104, 117, 110"),
        "{printed}"
    );
}

#[test]
fn what_is_not_in_the_manifest_is_named() {
    refused(
        &manifest(
            "- {name: a, secret: {secretName: nobody}}
  - {name: b, configMap: {name: conf, items: [{key: nope, path: x}]}}
  - {name: c, projected: {sources: [{serviceAccountToken: {path: token}}]}}
  - {name: d, configMap: {name: conf, defaultMode: 512}, emptyDir: {}}
  - {name: e, downwardAPI: {items: [{path: ip, fieldRef: {fieldPath: status.podIP}}, {path: x, resourceFieldRef: {resource: limits.cpu}}]}}",
            "env:
    - {name: A, valueFrom: {configMapKeyRef: {name: conf, key: nope}}}
    - {name: B, valueFrom: {resourceFieldRef: {resource: limits.gpu}}}
    - {name: C, valueFrom: {resourceFieldRef: {resource: limits.cpu, containerName: z}}}
    - {name: D, valueFrom: {}}
    envFrom: [{secretRef: {name: conf}}]",
        ),
        &[
            "spec.volumes[0].secret.name: \"nobody\": no such Secret in namespace default; valid: one that is a document",
            "spec.volumes[1].configMap.items[0].key: \"nope\": the ConfigMap has no such key; valid: app.ini, other, raw",
            "spec.volumes[2].projected.sources[0].serviceAccountToken: not supported",
            "spec.volumes[3]: \"d\": the volume has several kinds",
            "spec.volumes[3].configMap.defaultMode: \"512\": valid: 0 to 0777",
            "spec.volumes[4].downwardAPI.fieldRef.fieldPath: \"status.podIP\": valid in a file",
            "spec.volumes[4].downwardAPI.items[1].resourceFieldRef.containerName: required",
            "spec.containers[0].env[0].valueFrom.configMapKeyRef.key: \"nope\": ConfigMap \"conf\" has no such key",
            "spec.containers[0].env[1].valueFrom.resourceFieldRef.resource: \"limits.gpu\"",
            "spec.containers[0].env[2].valueFrom.resourceFieldRef.containerName: \"z\": no such container; valid: c, d",
            "spec.containers[0].env[3].valueFrom: valid: one of",
            "spec.containers[0].envFrom[0].secretRef.name: \"conf\": no such Secret",
        ],
    );
}

#[test]
fn objects_with_mistakes_are_named() {
    let pod =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec: {containers: [{name: c, image: x}]}\n---\n";
    for (object, expected) in [
        ("kind: Secret, metadata: {name: s}, data: {a: '*'}", "data"),
        (
            "kind: Secret, metadata: {name: s}, dta: {a: b}",
            "dta (line 6): no such field",
        ),
        (
            "kind: ConfigMap, data: {a: b}",
            "document 2: metadata.name: required",
        ),
        (
            "kind: ConfigMap, metadata: {name: s}, data: {'../a': b}",
            "document 2: data: \"../a\": valid keys",
        ),
        (
            "kind: ConfigMap, metadata: {name: s}, data: {a: b}, binaryData: {a: AA==}",
            "binaryData: \"a\" is a key of data too",
        ),
        (
            "kind: Service, metadata: {name: s}",
            "kind: \"Service\": valid: Pod",
        ),
    ] {
        refused(&format!("{pod}{{apiVersion: v1, {object}}}\n"), &[expected]);
    }
    let twice = "{apiVersion: v1, kind: Secret, metadata: {name: s}}";
    refused(
        &format!("{pod}{twice}\n---\n{twice}\n"),
        &["document 3: metadata.name: \"s\": another Secret"],
    );
    let big = "x".repeat((1 << 20) + 1);
    refused(
        &format!("{pod}{{apiVersion: v1, kind: ConfigMap, metadata: {{name: s}}, data: {{a: {big}}}}}\n"),
        &["data: 1048577 bytes; valid: at most 1048576"],
    );
}

/// Objects are looked for in the Pod's own namespace only.
#[test]
fn namespaces_keep_objects_apart() {
    let text = manifest("- {name: a, configMap: {name: conf}}", "")
        .replace("name: web, labels", "name: web, namespace: shop, labels");
    refused(&text, &["no such ConfigMap in namespace shop"]);
}

#[test]
fn a_config_file_volume_of_eci_is_a_config_map() {
    let pod = group(&manifest(
        "- {name: conf, configMap: {name: conf, defaultMode: 0o600}}",
        "",
    ))
    .unwrap();
    let params = [
        ("ContainerGroupName", "web"),
        ("Container.1.Image", "a/b:1"),
        ("Volume.1.Name", "conf"),
        ("Volume.1.Type", "ConfigFileVolume"),
        ("Volume.1.ConfigFileVolume.DefaultMode", "0600"),
        ("Volume.1.ConfigFileVolume.ConfigFileToPath.1.Path", "app.ini"),
        ("Volume.1.ConfigFileVolume.ConfigFileToPath.1.Content", "YT0kKEIp"),
        ("Volume.1.ConfigFileVolume.ConfigFileToPath.2.Path", "other"),
        ("Volume.1.ConfigFileVolume.ConfigFileToPath.2.Content", "dGV4dA=="),
        ("Volume.1.ConfigFileVolume.ConfigFileToPath.3.Path", "raw"),
        ("Volume.1.ConfigFileVolume.ConfigFileToPath.3.Content", "AP8="),
    ];
    let parse = |pairs: &[(&str, &str)]| {
        let params = eci::params::Params::parse(pairs.iter().copied()).unwrap();
        eci::to_group(&params, &Rules::default())
    };
    assert_eq!(parse(&params).unwrap().volumes, pod.volumes);
    let mut wrong = params.to_vec();
    wrong[4].1 = "0888";
    wrong[6].1 = "secret!";
    wrong[7].1 = "../x";
    let text = parse(&wrong).unwrap_err().to_string();
    for part in [
        "Volume.1.ConfigFileVolume.DefaultMode: \"0888\": valid: four octal digits",
        "Volume.1.ConfigFileVolume.ConfigFileToPath.1.Content: not base64",
        "Volume.1.ConfigFileVolume.ConfigFileToPath.2.Path: \"../x\": valid: a relative path",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
    assert!(!text.contains("secret!"), "{text}");
}
