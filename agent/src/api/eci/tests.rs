use std::net::SocketAddr;

use base64::Engine as _;
use futures_util::{SinkExt, StreamExt};
use ring::hmac;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::protocol::Message;

use super::*;
use crate::{
    api::{
        Doors,
        fake::{FakeEngine, group},
    },
    config::{AccessKey, Config, Secret},
    group::status::{GroupId, Phase},
};

const ID: &str = "eci-aaaaaaaaaaaaaaaaaaa1";

struct Host {
    engine: Arc<FakeEngine>,
    address: SocketAddr,
    shutdown: CancellationToken,
    _directory: tempfile::TempDir,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

async fn start() -> Host {
    let directory = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.admin.socket = directory.path().join("agent.sock");
    config.state_dir = directory.path().to_owned();
    config.eci.listen = "127.0.0.1:0".parse().unwrap();
    config.eci.access_keys = vec![AccessKey {
        id: "testid".into(),
        secret: Secret("testsecret".into()),
    }];
    config.kubelet.enabled = false;
    config.readonly.enabled = false;
    let engine = Arc::new(FakeEngine::new(vec![group(ID, "web", "default")]));
    let doors = Doors::bind(&config, Arc::clone(&engine) as _).await.unwrap();
    let address = doors.addresses().eci.unwrap();
    let shutdown = CancellationToken::new();
    tokio::spawn(doors.serve(shutdown.clone()));
    Host {
        engine,
        address,
        shutdown,
        _directory: directory,
    }
}

/// The target of a request signed with RPC version 1.
fn signed(method: &str, action: &str, parameters: &[(&str, &str)]) -> String {
    let now = format!("{:.0}", jiff::Timestamp::now());
    let nonce = uuid::Uuid::new_v4().to_string();
    let mut all: Vec<(String, String)> = [
        ("AccessKeyId", "testid"),
        ("Action", action),
        ("SignatureMethod", "HMAC-SHA1"),
        ("SignatureNonce", &nonce),
        ("SignatureVersion", "1.0"),
        ("Timestamp", &now),
        ("Version", VERSION),
    ]
    .iter()
    .chain(parameters)
    .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
    .collect();
    let text = signing::rpc_string_to_sign(&Signed {
        method,
        path: "/",
        query: &all,
        form: &[],
        headers: &[],
        body: b"",
    });
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, b"testsecret&");
    let tag = hmac::sign(&key, text.as_bytes());
    let signature = base64::engine::general_purpose::STANDARD.encode(tag.as_ref());
    all.push(("Signature".into(), signature));
    let query = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(all)
        .finish();
    format!("/?{query}")
}

