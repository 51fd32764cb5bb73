use std::collections::{BTreeSet, HashSet};

use proptest::prelude::*;

use super::*;

const RUNS: ContainerSeen = ContainerSeen::Running { has_started: true };
const WELL: ContainerSeen = ContainerSeen::Done { well: true };

fn of_roles(roles: &[Role]) -> Seen {
    let idle = ContainerSeen::Idle { not_before_ms: 0 };
    Seen {
        now_ms: 0,
        deleting: false,
        releasing: false,
        restarting: false,
        renewing: false,
        leaving: None,
        stale_files_ms: None,
        resizing: None,
        failed: false,
        deadline_ms: None,
        initialized: false,
        sandbox: SandboxSeen::Absent { not_before_ms: 0 },
        containers: roles.iter().map(|role| (*role, idle)).collect(),
    }
}

fn group(n: usize) -> Seen {
    of_roles(&vec![Role::App; n])
}

/// A running sandbox with containers in these states.
fn running(containers: &[(Role, ContainerSeen)]) -> Seen {
    Seen {
        sandbox: SandboxSeen::Running,
        containers: containers.to_vec(),
        ..group(0)
    }
}

#[test]
fn a_new_group_starts_its_sandbox_and_pulls_at_once() {
    assert_eq!(
        plan(&of_roles(&[Role::App, Role::Init])),
        [Action::StartSandbox, Action::Pull(0), Action::Pull(1)]
    );
}

#[test]
fn files_are_put_once_nothing_that_has_old_ones_is_being_started() {
    let stale = |containers: &[(Role, ContainerSeen)], at_ms| Seen {
        stale_files_ms: Some(at_ms),
        initialized: true,
        ..running(containers)
    };
    let starting = (Role::App, ContainerSeen::Starting);
    assert_eq!(plan(&stale(&[(Role::App, RUNS)], 0)), [Action::Refresh]);
    assert_eq!(plan(&stale(&[(Role::App, RUNS)], 7)), [Action::WakeAt(7)]);
    assert_eq!(plan(&stale(&[(Role::App, RUNS), starting], 0)), []);
    let ending = Seen {
        deleting: true,
        ..stale(&[(Role::App, RUNS)], 0)
    };
    assert_eq!(plan(&ending), [Action::Kill(0)]);
}

#[test]
fn containers_wait_for_the_sandbox() {
    let mut seen = group(1);
    seen.containers[0].1 = ContainerSeen::Pulled;
    seen.sandbox = SandboxSeen::Starting;
    assert_eq!(plan(&seen), []);
    seen.sandbox = SandboxSeen::Running;
    assert_eq!(plan(&seen), [Action::Start(0)]);
}

#[test]
fn back_off_wakes_and_does_not_act() {
    let mut seen = group(1);
    seen.sandbox = SandboxSeen::Running;
    seen.containers[0].1 = ContainerSeen::Idle { not_before_ms: 10 };
    assert_eq!(plan(&seen), [Action::WakeAt(10)]);
    seen.now_ms = 10;
    assert_eq!(plan(&seen), [Action::Pull(0)]);
}

#[test]
fn init_containers_and_sidecars_take_turns() {
    let pulled = ContainerSeen::Pulled;
    let mut seen = running(&[
        (Role::App, pulled),
        (Role::Init, pulled),
        (Role::Sidecar, pulled),
        (Role::Init, pulled),
    ]);
    for (index, state, next) in [
        (0, pulled, vec![Action::Start(1)]),
        (1, RUNS, vec![]),
        (1, WELL, vec![Action::Start(2)]),
        (2, ContainerSeen::Starting, vec![]),
        (2, ContainerSeen::Running { has_started: false }, vec![]),
        (2, RUNS, vec![Action::Start(3)]),
        // Run again after it failed.
        (
            3,
            ContainerSeen::Idle { not_before_ms: 7 },
            vec![Action::WakeAt(7)],
        ),
        (3, WELL, vec![Action::Start(0)]),
    ] {
        seen.containers[index].1 = state;
        assert_eq!(plan(&seen), next, "{index} {state:?}");
        assert_eq!(has_initialized(&seen.containers), next == [Action::Start(0)]);
    }
    // From then on a sidecar that is being restarted holds nobody up.
    seen.initialized = true;
    seen.containers[2].1 = ContainerSeen::Pulled;
    assert_eq!(plan(&seen), [Action::Start(0), Action::Start(2)]);
}

