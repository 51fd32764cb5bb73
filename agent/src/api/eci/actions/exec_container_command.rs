//! ExecContainerCommand

use std::{pin::Pin, time::Duration};

use serde_json::json;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::Mutex,
    time::timeout,
};

use super::{ActionResult, ApiError, Call, fields};
use crate::{
    api::{eci::view, lookup},
    engine::{ExecRequest, ExecSession},
    group::status::Phase,
};

const MOST_WORDS: usize = 20;
const MOST_CHARACTERS: usize = 256;
/// A synchronous command may run so long; clients wait 10 s unless told otherwise.
const SYNC_TIMEOUT: Duration = Duration::from_secs(60);
/// So much of its output is returned; what comes after is read and dropped.
const SYNC_OUTPUT_BYTES: usize = 1 << 20;

pub(super) async fn perform(call: &Call<'_>) -> ActionResult {
    let container = call.required("ContainerName")?.to_owned();
    let command = parse_command(call.required("Command")?)?;
    let tty = call.flag("TTY")?.unwrap_or(false);
    let sync = call.flag("Sync")?.unwrap_or(false);
    let stdin = call.flag("Stdin")?.unwrap_or(true);
    if sync && tty {
        return Err(ApiError::invalid("TTY is true; valid with Sync: false"));
    }
    if sync && command == ["/bin/bash"] {
        return Err(ApiError::invalid(
            "Command is /bin/bash, which needs input; valid with Sync: a command that ends by itself",
        ));
    }
    let group = call.group().await?;
    if group.status.phase != Phase::Running {
        return Err(ApiError::new(
            400,
            "IncorrectStatus",
            format!(
                "Container group {} is {}; valid: Running",
                group.id,
                view::status(&group)
            ),
        ));
    }
    lookup::container(&group, Some(&container))?;
    let request = ExecRequest {
        container: Some(container),
        command,
        tty,
        stdin: stdin && !sync,
        stdout: true,
        stderr: !tty,
        size: None,
    };
    if sync {
        let session = call.door.engine.exec(&group.id, request).await?;
        let output = timeout(SYNC_TIMEOUT, run(session)).await.map_err(|_| {
            ApiError::new(
                400,
                "OperationTimeout",
                format!(
                    "The command did not end within {} seconds and was killed",
                    SYNC_TIMEOUT.as_secs()
                ),
            )
        })??;
        return Ok(fields(
            json!({"SyncResponse": output, "WebSocketUri": "", "HttpUrl": ""}),
        ));
    }
    let token = call.door.execs.add(group.id, request)?;
    let scheme = if call.door.config.tls_cert.is_some() {
        "wss"
    } else {
        "ws"
    };
    let uri = format!("{scheme}://{}/exec/?s={token}", call.host);
    Ok(fields(json!({"WebSocketUri": uri})))
}

/// A JSON list of words, or one plain word.
fn parse_command(text: &str) -> Result<Vec<String>, ApiError> {
    let words: Vec<String> = if text.trim_start().starts_with('[') {
        serde_json::from_str(text).map_err(|_| {
            ApiError::invalid(format!("Command is {text:?}; valid: [\"program\",\"argument\"]"))
        })?
    } else {
        vec![text.to_owned()]
    };
    if words.is_empty() || words.iter().any(|word| word.contains('\0')) {
        return Err(ApiError::invalid(format!(
            "Command is {text:?}; valid: [\"program\",\"argument\"]"
        )));
    }
    if words.len() > MOST_WORDS || words.iter().any(|word| word.chars().count() > MOST_CHARACTERS) {
        return Err(ApiError::new(
            400,
            "InvalidParameter.ValueExceeded",
            format!(
                "Command is too long; valid: at most {MOST_WORDS} items of at most {MOST_CHARACTERS} characters"
            ),
        ));
    }
    Ok(words)
}

/// Runs a command to its end; stdout and stderr in the order they came.
async fn run(session: ExecSession) -> Result<String, ApiError> {
    let output = Mutex::new(Vec::new());
    let (_, _, exit) = tokio::join!(
        collect(session.stdout, &output),
        collect(session.stderr, &output),
        session.exit
    );
    exit?;
    Ok(String::from_utf8_lossy(&output.into_inner()).into_owned())
}

async fn collect(stream: Option<Pin<Box<dyn AsyncRead + Send>>>, output: &Mutex<Vec<u8>>) {
    let Some(mut stream) = stream else {
        return;
    };
    let mut buffer = vec![0; 8192];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        let mut output = output.lock().await;
        let room = SYNC_OUTPUT_BYTES - output.len();
        output.extend_from_slice(&buffer[..count.min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use super::parse_command;

    #[test]
    fn commands_are_lists_or_a_word() {
        assert_eq!(
            parse_command("[\"sh\", \"-c\", \"a b\"]").unwrap(),
            ["sh", "-c", "a b"]
        );
        assert_eq!(parse_command("/bin/ls").unwrap(), ["/bin/ls"]);
        let long = format!("[{}]", vec!["\"x\""; 21].join(","));
        assert_eq!(
            parse_command(&long).unwrap_err().code,
            "InvalidParameter.ValueExceeded"
        );
        assert_eq!(
            parse_command(&"x".repeat(257)).unwrap_err().code,
            "InvalidParameter.ValueExceeded"
        );
        for wrong in ["[", "[]", "[1]"] {
            assert_eq!(parse_command(wrong).unwrap_err().code, "InvalidParameter");
        }
    }
}
