//! `ecictl describe` and `ecictl events`

use super::{
    args::{DescribeArgs, EventsArgs, Output},
    client::Client,
    list, table,
};
use crate::group::{
    conditions::Condition,
    lifecycle::{Handler, Role},
    network::bandwidth_text,
    size,
    spec::{ContainerSpec, GroupSpec, PortSpec},
    status::{ContainerState, ContainerStatus, EventKind, Group},
};

pub(super) async fn run(client: &Client, args: &DescribeArgs) -> anyhow::Result<u8> {
    let group = client.group(&args.group).await?;
    let text = match args.output {
        Output::Json => format!("{}\n", serde_json::to_string_pretty(&group)?),
        Output::Table => render(&group),
    };
    table::print(text.as_bytes())?;
    Ok(0)
}

pub(super) async fn events(client: &Client, args: &EventsArgs) -> anyhow::Result<u8> {
    let groups = match &args.group {
        Some(group) => vec![client.group(group).await?],
        None => client.get("/v1/groups").await?,
    };
    table::print(render_events(&groups).as_bytes())?;
    Ok(0)
}

fn render(group: &Group) -> String {
    let (spec, status) = (&group.spec, &group.status);
    let mut lines = vec![
        field("Id", group.id.as_str()),
        field("Name", &spec.name),
        field("Namespace", &spec.namespace),
        field("Status", &list::state(group)),
    ];
    let mut optional = |name: &str, value: Option<String>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            lines.push(field(name, &value));
        }
    };
    optional("Message", Some(status.message.clone()));
    optional("Address", Some(status.ips().collect::<Vec<_>>().join(", ")));
    optional("Security", Some(spec.network.security_groups.join(", ")));
    optional("Bandwidth", bandwidth(spec));
    optional("Size", Some(size::text(spec.size)));
    optional("Restart", Some(format!("{:?}", spec.restart_policy)));
    optional("Host name", Some(spec.hostname.clone()));
    optional("Subdomain", spec.network.subdomain.clone());
    optional(
        "Deadline",
        spec.active_deadline_seconds
            .map(|seconds| format!("{seconds} s after it was created")),
    );
    optional("Created", Some(table::time(status.created_at_ms)));
    optional("Started", status.started_at_ms.map(table::time));
    optional("Finished", status.finished_at_ms.map(table::time));
    for (name, map) in [("Labels", &spec.labels), ("Annotations", &spec.annotations)] {
        let pairs: Vec<_> = map.iter().map(|(key, value)| format!("{key}={value}")).collect();
        optional(name, Some(pairs.join(", ")));
    }
    for (container, wanted) in status.containers.iter().zip(&spec.containers) {
        lines.push(String::new());
        let kind = match wanted.lifecycle.role {
            Role::App => "Container",
            Role::Init => "Init container",
            Role::Sidecar => "Sidecar",
        };
        lines.push(format!("{kind} {}", container.name));
        lines.push(nested("Image", &wanted.image));
        if let Some(digest) = &container.image_digest {
            lines.push(nested("Digest", digest));
        }
        lines.push(nested("State", &state(&container.state)));
        if let Some(previous) = &container.previous {
            lines.push(nested("Before", &state(previous)));
        }
        for (name, probe) in probes(wanted) {
            lines.push(nested(name, &probe));
        }
        lines.push(nested("Ready", if container.ready { "yes" } else { "no" }));
        lines.push(nested("Restarts", &restarts(container)));
        let words = [&wanted.command[..], &wanted.args[..]].concat();
        if !words.is_empty() {
            lines.push(nested("Command", &words.join(" ")));
        }
        let ports: Vec<_> = wanted.ports.iter().map(port_text).collect();
        if !ports.is_empty() {
            lines.push(nested("Ports", &ports.join(", ")));
        }
        for mount in &wanted.volume_mounts {
            let mode = if mount.read_only { " (read-only)" } else { "" };
            lines.push(nested(
                "Mount",
                &format!("{} at {}{mode}", mount.name, mount.mount_path),
            ));
        }
    }
    lines.push(String::new());
    lines.push("Conditions".into());
    for condition in &status.conditions {
        lines.push(self::condition(condition));
    }
    lines.push(String::new());
    lines.push("Events".into());
    let mut text = lines.join("\n");
    text.push('\n');
    text.push_str(&render_events(std::slice::from_ref(group)));
    text
}

fn field(name: &str, value: &str) -> String {
    format!("{name:12}{}", table::clean(value))
}

fn nested(name: &str, value: &str) -> String {
    format!("  {name:10}{}", table::clean(value))
}

/// `80/TCP`, with the host's port where one leads there.
fn port_text(port: &PortSpec) -> String {
    let own = format!("{}/{}", port.port, port.protocol);
    match (port.host_ip, port.host_port) {
        (Some(ip), Some(host)) => format!("{own} (the host's {})", std::net::SocketAddr::new(ip, host)),
        (None, Some(host)) => format!("{own} (the host's {host})"),
        (_, None) => own,
    }
}

