//! The VMM thread: takes the owner's commands, and reports the end. The one list of what can wake it:
//! a command, events that other threads could not send, and the end of the VM.

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use crate::builder::{self, Machine};
use crate::config::SliceDisk;
use crate::control::{Command, ControlError, Event, ExitReason, VmmSocket, chain};
use crate::devices::virtio::block::SliceMap;
use crate::reporter::Reporter;
use crate::resources::Resources;
use crate::sys::fork;
use crate::vm::EndSignal;

/// Serves one VM from its `Start` to its end, which is the last thing reported; the process is to end then.
#[must_use]
pub fn run(owner: VmmSocket) -> ExitReason {
    let reporter = match Reporter::new(owner) {
        Ok(reporter) => Arc::new(reporter),
        Err(error) => return start_failed(&error),
    };
    let end = match EndSignal::new(Arc::default()) {
        Ok(end) => Arc::new(end),
        Err(error) => return start_failed(&error),
    };
    let mut started = start(&reporter, &end);
    let reason = match &mut started {
        Ok(machine) => serve(machine, &reporter, &end),
        Err(reason) => reason.clone(),
    };
    // With a descriptor of the VM in the owner's hands, this process's end does not take the VM apart, which would hold it
    // up: see `Event::Exited`. An owner that is gone cannot be told.
    let remains = started.as_ref().ok().map(|machine| machine.vm.as_fd());
    let _ = reporter.send_with(&Event::Exited(reason.clone()), remains.as_slice());
    drop(started);
    reason
}

/// From the start of the vCPUs to the end.
fn serve(machine: &mut Machine, reporter: &Arc<Reporter>, end: &EndSignal) -> ExitReason {
    if reporter.send(&Event::Started).is_err() {
        return ExitReason::Killed;
    }
    let mut saving = Saving::default();
    loop {
        if let Some(reason) = wait(reporter, end, &saving) {
            return reason;
        }
        let served = reporter.flush().is_ok()
            && saving.take_in().is_none_or(|event| reporter.send(&event).is_ok())
            && reporter.owner().try_recv().map_or_else(
                // Closed by the owner; or an owner that cannot be understood, which is as good as none.
                |error| matches!(error, ControlError::WouldBlock),
                |(command, fds)| carry_out(command, fds, machine, reporter, &mut saving),
            );
        if !served {
            return ExitReason::Killed;
        }
    }
}

/// Waits for `Start` and builds the VM.
fn start(reporter: &Arc<Reporter>, end: &Arc<EndSignal>) -> Result<Machine, ExitReason> {
    match reporter.owner().recv() {
        Ok((Command::Start(config), fds)) => {
            let resources = Resources::assign(&config, fds).map_err(|error| start_failed(&error))?;
            builder::build(&config, resources, end, reporter).map_err(|error| {
                let message = chain(&error);
                if error.refuses_snapshot() {
                    ExitReason::SnapshotRefused { message }
                } else {
                    ExitReason::StartFailed { message }
                }
            })
        }
        Ok((Command::Kill, _)) | Err(ControlError::Closed) => Err(ExitReason::Killed),
        Ok((command, _)) => Err(ExitReason::StartFailed {
            message: format!("The first command was not Start: {command:?}"),
        }),
        Err(error) => Err(start_failed(&error)),
    }
}

/// The last snapshot, while its files are written and until the owner has asked how that ended.
#[derive(Default)]
struct Saving {
    copy: Option<fork::Copy>,
    ended: Option<Result<(), String>>,
    /// The request of an owner that waits.
    asker: Option<u64>,
}

impl Saving {
    fn begin(&mut self, id: u64, machine: &Machine, fds: Vec<OwnedFd>) -> Event {
        let Ok([state, memory]) = <[OwnedFd; 2]>::try_from(fds) else {
            let why = "Snapshot needs two descriptors: files for the state and for the memory";
            return failed(id, why);
        };
        if !machine.vm.is_paused() {
            return failed(id, "A snapshot is taken of a paused VM: send Pause first");
        }
        if self.copy.is_some() {
            return failed(id, "A snapshot is still being written: send FinishSnapshot first");
        }
        match builder::begin_save(machine, &state.into(), &memory.into()) {
            Ok(copy) => {
                *self = Self {
                    copy: Some(copy),
                    ..Self::default()
                };
                Event::Done { id }
            }
            Err(error) => failed(id, chain(&error)),
        }
    }

    fn finish(&mut self, id: u64) -> Option<Event> {
        if self.copy.is_none() && self.ended.is_none() {
            return Some(failed(id, "No snapshot was taken: send Snapshot first"));
        }
        if self.asker.replace(id).is_some() {
            return Some(failed(id, "FinishSnapshot was sent twice"));
        }
        self.answer()
    }

