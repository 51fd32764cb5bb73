//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Container groups, each in a microVM of its own, on this host.
///
/// GROUP is a group's name, NAMESPACE/NAME, its id, or the beginning of the id.
#[derive(Debug, Parser)]
#[command(name = "ecictl", version, disable_help_subcommand = true)]
pub(super) struct Cli {
    /// Socket of the agent
    #[arg(
        long,
        global = true,
        env = "ECICTL_SOCKET",
        hide_env_values = true,
        default_value = "/run/eci-agent/agent.sock",
        value_name = "PATH"
    )]
    pub(super) socket: PathBuf,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Create a group from a file and wait until it runs
    Create(CreateArgs),
    /// List groups
    #[command(visible_alias = "ls")]
    Ps(PsArgs),
    /// Show a group in full
    Describe(DescribeArgs),
    /// Print a container's log
    Logs(LogsArgs),
    /// Run a command in a container; ends with the command's exit code, or 125 if it can't be run
    Exec(ExecArgs),
    /// Show what groups use now
    Top(TopArgs),
    /// Show what happened to groups
    Events(EventsArgs),
    /// End all containers of groups and start them again, in the same sandbox
    Restart {
        /// The groups
        #[arg(required = true, value_name = "GROUP")]
        groups: Vec<String>,
    },
    /// Make a group what a file says, and wait until it runs; what does not change runs on
    Update(UpdateArgs),
    /// Grow a volume of a running group that is a disk, and its file system
    Resize {
        /// The group
        group: String,
        /// The volume
        volume: String,
        /// Its new size, GiB
        gib: u32,
    },
    /// Delete groups and wait until they are gone
    #[command(visible_alias = "delete")]
    Rm(RmArgs),
    /// Snapshots of running groups
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make groups that go on from a snapshot, and wait until they run
    Restore(RestoreArgs),
    /// Make groups that go on from where a running group is now, which goes on too, and wait until they run
    Fork(ForkArgs),
    /// Images on this host
    #[command(subcommand)]
    Image(ImageCommand),
    /// Disks on this host, also those that groups have left
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the versions of ecictl and the agent
    Version,
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// A Kubernetes Pod (YAML or JSON), or an ECI CreateContainerGroup request (JSON); - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub(super) file: PathBuf,
    /// Print the id once the group is accepted, without waiting until it runs
    #[arg(long)]
    pub(super) no_wait: bool,
    /// Stop waiting after so many seconds; the group goes on starting
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(super) timeout: u64,
    /// Print nothing but the id
    #[arg(short, long)]
    pub(super) quiet: bool,
}

#[derive(Debug, Args)]
pub(super) struct UpdateArgs {
    /// The group
    pub(super) group: String,
    #[command(flatten)]
    pub(super) create: CreateArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub(super) struct PsArgs {
    /// Also groups that ended
    #[arg(short, long)]
    pub(super) all: bool,
    /// Form of the output
    #[arg(short, long, value_enum, default_value = "table")]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
pub(super) struct DescribeArgs {
    /// The group
    pub(super) group: String,
    /// Form of the output
    #[arg(short, long, value_enum, default_value = "table")]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    /// The group
    pub(super) group: String,
    /// The container; the first one by default
    #[arg(short, long)]
    pub(super) container: Option<String>,
    /// Go on as lines are written
    #[arg(short, long)]
    pub(super) follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    pub(super) tail: Option<u64>,
    /// Only lines after a time (2026-01-01T00:00:00Z) or not older than a duration (90s, 5m, 2h)
    #[arg(long, value_name = "TIME")]
    pub(super) since: Option<String>,
    /// Put the time before each line
    #[arg(short, long)]
    pub(super) timestamps: bool,
    /// The run before the last restart
    #[arg(short, long)]
    pub(super) previous: bool,
}

#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// Pass standard input on
    #[arg(short = 'i', long)]
    pub(super) stdin: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(super) tty: bool,
    /// The container; the first one by default
    #[arg(short, long)]
    pub(super) container: Option<String>,
    /// The group
    pub(super) group: String,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// The groups; all running ones by default
    #[arg(value_name = "GROUP")]
    pub(super) groups: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// The group; all by default
    pub(super) group: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// The groups
    #[arg(required = true, value_name = "GROUP")]
    pub(super) groups: Vec<String>,
    /// End the processes at once; a group that does not exist is no error
    #[arg(short, long, conflicts_with = "grace")]
    pub(super) force: bool,
    /// Seconds between SIGTERM and SIGKILL; the group's own by default
    #[arg(long, value_name = "SECONDS")]
    pub(super) grace: Option<u64>,
    /// Do not wait until the groups are gone
    #[arg(long)]
    pub(super) no_wait: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum SnapshotCommand {
    /// Take a snapshot of a running group, which goes on; prints its id
    Create {
        /// The group
        group: String,
    },
    /// List snapshots
    Ls {
        /// Form of the output
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Remove snapshots; groups that were made from them stay
    Rm {
        /// Ids of snapshots
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(super) struct NewGroups {
    /// How many groups
    #[arg(short = 'n', long, default_value_t = 1)]
    pub(super) count: u32,
    /// Name of the group, or with several of them what their names begin with
    #[arg(long)]
    pub(super) name: Option<String>,
    /// The namespace that the groups are expected in; snapshots are restored in their own only
    #[arg(long)]
    pub(super) namespace: Option<String>,
    /// Print the ids once the groups are accepted, without waiting until they run
    #[arg(long)]
    pub(super) no_wait: bool,
    /// Stop waiting after so many seconds; the groups go on starting
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(super) timeout: u64,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// Id of the snapshot
    pub(super) snapshot: String,
    #[command(flatten)]
    pub(super) groups: NewGroups,
}

#[derive(Debug, Args)]
pub(super) struct ForkArgs {
    /// The group
    pub(super) group: String,
    #[command(flatten)]
    pub(super) groups: NewGroups,
}

#[derive(Debug, Subcommand)]
pub(super) enum DiskCommand {
    /// List disks and the groups that have them
    Ls {
        /// Form of the output
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Delete disks that no group has, with all that is on them
    Rm {
        /// Ids of disks
        #[arg(required = true, value_name = "DISK")]
        disks: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// Pull an image
    Pull {
        /// Image reference
        reference: String,
        /// Only when it is not on this host
        #[arg(long)]
        if_not_present: bool,
        /// User of the registry
        #[arg(long, requires = "password_stdin")]
        username: Option<String>,
        /// Read the registry's password from standard input
        #[arg(long, requires = "username")]
        password_stdin: bool,
    },
    /// List images
    Ls {
        /// Form of the output
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Remove images
    Rm {
        /// Image references
        #[arg(required = true, value_name = "REFERENCE")]
        references: Vec<String>,
    },
}