#[test]
fn an_init_container_that_failed_for_good_fails_the_group() {
    let mut seen = running(&[
        (Role::App, ContainerSeen::Pulled),
        (Role::Sidecar, RUNS),
        (Role::Init, ContainerSeen::Done { well: false }),
    ]);
    assert_eq!(end(&seen), Some(End::Failed));
    assert_eq!(plan(&seen), [Action::Kill(1)]);
    seen.containers[1].1 = WELL;
    assert_eq!(plan(&seen), [Action::StopSandbox]);
}

#[test]
fn sidecars_end_last_and_in_reverse() {
    let mut seen = running(&[
        (Role::App, WELL),
        (Role::App, RUNS),
        (Role::Sidecar, RUNS),
        (Role::Sidecar, RUNS),
    ]);
    seen.initialized = true;
    assert_eq!(plan(&seen), []);
    seen.deleting = true;
    assert_eq!(plan(&seen), [Action::Kill(1)]);
    seen.deleting = false;
    // They do not keep the group from completing.
    seen.containers[1].1 = WELL;
    assert_eq!(end(&seen), Some(End::Complete));
    assert_eq!(plan(&seen), [Action::Kill(3)]);
    seen.containers[3].1 = ContainerSeen::Killing;
    assert_eq!(plan(&seen), []);
    seen.containers[3].1 = WELL;
    assert_eq!(plan(&seen), [Action::Kill(2)]);
    seen.containers[2].1 = ContainerSeen::Done { well: false };
    assert_eq!(plan(&seen), [Action::StopSandbox]);
}

#[test]
fn a_restart_ends_all_and_begins_anew_in_the_same_sandbox() {
    let mut seen = running(&[(Role::App, RUNS), (Role::Sidecar, RUNS), (Role::Init, WELL)]);
    seen.restarting = true;
    assert_eq!(plan(&seen), [Action::Kill(0)]);
    seen.containers[0].1 = WELL;
    assert_eq!(plan(&seen), [Action::Kill(1)]);
    seen.containers[1].1 = WELL;
    assert_eq!(plan(&seen), [Action::Reset]);
}

#[test]
fn a_restart_in_a_new_sandbox_stops_the_old_one_before() {
    let mut seen = running(&[(Role::App, RUNS)]);
    (seen.restarting, seen.renewing) = (true, true);
    assert_eq!(plan(&seen), [Action::Kill(0)]);
    seen.containers[0].1 = WELL;
    assert_eq!(plan(&seen), [Action::StopSandbox]);
    seen.sandbox = SandboxSeen::Stopping;
    assert_eq!(plan(&seen), []);
    seen.sandbox = SandboxSeen::Absent { not_before_ms: 99 };
    assert_eq!(plan(&seen), [Action::Reset]);
}

#[test]
fn an_update_ends_what_it_changes_and_nothing_else() {
    let mut seen = running(&[
        (Role::App, RUNS),
        (Role::App, RUNS),
        (Role::App, ContainerSeen::Pulled),
    ]);
    seen.initialized = true;
    seen.leaving = Some(BTreeSet::from([1, 2]));
    // What leaves is not started; what stays goes on as ever.
    assert_eq!(plan(&seen), [Action::Kill(1)]);
    seen.containers[1].1 = ContainerSeen::Killing;
    seen.containers[0].1 = ContainerSeen::Idle { not_before_ms: 0 };
    assert_eq!(plan(&seen), [Action::Pull(0)]);
    // It may be all there is to do: the group does not end before it is updated.
    seen.containers[0].1 = WELL;
    seen.containers[1].1 = WELL;
    assert_eq!(end(&seen), None);
    assert_eq!(plan(&seen), [Action::Apply]);
    seen.leaving = Some(BTreeSet::new());
    seen.containers[0].1 = ContainerSeen::Idle { not_before_ms: 0 };
    assert_eq!(plan(&seen), [Action::Apply], "nothing ends for it");
    seen.deleting = true;
    assert_eq!(plan(&seen), [Action::StopSandbox]);
}

