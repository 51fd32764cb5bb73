//! Looks after running containers as a kubelet does: hooks, probes, and an end with grace.
//!
//! A container with probes or a postStart hook has one task, begun when it has started; the others cost nothing. `check`
//! does what a probe or hook asks, `probe` decides what its results mean (pure), [`Care`] is what is known of a container.

pub mod check;
pub mod grpc;
pub mod http;
pub mod probe;
pub mod stop;
mod tls;

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use self::{check::Handler, probe::Probe};
use crate::{
    container::{Container, process::State, stdio::Hold},
    events::{EventKind, Events},
    reaper::Reaper,
};

/// How a container is looked after.
#[derive(Debug, Clone, Default)]
pub struct Lifecycle {
    /// Until it has passed once, the others rest.
    pub startup: Option<Probe>,
    /// Failing it ends the container.
    pub liveness: Option<Probe>,
    /// The container serves while it passes.
    pub readiness: Option<Probe>,
    /// Runs beside the container.
    pub post_start: Option<Handler>,
    /// Runs before it is told to end.
    pub pre_stop: Option<Handler>,
    /// For ends of our own making.
    pub grace: Duration,
    /// A file the container may leave a message in; empty: none.
    pub termination_message_path: String,
}

impl Lifecycle {
    /// There is something to do while it runs.
    #[must_use]
    pub fn needs_care(&self) -> bool {
        self.startup.is_some()
            || self.liveness.is_some()
            || self.readiness.is_some()
            || self.post_start.is_some()
    }
}

/// Why a container is ended that nobody asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Its liveness probe failed.
    Liveness,
    /// Its startup probe failed.
    Startup,
    /// Its postStart hook failed.
    PostStart,
}

/// How a running container is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Health {
    /// Its hook is done and its startup probe has passed.
    pub started: bool,
    /// It serves.
    pub ready: bool,
}

/// What is known of a container that is looked after.
#[derive(Debug)]
pub struct Care {
    /// What is wanted.
    pub wanted: Lifecycle,
    health: Mutex<Health>,
    cause: Mutex<Option<Cause>>,
    /// When it is killed, once its end has begun.
    end: watch::Sender<Option<Instant>>,
}

impl Care {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(wanted: Lifecycle) -> Self {
        Self {
            wanted,
            health: Mutex::default(),
            cause: Mutex::default(),
            end: watch::Sender::new(None),
        }
    }

    /// How it is.
    #[must_use]
    pub fn health(&self) -> Health {
        *self.health.lock().expect("no panic while held")
    }

    /// Why it was ended, if not by the host's wish.
    #[must_use]
    pub fn cause(&self) -> Option<Cause> {
        *self.cause.lock().expect("no panic while held")
    }
}

/// What containers are looked after with. Clones are the same.
#[derive(Debug, Clone)]
pub struct Carer {
    /// What the host is told.
    pub events: Arc<Events>,
    /// Ends of commands.
    pub reaper: Reaper,
    /// While it is on, everything stands still.
    pub hold: Hold,
    /// The sandbox's own address.
    pub address: Address,
}

/// The sandbox's own address, which a clone changes. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Address(Arc<Mutex<Option<IpAddr>>>);

impl Address {
    /// It has this one now.
    pub fn set(&self, address: Option<IpAddr>) {
        *self.0.lock().expect("no panic while held") = address;
    }

    /// Its address; without a network it has loopback.
    #[must_use]
    pub fn get(&self) -> IpAddr {
        let address = *self.0.lock().expect("no panic while held");
        address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }
}

impl Carer {
    /// Begins to look after a container that has just started.
    pub fn begin(&self, container: &Arc<Container>) {
        if !container.care.wanted.needs_care() {
            return;
        }
        let (carer, container) = (self.clone(), Arc::clone(container));
        tokio::spawn(async move {
            let Ok(init) = container.process("") else { return };
            tokio::select! {
                _ = init.wait() => {}
                () = carer.look_after(&container) => {
                    // It is being ended, or rests; its end is the end of it.
                    let _ = init.wait().await;
                }
            }
            carer.set_health(&container, Health::default());
        });
    }

