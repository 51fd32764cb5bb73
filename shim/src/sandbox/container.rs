//! A container and its processes, as the driver keeps them.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
};

use tokio::sync::watch;

use super::state::{BadTransition, ProcessEvent, ProcessState};
use crate::{
    guest::{ProcessEnd, ProcessKey},
    resource::rootfs::ImageSlice,
    stdio::{
        StdioSpec,
        copy::{Outputs, Streams},
    },
};

/// A process the guest has prepared.
#[derive(Debug)]
pub struct Process {
    /// Its names.
    pub key: ProcessKey,
    /// Where its streams lead.
    pub stdio: StdioSpec,
    /// Their copies.
    pub streams: Streams,
    /// Copies that a stalled reader keeps from ending; they go on until the process is deleted.
    pub stalled: Option<Outputs>,
    /// It runs in the guest from the begin; starting it is to let it go on.
    pub is_captured: bool,
    state: ProcessState,
    ended: watch::Sender<Option<ProcessEnd>>,
}

impl Process {
    /// A prepared process.
    pub fn new(key: ProcessKey, stdio: StdioSpec, streams: Streams) -> Self {
        let ended = watch::Sender::new(None);
        Self {
            key,
            stdio,
            streams,
            stalled: None,
            is_captured: false,
            state: ProcessState::Created,
            ended,
        }
    }

    /// Its state.
    pub fn state(&self) -> ProcessState {
        self.state
    }

    /// Makes a transition; wakes waiters at its end.
    ///
    /// # Errors
    /// [`BadTransition`].
    pub fn apply(&mut self, event: ProcessEvent) -> Result<(), BadTransition> {
        self.state = self.state.after(event)?;
        if let Some(end) = self.state.end() {
            self.ended.send_if_modified(|seen| seen.replace(end).is_none());
        }
        Ok(())
    }

    /// For waiting.
    pub fn subscribe(&self) -> watch::Receiver<Option<ProcessEnd>> {
        self.ended.subscribe()
    }
}

/// A container the guest has prepared.
#[derive(Debug)]
pub struct Container {
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its init process.
    pub init: Process,
    /// Other processes, by exec id.
    pub execs: HashMap<String, Process>,
    /// Exec ids in use by execs that are being created.
    pub creating: HashSet<String>,
    /// Its image stays mapped while this lives.
    pub image: ImageSlice,
}

impl Container {
    /// Every process.
    pub fn processes_mut(&mut self) -> impl Iterator<Item = &mut Process> {
        std::iter::once(&mut self.init).chain(self.execs.values_mut())
    }

    /// The named process.
    pub fn process_mut(&mut self, exec_id: &str) -> Option<&mut Process> {
        if exec_id.is_empty() {
            Some(&mut self.init)
        } else {
            self.execs.get_mut(exec_id)
        }
    }
}
