//! Does what a probe or hook asks for, within a time. Failures are told in the kubelet's words.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    Carer, grpc,
    http::{self, HttpGet},
};
use crate::container::Container;

/// Longest a postStart hook may take.
const HOOK_LIMIT: Duration = Duration::from_secs(3600);
/// Most bytes of a command's output in a message.
const SHOWN_BYTES: usize = 900;

/// What is done.
#[derive(Debug, Clone)]
pub enum Handler {
    /// A command in the container.
    Exec(Vec<String>),
    /// A request.
    HttpGet(HttpGet),
    /// A connection.
    TcpSocket {
        /// Instead of the sandbox's own address.
        host: Option<IpAddr>,
        /// Port.
        port: u16,
    },
    /// A call of the health service.
    Grpc {
        /// Port.
        port: u16,
        /// Which service, empty: the server itself.
        service: String,
    },
    /// Nothing, for a while.
    Sleep(Duration),
}

/// Performs a probe.
///
/// # Errors
/// Why it failed, for people.
pub async fn perform(
    carer: &Carer,
    container: &Arc<Container>,
    handler: &Handler,
    limit: Duration,
) -> Result<(), String> {
    let work = async {
        match handler {
            Handler::HttpGet(request) => {
                let status = http::get(carer.address.get(), request).await?;
                if (200..400).contains(&status) {
                    Ok(())
                } else {
                    Err(format!("HTTP probe failed with statuscode: {status}"))
                }
            }
            handler => attempt(carer, container, handler).await,
        }
    };
    match timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(match handler {
            Handler::Exec(command) => format!("command {:?} timed out after {limit:?}", command.join(" ")),
            _ => format!("no answer within {limit:?}"),
        }),
    }
}

/// Performs a hook. Of a request any answer will do.
///
/// # Errors
/// Why it failed, for people.
pub async fn perform_hook(carer: &Carer, container: &Arc<Container>, hook: &Handler) -> Result<(), String> {
    let work = async {
        match hook {
            Handler::HttpGet(request) => http::get_for_hook(carer.address.get(), request).await.map(drop),
            hook => attempt(carer, container, hook).await,
        }
    };
    timeout(HOOK_LIMIT, work)
        .await
        .unwrap_or_else(|_| Err(format!("not done within {HOOK_LIMIT:?}")))
}

async fn attempt(carer: &Carer, container: &Arc<Container>, handler: &Handler) -> Result<(), String> {
    let own = carer.address.get();
    match handler {
        Handler::Exec(command) => {
            let output = container
                .run_command(&carer.reaper, command)
                .await
                .map_err(|error| crate::log::chain(&error))?;
            if output.status == 0 {
                return Ok(());
            }
            let mut shown = String::from_utf8_lossy(&output.text).trim().to_owned();
            shown.truncate(shown.floor_char_boundary(SHOWN_BYTES));
            Err(if shown.is_empty() {
                format!("command {:?} exited with {}", command.join(" "), output.status)
            } else {
                shown
            })
        }
        Handler::TcpSocket { host, port } => {
            let address = SocketAddr::new(host.unwrap_or(own), *port);
            connect(address).await.map(drop)
        }
        Handler::Grpc { port, service } => grpc::check(SocketAddr::new(own, *port), service).await,
        Handler::Sleep(time) => {
            sleep(*time).await;
            Ok(())
        }
        Handler::HttpGet(_) => unreachable!("both callers have taken it"),
    }
}

/// Connects.
///
/// # Errors
/// Why not, for people.
pub(super) async fn connect(address: SocketAddr) -> Result<TcpStream, String> {
    TcpStream::connect(address)
        .await
        .map_err(|error| format!("dial tcp {address}: connect: {error}"))
}
