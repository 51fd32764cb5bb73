//! Streams: every byte, in order, before the end is told.

use std::{
    collections::HashMap,
    fs,
    io::{Read, Write},
    time::Duration,
};

use containerd_shim_protos::api::CloseIORequest;

use crate::bench::{Bench, read_fifo, soon};

const N_LINES: usize = 100_000;

fn expected_lines() -> String {
    (1..=N_LINES).map(|n| format!("line {n}\n")).collect()
}

fn script() -> String {
    format!("seq -f 'line %.0f' 1 {N_LINES}")
}

#[tokio::test]
async fn a_hundred_thousand_lines_through_a_fifo() {
    let bench = Bench::started().await;
    let mut request = bench.task_request("c1", &script());
    request.stdout = bench.fifo("out");
    let reader = read_fifo(&request.stdout);
    bench.create_task(&request).await;
    bench.start_task("c1", "").await.unwrap();
    assert_eq!(bench.wait_task("c1", "").await, 0);
    bench.delete_task("c1", "").await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(60), reader)
        .await
        .unwrap()
        .unwrap();
    assert!(read == expected_lines().into_bytes(), "{} bytes", read.len());
}

#[tokio::test]
async fn a_hundred_thousand_lines_and_errors_into_one_log_before_the_end_is_told() {
    let bench = Bench::started().await;
    let log = bench.path("0.log");
    let script = format!(
        "{} & seq -f 'error %.0f' 1 1000 >&2; wait; printf unfinished",
        script()
    );
    let mut request = bench.task_request("c1", &script);
    request.stdout = format!("cri://{}", log.display());
    request.stderr = request.stdout.clone();
    bench.create_task(&request).await;
    bench.start_task("c1", "").await.unwrap();
    assert_eq!(bench.wait_task("c1", "").await, 0);
    // No waiting: it must be there.
    let text = fs::read_to_string(&log).unwrap();
    let mut streams: HashMap<&str, String> = HashMap::new();
    let mut last = "";
    for line in text.lines() {
        let mut parts = line.splitn(4, ' ');
        let mut part = || parts.next().unwrap();
        let (time, stream, tag, message) = (part(), part(), part(), part());
        assert_eq!(time.len(), "2026-01-02T03:04:05.000000006Z".len());
        last = time;
        let joined = streams.entry(stream).or_default();
        joined.push_str(message);
        if tag == "F" {
            joined.push('\n');
        }
    }
    assert!(last.starts_with("20"));
    assert!(streams["stdout"] == expected_lines() + "unfinished");
    let errors: String = (1..=1000).map(|n| format!("error {n}\n")).collect();
    assert!(streams["stderr"] == errors);
}

#[tokio::test]
async fn stdin_ends_with_close_io_and_not_before() {
    let bench = Bench::started().await;
    let mut request = bench.task_request("c1", "cat; echo done");
    (request.stdin, request.stdout) = (bench.fifo("in"), bench.fifo("out"));
    let reader = read_fifo(&request.stdout);
    bench.create_task(&request).await;
    bench.start_task("c1", "").await.unwrap();
    let big = "x".repeat(300_000);
    // Two writers, one after the other: the first one's close is not the end.
    for part in ["first\n", &big] {
        let (path, part) = (request.stdin.clone(), part.to_owned());
        let write = move || {
            fs::OpenOptions::new()
                .write(true)
                .open(path)
                .unwrap()
                .write_all(part.as_bytes())
        };
        tokio::task::spawn_blocking(write).await.unwrap().unwrap();
    }
    let close = CloseIORequest {
        id: "c1".into(),
        stdin: true,
        ..Default::default()
    };
    bench.task.close_io(soon(), &close).await.unwrap();
    assert_eq!(bench.wait_task("c1", "").await, 0);
    bench.delete_task("c1", "").await.unwrap();
    let read = tokio::time::timeout(Duration::from_secs(60), reader)
        .await
        .unwrap()
        .unwrap();
    assert!(
        read == format!("first\n{big}done\n").into_bytes(),
        "{} bytes",
        read.len()
    );
}

#[tokio::test]
async fn a_reader_that_leaves_holds_the_output_and_the_next_one_gets_it() {
    let bench = Bench::started().await;
    let mut request = bench.task_request("c1", &format!("{}; exit 5", script()));
    request.stdout = bench.fifo("out");
    bench.create_task(&request).await;
    bench.start_task("c1", "").await.unwrap();
    let path = request.stdout.clone();
    let first = tokio::task::spawn_blocking(move || {
        let mut part = vec![0; 10_000];
        fs::File::open(path).unwrap().read_exact(&mut part).unwrap();
        part
    });
    let mut read = first.await.unwrap();
    let reader = read_fifo(&request.stdout);
    assert_eq!(bench.wait_task("c1", "").await, 5);
    bench.delete_task("c1", "").await.unwrap();
    read.extend(
        tokio::time::timeout(Duration::from_secs(60), reader)
            .await
            .unwrap()
            .unwrap(),
    );
    assert!(read == expected_lines().into_bytes(), "{} bytes", read.len());
}

#[tokio::test]
async fn output_nobody_reads_does_not_hide_the_end_for_ever() {
    let bench = Bench::started().await;
    let mut request = bench.task_request("c1", "seq 1 200000 & exec 1>&- 2>&-; exit 7");
    request.stdout = bench.fifo("out");
    bench.create_task(&request).await;
    bench.start_task("c1", "").await.unwrap();
    assert_eq!(bench.wait_task("c1", "").await, 7);
    bench.delete_task("c1", "").await.unwrap();
}

#[tokio::test]
async fn exec_streams_are_the_execs_own() {
    let bench = Bench::started().await;
    bench.create_task(&bench.task_request("c1", "sleep 1000")).await;
    bench.start_task("c1", "").await.unwrap();
    let mut request = bench.exec_request("c1", "e1", &["sh", "-c", "echo out; echo err >&2; cat"]);
    (request.stdin, request.stdout, request.stderr) =
        (bench.fifo("in"), bench.fifo("out"), bench.fifo("err"));
    let (out, err) = (read_fifo(&request.stdout), read_fifo(&request.stderr));
    bench.task.exec(soon(), &request).await.unwrap();
    let close = CloseIORequest {
        id: "c1".into(),
        exec_id: "e1".into(),
        stdin: true,
        ..Default::default()
    };
    bench.start_task("c1", "e1").await.unwrap();
    bench.task.close_io(soon(), &close).await.unwrap();
    assert_eq!(bench.wait_task("c1", "e1").await, 0);
    bench.delete_task("c1", "e1").await.unwrap();
    assert_eq!(out.await.unwrap(), b"out\n");
    assert_eq!(err.await.unwrap(), b"err\n");
}
