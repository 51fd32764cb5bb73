//! An engine that records what it is asked and plays simple commands; for tests of the doors only.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    sync::watch,
};

use crate::{
    engine::{
        CloneRequest, ContainerStats, DiskInfo, Engine, ExecControl, ExecRequest, ExecSession, Forked,
        GroupStats, HostStats, ImageInfo, LogOptions, NetworkStats, PullStatus, SnapshotInfo,
    },
    error::{Error, ErrorKind, Result},
    group::{
        conditions,
        disk::DiskId,
        network, pod,
        rules::Rules,
        spec::{GroupSpec, ImagePullPolicy, RegistryCredential},
        status::{ContainerState, ContainerStatus, Event, EventKind, Group, GroupId, GroupStatus, Phase},
        violation::{ViolationKind, Violations},
    },
    snapshots::SnapshotId,
};

/// A running group with one container `c`.
pub(crate) fn group(id: &str, name: &str, namespace: &str) -> Group {
    let text = format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Pod\",\"metadata\":{{\"name\":{name:?},\"namespace\":{namespace:?},\
         \"labels\":{{\"app\":\"web\"}}}},\"spec\":{{\"containers\":[{{\"name\":\"c\",\"image\":\"busybox\"}}]}}}}"
    );
    let spec = pod::to_group(pod::parse_manifest(&text).unwrap(), &Rules::default()).unwrap();
    running(GroupId::parse(id).unwrap(), spec, 1_767_225_600_000)
}

fn running(id: GroupId, spec: GroupSpec, at_ms: u64) -> Group {
    let containers = spec.containers.iter().map(|container| ContainerStatus {
        name: container.name.clone(),
        state: ContainerState::Running { started_at_ms: at_ms },
        previous: None,
        restart_count: 0,
        started: true,
        ready: true,
        image_digest: Some(format!("sha256:{}", "0".repeat(64))),
        container_id: Some(format!("{}-{}", id.as_str(), container.name)),
    });
    let event = |reason: &str| Event {
        kind: EventKind::Normal,
        reason: reason.into(),
        message: format!("{reason} it"),
        container: None,
        count: 1,
        first_ms: at_ms,
        last_ms: at_ms,
    };
    let mut group = Group {
        status: GroupStatus {
            phase: Phase::Running,
            reason: String::new(),
            message: String::new(),
            created_at_ms: at_ms,
            started_at_ms: Some(at_ms),
            finished_at_ms: None,
            ip6: Some("fd00:89::a59:2".into()),
            ip: Some("10.89.0.2".into()),
            initialized: true,
            conditions: Vec::new(),
            containers: containers.collect(),
            events: vec![event("Pulled"), event("Started")],
        },
        id,
        spec,
    };
    conditions::update(&mut group.status, &group.spec, at_ms);
    group
}

fn snapshot(group: &Group) -> SnapshotInfo {
    SnapshotInfo {
        id: SnapshotId::parse("snap-0000000000000000000a").unwrap(),
        group_id: group.id.clone(),
        name: group.spec.name.clone(),
        namespace: group.spec.namespace.clone(),
        created_at_ms: 1_767_225_600_000,
        pause_us: 5000,
        size_bytes: 50 << 20,
    }
}

/// The engine.
pub(crate) struct FakeEngine {
    groups: watch::Sender<Vec<Group>>,
    tokens: Mutex<BTreeMap<String, (GroupSpec, GroupId)>>,
    calls: Mutex<Vec<String>>,
    rules: Rules,
}

impl FakeEngine {
    pub(crate) fn new(groups: Vec<Group>) -> Self {
        Self {
            groups: watch::Sender::new(groups),
            tokens: Mutex::default(),
            calls: Mutex::default(),
            rules: Rules::default(),
        }
    }

    /// What was asked, in order.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    fn record(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
    }

    /// Changes a group, as the engine would when something happened.
    pub(crate) fn change(&self, id: &GroupId, change: impl FnOnce(&mut Group)) {
        self.groups.send_modify(|groups| {
            if let Some(group) = groups.iter_mut().find(|group| group.id == *id) {
                change(group);
            }
        });
    }
}

fn not_found(id: &GroupId) -> Error {
    Error::new(ErrorKind::NotFound, format!("No container group {id}"))
}

struct NoControl;

#[async_trait]
impl ExecControl for NoControl {
    async fn resize(&self, _: u16, _: u16) -> Result<()> {
        Ok(())
    }

    async fn signal(&self, _: i32) -> Result<()> {
        Ok(())
    }
}

