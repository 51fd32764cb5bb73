//! Groups with IPv6 addresses: who has one, who reaches whom, and what nobody can pretend.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::{
    host::{Host, OPEN_PORT},
    process::Finished,
    registry::free_address,
    stage::Stage,
};

use super::network::{
    CLOSED_PORT, PATIENCE_SECONDS, SECURITY_GROUP_ANNOTATION, create, curl, elsewhere, ensure_fetches, run,
    said, server, tap_of,
};

/// The host's address in the groups' network, and its security groups (`tests/src/host.rs`).
const BRIDGE: &str = "fd00:88::1";
const SIX: &str = "sg-six";
const FRIENDS: &str = "sg-six-friends";
/// Of another machine, from where the rules of `sg-six` let in.
const OUTSIDE: (&str, &str) = ("fd00:99::1", "fd00:99::2");

/// Says on the link, with the source address of its own: a neighbour's address is mine, the router is me, and, as anybody may, where
/// is the bridge?
const FORGE: &str = r#"
use Socket qw(:all pack_sockaddr_in6 inet_pton);
my ($index, $stolen, $bridge) = @ARGV;
socket(my $s, AF_INET6, SOCK_RAW, 58) or die "socket: $!";
setsockopt($s, 41, $_, pack("i", 255)) or die "hops: $!" for (16, 18);
my $mac = pack("C8", 2, 1, 2, 0xec, 10, 88, 0, 99);
my $all = pack_sockaddr_in6(0, inet_pton(AF_INET6, "ff02::1"), $index);
my $advert = pack("CCnN", 136, 0, 0, 0x20000000) . inet_pton(AF_INET6, $stolen) . $mac;
my $router = pack("CCnCCnNN", 134, 0, 0, 64, 0, 1800, 0, 0);
my $solicit = pack("CCnN", 135, 0, 0, 0) . inet_pton(AF_INET6, $bridge);
for my $message ($advert, $router, $solicit) {
    send($s, $message, 0, $all) or die "send: $!";
}
"#;

fn ip6_of(host: &Host, group: &str) -> Result<Option<String>> {
    let group = host.group(group)?;
    Ok(group["status"]["ip6"].as_str().map(str::to_owned))
}

fn ip6(host: &Host, group: &str) -> Result<String> {
    ip6_of(host, group)?.with_context(|| format!("{group} has no IPv6 address"))
}

/// The global addresses that a group's guest uses.
fn seen_in(host: &Host, group: &str) -> Result<String> {
    said(
        host,
        group,
        "ip -6 -o addr show dev eth0 | grep -v fe80: | tr -s ' ' | cut -d ' ' -f 4",
    )
}

fn member(stage: &Stage, name: &str, security_group: &str, fields: Value) -> tests::pod::Pod {
    server(stage, name, fields).annotation(SECURITY_GROUP_ANNOTATION, security_group)
}

