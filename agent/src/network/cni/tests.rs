use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::{
    config::{CniConfig, CniMode},
    group::spec::{PortSpec, testing},
};

fn id() -> GroupId {
    GroupId::parse("eci-0123456789abcdefghij").unwrap()
}

#[test]
fn plugins_are_told_what_a_group_wants_of_them() {
    let mut spec = testing::group("g", 1);
    let request = Request::of(&spec, &id());
    assert_eq!(
        request.args,
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=g;K8S_POD_INFRA_CONTAINER_ID=eci-0123456789abcdefghij"
    );
    assert!(request.runtime.is_empty());
    spec.network.egress_bits = Some(10_000_000);
    spec.network.ingress_bits = Some(1000);
    spec.containers[0].ports.push(PortSpec {
        name: String::new(),
        port: 80,
        protocol: "UDP".into(),
        host_port: Some(8080),
        host_ip: Some("192.0.2.1".parse().unwrap()),
    });
    assert_eq!(
        Value::from(Request::of(&spec, &id()).runtime),
        json!({
            "portMappings": [
                { "hostPort": 8080, "containerPort": 80, "protocol": "udp", "hostIP": "192.0.2.1" },
            ],
            "bandwidth": {
                "ingressRate": 1000, "ingressBurst": 160_000, "egressRate": 10_000_000, "egressBurst": 1_000_000,
            },
        })
    );
}

/// Leaves its verb, and fails at DEL where there is a file `fail`.
const PLUGIN: &str = r#"#!/bin/sh
dir=$(dirname "$0"); cat > "$dir/input"; echo "$CNI_COMMAND" >> "$dir/calls"
if [ "$CNI_COMMAND" = DEL ] && [ -e "$dir/fail" ]; then echo '{"code":7,"msg":"not now"}'; exit 1; fi
"#;

struct Bench {
    dir: tempfile::TempDir,
    config: CniConfig,
}

impl Bench {
    fn new(mode: CniMode) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = CniConfig {
            mode,
            conf_dir: dir.path().join("net.d"),
            bin_dirs: vec![dir.path().to_owned()],
        };
        let plugin = dir.path().join("plugin");
        std::fs::write(&plugin, PLUGIN).unwrap();
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir, config }
    }

    fn configure(&self) {
        std::fs::create_dir(&self.config.conf_dir).unwrap();
        let conf = json!({ "cniVersion": "1.0.0", "name": "n", "type": "plugin" });
        std::fs::write(self.config.conf_dir.join("10.conf"), conf.to_string()).unwrap();
    }

    fn open(&self) -> Result<Cni> {
        Cni::open(&self.config, self.dir.path(), self.dir.path())
    }
}

#[test]
fn the_mode_says_whether_a_configuration_is_used_and_needed() {
    for (mode, without, with) in [
        (CniMode::Auto, Some(false), true),
        (CniMode::Off, Some(false), false),
        (CniMode::Required, None, true),
    ] {
        let bench = Bench::new(mode);
        let opened = bench.open().map(|cni| cni.network().is_some());
        if let Err(error) = &opened {
            assert!(
                error.chain().contains("network.cni.mode is required"),
                "{}",
                error.chain()
            );
        }
        assert_eq!(opened.ok(), without, "{mode:?}");
        bench.configure();
        assert_eq!(bench.open().unwrap().network().is_some(), with, "{mode:?}");
    }
}

#[tokio::test]
async fn what_a_killed_agent_left_is_taken_back_by_the_next_even_when_cni_is_off() {
    let mut bench = Bench::new(CniMode::Auto);
    bench.configure();
    let cni = bench.open().unwrap();
    // Killed in the middle of ADD.
    let record = Record {
        network: cni.network().unwrap().clone(),
        netns: bench.dir.path().join("netns/never"),
        args: String::new(),
        runtime: Map::new(),
        answer: None,
        given: None,
    };
    cni.put(&id(), &record).unwrap();
    drop(cni);
    bench.config.mode = CniMode::Off;
    let cni = bench.open().unwrap();
    assert_eq!(cni.orphans(&[]), [id()]);
    assert!(cni.orphans(&[id()]).is_empty());
    assert!(cni.addresses(&id()).is_none());
    // It stays known until the plugins have done their part.
    std::fs::write(bench.dir.path().join("fail"), "").unwrap();
    let error = cni.remove(&id()).await.unwrap_err().chain();
    assert!(error.contains("not now (code 7)"), "{error}");
    assert_eq!(bench.open().unwrap().orphans(&[]), [id()]);
    std::fs::remove_file(bench.dir.path().join("fail")).unwrap();
    cni.remove(&id()).await.unwrap();
    cni.remove(&id()).await.unwrap();
    assert!(cni.orphans(&[]).is_empty() && bench.open().unwrap().orphans(&[]).is_empty());
    let calls = std::fs::read_to_string(bench.dir.path().join("calls")).unwrap();
    assert_eq!(calls, "DEL\nDEL\n");
}
