//! Downloading a layer, continued where it broke off.

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};
use tokio::sync::mpsc;

use super::super::error::PullError;
use super::Session;

/// Failures in a row, without a single new byte, after which a download is given up.
const MAX_FAILURES: u32 = 5;
const FIRST_DELAY: Duration = Duration::from_millis(200);

impl Session {
    /// Sends a blob's `size` bytes to `sink`; `progress` hears how many have arrived. A broken connection is opened
    /// again and continued with a range request. The caller verifies the digest.
    ///
    /// # Errors
    /// `Cancelled` when the receiver is gone.
    pub(in super::super) async fn download(
        &self,
        digest: &str,
        size: u64,
        sink: mpsc::Sender<Bytes>,
        progress: impl Fn(u64),
    ) -> Result<(), PullError> {
        let mut done = 0;
        let mut n_failures = 0;
        let mut last_done = 0;
        loop {
            match self
                .continue_download(digest, size, &mut done, &sink, &progress)
                .await
            {
                Ok(()) => return Ok(()),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Transient(error)) => {
                    n_failures = if done > last_done { 1 } else { n_failures + 1 };
                    last_done = done;
                    if n_failures >= MAX_FAILURES {
                        return Err(error);
                    }
                    tracing::info!(%error, digest, done, size, "Download of a layer broke off, continuing");
                    tokio::time::sleep(FIRST_DELAY * 2u32.pow(n_failures - 1)).await;
                }
            }
        }
    }

    async fn continue_download(
        &self,
        digest: &str,
        size: u64,
        done: &mut u64,
        sink: &mpsc::Sender<Bytes>,
        progress: impl Fn(u64),
    ) -> Result<(), Failure> {
        let path = format!("blobs/{digest}");
        let what = format!("layer {digest}");
        let mut response = self
            .get(&path, None, Some(*done))
            .await
            .map_err(|error| match error {
                error @ PullError::Unreachable { .. } => Failure::Transient(error),
                error => Failure::Final(error),
            })?;
        // Bytes of this response that are known already.
        let mut skip = match response.status() {
            StatusCode::OK => *done,
            StatusCode::PARTIAL_CONTENT if range_start(&response) == Some(*done) => 0,
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(Failure::Transient(self.refused(&what, status)));
            }
            status => return Err(Failure::Final(self.refused(&what, status))),
        };
        while *done < size {
            let chunk = response
                .chunk()
                .await
                .map_err(|error| Failure::Transient(self.unreachable(&path, error)))?;
            let Some(mut chunk) = chunk else {
                let source = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
                let address = format!("{}/{path}", self.base);
                return Err(Failure::Transient(PullError::Unreachable {
                    address,
                    source: source.into(),
                }));
            };
            let known = usize::try_from(skip).map_or(chunk.len(), |skip| skip.min(chunk.len()));
            skip -= known as u64;
            let mut chunk = chunk.split_off(known);
            // More than was announced is never looked at: the digest is that of `size` bytes.
            chunk.truncate(usize::try_from(size - *done).unwrap_or(usize::MAX));
            if chunk.is_empty() {
                continue;
            }
            *done += chunk.len() as u64;
            sink.send(chunk)
                .await
                .map_err(|_| Failure::Final(PullError::Cancelled))?;
            progress(*done);
        }
        Ok(())
    }
}

enum Failure {
    /// May pass.
    Transient(PullError),
    Final(PullError),
}

fn range_start(response: &Response) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}
