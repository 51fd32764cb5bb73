//! Groups in the network: who reaches whom, by which port, and how fast.

use std::{collections::BTreeSet, process::Command, time::Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::{
    host::{Host, OPEN_PORT, SILENT_GROUP},
    pod::Pod,
    process::{self, Background, Finished},
    registry::free_address,
    stage::Stage,
};

/// A port that no rule opens.
pub(super) const CLOSED_PORT: u16 = 8081;
pub(super) const SECURITY_GROUP_ANNOTATION: &str = "k8s.aliyun.com/eci-security-group";
/// Serves the group's name and a file of 1 MiB on both ports.
const SERVE: &str = "mkdir /srv; hostname > /srv/index.html; dd if=/dev/zero of=/srv/big bs=64k count=16 2>/dev/null; \
                     for p in 8080 8081; do busybox httpd -p $p -h /srv; done; echo serving; sleep 100000 & wait";
/// What comes through comes far sooner, also on an emulated host; what does not is not waited for longer.
pub(super) const PATIENCE_SECONDS: u32 = 4;
/// The limit of the stranger's traffic in both directions.
const LIMIT: &str = "400k";
/// The same, bytes a second.
const LIMIT_BYTES: f64 = 50_000.0;
/// What may go at once beside: the larger bucket.
const BURST_BYTES: f64 = 131_072.0;

/// What `peer` is called, in its subdomain.
const PEER: &str = "peer.db.default.svc.cluster.local";

/// A group that serves, and may do with its own interface what it likes.
pub(super) fn server(stage: &Stage, name: &str, fields: Value) -> Pod {
    let mut all = json!({ "securityContext": { "capabilities": { "add": ["NET_ADMIN", "NET_RAW"] } } });
    if let (Value::Object(all), Value::Object(fields)) = (&mut all, fields) {
        all.extend(fields);
    }
    Pod::new(name).container_with("main", &stage.tools(), SERVE, all)
}

pub(super) fn create(host: &Host, pod: &Pod) -> Result<String> {
    host.create(pod)?;
    let mut log = host.follow(pod.name(), "main")?;
    log.wait_line("its servers", |line| line == "serving")?;
    ip_of(host, pod.name())
}

pub(super) fn ip_of(host: &Host, group: &str) -> Result<String> {
    let group = host.group(group)?;
    let ip = group["status"]["ip"]
        .as_str()
        .context("the group has no address")?;
    Ok(ip.to_owned())
}

/// The tap of a group.
pub(super) fn tap_of(host: &Host, group: &str) -> Result<String> {
    let group = host.group(group)?;
    let id = group["id"].as_str().context("the group has no id")?;
    Ok(id.chars().take(15).collect())
}

/// What a shell command in a group says, whether it ends well or not.
pub(super) fn said(host: &Host, group: &str, script: &str) -> Result<String> {
    let finished = host.exec(group, "main", &["/bin/sh", "-c", script])?;
    Ok(finished.stdout.trim().to_owned())
}

/// That a group gets the names of these servers, or nothing.
pub(super) fn ensure_fetches(host: &Host, from: &str, expected: &[(&str, u16, &str)]) -> Result<()> {
    let request = r"printf 'GET / HTTP/1.0\r\n\r\n'";
    let fetch = |(ip, port, _): &(&str, u16, &str)| {
        format!(
            "{request} | timeout {PATIENCE_SECONDS} busybox nc {ip} {port} 2>/dev/null | tail -n 1; echo ';'; "
        )
    };
    let script: String = expected.iter().map(fetch).collect();
    let found = said(host, from, &script)?;
    let found: Vec<&str> = found.split_terminator(';').map(str::trim).collect();
    let wanted: Vec<&str> = expected.iter().map(|(_, _, name)| *name).collect();
    ensure!(found == wanted, "{from} gets {found:?} of {expected:?}");
    Ok(())
}

/// What the host itself gets.
pub(super) fn curl(address: &str) -> Result<Finished> {
    run(&format!(
        "curl -s --max-time {PATIENCE_SECONDS} http://{address}/"
    ))
}

pub(super) fn run(script: &str) -> Result<Finished> {
    process::run(Command::new("sh").args(["-ec", script]), b"")
}

/// The words of a list of rules, in whatever order elements come.
fn nft(arguments: &[&str]) -> Result<BTreeSet<String>> {
    let text = process::run(Command::new("nft").args(arguments), b"")?.success()?;
    let words = text.split([',', '\n']).map(|word| {
        let word = word.trim().trim_start_matches("elements = {");
        word.trim_end_matches('}').trim().to_owned()
    });
    Ok(words.filter(|word| !word.is_empty()).collect())
}

/// That this group and no other is a member of a security group.
pub(super) fn ensure_only_member(host: &Host, group: &str, security_group: &str) -> Result<()> {
    let ip = ip_of(host, group)?;
    let words = nft(&["list", "set", "bridge", "eci", security_group])?;
    let members: Vec<_> = words.iter().filter(|word| word.starts_with("10.")).collect();
    ensure!(members == [&ip], "the members are {words:?}, not {ip}");
    Ok(())
}

pub(crate) fn groups_are_reached_as_they_are_allowed(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let unknown =
        server(stage, "inside", json!({})).annotation(SECURITY_GROUP_ANNOTATION, "sg-open-port, sg-nowhere");
    host.try_create(&unknown)?.refused(
        1,
        &[
            "metadata.annotations[k8s.aliyun.com/eci-security-group]",
            "\"sg-nowhere\": no such security group",
            "valid: sg-open-port, sg-silent",
        ],
    )?;
    let host_port = free_address()?.port();
    let ports = json!({ "ports": [{ "containerPort": OPEN_PORT, "hostPort": host_port }] });
    let pod = server(stage, "inside", ports.clone())
        .annotation(SECURITY_GROUP_ANNOTATION, "sg-open-port, sg-silent");
    let inside = create(host, &pod)?;
    let pod = server(stage, "peer", json!({}))
        .spec(json!({ "subdomain": "db", "setHostnameAsFQDN": true }))
        .annotation(SECURITY_GROUP_ANNOTATION, SILENT_GROUP);
    let peer = create(host, &pod)?;
    let pod = server(stage, "stranger", json!({}))
        .annotation("kubernetes.io/ingress-bandwidth", LIMIT)
        .annotation("kubernetes.io/egress-bandwidth", LIMIT);
    let stranger = create(host, &pod)?;
    let described = host.ecictl(&["describe", "inside"])?.success()?;
    for words in [
        "Security    sg-open-port, sg-silent\n",
        &format!("8080/TCP (the host's {host_port})"),
    ] {
        ensure!(described.contains(words), "{words:?} is not in {described}");
    }
    let described = host.ecictl(&["describe", "stranger"])?.success()?;
    let line = said(host, "peer", &format!("grep ^{peer} /etc/hosts"))?;
    ensure!(
        line == format!("{peer}\t{PEER}\tpeer"),
        "its hosts file says {line:?}"
    );
    let words = "Bandwidth   400 kbit/s in, 400 kbit/s out\n";
    ensure!(described.contains(words), "{described}");

    ensure_fetches(
        host,
        "peer",
        &[
            // Members reach each other, whatever the rules; what rules do not name does not go out.
            (&inside, CLOSED_PORT, "inside"),
            (&stranger, CLOSED_PORT, ""),
        ],
    )?;
    ensure_fetches(
        host,
        "inside",
        &[
            (&peer, CLOSED_PORT, PEER),
            // Without such rules everything goes out, and is answered.
            (&stranger, CLOSED_PORT, "stranger"),
        ],
    )?;
    ensure_fetches(
        host,
        "stranger",
        &[
            (&inside, OPEN_PORT, "inside"),
            (&inside, CLOSED_PORT, ""),
            // Its way back goes through the host too.
            ("10.88.0.1", host_port, "inside"),
        ],
    )?;
    ensure_host_reaches(&inside, host_port)?;
    ensure_outside_reaches(&inside, host_port)?;
    ensure_port_is_taken(stage, host_port)?;
    ensure_nobody_passes_for(host, &peer, &inside)?;
    ensure_limited(host, &stranger, &inside)?;

    // A new agent finds the same.
    let rules = nft(&["--stateless", "list", "ruleset"])?;
    let limits = limits_of(host, "stranger")?;
    stage.host.kill_agent()?;
    stage.host.restart_agent()?;
    let host = &stage.host;
    let again = nft(&["--stateless", "list", "ruleset"])?;
    ensure!(rules == again, "the rules were {rules:?} and are {again:?}");
    ensure!(rules.contains(&inside), "{inside} is no member: {rules:?}");
    let limits_again = limits_of(host, "stranger")?;
    ensure!(limits == limits_again, "{limits} became {limits_again}");
    ensure_host_reaches(&inside, host_port)?;
    host.remove("peer")?;
    ensure_only_member(host, "inside", SILENT_GROUP)?;
    host.remove("inside")?;
    let gone = curl(&format!("127.0.0.1:{host_port}"))?;
    ensure!(gone.code == 7, "the host's port leads somewhere: {gone}");
    host.remove("stranger")
}

/// The host reaches what is open, directly and by its own port.
fn ensure_host_reaches(inside: &str, host_port: u16) -> Result<()> {
    for address in [
        format!("{inside}:{OPEN_PORT}"),
        format!("127.0.0.1:{host_port}"),
        format!("10.88.0.1:{host_port}"),
    ] {
        let found = curl(&address)?.success()?;
        ensure!(found == "inside\n", "the host gets {found:?} of {address}");
    }
    let closed = curl(&format!("{inside}:{CLOSED_PORT}"))?;
    // Its time was over.
    ensure!(closed.code == 28, "the host gets {closed}");
    Ok(())
}

/// Does something while there is a machine beside the host, on a link of its own, whose router is the host. Told is how to run
/// a command there.
pub(super) fn elsewhere(here: &str, there: &str, router: &str, act: impl FnOnce(&str)) -> Result<()> {
    let mut outside = Background::start(Command::new("unshare").args([
        "--net",
        "sh",
        "-c",
        "echo there; exec sleep 1000",
    ]))?;
    outside.wait_line("another network", |line| line == "there")?;
    let within = format!("nsenter --net=/proc/{}/ns/net", outside.id());
    // Only IPv6 knows the flag: it would wait to find out whether another has the address.
    let nodad = if here.contains(':') { "nodad" } else { "" };
    run(&format!(
        "ip link add eciout type veth peer name eciin netns {id}; ip addr add {here} dev eciout {nodad}; \
         ip link set eciout up; {within} ip addr add {there} dev eciin {nodad}; {within} ip link set eciin up; \
         {within} ip route add default via {router}",
        id = outside.id()
    ))?
    .success()?;
    act(&within);
    run("ip link del eciout")?.success()?;
    Ok(())
}

/// A machine beside the host reaches the port of the host, and no group.
fn ensure_outside_reaches(inside: &str, host_port: u16) -> Result<()> {
    let mut found: Vec<Result<Finished>> = Vec::new();
    elsewhere("10.99.0.1/24", "10.99.0.2/24", "10.99.0.1", |within| {
        for address in [format!("10.99.0.1:{host_port}"), format!("{inside}:{OPEN_PORT}")] {
            found.push(run(&format!(
                "{within} curl -s --max-time {PATIENCE_SECONDS} http://{address}/"
            )));
        }
    })?;
    let [led, straight] = <[_; 2]>::try_from(found).map_err(|_| anyhow::anyhow!("two were tried"))?;
    let (led, straight) = (led?.success()?, straight?);
    ensure!(
        led == "inside\n",
        "another machine gets {led:?} of the host's port"
    );
    ensure!(straight.code == 28, "another machine reaches a group: {straight}");
    Ok(())
}

/// Everybody who has a port that is wanted is named at once.
fn ensure_port_is_taken(stage: &Stage, host_port: u16) -> Result<()> {
    let registry = stage.registry.name();
    let (_, used) = registry.rsplit_once(':').context("the registry has no port")?;
    let used: u16 = used.parse().context("parse the registry's port")?;
    let ports = json!({ "ports": [
        { "containerPort": 1, "hostPort": host_port }, { "containerPort": 2, "hostPort": used },
    ] });
    stage.host.try_create(&server(stage, "late", ports))?.refused(
        1,
        &[
            "spec.containers[0].ports[0].hostPort",
            "container group default/inside",
            "spec.containers[0].ports[1].hostPort",
            "a program of the host has it",
        ],
    )
}

/// The stranger does not pass for a member: neither with datagrams nor with what it says about addresses.
fn ensure_nobody_passes_for(host: &Host, peer: &str, inside: &str) -> Result<()> {
    let look = format!(
        "awk '/^Icmp:/ {{n = $10}} END {{print n}}' /proc/net/snmp; ip neigh show {peer} | awk '{{print $5}}'"
    );
    let before = said(host, "inside", &look)?;
    let (pings, neighbour) = before.split_once('\n').context("read two lines")?;
    let pings: u64 = pings.parse().with_context(|| format!("parse {before:?}"))?;
    ensure!(neighbour.starts_with("02:ec:"), "its neighbour is {neighbour:?}");
    let pretend = format!(
        "ip addr add {peer}/16 dev eth0 && busybox arping -q -U -c 2 -I eth0 {peer}; \
         ping -c 2 -W 1 -I {peer} {inside} | grep -c 'bytes from'; ip addr del {peer}/16 dev eth0; echo done"
    );
    let pretended = said(host, "stranger", &pretend)?;
    ensure!(pretended == "0\ndone", "the stranger says {pretended:?}");
    let after = said(host, "inside", &look)?;
    ensure!(before == after, "{before:?} became {after:?}");
    // A member's own arrive.
    let answered = said(
        host,
        "peer",
        &format!("ping -c 1 -W 10 {inside} | grep -c 'bytes from'"),
    )?;
    let arrived = said(host, "inside", &look)?;
    let expected = format!("{}\n{neighbour}", pings + 1);
    ensure!(
        answered == "1" && arrived == expected,
        "{answered} answered, {before:?} became {arrived:?}"
    );
    Ok(())
}

/// What the kernel says about a tap's limits, without its counters.
fn limits_of(host: &Host, group: &str) -> Result<String> {
    let tap = tap_of(host, group)?;
    run(&format!(
        "tc qdisc show dev {tap}; tc filter show dev {tap} ingress"
    ))?
    .success()
}

/// Bytes a tap's shaper has let through to its guest, and how often it made one wait.
fn shaped(tap: &str) -> Result<(f64, u64)> {
    let text = run(&format!("tc -s -j qdisc show dev {tap} root"))?.success()?;
    let queues: Value = serde_json::from_str(&text).with_context(|| format!("parse {text:?}"))?;
    let number = |name: &str| {
        queues[0][name]
            .as_f64()
            .with_context(|| format!("{name} in {text}"))
    };
    Ok((
        number("bytes")?,
        queues[0]["overlimits"].as_u64().unwrap_or_default(),
    ))
}

/// In neither direction does the stranger's traffic exceed its limit, however long it takes here.
fn ensure_limited(host: &Host, stranger: &str, inside: &str) -> Result<()> {
    let allowed = |seconds: f64| BURST_BYTES + LIMIT_BYTES * seconds;
    let tap = tap_of(host, "stranger")?;

    let (before, began) = (shaped(&tap)?, Instant::now());
    let request = r"printf 'GET /big HTTP/1.0\r\n\r\n'";
    let count = said(
        host,
        "stranger",
        &format!("{request} | timeout 4 busybox nc {inside} {OPEN_PORT} | wc -c"),
    )?;
    let (after, seconds) = (shaped(&tap)?, began.elapsed().as_secs_f64());
    let (passed, waited) = (after.0 - before.0, after.1 - before.1);
    ensure!(
        passed <= allowed(seconds) && waited > 0 && passed > 10_000.0,
        "to the guest {passed} bytes in {seconds} s, {waited} waited, {count} arrived"
    );

    let url = format!("http://{stranger}:{CLOSED_PORT}/big");
    let line = run(&format!(
        "curl -s --max-time 4 -o /dev/null -w '%{{size_download}} %{{time_total}}' {url} || true"
    ))?
    .success()?;
    let (bytes, seconds) = line.split_once(' ').context("read two numbers")?;
    let (bytes, seconds): (f64, f64) = (bytes.parse()?, seconds.parse()?);
    ensure!(
        bytes <= allowed(seconds) && bytes > 10_000.0,
        "from the guest {bytes} bytes in {seconds} s"
    );
    let filter = run(&format!("tc -s filter show dev {tap} ingress"))?.success()?;
    let dropped = filter.contains("dropped") && !filter.contains("dropped 0,");
    ensure!(dropped, "nothing was held back: {filter}");
    eprintln!("to the guest {passed} bytes, {waited} waited; from it {line}");
    Ok(())
}
