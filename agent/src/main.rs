//! Wiring only: command line, configuration, log, then the engine and its doors until a signal ends the process.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use agent::{
    api::Doors,
    check,
    config::{Config, LogConfig, LogFormat},
    host::{Host, StoreImages},
    image::ImageStore,
    profile, tuning,
};
use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// The daemon of an Elastic Container Instance host: runs container groups in microVMs.
#[derive(Debug, Parser)]
#[command(name = "eci-agent", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves until SIGTERM or SIGINT; groups live on without the agent.
    Serve {
        #[command(flatten)]
        config: ConfigArgs,
        /// Prints the configuration in use as TOML, and ends.
        #[arg(long)]
        print_config: bool,
    },
    /// Says whether this host can run groups, and what to do where it can't. Exit code 1 when it can't.
    Check {
        #[command(flatten)]
        config: ConfigArgs,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Sets this host up for fast starts, as `serve` does, and ends. It lasts until the host is restarted.
    Tune,
    /// Removes bridge and firewall rules of a host that is no longer used; refuses while there are groups.
    Cleanup {
        #[command(flatten)]
        config: ConfigArgs,
    },
}

#[derive(Debug, Args)]
struct ConfigArgs {
    /// Configuration file (TOML); every field has a default. Variables `ECI_AGENT_<TABLE>__<FIELD>` override it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigArgs {
    fn load(&self) -> anyhow::Result<Config> {
        let config = Config::load(self.config.as_deref(), std::env::vars())?;
        let executable = std::env::current_exe().context("find this executable")?;
        let system = rustix::system::uname();
        Ok(config.with_host(&executable, &system.nodename().to_string_lossy()))
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("eci-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Serve { config, print_config } => {
            let config = config.load()?;
            if print_config {
                print!("{}", config.to_toml());
                return Ok(ExitCode::SUCCESS);
            }
            let checks = check::run(&config);
            if !check::usable(&checks) {
                eprint!("{}", check::table(&checks));
                anyhow::bail!("this host can't run container groups: see the lines marked FAIL");
            }
            start_log(&config.log)?;
            profile::install().context("collect metrics")?;
            runtime()?.block_on(serve(config))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Check { config, json } => {
            let checks = check::run(&config.load()?);
            if json {
                println!(
                    "{}",
                    serde_json::to_string_pretty(&checks).context("encode the checks")?
                );
            } else {
                print!("{}", check::table(&checks));
            }
            Ok(if check::usable(&checks) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Tune => {
            let changed = tuning::make_moves_fast().context("make moves between cgroups fast")?;
            println!(
                "cgroups are mounted with favordynmods{}",
                if changed { " now" } else { " already" }
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Cleanup { config } => {
            let config = config.load()?;
            start_log(&config.log)?;
            runtime()?.block_on(cleanup(config))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the async runtime")
}

fn start_log(config: &LogConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.filter).with_context(|| {
        format!(
            "log.filter is {:?}: give a filter such as info or agent=debug",
            config.filter
        )
    })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match config.format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    if config.sandbox.fast_cgroup_moves {
        match tuning::make_moves_fast() {
            Ok(changed) => tracing::debug!(changed, "moves between cgroups are fast"),
            // Worth no refusal: what is lost is some time at each start.
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "moves between cgroups stay slow, and so do starts"
            ),
        }
    }
    let host = Arc::new(open(config.clone()).await?);
    let doors = Doors::bind(&config, Arc::clone(&host) as _).await?;
    tracing::info!(node_name = config.node_name, "serving");
    let shutdown = CancellationToken::new();
    let serving = tokio::spawn(doors.serve(shutdown.clone()));
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending; container groups live on");
    shutdown.cancel();
    serving.await.context("end the doors")?;
    host.shutdown().await;
    Ok(())
}

async fn open(config: Config) -> anyhow::Result<Host> {
    let (dir, images) = (config.state_dir.join("images"), config.image.clone());
    let store = tokio::task::spawn_blocking(move || ImageStore::open(&dir, images))
        .await
        .context("open the image store")??;
    Host::open(config, Arc::new(StoreImages::new(store)))
        .await
        .map_err(|error| anyhow::anyhow!("{}", error.chain()))
}

async fn cleanup(config: Config) -> anyhow::Result<()> {
    use agent::engine::Engine;
    let host = open(config).await?;
    let groups = host.list().await.len();
    anyhow::ensure!(
        groups == 0,
        "this host has {groups} container groups: remove them first (ecictl rm)"
    );
    host.shutdown().await;
    Ok(())
}
