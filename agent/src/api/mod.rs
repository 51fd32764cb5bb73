//! The doors: each converts its protocol and delegates to the engine. Every door runs on tasks of the agent's runtime and
//! keeps no state of its own beyond connections.

pub mod admin;
pub(crate) mod eci;
mod exec;
#[cfg(test)]
pub(crate) mod fake;
mod kubelet;
mod listener;
mod lookup;
mod pod_lifecycle;
mod pod_view;
mod query;
mod status;
mod tls;
mod websocket;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub(crate) use self::exec::{CLOSE, ERROR, RESIZE, STDERR, STDIN, STDOUT, TerminalSize, V5, parse_exit};
pub use self::listener::ListenError;
use self::{eci::EciDoor, listener::Listener, tls::CertificateFiles};
use crate::{config::Config, engine::Engine};

/// The doors, bound and not yet open.
pub struct Doors {
    open: Vec<(Listener, axum::Router)>,
    eci: Option<(TcpListener, Option<TlsAcceptor>, Arc<EciDoor>)>,
    addresses: Addresses,
}

/// Where the doors are; useful where the configuration says port 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Addresses {
    /// The ECI OpenAPI.
    pub eci: Option<SocketAddr>,
    /// The kubelet API.
    pub kubelet: Option<SocketAddr>,
    /// Its read-only part.
    pub readonly: Option<SocketAddr>,
}

impl std::fmt::Debug for Doors {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Doors")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl Doors {
    /// Binds every door that is enabled. Nothing is accepted before [`Doors::serve`].
    ///
    /// # Errors
    /// An address, socket or certificate can't be used; the message names it and its field.
    pub async fn bind(config: &Config, engine: Arc<dyn Engine>) -> Result<Self, ListenError> {
        let mut addresses = Addresses::default();
        let mut open = vec![(admin::bind(config)?, admin::router(Arc::clone(&engine)))];
        let mut eci = None;
        if config.eci.enabled {
            let tls = match files(config.eci.tls_cert.as_ref(), config.eci.tls_key.as_ref()) {
                Some(files) => Some(tls::acceptor(&files, None)?),
                None => None,
            };
            let tcp = Listener::tcp(config.eci.listen, "eci.listen").await?;
            addresses.eci = opened(&tcp, "the ECI API");
            let door = Arc::new(EciDoor::new(Arc::clone(&engine), config.eci.clone()));
            eci = Some((tcp, tls, door));
        }
        if config.kubelet.enabled {
            let kubelet = &config.kubelet;
            let files = match files(kubelet.tls_cert.as_ref(), kubelet.tls_key.as_ref()) {
                Some(files) => files,
                None => tls::self_signed(&config.state_dir, &config.node_name, kubelet.listen.ip())?,
            };
            let acceptor = tls::acceptor(&files, kubelet.client_ca.as_deref())?;
            let tcp = Listener::tcp(kubelet.listen, "kubelet.listen").await?;
            addresses.kubelet = opened(&tcp, "the kubelet API");
            let tokens = kubelet::Tokens::new(&kubelet.bearer_tokens);
            let router = kubelet::router(Arc::clone(&engine), tokens);
            open.push((Listener::Tls(tcp, acceptor), router));
        }
        if config.readonly.enabled {
            let tcp = Listener::tcp(config.readonly.listen, "readonly.listen").await?;
            addresses.readonly = opened(&tcp, "the read-only kubelet API");
            open.push((Listener::Tcp(tcp), kubelet::read_only_router(engine)));
        }
        Ok(Self { open, eci, addresses })
    }

    /// Where the doors are.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Serves until `shutdown`, then ends running requests within a few seconds.
    pub async fn serve(self, shutdown: CancellationToken) {
        let mut doors = JoinSet::new();
        for (listener, router) in self.open {
            doors.spawn(listener::serve(listener, router, shutdown.clone()));
        }
        if let Some((tcp, tls, door)) = self.eci {
            doors.spawn(eci::serve(tcp, tls, door, shutdown.clone()));
        }
        while doors.join_next().await.is_some() {}
    }
}

/// Where a door is, also said to the log.
fn opened(tcp: &TcpListener, door: &str) -> Option<SocketAddr> {
    let address = tcp.local_addr().ok()?;
    tracing::info!(%address, "{door} is open");
    Some(address)
}

fn files(certificate: Option<&PathBuf>, key: Option<&PathBuf>) -> Option<CertificateFiles> {
    Some(CertificateFiles {
        certificate: certificate?.clone(),
        key: key?.clone(),
    })
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
