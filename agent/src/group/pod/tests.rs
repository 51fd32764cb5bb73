mod forms;
mod sources;
mod suite;

use super::*;
use crate::group::{
    lifecycle::Role,
    spec::{EnvValue, GroupSpec},
};

fn group(text: &str) -> Result<GroupSpec, String> {
    let pod = parse_manifest(text).map_err(|error| error.to_string())?;
    to_group(pod, &Rules::default()).map_err(|violations| violations.to_string())
}

/// A Pod with `spec` (indented by two) below `spec:`.
fn with_spec(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\nspec:\n{spec}")
}

/// A Pod with one container and these fields (indented by four) in it.
fn with_container(fields: &str) -> String {
    with_spec(&format!("  containers:\n  - name: c\n    image: a/b:1\n{fields}"))
}

#[track_caller]
fn refused(text: &str, expected: &[&str]) {
    let error = group(text).expect_err("the Pod has mistakes");
    for part in expected {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
}

#[test]
fn a_full_pod_is_taken_over() {
    let spec = group(
        "
apiVersion: v1
kind: Pod
metadata:
  name: web.one
  namespace: shop
  uid: 11-22
  labels: {app: web}
  annotations: {note: hi}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 5
  hostAliases: [{ip: 10.0.0.1, hostnames: [db]}]
  dnsPolicy: None
  dnsConfig: {nameservers: [1.1.1.1], searches: [a.b], options: [{name: ndots, value: '2'}, {name: edns0}]}
  shareProcessNamespace: true
  securityContext: {runAsUser: 1000, sysctls: [{name: net/ipv4/tcp_rmem, value: '4096 87380 6291456'}]}
  volumes:
  - {name: scratch, emptyDir: {medium: Memory, sizeLimit: 64Mi}}
  containers:
  - name: main
    image: registry.local:5000/a/b@sha256:0000000000000000000000000000000000000000000000000000000000000000
    command: [sleep]
    args: ['3600']
    workingDir: /srv
    env: [{name: A, value: b}, {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    ports: [{containerPort: 80, name: http}]
    volumeMounts: [{name: scratch, mountPath: /scratch, subPath: x/y, readOnly: true}]
    resources: {requests: {cpu: 100m, ephemeral-storage: 1Gi}, limits: {memory: 128Mi}}
    securityContext: {runAsGroup: 7, capabilities: {add: [CAP_NET_ADMIN], drop: [ALL]}, readOnlyRootFilesystem: true}
    tty: true
  - name: side
    image: busybox
    securityContext: {runAsUser: 5}
",
    )
    .unwrap();
    assert_eq!(
        (
            spec.name.as_str(),
            spec.namespace.as_str(),
            spec.hostname.as_str()
        ),
        ("web.one", "shop", "web-one")
    );
    assert_eq!(spec.uid.as_deref(), Some("11-22"));
    assert_eq!(spec.restart_policy, RestartPolicy::OnFailure);
    assert_eq!(spec.termination_grace_period_seconds, 5);
    assert_eq!(spec.dns.as_ref().unwrap().options, ["ndots:2", "edns0"]);
    assert_eq!(spec.sysctls["net.ipv4.tcp_rmem"], "4096 87380 6291456");
    assert!(spec.share_process_namespace);
    // 0.1 + 1 vCPU, 128 MiB + 2 GiB: raised to 2 vCPU and 4 GiB.
    assert_eq!((spec.size.cpu_milli, spec.size.memory_bytes), (2000, 4 << 30));
    let main = &spec.containers[0];
    assert_eq!(
        main.image_pull_policy,
        crate::group::spec::ImagePullPolicy::IfNotPresent
    );
    assert_eq!(main.env[1].value, EnvValue::Field("status.podIP".into()));
    assert_eq!(main.capabilities_add, ["NET_ADMIN"]);
    assert_eq!(
        main.size,
        Some(Size {
            cpu_milli: 2000,
            memory_bytes: 128 << 20
        })
    );
    assert_eq!((main.run_as_user, main.run_as_group), (Some(1000), Some(7)));
    assert!(main.tty && main.read_only_root && main.volume_mounts[0].read_only);
    let side = &spec.containers[1];
    assert_eq!((side.run_as_user, side.size), (Some(5), None));
    assert_eq!(
        side.image_pull_policy,
        crate::group::spec::ImagePullPolicy::Always
    );
}

#[test]
fn groups_and_parts_of_volumes_are_taken_over() {
    let spec = group(&with_spec(
        "  securityContext: {fsGroup: 2000, fsGroupChangePolicy: OnRootMismatch, supplementalGroups: [5, 6], \
         supplementalGroupsPolicy: Strict}
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - name: c
    image: x
    volumeMounts:
    - {name: v, mountPath: /a, subPathExpr: $(HOSTNAME)/x}
    - {name: v, mountPath: /b, readOnly: true, recursiveReadOnly: Enabled, mountPropagation: None}
",
    ))
    .unwrap();
    assert_eq!(spec.fs_group, Some(2000));
    assert_eq!(spec.supplemental_groups.ids, [5, 6]);
    assert!(spec.supplemental_groups.is_strict);
    let mounts = &spec.containers[0].volume_mounts;
    assert!(mounts[0].is_sub_path_expr && mounts[0].sub_path.as_deref() == Some("$(HOSTNAME)/x"));
    assert!(mounts[1].read_only && !mounts[1].is_sub_path_expr);
}

#[test]
fn json_is_accepted() {
    let text = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x"},
        "spec":{"containers":[{"name":"c","image":"busybox"}]}}"#;
    let spec = group(text).unwrap();
    assert_eq!(spec.size, crate::group::size::DEFAULT_GROUP);
}

#[test]
fn twenty_containers_are_accepted_and_twenty_one_refused() {
    let containers = |count: usize| {
        let list: String = (0..count)
            .map(|i| format!("  - {{name: c{i}, image: busybox}}\n"))
            .collect();
        with_spec(&format!("  containers:\n{list}"))
    };
    assert_eq!(group(&containers(20)).unwrap().containers.len(), 20);
    refused(
        &containers(21),
        &["spec.containers: \"21 containers\": valid: 1 to 20"],
    );
    refused(
        &with_spec("  containers: []\n"),
        &["spec.containers: no container"],
    );
}

#[test]
fn all_mistakes_are_found_at_once() {
    refused(
        &with_spec(
            "  hostNetwork: true
  containers:
  - {name: c, image: a}
  - name: c
    image: b
    ports: [{containerPort: 10250}]
    resources: {limits: {memory: '0'}}
    volumeMounts: [{name: nope, mountPath: /x}]
",
        ),
        &[
            "spec.hostNetwork: \"true\": not supported",
            "spec.containers[1].name: \"c\": another container has this name",
            "spec.containers[1].ports[0].containerPort: \"10250\": reserved",
            "spec.containers[1].resources.limits.memory: \"0\": valid: 4Mi or more",
            "spec.containers[1].volumeMounts[0].name: \"nope\": no such volume; the group has no volumes",
        ],
    );
}

#[test]
fn wrong_values_name_field_and_what_is_valid() {
    for (fields, expected) in [
        (
            "    ports: [{containerPort: 111}]",
            "spec.containers[0].ports[0].containerPort: \"111\"",
        ),
        (
            "    ports: [{containerPort: 70000}]",
            "spec.containers[0].ports[0].containerPort: \"70000\": valid: 1 to 65535",
        ),
        (
            "    ports: [{containerPort: 0}]",
            "spec.containers[0].ports[0].containerPort: \"0\"",
        ),
        (
            "    ports: [{containerPort: 80, protocol: SCTP}]",
            "ports[0].protocol: \"SCTP\": valid: TCP or UDP",
        ),
        (
            "    ports: [{containerPort: 80, hostPort: 111}]",
            "ports[0].hostPort: \"111\": the host's own",
        ),
        (
            "    ports: [{containerPort: 80, hostPort: 65536}]",
            "ports[0].hostPort: \"65536\": valid: 1 to 65535",
        ),
        (
            "    ports: [{containerPort: 80, hostPort: 80, hostIP: '::1'}]",
            "ports[0].hostIP: \"::1\": valid: an address of the host, of IPv6 another than ::1",
        ),
        (
            "    ports: [{containerPort: 80, hostPort: 80}, {containerPort: 81, hostPort: 80}]",
            "ports[1].hostPort: \"0.0.0.0:80/tcp\": spec.containers[0].ports[0].hostPort has it",
        ),
        (
            "    workingDir: tmp",
            "workingDir: \"tmp\": valid: an absolute path",
        ),
        (
            "    imagePullPolicy: Sometimes",
            "imagePullPolicy: \"Sometimes\": valid: Always, IfNotPresent or Never",
        ),
        (
            "    securityContext: {privileged: true}",
            "securityContext.privileged: \"true\": not supported; add the capabilities",
        ),
        (
            "    securityContext: {capabilities: {add: [NET_ADMIM]}}",
            "securityContext.capabilities.add[0]: \"NET_ADMIM\"",
        ),
        (
            "    securityContext: {runAsNonRoot: true, runAsUser: 0}",
            "securityContext.runAsUser: \"0\"",
        ),
        (
            "    livenessProbe: {exec: {command: []}}",
            "livenessProbe.exec.command: required",
        ),
        (
            "    livenessProbe: {exec: {command: [x]}, tcpSocket: {port: 1}}",
            "livenessProbe: 2 kinds are given; valid: one of exec, httpGet, tcpSocket or grpc",
        ),
        ("    readinessProbe: {}", "readinessProbe: 0 kinds are given"),
        (
            "    livenessProbe: {tcpSocket: {port: 1}, successThreshold: 2}",
            "livenessProbe.successThreshold: \"2\": valid: 1, but for readiness probes",
        ),
        (
            "    readinessProbe: {tcpSocket: {port: 1}, periodSeconds: -1}",
            "readinessProbe.periodSeconds: \"-1\": valid: 0 or more",
        ),
        (
            "    readinessProbe: {tcpSocket: {port: web}}",
            "readinessProbe.tcpSocket.port: \"web\": no port of the container has this name",
        ),
        (
            "    readinessProbe: {httpGet: {port: 443, scheme: H2}}",
            "readinessProbe.httpGet.scheme: \"H2\": valid: HTTP or HTTPS",
        ),
        (
            "    readinessProbe: {httpGet: {port: 80, host: example.com}}",
            "readinessProbe.httpGet.host: \"example.com\": valid: an IP address",
        ),
        (
            "    readinessProbe: {grpc: {port: 0}}",
            "readinessProbe.grpc.port: \"0\": valid: 1 to 65535",
        ),
        (
            "    lifecycle: {preStop: {tcpSocket: {port: 1}}}",
            "lifecycle.preStop.tcpSocket: Kubernetes does not perform it as a hook",
        ),
        (
            "    lifecycle: {stopSignal: SIGQUIT}",
            "lifecycle.stopSignal: \"SIGQUIT\": not supported yet",
        ),
        (
            "    terminationMessagePath: last",
            "terminationMessagePath: \"last\": valid: the absolute path",
        ),
        (
            "    envFrom: [{configMapRef: {name: x}}]",
            "envFrom[0].configMapRef.name: \"x\": no such ConfigMap in namespace default",
        ),
        (
            "    env: [{name: X, valueFrom: {secretKeyRef: {name: x, key: y}}}]",
            "env[0].valueFrom.secretKeyRef.name: \"x\": no such Secret in namespace default",
        ),
        (
            "    env: [{name: X, valueFrom: {fieldRef: {fieldPath: status.phase}}}]",
            "fieldPath: \"status.phase\": valid: metadata.name",
        ),
        ("    env: [{name: 'A=B', value: x}]", "env[0].name: \"A=B\""),
        (
            "    resources: {limits: {cpu: lots}}",
            "resources.limits.cpu: \"lots\": not a quantity",
        ),
        (
            "    resources: {limits: {nvidia.com/gpu: 1}}",
            "resources.limits.nvidia.com/gpu",
        ),
        (
            "    resources: {limits: {memory: 1Gi}, requests: {memory: 2Gi}}",
            "resources.requests.memory: \"2Gi\": above the limit",
        ),
        (
            "    resources: {limits: {cpu: 7, memory: 13Gi}}",
            "\"7 vCPU / 13 GiB\": no such size; nearest valid: 4 vCPU / 8 GiB or 8 vCPU / 16 GiB",
        ),
        (
            "    volumeMounts: [{name: v, mountPath: ../x}]",
            "mountPath: \"../x\"",
        ),
    ] {
        refused(&with_container(&format!("{fields}\n")), &[expected]);
    }
    for (spec, expected) in [
        ("  hostPID: true", "spec.hostPID"),
        (
            "  initContainers: [{name: i, image: x, restartPolicy: Never}]",
            "spec.initContainers[0].restartPolicy: valid: Always, for a sidecar",
        ),
        (
            "  initContainers: [{name: i, image: x, livenessProbe: {tcpSocket: {port: 1}}}]",
            "spec.initContainers[0].livenessProbe: not for an init container",
        ),
        (
            "  initContainers: [{name: c, image: x}]",
            "spec.initContainers[0].name: \"c\": another container has this name",
        ),
        (
            "  volumes: [{name: v, hostPath: {path: /etc}}]",
            "spec.volumes[0].hostPath: not supported: use emptyDir",
        ),
        (
            "  volumes: [{name: v, configMap: {name: x}}]",
            "spec.volumes[0].configMap.name: \"x\": no such ConfigMap",
        ),
        (
            "  volumes: [{name: v}]",
            "spec.volumes[0]: \"v\": the volume has no kind",
        ),
        (
            "  volumes: [{name: v, emptyDir: {}}, {name: v, emptyDir: {}}]",
            "spec.volumes[1].name: \"v\": another volume",
        ),
        (
            "  volumes: [{name: v, emptyDir: {medium: HugePages}}]",
            "emptyDir.medium: \"HugePages\"",
        ),
        ("  restartPolicy: Sometimes", "spec.restartPolicy: \"Sometimes\""),
        ("  dnsPolicy: None", "spec.dnsConfig: required"),
        (
            "  terminationGracePeriodSeconds: -1",
            "spec.terminationGracePeriodSeconds: \"-1\"",
        ),
        ("  hostname: A_b", "spec.hostname: \"A_b\""),
        (
            "  activeDeadlineSeconds: 0",
            "spec.activeDeadlineSeconds: \"0\": valid: 1 to 2147483647",
        ),
        (
            "  securityContext: {sysctls: [{name: kernel.panic, value: '1'}]}",
            "spec.securityContext.sysctls[0].name: \"kernel.panic\": forbidden sysctl: \"kernel.panic\" not allowlisted",
        ),
        ("  imagePullSecrets: [{name: x}]", "spec.imagePullSecrets"),
        (
            "  securityContext: {fsGroup: -1}",
            "spec.securityContext.fsGroup: \"-1\": valid: 0 to 4294967294",
        ),
        (
            "  securityContext: {supplementalGroups: [1, -2]}",
            "spec.securityContext.supplementalGroups[1]: \"-2\"",
        ),
        (
            "  securityContext: {supplementalGroupsPolicy: Some}",
            "supplementalGroupsPolicy: \"Some\": valid: Merge or Strict",
        ),
        (
            "  securityContext: {fsGroupChangePolicy: Never}",
            "fsGroupChangePolicy: \"Never\": valid: Always or OnRootMismatch",
        ),
    ] {
        refused(
            &with_spec(&format!("{spec}\n  containers: [{{name: c, image: x}}]\n")),
            &[expected],
        );
    }
}

#[test]
fn init_containers_come_after_the_others_and_count_for_the_size() {
    let spec = group(&with_spec(
        "  activeDeadlineSeconds: 60
  initContainers:
  - {name: i, image: x, resources: {limits: {cpu: 2, memory: 3Gi}}}
  - {name: s, image: x, restartPolicy: Always, resources: {limits: {cpu: 500m, memory: 1Gi}}}
  - {name: j, image: x, resources: {limits: {cpu: 500m, memory: 2Gi}}}
  containers:
  - {name: c, image: x, resources: {limits: {cpu: 250m, memory: 512Mi}}}
",
    ))
    .unwrap();
    let roles: Vec<_> = spec
        .containers
        .iter()
        .map(|container| (container.name.as_str(), container.lifecycle.role))
        .collect();
    assert_eq!(
        roles,
        [
            ("c", Role::App),
            ("i", Role::Init),
            ("s", Role::Sidecar),
            ("j", Role::Init)
        ]
    );
    // Two vCPU for the first, three GiB for it, or for the sidecar and the last together.
    assert_eq!((spec.size.cpu_milli, spec.size.memory_bytes), (2000, 4 << 30));
    assert_eq!(spec.active_deadline_seconds, Some(60));
    // Without an application there is nothing to initialize.
    refused(
        &with_spec("  initContainers: [{name: i, image: x}]\n  containers: []\n"),
        &["spec.containers: no container"],
    );
}

#[test]
fn mistakes_in_the_text_are_placed() {
    refused("a: [1", &["not valid YAML", "line"]);
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n name: y\n",
        &["not valid YAML", "line 5 column"],
    );
    refused(
        &with_container("    ports:\n    - containerPort: eighty\n"),
        &[
            "spec.containers[0].ports[0].containerPort: invalid type: string \"eighty\"",
            "line 10 column 22",
        ],
    );
    refused(
        &with_container("    imagee: x\n    resources: {limit: {cpu: 1}}\n"),
        &["spec.containers[0].imagee (line 9), spec.containers[0].resources.limit (line 10): no such field"],
    );
    refused(
        "{\"apiVersion\": \"v1\", \"kind\": \"Pod\",\n\"spec\": {\"containers\": [\n{\"imagee\": 1}]}}",
        &["spec.containers[0].imagee (line 3): no such field"],
    );
    refused(
        "apiVersion: apps/v1\nkind: Deployment\n",
        &["apiVersion: \"apps/v1\": valid: v1"],
    );
    refused(
        "apiVersion: v1\nkind: Service\n",
        &["kind: \"Service\": valid: Pod"],
    );
    refused("", &["holds 0 Pods"]);
    refused("a: 1\n---\nb: 2\n", &["apiVersion: \"\": valid: v1"]);
    let pod = with_container("");
    refused(&format!("{pod}\n---\n{pod}"), &["holds 2 Pods"]);
    refused("hello", &["not a mapping"]);
    refused("{\"a\": }", &["not valid JSON", "line 1 column"]);
    refused(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n",
        &["spec: required"],
    );
}

#[test]
fn alias_bombs_are_refused() {
    let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
    for level in 1..12 {
        let before = level - 1;
        let items = vec![format!("*a{before}"); 9].join(",");
        text.push_str(&format!("a{level}: &a{level} [{items}]\n"));
    }
    refused(&text, &["not valid YAML"]);
}

#[test]
fn size_annotation() {
    let pod = |sizes: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n  annotations:\n    {SIZE_ANNOTATION}: {sizes}\nspec:\n  \
             containers:\n  - {{name: c, image: x, resources: {{limits: {{cpu: 2, memory: 3Gi}}}}}}\n"
        )
    };
    assert_eq!(group(&pod("7-13Gi,8-16Gi")).unwrap().size.cpu_milli, 8000);
    refused(
        &pod("1-2Gi"),
        &["the containers together exceed the size of the group"],
    );
    refused(&pod("big"), &["eci-use-specs]: \"big\": valid: vCPU and memory"]);
}

