//! The server: what `start` leaves running.

use std::{os::unix::net::UnixListener, path::PathBuf, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tracing_subscriber::filter::LevelFilter;
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    args::Args,
    error::{Error, ErrorKind, Result},
    events::{ADDRESS_ENV, Publisher},
    persist::{ADDRESS_FILE, Bundle, SHIM_PID_FILE},
    resource::cgroup,
    sandbox::{SandboxHandle, steps::HostConfig},
    service, sys,
    vmm::launch_process,
};

/// From the VMM's start to a configured guest. Emulated hosts need seconds, others a tenth of one.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// For answers that are on their way when the shim ends.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);

/// What this host offers.
pub fn this_host() -> HostConfig {
    HostConfig {
        kvm_path: PathBuf::from("/dev/kvm"),
        start_timeout: START_TIMEOUT,
        launcher: std::sync::Arc::new(launch_process),
    }
}

/// Serves one sandbox on this host until it is told to end. The listening socket is descriptor 3.
///
/// # Errors
/// The server cannot be set up.
pub fn run(args: &Args, host: HostConfig) -> Result<()> {
    let listener = sys::take_passed_descriptor()
        .map(UnixListener::from)
        .map_err(|error| {
            Error::io(
                "take the listening socket from descriptor 3 (`start` passes it)",
                error,
            )
        })?;
    let level = if args.debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    cgroup::protect_self();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Log writers and file readers; each thread has a stack of its own.
        .max_blocking_threads(4)
        .thread_stack_size(256 * 1024)
        .build()
        .map_err(|error| Error::io("build the runtime", error))?;
    let bundle = Bundle::new(&args.bundle);
    let events_address = std::env::var(ADDRESS_ENV).ok();
    let socket = bundle.read_address();
    let served = runtime.block_on(async {
        let publisher = Publisher::new(events_address, args.namespace.clone());
        let handle = SandboxHandle::new(bundle.clone(), host, publisher);
        let server = serve(&args.id, listener, &handle).await?;
        tracing::info!(id = args.id, namespace = args.namespace, "shim serves");
        until_end(&handle).await?;
        goodbye(server).await;
        Ok(())
    });
    if let Some(path) = socket
        .as_deref()
        .and_then(|address| address.strip_prefix("unix://"))
    {
        // Gone already when `delete` was faster.
        let _ = std::fs::remove_file(path);
    }
    bundle.remove(ADDRESS_FILE);
    bundle.remove(SHIM_PID_FILE);
    tracing::info!("shim ends");
    served
}

/// Serves the sandbox on a listening socket.
///
/// # Errors
/// The socket cannot be polled.
pub async fn serve(id: &str, listener: UnixListener, handle: &SandboxHandle) -> Result<Server> {
    let listener =
        Listener::try_from(listener).map_err(|error| Error::io("poll the listening socket", error))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(service::services(id, handle));
    server
        .start()
        .await
        .map_err(|error| Error::with_source(ErrorKind::Internal, "serve", error))?;
    Ok(server)
}

/// Waits until a caller, or a signal, ends the shim; no VM is left then.
async fn until_end(handle: &SandboxHandle) -> Result<()> {
    let on = |kind| signal(kind).map_err(|error| Error::io("watch signals", error));
    let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
    tokio::select! {
        () = handle.shutdown_asked() => return Ok(()),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("asked to end by a signal");
    handle.shutdown().await
}

/// Ends the server after the answers that are on their way.
async fn goodbye(mut server: Server) {
    server.stop_listen().await;
    if timeout(GOODBYE_TIMEOUT, server.disconnect()).await.is_err() {
        tracing::debug!("a caller keeps its connection; it is cut");
    }
}
