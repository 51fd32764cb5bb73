use super::*;
use crate::group::host_path::{HostPathKind, HostPathVolume};
use crate::group::network::wants_ipv6;

fn group(pairs: &[(&str, &str)]) -> Result<GroupSpec, Violations> {
    let base = [
        ("ContainerGroupName", "web"),
        ("Container.1.Name", "c"),
        ("Container.1.Image", "a/b:1"),
    ];
    let mut all: BTreeMap<_, _> = base.into_iter().collect();
    all.extend(pairs.iter().copied());
    to_group(&Params::parse(all).unwrap(), &Rules::default())
}

#[test]
fn init_containers_are_taken_over() {
    let spec = group(&[
        ("InitContainer.1.Image", "a"),
        ("InitContainer.1.Command.1", "x"),
        ("InitContainer.2.Image", "b"),
        ("InitContainer.2.Name", "second"),
        ("ActiveDeadlineSeconds", "5"),
    ])
    .unwrap();
    let names: Vec<_> = spec
        .containers
        .iter()
        .map(|container| (container.name.as_str(), container.lifecycle.role))
        .collect();
    assert_eq!(
        names,
        [
            ("c", Role::App),
            ("init-container-1", Role::Init),
            ("second", Role::Init)
        ]
    );
    assert_eq!(spec.active_deadline_seconds, Some(5));
    let refused = group(&[("InitContainer.1.Image", ""), ("InitContainer.1.Tty", "true")]).unwrap_err();
    let fields: Vec<_> = refused
        .0
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    assert_eq!(fields, ["InitContainer.1.Tty", "InitContainer.1.Image"]);
}

#[test]
fn what_is_restricted_is_taken_where_the_operator_allows_it() {
    let pairs = [
        ("ContainerGroupName", "web"),
        ("Container.1.Image", "a"),
        ("Container.1.SecurityContextPrivileged", "true"),
        ("Volume.1.Name", "v"),
        ("Volume.1.Type", "HostPathVolume"),
        ("Volume.1.HostPathVolume.Path", "/var/lib/v"),
        ("Volume.1.HostPathVolume.Type", "Directory"),
    ];
    let params = Params::parse(pairs).unwrap();
    let found = to_group(&params, &Rules::default()).unwrap_err();
    assert!(
        found
            .0
            .iter()
            .all(|found| found.kind == ViolationKind::Restricted),
        "{found}"
    );
    assert_eq!(found.0.len(), 2, "{found}");
    let rules = Rules {
        allow: Allow {
            privileged: true,
            host_path: true,
            ..Allow::default()
        },
        ..Rules::default()
    };
    let spec = to_group(&params, &rules).unwrap();
    assert!(spec.containers[0].privileged);
    assert_eq!(
        spec.volumes[0].source,
        VolumeSource::HostPath(HostPathVolume {
            path: "/var/lib/v".into(),
            kind: HostPathKind::Directory,
        })
    );
}

#[test]
fn sysctls_are_taken_where_their_kind_belongs() {
    let spec = group(&[
        ("ShareProcessNamespace", "true"),
        ("SecurityContext.Sysctl.1.Name", "net.ipv4.ping_group_range"),
        ("SecurityContext.Sysctl.1.Value", "0 1"),
        ("HostSecurityContext.Sysctl.1.Name", "kernel.msgmax"),
        ("HostSecurityContext.Sysctl.1.Value", "65536"),
    ])
    .unwrap();
    assert!(spec.share_process_namespace);
    let sysctls: Vec<_> = spec.sysctls.iter().collect();
    let expected = [("kernel.msgmax", "65536"), ("net.ipv4.ping_group_range", "0 1")];
    assert_eq!(
        sysctls,
        expected
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .each_ref()
            .map(|(n, v)| (n, v))
    );
    refused(
        &[
            ("SecurityContext.Sysctl.1.Name", "kernel.msgmax"),
            ("SecurityContext.Sysctl.1.Value", "65536"),
        ],
        ViolationKind::Restricted,
        "SecurityContext.Sysctl.1.Name: \"kernel.msgmax\": forbidden sysctl: \"kernel.msgmax\" not allowlisted",
    );
}

