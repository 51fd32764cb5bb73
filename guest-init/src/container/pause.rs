//! The first process of the process namespace that containers share, when they do: it does nothing but keep the namespace,
//! and be the parent of those whose parents have ended, which it leaves no zombies of (Kubernetes, `build/pause`).
//!
//! It is a copy of the guest init that runs no program: with a root that is empty, a user of its own, no capabilities, and
//! closed to all who may not trace every process of the group anyway.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use rustix::process::{Gid, Uid};
use tokio::sync::Mutex;

use super::{
    capabilities,
    plan::c_path,
    process,
    program::{Program, Step},
    spec,
};
use crate::{
    error::{Context, Result},
    reaper::Reaper,
    sys,
};

/// User and group of the process: no container's.
const NOBODY: u32 = 65535;

/// The process, made when it is first needed.
#[derive(Debug, Default)]
pub struct Pause(Mutex<Option<Arc<OwnedFd>>>);

impl Pause {
    /// The running process, with whose namespace `setns(2)` is called. `directory` is where its root is put meanwhile.
    /// Must not be cancelled.
    ///
    /// # Errors
    /// When it cannot be made.
    pub async fn process(&self, reaper: &Reaper, directory: &Path) -> Result<Arc<OwnedFd>> {
        let mut process = self.0.lock().await;
        if let Some(running) = &*process
            && sys::signal::send(running.as_fd(), 0).is_ok()
        {
            return Ok(Arc::clone(running));
        }
        let (program, report, child) = {
            let program = program(directory)?;
            let (ours, theirs) = process::report_channel()?;
            let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWNS;
            let child = sys::clone::spawn(namespaces, None, || program.run(theirs.as_fd()))
                .context(|| "make the process of the shared process namespace")?;
            (program, ours, child)
        };
        // Reaped and forgotten, should it ever end.
        drop(reaper.watch(child.pid));
        process::follow_command(program, report).await?;
        let running = Arc::new(child.pidfd);
        *process = Some(Arc::clone(&running));
        Ok(running)
    }
}

fn program(directory: &Path) -> Result<Program> {
    let none = capabilities::parse(&spec::Capabilities::default())?;
    Ok(Program {
        steps: vec![
            Step::NewSession,
            Step::PrivateMounts,
            Step::EmptyRoot {
                at: c_path(directory)?,
            },
            Step::EnterRoot,
            Step::BoundingSet { keep: none.bounding },
            Step::SetUser {
                uid: Uid::from_raw(NOBODY),
                gid: Gid::from_raw(NOBODY),
                groups: Vec::new(),
            },
            Step::SetCapabilities { capabilities: none },
            Step::NoNewPrivileges,
            Step::Pause,
        ],
    })
}