/// `echo WORDS`, `cat`, `lines N`, `exit N`, `sleep`; the exit code.
async fn play(
    command: Vec<String>,
    mut stdin: DuplexStream,
    mut stdout: DuplexStream,
    mut stderr: DuplexStream,
) -> i32 {
    match command[0].as_str() {
        "echo" => {
            let line = format!("{}\n", command[1..].join(" "));
            let _ = stdout.write_all(line.as_bytes()).await;
            0
        }
        "cat" => {
            let mut buffer = [0; 1000];
            while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
                let _ = stdout.write_all(&buffer[..count]).await;
            }
            0
        }
        "lines" => {
            for line in 0..command[1].parse::<u32>().unwrap() {
                let _ = stdout.write_all(format!("line {line}\n").as_bytes()).await;
            }
            0
        }
        "exit" => {
            let _ = stderr.write_all(b"bye\n").await;
            command[1].parse().unwrap()
        }
        _ => std::future::pending().await,
    }
}

#[async_trait]
impl Engine for FakeEngine {
    fn rules(&self) -> &Rules {
        &self.rules
    }

    async fn create(&self, spec: GroupSpec, client_token: Option<String>) -> Result<GroupId> {
        self.record(format!("create {}", spec.name));
        self.check(&spec).await?;
        if let Some(token) = &client_token
            && let Some((before, id)) = self.tokens.lock().unwrap().get(token)
        {
            if *before == spec {
                return Ok(id.clone());
            }
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                "The client token was used with other parameters",
            ));
        }
        let tail = uuid::Uuid::new_v4().simple().to_string();
        let id = GroupId::parse(&format!("eci-{}", &tail[..20])).unwrap();
        if let Some(token) = client_token {
            let before = (spec.clone(), id.clone());
            self.tokens.lock().unwrap().insert(token, before);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let mut group = running(id.clone(), spec, u64::try_from(now.as_millis()).unwrap());
        if group.spec.containers[0].image.contains("missing") {
            group.status.phase = Phase::Pending;
            group.status.reason = "ImagePullFailed".into();
            group.status.message = "No such image".into();
        }
        self.groups.send_modify(|groups| groups.push(group));
        Ok(id)
    }

    /// Knows no security groups, and has no IPv6.
    async fn check(&self, spec: &GroupSpec) -> Result<()> {
        let mut found = Violations::default();
        if spec.network.ipv6 == Some(true) {
            found.add(
                ViolationKind::NoIpv6,
                network::ipv6_field(spec.door),
                1,
                "valid: none",
            );
        }
        for id in &spec.network.security_groups {
            let field = network::security_group_field(spec.door);
            found.add(ViolationKind::UnknownSecurityGroup, field, id, "valid: none");
        }
        if found.0.is_empty() {
            Ok(())
        } else {
            Err(Error::refused(found))
        }
    }

    async fn list(&self) -> Vec<Group> {
        self.groups.borrow().clone()
    }

    async fn get(&self, id: &GroupId) -> Result<Group> {
        let groups = self.groups.borrow();
        let group = groups.iter().find(|group| group.id == *id);
        group.cloned().ok_or_else(|| not_found(id))
    }

    async fn wait_change(&self, id: &GroupId, seen: &Group) -> Result<Group> {
        let mut changes = self.groups.subscribe();
        loop {
            let now = self.get(id).await?;
            if now.status != seen.status {
                return Ok(now);
            }
            changes.changed().await.unwrap();
        }
    }

    async fn delete(&self, id: &GroupId, grace_seconds: Option<u64>, wait: bool) -> Result<()> {
        self.record(format!("delete grace={grace_seconds:?} wait={wait}"));
        self.get(id).await?;
        self.groups
            .send_modify(|groups| groups.retain(|group| group.id != *id));
        Ok(())
    }

    async fn restart(&self, id: &GroupId) -> Result<()> {
        self.record("restart");
        self.get(id).await.map(drop)
    }

    async fn update(&self, id: &GroupId, base: &GroupSpec, spec: GroupSpec) -> Result<bool> {
        self.record("update");
        let group = self.get(id).await?;
        assert_eq!(group.spec, *base);
        let changed = group.spec != spec;
        self.change(id, |group| {
            group.status.containers = running(group.id.clone(), spec.clone(), 1).status.containers;
            group.spec = spec;
        });
        Ok(changed)
    }

    async fn resize_volume(&self, id: &GroupId, volume: &str, gib: u32) -> Result<()> {
        self.record(format!("resize {volume} {gib}"));
        self.get(id).await.map(drop)
    }

    async fn snapshot(&self, id: &GroupId) -> Result<SnapshotInfo> {
        self.record("snapshot");
        Ok(snapshot(&self.get(id).await?))
    }

    async fn disks(&self) -> Result<Vec<DiskInfo>> {
        let disk = |group: Group| {
            Some(DiskInfo {
                id: DiskId::parse("d-0")?,
                size_bytes: 20 << 30,
                used_bytes: 1 << 20,
                made_at_ms: Some(1),
                group: Some(group.id),
            })
        };
        Ok(self.list().await.into_iter().filter_map(disk).collect())
    }

    async fn remove_disk(&self, id: &DiskId) -> Result<()> {
        self.record(format!("remove {id}"));
        Ok(())
    }

    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        Ok(self.list().await.iter().map(snapshot).collect())
    }

    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<()> {
        self.record(format!("remove {id}"));
        Ok(())
    }

    async fn restore(&self, id: &SnapshotId, request: CloneRequest) -> Result<Vec<GroupId>> {
        self.record(format!("restore {id} {request:?}"));
        Ok(self.list().await.into_iter().map(|group| group.id).collect())
    }

    async fn fork(&self, id: &GroupId, request: CloneRequest) -> Result<Forked> {
        self.record(format!("fork {request:?}"));
        let group = self.get(id).await?;
        Ok(Forked {
            groups: vec![group.id],
            pause_us: 7000,
        })
    }

    async fn exec(&self, id: &GroupId, request: ExecRequest) -> Result<ExecSession> {
        self.record(format!("exec {:?} tty={}", request.command, request.tty));
        self.get(id).await?;
        let (stdin, stdin_end) = duplex(1000);
        let (stdout, stdout_end) = duplex(1000);
        let (stderr, stderr_end) = duplex(1000);
        let running = tokio::spawn(play(request.command, stdin_end, stdout_end, stderr_end));
        Ok(ExecSession {
            stdin: request.stdin.then(|| Box::pin(stdin) as _),
            stdout: request.stdout.then(|| Box::pin(stdout) as _),
            stderr: request.stderr.then(|| Box::pin(stderr) as _),
            control: Box::new(NoControl),
            exit: Box::pin(async move { Ok(running.await.unwrap()) }),
        })
    }

    async fn logs(
        &self,
        id: &GroupId,
        options: LogOptions,
    ) -> Result<BoxStream<'static, std::io::Result<Bytes>>> {
        self.record(format!("logs {options:?}"));
        self.get(id).await?;
        let lines: Vec<_> = (0..3)
            .map(|line| Ok(Bytes::from(format!("log {line}\n"))))
            .collect();
        Ok(stream::iter(lines).boxed())
    }

    async fn stats(&self, id: &GroupId) -> Result<GroupStats> {
        let group = self.get(id).await?;
        let containers = group.spec.containers.iter().map(|container| ContainerStats {
            name: container.name.clone(),
            started_at_ms: 1_767_225_600_000,
            cpu_usage_us: 1_500_000,
            memory_usage_bytes: 3 << 20,
            memory_working_set_bytes: 2 << 20,
            memory_rss_bytes: 1 << 20,
            memory_limit_bytes: 64 << 20,
            cpu_throttled_us: 250_000,
            page_faults: 11,
            major_page_faults: 12,
            rootfs_used_bytes: 13,
            io_write_bytes: 14,
            ..ContainerStats::default()
        });
        Ok(GroupStats {
            at_ms: 1_767_225_700_000,
            containers: containers.collect(),
            network: NetworkStats {
                rx_bytes: 10,
                tx_bytes: 20,
                tx_dropped: 30,
                ..NetworkStats::default()
            },
            scratch_capacity_bytes: 30 << 30,
            scratch_used_bytes: 1 << 20,
            guest_cpu_usage_us: 2_000_000,
            guest_memory_used_bytes: 40 << 20,
        })
    }

    fn metrics(&self) -> String {
        "eci_fake 1\n".to_owned()
    }

    async fn host_stats(&self) -> Result<HostStats> {
        Ok(HostStats {
            at_ms: 1_767_225_700_000,
            node_name: "node-1".into(),
            started_at_ms: 1_767_225_600_000,
            cpu_usage_us: 9_000_000,
            memory_total_bytes: 8 << 30,
            memory_available_bytes: 6 << 30,
            fs_capacity_bytes: 100 << 30,
            fs_available_bytes: 60 << 30,
        })
    }

    async fn pull_image(
        &self,
        reference: String,
        policy: ImagePullPolicy,
        credentials: Option<RegistryCredential>,
    ) -> BoxStream<'static, Result<PullStatus>> {
        self.record(format!("pull {reference} {policy:?} {credentials:?}"));
        let status = |phase: &str, digest: Option<&str>| {
            Ok(PullStatus {
                phase: phase.into(),
                layer: None,
                done_bytes: 1,
                total_bytes: 1,
                digest: digest.map(str::to_owned),
            })
        };
        let mut steps = vec![status("resolving", None)];
        if reference.contains("missing") {
            steps.push(Err(Error::new(ErrorKind::NotFound, "No such image")));
        } else {
            steps.push(status("done", Some("sha256:1")));
        }
        // As from a network.
        stream::iter(steps)
            .then(|step| async {
                tokio::time::sleep(Duration::from_millis(1)).await;
                step
            })
            .boxed()
    }

    async fn list_images(&self) -> Result<Vec<ImageInfo>> {
        Ok(vec![ImageInfo {
            reference: "docker.io/library/busybox:latest".into(),
            digest: format!("sha256:{}", "0".repeat(64)),
            size_bytes: 2_000_000,
            pulled_at_ms: 1_767_225_600_000,
            in_use: true,
        }])
    }

    async fn remove_image(&self, reference: &str) -> Result<()> {
        self.record(format!("remove {reference}"));
        Ok(())
    }
}
