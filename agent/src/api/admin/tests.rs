use std::{path::PathBuf, time::Duration};

use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    api::{
        Doors,
        fake::{FakeEngine, group},
    },
    engine::DiskInfo,
    group::status::{GroupId, Phase},
};

const ID: &str = "eci-aaaaaaaaaaaaaaaaaaa1";

struct Agent {
    engine: Arc<FakeEngine>,
    socket: PathBuf,
    shutdown: CancellationToken,
    _directory: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn config(directory: &Path) -> Config {
    let mut config = Config {
        state_dir: directory.join("state"),
        ..Config::default()
    };
    config.admin.socket = directory.join("run/agent.sock");
    config.eci.enabled = false;
    config.kubelet.enabled = false;
    config.readonly.enabled = false;
    config
}

async fn start() -> Agent {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    let engine = Arc::new(FakeEngine::new(vec![group(ID, "web", "default")]));
    let doors = Doors::bind(&config, Arc::clone(&engine) as _).await.unwrap();
    let shutdown = CancellationToken::new();
    tokio::spawn(doors.serve(shutdown.clone()));
    Agent {
        engine,
        socket: config.admin.socket,
        shutdown,
        _directory: directory,
    }
}

async fn call(agent: &Agent, method: Method, path: &str, kind: &str, body: &str) -> (u16, String) {
    let stream = UnixStream::connect(&agent.socket).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "agent")
        .header("content-type", kind)
        .body(Full::new(bytes::Bytes::from(body.to_owned())))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

async fn get(agent: &Agent, path: &str) -> (u16, String) {
    call(agent, Method::GET, path, "", "").await
}

const POD: &str =
    "apiVersion: v1\nkind: Pod\nmetadata: {name: db}\nspec: {containers: [{name: c, image: busybox}]}\n";

#[tokio::test]
async fn groups_are_created_listed_and_deleted() {
    let agent = start().await;
    let (status, body) = call(&agent, Method::POST, "/v1/groups", "application/yaml", POD).await;
    assert_eq!(status, 201, "{body}");
    let created: wire::Created = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (created.name.as_str(), created.namespace.as_str()),
        ("db", "default")
    );

    let (status, body) = call(&agent, Method::POST, "/v1/groups", "application/yaml", POD).await;
    assert_eq!(status, 409);
    assert!(body.contains("default/db exists"), "{body}");

    let (_, body) = get(&agent, "/v1/groups").await;
    let groups: Vec<crate::group::status::Group> = serde_json::from_str(&body).unwrap();
    assert_eq!(groups.len(), 2);
    for name in [
        "db",
        "default%2Fdb",
        created.id.as_str(),
        &created.id.as_str()[..12],
    ] {
        assert_eq!(get(&agent, &format!("/v1/groups/{name}")).await.0, 200, "{name}");
    }
    let (status, _) = call(&agent, Method::DELETE, "/v1/groups/db?grace=3&wait=true", "", "").await;
    assert_eq!(status, 200);
    assert_eq!(
        agent.engine.calls(),
        ["create db", "delete grace=Some(3) wait=true"]
    );
    let (status, body) = get(&agent, "/v1/groups/db").await;
    assert_eq!(status, 404);
    let failure: Failure = serde_json::from_str(&body).unwrap();
    assert!(
        failure.is_not_found() && failure.message.contains("\"db\""),
        "{body}"
    );
}

#[tokio::test]
async fn groups_are_updated() {
    let agent = start().await;
    call(&agent, Method::POST, "/v1/groups", "application/yaml", POD).await;
    let update = async |body: &str| {
        let path = "/v1/groups/db/update";
        call(&agent, Method::POST, path, "application/yaml", body).await
    };
    let (status, body) = update(POD).await;
    let updated: wire::Updated = serde_json::from_str(&body).unwrap();
    assert_eq!((status, updated.changed), (200, false));
    let (_, body) = update(&POD.replace("busybox", "other")).await;
    let updated: wire::Updated = serde_json::from_str(&body).unwrap();
    assert!(updated.changed);
    let (_, body) = get(&agent, "/v1/groups/db").await;
    let group: crate::group::status::Group = serde_json::from_str(&body).unwrap();
    assert_eq!(group.spec.containers[0].image, "other");
    let (status, body) = update(&POD.replace("name: c,", "")).await;
    assert_eq!(status, 400);
    assert!(body.contains("spec.containers[0].name"), "{body}");
}

