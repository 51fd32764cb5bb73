use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::{WebSocketStream, tungstenite::protocol::Message};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::{
    api::{
        Doors, exec as channels,
        fake::{FakeEngine, group},
    },
    config::{Config, Secret},
};

const ID: &str = "eci-aaaaaaaaaaaaaaaaaaa1";
const TOKEN: &str = "s3cret";

struct Node {
    engine: Arc<FakeEngine>,
    secure: SocketAddr,
    open: SocketAddr,
    certificate: CertificateDer<'static>,
    shutdown: CancellationToken,
    _directory: tempfile::TempDir,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

async fn start() -> Node {
    let directory = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.admin.socket = directory.path().join("agent.sock");
    config.state_dir = directory.path().to_owned();
    config.eci.enabled = false;
    config.kubelet.listen = "127.0.0.1:0".parse().unwrap();
    config.kubelet.bearer_tokens = vec![Secret(TOKEN.into())];
    config.readonly.listen = "127.0.0.1:0".parse().unwrap();
    let engine = Arc::new(FakeEngine::new(vec![group(ID, "web", "shop")]));
    let doors = Doors::bind(&config, Arc::clone(&engine) as _).await.unwrap();
    let addresses = doors.addresses();
    let shutdown = CancellationToken::new();
    tokio::spawn(doors.serve(shutdown.clone()));
    Node {
        engine,
        secure: addresses.kubelet.unwrap(),
        open: addresses.readonly.unwrap(),
        certificate: CertificateDer::from_pem_file(directory.path().join("kubelet.crt")).unwrap(),
        shutdown,
        _directory: directory,
    }
}

impl Node {
    async fn tls(&self) -> TlsStream<TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(self.secure).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .unwrap()
    }

    async fn get(&self, path: &str, token: Option<&str>) -> (u16, String) {
        fetch(self.tls().await, path, token).await
    }

    async fn get_open(&self, path: &str) -> (u16, String) {
        fetch(TcpStream::connect(self.open).await.unwrap(), path, None).await
    }

    async fn websocket(
        &self,
        path: &str,
        protocol: &str,
    ) -> Result<WebSocketStream<TlsStream<TcpStream>>, tokio_tungstenite::tungstenite::Error> {
        let request = http::Request::builder()
            .uri(format!("wss://localhost{path}"))
            .header("host", "localhost")
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
            .header("sec-websocket-protocol", protocol)
            .header("authorization", format!("Bearer {TOKEN}"))
            .body(())
            .unwrap();
        let (socket, _) = tokio_tungstenite::client_async(request, self.tls().await).await?;
        Ok(socket)
    }
}