#[test]
fn a_group_fails_at_its_deadline() {
    let mut seen = running(&[(Role::App, RUNS)]);
    seen.deadline_ms = Some(10);
    assert_eq!(plan(&seen), [Action::WakeAt(10)]);
    seen.now_ms = 10;
    assert_eq!(plan(&seen), [Action::Expire]);
    seen.failed = true;
    assert_eq!(plan(&seen), [Action::Kill(0)]);
}

#[test]
fn the_end_is_kill_then_stop_then_release() {
    let mut seen = running(&[(Role::App, RUNS), (Role::App, WELL)]);
    seen.deleting = true;
    assert_eq!(plan(&seen), [Action::Kill(0)]);
    seen.containers[0].1 = ContainerSeen::Killing;
    assert_eq!(plan(&seen), []);
    seen.containers[0].1 = WELL;
    assert_eq!(plan(&seen), [Action::StopSandbox]);
    seen.sandbox = SandboxSeen::Absent { not_before_ms: 99 };
    assert_eq!(plan(&seen), [Action::Release]);
    seen.releasing = true;
    assert_eq!(plan(&seen), []);
}

#[test]
fn a_group_is_resized_when_nothing_of_it_begins_or_ends_and_nothing_begins_meanwhile() {
    let mut seen = running(&[(Role::App, RUNS), (Role::App, ContainerSeen::Starting)]);
    seen.resizing = Some(ResizeSeen::Wanted);
    assert_eq!(plan(&seen), []);
    seen.containers[1].1 = ContainerSeen::Pulled;
    assert_eq!(plan(&seen), [Action::Resize]);
    seen.resizing = Some(ResizeSeen::UnderWay);
    assert_eq!(plan(&seen), []);
    // Without a sandbox there is nothing to resize: the next one is of the new size.
    seen.containers[0].1 = ContainerSeen::Idle { not_before_ms: 0 };
    for sandbox in [
        SandboxSeen::Absent { not_before_ms: 9 },
        SandboxSeen::Dead { not_before_ms: 9 },
    ] {
        seen.sandbox = sandbox;
        assert_eq!(plan(&seen), [Action::Apply]);
    }
}

#[test]
fn an_ended_group_gives_its_sandbox_back_and_stays() {
    let mut seen = running(&[(Role::App, WELL)]);
    assert_eq!(plan(&seen), [Action::StopSandbox]);
    seen.sandbox = SandboxSeen::Absent { not_before_ms: 0 };
    assert_eq!(plan(&seen), []);
}

/// A world that carries actions out, with failures as the numbers say.
struct World {
    seen: Seen,
    busy: HashSet<Action>,
    released: bool,
    /// The files changed while they were being put.
    again: bool,
}

impl World {
    fn new(roles: &[Role]) -> Self {
        Self {
            seen: of_roles(roles),
            busy: HashSet::new(),
            released: false,
            again: false,
        }
    }

    fn set(&mut self, index: usize, state: ContainerSeen) {
        self.seen.containers[index].1 = state;
    }

