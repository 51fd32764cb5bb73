//! What to do next for a group: `plan(seen) -> actions`. Pure: no I/O, no clock.
//!
//! Doing an action moves its object to a state in which the plan does not ask for it again; its outcome moves it on:
//!
//! ```text
//! container  Idle --Pull--> Pulling --> Pulled --Start--> Starting --> Running --> Idle (restart) | Done
//!             ^----back-off----'                              '---failed--^ Running --Kill--> Killing --> Done
//! sandbox    Absent --StartSandbox--> Starting --> Running --StopSandbox--> Stopping --> Absent
//!             ^                          '--failed--> Dead --StopSandbox--^ (also when it dies)
//! group      --Release--> Releasing: the last action there is
//! ```

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
    Running,
    /// Runs and was told to end.
    Killing,
    /// Ended for good.
    Done,
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

/// A group as the plan sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Now, Unix milliseconds.
    pub now_ms: u64,
    /// Its end is wanted.
    pub deleting: bool,
    /// Its last leftovers are being removed.
    pub releasing: bool,
    /// The sandbox.
    pub sandbox: SandboxSeen,
    /// The containers, in order.
    pub containers: Vec<ContainerSeen>,
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
    /// Remove what is left of the group: logs, address, record.
    Release,
    /// Plan again at this time, Unix milliseconds.
    WakeAt(u64),
}

/// The next steps, all of which may be begun at once.
pub fn plan(seen: &Seen) -> Vec<Action> {
    if seen.releasing {
        return Vec::new();
    }
    let all_done = seen
        .containers
        .iter()
        .all(|container| *container == ContainerSeen::Done);
    if seen.deleting || all_done {
        plan_end(seen)
    } else {
        plan_run(seen)
    }
}

fn plan_end(seen: &Seen) -> Vec<Action> {
    let mut actions = Vec::new();
    let mut busy = false;
    for (index, container) in seen.containers.iter().enumerate() {
        match container {
            ContainerSeen::Running => {
                actions.push(Action::Kill(index));
                busy = true;
            }
            ContainerSeen::Starting | ContainerSeen::Killing => busy = true,
            _ => {}
        }
    }
    match seen.sandbox {
        SandboxSeen::Running if !busy => actions.push(Action::StopSandbox),
        SandboxSeen::Dead { not_before_ms } => at(seen, not_before_ms, Action::StopSandbox, &mut actions),
        SandboxSeen::Absent { .. } if !busy && seen.deleting => actions.push(Action::Release),
        _ => {}
    }
    actions
}

