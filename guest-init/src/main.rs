//! PID 1 of the guest: the boot order.
#![deny(unsafe_code)]

use std::{fs, os::fd::OwnedFd};

use guest_init::{
    boot::{
        self,
        cmdline::{Mode, Options},
    },
    error::{Context, Result},
    log, reclaim,
    sandbox::{Config, Sandbox},
    service,
};
use protocol::{GUEST_API_PORT, READY_PORT, STDIO_PORT};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream};

fn main() {
    if std::process::id() != 1 {
        eprintln!("eci-guest-init is the init of a microVM: it runs as process 1 only");
        std::process::exit(2);
    }
    boot::end_guest_on_panic();
    if let Err(error) = run() {
        boot::print(&format!("eci: init failed: {}", log::chain(&error)));
    }
    boot::power_off();
}

fn run() -> Result<()> {
    boot::mounts::enter_root()?;
    let options =
        Options::parse(&fs::read_to_string("/proc/cmdline").context(|| "read the kernel's command line")?);
    if options.mode == Mode::Bench {
        boot::print("eci: init ready");
        return Ok(());
    }
    boot::protect_from_oom().context(|| "protect the init from the OOM killer")?;
    boot::limits::lift()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the event loop")?;
    runtime.block_on(async {
        let sandbox = Sandbox::start(Config::of_guest()?)?;
        reclaim::start(sandbox.containers_cgroup());
        let api = format!("vsock://-1:{GUEST_API_PORT}");
        let server = service::serve(sandbox, &api, listen(STDIO_PORT)?).await?;
        tell_host().context(|| "tell the host that the guest is ready")?;
        std::future::pending::<()>().await;
        drop(server);
        Ok(())
    })
}

fn listen(port: u32) -> Result<OwnedFd> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)
        .context(|| format!("listen on vsock port {port}"))?;
    Ok(listener.into())
}

/// Connects to the host and closes the connection again: see `protocol/protos/guest.proto`.
fn tell_host() -> std::io::Result<()> {
    VsockStream::connect_with_cid_port(VMADDR_CID_HOST, READY_PORT).map(drop)
}
