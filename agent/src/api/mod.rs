//! The doors: each converts its protocol and delegates to the engine. Every door runs on tasks of the agent's runtime and
//! keeps no state of its own beyond connections.

pub mod admin;
mod exec;
#[cfg(test)]
pub(crate) mod fake;
mod listener;
mod lookup;
mod query;
mod status;
mod websocket;

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub(crate) use self::exec::{CLOSE, ERROR, RESIZE, STDERR, STDIN, STDOUT, TerminalSize, V5, parse_exit};
pub use self::listener::ListenError;
use self::listener::Listener;
use crate::{config::Config, engine::Engine};

/// The doors, bound and not yet open.
pub struct Doors {
    open: Vec<(Listener, axum::Router)>,
}

impl std::fmt::Debug for Doors {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Doors").finish_non_exhaustive()
    }
}

impl Doors {
    /// Binds every door that is enabled. Nothing is accepted before [`Doors::serve`].
    ///
    /// # Errors
    /// An address, socket or certificate can't be used; the message names it and its field.
    pub async fn bind(config: &Config, engine: Arc<dyn Engine>) -> Result<Self, ListenError> {
        let mut open = Vec::new();
        let unix = admin::bind(config)?;
        open.push((unix, admin::router(Arc::clone(&engine))));
        Ok(Self { open })
    }

    /// Serves until `shutdown`, then ends running requests within a few seconds.
    pub async fn serve(self, shutdown: CancellationToken) {
        let mut doors = JoinSet::new();
        for (listener, router) in self.open {
            doors.spawn(listener::serve(listener, router, shutdown.clone()));
        }
        while doors.join_next().await.is_some() {}
    }
}

/// Binds the doors and serves them until `shutdown`.
///
/// # Errors
/// As [`Doors::bind`].
pub async fn serve(
    config: &Config,
    engine: Arc<dyn Engine>,
    shutdown: CancellationToken,
) -> Result<(), ListenError> {
    Doors::bind(config, engine).await?.serve(shutdown).await;
    Ok(())
}