#[tokio::test]
async fn snapshots_are_taken_listed_restored_and_removed() {
    const SNAPSHOT: &str = "/v1/snapshots/snap-0000000000000000000a";
    let agent = start().await;
    let post =
        async |path: &str, body: &str| call(&agent, Method::POST, path, "application/json", body).await;
    let (status, body) = post("/v1/groups/web/snapshot", "").await;
    assert_eq!(status, 200, "{body}");
    assert!(body.contains("\"pause_us\":5000"), "{body}");
    assert!(!body.contains("registry_credentials"), "{body}");
    let (_, body) = get(&agent, "/v1/metrics").await;
    assert_eq!(body, "eci_fake 1\n");
    let (_, body) = get(&agent, "/v1/snapshots").await;
    assert!(body.contains("snap-0000000000000000000a"), "{body}");
    let (status, body) = post("/v1/groups/web/fork", "{\"count\": 2}").await;
    assert_eq!(status, 200, "{body}");
    let clones: wire::Clones = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (clones.groups[0].name.as_str(), clones.pause_us),
        ("web", Some(7000))
    );
    let (status, body) = post(&format!("{SNAPSHOT}/restore"), "{\"name\": \"a\"}").await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(call(&agent, Method::DELETE, SNAPSHOT, "", "").await.0, 200);
    let calls = agent.engine.calls().join("\n");
    for part in [
        "snapshot",
        "fork CloneRequest { name: None, namespace: None, count: 2 }",
        "restore snap-0000000000000000000a CloneRequest { name: Some(\"a\"), namespace: None, count: 1 }",
        "remove snap-0000000000000000000a",
    ] {
        assert!(calls.contains(part), "{calls}");
    }
    for (path, body, status) in [
        ("/v1/snapshots/x/restore", "{}", 400),
        (&*format!("{SNAPSHOT}/restore"), "{\"cuont\": 2}", 422),
        ("/v1/groups/nope/fork", "{}", 404),
    ] {
        assert_eq!(post(path, body).await.0, status, "{path} {body}");
    }
}

#[tokio::test]
async fn disks_are_listed_and_removed() {
    let agent = start().await;
    let (status, body) = get(&agent, "/v1/disks").await;
    assert_eq!(status, 200, "{body}");
    let disks: Vec<DiskInfo> = serde_json::from_str(&body).unwrap();
    assert!(
        disks[0].id.as_str() == "d-0" && disks[0].group.is_some(),
        "{body}"
    );
    for (path, expected) in [
        ("/v1/disks/d-7", 200),
        ("/v1/disks/d-..", 400),
        ("/v1/disks/7", 400),
    ] {
        let (status, body) = call(&agent, Method::DELETE, path, "", "").await;
        assert_eq!(status, expected, "{path}: {body}");
    }
    let calls = agent.engine.calls();
    assert_eq!(
        calls
            .iter()
            .filter(|call| call.starts_with("remove"))
            .collect::<Vec<_>>(),
        ["remove d-7"]
    );
}

#[tokio::test]
async fn eci_requests_are_accepted_as_json() {
    let agent = start().await;
    let body = r#"{"ContainerGroupName": "job", "Container": [{"Image": "busybox"}],
        "ImageRegistryCredential": [{"Server": "r", "UserName": "u", "Password": "hunter2"}],
        "Volume": [{"Name": "v", "Type": "ConfigFileVolume", "ConfigFileVolume": {
            "ConfigFileToPath": [{"Path": "a", "Content": "aHVudGVyMg=="}]}}]}"#;
    let (status, text) = call(&agent, Method::POST, "/v1/groups", groups::ECI_JSON, body).await;
    assert_eq!(status, 201, "{text}");
    let (_, text) = get(&agent, "/v1/groups/job").await;
    assert!(
        text.contains("\"username\":\"u\"") && !text.contains("hunter2") && !text.contains("aHVudGVyMg"),
        "{text}"
    );
}

