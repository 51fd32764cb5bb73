//! What to do next for a group: `plan(seen) -> actions`. Pure: no I/O, no clock.
//!
//! Doing an action moves its object to a state in which the plan does not ask for it again; its outcome moves it on:
//!
//! ```text
//! container  Idle --Pull--> Pulling --> Pulled --Start--> Starting --> Running --> Idle (restart) | Done
//!             ^----back-off----'                              '---failed--^ Running --Kill--> Killing --> Done
//! sandbox    Absent --StartSandbox--> Starting --> Running --StopSandbox--> Stopping --> Absent
//!             ^                          '--failed--> Dead --StopSandbox--^ (also when it dies)
//! files      Stale --Refresh--> being put --failed--> Stale (later)
//! group      --Expire--> it fails; --Reset--> it begins anew; --Apply--> it is updated; --Resize--> it is being resized;
//!            --Release--> Releasing: the last action there is
//! ```
//!
//! Images are pulled at once, containers start in the order of [`Role`]: one init container or sidecar after the other, then
//! all others. At the end of the group the sidecars go last, in reverse order.

use std::collections::BTreeSet;

use super::lifecycle::Role;

/// A container as the plan sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerSeen {
    /// Nothing is being done; may be begun from this time on.
    Idle {
        /// Unix milliseconds.
        not_before_ms: u64,
    },
    /// Its image is being pulled.
    Pulling,
    /// Its image is here.
    Pulled,
    /// Being created and started.
    Starting,
    /// Runs.
    Running {
        /// It has done what comes before others may rely on it: its hook, its startup probe.
        has_started: bool,
    },
    /// Runs and was told to end.
    Killing,
    /// Ended for good.
    Done {
        /// With exit code 0.
        well: bool,
    },
}

impl ContainerSeen {
    /// Something of it may be in the sandbox.
    pub fn is_alive(self) -> bool {
        matches!(self, Self::Starting | Self::Running { .. } | Self::Killing)
    }

    /// It ended for good.
    pub fn is_done(self) -> bool {
        matches!(self, Self::Done { .. })
    }
}

/// The sandbox as the plan sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxSeen {
    /// None; may be started from this time on.
    Absent {
        /// Unix milliseconds.
        not_before_ms: u64,
    },
    /// Being started.
    Starting,
    /// Runs.
    Running,
    /// Ended, or did not start, or was not cleared away: may be cleared away from this time on.
    Dead {
        /// Unix milliseconds.
        not_before_ms: u64,
    },
    /// Being stopped and cleared away.
    Stopping,
}

/// A resize as the plan sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResizeSeen {
    /// It is to begin.
    Wanted,
    /// It is under way.
    UnderWay,
}

/// A group as the plan sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Now, Unix milliseconds.
    pub now_ms: u64,
    /// Its end is wanted.
    pub deleting: bool,
    /// Its last leftovers are being removed.
    pub releasing: bool,
    /// All its containers are to begin anew.
    pub restarting: bool,
    /// They are to do so in a new sandbox.
    pub renewing: bool,
    /// The group is to be updated, once these containers have ended.
    pub leaving: Option<BTreeSet<usize>>,
    /// The files of running containers are not yet what the group says; they may be put from this time on, Unix milliseconds.
    pub stale_files_ms: Option<u64>,
    /// The group is to be resized while its containers run.
    pub resizing: Option<ResizeSeen>,
    /// It has failed as a whole: what still runs is to end.
    pub failed: bool,
    /// It fails at this time, Unix milliseconds.
    pub deadline_ms: Option<u64>,
    /// All init containers and sidecars had their turn, in this sandbox.
    pub initialized: bool,
    /// The sandbox.
    pub sandbox: SandboxSeen,
    /// The containers; those that take turns are in the order of their turns.
    pub containers: Vec<(Role, ContainerSeen)>,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Make and start the sandbox with all it needs.
    StartSandbox,
    /// Stop the sandbox and remove all it needed.
    StopSandbox,
    /// Pull the image of this container.
    Pull(usize),
    /// Create and start this container.
    Start(usize),
    /// Tell this container to end.
    Kill(usize),
    /// Let the group fail: its time is over.
    Expire,
    /// Let all containers begin anew: none runs any more.
    Reset,
    /// Take on the update of the group: what it ends has ended, or there is no sandbox that would have to be resized.
    Apply,
    /// Put the files of all volumes of files into the sandbox.
    Refresh,
    /// Resize the running sandbox and its containers.
    Resize,
    /// Remove what is left of the group: logs, address, record.
    Release,
    /// Plan again at this time, Unix milliseconds.
    WakeAt(u64),
}

/// Why nothing new begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is wanted.
    Deleted,
    /// All begin anew afterwards.
    Restarted,
    /// The group has failed, or an init container has for good.
    Failed,
    /// All containers but sidecars ended for good.
    Complete,
}

/// Whether the group is to end, and why.
pub fn end(seen: &Seen) -> Option<End> {
    // What ends for an update is not what the group's work comes to.
    let is_leaving = |index: &usize| {
        seen.leaving
            .as_ref()
            .is_some_and(|leaving| leaving.contains(index))
    };
    let mut apps = seen
        .containers
        .iter()
        .enumerate()
        .filter(|(_, (role, _))| *role == Role::App);
    let init_failed = seen
        .containers
        .iter()
        .any(|(role, seen)| *role == Role::Init && *seen == ContainerSeen::Done { well: false });
    if seen.deleting {
        Some(End::Deleted)
    } else if seen.restarting {
        Some(End::Restarted)
    } else if seen.failed || init_failed {
        Some(End::Failed)
    } else if apps.all(|(index, (_, seen))| seen.is_done() && !is_leaving(&index)) {
        Some(End::Complete)
    } else {
        None
    }
}