pub(crate) fn groups_speak_ipv6_as_they_are_allowed(stage: &mut Stage) -> Result<()> {
    let host = &stage.host;
    let host_port = free_address()?.port();
    let ports = json!({
        "ports": [{ "containerPort": OPEN_PORT, "hostPort": host_port }],
        "env": [{ "name": "IPS", "valueFrom": { "fieldRef": { "fieldPath": "status.podIPs" } } }],
    });
    let v4 = create(host, &member(stage, "inside", SIX, ports))?;
    create(host, &member(stage, "friend", FRIENDS, json!({})))?;
    create(host, &server(stage, "stranger", json!({})))?;
    let without = server(stage, "without", json!({})).annotation("k8s.aliyun.com/eci-enable-ipv6", "false");
    create(host, &without)?;

    let (inside, friend, stranger) = (ip6(host, "inside")?, ip6(host, "friend")?, ip6(host, "stranger")?);
    ensure!(inside.starts_with("fd00:88::a58:"), "its address is {inside}");
    ensure!(ip6_of(host, "without")?.is_none() && seen_in(host, "without")?.is_empty());
    let described = host.ecictl(&["describe", "inside"])?.success()?;
    let words = format!("Address     {v4}, {inside}\n");
    ensure!(described.contains(&words), "{words:?} is not in {described}");
    let lines = said(host, "inside", "grep inside$ /etc/hosts; echo $IPS")?;
    let expected = format!("{v4}\tinside\n{inside}\tinside\n{v4},{inside}");
    ensure!(lines == expected, "the group says {lines:?}");
    ensure!(seen_in(host, "inside")? == format!("{inside}/128"));

    ensure_fetches(
        host,
        "friend",
        &[
            (&inside, OPEN_PORT, "inside"),
            (&inside, CLOSED_PORT, ""),
            (&stranger, CLOSED_PORT, "stranger"),
            // By a port of the host, and back the same way.
            (BRIDGE, host_port, "inside"),
        ],
    )?;
    ensure_fetches(
        host,
        "stranger",
        &[
            (&inside, OPEN_PORT, ""),
            (BRIDGE, host_port, ""),
            (&friend, CLOSED_PORT, ""),
        ],
    )?;
    ensure_fetches(host, "inside", &[(&stranger, CLOSED_PORT, "stranger")])?;
    ensure_host_and_outside_reach(&inside, host_port)?;
    ensure_nobody_is_another(host, &inside, &friend)?;
    ensure_nothing_is_forged(host, &friend)?;
    ensure_a_clone_has_its_own(host, &stranger)?;

    // A new agent finds the same, and what is gone is gone.
    stage.host.kill_agent()?;
    stage.host.restart_agent()?;
    let host = &stage.host;
    ensure_fetches(host, "friend", &[(&inside, OPEN_PORT, "inside")])?;
    host.remove("inside")?;
    let gone = curl(&format!("[{BRIDGE}]:{host_port}"))?;
    ensure!(gone.code == 7, "the host's port leads somewhere: {gone}");
    let known = run("ip -6 neigh show nud permanent")?.success()?;
    ensure!(!known.contains(&inside) && known.contains(&friend), "{known}");
    host.remove("friend")?;
    host.remove("stranger")?;
    host.remove("without")
}

