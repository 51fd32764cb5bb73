//! Probes and hooks of a Pod's container.

use k8s_openapi::{
    api::core::v1::{
        ContainerPort, ExecAction, GRPCAction, HTTPGetAction, Lifecycle as PodLifecycle, LifecycleHandler,
        Probe as PodProbe, TCPSocketAction,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::group::{
    lifecycle::{Handler, Probe},
    violation::{ViolationKind, Violations},
};

/// Reads the probes and hooks of one container.
pub(super) struct Reader<'a> {
    /// The container's, which may be named.
    pub(super) ports: &'a [ContainerPort],
    /// Where the container is.
    pub(super) path: &'a str,
    pub(super) found: &'a mut Violations,
}

impl Reader<'_> {
    /// A probe; `field` is its name in the container.
    pub(super) fn probe(&mut self, field: &str, probe: Option<PodProbe>) -> Option<Probe> {
        let PodProbe {
            exec,
            failure_threshold,
            grpc,
            http_get,
            initial_delay_seconds,
            period_seconds,
            success_threshold,
            tcp_socket,
            termination_grace_period_seconds,
            timeout_seconds,
        } = probe?;
        let path = format!("{}.{field}", self.path);
        let mut handlers = Vec::new();
        handlers.extend(exec.map(exec_handler));
        handlers.extend(http_get.map(|get| self.http_get(get, &path)));
        handlers.extend(tcp_socket.map(|socket| self.tcp_socket(socket, &path)));
        handlers.extend(grpc.map(|grpc| self.grpc(grpc, &path)));
        let handler = self.one(handlers, &path, "exec, httpGet, tcpSocket or grpc")?;
        let mut number = |name: &str, value: Option<i32>, default: u32| {
            // Nothing and 0 are the same, as everywhere in Kubernetes.
            match value.unwrap_or(0) {
                0 => default,
                value => u32::try_from(value).unwrap_or_else(|_| {
                    self.found
                        .invalid(format!("{path}.{name}"), value, "valid: 0 or more");
                    default
                }),
            }
        };
        Some(Probe {
            handler,
            initial_delay_seconds: number("initialDelaySeconds", initial_delay_seconds, 0),
            period_seconds: number("periodSeconds", period_seconds, 10),
            timeout_seconds: number("timeoutSeconds", timeout_seconds, 1),
            success_threshold: number("successThreshold", success_threshold, 1),
            failure_threshold: number("failureThreshold", failure_threshold, 3),
            // A negative one is out of range like 0.
            grace_seconds: termination_grace_period_seconds.map(|grace| grace.try_into().unwrap_or(0)),
        })
    }

    /// The hooks: postStart, preStop.
    pub(super) fn hooks(&mut self, hooks: Option<PodLifecycle>) -> (Option<Handler>, Option<Handler>) {
        let PodLifecycle {
            post_start,
            pre_stop,
            stop_signal,
        } = hooks.unwrap_or_default();
        if let Some(signal) = stop_signal {
            self.found.add(
                ViolationKind::Unsupported,
                format!("{}.lifecycle.stopSignal", self.path),
                signal,
                "not supported yet; containers are told to end by SIGTERM",
            );
        }
        (self.hook("postStart", post_start), self.hook("preStop", pre_stop))
    }

    fn hook(&mut self, name: &str, hook: Option<LifecycleHandler>) -> Option<Handler> {
        let LifecycleHandler {
            exec,
            http_get,
            sleep,
            tcp_socket,
        } = hook?;
        let path = format!("{}.lifecycle.{name}", self.path);
        if tcp_socket.is_some() {
            self.found.add(
                ViolationKind::Unsupported,
                format!("{path}.tcpSocket"),
                "",
                "Kubernetes does not perform it as a hook; valid: exec, httpGet or sleep",
            );
            return None;
        }
        let mut handlers = Vec::new();
        handlers.extend(exec.map(exec_handler));
        handlers.extend(http_get.map(|get| self.http_get(get, &path)));
        handlers.extend(sleep.map(|sleep| Handler::Sleep {
            // A negative one is out of range like one too long.
            seconds: sleep.seconds.try_into().unwrap_or(u32::MAX),
        }));
        self.one(handlers, &path, "exec, httpGet or sleep")
    }

    fn one(&mut self, handlers: Vec<Handler>, path: &str, valid: &str) -> Option<Handler> {
        let count = handlers.len();
        if count != 1 {
            let text = format!("{count} kinds are given; valid: one of {valid}");
            self.found.add(ViolationKind::Invalid, path, "", text);
        }
        handlers.into_iter().next()
    }

    fn http_get(&mut self, get: HTTPGetAction, path: &str) -> Handler {
        let HTTPGetAction {
            host,
            http_headers,
            path: request,
            port,
            scheme,
        } = get;
        let is_https = match scheme.as_deref() {
            None | Some("" | "HTTP") => false,
            Some("HTTPS") => true,
            Some(other) => {
                let field = format!("{path}.httpGet.scheme");
                self.found.invalid(field, other, "valid: HTTP or HTTPS");
                false
            }
        };
        Handler::HttpGet {
            is_https,
            host: host.filter(|host| !host.is_empty()),
            port: self.port(port, &format!("{path}.httpGet.port")),
            path: request
                .filter(|path| !path.is_empty())
                .unwrap_or_else(|| "/".into()),
            headers: http_headers
                .unwrap_or_default()
                .into_iter()
                .map(|header| (header.name, header.value))
                .collect(),
        }
    }

    fn tcp_socket(&mut self, socket: TCPSocketAction, path: &str) -> Handler {
        Handler::TcpSocket {
            host: socket.host.filter(|host| !host.is_empty()),
            port: self.port(socket.port, &format!("{path}.tcpSocket.port")),
        }
    }

    fn grpc(&mut self, grpc: GRPCAction, path: &str) -> Handler {
        Handler::Grpc {
            port: self.port(IntOrString::Int(grpc.port), &format!("{path}.grpc.port")),
            service: grpc.service.unwrap_or_default(),
        }
    }

    /// A port, by number or by the name the container gives it; 0, which is refused later, when it is wrong.
    fn port(&mut self, port: IntOrString, path: &str) -> u16 {
        match port {
            IntOrString::Int(number) => u16::try_from(number).unwrap_or(0),
            IntOrString::String(name) => {
                let named = self.ports.iter().find(|port| port.name.as_deref() == Some(&name));
                let number = named
                    .map(|port| port.container_port)
                    .or_else(|| name.parse().ok());
                number
                    .and_then(|number| u16::try_from(number).ok())
                    .unwrap_or_else(|| {
                        let text =
                            "no port of the container has this name; valid: 1 to 65535, or a port's name";
                        self.found.invalid(path, &name, text);
                        // Said already.
                        1
                    })
            }
        }
    }
}

fn exec_handler(exec: ExecAction) -> Handler {
    Handler::Exec {
        command: exec.command.unwrap_or_default(),
    }
}