/// Whether all init containers have ended well and all sidecars have started.
pub fn has_initialized(containers: &[(Role, ContainerSeen)]) -> bool {
    next_turn(containers).is_none()
}

/// The init container or sidecar whose turn it is.
fn next_turn(containers: &[(Role, ContainerSeen)]) -> Option<usize> {
    containers.iter().position(|(role, seen)| match role {
        Role::App => false,
        Role::Init => *seen != ContainerSeen::Done { well: true },
        Role::Sidecar => *seen != ContainerSeen::Running { has_started: true },
    })
}

/// The next steps, all of which may be begun at once.
pub fn plan(seen: &Seen) -> Vec<Action> {
    if seen.releasing {
        return Vec::new();
    }
    match end(seen) {
        Some(end) => plan_end(seen, end),
        None => plan_run(seen),
    }
}

fn plan_end(seen: &Seen, end: End) -> Vec<Action> {
    let mut actions = Vec::new();
    let mut busy = false;
    let mut kill = |index: usize, container: ContainerSeen| {
        if matches!(container, ContainerSeen::Running { .. }) {
            actions.push(Action::Kill(index));
        }
    };
    for (index, (role, container)) in seen.containers.iter().enumerate() {
        if *role != Role::Sidecar && container.is_alive() {
            busy = true;
            kill(index, *container);
        }
    }
    if !busy {
        // The last sidecar that lives; those before it are still served.
        let last = seen
            .containers
            .iter()
            .rposition(|(role, container)| *role == Role::Sidecar && container.is_alive());
        if let Some(index) = last {
            busy = true;
            kill(index, seen.containers[index].1);
        }
    }
    match seen.sandbox {
        SandboxSeen::Dead { not_before_ms } => at(seen, not_before_ms, Action::StopSandbox, &mut actions),
        _ if busy => {}
        SandboxSeen::Running if end == End::Restarted && seen.renewing => actions.push(Action::StopSandbox),
        SandboxSeen::Starting | SandboxSeen::Stopping if end == End::Restarted && seen.renewing => {}
        _ if end == End::Restarted => actions.push(Action::Reset),
        SandboxSeen::Running => actions.push(Action::StopSandbox),
        SandboxSeen::Absent { .. } if end == End::Deleted => actions.push(Action::Release),
        _ => {}
    }
    actions
}

fn plan_run(seen: &Seen) -> Vec<Action> {
    let mut actions = Vec::new();
    match seen.deadline_ms {
        Some(deadline_ms) if seen.now_ms >= deadline_ms => return vec![Action::Expire],
        Some(deadline_ms) => actions.push(Action::WakeAt(deadline_ms)),
        None => {}
    }
    let none = BTreeSet::new();
    let leaving = seen.leaving.as_ref().unwrap_or(&none);
    if seen.leaving.is_some() {
        // Containers are counted anew then: nothing that names one may be begun beside it.
        if !leaving.iter().any(|index| seen.containers[*index].1.is_alive()) {
            return vec![Action::Apply];
        }
    }
    if seen.resizing.is_some() {
        // One that begins now would have the limits of before.
        let settles = |seen: ContainerSeen| matches!(seen, ContainerSeen::Starting | ContainerSeen::Killing);
        match seen.sandbox {
            SandboxSeen::Absent { .. } | SandboxSeen::Dead { .. } => return vec![Action::Apply],
            SandboxSeen::Running
                if seen.resizing == Some(ResizeSeen::Wanted)
                    && !seen.containers.iter().any(|(_, container)| settles(*container)) =>
            {
                actions.push(Action::Resize);
            }
            _ => {}
        }
    }
    match seen.sandbox {
        SandboxSeen::Absent { not_before_ms } => at(seen, not_before_ms, Action::StartSandbox, &mut actions),
        SandboxSeen::Dead { not_before_ms } => at(seen, not_before_ms, Action::StopSandbox, &mut actions),
        _ => {}
    }
    // What was being started when the files changed puts the old ones: it is waited for.
    let is_starting = |(_, container): &(Role, ContainerSeen)| *container == ContainerSeen::Starting;
    if let Some(not_before_ms) = seen.stale_files_ms
        && seen.sandbox == SandboxSeen::Running
        && !seen.containers.iter().any(is_starting)
    {
        at(seen, not_before_ms, Action::Refresh, &mut actions);
    }
    let turn = if seen.initialized {
        None
    } else {
        next_turn(&seen.containers)
    };
    for (index, (_, container)) in seen.containers.iter().enumerate() {
        match *container {
            ContainerSeen::Running { .. } if leaving.contains(&index) => actions.push(Action::Kill(index)),
            _ if leaving.contains(&index) => {}
            ContainerSeen::Idle { not_before_ms } => {
                at(seen, not_before_ms, Action::Pull(index), &mut actions);
            }
            ContainerSeen::Pulled
                if seen.sandbox == SandboxSeen::Running
                    && seen.resizing.is_none()
                    && turn.is_none_or(|turn| turn == index) =>
            {
                actions.push(Action::Start(index));
            }
            _ => {}
        }
    }
    actions
}

fn at(seen: &Seen, not_before_ms: u64, action: Action, actions: &mut Vec<Action>) {
    actions.push(if seen.now_ms >= not_before_ms {
        action
    } else {
        Action::WakeAt(not_before_ms)
    });
}

#[cfg(test)]
mod tests;
