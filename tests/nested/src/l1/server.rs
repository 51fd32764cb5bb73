//! Takes messages from the command port and hands them to the sessions.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use super::session::{self, Session};
use crate::wire::{Frame, Message};

/// Where sessions put what they have to say.
#[derive(Debug, Clone)]
pub(super) struct Outlet {
    port: Arc<Mutex<File>>,
    session: u32,
}

impl Outlet {
    /// Sends a message of this session. With the other side gone there is nobody to tell, and the reader sees
    /// the end of the port.
    pub(super) fn send(&self, message: Message) {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = Frame::new(self.session, message).write(&mut *port);
    }
}

/// Serves until the other side goes away or asks for the end.
pub(super) fn run(mut port: File) -> Result<()> {
    let writer = Arc::new(Mutex::new(port.try_clone().context("share the command port")?));
    let outlet = |session| Outlet {
        port: Arc::clone(&writer),
        session,
    };
    let sessions: Arc<Mutex<HashMap<u32, Arc<Session>>>> = Arc::default();
    outlet(0).send(Message::Ready);
    while let Some(frame) = Frame::read(&mut port).context("read the command port")? {
        let id = frame.session;
        let message = frame.into_message()?;
        match message {
            Message::Shutdown => return Ok(()),
            Message::Start(request) => {
                let session = Arc::new(Session::new(id));
                lock(&sessions).insert(id, Arc::clone(&session));
                let (outlet, sessions) = (outlet(id), Arc::clone(&sessions));
                thread::Builder::new()
                    .name(format!("session {id}"))
                    .spawn(move || {
                        let last = session::run(&session, &request, &outlet);
                        lock(&sessions).remove(&id);
                        outlet.send(last);
                    })
                    .context("start a session thread")?;
            }
            other => {
                // A session that has just ended may still be talked to.
                if let Some(session) = lock(&sessions).get(&id).cloned() {
                    session.handle(other);
                }
            }
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
