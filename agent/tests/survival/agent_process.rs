//! The agent and the shim, as the product makes them, without KVM, network and registry.

use std::{path::Path, process::ExitCode, sync::Arc};

use agent::{
    api::Doors,
    config::Config,
    engine::{ImageInfo, PullStatus},
    error::Result,
    group::{
        images::{Images, LocalImage},
        spec::{ContainerSpec, ImagePullPolicy, RegistryCredential},
    },
    host::Host,
    sandbox::{client::Rootfs, oci::ResolvedProcess},
};
use async_trait::async_trait;
use shim::{
    args::{Action, Args, SOCKET_DIR_ENV},
    delete, run,
    sandbox::steps::HostConfig,
    start,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::bench;

/// One image, which has whatever program a container names.
struct OneImage {
    file: String,
}

#[async_trait]
impl Images for OneImage {
    async fn pull(
        &self,
        _: &str,
        _: ImagePullPolicy,
        _: &[RegistryCredential],
        _: Option<mpsc::Sender<PullStatus>>,
    ) -> Result<LocalImage> {
        let resolve = |container: &ContainerSpec| {
            Ok(ResolvedProcess {
                args: container.command.clone(),
                image_env: Vec::new(),
                cwd: "/".to_owned(),
                uid: 0,
                gid: 0,
                additional_gids: Vec::new(),
            })
        };
        Ok(LocalImage {
            digest: format!("sha256:{}", "0".repeat(64)),
            was_present: true,
            rootfs: Rootfs {
                metadata: self.file.clone(),
                blobs: Vec::new(),
            },
            resolve: Box::new(resolve),
            lease: Box::new(()),
        })
    }

    async fn list(&self) -> Result<Vec<ImageInfo>> {
        Ok(Vec::new())
    }

    async fn remove(&self, _: &str) -> Result<()> {
        Ok(())
    }
}

fn config(dir: &Path) -> Config {
    let mut config = Config {
        state_dir: dir.join("state"),
        run_dir: dir.join("run"),
        ..Config::default()
    };
    config.sandbox.scratch_gib = 1;
    config.sandbox.cgroup_root = "".into();
    config.sandbox.fast_cgroup_moves = false;
    config.template.enabled = false;
    config.standby.per_shape = 0;
    config.network.enabled = false;
    config.capacity.reserved_memory_mib = 0;
    config.capacity.memory_overcommit = 100.0;
    config.admin.socket = dir.join("run/agent.sock");
    config.eci.enabled = false;
    config.kubelet.enabled = false;
    config.readonly.enabled = false;
    config.files.shim = dir.join(bench::SHIM);
    config.files.vmm = dir.join(bench::VMM);
    config.files.kernel = dir.join("kernel");
    config.files.initrd = dir.join("kernel");
    config.with_host(&dir.join("eci-agent"), "node")
}

/// Serves until it is killed.
pub(crate) fn agent(dir: &Path) -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter("agent=info,agent::store=trace")
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let config = config(dir);
        let images = OneImage {
            file: dir.join("image").to_str().unwrap().to_owned(),
        };
        let host = Host::open(config.clone(), Arc::new(images)).await.unwrap();
        let doors = Doors::bind(&config, Arc::new(host)).await.unwrap();
        println!("{}", bench::SERVING);
        doors.serve(CancellationToken::new()).await;
    });
    ExitCode::SUCCESS
}

/// The shim's program, with a host that has no KVM.
pub(crate) fn shim() -> ExitCode {
    let args = Args::parse(std::env::args().skip(1), std::env::var(SOCKET_DIR_ENV).ok()).unwrap();
    let done = match args.action {
        Action::Start => start::start(&args),
        Action::Delete => delete::delete(&args),
        Action::Run => run::run(
            &args,
            HostConfig {
                kvm_path: "/dev/null".into(),
                ..run::this_host()
            },
        ),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shim: {}", error.chain());
            ExitCode::FAILURE
        }
    }
}