#[test]
fn probes_and_hooks_are_those_of_the_same_pod() {
    let eci = group(&[
        ("Container.1.LivenessProbe.HttpGet.Port", "80"),
        ("Container.1.LivenessProbe.HttpGet.Path", "/live"),
        ("Container.1.LivenessProbe.HttpGet.Scheme", "HTTPS"),
        ("Container.1.LivenessProbe.InitialDelaySeconds", "7"),
        ("Container.1.ReadinessProbe.Exec.Command.1", "ok"),
        ("Container.1.ReadinessProbe.TcpSocket.Port", "None"),
        ("Container.1.LifecyclePostStartHandlerExec.1", "a"),
        ("Container.1.LifecyclePreStopHandlerHttpGetPort", "81"),
        ("Container.1.LifecyclePreStopHandlerHttpGetPath", "/bye"),
        ("Container.1.LifecyclePreStopHandlerHttpGetScheme", "HTTPS"),
        ("Container.1.TerminationMessagePolicy", "FallbackToLogsOnError"),
    ])
    .unwrap();
    let text = "
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  containers:
  - name: c
    image: a/b:1
    livenessProbe: {httpGet: {port: 80, path: /live, scheme: HTTPS}, initialDelaySeconds: 7}
    readinessProbe: {exec: {command: [ok]}}
    lifecycle: {postStart: {exec: {command: [a]}}, preStop: {httpGet: {port: 81, path: /bye, scheme: HTTPS}}}
    terminationMessagePolicy: FallbackToLogsOnError
";
    let pod = pod::to_group(pod::parse_manifest(text).unwrap(), &Rules::default()).unwrap();
    assert_eq!(eci.containers[0].lifecycle, pod.containers[0].lifecycle);
}

#[test]
fn a_full_request_is_taken_over() {
    let spec = group(&[
        ("Cpu", "2.0"),
        ("Memory", "4"),
        ("RestartPolicy", "Never"),
        ("Tag.1.Key", "team"),
        ("Tag.1.Value", "a"),
        ("Container.1.Cpu", "0.5"),
        ("Container.1.Memory", "0.5"),
        ("Container.1.Command.1", "sh"),
        ("Container.1.Command.2", "-c"),
        ("Container.1.Arg.1", "true"),
        ("Container.1.EnvironmentVar.1.Key", "A"),
        ("Container.1.EnvironmentVar.1.Value", "b=c"),
        ("Container.1.EnvironmentVar.2.Key", "IP"),
        ("Container.1.EnvironmentVar.2.FieldRef.FieldPath", "status.podIP"),
        ("Container.1.Port.1.Port", "80"),
        ("Container.1.Port.1.Protocol", "None"),
        ("Container.1.VolumeMount.1.Name", "v"),
        ("Container.1.VolumeMount.1.MountPath", "/v"),
        ("Container.1.VolumeMount.1.ReadOnly", "None"),
        ("Container.1.SecurityContext.Capability.Add.1", "NET_ADMIN"),
        ("Container.1.Tty", "True"),
        ("Container.2.Image", "busybox"),
        ("Volume.1.Name", "v"),
        ("Volume.1.Type", "EmptyDirVolume"),
        ("Volume.1.EmptyDirVolume.SizeLimit", "2"),
        ("ImageRegistryCredential.1.Server", "reg.local:5000"),
        ("ImageRegistryCredential.1.UserName", "u"),
        ("ImageRegistryCredential.1.Password", "p"),
        ("VSwitchId", "vsw-1"),
        ("SpotStrategy", "NoSpot"),
        ("OwnerId", "7"),
    ])
    .unwrap();
    assert_eq!((spec.size.cpu_milli, spec.size.memory_bytes), (2000, 4 << 30));
    assert_eq!(spec.labels["team"], "a");
    let c = &spec.containers[0];
    assert_eq!(
        c.size,
        Some(Size {
            cpu_milli: 500,
            memory_bytes: 512 << 20
        })
    );
    assert_eq!(
        (&c.command[..], &c.args[..]),
        (&["sh".into(), "-c".into()][..], &["true".into()][..])
    );
    assert_eq!(c.env[0].value, EnvValue::Literal("b=c".into()));
    assert_eq!(c.env[1].value, EnvValue::Field("status.podIP".into()));
    assert_eq!((c.ports[0].port, c.ports[0].protocol.as_str()), (80, "TCP"));
    assert!(c.tty && !c.volume_mounts[0].read_only);
    assert_eq!(spec.containers[1].name, "container-2");
    assert_eq!(
        spec.volumes[0].source,
        VolumeSource::EmptyDir {
            memory: false,
            size_limit_bytes: Some(2 << 30)
        }
    );
}

#[track_caller]
fn refused(pairs: &[(&str, &str)], kind: ViolationKind, expected: &str) {
    let violations = group(pairs).expect_err("the request has a mistake");
    assert!(
        violations
            .0
            .iter()
            .any(|v| v.kind == kind && v.to_string().contains(expected)),
        "{expected:?} is not in:\n{violations:?}"
    );
}

