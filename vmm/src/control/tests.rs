use std::fs::File;
use std::io::Read;

use super::*;

fn pipe_with(text: &str) -> OwnedFd {
    let (read, write) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&write, text.as_bytes()).unwrap();
    read
}

#[test]
fn message_arrives_with_its_descriptors_in_order() {
    let (owner, vmm) = pair().unwrap();
    let (first, second) = (pipe_with("first"), pipe_with("second"));
    owner
        .send(
            &Command::Connect { id: 7, port: 1024 },
            &[first.as_fd(), second.as_fd()],
        )
        .unwrap();
    let (command, fds) = vmm.recv().unwrap();
    assert_eq!(command, Command::Connect { id: 7, port: 1024 });
    let texts: Vec<String> = fds
        .into_iter()
        .map(|fd| {
            let mut buffer = [0; 16];
            let length = File::from(fd).read(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        })
        .collect();
    assert_eq!(texts, ["first", "second"]);
}

#[test]
fn received_descriptors_are_close_on_exec() {
    let (owner, vmm) = pair().unwrap();
    owner.send(&Command::Kill, &[owner.as_fd()]).unwrap();
    let (_, fds) = vmm.recv().unwrap();
    assert!(
        rustix::io::fcntl_getfd(&fds[0])
            .unwrap()
            .contains(rustix::io::FdFlags::CLOEXEC)
    );
}

#[test]
fn empty_socket_would_block_and_closed_socket_says_so() {
    let (owner, vmm) = pair().unwrap();
    assert!(matches!(vmm.try_recv(), Err(ControlError::WouldBlock)));
    drop(owner);
    assert!(matches!(vmm.try_recv(), Err(ControlError::Closed)));
    assert!(matches!(
        vmm.send(&Event::Started, &[]),
        Err(ControlError::Closed)
    ));
}

#[test]
fn last_message_is_received_after_the_sender_is_gone() {
    let (owner, vmm) = pair().unwrap();
    vmm.send(&Event::Exited(ExitReason::Shutdown), &[]).unwrap();
    drop(vmm);
    assert_eq!(owner.recv().unwrap().0, Event::Exited(ExitReason::Shutdown));
    assert!(matches!(owner.recv(), Err(ControlError::Closed)));
}

#[test]
fn full_socket_would_block() {
    let (owner, _vmm) = pair().unwrap();
    let error = loop {
        if let Err(error) = owner.try_send(&Command::Kill, &[]) {
            break error;
        }
    };
    assert!(matches!(error, ControlError::WouldBlock));
}

#[test]
fn too_long_is_refused_by_both_ends() {
    let (owner, vmm) = pair().unwrap();
    let message = "x".repeat(MAX_MESSAGE_BYTES);
    assert!(matches!(
        vmm.send(&Event::Failed { id: 1, message }, &[]),
        Err(ControlError::TooLong)
    ));
    rustix::net::send(&vmm, &vec![b'x'; MAX_MESSAGE_BYTES + 1], SendFlags::empty()).unwrap();
    assert!(matches!(owner.recv(), Err(ControlError::TooLong)));
}

#[test]
fn a_message_of_the_greatest_size_passes() {
    let (owner, vmm) = pair().unwrap();
    let overhead = serde_json::to_vec(&Event::Failed {
        id: 1,
        message: String::new(),
    })
    .unwrap()
    .len();
    let event = Event::Failed {
        id: 1,
        message: "x".repeat(MAX_MESSAGE_BYTES - overhead),
    };
    let fds = vec![vmm.as_fd(); MAX_MESSAGE_FDS];
    vmm.send(&event, &fds).unwrap();
    let (received, fds) = owner.recv().unwrap();
    assert_eq!((received, fds.len()), (event, MAX_MESSAGE_FDS));
    let fds = vec![vmm.as_fd(); MAX_MESSAGE_FDS + 1];
    assert!(matches!(
        vmm.send(&Event::Started, &fds),
        Err(ControlError::TooManyFds)
    ));
}

#[test]
fn junk_is_malformed_and_leaves_the_socket_usable() {
    let (owner, vmm) = pair().unwrap();
    for junk in [
        &b"\0"[..],
        b"{",
        b"\"kill\" ",
        b"{\"connect\":{\"id\":1,\"port\":2,\"extra\":3}}",
        b"\xff\xfe",
    ] {
        rustix::net::send(&owner, junk, SendFlags::empty()).unwrap();
    }
    let outcomes: Vec<bool> = (0..5)
        .map(|_| matches!(vmm.try_recv(), Err(ControlError::Malformed { .. })))
        .collect();
    assert_eq!(outcomes, [true, true, false, true, true]);
}
