//! Fuzz target of the owner's side of the control socket: the VMM is treated as broken into.

use std::io::IoSlice;

use rustix::net::SendFlags;

use super::{ControlError, Event, pair};

/// One packet of a broken VMM.
///
/// # Panics
/// When an event does not survive being sent again.
pub fn control_event(data: &[u8]) {
    let (owner, vmm) = pair().expect("descriptors can be had");
    // A packet that the socket refuses arrives nowhere.
    let mut control = rustix::net::SendAncillaryBuffer::default();
    let _ = rustix::net::sendmsg(&vmm, &[IoSlice::new(data)], &mut control, SendFlags::DONTWAIT);
    let Ok((event, fds)) = owner.try_recv() else {
        return;
    };
    assert!(fds.is_empty(), "descriptors out of nowhere");
    match vmm.try_send(&event, &[]) {
        Ok(()) => {
            let (again, _): (Event, _) = owner.try_recv().expect("it was sent");
            assert_eq!(again, event);
        }
        // Escapes may make it longer than it was.
        Err(ControlError::TooLong) => {}
        Err(error) => panic!("{event:?} can't be sent: {error}"),
    }
}