fn plan_run(seen: &Seen) -> Vec<Action> {
    let mut actions = Vec::new();
    match seen.sandbox {
        SandboxSeen::Absent { not_before_ms } => at(seen, not_before_ms, Action::StartSandbox, &mut actions),
        SandboxSeen::Dead { not_before_ms } => at(seen, not_before_ms, Action::StopSandbox, &mut actions),
        _ => {}
    }
    for (index, container) in seen.containers.iter().enumerate() {
        match *container {
            ContainerSeen::Idle { not_before_ms } => {
                at(seen, not_before_ms, Action::Pull(index), &mut actions);
            }
            ContainerSeen::Pulled if seen.sandbox == SandboxSeen::Running => {
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
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn group(n: usize) -> Seen {
        Seen {
            now_ms: 0,
            deleting: false,
            releasing: false,
            sandbox: SandboxSeen::Absent { not_before_ms: 0 },
            containers: vec![ContainerSeen::Idle { not_before_ms: 0 }; n],
        }
    }

    #[test]
    fn a_new_group_starts_its_sandbox_and_pulls_at_once() {
        assert_eq!(
            plan(&group(2)),
            [Action::StartSandbox, Action::Pull(0), Action::Pull(1)]
        );
    }

    #[test]
    fn containers_wait_for_the_sandbox() {
        let mut seen = group(1);
        seen.containers[0] = ContainerSeen::Pulled;
        seen.sandbox = SandboxSeen::Starting;
        assert_eq!(plan(&seen), []);
        seen.sandbox = SandboxSeen::Running;
        assert_eq!(plan(&seen), [Action::Start(0)]);
    }

    #[test]
    fn back_off_wakes_and_does_not_act() {
        let mut seen = group(1);
        seen.sandbox = SandboxSeen::Running;
        seen.containers[0] = ContainerSeen::Idle { not_before_ms: 10 };
        assert_eq!(plan(&seen), [Action::WakeAt(10)]);
        seen.now_ms = 10;
        assert_eq!(plan(&seen), [Action::Pull(0)]);
    }

    #[test]
    fn the_end_is_kill_then_stop_then_release() {
        let mut seen = group(2);
        seen.deleting = true;
        seen.sandbox = SandboxSeen::Running;
        seen.containers = vec![ContainerSeen::Running, ContainerSeen::Done];
        assert_eq!(plan(&seen), [Action::Kill(0)]);
        seen.containers[0] = ContainerSeen::Killing;
        assert_eq!(plan(&seen), []);
        seen.containers[0] = ContainerSeen::Done;
        assert_eq!(plan(&seen), [Action::StopSandbox]);
        seen.sandbox = SandboxSeen::Absent { not_before_ms: 99 };
        assert_eq!(plan(&seen), [Action::Release]);
        seen.releasing = true;
        assert_eq!(plan(&seen), []);
    }

    #[test]
    fn an_ended_group_gives_its_sandbox_back_and_stays() {
        let mut seen = group(1);
        seen.sandbox = SandboxSeen::Running;
        seen.containers[0] = ContainerSeen::Done;
        assert_eq!(plan(&seen), [Action::StopSandbox]);
        seen.sandbox = SandboxSeen::Absent { not_before_ms: 0 };
        assert_eq!(plan(&seen), []);
    }

    /// A world that carries actions out, with failures as the numbers say.
    struct World {
        seen: Seen,
        busy: HashSet<Action>,
        released: bool,
    }

    impl World {
        fn begin(&mut self) {
            for action in plan(&self.seen) {
                if let Action::WakeAt(at) = action {
                    assert!(at > self.seen.now_ms);
                    continue;
                }
                assert!(self.busy.insert(action), "{action:?} begun twice");
                match action {
                    Action::StartSandbox => self.seen.sandbox = SandboxSeen::Starting,
                    Action::StopSandbox => {
                        let alive =
                            |c: &ContainerSeen| matches!(c, ContainerSeen::Running | ContainerSeen::Killing);
                        assert!(
                            !self.seen.containers.iter().any(alive),
                            "stopped under a container"
                        );
                        self.seen.sandbox = SandboxSeen::Stopping;
                    }
                    Action::Pull(index) => self.seen.containers[index] = ContainerSeen::Pulling,
                    Action::Start(index) => {
                        assert_eq!(self.seen.sandbox, SandboxSeen::Running);
                        self.seen.containers[index] = ContainerSeen::Starting;
                    }
                    Action::Kill(index) => self.seen.containers[index] = ContainerSeen::Killing,
                    Action::Release => {
                        assert!(
                            self.seen.deleting && matches!(self.seen.sandbox, SandboxSeen::Absent { .. })
                        );
                        self.seen.releasing = true;
                        self.released = true;
                    }
                    Action::WakeAt(_) => {}
                }
            }
        }

        fn finish_one(&mut self, pick: usize, fails: bool) {
            let mut busy: Vec<Action> = self.busy.iter().copied().collect();
            busy.sort_by_key(|action| format!("{action:?}"));
            let retry = self.seen.now_ms + 10;
            if busy.is_empty() {
                self.seen.now_ms += 10;
                return;
            }
            let action = busy[pick % busy.len()];
            self.busy.remove(&action);
            match action {
                Action::StartSandbox if fails => self.seen.sandbox = SandboxSeen::Dead { not_before_ms: 0 },
                Action::StartSandbox => self.seen.sandbox = SandboxSeen::Running,
                Action::StopSandbox if fails => {
                    self.seen.sandbox = SandboxSeen::Dead { not_before_ms: retry }
                }
                Action::StopSandbox => self.seen.sandbox = SandboxSeen::Absent { not_before_ms: retry },
                Action::Pull(i) if fails => {
                    self.seen.containers[i] = ContainerSeen::Idle { not_before_ms: retry }
                }
                Action::Pull(i) => self.seen.containers[i] = ContainerSeen::Pulled,
                Action::Start(i) if fails => {
                    self.seen.containers[i] = ContainerSeen::Idle { not_before_ms: retry };
                }
                Action::Start(i) => self.seen.containers[i] = ContainerSeen::Running,
                Action::Kill(i) => self.seen.containers[i] = ContainerSeen::Done,
                Action::Release | Action::WakeAt(_) => {}
            }
        }
    }

    proptest! {
        #[test]
        fn converges_and_does_nothing_twice(
            n in 1usize..5,
            steps in proptest::collection::vec((any::<usize>(), any::<bool>(), any::<bool>()), 0..60),
        ) {
            let mut world = World { seen: group(n), busy: HashSet::new(), released: false };
            for (pick, fails, dies) in steps {
                world.begin();
                if dies && world.seen.sandbox == SandboxSeen::Running && pick % 7 == 0 {
                    // A dead sandbox takes its containers along, started ones and ones being started.
                    world.seen.sandbox = SandboxSeen::Dead { not_before_ms: 0 };
                    for container in &mut world.seen.containers {
                        if matches!(container, ContainerSeen::Running | ContainerSeen::Starting) {
                            *container = ContainerSeen::Idle { not_before_ms: 0 };
                        }
                    }
                    world.busy.retain(|action| !matches!(action, Action::Start(_)));
                }
                world.finish_one(pick, fails);
            }
            // Without further failures everything runs.
            for step in 0..200 { world.begin(); world.finish_one(step, false); }
            prop_assert_eq!(world.seen.sandbox, SandboxSeen::Running);
            prop_assert!(world.seen.containers.iter().all(|c| *c == ContainerSeen::Running));
            // And ends when it shall.
            world.seen.deleting = true;
            for step in 0..200 { world.begin(); world.finish_one(step, false); }
            prop_assert!(world.released);
        }
    }
}