fn ensure_host_and_outside_reach(inside: &str, host_port: u16) -> Result<()> {
    let by_address = format!("[{inside}]:{OPEN_PORT}");
    for address in [&by_address, &format!("[{BRIDGE}]:{host_port}")] {
        let found = curl(address)?.success()?;
        ensure!(found == "inside\n", "the host gets {found:?} of {address}");
    }
    let closed = curl(&format!("[{inside}]:{CLOSED_PORT}"))?;
    ensure!(closed.code == 28, "the host gets {closed}");
    let (here, there) = OUTSIDE;
    let mut found: Vec<Result<Finished>> = Vec::new();
    elsewhere(&format!("{here}/64"), &format!("{there}/64"), here, |within| {
        for address in [format!("[{here}]:{host_port}"), by_address.clone()] {
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

/// The stranger does not pass for a friend, nor does a group without IPv6 take part.
fn ensure_nobody_is_another(host: &Host, inside: &str, friend: &str) -> Result<()> {
    let count = "awk '/^Icmp6InEchos / {print $2}' /proc/net/snmp6";
    let before: u64 = said(host, "inside", count)?.parse().context("parse a count")?;
    for group in ["stranger", "without"] {
        let pretend = format!(
            "ip -6 addr add {friend}/128 dev eth0; ip -6 route add default via {BRIDGE} dev eth0 onlink 2>/dev/null; \
             while ip -6 addr show dev eth0 | grep -q tentative; do :; done; \
             ping -6 -c 2 -W 1 -I {friend} {inside} | grep -c 'bytes from'; ip -6 addr del {friend}/128 dev eth0; echo done"
        );
        let pretended = said(host, group, &pretend)?;
        ensure!(pretended == "0\ndone", "{group} says {pretended:?}");
    }
    // A friend has no leave to ping, but a member's own packets do arrive: what is counted is what came through.
    let after: u64 = said(host, "inside", count)?.parse().context("parse a count")?;
    ensure!(before == after, "{} pings came through", after - before);
    let answered = said(
        host,
        "stranger",
        &format!("ping -6 -c 1 -W 10 {BRIDGE} | grep -c 'bytes from'"),
    )?;
    ensure!(answered == "1", "the stranger's own pings: {answered:?}");
    Ok(())
}

/// How often the host got ICMPv6 of these types on the groups' bridge.
fn received(types: &[u8]) -> Result<Vec<u64>> {
    let text = std::fs::read_to_string("/proc/net/dev_snmp6/ecitest0").context("read the host's counters")?;
    let count = |kind: &u8| {
        let name = format!("Icmp6InType{kind}");
        let line = text.lines().find_map(|line| line.strip_prefix(&name))?;
        line.trim().parse().ok()
    };
    Ok(types.iter().map(|kind| count(kind).unwrap_or(0)).collect())
}

/// What a group says about others' addresses, or about routers, reaches not even the host. It is said through an interface
/// that the rules take for the tap of a group, since a guest's tools do not lie so well.
fn ensure_nothing_is_forged(host: &Host, friend: &str) -> Result<()> {
    let tap = "eci-forger00001";
    let (own, mac) = ("fd00:88::a58:63", "02:ec:0a:58:00:63");
    let elements = [own, "fe80::ec:aff:fe58:63"].map(|ip| format!("{tap} . {mac} . {ip}"));
    let elements = elements.join(", ");
    let script = format!(
        "nft add element bridge eci taps.ip6 '{{ {elements} }}'; ip netns add forger; \
         ip link add {tap} type veth peer name eth0 netns forger; ip link set {tap} master ecitest0 up; \
         ip -n forger link set eth0 addrgenmode none; ip -n forger link set eth0 address {mac} up; \
         ip -n forger addr add fe80::ec:aff:fe58:63/64 dev eth0 nodad; \
         ip netns exec forger perl -e '{FORGE}' $(ip -n forger -o link show eth0 | cut -d : -f 1) {friend} {BRIDGE}"
    );
    let before = received(&[134, 135, 136])?;
    let said = run(&script)?;
    // The solicitation, which comes last, is let through.
    let until = Instant::now() + Duration::from_secs(PATIENCE_SECONDS.into());
    let mut was_asked = false;
    while !was_asked && Instant::now() < until {
        was_asked = received(&[135])?[0] > before[1];
        std::thread::yield_now();
    }
    let after = received(&[134, 135, 136])?;
    run(&format!(
        "nft delete element bridge eci taps.ip6 '{{ {elements} }}'; ip link del {tap}; ip netns del forger; umount /run/netns"
    ))?
    .success()?;
    said.success()?;
    ensure!(was_asked, "the host was asked nothing: {before:?}");
    ensure!(
        (before[0], before[2]) == (after[0], after[2]),
        "advertisements came through: {before:?} became {after:?}"
    );
    let mac = run(&format!("ip -6 neigh show {friend} dev ecitest0"))?.success()?;
    let permanent = mac.contains("PERMANENT") && !mac.contains("0a:58:00:63");
    ensure!(
        permanent,
        "the host believes {mac:?} of {}",
        tap_of(host, "friend")?
    );
    Ok(())
}

fn ensure_a_clone_has_its_own(host: &Host, stranger: &str) -> Result<()> {
    host.ecictl(&["fork", "--name", "clone", "stranger"])?.success()?;
    let group = host.group("clone")?;
    let name = group["spec"]["name"]
        .as_str()
        .context("the clone has no name")?
        .to_owned();
    let own = ip6(host, &name)?;
    ensure!(own != stranger, "the clone has its parent's address");
    ensure!(seen_in(host, &name)? == format!("{own}/128"));
    // What it serves is its parent's.
    ensure_fetches(
        host,
        "inside",
        &[
            (&own, CLOSED_PORT, "stranger"),
            (stranger, CLOSED_PORT, "stranger"),
        ],
    )?;
    host.remove(&name)
}