    /// The copy's end, if it has come, and the answer to an owner that waits for it.
    fn take_in(&mut self) -> Option<Event> {
        let copy = self.copy.take_if(|copy| {
            let mut fds = [PollFd::new(&*copy, PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
        })?;
        self.ended = Some(copy.finish());
        self.answer()
    }

    fn answer(&mut self) -> Option<Event> {
        let ended = self.ended.take_if(|_| self.asker.is_some())?;
        let id = self.asker.take()?;
        Some(match ended {
            Ok(()) => Event::Done { id },
            Err(message) => failed(id, format!("Failed to write the snapshot: {message}")),
        })
    }
}

/// Waits for something to do, or for the end.
fn wait(reporter: &Reporter, end: &EndSignal, saving: &Saving) -> Option<ExitReason> {
    let mut fds = vec![
        PollFd::new(reporter.owner(), PollFlags::IN),
        PollFd::new(reporter, PollFlags::IN),
        PollFd::new(end, PollFlags::IN),
    ];
    fds.extend(saving.copy.as_ref().map(|copy| PollFd::new(copy, PollFlags::IN)));
    // Interrupted or failed: looked at again all the same.
    let _ = rustix::event::poll(&mut fds, None);
    end.reason()
}

/// Carries out one command; `false` ends the VM.
fn carry_out(
    command: Command,
    fds: Vec<OwnedFd>,
    machine: &mut Machine,
    reporter: &Arc<Reporter>,
    saving: &mut Saving,
) -> bool {
    let answer = match command {
        // After a second Start the owner is confused; it wanted an end of this VM at least.
        Command::Kill | Command::Start(_) => return false,
        Command::Pause { id } if machine.pause() => Event::Done { id },
        Command::Pause { id } => failed(id, "A vCPU did not leave the guest in time"),
        Command::Resume { id } => {
            machine.resume();
            Event::Done { id }
        }
        Command::Snapshot { id } => saving.begin(id, machine, fds),
        Command::FinishSnapshot { id } => match saving.finish(id) {
            Some(answer) => answer,
            None => return true,
        },
        Command::Stats { id } => {
            let counters = machine.vm.stats();
            machine.wake(VIRTIO_ID_BALLOON);
            Event::Stats { id, counters }
        }
        Command::SetBalloon { id, target_mib } => {
            let result = machine.balloon.set_target(target_mib);
            machine.wake(VIRTIO_ID_BALLOON);
            answer(id, result)
        }
        Command::ResizeMemory { id, plugged_mib } => answer(id, machine.resize_memory(plugged_mib)),
        Command::AddVcpus { id, n_vcpus } => answer(id, machine.add_vcpus(n_vcpus)),
        Command::AddExtents { id, disk, extents } if extents.len() == fds.len() => answer(
            id,
            map_of(machine, disk).add_extents(extents.into_iter().zip(fds).collect()),
        ),
        Command::AddExtents { id, extents, .. } => failed(
            id,
            format!(
                "{} extents came with {} descriptors: pass one each",
                extents.len(),
                fds.len()
            ),
        ),
        Command::RemoveExtents {
            id,
            disk,
            disk_offset_bytes,
            length_bytes,
        } => {
            let end = disk_offset_bytes.saturating_add(length_bytes);
            answer(id, map_of(machine, disk).remove(disk_offset_bytes..end))
        }
        Command::Connect { id, port } => {
            let Ok([stream]) = <[OwnedFd; 1]>::try_from(fds) else {
                return reporter
                    .send(&failed(id, "Connect needs one descriptor, a unix stream socket"))
                    .is_ok();
            };
            let reporter = Arc::clone(reporter);
            let reply = move |result| reporter.report(answer(id, result), None);
            machine.vsock.connect(port, stream.into(), Box::new(reply));
            return true;
        }
    };
    reporter.send(&answer).is_ok()
}

fn map_of(machine: &Machine, disk: SliceDisk) -> &SliceMap {
    match disk {
        SliceDisk::ReadOnly => &machine.read_only,
        SliceDisk::ReadWrite => &machine.read_write,
    }
}

fn answer<T>(id: u64, result: Result<T, impl Error>) -> Event {
    match result {
        Ok(_) => Event::Done { id },
        Err(error) => failed(id, chain(&error)),
    }
}

fn failed(id: u64, message: impl Into<String>) -> Event {
    Event::Failed {
        id,
        message: message.into(),
    }
}

fn start_failed(error: &dyn Error) -> ExitReason {
    ExitReason::StartFailed {
        message: chain(error),
    }
}
