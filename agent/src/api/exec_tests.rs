use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use tokio::io::duplex;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::*;
use crate::error::{Error, ErrorKind};

/// Records resizes.
struct Recorder(mpsc::UnboundedSender<(u16, u16)>);

#[async_trait]
impl ExecControl for Recorder {
    async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let _ = self.0.send((rows, columns));
        Ok(())
    }

    async fn signal(&self, _: i32) -> Result<()> {
        Ok(())
    }
}

/// Says when it is dropped.
struct OnDrop(Arc<AtomicBool>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Command {
    session: ExecSession,
    resizes: mpsc::UnboundedReceiver<(u16, u16)>,
    dropped: Arc<AtomicBool>,
}

/// A session of a command that is this future of (stdin, stdout, stderr).
fn command<F, R>(run: F) -> Command
where
    F: FnOnce(tokio::io::DuplexStream, tokio::io::DuplexStream, tokio::io::DuplexStream) -> R,
    R: Future<Output = Result<i32>> + Send + 'static,
{
    let (stdin, stdin_end) = duplex(1024);
    let (stdout, stdout_end) = duplex(1024);
    let (stderr, stderr_end) = duplex(1024);
    let (sender, resizes) = mpsc::unbounded_channel();
    let dropped = Arc::new(AtomicBool::new(false));
    let guard = OnDrop(Arc::clone(&dropped));
    let running = tokio::spawn(run(stdin_end, stdout_end, stderr_end));
    let session = ExecSession {
        stdin: Some(Box::pin(stdin)),
        stdout: Some(Box::pin(stdout)),
        stderr: Some(Box::pin(stderr)),
        control: Box::new(Recorder(sender)),
        exit: Box::pin(async move {
            let _guard = guard;
            running.await.unwrap()
        }),
    };
    Command {
        session,
        resizes,
        dropped,
    }
}

async fn connect(session: ExecSession, framing: Framing) -> WebSocketStream<tokio::io::DuplexStream> {
    let (client, server) = duplex(4096);
    tokio::spawn(async move {
        let socket = crate::api::websocket::server_socket(server).await;
        carry(socket, session, framing).await;
    });
    WebSocketStream::from_raw_socket(client, Role::Client, None).await
}

/// Everything received: stdout, stderr, the exit status.
async fn collect(client: &mut WebSocketStream<tokio::io::DuplexStream>) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let mut channels = (Vec::new(), Vec::new(), Vec::new());
    while let Some(Ok(message)) = client.next().await {
        if let Message::Binary(data) = message {
            let into = match data[0] {
                STDOUT => &mut channels.0,
                STDERR => &mut channels.1,
                ERROR => &mut channels.2,
                other => panic!("channel {other}"),
            };
            into.extend_from_slice(&data[1..]);
        }
    }
    channels
}

#[tokio::test]
async fn a_hundred_thousand_lines_arrive_complete_and_in_order() {
    let expected: String = (0..100_000).map(|line| format!("line {line}\n")).collect();
    let text = expected.clone();
    let command = command(|_, mut stdout, mut stderr| async move {
        stdout.write_all(text.as_bytes()).await.unwrap();
        stderr.write_all(b"done").await.unwrap();
        Ok(3)
    });
    let mut client = connect(command.session, Framing::V4).await;
    let (stdout, stderr, status) = collect(&mut client).await;
    assert!(stdout == expected.as_bytes());
    assert_eq!(stderr, b"done");
    assert_eq!(parse_exit(&status), Ok(3));
}

#[tokio::test]
async fn half_close_ends_stdin_only() {
    let command = command(|mut stdin, mut stdout, _| async move {
        let mut input = Vec::new();
        stdin.read_to_end(&mut input).await.unwrap();
        stdout.write_all(&input).await.unwrap();
        Ok(0)
    });
    let mut client = connect(command.session, Framing::V5).await;
    let input = vec![b'x'; 100_000];
    for chunk in input.chunks(7000) {
        let frame = Framing::V5.frame(STDIN, chunk);
        client.send(Message::Binary(frame)).await.unwrap();
    }
    client
        .send(Message::Binary(Bytes::from_static(&[CLOSE, STDIN])))
        .await
        .unwrap();
    let (stdout, _, status) = collect(&mut client).await;
    assert!(stdout == input);
    assert_eq!(parse_exit(&status), Ok(0));
}

#[tokio::test]
async fn resizes_reach_the_terminal() {
    let mut command = command(|mut stdin, _, _| async move {
        let mut byte = [0];
        stdin.read_exact(&mut byte).await.unwrap();
        Ok(0)
    });
    let mut client = connect(command.session, Framing::V4).await;
    for text in ["{\"Width\":80,\"Height\":24}", "{\"Width\":-1}", "x"] {
        let frame = Framing::V4.frame(RESIZE, text.as_bytes());
        client.send(Message::Binary(frame)).await.unwrap();
    }
    assert_eq!(command.resizes.recv().await, Some((24, 80)));
    client
        .send(Message::Binary(Bytes::from_static(&[STDIN, b'q'])))
        .await
        .unwrap();
    assert_eq!(parse_exit(&collect(&mut client).await.2), Ok(0));
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_session() {
    let command = command(|_, _stdout, _stderr| std::future::pending());
    let client = connect(command.session, Framing::V5).await;
    drop(client);
    let dropped = command.dropped;
    timeout(Duration::from_secs(5), async {
        while !dropped.load(Ordering::SeqCst) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the session is dropped");
}

#[tokio::test]
async fn plain_clients_get_merged_output_and_the_code_in_the_close_reason() {
    let command = command(|_, mut stdout, _| async move {
        stdout.write_all(b"hello").await.unwrap();
        Ok(7)
    });
    let mut client = connect(command.session, Framing::Plain).await;
    let mut output = Vec::new();
    let mut reason = String::new();
    while let Some(Ok(message)) = client.next().await {
        match message {
            Message::Binary(data) => output.extend_from_slice(&data),
            Message::Close(Some(frame)) => reason = frame.reason.to_string(),
            _ => {}
        }
    }
    assert_eq!(
        (output.as_slice(), reason.as_str()),
        (&b"hello"[..], "exit code 7")
    );
}

#[test]
fn exit_codes_survive_the_status() {
    for code in [0, 1, 3, 127, 137, 255] {
        let text = serde_json::to_vec(&exit_status(&Ok(code))).unwrap();
        assert_eq!(parse_exit(&text), Ok(code));
    }
    let lost = exit_status(&Err(Error::new(ErrorKind::Internal, "the sandbox died")));
    assert_eq!(
        parse_exit(&serde_json::to_vec(&lost).unwrap()),
        Err("the sandbox died".into())
    );
    assert!(parse_exit(b"x").is_err());
}

#[test]
fn the_status_is_what_kubernetes_clients_read() {
    let text = serde_json::to_value(exit_status(&Ok(3))).unwrap();
    assert_eq!(text["status"], "Failure");
    assert_eq!(text["reason"], "NonZeroExitCode");
    assert_eq!(text["details"]["causes"][0]["reason"], "ExitCode");
    assert_eq!(text["details"]["causes"][0]["message"], "3");
    assert!(text["message"].as_str().unwrap().contains("exit code"));
}
