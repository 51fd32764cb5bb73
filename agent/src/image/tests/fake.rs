//! A registry that does what a test tells it to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::support::{OCI_MANIFEST, TestImage, digest};

pub(super) struct Request {
    pub(super) path: String,
    /// Names in lower case.
    pub(super) headers: HashMap<String, String>,
}

#[derive(Clone, Default)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// Close the connection after this many bytes of the body.
    pub(super) cut_after: Option<usize>,
    /// Repeat the body until the client has enough.
    pub(super) is_endless: bool,
    /// Never finish the body.
    pub(super) is_stalled: bool,
}

impl Reply {
    pub(super) fn ok(body: &[u8]) -> Self {
        Self {
            status: 200,
            body: body.to_vec(),
            ..Self::default()
        }
    }

    pub(super) fn manifest(body: &[u8]) -> Self {
        Self::ok(body).with("content-type", OCI_MANIFEST)
    }

    pub(super) fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::default()
        }
    }

    pub(super) fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }
}

/// Paths and `Range` headers.
type Asked = Arc<Mutex<Vec<(String, Option<String>)>>>;
type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

pub(super) struct FakeRegistry {
    pub(super) address: String,
    /// Paths asked for, with the `Range` header.
    pub(super) asked: Asked,
}

impl FakeRegistry {
    pub(super) async fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (handler, log): (Arc<Handler>, _) = (Arc::new(handler), Arc::clone(&asked));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&handler), Arc::clone(&log)));
            }
        });
        Self { address, asked }
    }

    /// Serves an honest image as `a:1`, except where `special` has another answer.
    pub(super) async fn serve(
        image: TestImage,
        special: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        Self::start(move |request| special(request).unwrap_or_else(|| honest(&image, request))).await
    }

    pub(super) fn n_asked(&self, part: &str) -> usize {
        self.asked
            .lock()
            .unwrap()
            .iter()
            .filter(|(path, _)| path.contains(part))
            .count()
    }
}

pub(super) fn honest(image: &TestImage, request: &Request) -> Reply {
    if request.path.contains("/manifests/") {
        return Reply::manifest(&image.manifest);
    }
    match image
        .blobs
        .iter()
        .find(|blob| request.path.ends_with(&digest(blob)))
    {
        Some(blob) => Reply::ok(blob),
        None => Reply::status(404),
    }
}

async fn serve(stream: TcpStream, handler: Arc<Handler>, log: Asked) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
        return;
    }
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    loop {
        line.clear();
        if stream.read_line(&mut line).await.unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    log.lock()
        .unwrap()
        .push((path.clone(), headers.get("range").cloned()));
    let reply = handler(&Request { path, headers });
    let mut head = format!("HTTP/1.1 {} -\r\nconnection: close\r\n", reply.status);
    if !reply.is_endless {
        head += &format!("content-length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    // The client may leave at any moment.
    let _ = stream.write_all(head.as_bytes()).await;
    let body = &reply.body[..reply.cut_after.unwrap_or(reply.body.len())];
    loop {
        let result = stream.write_all(body).await;
        if !reply.is_endless || result.is_err() {
            break;
        }
    }
    let _ = stream.flush().await;
    if reply.is_stalled {
        // Until the client closes.
        let _ = stream.read_line(&mut line).await;
    }
}
