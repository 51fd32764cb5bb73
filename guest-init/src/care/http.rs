//! A request of a probe: GET, of which the status is looked at only.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{check::connect, tls};

/// Longest head of an answer, bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Most fields of it.
const MAX_FIELDS: usize = 128;
/// Most answers that lead elsewhere.
const MAX_REDIRECTS: usize = 10;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpGet {
    /// By TLS.
    pub is_https: bool,
    /// Instead of the sandbox's own address.
    pub host: Option<IpAddr>,
    /// Port.
    pub port: u16,
    /// Path and query.
    pub path: String,
    /// Further fields; `Host`, `User-Agent` and `Accept` replace our own.
    pub headers: Vec<(String, String)>,
}

/// A place to ask at.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    is_https: bool,
    at: SocketAddr,
    path: String,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_https { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.at, self.path)
    }
}

/// Why there is no answer.
#[derive(Debug)]
struct Failed {
    /// For people.
    text: String,
    /// TLS was tried with a server that does not speak it.
    is_plain: bool,
}

/// Asks, and gives the status. An answer that leads elsewhere on the same host is followed.
///
/// # Errors
/// Why there is no answer, for people.
pub async fn get(own: IpAddr, request: &HttpGet) -> Result<u16, String> {
    follow(own, request).await.map_err(|failed| failed.text)
}

/// As [`get`], for a hook: a server that is asked by HTTPS and does not speak it is asked again without, and without the
/// `Authorization` that was meant for HTTPS (kubelet, `lifecycle/handlers.go`).
///
/// # Errors
/// Why there is no answer, for people.
pub async fn get_for_hook(own: IpAddr, request: &HttpGet) -> Result<u16, String> {
    match follow(own, request).await {
        Err(failed) if failed.is_plain && request.is_https => {
            let mut plain = request.clone();
            plain.is_https = false;
            plain
                .headers
                .retain(|(name, _)| !name.eq_ignore_ascii_case("authorization"));
            get(own, &plain).await
        }
        result => result.map_err(|failed| failed.text),
    }
}