#[tokio::test]
async fn mistakes_come_back_in_full() {
    let agent = start().await;
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: A}\nspec: {hostNetwork: true, containers: []}\n";
    let (status, body) = call(&agent, Method::POST, "/v1/groups", "application/yaml", pod).await;
    assert_eq!(status, 400);
    let failure: Failure = serde_json::from_str(&body).unwrap();
    assert_eq!(failure.kind, "InvalidArgument");
    for part in ["metadata.name", "spec.hostNetwork", "spec.containers"] {
        assert!(failure.message.contains(part), "{body}");
    }
    let huge = "x".repeat(MAX_BODY_BYTES + 1);
    let (status, _) = call(&agent, Method::POST, "/v1/groups", "application/yaml", &huge).await;
    assert_eq!(status, 413);
    assert_eq!(get(&agent, "/v1/nope").await.0, 404);
    assert_eq!(get(&agent, "/v1/groups/web/exec?command=x").await.0, 400);
    assert_eq!(get(&agent, "/v1/groups/web/logs?container=nope").await.0, 404);
    assert_eq!(get(&agent, "/v1/groups/web/logs?tailLines=x").await.0, 400);
}

#[tokio::test]
async fn a_watch_shows_changes_until_the_group_is_gone() {
    let agent = start().await;
    let id = GroupId::parse(ID).unwrap();
    let watch = get(&agent, "/v1/groups/web/watch");
    let changes = async {
        // Each waits for the one before to be seen, else two changes may be one.
        tokio::time::sleep(Duration::from_millis(50)).await;
        agent
            .engine
            .change(&id, |group| group.status.phase = Phase::Succeeded);
        tokio::time::sleep(Duration::from_millis(50)).await;
        agent.engine.delete(&id, None, true).await.unwrap();
    };
    let ((status, body), ()) = tokio::join!(watch, changes);
    assert_eq!(status, 200);
    let phases: Vec<_> = body
        .lines()
        .map(|line| serde_json::from_str::<crate::group::status::Group>(line).unwrap())
        .map(|group| group.status.phase)
        .collect();
    assert_eq!(phases, [Phase::Running, Phase::Succeeded]);
}

#[tokio::test]
async fn logs_stats_images_and_host_are_served() {
    let agent = start().await;
    assert_eq!(
        get(&agent, "/v1/groups/web/logs").await.1,
        "log 0\nlog 1\nlog 2\n"
    );
    let (_, body) = get(&agent, "/v1/groups/web/stats").await;
    let stats: crate::engine::GroupStats = serde_json::from_str(&body).unwrap();
    assert_eq!(stats.containers[0].cpu_usage_us, 1_500_000);
    assert!(get(&agent, "/v1/images").await.1.contains("busybox"));
    assert!(get(&agent, "/v1/host").await.1.contains("node-1"));
    assert_eq!(
        call(&agent, Method::DELETE, "/v1/images?reference=a%2Fb", "", "").await,
        (200, "null".into())
    );
    let pull = r#"{"reference":"reg.local/x","login":{"username":"u","password":"hunter2"}}"#;
    let (_, body) = call(&agent, Method::POST, "/v1/images/pull", "", pull).await;
    let last: wire::PullLine = serde_json::from_str(body.lines().last().unwrap()).unwrap();
    assert!(matches!(last, wire::PullLine::Status(status) if status.digest.is_some()));
    let (_, body) = call(
        &agent,
        Method::POST,
        "/v1/images/pull",
        "",
        r#"{"reference":"missing"}"#,
    )
    .await;
    assert!(
        body.contains("\"failure\"") && body.contains("No such image"),
        "{body}"
    );
    let calls = agent.engine.calls().join("\n");
    assert!(
        calls.contains("remove a/b") && calls.contains("reg.local"),
        "{calls}"
    );
    assert!(!calls.contains("hunter2"));
}

#[tokio::test]
async fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path());
    let engine = || Arc::new(FakeEngine::new(Vec::new())) as Arc<dyn Engine>;
    let first = Doors::bind(&config, engine()).await.unwrap();
    let error = Doors::bind(&config, engine()).await.unwrap_err();
    assert!(error.to_string().contains("admin.socket"), "{error}");
    drop(first);
    assert!(config.admin.socket.exists());
    Doors::bind(&config, engine()).await.unwrap();
    let mode = fs::metadata(&config.admin.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
}

#[tokio::test]
async fn strangers_are_told_why() {
    let (client, server) = tokio::io::duplex(4096);
    tokio::spawn(async move {
        let service = hyper_util::service::TowerToHyperService::new(refusing_router("not you".into()));
        hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(server), service)
            .await
    });
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = Request::get("/v1/groups")
        .body(Full::new(bytes::Bytes::new()))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status().as_u16(), 403);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(
        serde_json::from_slice::<Failure>(&body).unwrap().message,
        "not you"
    );
}
