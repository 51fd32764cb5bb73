//! A running agent with a configuration of its own, and what one does with it: through `ecictl`, as users do.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;

use crate::{
    pod::Pod,
    process::{self, Background, Finished},
    product::Product,
    registry::free_address,
};

/// AccessKey id that port 111 knows.
pub const KEY_ID: &str = "system-test";
/// Its secret.
pub const KEY_SECRET: &str = "system-test-secret";
/// Bearer token that port 10250 knows.
pub const TOKEN: &str = "system-test-token";

/// A security group whose members anybody reaches at [`OPEN_PORT`].
pub const SECURITY_GROUP: &str = "sg-open-port";
/// That port.
pub const OPEN_PORT: u16 = 8080;
/// A security group whose members reach nothing but that port of members of [`SECURITY_GROUP`].
pub const SILENT_GROUP: &str = "sg-silent";

/// Which groups of a host go on from templates instead of booting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Templates {
    /// None.
    Off,
    /// Those of one small container: a single template, made in the background after the first such group.
    OfSmallGroups,
    /// The same, and one sandbox of each shape stands by.
    WithStandby,
}

impl Templates {
    /// The smallest size of a group and what its guest needs beside, MiB. The next larger size is far above.
    const SMALL_MIB: u32 = 640;

    fn config(self) -> String {
        match self {
            Self::Off => "enabled = false\n\n[standby]\nper_shape = 0".to_owned(),
            Self::OfSmallGroups => {
                format!("max_memory_mib = {}\n\n[standby]\nper_shape = 0", Self::SMALL_MIB)
            }
            Self::WithStandby => format!("max_memory_mib = {}\n\n[standby]\nper_shape = 1", Self::SMALL_MIB),
        }
    }
}

/// A host of container groups. Its agent is killed when this is dropped; [`Host::stop`] ends it well.
#[derive(Debug)]
pub struct Host {
    product: Product,
    dir: PathBuf,
    state_dir: PathBuf,
    eci: SocketAddr,
    kubelet: SocketAddr,
    agent: Background,
}

