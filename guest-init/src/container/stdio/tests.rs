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

fn connected(stream: Stream) -> Connected {
    Connected {
        stream,
        early: Vec::new(),
    }
}

fn line(stream: Stream) -> Arc<Line> {
    Arc::new(Line::new(
        Some(connected(stream)),
        Forsaken::Closed,
        Hold::default(),
    ))
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
        line(guest),
        watch,
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
    pump_output(Arc::new(Stream::new(read).unwrap()), line(guest), watch).await;
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
        line(guest),
        watch,
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
    pump_output(Arc::new(Stream::new(read).unwrap()), line(guest), watch).await;
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
    let line = Arc::new(Line::new(Some(input), Forsaken::Closed, Hold::default()));
    pump_input(line, Arc::new(Stream::new(write).unwrap()), watch).await;
    assert_eq!(read_to_end(&Stream::new(read).unwrap()).await, b"early late");
}

/// A line that was held and lost, with the host's end of what it was connected to.
fn lost(forsaken: Forsaken) -> (Arc<Line>, Stream) {
    let (guest, host) = sockets();
    let hold = Hold::default();
    hold.set(true);
    let line = Arc::new(Line::new(Some(connected(guest)), forsaken, hold));
    line.lose();
    (line, host)
}

async fn read_exactly(stream: &Stream, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < length {
        let chunk = stream.read(length - all.len()).await.unwrap();
        assert!(!chunk.is_empty(), "the stream ends after {all:?}");
        all.extend(chunk);
    }
    all
}

#[tokio::test]
async fn output_of_a_clone_waits_for_its_host() {
    let (line, old_host) = lost(Forsaken::Closed);
    let (read, write) = pipe();
    let (ended, watch) = watch::channel(false);
    let source = Arc::new(Stream::new(read).unwrap());
    let pump = tokio::spawn(pump_output(source, Arc::clone(&line), watch));
    rustix::io::write(&write, b"kept").unwrap();
    let (guest, host) = sockets();
    line.connect(connected(guest)).unwrap();
    assert_eq!(read_exactly(&host, 5).await, b"\x06kept");
    let refused = line.connect(connected(sockets().0)).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::AlreadyExists);
    drop(write);
    ended.send(true).unwrap();
    pump.await.unwrap();
    assert_eq!(read_to_end(&host).await, b"");
    assert_eq!(read_to_end(&old_host).await, b"", "the old host gets nothing");
    let refused = line.connect(connected(sockets().0)).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::FailedPrecondition);
}

#[tokio::test]
async fn what_the_old_host_did_not_take_goes_to_the_new_one() {
    let (read, write) = pipe();
    let (guest, old_host) = sockets();
    let line = line(guest);
    let (ended, watch) = watch::channel(false);
    let source = Arc::new(Stream::new(read).unwrap());
    let pump = tokio::spawn(pump_output(source, Arc::clone(&line), watch));
    let data: Vec<u8> = (0..1_500_000_u32)
        .map(|number| u8::try_from(number % 251).unwrap())
        .collect();
    let expected = data.clone();
    let writer = Stream::new(write).unwrap();
    let feed = tokio::spawn(async move {
        writer.write_all(&data).await.unwrap();
        drop(writer);
        ended.send(true).unwrap();
    });
    // The pump is in the middle of a chunk: its socket is full.
    let mut taken = read_exactly(&old_host, 1000).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    line.lose();
    tokio::task::yield_now().await;
    let (guest, host) = sockets();
    line.connect(connected(guest)).unwrap();
    let (rest, of_new) = tokio::join!(read_to_end(&old_host), read_to_end(&host));
    taken.extend(rest);
    taken.extend(&of_new[1..]);
    feed.await.unwrap();
    pump.await.unwrap();
    assert!(taken == expected, "{} bytes of {}", taken.len(), expected.len());
}

#[tokio::test]
async fn a_stream_that_fails_while_held_is_not_closed() {
    let (read, write) = pipe();
    let (guest, host) = sockets();
    let hold = Hold::default();
    hold.set(true);
    let line = Arc::new(Line::new(Some(connected(guest)), Forsaken::Closed, hold.clone()));
    drop(host);
    let (_ended, watch) = watch::channel(false);
    let source = Arc::new(Stream::new(read).unwrap());
    let pump = tokio::spawn(pump_output(source, Arc::clone(&line), watch));
    rustix::io::write(&write, b"kept").unwrap();
    while !matches!(*line.end.borrow(), End::Lost) {
        tokio::task::yield_now().await;
    }
    let (guest, host) = sockets();
    line.connect(connected(guest)).unwrap();
    assert_eq!(read_exactly(&host, 5).await, b"\x06kept");
    // Not held any more, the same closes it.
    hold.set(false);
    drop(host);
    rustix::io::write(&write, b"x").unwrap();
    pump.await.unwrap();
    assert_eq!(rustix::io::write(&write, b"x"), Err(rustix::io::Errno::PIPE));
}

#[tokio::test]
async fn output_nobody_wants_is_dropped_and_the_program_goes_on() {
    let (line, _host) = lost(Forsaken::Closed);
    let (read, write) = pipe();
    let (ended, watch) = watch::channel(false);
    let source = Arc::new(Stream::new(read).unwrap());
    let pump = tokio::spawn(pump_output(source, Arc::clone(&line), watch));
    line.give_up();
    // More than a pipe holds.
    let writer = Stream::new(write).unwrap();
    writer.write_all(&vec![b'x'; 1 << 20]).await.unwrap();
    let (guest, host) = sockets();
    line.connect(connected(guest)).unwrap();
    writer.write_all(b"seen").await.unwrap();
    drop(writer);
    ended.send(true).unwrap();
    pump.await.unwrap();
    let seen = read_to_end(&host).await;
    assert!(seen.starts_with(b"\x06") && seen.ends_with(b"seen"));
}

#[tokio::test]
async fn input_of_a_clone_stays_open_and_comes_from_its_host() {
    let (line, old_host) = lost(Forsaken::Closed);
    old_host
        .write_all(b"late")
        .await
        .expect_err("the old host is cut off");
    let (read, write) = pipe();
    let (_ended, watch) = watch::channel(false);
    let sink = Arc::new(Stream::new(write).unwrap());
    let pump = tokio::spawn(pump_input(Arc::clone(&line), sink, watch));
    tokio::task::yield_now().await;
    line.give_up();
    tokio::task::yield_now().await;
    let (guest, host) = sockets();
    let early = b"early ".to_vec();
    line.connect(Connected { stream: guest, early }).unwrap();
    host.write_all(b"late").await.unwrap();
    host.finish();
    assert_eq!(read_to_end(&Stream::new(read).unwrap()).await, b"early late");
    pump.await.unwrap();
}