#[test]
fn generated_names_get_a_suffix() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {generateName: job-}\nspec: {containers: [{name: c, image: x}]}\n";
    let name = group(text).unwrap().name;
    assert!(name.starts_with("job-") && name.len() == 9, "{name}");
}

/// A Pod with one annotation.
fn annotated(key: &str, value: &str) -> Result<GroupSpec, Violations> {
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n  annotations:\n    {key}: {value:?}\nspec:\n  containers:\n  \
         - {{name: c, image: i}}\n"
    );
    to_group(parse_manifest(&text).unwrap(), &Rules::default())
}

#[test]
fn security_groups_are_an_annotation() {
    let groups = |text: &str| {
        annotated(network::SECURITY_GROUP_ANNOTATION, text).map(|spec| spec.network.security_groups)
    };
    assert_eq!(groups("sg-a, sg-b").unwrap(), ["sg-a", "sg-b"]);
    assert!(groups("").unwrap().is_empty());
    let found = groups("sg-a,sg-b,sg-c,sg-d,sg-e,sg-a").unwrap_err();
    let texts: Vec<_> = found.0.iter().map(ToString::to_string).collect();
    let field = "metadata.annotations[k8s.aliyun.com/eci-security-group]";
    assert_eq!(
        texts,
        [
            format!("{field}: \"6 security groups\": valid: at most 5"),
            format!("{field}: \"sg-a\": named twice; valid: each security group once"),
        ]
    );
}

#[test]
fn limits_of_bandwidth_are_annotations_in_bits_a_second() {
    let limits =
        |text: &str| annotated(network::EGRESS_ANNOTATION, text).map(|spec| spec.network.egress_bits);
    for (text, expected) in [
        ("40M", 40_000_000),
        ("1Ki", 1024),
        ("1e3", 1000),
        ("1P", 10_u64.pow(15)),
    ] {
        assert_eq!(limits(text).unwrap(), Some(expected), "{text}");
    }
    for (text, problem) in [
        ("fast", "\"fast\": not a quantity"),
        ("999", "\"999\": bits a second; valid: 1000 (1k) to"),
        ("0", "\"0\": bits a second"),
        ("2P", "\"2000000000000000\": bits a second"),
    ] {
        let found = limits(text).unwrap_err().to_string();
        let expected = format!("metadata.annotations[kubernetes.io/egress-bandwidth]: {problem}");
        assert!(found.contains(&expected), "{found}");
    }
}
