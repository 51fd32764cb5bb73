//! What the host should know and did not ask for: OOM kills, and what looking after containers brings to light.
//!
//! The kernel marks `memory.events` of a container's cgroup as modified when one of its counters changes (cgroup v2,
//! "memory.events"); inotify tells.

use std::{
    collections::{HashMap, VecDeque},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use protocol::EVENT_MESSAGE_MAX_BYTES;
use rustix::fs::inotify;
use tokio::sync::watch;

use crate::{
    boot::clock,
    care::Cause,
    container::Container,
    error::{Context, Result},
    sys,
};

/// Most events kept for the host, and most given at once.
const MAX_KEPT: usize = 256;
/// See `GetEvents` in the guest API.
const MAX_GIVEN: usize = 64;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// The kernel killed a process of the container for memory.
    Oom,
    /// A probe failed.
    Unhealthy,
    /// The container is ended, nobody having asked for it.
    Killing,
    /// A postStart hook failed.
    PostStartFailed,
    /// A preStop hook failed.
    PreStopFailed,
    /// The container has started, or became ready or unready.
    Health,
}

/// Something that happened in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Counts up from 1.
    pub sequence: u64,
    /// Wall clock, nanoseconds since the Unix epoch.
    pub timestamp_ns: u64,
    /// Where.
    pub container_id: String,
    /// What.
    pub kind: EventKind,
    /// For people, bounded.
    pub message: String,
    /// Why the container is ended.
    pub cause: Option<Cause>,
}

/// The events of the sandbox, oldest first.
#[derive(Debug)]
pub struct Events {
    log: watch::Sender<Log>,
    inotify: OwnedFd,
    watched: Mutex<HashMap<i32, Watched>>,
}

#[derive(Debug)]
struct Watched {
    container: Arc<Container>,
    oom_kills: u64,
}

#[derive(Debug, Default)]
struct Log {
    last: u64,
    kept: VecDeque<Event>,
}

impl Log {
    fn push(&mut self, mut event: Event) {
        self.last += 1;
        event.sequence = self.last;
        event
            .message
            .truncate(event.message.floor_char_boundary(EVENT_MESSAGE_MAX_BYTES));
        if self.kept.len() == MAX_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(event);
    }

    fn after(&self, sequence: u64) -> Vec<Event> {
        self.kept
            .iter()
            .filter(|event| event.sequence > sequence)
            .take(MAX_GIVEN)
            .cloned()
            .collect()
    }
}

impl Events {
    /// Starts the task that watches.
    ///
    /// # Errors
    /// When inotify is not there.
    pub fn start() -> Result<Arc<Self>> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let inotify = inotify::init(flags).context(|| "start inotify")?;
        let readable =
            rustix::io::fcntl_dupfd_cloexec(&inotify, 3).context(|| "duplicate the inotify descriptor")?;
        let readable = sys::poll::watch(readable).context(|| "watch the inotify descriptor")?;
        let events = Arc::new(Self {
            log: watch::Sender::new(Log::default()),
            inotify,
            watched: Mutex::default(),
        });
        let task = Arc::clone(&events);
        tokio::spawn(async move {
            while let Ok(mut ready) = readable.readable().await {
                let _ = ready.try_io(|fd| {
                    let mut space = [MaybeUninit::uninit(); 512];
                    let mut reader = inotify::Reader::new(fd, &mut space);
                    loop {
                        let event = reader.next()?;
                        task.changed(event.wd());
                    }
                    #[expect(unreachable_code, reason = "gives the closure its type")]
                    Ok(())
                });
            }
        });
        Ok(events)
    }

    /// Watches `container`, if its cgroup counts memory.
    pub fn watch(&self, container: &Arc<Container>) {
        let path = container.cgroup.file("memory.events");
        if let Ok(descriptor) = inotify::add_watch(&self.inotify, path, inotify::WatchFlags::MODIFY) {
            let watched = Watched {
                container: Arc::clone(container),
                oom_kills: container.cgroup.oom_kills(),
            };
            self.watched
                .lock()
                .expect("no panic while held")
                .insert(descriptor, watched);
        }
    }

    /// Stops watching.
    pub fn forget(&self, container: &Arc<Container>) {
        let mut watched = self.watched.lock().expect("no panic while held");
        watched.retain(|descriptor, watched| {
            let keep = !Arc::ptr_eq(&watched.container, container);
            if !keep {
                // Gone with the cgroup otherwise.
                let _ = inotify::remove_watch(&self.inotify, *descriptor);
            }
            keep
        });
    }

    fn changed(&self, descriptor: i32) {
        let mut watched = self.watched.lock().expect("no panic while held");
        let Some(watched) = watched.get_mut(&descriptor) else {
            return;
        };
        let oom_kills = watched.container.cgroup.oom_kills();
        if oom_kills > watched.oom_kills {
            watched.oom_kills = oom_kills;
            self.push(&watched.container.id, EventKind::Oom, String::new(), None);
        }
    }

    /// Adds one.
    pub fn push(&self, container_id: &str, kind: EventKind, message: String, cause: Option<Cause>) {
        let event = Event {
            sequence: 0,
            timestamp_ns: clock::now_ns(),
            container_id: container_id.to_owned(),
            kind,
            message,
            cause,
        };
        self.log.send_modify(|log| log.push(event));
    }

    /// Waits for events after `sequence`. Cancelling is fine.
    pub async fn after(&self, sequence: u64) -> Vec<Event> {
        let mut log = self.log.subscribe();
        match log.wait_for(|log| log.last > sequence).await {
            Ok(log) => log.after(sequence),
            // The sender is `self`.
            Err(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_in_order() {
        let mut log = Log::default();
        for number in 0..300 {
            log.push(Event {
                sequence: 0,
                timestamp_ns: number,
                container_id: "c".into(),
                kind: EventKind::Unhealthy,
                message: "\u{e9}".repeat(600),
                cause: None,
            });
        }
        assert_eq!((log.kept.len(), log.last), (MAX_KEPT, 300));
        let first = log.after(0);
        assert_eq!((first.len(), first[0].sequence), (MAX_GIVEN, 45));
        assert_eq!(first[0].message.len(), EVENT_MESSAGE_MAX_BYTES);
        assert_eq!(
            log.after(298)
                .iter()
                .map(|event| event.sequence)
                .collect::<Vec<_>>(),
            [299, 300]
        );
        assert!(log.after(300).is_empty());
    }
}