#[test]
fn mistakes_are_named_in_the_words_of_the_door() {
    use ViolationKind::{DuplicateContainer, Invalid, Missing, Restricted, Size, Unsupported};
    for (pairs, kind, expected) in [
        (
            &[("Container.2.Name", "d")][..],
            Missing,
            "Container.2.Image: required",
        ),
        (
            &[("ContainerGroupName", "")],
            Missing,
            "ContainerGroupName: required",
        ),
        (
            &[("ContainerGroupName", "A")],
            Invalid,
            "ContainerGroupName: \"A\": valid: 2 to 128",
        ),
        (
            &[("Container.2.Name", "c"), ("Container.2.Image", "x")],
            DuplicateContainer,
            "Container.2.Name: \"c\"",
        ),
        (
            &[("Container.1.Port.1.Port", "998")],
            Invalid,
            "Container.1.Port.1.Port: \"998\": reserved",
        ),
        (
            &[("Container.1.Port.1.Port", "0")],
            Invalid,
            "Container.1.Port.1.Port: \"0\": valid: 1 to 65535",
        ),
        (
            &[("Cpu", "7"), ("Memory", "13")],
            Size,
            "nearest valid: 4 vCPU / 8 GiB or 8 vCPU / 16 GiB",
        ),
        (
            &[("Memory", "0"), ("Cpu", "1")],
            Size,
            "Memory: \"0\": valid: more than 0",
        ),
        (&[("Cpu", "1")], Size, "only one of the two"),
        (
            &[("Cpu", "1"), ("Memory", "2"), ("Container.1.Cpu", "2")],
            Size,
            "the containers together exceed",
        ),
        (
            &[("ActiveDeadlineSeconds", "0")],
            Invalid,
            "ActiveDeadlineSeconds: \"0\"",
        ),
        (
            &[
                ("Container.1.LivenessProbe.HttpGet.Port", "80"),
                ("Container.1.LivenessProbe.TcpSocket.Port", "80"),
            ],
            Invalid,
            "Container.1.LivenessProbe: 2 kinds",
        ),
        (
            &[("Container.1.LivenessProbe.PeriodSeconds", "5")],
            Invalid,
            "Container.1.LivenessProbe: 0 kinds",
        ),
        (
            &[("Container.1.LifecyclePreStopHandlerHttpGetPath", "/")],
            Missing,
            "LifecyclePreStopHandlerHttpGetPort: required",
        ),
        (
            &[("Container.1.SecurityContextPrivileged", "True")],
            Restricted,
            "SecurityContextPrivileged",
        ),
        (
            &[("Volume.1.Name", "v"), ("Volume.1.Type", "NFSVolume")],
            Missing,
            "Volume.1.NFSVolume.Server: required",
        ),
        (
            &[
                ("Volume.1.Name", "v"),
                ("Volume.1.Type", "NFSVolume"),
                ("Volume.1.NFSVolume.Server", "nas:1"),
                ("Volume.1.NFSVolume.Path", "/a/../b"),
                ("Volume.1.NFSVolume.ReadOnly", "perhaps"),
            ],
            Invalid,
            "Volume.1.NFSVolume.Path: \"/a/../b\": valid: an absolute path",
        ),
        (
            &[
                ("Volume.1.Name", "v"),
                ("Volume.1.Type", "FlexVolume"),
                ("Volume.1.FlexVolume.Driver", "alicloud/nas"),
                ("Volume.1.FlexVolume.Options", "{\"server\": \"nas\"}"),
            ],
            Unsupported,
            "Volume.1.FlexVolume.Driver: \"alicloud/nas\": not supported; valid: alicloud/disk, or a volume of Type NFSVolume",
        ),
        (
            &[("Volume.1.Name", "v"), ("Volume.1.Type", "HostPathVolume")],
            Restricted,
            "Volume.1.Type",
        ),
        (&[("AutoCreateEip", "true")], Unsupported, "AutoCreateEip"),
        (&[("EphemeralStorage", "10")], Unsupported, "EphemeralStorage"),
        (
            &[("RestartPolicy", "Maybe")],
            Invalid,
            "RestartPolicy: \"Maybe\": valid: Always, OnFailure, Never",
        ),
        (&[("Tag.1.Key", "acs:x")], Invalid, "Tag.Key: \"acs:x\""),
        (
            &[("OsType", "Windows")],
            Invalid,
            "OsType: \"Windows\": valid: Linux",
        ),
    ] {
        refused(pairs, kind, expected);
    }
}