async fn fetch<S>(stream: S, path: &str, token: Option<&str>) -> (u16, String)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut request = http::Request::get(path).header("host", "node");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let response = sender
        .send_request(request.body(Full::new(bytes::Bytes::new())).unwrap())
        .await
        .unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn nothing_is_served_without_a_credential() {
    let node = start().await;
    for path in ["/healthz", "/pods", "/containerLogs/shop/web/c", "/nope"] {
        assert_eq!(node.get(path, None).await.0, 401, "{path}");
        assert_eq!(node.get(path, Some("wrong")).await.0, 401, "{path}");
    }
    assert_eq!(node.get("/healthz", Some(TOKEN)).await, (200, "ok".into()));
    assert_eq!(node.get("/nope", Some(TOKEN)).await.0, 404);
    // The open port has no door into containers.
    for path in ["/containerLogs/shop/web/c", "/exec/shop/web/c?command=x&output=1"] {
        assert_eq!(node.get_open(path).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn pods_are_a_list_of_pods() {
    let node = start().await;
    let (status, body) = node.get("/pods", Some(TOKEN)).await;
    assert_eq!(status, 200);
    let list: List<Pod> = serde_json::from_str(&body).unwrap();
    let pod = &list.items[0];
    assert_eq!(pod.metadata.uid.as_deref(), Some(ID));
    assert_eq!(pod.spec.as_ref().unwrap().node_name.as_deref(), Some("node-1"));
    assert!(
        body.starts_with("{\"apiVersion\":\"v1\",\"kind\":\"PodList\""),
        "{body}"
    );
    assert_eq!(node.get_open("/pods").await.1, body);
    assert_eq!(node.get_open("/runningpods/").await.1, body);
}

#[tokio::test]
async fn logs_are_streamed_with_their_options() {
    let node = start().await;
    let path = "/containerLogs/shop/web/c?tailLines=3&timestamps=true&sinceSeconds=9&limitBytes=100";
    assert_eq!(
        node.get(path, Some(TOKEN)).await,
        (200, "log 0\nlog 1\nlog 2\n".into())
    );
    let calls = node.engine.calls().join("");
    assert!(
        calls.contains("tail_lines: Some(3)") && calls.contains("timestamps: true"),
        "{calls}"
    );
    for (path, status) in [
        ("/containerLogs/shop/nope/c", 404),
        ("/containerLogs/default/web/c", 404),
        ("/containerLogs/shop/web/x", 404),
        ("/containerLogs/shop/web/c?tailLines=x", 400),
    ] {
        assert_eq!(node.get(path, Some(TOKEN)).await.0, status, "{path}");
    }
}

#[tokio::test]
async fn resource_metrics_are_those_of_a_kubelet() {
    let node = start().await;
    let (status, body) = node.get("/metrics", Some(TOKEN)).await;
    assert_eq!((status, body.as_str()), (200, "eci_fake 1\n"));
    let (_, body) = node.get("/metrics/resource", Some(TOKEN)).await;
    for line in [
        "# TYPE container_cpu_usage_seconds_total counter",
        "container_cpu_usage_seconds_total{container=\"c\",namespace=\"shop\",pod=\"web\"} 1.5 1767225700000",
        "container_memory_working_set_bytes{container=\"c\",namespace=\"shop\",pod=\"web\"} 2097152 1767225700000",
        "container_start_time_seconds{container=\"c\",namespace=\"shop\",pod=\"web\"} 1767225600",
        "node_cpu_usage_seconds_total 9 1767225700000",
        "node_memory_working_set_bytes 2147483648 1767225700000",
        "pod_cpu_usage_seconds_total{namespace=\"shop\",pod=\"web\"} 2 1767225700000",
        "pod_memory_working_set_bytes{namespace=\"shop\",pod=\"web\"} 41943040 1767225700000",
        "resource_scrape_error 0",
        "scrape_error 0",
    ] {
        assert!(
            body.lines().any(|found| found == line),
            "{line:?} is not in:\n{body}"
        );
    }
}

#[tokio::test]
async fn cadvisor_metrics_are_those_of_a_kubelet() {
    let node = start().await;
    let (_, body) = node.get("/metrics/cadvisor", Some(TOKEN)).await;
    let engine_group = node.engine.list().await.remove(0);
    let image = &engine_group.spec.containers[0].image;
    let run = engine_group.status.containers[0]
        .container_id
        .clone()
        .unwrap_or_default();
    let with = |name: &str, more: &str, value: &str| {
        format!(
            "{name}{{container=\"c\",{more}id=\"/kubepods/pod{ID}/{run}\",image=\"{image}\",name=\"{run}\",\
             namespace=\"shop\",pod=\"web\"}} {value} 1767225700000"
        )
    };
    let network = |name: &str, value: &str| {
        format!(
            "container_network_{name}_total{{id=\"/kubepods/pod{ID}\",interface=\"eth0\",namespace=\"shop\",pod=\"web\"}} \
             {value} 1767225700000"
        )
    };
    for line in [
        with("container_cpu_usage_seconds_total", "cpu=\"total\",", "1.5"),
        with("container_cpu_cfs_throttled_seconds_total", "", "0.25"),
        with("container_memory_usage_bytes", "", "3145728"),
        with(
            "container_memory_failures_total",
            "failure_type=\"pgfault\",scope=\"container\",",
            "11",
        ),
        with(
            "container_memory_failures_total",
            "failure_type=\"pgmajfault\",scope=\"container\",",
            "12",
        ),
        with("container_fs_usage_bytes", "", "13"),
        with("container_fs_writes_bytes_total", "", "14"),
        network("receive_bytes", "10"),
        network("transmit_bytes", "20"),
        network("transmit_packets_dropped", "30"),
    ] {
        assert!(
            body.lines().any(|found| found == line),
            "{line:?} is not in:\n{body}"
        );
    }
    // Each name once, as the format wants it.
    let types: Vec<_> = body.lines().filter(|line| line.starts_with("# TYPE ")).collect();
    let mut names = types.clone();
    names.dedup();
    names.sort_unstable();
    names.dedup();
    assert_eq!(types.len(), names.len());
}

#[tokio::test]
async fn the_summary_has_the_kubelets_shape() {
    let node = start().await;
    let (_, body) = node.get("/stats/summary", Some(TOKEN)).await;
    let summary: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(summary["node"]["nodeName"], "node-1");
    let pod = &summary["pods"][0];
    assert_eq!(
        pod["podRef"],
        serde_json::json!({"name": "web", "namespace": "shop", "uid": ID})
    );
    assert_eq!(
        pod["containers"][0]["cpu"]["usageCoreNanoSeconds"],
        1_500_000_000_u64
    );
    assert_eq!(pod["containers"][0]["memory"]["workingSetBytes"], 2 << 20);
    assert_eq!(pod["containers"][0]["rootfs"]["usedBytes"], 13);
    assert_eq!(pod["network"]["interfaces"][0]["rxBytes"], 10);
    assert_eq!(pod["startTime"], "2026-01-01T00:00:00Z");
}

/// stdout and the exit code of a command.
async fn output(mut socket: WebSocketStream<TlsStream<TcpStream>>) -> (Vec<u8>, i32) {
    let mut stdout = Vec::new();
    let mut status = Vec::new();
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Binary(data) = message {
            match data[0] {
                channels::STDOUT => stdout.extend_from_slice(&data[1..]),
                channels::ERROR => status.extend_from_slice(&data[1..]),
                _ => {}
            }
        }
    }
    (stdout, channels::parse_exit(&status).unwrap())
}

#[tokio::test]
async fn exec_works_with_both_protocols_and_with_a_uid() {
    let node = start().await;
    for (path, protocol) in [
        ("/exec/shop/web/c", channels::V4),
        ("/exec/shop/web/c", channels::V5),
        (&*format!("/exec/shop/web/{ID}/c"), channels::V5),
    ] {
        let path = format!("{path}?command=echo&command=a%20b&output=1&error=1");
        let socket = node.websocket(&path, protocol).await.unwrap();
        assert_eq!(output(socket).await, (b"a b\n".to_vec(), 0));
    }
    let socket = node
        .websocket(
            "/exec/shop/web/c?command=exit&command=42&output=1&error=1",
            channels::V4,
        )
        .await
        .unwrap();
    assert_eq!(output(socket).await, (Vec::new(), 42));
}

#[tokio::test]
async fn stdin_reaches_the_command_until_its_half_close() {
    let node = start().await;
    let mut socket = node
        .websocket("/exec/shop/web/c?command=cat&input=1&output=1", channels::V5)
        .await
        .unwrap();
    socket
        .send(Message::Binary(bytes::Bytes::from_static(b"\0hello")))
        .await
        .unwrap();
    socket
        .send(Message::Binary(bytes::Bytes::from_static(&[
            channels::CLOSE,
            channels::STDIN,
        ])))
        .await
        .unwrap();
    assert_eq!(output(socket).await, (b"hello".to_vec(), 0));
}

#[tokio::test]
async fn exec_is_refused_before_the_upgrade() {
    let node = start().await;
    for (path, protocol, status) in [
        ("/exec/shop/web/c?command=x&output=1", "v1.example", 400),
        ("/exec/shop/web/c?output=1", channels::V5, 400),
        ("/exec/shop/web/nope?command=x&output=1", channels::V5, 404),
        ("/exec/shop/web/other-uid/c?command=x&output=1", channels::V5, 404),
    ] {
        let Err(tokio_tungstenite::tungstenite::Error::Http(response)) = node.websocket(path, protocol).await
        else {
            panic!("{path} was accepted");
        };
        assert_eq!(response.status().as_u16(), status, "{path}");
    }
}
