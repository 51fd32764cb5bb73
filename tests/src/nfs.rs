//! A real NFS server that is another machine for the groups: the kernel's own, in a network namespace of its own, behind a
//! network that can go silent.
//!
//! There is no `rpc.mountd`: Debian's package brings `rpcbind`, which would take port 111 of the machine. What the kernel would
//! ask it is told beforehand (Linux, `Documentation/filesystems/nfs/rpc-cache.rst`; `net/sunrpc/svcauth_unix.c`,
//! `fs/nfsd/export.c`).

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::process::{self, Background};

/// The server's address.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 2);
/// An address in its network that nobody has.
pub const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 9);
/// This host's address in its network, which all groups seem to have.
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 1);
/// This host's end of the cable to it.
const LINK: &str = "eci-test-nfs";

/// Serves the directory `$1`, which is in memory, as `/`, to whoever seems to be `$2`. Version 4 alone needs no port mapper. For
/// the first 10 seconds, the least there can be, files are opened by those only that had them open before a restart; clients
/// ask again.
const SERVE: &str = r"
set -eu
ip link set lo up
mount -t tmpfs -o mode=755 export $1
mount -t nfsd nfsd /proc/fs/nfsd
never=2147483647
insecure_no_root_squash_no_subtree_check_fsid=9218
printf 'nfsd %s %s groups\n' $2 $never >/proc/net/rpc/auth.unix.ip/channel
printf 'groups %s %s %s 65534 65534 0\n' $1 $never $insecure_no_root_squash_no_subtree_check_fsid >/proc/net/rpc/nfsd.export/channel
printf 'groups 1 \\x00000000 %s %s\n' $never $1 >/proc/net/rpc/nfsd.fh/channel
cd /proc/fs/nfsd
echo '-2 -3 +4 +4.1 +4.2' >versions
echo 10 >nfsv4leasetime
echo 10 >nfsv4gracetime
echo 4 >threads
echo serving
exec sleep 100000
";

/// A server; it ends when this is dropped.
#[derive(Debug)]
pub struct NfsServer {
    export: PathBuf,
    process: Background,
}

impl NfsServer {
    /// Starts a server of an empty directory, which is made in `dir`. What is served is `/`, and below.
    ///
    /// # Errors
    /// The kernel has no NFS server, or it does not start.
    pub fn start(dir: &Path) -> Result<Self> {
        run("modprobe", &["nfsd"]).context(
            "this machine's kernel has no NFS server: load its module nfsd, or run `make setup`, whose kernel for the L1 \
             host has it",
        )?;
        let export = dir.join("nfs-export");
        fs::create_dir_all(&export).with_context(|| format!("make {}", export.display()))?;
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--mount", "sh", "-c", SERVE, "sh"])
            .arg(&export)
            .arg(CLIENT.to_string());
        let mut server = Self {
            export,
            process: Background::start(&mut command)?,
        };
        server
            .process
            .wait_line("the NFS server to serve", |line| line == "serving")?;
        server.connect()?;
        Ok(server)
    }

    fn connect(&self) -> Result<()> {
        let namespace = self.process.id().to_string();
        let ip = |arguments: &str| run("ip", &arguments.split(' ').collect::<Vec<_>>());
        ip(&format!(
            "link add {LINK} type veth peer name eth0 netns {namespace}"
        ))?;
        ip(&format!("addr add {CLIENT}/24 dev {LINK}"))?;
        ip(&format!("link set {LINK} up"))?;
        self.inside(&format!("ip addr add {SERVER}/24 dev eth0; ip link set eth0 up"))
    }

    /// Runs a script on the server.
    fn inside(&self, script: &str) -> Result<()> {
        let id = self.process.id().to_string();
        run(
            "nsenter",
            &["--target", &id, "--net", "--mount", "sh", "-ec", script],
        )
    }

    /// Loses all that is sent to it, or no longer.
    ///
    /// # Errors
    /// The rules can't be set.
    pub fn set_silent(&self, silent: bool) -> Result<()> {
        self.inside(if silent {
            "nft add table inet silence; nft add chain inet silence input '{ type filter hook input priority 0; policy drop; }'"
        } else {
            "nft delete table inet silence"
        })
    }

    /// The names of its clients, those that it has got to know.
    ///
    /// # Errors
    /// They can't be read.
    pub fn clients(&self) -> Result<BTreeSet<String>> {
        let dir = format!("/proc/{}/root/proc/fs/nfsd/clients", self.process.id());
        let mut names = BTreeSet::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("list {dir}"))? {
            let path = entry.with_context(|| format!("list {dir}"))?.path().join("info");
            let info = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            if info.lines().any(|line| line == "status: confirmed") {
                names.extend(
                    info.lines()
                        .find_map(|line| line.strip_prefix("name: "))
                        .map(str::to_owned),
                );
            }
        }
        Ok(names)
    }

    /// A file or directory as the server has it.
    pub fn path(&self, below: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.process.id()));
        root.join(self.export.strip_prefix("/").unwrap_or(&self.export))
            .join(below)
    }
}

impl Drop for NfsServer {
    fn drop(&mut self) {
        // The threads are the kernel's, and would keep the namespace.
        for ended in [
            self.inside("echo 0 >/proc/fs/nfsd/threads"),
            run("ip", &["link", "delete", LINK]),
        ] {
            if let Err(error) = ended {
                eprintln!("end the NFS server: {error:#}");
            }
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let ended = process::run(Command::new(program).args(arguments), b"")?;
    ensure!(ended.code == 0, "{program} {}: {ended}", arguments.join(" "));
    Ok(())
}
