//! `ecictl`: container groups on this host from a terminal. Talks to the agent's local socket.

mod args;
mod client;
mod create;
mod describe;
mod disks;
mod exec;
mod images;
mod list;
mod logs;
mod remove;
mod resize;
mod restart;
mod snapshots;
mod table;
mod terminal;
#[cfg(test)]
mod tests;
mod top;
mod update;

use std::{io, process::ExitCode};

use clap::{CommandFactory, Parser};

use self::{
    args::{Cli, Command},
    client::Client,
};

/// Exit code of `ecictl exec` when the command could not be run or its end is not known.
const EXEC_FAILED: u8 = 125;

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ecictl: Failed to start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let is_exec = matches!(cli.command, Command::Exec(_));
    let result = runtime.block_on(run(cli));
    // A thread that still waits for input must not hold the end up.
    runtime.shutdown_background();
    match result {
        Ok(code) => ExitCode::from(code),
        // The reader of our output went away (`| head`): not worth a word.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ecictl: {error:#}");
            ExitCode::from(if is_exec { EXEC_FAILED } else { 1 })
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

async fn run(cli: Cli) -> anyhow::Result<u8> {
    let client = Client::new(cli.socket);
    match cli.command {
        Command::Create(args) => create::run(&client, args).await,
        Command::Ps(args) => list::run(&client, &args).await,
        Command::Describe(args) => describe::run(&client, &args).await,
        Command::Logs(args) => logs::run(&client, &args).await,
        Command::Exec(args) => exec::run(&client, args).await,
        Command::Top(args) => top::run(&client, &args).await,
        Command::Events(args) => describe::events(&client, &args).await,
        Command::Resize { group, volume, gib } => resize::run(&client, &group, &volume, gib).await,
        Command::Update(args) => update::run(&client, args).await,
        Command::Restart { groups } => restart::run(&client, &groups).await,
        Command::Rm(args) => remove::run(&client, &args).await,
        Command::Snapshot(command) => snapshots::run(&client, command).await,
        Command::Restore(args) => snapshots::restore(&client, args).await,
        Command::Fork(args) => snapshots::fork(&client, args).await,
        Command::Image(command) => images::run(&client, command).await,
        Command::Disk(command) => disks::run(&client, command).await,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ecictl", &mut script);
            table::print(&script)?;
            Ok(0)
        }
        Command::Version => {
            let agent: crate::api::admin::wire::Version = client.get("/v1/version").await?;
            table::print(
                format!("ecictl {}\nagent  {}\n", env!("CARGO_PKG_VERSION"), agent.version).as_bytes(),
            )?;
            Ok(0)
        }
    }
}
