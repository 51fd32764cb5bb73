//! Starts, finds and buries shim processes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{process::Command, sync::watch};

use super::{
    bundle::Bundle,
    client::{Deadlines, SandboxConnection},
};
use crate::error::{Error, ErrorKind, Result};

/// The containerd namespace of the agent's own sandboxes.
const NAMESPACE: &str = "eci";

/// How shims are run.
#[derive(Debug, Clone)]
pub struct ShimProgram {
    /// The binary `containerd-shim-eci-v2`.
    pub path: PathBuf,
    /// Deadlines of calls to it.
    pub deadlines: Deadlines,
    /// Starts that were begun, by sandbox.
    starts: Starts,
}

/// Starts that were begun and may be under way: whoever wanted one may have gone.
type Starts = Arc<Mutex<BTreeMap<String, watch::Receiver<()>>>>;

impl ShimProgram {
    /// The binary at `path`.
    pub fn new(path: PathBuf, deadlines: Deadlines) -> Self {
        Self {
            path,
            deadlines,
            starts: Starts::default(),
        }
    }

    /// Starts the shim of sandbox `id` and connects to it. Once begun the start comes to its end, also when the caller is gone: one
    /// that is broken off leaves a process that nobody knows of.
    ///
    /// # Errors
    /// It did not start; the message has what it printed.
    pub async fn start(&self, id: &str, bundle: &Bundle) -> Result<SandboxConnection> {
        let printed = self.begin(id, bundle).await?;
        let address = parse_address(&printed).ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("the shim of {id} printed {printed:?} where its address belongs"),
            )
        })?;
        SandboxConnection::connect(id, &address, self.deadlines).await
    }

    /// Connects to a shim started earlier, and asks it a question to be sure that it answers.
    ///
    /// # Errors
    /// There is none, or it does not answer.
    pub async fn find(&self, id: &str, bundle: &Bundle) -> Result<SandboxConnection> {
        let address = bundle.address().map_err(|error| {
            Error::with_source(
                ErrorKind::NotFound,
                format!(
                    "the sandbox of {id} has no shim address in {}",
                    bundle.dir().display()
                ),
                error,
            )
        })?;
        let address = parse_address(&address).unwrap_or(address);
        let deadlines = Deadlines {
            request: self.deadlines.request.min(Duration::from_secs(10)),
            ..self.deadlines
        };
        SandboxConnection::connect(id, &address, deadlines)
            .await?
            .sandbox_status()
            .await?;
        SandboxConnection::connect(id, &address, self.deadlines).await
    }

    /// Clears up after a shim that is dead or does not answer: its VMM, its socket. Idempotent.
    ///
    /// # Errors
    /// The action failed; the message has what it printed.
    pub async fn bury(&self, id: &str, bundle: &Bundle) -> Result<()> {
        // What a start makes meanwhile would be left.
        let under_way = self.lock_starts().get(id).cloned();
        if let Some(mut under_way) = under_way {
            // An error is its end.
            let _ = under_way.changed().await;
        }
        if !bundle.dir().exists() {
            return Ok(());
        }
        self.action(id, bundle, "delete").await.map(|_| ())
    }

    async fn begin(&self, id: &str, bundle: &Bundle) -> Result<String> {
        let (ended, under_way) = watch::channel(());
        self.lock_starts().insert(id.to_owned(), under_way);
        let (program, id, bundle) = (self.clone(), id.to_owned(), bundle.clone());
        let start = tokio::spawn(async move {
            let printed = program.action(&id, &bundle, "start").await;
            program.lock_starts().remove(&id);
            drop(ended);
            printed
        });
        start.await.unwrap_or_else(|error| {
            Err(Error::with_source(
                ErrorKind::Internal,
                "start a shim".to_owned(),
                error,
            ))
        })
    }

    fn lock_starts(&self) -> MutexGuard<'_, BTreeMap<String, watch::Receiver<()>>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn action(&self, id: &str, bundle: &Bundle, action: &str) -> Result<String> {
        let what = || format!("run {} {action} for {id}", self.path.display());
        let mut command = Command::new(&self.path);
        command
            .args(["-namespace", NAMESPACE, "-id", id, "-address", ""])
            .arg("-bundle")
            .arg(bundle.dir())
            .arg(action)
            .current_dir(bundle.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Killed between making its server and writing down which it is, a start would leave that behind.
            .kill_on_drop(action != "start");
        let output = tokio::time::timeout(self.deadlines.start, command.output())
            .await
            .map_err(|_| Error::new(ErrorKind::DeadlineExceeded, format!("{}: timed out", what())))?
            .map_err(|error| Error::with_source(ErrorKind::Internal, what(), error))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(Error::new(
            ErrorKind::Internal,
            format!("{}: {}: {}", what(), output.status, last_line(&stderr)),
        ))
    }
}

fn last_line(text: &str) -> &str {
    text.lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it printed nothing")
}

/// The address a shim prints: plain, or containerd 2's JSON bootstrap parameters.
fn parse_address(printed: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Bootstrap {
        address: String,
    }
    let printed = printed.trim();
    let address = if printed.starts_with('{') {
        serde_json::from_str::<Bootstrap>(printed).ok()?.address
    } else {
        printed.to_owned()
    };
    let path = address.strip_prefix("unix://")?;
    Path::new(path).is_absolute().then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_plain_and_bootstrap() {
        for (printed, expected) in [
            ("unix:///run/a.sock\n", Some("unix:///run/a.sock")),
            (
                r#"{"version":3,"address":"unix:///run/a.sock","protocol":"ttrpc"}"#,
                Some("unix:///run/a.sock"),
            ),
            ("unix://rel", None),
            ("", None),
            ("{", None),
        ] {
            assert_eq!(parse_address(printed).as_deref(), expected, "{printed}");
        }
    }
}
