//! A request of a probe: GET, of which the status is looked at only.

use std::net::{IpAddr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::check::connect;

/// Longest head of an answer, bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Most fields of it.
const MAX_FIELDS: usize = 128;
/// Most answers that lead elsewhere.
const MAX_REDIRECTS: usize = 10;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpGet {
    /// Instead of the sandbox's own address.
    pub host: Option<IpAddr>,
    /// Port.
    pub port: u16,
    /// Path and query.
    pub path: String,
    /// Further fields; `Host`, `User-Agent` and `Accept` replace our own.
    pub headers: Vec<(String, String)>,
}

/// Asks, and gives the status. An answer that leads elsewhere on the same host and by plain HTTP is followed.
///
/// # Errors
/// Why there is no answer, for people.
pub async fn get(own: IpAddr, request: &HttpGet) -> Result<u16, String> {
    let host = request.host.unwrap_or(own);
    let mut at = SocketAddr::new(host, request.port);
    let mut path = request.path.clone();
    for _ in 0..=MAX_REDIRECTS {
        let answer = ask(at, &path, &request.headers).await?;
        let elsewhere = matches!(answer.status, 301 | 302 | 303 | 307 | 308);
        match answer
            .location
            .filter(|_| elsewhere)
            .and_then(|to| resolve(at, &path, &to))
        {
            Some((address, next)) => (at, path) = (address, next),
            None => return Ok(answer.status),
        }
    }
    Err(format!("stopped after {MAX_REDIRECTS} redirects"))
}

#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    location: Option<String>,
}

async fn ask(at: SocketAddr, path: &str, headers: &[(String, String)]) -> Result<Answer, String> {
    let failed = |error: std::io::Error| format!("Get \"http://{at}{path}\": {error}");
    let mut stream = connect(at)
        .await
        .map_err(|why| format!("Get \"http://{at}{path}\": {why}"))?;
    stream
        .write_all(head(at, path, headers).as_bytes())
        .await
        .map_err(failed)?;
    let mut read = Vec::new();
    loop {
        let mut chunk = [0; 2048];
        let n = stream.read(&mut chunk).await.map_err(failed)?;
        read.extend_from_slice(&chunk[..n]);
        match parse(&read) {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) if n == 0 => return Err(format!("Get \"http://{at}{path}\": EOF")),
            Ok(None) if read.len() < MAX_HEAD_BYTES => {}
            Ok(None) => {
                return Err(format!(
                    "the head of the answer has more than {MAX_HEAD_BYTES} bytes"
                ));
            }
            Err(error) => {
                return Err(format!(
                    "Get \"http://{at}{path}\": malformed HTTP response: {error}"
                ));
            }
        }
    }
}

fn head(at: SocketAddr, path: &str, headers: &[(String, String)]) -> String {
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

/// Where an answer leads, if that is on the same host and by plain HTTP.
fn resolve(at: SocketAddr, path: &str, location: &str) -> Option<(SocketAddr, String)> {
    // Nothing of it may end the request line.
    if location
        .bytes()
        .any(|byte| byte.is_ascii_control() || byte == b' ')
    {
        return None;
    }
    let location = location.split('#').next().unwrap_or_default();
    if let Some(rest) = location.strip_prefix("http://") {
        let (authority, path) = match rest.find(['/', '?']) {
            Some(slash) => rest.split_at(slash),
            None => (rest, "/"),
        };
        let address: SocketAddr = authority
            .parse()
            .or_else(|_| authority.parse().map(|ip| SocketAddr::new(ip, 80)))
            .ok()?;
        let path = if path.starts_with('?') {
            format!("/{path}")
        } else {
            path.to_owned()
        };
        return (address.ip() == at.ip()).then_some((address, path));
    }
    if location.starts_with("//") || location.contains("://") {
        return None;
    }
    if location.starts_with('/') {
        return Some((at, location.to_owned()));
    }
    let directory = &path[..path
        .split('?')
        .next()
        .unwrap_or_default()
        .rfind('/')
        .map_or(0, |slash| slash + 1)];
    Some((at, format!("{directory}{location}")))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

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
        let at: SocketAddr = "10.0.0.2:8080".parse().unwrap();
        for (location, expected) in [
            ("/a?b", Some("10.0.0.2:8080/a?b")),
            ("next", Some("10.0.0.2:8080/x/next")),
            ("http://10.0.0.2/y", Some("10.0.0.2:80/y")),
            ("http://10.0.0.2:81?q", Some("10.0.0.2:81/?q")),
            ("http://10.0.0.3/y", None),
            ("https://10.0.0.2/y", None),
            ("//10.0.0.2/y", None),
            ("/a b", None),
            ("/a\r\nX: y", None),
        ] {
            let resolved = resolve(at, "/x/here?z=/", location);
            let resolved = resolved.map(|(address, path)| format!("{address}{path}"));
            assert_eq!(resolved.as_deref(), expected, "{location}");
        }
    }

    #[test]
    fn own_fields_are_replaced_or_left_out() {
        let at = "[::1]:80".parse().unwrap();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let head = head(at, "/h", &[pair("host", "x"), pair("Accept", ""), pair("A", "b")]);
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
        let error = ask(at, "/", &[]).await.unwrap_err();
        assert!(
            error.contains("malformed") || error.contains("more than"),
            "{error}"
        );
        server.await.unwrap();
    }
}
