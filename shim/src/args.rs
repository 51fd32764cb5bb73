//! The command line containerd uses for shims: Go style flags (one or two dashes), then the action.

use std::path::PathBuf;

use crate::error::{Error, ErrorKind, Result};

/// Where sandbox sockets are made unless a flag or the environment says otherwise.
pub const DEFAULT_SOCKET_DIR: &str = "/run/eci/s";
/// Environment variable that replaces [`DEFAULT_SOCKET_DIR`].
pub const SOCKET_DIR_ENV: &str = "ECI_SHIM_SOCKET_DIR";

/// What the process is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Daemonise a server, print its address.
    Start,
    /// Clean up after a dead shim.
    Delete,
    /// Be the server (what `start` runs).
    Run,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// containerd namespace; events carry it.
    pub namespace: String,
    /// Sandbox id, or under containerd the container's.
    pub id: String,
    /// The caller's own address (containerd's GRPC socket); only kept.
    pub address: String,
    /// Bundle directory; default is the current directory.
    pub bundle: PathBuf,
    /// Where sockets are made.
    pub socket_dir: PathBuf,
    /// Log more.
    pub debug: bool,
}

impl Args {
    /// Parses the arguments after the program's name. `socket_dir_env` is the value of [`SOCKET_DIR_ENV`].
    ///
    /// # Errors
    /// `InvalidArgument`, naming the flag.
    pub fn parse(args: impl IntoIterator<Item = String>, socket_dir_env: Option<String>) -> Result<Self> {
        let mut parsed = Self {
            action: Action::Run,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: PathBuf::from("."),
            socket_dir: PathBuf::from(socket_dir_env.unwrap_or_else(|| DEFAULT_SOCKET_DIR.into())),
            debug: false,
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                parsed.action = match arg.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "run" => Action::Run,
                    other => return Err(invalid(format!("action {other:?}: give start, delete or run"))),
                };
                continue;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (flag.to_owned(), None),
            };
            if name == "debug" {
                parsed.debug = inline.as_deref() != Some("false");
                continue;
            }
            let value = match inline {
                Some(value) => value,
                None => args
                    .next()
                    .ok_or_else(|| invalid(format!("flag -{name} lacks its value")))?,
            };
            match name.as_str() {
                "namespace" => parsed.namespace = value,
                "id" => parsed.id = value,
                "address" => parsed.address = value,
                "bundle" => parsed.bundle = PathBuf::from(value),
                "socket-dir" => parsed.socket_dir = PathBuf::from(value),
                // Replaced by TTRPC_ADDRESS long ago; containerd 1.7 still passes it.
                "publish-binary" => {}
                _ => {
                    return Err(invalid(format!(
                        "flag -{name}: known flags are -namespace, -id, -address, -bundle, -socket-dir, -publish-binary, -debug"
                    )));
                }
            }
        }
        if parsed.id.is_empty() {
            return Err(invalid("flag -id is missing: give the sandbox id".into()));
        }
        Ok(parsed)
    }
}

fn invalid(context: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split_whitespace().map(String::from), None)
    }

    #[test]
    fn takes_what_containerd_passes() {
        let args = parse(
            "-namespace k8s.io -id abc -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!(
            (args.namespace.as_str(), args.id.as_str(), args.debug),
            ("k8s.io", "abc", true)
        );
        assert_eq!(args.socket_dir, PathBuf::from(DEFAULT_SOCKET_DIR));
        let args = parse("--id=abc --bundle=/b --socket-dir /s delete").unwrap();
        assert_eq!(args.action, Action::Delete);
        assert_eq!(
            (args.bundle, args.socket_dir),
            (PathBuf::from("/b"), PathBuf::from("/s"))
        );
    }

    #[test]
    fn refuses_by_name() {
        assert!(parse("start").unwrap_err().chain().contains("-id"));
        assert!(parse("-id").unwrap_err().chain().contains("lacks its value"));
        assert!(
            parse("-id x -colour red start")
                .unwrap_err()
                .chain()
                .contains("-colour")
        );
        assert!(parse("-id x stop").unwrap_err().chain().contains("\"stop\""));
    }
}
