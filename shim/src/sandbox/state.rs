//! States and their transitions. Pure.

use crate::guest::ProcessEnd;

/// A transition that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is {state}, so it cannot {event}")]
pub struct BadTransition {
    /// The state it is in.
    pub state: &'static str,
    /// What was wanted.
    pub event: &'static str,
}

/// A sandbox.
///
/// ```text
///  Created --start--> Starting --started--> Ready --stop--> Stopping --ended--> Stopped
///     |                  |                    |                                   ^
///     +------ended-------+-------ended--------+-----------------------------------+
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxState {
    /// Its options are known, or not even those; no VM.
    Created,
    /// The VM boots.
    Starting,
    /// Containers can be created.
    Ready,
    /// Its end was asked for.
    Stopping,
    /// No VM any more.
    Stopped,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxEvent {
    /// A caller wants it started.
    Start,
    /// The guest is ready.
    Started,
    /// A caller wants it stopped.
    Stop,
    /// The VM is gone, or never came.
    Ended,
}

impl SandboxState {
    /// Lower case name, as in SandboxStatus.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }

    /// The state after `event`.
    ///
    /// # Errors
    /// [`BadTransition`].
    pub fn after(self, event: SandboxEvent) -> Result<Self, BadTransition> {
        use SandboxEvent as E;
        match (self, event) {
            (Self::Created, E::Start) => Ok(Self::Starting),
            (Self::Starting, E::Started) => Ok(Self::Ready),
            (Self::Ready, E::Stop) => Ok(Self::Stopping),
            (Self::Created | Self::Starting | Self::Ready | Self::Stopping, E::Ended) => Ok(Self::Stopped),
            (state, event) => {
                let event = match event {
                    E::Start => "be started",
                    E::Started => "become ready",
                    E::Stop => "be stopped",
                    E::Ended => "end",
                };
                Err(BadTransition {
                    state: state.name(),
                    event,
                })
            }
        }
    }
}

/// A process, from when the guest has prepared it.
///
/// ```text
///  Created --start--> Starting --started--> Running --ended--> Ended --delete--> Deleting
///     |  \               |                                       ^  ^               |
///     |   \              +----------------ended------------------+  +-delete failed-+
///     |    +------------------------------ended------------------+
///     +--delete--> Deleting (as ended with 137)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// Prepared.
    Created,
    /// The guest executes it.
    Starting,
    /// It runs.
    Running,
    /// It has ended, its output written.
    Ended(ProcessEnd),
    /// The guest removes it.
    Deleting(ProcessEnd),
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessEvent {
    /// A caller wants it started.
    Start,
    /// It runs.
    Started,
    /// It has ended, could not be started, or died with the VM.
    Ended(ProcessEnd),
    /// A caller wants it removed; the end it had if it never ran.
    Delete(ProcessEnd),
    /// The guest could not remove it.
    DeleteFailed,
}

impl ProcessState {
    /// Name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Ended(_) => "ended",
            Self::Deleting(_) => "being deleted",
        }
    }

    /// How it ended, if it has.
    pub fn end(self) -> Option<ProcessEnd> {
        match self {
            Self::Ended(end) | Self::Deleting(end) => Some(end),
            _ => None,
        }
    }

    /// The state after `event`.
    ///
    /// # Errors
    /// [`BadTransition`].
    pub fn after(self, event: ProcessEvent) -> Result<Self, BadTransition> {
        use ProcessEvent as E;
        match (self, event) {
            (Self::Created, E::Start) => Ok(Self::Starting),
            (Self::Starting, E::Started) => Ok(Self::Running),
            (Self::Created | Self::Starting | Self::Running, E::Ended(end)) => Ok(Self::Ended(end)),
            (Self::Created, E::Delete(end)) | (Self::Ended(end), E::Delete(_)) => Ok(Self::Deleting(end)),
            (Self::Deleting(end), E::DeleteFailed) => Ok(Self::Ended(end)),
            (state, event) => {
                let event = match event {
                    E::Start => "be started",
                    E::Started => "run",
                    E::Ended(_) => "end",
                    E::Delete(_) => "be deleted",
                    E::DeleteFailed => "stay",
                };
                Err(BadTransition {
                    state: state.name(),
                    event,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::*;

    fn end(exit_status: u32) -> ProcessEnd {
        ProcessEnd {
            exit_status,
            exited_at: UNIX_EPOCH + Duration::from_secs(u64::from(exit_status)),
        }
    }

    fn process_event() -> impl Strategy<Value = ProcessEvent> {
        prop_oneof![
            Just(ProcessEvent::Start),
            Just(ProcessEvent::Started),
            (0_u32..256).prop_map(|status| ProcessEvent::Ended(end(status))),
            (0_u32..256).prop_map(|status| ProcessEvent::Delete(end(status))),
            Just(ProcessEvent::DeleteFailed),
        ]
    }

    fn sandbox_event() -> impl Strategy<Value = SandboxEvent> {
        prop_oneof![
            Just(SandboxEvent::Start),
            Just(SandboxEvent::Started),
            Just(SandboxEvent::Stop),
            Just(SandboxEvent::Ended)
        ]
    }

    #[test]
    fn happy_paths() {
        let mut state = SandboxState::Created;
        for event in [
            SandboxEvent::Start,
            SandboxEvent::Started,
            SandboxEvent::Stop,
            SandboxEvent::Ended,
        ] {
            state = state.after(event).unwrap();
        }
        assert_eq!(state, SandboxState::Stopped);
        let mut state = ProcessState::Created;
        for event in [
            ProcessEvent::Start,
            ProcessEvent::Started,
            ProcessEvent::Ended(end(3)),
            ProcessEvent::Delete(end(137)),
        ] {
            state = state.after(event).unwrap();
        }
        assert_eq!(state, ProcessState::Deleting(end(3)));
    }

    #[test]
    fn a_message_names_both() {
        let error = ProcessState::Running
            .after(ProcessEvent::Delete(end(0)))
            .unwrap_err();
        assert_eq!(error.to_string(), "it is running, so it cannot be deleted");
    }

    proptest! {
        #[test]
        fn the_first_end_of_a_process_stays(events in prop::collection::vec(process_event(), 0..30)) {
            let (mut state, mut ended, mut started) = (ProcessState::Created, None, 0);
            for event in events {
                if let Ok(next) = state.after(event) {
                    state = next;
                    started += u32::from(event == ProcessEvent::Start);
                }
                if ended.is_none() { ended = state.end(); }
                prop_assert_eq!(state.end(), ended);
                prop_assert!(started <= 1);
            }
        }

        #[test]
        fn a_stopped_sandbox_stays_stopped(events in prop::collection::vec(sandbox_event(), 0..30)) {
            let (mut state, mut stopped, mut starts) = (SandboxState::Created, false, 0);
            for event in events {
                if let Ok(next) = state.after(event) {
                    state = next;
                    starts += u32::from(event == SandboxEvent::Start);
                }
                stopped |= state == SandboxState::Stopped;
                prop_assert_eq!(stopped, state == SandboxState::Stopped);
                prop_assert!(starts <= 1);
            }
        }
    }
}