    async fn look_after(&self, container: &Arc<Container>) {
        let wanted = &container.care.wanted;
        let began = Instant::now();
        if let Some(hook) = &wanted.post_start
            && let Err(message) = check::perform_hook(self, container, hook).await
        {
            self.event(container, EventKind::PostStartFailed, message, None);
            return self.give_up(container, Cause::PostStart, wanted.grace);
        }
        if let Some(probe) = &wanted.startup
            && !self.until_passed(container, probe, began).await
        {
            return self.give_up(container, Cause::Startup, probe.grace.unwrap_or(wanted.grace));
        }
        self.set_health(
            container,
            Health {
                started: true,
                ready: wanted.readiness.is_none(),
            },
        );
        let live = async {
            match &wanted.liveness {
                Some(probe) => {
                    self.until_failed(container, probe, began).await;
                    self.give_up(container, Cause::Liveness, probe.grace.unwrap_or(wanted.grace));
                }
                None => std::future::pending().await,
            }
        };
        let serve = async {
            if let Some(probe) = &wanted.readiness {
                self.follow_readiness(container, probe, began).await;
            }
            std::future::pending::<()>().await;
        };
        // Readiness is asked for to the end, also while the container is being ended.
        tokio::join!(live, serve);
    }

    fn give_up(&self, container: &Arc<Container>, cause: Cause, grace: Duration) {
        if container.care.end.borrow().is_some() {
            return;
        }
        *container.care.cause.lock().expect("no panic while held") = Some(cause);
        self.event(container, EventKind::Killing, String::new(), Some(cause));
        stop::begin(self, container, grace);
    }

    /// Performs a startup probe until it passes, or has failed too often.
    async fn until_passed(&self, container: &Arc<Container>, probe: &Probe, began: Instant) -> bool {
        let mut rounds = probe.rounds(began, None);
        loop {
            sleep_until(rounds.next_at()).await;
            let passed = self.try_once(container, probe, "Startup", &mut rounds).await;
            if let Some(passed) = passed {
                return passed;
            }
        }
    }

    /// Performs a liveness probe until it has failed too often.
    async fn until_failed(&self, container: &Arc<Container>, probe: &Probe, began: Instant) {
        let mut rounds = probe.rounds(began, Some(true));
        loop {
            sleep_until(rounds.next_at()).await;
            if container.care.end.borrow().is_some() {
                // What is being ended need not live.
                return std::future::pending().await;
            }
            if self.try_once(container, probe, "Liveness", &mut rounds).await == Some(false) {
                return;
            }
        }
    }

    /// Performs a readiness probe for ever.
    async fn follow_readiness(&self, container: &Arc<Container>, probe: &Probe, began: Instant) {
        let mut rounds = probe.rounds(began, Some(false));
        loop {
            sleep_until(rounds.next_at()).await;
            if let Some(ready) = self.try_once(container, probe, "Readiness", &mut rounds).await {
                self.set_health(container, Health { started: true, ready });
            }
        }
    }

    /// One round; gives what it changed.
    async fn try_once(
        &self,
        container: &Arc<Container>,
        probe: &Probe,
        name: &str,
        rounds: &mut probe::Rounds,
    ) -> Option<bool> {
        rounds.begin(Instant::now());
        if self.hold.is_on() {
            return None;
        }
        let result = check::perform(self, container, &probe.handler, probe.timeout).await;
        // What was frozen meanwhile says nothing.
        if self.hold.is_on() {
            return None;
        }
        if let Err(message) = &result {
            let message = format!("{name} probe failed: {message}");
            self.event(container, EventKind::Unhealthy, message, None);
        }
        rounds.observe(result.is_ok())
    }

    fn set_health(&self, container: &Container, health: Health) {
        let mut known = container.care.health.lock().expect("no panic while held");
        if *known != health {
            *known = health;
            drop(known);
            self.event(container, EventKind::Health, String::new(), None);
        }
    }

    fn event(&self, container: &Container, kind: EventKind, message: String, cause: Option<Cause>) {
        self.events.push(&container.id, kind, message, cause);
    }
}

/// Whether the container's init runs.
fn runs(container: &Container) -> bool {
    container
        .process("")
        .is_ok_and(|init| matches!(init.state(), State::Running { .. }))
}