/// The limits of a group's traffic.
fn bandwidth(spec: &GroupSpec) -> Option<String> {
    let limits = [
        ("in", spec.network.ingress_bits),
        ("out", spec.network.egress_bits),
    ];
    let texts: Vec<_> = limits
        .into_iter()
        .filter_map(|(direction, bits)| Some(format!("{} {direction}", bandwidth_text(bits?))))
        .collect();
    (!texts.is_empty()).then(|| texts.join(", "))
}

/// The probes of a container, in one line each.
fn probes(wanted: &ContainerSpec) -> Vec<(&'static str, String)> {
    let lifecycle = &wanted.lifecycle;
    let probes = [
        ("Startup", &lifecycle.startup),
        ("Liveness", &lifecycle.liveness),
        ("Readiness", &lifecycle.readiness),
    ];
    let probes = probes.into_iter().filter_map(|(name, probe)| {
        let probe = probe.as_ref()?;
        let text = format!(
            "{} delay={}s timeout={}s period={}s success={} failure={}",
            handler(&probe.handler),
            probe.initial_delay_seconds,
            probe.timeout_seconds,
            probe.period_seconds,
            probe.success_threshold,
            probe.failure_threshold
        );
        Some((name, text))
    });
    let hooks = [
        ("PostStart", &lifecycle.post_start),
        ("PreStop", &lifecycle.pre_stop),
    ];
    let hooks = hooks
        .into_iter()
        .filter_map(|(name, hook)| Some((name, handler(hook.as_ref()?))));
    probes.chain(hooks).collect()
}

fn handler(handler: &Handler) -> String {
    let host = |host: &Option<String>| host.clone().unwrap_or_default();
    match handler {
        Handler::Exec { command } => format!("exec [{}]", command.join(" ")),
        Handler::HttpGet {
            is_https,
            host: name,
            port,
            path,
            ..
        } => {
            let scheme = if *is_https { "https" } else { "http" };
            format!("http-get {scheme}://{}:{port}{path}", host(name))
        }
        Handler::TcpSocket { host: name, port } => format!("tcp-socket {}:{port}", host(name)),
        Handler::Grpc { port, service } => format!("grpc :{port} {service}"),
        Handler::Sleep { seconds } => format!("sleep {seconds}s"),
    }
}

fn condition(condition: &Condition) -> String {
    let holds = if condition.holds { "yes" } else { "no" };
    let since = table::time(condition.since_ms);
    let line = format!(
        "  {:26}{holds:4}since {since} {} {}",
        condition.kind.name(),
        condition.reason,
        table::clean(&condition.message)
    );
    line.trim_end().to_owned()
}

fn restarts(container: &ContainerStatus) -> String {
    container.restart_count.to_string()
}

fn state(state: &ContainerState) -> String {
    match state {
        ContainerState::Waiting { reason, message } => format!("Waiting ({reason}) {message}"),
        ContainerState::Running { started_at_ms } => format!("Running since {}", table::time(*started_at_ms)),
        ContainerState::Terminated {
            exit_code,
            signal,
            reason,
            message,
            finished_at_ms,
            ..
        } => {
            let signal = signal
                .map(|signal| format!(", signal {signal}"))
                .unwrap_or_default();
            format!(
                "Terminated ({reason}), exit code {exit_code}{signal}, {} {message}",
                table::time(*finished_at_ms)
            )
        }
    }
}

fn render_events(groups: &[Group]) -> String {
    let mut events: Vec<_> = groups
        .iter()
        .flat_map(|group| group.status.events.iter().map(move |event| (group, event)))
        .collect();
    events.sort_by_key(|(_, event)| event.last_ms);
    let rows: Vec<_> = events
        .into_iter()
        .map(|(group, event)| {
            vec![
                table::time(event.last_ms),
                group.spec.name.clone(),
                event.container.clone().unwrap_or_else(|| "-".into()),
                match event.kind {
                    EventKind::Normal => "Normal".into(),
                    EventKind::Warning => "Warning".into(),
                },
                event.reason.clone(),
                event.count.to_string(),
                event.message.clone(),
            ]
        })
        .collect();
    table::columns(
        &["TIME", "GROUP", "CONTAINER", "TYPE", "REASON", "COUNT", "MESSAGE"],
        &rows,
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn everything_is_shown() {
        let group = crate::api::fake::group("eci-aaaaaaaaaaaaaaaaaaa1", "web", "shop");
        let text = super::render(&group);
        for part in [
            "Id          eci-aaaaaaaaaaaaaaaaaaa1",
            "Namespace   shop",
            "Labels      app=web",
            "Container c",
            "  State     Running since 2026-01-01T00:00:00Z",
            "  Ready                     yes since 2026-01-01T00:00:00Z",
            "Started it",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
    }
}