/// Sends bytes; returns status and body of the one reply.
async fn send(host: &Host, request: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(host.address).await.unwrap();
    let (mut reading, mut writing) = stream.split();
    let mut reply = Vec::new();
    // A refused request is answered before it is read to its end.
    let write = async {
        let _ = writing.write_all(request).await;
    };
    let ((), read) = tokio::join!(write, reading.read_to_end(&mut reply));
    read.unwrap();
    let text = String::from_utf8(reply).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

async fn call(host: &Host, action: &str, parameters: &[(&str, &str)]) -> (u16, Value) {
    let target = signed("GET", action, parameters);
    let request = format!("GET {target} HTTP/1.1\r\nHost: h:111\r\nConnection: close\r\n\r\n");
    let (status, body) = send(host, request.as_bytes()).await;
    (status, serde_json::from_str(&body).unwrap())
}

#[tokio::test]
async fn a_group_lives_through_the_api() {
    let host = start().await;
    let parameters = [
        ("RegionId", "local"),
        ("ContainerGroupName", "job"),
        ("Container.1.Name", "c"),
        ("Container.1.Image", "busybox"),
        ("Container.1.Command.1", "sleep"),
        ("Tag.1.Key", "team"),
        ("Tag.1.Value", "a"),
        ("ClientToken", "t-1"),
    ];
    let (status, created) = call(&host, "CreateContainerGroup", &parameters).await;
    assert_eq!(status, 200, "{created}");
    let id = created["ContainerGroupId"].as_str().unwrap().to_owned();
    assert_eq!(created["RequestId"].as_str().unwrap().len(), 36);
    // The same token again: the same group; with other parameters: refused.
    let (_, again) = call(&host, "CreateContainerGroup", &parameters).await;
    assert_eq!(again["ContainerGroupId"], id.as_str());

    let ids = format!("[\"{id}\"]");
    let (_, described) = call(&host, "DescribeContainerGroups", &[("ContainerGroupIds", &ids)]).await;
    assert_eq!(described["TotalCount"], 1);
    let group = &described["ContainerGroups"][0];
    assert_eq!(group["Status"], "Running");
    assert_eq!(group["Cpu"], 2.0);
    assert_eq!(group["Memory"], 4.0);
    assert_eq!(group["IntranetIp"], "10.89.0.2");
    assert_eq!(group["Ipv6Address"], "fd00:89::a59:2");
    assert_eq!(group["Tags"], json!([{"Key": "team", "Value": "a"}]));
    assert_eq!(group["Containers"][0]["Commands"], json!(["sleep"]));
    assert_eq!(group["Containers"][0]["CurrentState"]["State"], "Running");
    assert_eq!(group["Events"].as_array().unwrap().len(), 2);

    let (_, log) = call(
        &host,
        "DescribeContainerLog",
        &[("ContainerGroupId", &id), ("ContainerName", "c")],
    )
    .await;
    assert_eq!(
        (log["ContainerName"].as_str(), log["Content"].as_str()),
        (Some("c"), Some("log 0\nlog 1\nlog 2\n"))
    );

    let exec = [
        ("ContainerGroupId", id.as_str()),
        ("ContainerName", "c"),
        ("Command", "[\"echo\",\"a b\"]"),
        ("Sync", "True"),
        ("TTY", "false"),
    ];
    let (_, output) = call(&host, "ExecContainerCommand", &exec).await;
    assert_eq!(output["SyncResponse"], "a b\n");

    assert_eq!(
        call(&host, "DeleteContainerGroup", &[("ContainerGroupId", &id)])
            .await
            .0,
        200
    );
    assert_eq!(
        call(&host, "DeleteContainerGroup", &[("ContainerGroupId", &id)])
            .await
            .0,
        200
    );
    let (_, described) = call(&host, "DescribeContainerGroups", &[("ContainerGroupIds", &ids)]).await;
    assert_eq!(described["ContainerGroups"], json!([]));
}

#[tokio::test]
async fn groups_are_captured_and_cloned() {
    let host = start().await;
    let group = ("ContainerGroupId", ID);
    let snapshot = ("SnapshotId", "snap-0000000000000000000a");
    let (status, reply) = call(&host, "CreateContainerGroupSnapshot", &[group]).await;
    assert_eq!((status, &reply["SnapshotId"]), (200, &json!(snapshot.1)));
    assert_eq!(reply["PauseMicroseconds"], 5000);
    let (_, reply) = call(&host, "DescribeContainerGroupSnapshots", &[group]).await;
    assert_eq!(reply["Snapshots"][0]["ContainerGroupName"], "web");
    let other = ("ContainerGroupId", "eci-0000000000000000000z");
    let (_, reply) = call(&host, "DescribeContainerGroupSnapshots", &[other]).await;
    assert_eq!(reply["TotalCount"], 0);
    let (_, reply) = call(&host, "ForkContainerGroup", &[group, ("Count", "3")]).await;
    assert_eq!(reply["ContainerGroupIds"], json!([ID]));
    let name = ("ContainerGroupName", "again");
    let (_, reply) = call(&host, "RestoreContainerGroup", &[snapshot, name]).await;
    assert_eq!(reply["ContainerGroupIds"], json!([ID]));
    assert_eq!(
        call(&host, "DeleteContainerGroupSnapshot", &[snapshot]).await.0,
        200
    );
    let calls = host.engine.calls().join("\n");
    for part in [
        "count: 3",
        "name: Some(\"again\")",
        "remove snap-0000000000000000000a",
    ] {
        assert!(calls.contains(part), "{calls}");
    }
    for (action, parameters, status, code) in [
        (
            "ForkContainerGroup",
            vec![group, ("Count", "0")],
            400,
            "InvalidParameter",
        ),
        (
            "ForkContainerGroup",
            vec![other],
            404,
            "InvalidParameter.NotFound",
        ),
        ("RestoreContainerGroup", vec![], 400, "MissingParameter"),
        (
            "RestoreContainerGroup",
            vec![("SnapshotId", "x")],
            404,
            "InvalidParameter.NotFound",
        ),
    ] {
        let (found, reply) = call(&host, action, &parameters).await;
        assert_eq!(
            (found, &reply["Code"]),
            (status, &json!(code)),
            "{action} {parameters:?}"
        );
    }
}

#[tokio::test]
async fn groups_are_updated() {
    let host = start().await;
    let made_of = [
        ("ContainerGroupName", "job"),
        ("Container.1.Name", "c"),
        ("Container.1.Image", "busybox"),
        ("Container.1.Command.1", "sleep"),
        ("Tag.1.Key", "team"),
        ("Tag.1.Value", "a"),
    ];
    let (_, created) = call(&host, "CreateContainerGroup", &made_of).await;
    let id = created["ContainerGroupId"].as_str().unwrap().to_owned();
    let update = async |given: &[(&str, &str)]| {
        let parameters = [&[("ContainerGroupId", id.as_str())], given].concat();
        call(&host, "UpdateContainerGroup", &parameters).await
    };
    let given = [
        ("UpdateType", "IncrementalUpdate"),
        ("Container.1.Name", "c"),
        ("Container.1.Image", "other"),
    ];
    assert_eq!(update(&given).await.0, 200);
    let ids = format!("[\"{id}\"]");
    let (_, described) = call(&host, "DescribeContainerGroups", &[("ContainerGroupIds", &ids)]).await;
    let group = &described["ContainerGroups"][0];
    assert_eq!(group["Containers"][0]["Image"], "other");
    assert_eq!(group["Containers"][0]["Commands"], json!(["sleep"]));
    assert_eq!(group["Tags"], json!([{"Key": "team", "Value": "a"}]));

    // The same again is an error, unless it may be the same request again.
    let (status, error) = update(&given).await;
    assert_eq!((status, error["Code"].as_str()), (400, Some("NoNeedUpdate")));
    let token = [&given[..], &[("ClientToken", "t-2")]].concat();
    assert_eq!(update(&token).await.0, 200);

    let (status, error) = update(&[("UpdateType", "Sometimes")]).await;
    assert_eq!(status, 400, "{error}");
    let text = error["Message"].as_str().unwrap();
    assert!(text.contains("RenewUpdate, IncrementalUpdate"), "{text}");
    // All mistakes at once.
    let (_, error) = update(&[("Container.1.Name", "c"), ("Cpu", "x")]).await;
    let text = error["Message"].as_str().unwrap();
    assert!(
        text.contains("Container.1.Image") && text.contains("Cpu"),
        "{text}"
    );
    // A group that was made of a Pod has no parameters to be changed.
    let (status, error) = call(&host, "UpdateContainerGroup", &[("ContainerGroupId", ID)]).await;
    assert_eq!((status, error["Code"].as_str()), (403, Some("InvalidAction")));
}

#[tokio::test]
async fn volumes_are_resized() {
    let host = start().await;
    let group = ("ContainerGroupId", ID);
    let volume = ("VolumeName", "data");
    let (status, _) = call(
        &host,
        "ResizeContainerGroupVolume",
        &[group, volume, ("NewSize", "40")],
    )
    .await;
    assert_eq!(status, 200);
    assert!(host.engine.calls().contains(&"resize data 40".to_owned()));
    for (parameters, code) in [
        (vec![group, ("NewSize", "40")], "MissingParameter"),
        (vec![group, volume], "MissingParameter"),
        (vec![group, volume, ("NewSize", "19")], "InvalidParameter"),
        (vec![group, volume, ("NewSize", "32769")], "InvalidParameter"),
    ] {
        let (status, reply) = call(&host, "ResizeContainerGroupVolume", &parameters).await;
        assert_eq!((status, &reply["Code"]), (400, &json!(code)), "{parameters:?}");
    }
}

#[tokio::test]
async fn tokens_with_other_parameters_are_refused() {
    let host = start().await;
    let create = |name| {
        [
            ("ContainerGroupName", name),
            ("Container.1.Image", "x"),
            ("ClientToken", "t"),
        ]
    };
    assert_eq!(call(&host, "CreateContainerGroup", &create("one")).await.0, 200);
    let (status, error) = call(&host, "CreateContainerGroup", &create("two")).await;
    assert_eq!(status, 400);
    assert!(
        ["IdempotentParameterMismatch", "OperationConflict"].contains(&error["Code"].as_str().unwrap()),
        "{error}"
    );
}

#[tokio::test]
async fn errors_have_the_documented_codes() {
    let host = start().await;
    let image = ("Container.1.Image", "x");
    let name = ("ContainerGroupName", "job");
    for (action, parameters, status, code) in [
        ("CreateContainerGroup", vec![name], 400, "MissingParameter"),
        (
            "CreateContainerGroup",
            vec![name, image, ("Cpu", "7"), ("Memory", "13")],
            400,
            "InvalidParameter.CPU.Memory",
        ),
        (
            "CreateContainerGroup",
            vec![
                name,
                image,
                ("Container.1.Name", "c"),
                ("Container.2.Name", "c"),
                ("Container.2.Image", "x"),
            ],
            400,
            "InvalidParameter.DuplicatedName",
        ),
        (
            "CreateContainerGroup",
            vec![name, image, ("Container.1.SecurityContextPrivileged", "true")],
            403,
            "FeatureAccessRestricted",
        ),
        (
            "CreateContainerGroup",
            vec![name, image, ("DryRun", "True")],
            400,
            "DryRunOperation",
        ),
        (
            "CreateContainerGroup",
            vec![name, image, ("SecurityGroupId", "sg-x")],
            404,
            "InvalidSecurityGroupId.NotFound",
        ),
        (
            "CreateContainerGroup",
            vec![name, image, ("Ipv6AddressCount", "1")],
            400,
            "Ipv6AddressNotSupport",
        ),
        (
            "CreateContainerGroup",
            vec![name, image, ("SecurityGroupId", "sg-x"), ("DryRun", "True")],
            404,
            "InvalidSecurityGroupId.NotFound",
        ),
        (
            "CreateContainerGroup",
            vec![name, image, ("ClientToken", "ü")],
            400,
            "InvalidParameter",
        ),
        (
            "DescribeContainerLog",
            vec![("ContainerGroupId", "eci-x"), ("ContainerName", "c")],
            404,
            "InvalidParameter.NotFound",
        ),
        (
            "DescribeContainerLog",
            vec![("ContainerGroupId", ID)],
            400,
            "MissingParameter",
        ),
        (
            "DescribeContainerLog",
            vec![("ContainerGroupId", ID), ("ContainerName", "c"), ("Tail", "9999")],
            400,
            "InvalidParameter",
        ),
        (
            "ExecContainerCommand",
            vec![
                ("ContainerGroupId", ID),
                ("ContainerName", "c"),
                ("Command", "x"),
                ("Sync", "true"),
                ("TTY", "true"),
            ],
            400,
            "InvalidParameter",
        ),
        (
            "DescribeContainerGroups",
            vec![("ContainerGroupIds", "eci-a")],
            400,
            "InvalidParameter",
        ),
        (
            "DescribeContainerGroups",
            vec![("Limit", "21")],
            400,
            "InvalidParameter",
        ),
        ("BuyTheMoon", vec![], 404, "InvalidAction.NotFound"),
    ] {
        let (got, error) = call(&host, action, &parameters).await;
        assert_eq!(
            (got, error["Code"].as_str()),
            (status, Some(code)),
            "{action} {parameters:?}: {error}"
        );
        for field in ["Message", "RequestId", "HostId", "Recommend"] {
            assert!(error.get(field).is_some(), "{error}");
        }
    }
    host.engine.change(&GroupId::parse(ID).unwrap(), |group| {
        group.status.phase = Phase::Terminating;
    });
    let (_, error) = call(&host, "DeleteContainerGroup", &[("ContainerGroupId", ID)]).await;
    assert_eq!(error["Code"], "OperationConflict");
    let exec = [("ContainerGroupId", ID), ("ContainerName", "c"), ("Command", "x")];
    let (_, error) = call(&host, "ExecContainerCommand", &exec).await;
    assert_eq!(error["Code"], "IncorrectStatus");
}

#[tokio::test]
async fn unsigned_replayed_and_changed_requests_are_refused() {
    let host = start().await;
    let plain =
        "GET /?Action=DescribeRegions&Version=2018-08-08 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n";
    let (status, body) = send(&host, plain.as_bytes()).await;
    assert!(status == 400 && body.contains("MissingParameter"), "{body}");

    let target = signed("GET", "DescribeRegions", &[]);
    let request = format!("GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    assert_eq!(send(&host, request.as_bytes()).await.0, 200);
    let (_, body) = send(&host, request.as_bytes()).await;
    assert!(body.contains("SignatureNonceUsed"), "{body}");

    let target = signed("GET", "DescribeRegions", &[]).replace("DescribeRegions", "DeleteContainerGroup");
    let request = format!("GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n");
    let (_, body) = send(&host, request.as_bytes()).await;
    assert!(
        body.contains("SignatureDoesNotMatch") && body.contains("server string to sign is:GET&%2F&"),
        "{body}"
    );

    let target = signed("GET", "DescribeRegions", &[]);
    let request = format!(
        "GET {target} HTTP/1.1\r\nHost: h\r\nx-acs-action: DeleteContainerGroup\r\nConnection: close\r\n\r\n"
    );
    let (_, body) = send(&host, request.as_bytes()).await;
    assert!(body.contains("valid: the same"), "{body}");
}

#[tokio::test]
async fn parameters_may_come_in_a_form_and_replies_as_xml() {
    let host = start().await;
    let form = signed("POST", "DescribeRegions", &[("Format", "XML")]);
    let form = &form[2..];
    let request = format!(
        "POST / HTTP/1.1\r\nHost: h:111\r\nContent-Type: application/x-www-form-urlencoded\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{form}",
        form.len()
    );
    let (status, body) = send(&host, request.as_bytes()).await;
    assert_eq!(status, 200);
    assert!(body.contains("<RegionId>local</RegionId>"), "{body}");
}

#[tokio::test]
async fn targets_of_mebibytes_are_served_and_larger_ones_refused() {
    let host = start().await;
    let value = "x".repeat(3 << 20);
    let (status, _) = call(&host, "DescribeRegions", &[("Unknown", &value)]).await;
    assert_eq!(status, 200);
    let value = "x".repeat(9 << 20);
    let request = format!("GET /?A={value} HTTP/1.1\r\nHost: h\r\n\r\n");
    assert_eq!(send(&host, request.as_bytes()).await.0, 414);
}

#[tokio::test]
async fn pages_follow_each_other() {
    let host = start().await;
    for index in 0..4 {
        let name = format!("job-{index}");
        let parameters = [("ContainerGroupName", name.as_str()), ("Container.1.Image", "x")];
        assert_eq!(call(&host, "CreateContainerGroup", &parameters).await.0, 200);
    }
    let mut names = Vec::new();
    let mut token = String::new();
    loop {
        let (_, page) = call(
            &host,
            "DescribeContainerGroups",
            &[("Limit", "2"), ("NextToken", &token)],
        )
        .await;
        assert_eq!(page["TotalCount"], 5);
        for group in page["ContainerGroups"].as_array().unwrap() {
            names.push(group["ContainerGroupName"].as_str().unwrap().to_owned());
        }
        token = page["NextToken"].as_str().unwrap().to_owned();
        if token.is_empty() {
            break;
        }
    }
    names.sort();
    assert_eq!(names, ["job-0", "job-1", "job-2", "job-3", "web"]);
}

#[tokio::test]
async fn status_and_events_have_the_literal_names() {
    let host = start().await;
    let (_, reply) = call(&host, "DescribeContainerGroupStatus", &[]).await;
    let data = &reply["Data"][0];
    assert_eq!(data["uuid"], ID);
    let container = &data["PodStatus"]["ContainerStatuses"][0];
    assert_eq!(
        container["State"]["Running"]["StartedAtstartedAt"],
        "2026-01-01T00:00:00Z"
    );
    assert_eq!(data["PodStatus"]["Conditions"][0]["status"], "True");
    let (_, reply) = call(&host, "DescribeContainerGroupEvents", &[]).await;
    let event = &reply["Data"][0]["Events"][1];
    assert_eq!(
        (event["Reason"].as_str(), event["involvedObject"]["Kind"].as_str()),
        (Some("Started"), Some("Pod"))
    );
}

#[tokio::test]
async fn a_command_may_be_run_on_a_websocket_once() {
    let host = start().await;
    let exec = [
        ("ContainerGroupId", ID),
        ("ContainerName", "c"),
        ("Command", "[\"echo\",\"hi\"]"),
        ("TTY", "false"),
    ];
    let (_, reply) = call(&host, "ExecContainerCommand", &exec).await;
    let uri = reply["WebSocketUri"].as_str().unwrap();
    let path = uri.strip_prefix("ws://h:111").unwrap();
    let open = async || {
        let stream = TcpStream::connect(host.address).await.unwrap();
        tokio_tungstenite::client_async(format!("ws://h:111{path}"), stream).await
    };
    let (mut socket, _) = open().await.unwrap();
    let mut output = Vec::new();
    let mut reason = String::new();
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Binary(data) => output.extend_from_slice(&data),
            Message::Close(Some(frame)) => reason = frame.reason.to_string(),
            _ => {}
        }
    }
    assert_eq!(
        (output.as_slice(), reason.as_str()),
        (&b"hi\n"[..], "exit code 0")
    );
    let _ = socket.close(None).await;
    let _ = socket.flush().await;
    // The token is used up.
    assert!(matches!(
        open().await,
        Err(tokio_tungstenite::tungstenite::Error::Http(response)) if response.status().as_u16() == 403
    ));
}
