//! Groups whose network is made by CNI plugins: Debian's, as they are installed.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tests::{
    host::{Host, OPEN_PORT},
    registry::free_address,
    stage::Stage,
};

use super::network::{
    CLOSED_PORT, SECURITY_GROUP_ANNOTATION, create, curl, ensure_fetches, ip_of, run, said, server,
};

/// The network's bridge and its address.
const BRIDGE: &str = "cnicases0";
const GATEWAY: &str = "10.66.0.1";
/// Where Debian's plugins are.
const PLUGINS: &str = "/usr/lib/cni";
/// For a plugin to be called, also on an emulated host.
const LIMIT: Duration = Duration::from_secs(60);

/// The files of this case.
struct Files {
    conf: PathBuf,
    leases: PathBuf,
    hold: PathBuf,
    held: PathBuf,
}

impl Files {
    /// A network of a bridge, leases and ports, whose last plugin answers ADD late where there is a file `hold`: it has done its work
    /// by then, and leaves a file `held`.
    fn write(host: &Host) -> Result<Self> {
        let dir = host.cni_dir();
        let files = Self {
            conf: dir.join("net.d/10-cases.conflist"),
            leases: dir.join("leases/cases"),
            hold: dir.join("hold"),
            held: dir.join("held"),
        };
        for dir in ["net.d", "bin"] {
            fs::create_dir_all(host.cni_dir().join(dir)).context("make a directory for CNI")?;
        }
        let conf = json!({ "cniVersion": "1.0.0", "name": "cases", "plugins": [
            { "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipam": {
                "type": "host-local", "dataDir": dir.join("leases"),
                "ranges": [[{ "subnet": "10.66.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }],
            } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ] });
        fs::write(&files.conf, conf.to_string()).context("write a network")?;
        let (hold, held) = (files.hold.display(), files.held.display());
        let script = format!(
            "#!/bin/sh\nout=$({PLUGINS}/portmap) || {{ echo \"$out\"; exit 1; }}\n\
             if [ $CNI_COMMAND = ADD ] && [ -e {hold} ]; then\n  echo > {held}\n  while [ -e {hold} ]; do sleep 0.1; done\nfi\n\
             echo \"$out\"\n"
        );
        let wrapper = dir.join("bin/portmap");
        fs::write(&wrapper, script).context("write a plugin")?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).context("make a plugin run")?;
        Ok(files)
    }

    fn remove(&self, host: &Host) -> Result<()> {
        fs::remove_dir_all(host.cni_dir()).context("remove the files of CNI")?;
        let left = "iptables -t nat -S; ip6tables -t nat -S";
        let rules = run(left)?.success()?;
        ensure!(!rules.contains("CNI-DN-"), "ports still lead somewhere:\n{rules}");
        run(&format!(
            "ip link del {BRIDGE}; for family in ip ip6; do nft delete table $family nat 2>/dev/null || true; done"
        ))?
        .success()?;
        Ok(())
    }

    /// Addresses that are leased.
    fn leased(&self) -> Result<Vec<String>> {
        let mut names = names_in(&self.leases)?;
        names.retain(|name| name.starts_with("10."));
        Ok(names)
    }
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// Waits until somebody made a file.
fn await_file(path: &Path) -> Result<()> {
    let until = Instant::now() + LIMIT;
    while !path.exists() {
        ensure!(
            Instant::now() < until,
            "{} was not made within {LIMIT:?}",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// That there are so many groups in the network, and nothing else.
fn ensure_only(host: &Host, files: &Files, n: usize) -> Result<()> {
    let [state, run_dir, _] = host.dirs();
    let leased = files.leased()?;
    let (namespaces, records) = (names_in(&run_dir.join("netns"))?, names_in(&state.join("cni"))?);
    let ports = run(&format!("ip -o link show master {BRIDGE}"))?.success()?;
    ensure!(
        [
            leased.len(),
            namespaces.len(),
            records.len(),
            ports.lines().count()
        ] == [n; 4],
        "{n} groups have the addresses {leased:?}, the namespaces {namespaces:?}, the records {records:?}, and on the bridge\n{ports}"
    );
    Ok(())
}

pub(crate) fn groups_get_their_network_from_plugins(stage: &mut Stage) -> Result<()> {
    let files = Files::write(&stage.host)?;
    stage.host.kill_agent()?;
    stage.host.restart_agent()?;
    let result = in_the_network(stage, &files);
    fs::remove_file(&files.conf).context("remove a network")?;
    result?;
    stage.host.kill_agent()?;
    stage.host.restart_agent()?;
    files.remove(&stage.host)
}

fn in_the_network(stage: &mut Stage, files: &Files) -> Result<()> {
    let refused = server(stage, "refused", json!({}))
        .annotation(SECURITY_GROUP_ANNOTATION, "sg-open-port")
        .annotation("kubernetes.io/egress-bandwidth", "1M");
    stage.host.try_create(&refused)?.refused(
        1,
        &[
            "in the CNI network cases, where there are no security groups",
            "the CNI network cases has no plugin with the capability bandwidth",
        ],
    )?;

    // The agent is killed while plugins have done all, and said nothing yet.
    let host_port = free_address()?.port();
    let ports = json!({ "ports": [{ "containerPort": OPEN_PORT, "hostPort": host_port }] });
    fs::write(&files.hold, "").context("hold a plugin")?;
    let pod = server(stage, "first", ports);
    let accepted = stage
        .host
        .ecictl_with(&["create", "--no-wait", "-f", "-"], pod.manifest().as_bytes())?;
    accepted.success()?;
    await_file(&files.held)?;
    stage.host.kill_agent()?;
    fs::remove_file(&files.hold).context("let a plugin go")?;
    stage.host.restart_agent()?;
    let host = &stage.host;
    host.wait_group("first", "its start", |group| {
        group["status"]["phase"] == "Running"
    })?;
    let mut log = host.follow("first", "main")?;
    log.wait_line("its servers", |line| line == "serving")?;
    ensure_only(host, files, 1)?;

    let first = ip_of(host, "first")?;
    ensure!(files.leased()? == [first.as_str()], "the group has {first}");
    ensure!(first.starts_with("10.66.0."), "the group has {first}");
    let seen = said(
        host,
        "first",
        "ip -4 -o addr show dev eth0 | tr -s ' ' | cut -d ' ' -f 4",
    )?;
    ensure!(seen == format!("{first}/24"), "the guest has {seen}");
    for address in [format!("{first}:{CLOSED_PORT}"), format!("{GATEWAY}:{host_port}")] {
        let found = curl(&address)?.success()?;
        ensure!(found == "first\n", "the host gets {found:?} of {address}");
    }
    let answered = said(
        host,
        "first",
        &format!("ping -c 1 -W 10 {GATEWAY} | grep -c 'bytes from'"),
    )?;
    ensure!(answered == "1", "the host answers {answered:?}");

    let second = create(host, &server(stage, "second", json!({})))?;
    ensure_fetches(host, "first", &[(&second, CLOSED_PORT, "second")])?;
    host.ecictl(&["fork", "--name", "clone", "second"])?.success()?;
    let clone = ip_of(host, "clone")?;
    ensure!(clone != second, "the clone has its parent's address");
    ensure_fetches(
        host,
        "first",
        &[(&clone, CLOSED_PORT, "second"), (&second, CLOSED_PORT, "second")],
    )?;
    ensure_only(host, files, 3)?;

    stage.host.kill_agent()?;
    stage.host.restart_agent()?;
    let host = &stage.host;
    ensure!(ip_of(host, "first")? == first);
    let found = curl(&format!("{GATEWAY}:{host_port}"))?.success()?;
    ensure!(found == "first\n", "the host gets {found:?} of a new agent");
    for group in ["first", "second", "clone"] {
        host.remove(group)?;
    }
    ensure_only(host, files, 0)
}