#[test]
fn limits_of_lists() {
    let tags: Vec<_> = (1..=11)
        .map(|i| (format!("Tag.{i}.Key"), format!("k{i}")))
        .collect();
    let tags: Vec<_> = tags.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    refused(&tags, ViolationKind::TooLong, "11 tags");
    let containers: Vec<_> = (1..=21)
        .flat_map(|i| {
            [
                (format!("Container.{i}.Image"), "x"),
                (format!("Container.{i}.Name"), "x"),
            ]
        })
        .collect();
    let containers: Vec<_> = containers.iter().map(|(k, v)| (k.as_str(), *v)).collect();
    refused(
        &containers,
        ViolationKind::TooLong,
        "Container: \"21 containers\": valid: 1 to 20",
    );
}

#[test]
fn no_sizes_at_all_is_two_cpus_and_four_gib() {
    assert_eq!(group(&[]).unwrap().size, crate::group::size::DEFAULT_GROUP);
}

#[test]
fn a_disk_is_the_same_by_either_type_of_volume() {
    let disk = |pairs: &[(&str, &str)]| {
        let mut all = vec![("Volume.1.Name", "v")];
        all.extend(pairs);
        match group(&all)?.volumes.remove(0).source {
            VolumeSource::Disk(disk) => Ok::<_, Violations>(disk),
            other => panic!("{other:?}"),
        }
    };
    let direct = disk(&[
        ("Volume.1.Type", "DiskVolume"),
        ("Volume.1.DiskVolume.DiskSize", "20"),
        ("Volume.1.DiskVolume.FsType", "ext4"),
    ])
    .unwrap();
    assert_eq!(
        (direct.new_gib, direct.delete_with_group, direct.is_flex),
        (Some(20), false, false)
    );
    let options = r#"{"volumeId": "d-1a", "deleteWithInstance": true, "performanceLevel": "PL1"}"#;
    let flex = disk(&[
        ("Volume.1.Type", "FlexVolume"),
        ("Volume.1.FlexVolume.Driver", "alicloud/disk"),
        ("Volume.1.FlexVolume.Options", options),
    ])
    .unwrap();
    assert_eq!(flex.id.unwrap().to_string(), "d-1a");
    assert_eq!(
        (flex.new_gib, flex.delete_with_group, flex.is_flex),
        (None, true, true)
    );

    // All that is wrong, at once.
    let refused = disk(&[
        ("Volume.1.Type", "FlexVolume"),
        ("Volume.1.FlexVolume.Driver", "alicloud/oss"),
        ("Volume.1.FlexVolume.FsType", "xfs"),
        (
            "Volume.1.FlexVolume.Options",
            r#"{"volumeSize": 19, "volumeid": "d-1"}"#,
        ),
    ])
    .unwrap_err()
    .to_string();
    for part in ["alicloud/oss", "xfs", "volumeSize", "volumeid"] {
        assert!(refused.contains(part), "{part} is missing in {refused}");
    }
}

#[test]
fn a_security_group_is_taken_over() {
    let spec = group(&[("SecurityGroupId", "sg-a")]).unwrap();
    assert_eq!(spec.network.security_groups, ["sg-a"]);
    for none in ["", "None"] {
        let spec = group(&[("SecurityGroupId", none)]).unwrap();
        assert_eq!(spec.network, NetworkSpec::default());
    }
}

#[test]
fn one_ipv6_address_may_be_asked_for() {
    for (count, expected) in [("1", Some(true)), ("0", None)] {
        let spec = group(&[("Ipv6AddressCount", count)]).unwrap();
        assert_eq!(spec.network.ipv6, expected, "{count}");
        assert_eq!(wants_ipv6(&spec), expected.is_some());
    }
    assert!(!wants_ipv6(&group(&[]).unwrap()));
    let refused = group(&[("Ipv6AddressCount", "2")]).unwrap_err().to_string();
    assert!(
        refused.contains("Ipv6AddressCount") && refused.contains("0 to 1"),
        "{refused}"
    );
}

#[test]
fn limits_of_bandwidth_are_bits_a_second_and_0_is_none() {
    let spec = group(&[("IngressBandwidth", "40000000"), ("EgressBandwidth", "0")]).unwrap();
    assert_eq!(
        (spec.network.ingress_bits, spec.network.egress_bits),
        (Some(40_000_000), None)
    );
    let found = group(&[("IngressBandwidth", "1"), ("EgressBandwidth", "-1")]).unwrap_err();
    let fields: Vec<_> = found.0.iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(fields, ["EgressBandwidth", "IngressBandwidth"]);
}
