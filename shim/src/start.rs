//! The `start` action: makes the socket, starts the server process that takes it over, prints its address.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::{
        fs::{DirBuilderExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::Deserialize;

use crate::{
    args::Args,
    error::{Error, ErrorKind, Result},
    persist::{ADDRESS_FILE, Bundle, LOG_FILE, ProcessId, SHIM_PID_FILE},
    sys::{self, ChildKind},
};

/// Annotation of containerd's CRI plugin: the sandbox a container belongs to.
const SANDBOX_ANNOTATION: &str = "io.kubernetes.cri.sandbox-id";
/// Longest path of a unix socket (unix(7)), less its terminating zero.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Starts a server, or finds the one of the sandbox this container belongs to, and prints its address.
///
/// # Errors
/// The socket or the process cannot be made; nothing is left then.
pub fn start(args: &Args) -> Result<()> {
    let dir = fs::canonicalize(&args.bundle)
        .map_err(|error| Error::io(format!("find bundle {}", args.bundle.display()), error))?;
    let bundle = Bundle::new(&dir);
    // A delete beside this would miss what is made here. The server does not inherit the lock.
    let _lock = bundle
        .lock()
        .map_err(|error| Error::io(format!("lock bundle {}", dir.display()), error))?;
    let group = sandbox_of(&dir).unwrap_or_else(|| args.id.clone());
    let path = socket_path(&args.socket_dir, &args.namespace, &group)?;
    let address = format!("unix://{}", path.display());
    match listen(&path)? {
        // Another container's start found a server, so this one belongs to it.
        None => bundle.write(ADDRESS_FILE, &address)?,
        Some(listener) => {
            if let Err(error) = serve(args, &bundle, &listener, &address) {
                let _ = fs::remove_file(&path);
                return Err(error);
            }
        }
    }
    let mut stdout = io::stdout();
    stdout
        .write_all(address.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::io("print the address", error))
}

/// Starts the server process with the listening socket. The socket takes connections from now on.
fn serve(args: &Args, bundle: &Bundle, listener: &UnixListener, address: &str) -> Result<()> {
    let exe = std::env::current_exe().map_err(|error| Error::io("find the shim's binary", error))?;
    let log_path = bundle.path(LOG_FILE);
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(|error| Error::io(format!("open {}", log_path.display()), error))?;
    let log_too = log
        .try_clone()
        .map_err(|error| Error::io("duplicate the log's descriptor", error))?;
    let mut command = Command::new(exe);
    command
        .args([
            "-namespace",
            &args.namespace,
            "-id",
            &args.id,
            "-address",
            &args.address,
            "-socket-dir",
        ])
        .arg(&args.socket_dir)
        .arg("-bundle")
        .arg(bundle.dir())
        .current_dir(bundle.dir())
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too);
    if args.debug {
        command.arg("-debug");
    }
    command.arg("run");
    sys::pass_descriptor(&mut command, listener, ChildKind::Daemon);
    bundle.write(ADDRESS_FILE, address)?;
    let mut child = command
        .spawn()
        .map_err(|error| Error::io("start the shim's server", error))?;
    let recorded = ProcessId::of(child.id()).and_then(|process| bundle.write_process(SHIM_PID_FILE, process));
    if recorded.is_err() {
        // It may be gone already; then there is nothing to kill.
        let _ = child.kill();
        let _ = child.wait();
    }
    recorded
}

/// The sandbox a container belongs to, under containerd's CRI.
fn sandbox_of(bundle: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        annotations: std::collections::HashMap<String, String>,
    }
    let config: Config = serde_json::from_slice(&fs::read(bundle.join("config.json")).ok()?).ok()?;
    config.annotations.get(SANDBOX_ANNOTATION).cloned()
}

/// The socket of a sandbox: its name follows from namespace and id, and is short whatever they are.
fn socket_path(dir: &Path, namespace: &str, id: &str) -> Result<PathBuf> {
    let mut name = Vec::from(namespace);
    name.push(0);
    name.extend_from_slice(id.as_bytes());
    let path = dir.join(format!("{:032x}", fnv1a_128(&name)));
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH_BYTES {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "socket path {} has {length} bytes, at most {MAX_SOCKET_PATH_BYTES}: give a shorter -socket-dir",
                path.display()
            ),
        ));
    }
    Ok(path)
}

/// FNV-1a, 128 bits (RFC 9923): stable over versions of this program, which a standard library hash is not.
fn fnv1a_128(bytes: &[u8]) -> u128 {
    const OFFSET_BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(OFFSET_BASIS, |hash, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(PRIME)
    })
}

/// Listens on a new socket; `None` when a server answers there already.
fn listen(path: &Path) -> Result<Option<UnixListener>> {
    let failed = |error| Error::io(format!("listen on {}", path.display()), error);
    if let Some(dir) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(dir)
            .map_err(|error| Error::io(format!("create {}", dir.display()), error))?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            // Left by a shim that died.
            fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)?
        }
        bound => bound.map_err(failed)?,
    };
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(Some(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_are_short_and_apart() {
        let dir = Path::new("/run/eci/s");
        let path = socket_path(dir, "k8s.io", &"x".repeat(128)).unwrap();
        assert!(path.as_os_str().len() < 64);
        assert_ne!(
            socket_path(dir, "a", "bc").unwrap(),
            socket_path(dir, "ab", "c").unwrap()
        );
        let error = socket_path(Path::new(&format!("/{}", "d".repeat(100))), "a", "b").unwrap_err();
        assert!(error.chain().contains("-socket-dir"), "{}", error.chain());
    }

    #[test]
    fn hash_matches_the_published_vectors() {
        assert_eq!(fnv1a_128(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv1a_128(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/socket");
        let listener = listen(&path).unwrap().unwrap();
        assert!(listen(&path).unwrap().is_none());
        drop(listener);
        assert!(listen(&path).unwrap().is_some());
    }

    #[test]
    fn a_container_names_its_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(sandbox_of(dir.path()), None);
        let config = r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod1"}}"#;
        fs::write(dir.path().join("config.json"), config).unwrap();
        assert_eq!(sandbox_of(dir.path()), Some("pod1".into()));
    }
}