impl Host {
    /// Starts an agent with its files below `dir` and its durable state in `state_dir`, that speaks plain HTTP with this
    /// registry. Waits until it serves.
    ///
    /// # Errors
    /// It does not serve; the message has its log.
    pub fn start(
        product: &Product,
        dir: &Path,
        state_dir: &Path,
        registry: &str,
        templates: Templates,
    ) -> Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("make {}", dir.display()))?;
        let (eci, kubelet, readonly) = (free_address()?, free_address()?, free_address()?);
        let config = format!(
            r#"
state_dir = "{state}"
run_dir = "{run}"
node_name = "system-test"

[log]
filter = "info"

[files]
kernel = "{kernel}"
initrd = "{initrd}"

[sandbox]
scratch_gib = 1
cgroup_root = "/sys/fs/cgroup/eci-system-test"

[allow]
privileged = true
host_path = true
host_network = true
host_pid = true
unsafe_sysctls = ["net.core.*", "vm.max_map_count"]
# A group that was made larger, and its fork, are promised more than a small host has.
[capacity]
memory_overcommit = 2.0

[template]
{templates}

[network]
bridge = "ecitest0"
subnet = "10.88.0.0/16"
subnet6 = "fd00:88::/64"

[network.cni]
conf_dir = "{cni}/net.d"
bin_dirs = ["{cni}/bin", "/usr/lib/cni"]

[image]
insecure_registries = ["{registry}"]

[eci]
listen = "{eci}"
access_keys = [{{ id = "{KEY_ID}", secret = "{KEY_SECRET}" }}]

[kubelet]
listen = "{kubelet}"
bearer_tokens = ["{TOKEN}"]

[readonly]
listen = "{readonly}"

[[security_group]]
id = "{SECURITY_GROUP}"

[[security_group.ingress]]
protocol = "tcp"
ports = ["{OPEN_PORT}"]
peers = ["0.0.0.0/0"]

[[security_group]]
id = "{SILENT_GROUP}"
egress = [{{ protocol = "tcp", ports = ["{OPEN_PORT}"], peers = ["{SECURITY_GROUP}"] }}]

[[security_group]]
id = "sg-six"

[[security_group.ingress]]
protocol = "tcp"
ports = ["{OPEN_PORT}"]
peers = ["fd00:88::1", "fd00:99::/64", "sg-six-friends"]

[[security_group]]
id = "sg-six-friends"
"#,
            state = state_dir.display(),
            run = dir.join("run").display(),
            cni = dir.join("cni").display(),
            kernel = product.guest.join("vmlinux").display(),
            initrd = product.guest.join("initramfs.cpio").display(),
            templates = templates.config(),
        );
        let path = dir.join("agent.toml");
        fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
        Ok(Self {
            agent: start_agent(product, dir)?,
            product: product.clone(),
            dir: dir.to_owned(),
            state_dir: state_dir.to_owned(),
            eci,
            kubelet,
        })
    }

    /// Kills the agent as a crash would, while its groups go on.
    ///
    /// # Errors
    /// It had ended already.
    pub fn kill_agent(&mut self) -> Result<()> {
        self.agent.signal(Signal::KILL)?;
        let (code, _) = self.agent.wait_end()?;
        ensure!(code == 137, "the agent ended with {code} before it was killed");
        Ok(())
    }

    /// Starts an agent where one was killed, and waits until it serves.
    ///
    /// # Errors
    /// It does not serve.
    pub fn restart_agent(&mut self) -> Result<()> {
        self.agent = start_agent(&self.product, &self.dir)?;
        Ok(())
    }

    /// Ends the agent the orderly way, for good.
    ///
    /// # Errors
    /// It ends with anything but 0.
    pub fn stop(mut self) -> Result<()> {
        self.pause()
    }

    /// Ends the agent the orderly way, until [`Self::restart_agent`].
    ///
    /// # Errors
    /// It ends with anything but 0.
    pub fn pause(&mut self) -> Result<()> {
        self.agent.signal(Signal::TERM)?;
        let (code, lines) = self.agent.wait_end()?;
        ensure!(code == 0, "the agent ended with {code}:\n{}", lines.join("\n"));
        Ok(())
    }

    /// The agent's process.
    pub fn agent_id(&self) -> u32 {
        self.agent.id()
    }

    /// Waits for a line of the agent's log.
    ///
    /// # Errors
    /// There is none; the message has the end of the log.
    pub fn wait_log(&mut self, words: &str) -> Result<()> {
        self.agent
            .wait_line(words, |line| line.contains(words))
            .map(|_| ())
    }

    /// The end of the agent's log.
    pub fn last_log_lines(&self, n: usize) -> String {
        self.agent.last_lines(n)
    }

    /// The agent's descriptors.
    ///
    /// # Errors
    /// The agent has ended.
    pub fn agent_descriptors(&self) -> Result<usize> {
        let dir = format!("/proc/{}/fd", self.agent_id());
        Ok(fs::read_dir(&dir).with_context(|| format!("list {dir}"))?.count())
    }

    /// Where the agent and its shims keep files.
    pub fn dirs(&self) -> [PathBuf; 3] {
        [
            self.state_dir.clone(),
            self.dir.join("run"),
            socket_dir(&self.dir),
        ]
    }

    /// Where networks of CNI plugins and plugins of a test's own can be.
    pub fn cni_dir(&self) -> PathBuf {
        self.dir.join("cni")
    }

    /// The parent cgroup of its groups.
    pub fn cgroup_root(&self) -> PathBuf {
        PathBuf::from("/sys/fs/cgroup/eci-system-test")
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    /// Where port 111 is.
    pub fn eci(&self) -> SocketAddr {
        self.eci
    }

    /// Where port 10250 is.
    pub fn kubelet(&self) -> SocketAddr {
        self.kubelet
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("run/agent.sock")
    }

    fn ecictl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.product.program("ecictl"));
        command.args(arguments).env("ECICTL_SOCKET", self.socket());
        command
    }

    /// Runs `ecictl`.
    ///
    /// # Errors
    /// It does not end.
    pub fn ecictl(&self, arguments: &[&str]) -> Result<Finished> {
        process::run(&mut self.ecictl_command(arguments), b"")
    }

    /// Runs `ecictl` with this standard input.
    ///
    /// # Errors
    /// It does not end.
    pub fn ecictl_with(&self, arguments: &[&str], input: &[u8]) -> Result<Finished> {
        process::run(&mut self.ecictl_command(arguments), input)
    }

    /// Tries to create a group.
    ///
    /// # Errors
    /// `ecictl` does not end.
    pub fn try_create(&self, pod: &Pod) -> Result<Finished> {
        self.ecictl_with(&["create", "-f", "-"], pod.manifest().as_bytes())
    }

    /// Creates a group, which runs then.
    ///
    /// # Errors
    /// It does not run.
    pub fn create(&self, pod: &Pod) -> Result<()> {
        let created = self.try_create(pod)?.success();
        created
            .map(|_| ())
            .with_context(|| format!("create {}", pod.name()))
    }

    /// Deletes groups at once.
    ///
    /// # Errors
    /// One is not gone.
    pub fn remove(&self, group: &str) -> Result<()> {
        let removed = self.ecictl(&["rm", "--grace", "0", group])?.success();
        removed.map(|_| ()).with_context(|| format!("delete {group}"))
    }

    /// A group, as `ecictl describe` has it.
    ///
    /// # Errors
    /// There is no such group.
    pub fn group(&self, group: &str) -> Result<Value> {
        let text = self.ecictl(&["describe", "-o", "json", group])?.success()?;
        serde_json::from_str(&text).with_context(|| format!("parse {text:?}"))
    }

    /// The names of all groups.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn group_names(&self) -> Result<Vec<String>> {
        let text = self.ecictl(&["ps", "-a", "-o", "json"])?.success()?;
        let groups: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("parse {text:?}"))?;
        let names = groups.iter().map(|group| group["spec"]["name"].as_str());
        names
            .map(|name| name.map(str::to_owned).context("a group has no name"))
            .collect()
    }

    /// Waits for a state of a group, by the agent's own notice of each change.
    ///
    /// # Errors
    /// The group does not come to it.
    pub fn wait_group(&self, group: &str, what: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut watch = Background::start(
            Command::new("curl")
                .args(["--silent", "--show-error", "--no-buffer", "--unix-socket"])
                .arg(self.socket())
                .arg(format!("http://agent/v1/groups/{group}/watch")),
        )?;
        let line = watch.wait_line(what, |line| {
            serde_json::from_str(line).is_ok_and(|group| fits(&group))
        })?;
        serde_json::from_str(&line).context("parse a group")
    }

    /// Follows a container's log.
    ///
    /// # Errors
    /// `ecictl` can't be started.
    pub fn follow(&self, group: &str, container: &str) -> Result<Background> {
        Background::start(&mut self.ecictl_command(&["logs", "-f", "-c", container, group]))
    }

    /// Runs a command in a container.
    ///
    /// # Errors
    /// `ecictl` does not end.
    pub fn exec(&self, group: &str, container: &str, command: &[&str]) -> Result<Finished> {
        self.ecictl(&exec_arguments(&[], group, container, command))
    }

    /// Runs a command in a container with this standard input.
    ///
    /// # Errors
    /// `ecictl` does not end.
    pub fn exec_with(
        &self,
        group: &str,
        container: &str,
        command: &[&str],
        input: &[u8],
    ) -> Result<Finished> {
        self.ecictl_with(&exec_arguments(&["-i"], group, container, command), input)
    }

    /// The processes of all VMMs of this host, its groups' or not.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn vmms(&self) -> Result<BTreeSet<i32>> {
        let processes = fs::read_dir("/proc").context("list /proc")?.flatten();
        // Any may end while this looks.
        let is_vmm = |entry: &fs::DirEntry| {
            fs::read_to_string(entry.path().join("comm")).is_ok_and(|program| program.trim() == "eci-vmm")
        };
        let ids = processes.filter(is_vmm);
        Ok(ids
            .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
            .collect())
    }

    /// The process of a group's VMM and of its shim, as the shim wrote them down.
    ///
    /// # Errors
    /// It does not run.
    pub fn processes_of(&self, group: &str) -> Result<GroupProcesses> {
        let group = self.group(group)?;
        let id = group["id"].as_str().context("a group has no id")?.to_owned();
        let mut found = GroupProcesses::default();
        for entry in fs::read_dir("/proc").context("list /proc")?.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
                continue;
            };
            // Any may end while this looks.
            let (Ok(program), Ok(cgroup), Ok(arguments)) = (
                fs::read_to_string(entry.path().join("comm")),
                fs::read_to_string(entry.path().join("cgroup")),
                fs::read_to_string(entry.path().join("cmdline")),
            ) else {
                continue;
            };
            match program.trim() {
                "eci-vmm" if cgroup.contains(&id) || arguments.contains(&id) => found.vmm = pid,
                "containerd-shim" if arguments.contains(&id) => found.shim = pid,
                _ => {}
            }
        }
        if found.vmm == 0 || found.shim == 0 {
            bail!("{id} has not both a shim and a VMM: {found:?}");
        }
        Ok(found)
    }
}

/// The processes of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupProcesses {
    /// `eci-vmm`.
    pub vmm: i32,
    /// `containerd-shim-eci-v2`.
    pub shim: i32,
}

fn exec_arguments<'a>(
    options: &[&'a str],
    group: &'a str,
    container: &'a str,
    command: &[&'a str],
) -> Vec<&'a str> {
    let mut arguments = vec!["exec"];
    arguments.extend(options);
    arguments.extend(["-c", container, group, "--"]);
    arguments.extend(command);
    arguments
}

fn socket_dir(dir: &Path) -> PathBuf {
    dir.join("s")
}

fn start_agent(product: &Product, dir: &Path) -> Result<Background> {
    let mut agent = Background::start_daemon(
        Command::new(product.program("eci-agent"))
            .args(["serve", "--config"])
            .arg(dir.join("agent.toml"))
            .env("ECI_SHIM_SOCKET_DIR", socket_dir(dir)),
    )?;
    agent.wait_line("the agent to serve", |line| line.contains("serving"))?;
    Ok(agent)
}
