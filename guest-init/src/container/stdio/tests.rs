use std::os::fd::OwnedFd;

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    pipe::{PipeFlags, pipe_with},
};

use super::*;

fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).unwrap()
}

fn sockets() -> (Stream, Stream) {
    let (left, right) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    (Stream::new(left).unwrap(), Stream::new(right).unwrap())
}

fn connected(stream: Stream) -> Option<Connected> {
    Some(Connected {
        stream,
        early: Vec::new(),
    })
}

async fn read_to_end(stream: &Stream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Ok(chunk) = stream.read(4096).await {
        if chunk.is_empty() {
            break;
        }
        all.extend(chunk);
    }
    all
}

#[tokio::test]
async fn nothing_is_lost_when_the_host_reads_late() {
    let (read, write) = pipe();
    let (guest, host) = sockets();
    let (ended, watch) = watch::channel(false);
    let pump = tokio::spawn(pump_output(
        Arc::new(Stream::new(read).unwrap()),
        connected(guest),
        watch,
        false,
    ));
    let writer = Stream::new(write).unwrap();
    let data: Vec<u8> = (0..1_000_000u32)
        .map(|number| u8::try_from(number % 251).unwrap())
        .collect();
    let expected = data.clone();
    let feed = tokio::spawn(async move {
        writer.write_all(&data).await.unwrap();
        drop(writer);
        ended.send(true).unwrap();
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!pump.is_finished(), "the host has not read yet");
    assert_eq!(read_to_end(&host).await, expected);
    feed.await.unwrap();
    pump.await.unwrap();
}

#[tokio::test]
async fn output_left_in_the_pipe_is_copied_and_a_silent_holder_does_not_block() {
    let (read, write) = pipe();
    let (guest, host) = sockets();
    rustix::io::write(&write, b"last words").unwrap();
    let (_ended, watch) = watch::channel(true);
    // `write` stays open: somebody else holds the pipe.
    let started = Instant::now();
    pump_output(
        Arc::new(Stream::new(read).unwrap()),
        connected(guest),
        watch,
        false,
    )
    .await;
    assert!(started.elapsed() < LINGER);
    assert_eq!(read_to_end(&host).await, b"last words");
    assert!(rustix::io::write(&write, b"late").is_err());
}

#[tokio::test]
async fn a_holder_that_never_stops_is_cut_off() {
    let (read, write) = pipe();
    let (guest, host) = sockets();
    let (_ended, watch) = watch::channel(true);
    let pump = tokio::spawn(pump_output(
        Arc::new(Stream::new(read).unwrap()),
        connected(guest),
        watch,
        false,
    ));
    let writer = Stream::new(write).unwrap();
    let noise = tokio::spawn(async move { while writer.write_all(&[b'y'; 512]).await.is_ok() {} });
    let drain = tokio::spawn(async move { read_to_end(&host).await });
    tokio::time::timeout(LINGER * 2, pump)
        .await
        .expect("the pump ends")
        .unwrap();
    noise.await.unwrap();
    drain.await.unwrap();
}

#[tokio::test]
async fn a_host_that_goes_away_breaks_the_pipe() {
    let (read, write) = pipe();
    let (guest, host) = sockets();
    let (_ended, watch) = watch::channel(false);
    drop(host);
    rustix::io::write(&write, b"x").unwrap();
    pump_output(
        Arc::new(Stream::new(read).unwrap()),
        connected(guest),
        watch,
        false,
    )
    .await;
    assert_eq!(rustix::io::write(&write, b"x"), Err(rustix::io::Errno::PIPE));
}

#[tokio::test]
async fn input_arrives_with_its_early_part_and_ends() {
    let (read, write) = pipe();
    let (guest, host) = sockets();
    let (_ended, watch) = watch::channel(false);
    let input = Connected {
        stream: guest,
        early: b"early ".to_vec(),
    };
    host.write_all(b"late").await.unwrap();
    drop(host);
    pump_input(input, Arc::new(Stream::new(write).unwrap()), watch).await;
    assert_eq!(read_to_end(&Stream::new(read).unwrap()).await, b"early late");
}