async fn follow(own: IpAddr, request: &HttpGet) -> Result<u16, Failed> {
    let mut target = Target {
        is_https: request.is_https,
        at: SocketAddr::new(request.host.unwrap_or(own), request.port),
        path: request.path.clone(),
    };
    for _ in 0..=MAX_REDIRECTS {
        let answer = ask(&target, &request.headers).await?;
        let elsewhere = matches!(answer.status, 301 | 302 | 303 | 307 | 308);
        match answer
            .location
            .filter(|_| elsewhere)
            .and_then(|to| resolve(&target, &to))
        {
            Some(next) => target = next,
            None => return Ok(answer.status),
        }
    }
    Err(Failed {
        text: format!("stopped after {MAX_REDIRECTS} redirects"),
        is_plain: false,
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    location: Option<String>,
}

async fn ask(target: &Target, headers: &[(String, String)]) -> Result<Answer, Failed> {
    let failed = |text: String| Failed {
        text: format!("Get \"{target}\": {text}"),
        is_plain: false,
    };
    let stream = connect(target.at).await.map_err(failed)?;
    let head = head(target, headers);
    let answer = if target.is_https {
        let stream = tls::begin(stream, target.at).await.map_err(|error| {
            let is_plain = tls::is_plain(&error);
            let text = if is_plain {
                "http: server gave HTTP response to HTTPS client".to_owned()
            } else {
                error.to_string()
            };
            Failed {
                is_plain,
                ..failed(text)
            }
        })?;
        converse(stream, &head).await
    } else {
        converse(stream, &head).await
    };
    answer.map_err(failed)
}

async fn converse(mut stream: impl AsyncRead + AsyncWrite + Unpin, head: &str) -> Result<Answer, String> {
    let text = |error: std::io::Error| error.to_string();
    stream.write_all(head.as_bytes()).await.map_err(text)?;
    stream.flush().await.map_err(text)?;
    let mut read = Vec::new();
    loop {
        let mut chunk = [0; 2048];
        let n = stream.read(&mut chunk).await.map_err(text)?;
        read.extend_from_slice(&chunk[..n]);
        match parse(&read) {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) if n == 0 => return Err("EOF".to_owned()),
            Ok(None) if read.len() < MAX_HEAD_BYTES => {}
            Ok(None) => {
                return Err(format!(
                    "the head of the answer has more than {MAX_HEAD_BYTES} bytes"
                ));
            }
            Err(error) => return Err(format!("malformed HTTP response: {error}")),
        }
    }
}

fn head(Target { at, path, .. }: &Target, headers: &[(String, String)]) -> String {
    let given = |name: &str| headers.iter().any(|(other, _)| other.eq_ignore_ascii_case(name));
    let mut head = format!("GET {path} HTTP/1.1\r\n");
    for (name, value) in [
        ("Host", at.to_string()),
        ("User-Agent", "kube-probe/1.34".to_owned()),
        ("Accept", "*/*".to_owned()),
    ] {
        if !given(name) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    for (name, value) in headers {
        // An empty value is how a kubelet leaves out a field of its own.
        if !value.is_empty() {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    head.push_str("Connection: close\r\n\r\n");
    head
}

/// The head of an answer, if it is complete. Interim answers are passed over.
fn parse(bytes: &[u8]) -> Result<Option<Answer>, httparse::Error> {
    let mut rest = bytes;
    loop {
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut answer = httparse::Response::new(&mut fields);
        let httparse::Status::Complete(length) = answer.parse(rest)? else {
            return Ok(None);
        };
        let status = answer.code.unwrap_or_default();
        if (100..200).contains(&status) && status != 101 {
            rest = &rest[length..];
            continue;
        }
        let location = answer
            .headers
            .iter()
            .find(|field| field.name.eq_ignore_ascii_case("location"))
            .and_then(|field| std::str::from_utf8(field.value).ok())
            .map(str::to_owned);
        return Ok(Some(Answer { status, location }));
    }
}

/// Where an answer leads, if that is on the same host.
fn resolve(from: &Target, location: &str) -> Option<Target> {
    // Nothing of it may end the request line.
    if location
        .bytes()
        .any(|byte| byte.is_ascii_control() || byte == b' ')
    {
        return None;
    }
    let location = location.split('#').next().unwrap_or_default();
    let schemes = [("http://", false, 80), ("https://", true, 443)];
    let whole = if location.starts_with("//") {
        // Of the same scheme.
        format!("{}:{location}", if from.is_https { "https" } else { "http" })
    } else {
        location.to_owned()
    };
    for (scheme, is_https, port) in schemes {
        let Some(rest) = whole.strip_prefix(scheme) else {
            continue;
        };
        let (authority, path) = match rest.find(['/', '?']) {
            Some(slash) => rest.split_at(slash),
            None => (rest, "/"),
        };
        let address = |authority: &str| authority.parse().map(|ip| SocketAddr::new(ip, port));
        let bare = authority
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let at: SocketAddr = authority
            .parse()
            .or_else(|_| address(bare.unwrap_or(authority)))
            .ok()?;
        let path = if path.starts_with('?') {
            format!("/{path}")
        } else {
            path.to_owned()
        };
        return (at.ip() == from.at.ip()).then_some(Target { is_https, at, path });
    }
    if location.contains("://") {
        return None;
    }
    let path = if location.starts_with('/') {
        location.to_owned()
    } else {
        let asked = from.path.split('?').next().unwrap_or_default();
        let directory = &asked[..asked.rfind('/').map_or(0, |slash| slash + 1)];
        format!("{directory}{location}")
    };
    Some(Target { path, ..from.clone() })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ServerConfig, pki_types::PrivateKeyDer};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    fn target(is_https: bool, at: &str, path: &str) -> Target {
        Target {
            is_https,
            at: at.parse().unwrap(),
            path: path.into(),
        }
    }

    /// A server with a certificate for somebody else, long over, that nobody has vouched for.
    fn acceptor(version: &'static rustls::SupportedProtocolVersion) -> TlsAcceptor {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec!["elsewhere".to_owned()]).unwrap();
        parameters.not_after = rcgen::date_time_ymd(1999, 12, 31);
        let certificate = parameters.self_signed(&key).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    /// Reads a request's head to its end.
    async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        String::from_utf8(head).unwrap()
    }

    fn https(at: SocketAddr) -> HttpGet {
        HttpGet {
            is_https: true,
            host: Some(at.ip()),
            port: at.port(),
            path: "/first".into(),
            headers: vec![
                ("X".into(), "y".into()),
                ("Authorization".into(), "Bearer t".into()),
            ],
        }
    }

    #[tokio::test]
    async fn https_takes_any_certificate_and_follows_on_the_host() {
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let at = listener.local_addr().unwrap();
            let acceptor = acceptor(version);
            let server = tokio::spawn(async move {
                let mut heads = Vec::new();
                for answer in ["302 Found\r\nLocation: /second", "204 No Content"] {
                    let (stream, _) = listener.accept().await.unwrap();
                    let mut stream = acceptor.accept(stream).await.unwrap();
                    heads.push(read_head(&mut stream).await);
                    let answer = format!("HTTP/1.1 {answer}\r\n\r\n");
                    stream.write_all(answer.as_bytes()).await.unwrap();
                    stream.shutdown().await.unwrap();
                }
                heads
            });
            assert_eq!(get(at.ip(), &https(at)).await, Ok(204));
            let heads = server.await.unwrap();
            assert!(
                heads[0].starts_with("GET /first HTTP/1.1\r\n") && heads[0].contains("X: y\r\n"),
                "{heads:?}"
            );
            assert!(heads[1].starts_with("GET /second HTTP/1.1\r\n"), "{heads:?}");
        }
    }

    #[tokio::test]
    async fn a_hook_asks_again_without_tls_where_there_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut hello = [0; 64];
                let _ = stream.read(&mut hello).await;
                let _ = stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n").await;
            }
            let (mut stream, _) = listener.accept().await.unwrap();
            let head = read_head(&mut stream).await;
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").await.unwrap();
            head
        });
        let error = get(at.ip(), &https(at)).await.unwrap_err();
        assert!(
            error.ends_with("/first\": http: server gave HTTP response to HTTPS client"),
            "{error}"
        );
        assert_eq!(get_for_hook(at.ip(), &https(at)).await, Ok(200));
        let head = server.await.unwrap();
        assert!(head.contains("X: y") && !head.contains("Authorization"), "{head}");
    }

    #[test]
    fn heads_are_complete_or_awaited() {
        for (text, expected) in [
            ("HTTP/1.1 200 OK\r\nA: b\r\n\r\nbody", Some((200, None))),
            (
                "HTTP/1.1 302 Found\r\nLocation: /x\r\n\r\n",
                Some((302, Some("/x"))),
            ),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 No\r\n\r\n",
                Some((503, None)),
            ),
            ("HTTP/1.1 200 OK\r\nA: b\r\n", None),
            ("HTTP/1.1 100 Continue\r\n\r\n", None),
        ] {
            let expected = expected.map(|(status, location): (u16, Option<&str>)| Answer {
                status,
                location: location.map(str::to_owned),
            });
            assert_eq!(parse(text.as_bytes()).unwrap(), expected, "{text}");
        }
        assert!(parse(b"SSH-2.0-x\r\n\r\n").is_err());
    }

    #[test]
    fn redirects_stay_on_the_host() {
        let from = target(false, "10.0.0.2:8080", "/x/here?z=/");
        for (location, expected) in [
            ("/a?b", Some("http://10.0.0.2:8080/a?b")),
            ("next", Some("http://10.0.0.2:8080/x/next")),
            ("http://10.0.0.2/y", Some("http://10.0.0.2:80/y")),
            ("http://10.0.0.2:81?q", Some("http://10.0.0.2:81/?q")),
            ("http://10.0.0.3/y", None),
            ("https://10.0.0.2/y", Some("https://10.0.0.2:443/y")),
            ("https://10.0.0.2:8443", Some("https://10.0.0.2:8443/")),
            ("https://10.0.0.3/y", None),
            ("https://name/y", None),
            ("ftp://10.0.0.2/y", None),
            ("//10.0.0.2/y", Some("http://10.0.0.2:80/y")),
            ("//10.0.0.3/y", None),
            ("/a b", None),
            ("/a\r\nX: y", None),
        ] {
            let resolved = resolve(&from, location).map(|target| target.to_string());
            assert_eq!(resolved.as_deref(), expected, "{location}");
        }
        let from = target(true, "[fd00::2]:8443", "/");
        for (location, expected) in [
            ("x", Some("https://[fd00::2]:8443/x")),
            ("//[fd00::2]/y", Some("https://[fd00::2]:443/y")),
            ("http://[fd00::2]:80/", Some("http://[fd00::2]:80/")),
        ] {
            let resolved = resolve(&from, location).map(|target| target.to_string());
            assert_eq!(resolved.as_deref(), expected, "{location}");
        }
    }

    #[test]
    fn own_fields_are_replaced_or_left_out() {
        let at = target(false, "[::1]:80", "/h");
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let head = head(&at, &[pair("host", "x"), pair("Accept", ""), pair("A", "b")]);
        assert_eq!(
            head,
            "GET /h HTTP/1.1\r\nUser-Agent: kube-probe/1.34\r\nhost: x\r\nA: b\r\nConnection: close\r\n\r\n"
        );
    }

    #[tokio::test]
    async fn answers_without_end_are_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
            while stream
                .write_all(b"A: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\r\n")
                .await
                .is_ok()
            {}
        });
        let error = ask(&target(false, &at.to_string(), "/"), &[])
            .await
            .unwrap_err()
            .text;
        assert!(
            error.contains("malformed") || error.contains("more than"),
            "{error}"
        );
        server.await.unwrap();
    }
}
