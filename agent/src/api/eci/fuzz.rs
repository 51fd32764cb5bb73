//! Fuzz targets of port 111: what anybody can send before a signature was checked.

use std::time::{Duration, UNIX_EPOCH};

use tokio::io::AsyncWriteExt;

use super::decode;
use super::http1::{Budget, Connection};
use super::signing::{Signed, verify};

/// When the seeds were signed: 2026-01-01T00:00:00Z.
const NOW: Duration = Duration::from_secs(1_767_225_600);
const MAX_REQUESTS: usize = 64;
/// Room for the answers to `Expect: 100-continue`.
const ANSWER_BYTES: usize = 64 << 10;

/// All requests of a connection; then what their signatures say.
///
/// # Panics
/// When a field carries a line end.
pub fn http1_requests(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be had");
    runtime.block_on(async {
        let (mut client, server) = tokio::io::duplex(data.len() + ANSWER_BYTES);
        client.write_all(data).await.expect("there is room");
        client.shutdown().await.expect("a connection in memory");
        let budget = Budget::new(32 << 20);
        let mut connection = Connection::new(server);
        for _ in 0..MAX_REQUESTS {
            let Ok(Some(request)) = connection.read(&budget).await else {
                return;
            };
            for text in [&request.method, &request.path, &request.query] {
                assert!(
                    !text.contains(['\r', '\n', ' ']),
                    "{text:?} is more than one word"
                );
            }
            for (name, value) in &request.headers {
                assert_eq!(*name, name.to_ascii_lowercase());
                assert!(!value.contains(['\r', '\n']), "{name} is {value:?}");
            }
            request.header_map();
            check(
                &request.method,
                &request.path,
                request.query.as_bytes(),
                &[],
                &request.headers,
                &request.body,
            );
            request.keep_alive();
        }
    });
}

/// Query, form, headers (`name: value`, with `|` between them), each on a line of its own, and the body.
pub fn eci_signature(data: &[u8]) {
    let mut parts = data.splitn(4, |byte| *byte == b'\n');
    let mut next = || parts.next().unwrap_or_default();
    let (query, form, headers, body) = (next(), next(), next(), next());
    let headers: Vec<_> = String::from_utf8_lossy(headers)
        .split('|')
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    check("POST", "/", query, form, &headers, body);
}

fn check(method: &str, path: &str, query: &[u8], form: &[u8], headers: &[(String, String)], body: &[u8]) {
    let signed = Signed {
        method,
        path,
        query: &decode(query),
        form: &decode(form),
        headers,
        body,
    };
    let secret_of = |id: &str| (id == "testid").then_some("testsecret");
    match verify(&signed, secret_of, UNIX_EPOCH + NOW) {
        Ok(caller) => assert_eq!(caller.access_key_id, "testid"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