    fn begin(&mut self) {
        self.seen.initialized |= has_initialized(&self.seen.containers);
        for action in plan(&self.seen) {
            if let Action::WakeAt(at) = action {
                assert!(at > self.seen.now_ms);
                continue;
            }
            assert!(self.busy.insert(action), "{action:?} begun twice");
            match action {
                Action::StartSandbox => self.seen.sandbox = SandboxSeen::Starting,
                Action::StopSandbox => {
                    let dead = matches!(self.seen.sandbox, SandboxSeen::Dead { .. });
                    let alive = self.seen.containers.iter().any(|(_, c)| c.is_alive());
                    assert!(dead || !alive, "stopped under a container");
                    self.seen.sandbox = SandboxSeen::Stopping;
                    self.seen.stale_files_ms = None;
                    self.lose_resize();
                }
                Action::Resize => {
                    let settles = |seen| matches!(seen, ContainerSeen::Starting | ContainerSeen::Killing);
                    assert!(
                        !self.seen.containers.iter().any(|(_, seen)| settles(*seen)),
                        "resized beside one that begins"
                    );
                    self.seen.resizing = Some(ResizeSeen::UnderWay);
                }
                Action::Pull(index) => self.set(index, ContainerSeen::Pulling),
                Action::Start(index) => {
                    assert_eq!(self.seen.sandbox, SandboxSeen::Running);
                    self.assert_order(index);
                    assert_eq!(self.seen.resizing, None, "begun while the group is resized");
                    self.set(index, ContainerSeen::Starting);
                }
                Action::Kill(index) => self.set(index, ContainerSeen::Killing),
                Action::Expire => {
                    self.seen.failed = true;
                    self.busy.remove(&action);
                }
                Action::Reset => {
                    self.reset();
                    self.busy.remove(&action);
                }
                Action::Apply => {
                    self.apply();
                    self.busy.remove(&action);
                }
                Action::Refresh => {
                    assert_eq!(self.seen.sandbox, SandboxSeen::Running);
                    let mut containers = self.seen.containers.iter();
                    assert!(
                        !containers.any(|(_, seen)| *seen == ContainerSeen::Starting),
                        "old files may come after the new ones"
                    );
                    self.seen.stale_files_ms = None;
                }
                Action::Release => {
                    assert!(self.seen.deleting && matches!(self.seen.sandbox, SandboxSeen::Absent { .. }));
                    self.seen.releasing = true;
                    self.released = true;
                }
                Action::WakeAt(_) => {}
            }
        }
    }

    /// What starts does so after all it has to wait for.
    fn assert_order(&self, index: usize) {
        if self.seen.initialized {
            return;
        }
        let is_app = self.seen.containers[index].0 == Role::App;
        for (before, (role, seen)) in self.seen.containers.iter().enumerate() {
            if is_app || before < index {
                match role {
                    Role::App => {}
                    Role::Init => assert_eq!(*seen, WELL),
                    Role::Sidecar => assert_eq!(*seen, RUNS),
                }
            }
        }
    }

    fn reset(&mut self) {
        assert!(!self.seen.containers.iter().any(|(_, c)| c.is_alive()));
        if self.seen.renewing {
            assert!(
                matches!(self.seen.sandbox, SandboxSeen::Absent { .. }),
                "the old sandbox is there"
            );
        }
        (self.seen.restarting, self.seen.renewing) = (false, false);
        self.seen.leaving = None;
        self.seen.resizing = None;
        self.seen.initialized = false;
        for (_, seen) in &mut self.seen.containers {
            if seen.is_done() {
                *seen = ContainerSeen::Idle { not_before_ms: 0 };
            }
        }
    }

    /// Some of the group's work is to be another one.
    fn update(&mut self, pick: usize) {
        let works = self.seen.containers.iter().map(|(role, _)| *role == Role::App);
        let apps: Vec<usize> = works
            .enumerate()
            .filter(|(_, app)| *app)
            .map(|(index, _)| index)
            .collect();
        if self.seen.restarting || self.seen.leaving.is_some() || self.seen.resizing.is_some() {
            return;
        }
        if pick.is_multiple_of(3) {
            self.seen.resizing = Some(ResizeSeen::Wanted);
        } else {
            self.seen.leaving = Some(apps.into_iter().filter(|index| pick >> index & 1 == 1).collect());
        }
    }

    fn apply(&mut self) {
        if self.seen.resizing.take().is_some() {
            return;
        }
        let leaving = self.seen.leaving.take().unwrap();
        if self.busy.contains(&Action::Refresh) {
            self.again = true;
        } else {
            self.seen.stale_files_ms = Some(0);
        }
        for index in leaving {
            assert!(
                !self.seen.containers[index].1.is_alive(),
                "{index} is updated while it is there"
            );
            if self.seen.containers[index].1 != ContainerSeen::Pulling {
                self.set(index, ContainerSeen::Idle { not_before_ms: 0 });
            }
        }
    }

    /// What was being resized is gone.
    fn lose_resize(&mut self) {
        self.busy.remove(&Action::Resize);
        if self.seen.resizing.is_some() {
            self.seen.resizing = Some(ResizeSeen::Wanted);
        }
    }

