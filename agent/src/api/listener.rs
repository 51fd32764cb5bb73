//! Serving HTTP on TCP, TLS and unix sockets, with bounded connections, headers and time.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::admin::peer::AllowedPeers;

/// Most connections of a listener; further ones wait in the kernel.
const MAX_CONNECTIONS: usize = 512;
/// A client has so long to finish a TLS handshake or a request head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest request head.
const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 100;
/// Running requests have so long to end when the agent stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a door can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A TCP address can't be bound.
    #[error("Failed to listen on {address}, set by {field}{}", hint(.source))]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// Field of the configuration.
        field: &'static str,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The unix socket can't be bound.
    #[error("Failed to {step} {}, set by admin.socket", path.display())]
    Unix {
        /// What was tried.
        step: &'static str,
        /// The socket.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// `admin.group` names no group.
    #[error(
        "Configuration field admin.group is {group:?}: no such group on this host; give a name or a number"
    )]
    Group {
        /// Its value.
        group: String,
    },
    /// A file of the TLS set-up can't be used.
    #[error("Failed to {step} {}", path.display())]
    Tls {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            ": another process has the port (rpcbind has 111); change the field or stop it"
        }
        io::ErrorKind::PermissionDenied => ": ports below 1024 need root or CAP_NET_BIND_SERVICE",
        _ => "",
    }
}

/// Held by everything that uses a connection, also after it became a WebSocket.
#[derive(Debug, Clone)]
pub(super) struct ConnectionSlot(#[expect(dead_code, reason = "held, not read")] Arc<OwnedSemaphorePermit>);

/// What accepts connections.
pub(super) enum Listener {
    Tcp(TcpListener),
    Tls(TcpListener, TlsAcceptor),
    Unix(UnixListener, AllowedPeers),
}

impl Listener {
    pub(super) async fn tcp(address: SocketAddr, field: &'static str) -> Result<TcpListener, ListenError> {
        TcpListener::bind(address)
            .await
            .map_err(|source| ListenError::Tcp {
                address,
                field,
                source,
            })
    }
}

/// Serves `router` until `shutdown`, then lets running requests end for a short time.
pub(super) async fn serve(listener: Listener, router: Router, shutdown: CancellationToken) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let tasks = TaskTracker::new();
    let accept_loop = accept_connections(&listener, &router, &slots, &tasks, &shutdown);
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = accept_loop => {}
    }
    drop(listener);
    tasks.close();
    // What is still running after this is dropped with the runtime.
    let _ = timeout(DRAIN_TIMEOUT, tasks.wait()).await;
}

async fn accept_connections(
    listener: &Listener,
    router: &Router,
    slots: &Arc<Semaphore>,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) {
    loop {
        let Ok(slot) = Arc::clone(slots).acquire_owned().await else {
            return;
        };
        let slot = ConnectionSlot(Arc::new(slot));
        let shutdown = shutdown.clone();
        let router = router.clone();
        match listener {
            Listener::Tcp(tcp) => {
                if let Some(stream) = accepted(tcp.accept().await.map(|(stream, _)| stream)).await {
                    prepare(&stream);
                    tasks.spawn(serve_connection(stream, router, slot, shutdown));
                }
            }
            Listener::Tls(tcp, acceptor) => {
                if let Some(stream) = accepted(tcp.accept().await.map(|(stream, _)| stream)).await {
                    prepare(&stream);
                    let acceptor = acceptor.clone();
                    tasks.spawn(async move {
                        match timeout(HEAD_TIMEOUT, acceptor.accept(stream)).await {
                            Ok(Ok(stream)) => {
                                let verified = stream.get_ref().1.peer_certificates().is_some();
                                let router = router.layer(axum::Extension(ClientCertificate { verified }));
                                serve_connection(stream, router, slot, shutdown).await;
                            }
                            Ok(Err(error)) => tracing::debug!("TLS handshake failed: {error}"),
                            Err(_) => tracing::debug!("TLS handshake took too long"),
                        }
                    });
                }
            }
            Listener::Unix(unix, allowed) => {
                if let Some(stream) = accepted(unix.accept().await.map(|(stream, _)| stream)).await {
                    let router = match allowed.check(&stream) {
                        Ok(()) => router,
                        Err(refusal) => super::admin::refusing_router(refusal),
                    };
                    tasks.spawn(serve_connection(stream, router, slot, shutdown));
                }
            }
        }
    }
}

/// Whether the client showed a certificate, which TLS then verified.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClientCertificate {
    pub(super) verified: bool,
}

/// Logs why nothing was accepted; waits where the process is out of descriptors, which ends only with time.
async fn accepted<S>(result: io::Result<S>) -> Option<S> {
    match result {
        Ok(stream) => Some(stream),
        Err(error) => {
            tracing::warn!("Failed to accept a connection: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
            None
        }
    }
}

/// A peer that vanished is noticed within some minutes, and small frames go out at once.
pub(super) fn prepare(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_socket_keepalive(stream, true);
    let _ = rustix::net::sockopt::set_tcp_keepidle(stream, Duration::from_secs(60));
    let _ = rustix::net::sockopt::set_tcp_keepintvl(stream, Duration::from_secs(15));
}

async fn serve_connection<S>(stream: S, router: Router, slot: ConnectionSlot, shutdown: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let router = router.layer(axum::Extension(slot));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .with_upgrades();
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!("Connection ended: {error}");
    }
}