    /// The sandbox dies: what was in it is run again, after the init containers.
    fn die(&mut self) {
        self.seen.sandbox = SandboxSeen::Dead { not_before_ms: 0 };
        self.seen.stale_files_ms = None;
        self.seen.initialized = false;
        for (role, seen) in &mut self.seen.containers {
            if seen.is_alive() || (*role == Role::Init && *seen == WELL) {
                *seen = ContainerSeen::Idle { not_before_ms: 0 };
            }
        }
        self.busy
            .retain(|action| !matches!(action, Action::Start(_) | Action::Kill(_) | Action::Refresh));
        self.lose_resize();
    }

    /// Running containers go on by themselves.
    fn live(&mut self, pick: usize, fails: bool) {
        let index = pick % self.seen.containers.len();
        let (role, seen) = self.seen.containers[index];
        let again = ContainerSeen::Idle {
            not_before_ms: self.seen.now_ms + 10,
        };
        match (role, seen) {
            (Role::Init, ContainerSeen::Running { .. }) => self.set(index, if fails { again } else { WELL }),
            (_, ContainerSeen::Running { .. }) => self.set(index, if fails { again } else { RUNS }),
            _ => {}
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
        let again = ContainerSeen::Idle { not_before_ms: retry };
        match action {
            Action::StartSandbox if fails => self.seen.sandbox = SandboxSeen::Dead { not_before_ms: 0 },
            Action::StartSandbox => self.seen.sandbox = SandboxSeen::Running,
            Action::StopSandbox if fails => self.seen.sandbox = SandboxSeen::Dead { not_before_ms: retry },
            Action::StopSandbox => self.seen.sandbox = SandboxSeen::Absent { not_before_ms: retry },
            Action::Pull(index) | Action::Start(index) if fails => self.set(index, again),
            Action::Pull(index) => self.set(index, ContainerSeen::Pulled),
            Action::Start(index) => self.set(index, ContainerSeen::Running { has_started: false }),
            Action::Kill(index) => self.set(index, ContainerSeen::Done { well: !fails }),
            Action::Refresh if std::mem::take(&mut self.again) => self.seen.stale_files_ms = Some(0),
            Action::Refresh if fails => self.seen.stale_files_ms = Some(retry),
            Action::Refresh => {}
            // Then it is taken back.
            Action::Resize if fails => self.seen.resizing = Some(ResizeSeen::Wanted),
            Action::Resize => self.seen.resizing = None,
            Action::Expire | Action::Reset | Action::Apply | Action::Release | Action::WakeAt(_) => {}
        }
    }

    /// Goes on without any failure.
    fn settle(&mut self) {
        for step in 0..400 {
            self.begin();
            self.finish_one(step, false);
            self.live(step, false);
        }
    }
}

fn roles() -> impl Strategy<Value = Vec<Role>> {
    let turns = prop::collection::vec(prop::sample::select(vec![Role::Init, Role::Sidecar]), 0..4);
    (1usize..4, turns).prop_map(|(apps, turns)| [vec![Role::App; apps], turns].concat())
}

proptest! {
    #[test]
    fn converges_and_does_nothing_twice(
        roles in roles(),
        steps in prop::collection::vec((any::<usize>(), any::<bool>(), 0u8..16), 0..80),
    ) {
        let mut world = World::new(&roles);
        for (pick, fails, what) in steps {
            world.begin();
            match what {
                0 if world.seen.sandbox == SandboxSeen::Running => world.die(),
                // A group that is being updated is not restarted.
                1 | 2 if world.seen.resizing.is_some() => {}
                1 => world.seen.restarting = true,
                2 => (world.seen.restarting, world.seen.renewing) = (true, true),
                3 => world.update(pick),
                4..8 => world.live(pick, fails),
                _ => world.finish_one(pick, fails),
            }
        }
        // Without further failures everything runs, and the init containers have ended.
        world.settle();
        prop_assert_eq!(world.seen.sandbox, SandboxSeen::Running);
        prop_assert_eq!(world.seen.stale_files_ms, None);
        for (role, seen) in &world.seen.containers {
            prop_assert_eq!(*seen, if *role == Role::Init { WELL } else { RUNS });
        }
        // It fails when its time is over,
        let mut late = World { seen: world.seen.clone(), busy: world.busy.clone(), released: false, again: world.again };
        late.seen.deadline_ms = Some(late.seen.now_ms);
        late.settle();
        let is_gone = matches!(late.seen.sandbox, SandboxSeen::Absent { .. });
        prop_assert!(late.seen.failed && is_gone);
        // and ends when it shall.
        world.seen.deleting = true;
        world.settle();
        prop_assert!(world.released);
    }

    /// Whatever is seen, no step is asked for again once it was begun.
    #[test]
    fn what_was_begun_is_not_begun_again(
        containers in prop::collection::vec((role(), state()), 1..6),
        sandbox in sandbox(),
        flags in any::<[bool; 5]>(),
        leaving in prop::option::of(prop::collection::btree_set(0usize..1, 0..2)),
        stale_files_ms in prop::option::of(0u64..3),
        resizing in prop::option::of(prop::sample::select(vec![ResizeSeen::Wanted, ResizeSeen::UnderWay])),
        now_ms in 0u64..3,
    ) {
        let [deleting, restarting, failed, initialized, renewing] = flags;
        // An update is either.
        let resizing = resizing.filter(|_| leaving.is_none());
        let mut world = World::new(&[Role::App]);
        world.seen = Seen {
            now_ms, deleting, restarting, failed, initialized, sandbox, containers,
            releasing: false, deadline_ms: Some(2), leaving, stale_files_ms, resizing, renewing: renewing && restarting,
        };
        let alive = world.seen.containers.iter().any(|(_, c)| c.is_alive());
        // A sandbox that is not there has nothing alive.
        prop_assume!(!alive || matches!(world.seen.sandbox, SandboxSeen::Running | SandboxSeen::Dead { .. }));
        world.begin_unordered();
    }
}

impl World {
    /// Begins what is planned, and plans again: only what waits for a time may be there, or what the first steps opened.
    fn begin_unordered(&mut self) {
        let first: HashSet<Action> = plan(&self.seen).into_iter().collect();
        for action in &first {
            match *action {
                Action::StartSandbox => self.seen.sandbox = SandboxSeen::Starting,
                Action::StopSandbox => self.seen.sandbox = SandboxSeen::Stopping,
                Action::Pull(index) => self.set(index, ContainerSeen::Pulling),
                Action::Start(index) => self.set(index, ContainerSeen::Starting),
                Action::Kill(index) => self.set(index, ContainerSeen::Killing),
                Action::Expire => self.seen.failed = true,
                Action::Reset => self.reset(),
                Action::Apply => self.apply(),
                Action::Refresh => self.seen.stale_files_ms = None,
                Action::Resize => self.seen.resizing = Some(ResizeSeen::UnderWay),
                Action::Release => self.seen.releasing = true,
                Action::WakeAt(_) => {}
            }
        }
        for action in plan(&self.seen) {
            assert!(
                matches!(action, Action::WakeAt(_)) || !first.contains(&action),
                "{action:?} is begun twice"
            );
        }
    }
}

fn role() -> impl Strategy<Value = Role> {
    prop::sample::select(vec![Role::App, Role::Init, Role::Sidecar])
}

fn state() -> impl Strategy<Value = ContainerSeen> {
    prop_oneof![
        (0u64..3).prop_map(|not_before_ms| ContainerSeen::Idle { not_before_ms }),
        any::<bool>().prop_map(|has_started| ContainerSeen::Running { has_started }),
        any::<bool>().prop_map(|well| ContainerSeen::Done { well }),
        prop::sample::select(vec![
            ContainerSeen::Pulling,
            ContainerSeen::Pulled,
            ContainerSeen::Starting,
            ContainerSeen::Killing,
        ]),
    ]
}

fn sandbox() -> impl Strategy<Value = SandboxSeen> {
    prop_oneof![
        (0u64..3).prop_map(|not_before_ms| SandboxSeen::Absent { not_before_ms }),
        (0u64..3).prop_map(|not_before_ms| SandboxSeen::Dead { not_before_ms }),
        prop::sample::select(vec![
            SandboxSeen::Starting,
            SandboxSeen::Running,
            SandboxSeen::Stopping
        ]),
    ]
}
