//! What callers ask for: plain data, checked.

use std::path::PathBuf;

use vmm::config::{MAX_VCPUS, MIN_MEMORY_MIB};

use crate::{
    error::{Error, ErrorKind, Result},
    guest::{ContainerLifecycle, Identity},
    stdio::StdioSpec,
};

/// Longest container or exec id.
const MAX_ID_CHARS: usize = 128;
/// Longest OCI spec or process taken.
pub const MAX_SPEC_BYTES: usize = 1 << 20;

/// The microVM of a sandbox.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    /// vCPUs.
    pub n_vcpus: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Memory that can be plugged beside while it runs.
    pub hotplug_mib: u64,
    /// vCPUs that a guest that boots is to know of, when more than `n_vcpus`.
    pub n_possible_vcpus: u32,
    /// The tap of the guest's interface, when it has one.
    pub tap: Option<String>,
    /// Network namespace that is in; empty: the shim's own.
    pub netns: String,
    /// What the guest is told.
    pub identity: Identity,
    /// The sparse ext4 file.
    pub scratch_path: PathBuf,
    /// The guest kernel.
    pub kernel_path: PathBuf,
    /// The guest initramfs.
    pub initrd_path: PathBuf,
    /// The VMM binary.
    pub vmm_path: PathBuf,
    /// cgroup of the VMM; stays in the shim's when `None`.
    pub cgroup_path: Option<PathBuf>,
    /// Added to the guest kernel's command line.
    pub kernel_args: String,
    /// What the guest begins with.
    pub start: StartKind,
    /// It is to wait for the rest of what it is told.
    pub is_standby: bool,
}

/// What a guest begins with, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartKind {
    /// It boots.
    Boot,
    /// It goes on from the template in this directory, or boots when that is of no use.
    Template {
        /// Holds [`STATE_FILE`] and [`MEMORY_FILE`].
        directory: PathBuf,
        /// vCPUs that the template's guest knows of.
        n_possible_vcpus: u32,
    },
    /// It goes on, its containers frozen, from the snapshot of a running sandbox in this directory.
    Snapshot {
        /// See [`super::snapshot`].
        directory: PathBuf,
    },
    /// It boots and becomes a template.
    Capture {
        /// Where its files are made.
        directory: PathBuf,
        /// vCPUs that it is to know of.
        n_possible_vcpus: u32,
    },
}

/// A VM's state in a template or snapshot, beside its memory.
pub const STATE_FILE: &str = "state";
/// Its memory.
pub const MEMORY_FILE: &str = "memory";
/// In a template: which pages of its memory the first guest that was made from it has written to.
pub const WRITTEN_FILE: &str = "written";

impl StartKind {
    /// vCPUs that the guest of a template knows of, when `n_vcpus` are to run.
    #[must_use]
    pub fn n_possible_vcpus(&self, n_vcpus: u32) -> u32 {
        match self {
            Self::Boot | Self::Snapshot { .. } => n_vcpus,
            Self::Template { n_possible_vcpus, .. } | Self::Capture { n_possible_vcpus, .. } => {
                (*n_possible_vcpus).max(n_vcpus)
            }
        }
    }
}

impl SandboxSpec {
    /// Checks that this is the same machine as `waiting`, which only lacks its identity.
    ///
    /// # Errors
    /// `FailedPrecondition`, naming what differs.
    pub fn continues(&self, waiting: &Self) -> Result<()> {
        let mac = |spec: &Self| {
            spec.identity
                .interface
                .as_ref()
                .map(|interface| (interface.mac, interface.mtu))
        };
        let differs = [
            ("n_vcpus", self.n_vcpus != waiting.n_vcpus),
            ("memory_mib", self.memory_mib != waiting.memory_mib),
            ("hotplug_mib", self.hotplug_mib != waiting.hotplug_mib),
            ("network", self.tap != waiting.tap || mac(self) != mac(waiting)),
            ("scratch_path", self.scratch_path != waiting.scratch_path),
            ("vmm_path", self.vmm_path != waiting.vmm_path),
            ("cgroup_path", self.cgroup_path != waiting.cgroup_path),
            ("kernel_args", self.kernel_args != waiting.kernel_args),
            ("template", self.start != waiting.start),
        ];
        match differs.iter().find(|(_, differs)| *differs) {
            Some((field, _)) => Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!("options.{field} is not what the waiting guest was made with"),
            )),
            None => Ok(()),
        }
    }

    /// Checks numbers and that the files are there.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the field.
    pub fn validate(&self) -> Result<()> {
        if !(1..=MAX_VCPUS).contains(&self.n_vcpus) {
            return Err(invalid(format!(
                "options.n_vcpus is {}: give 1 to {MAX_VCPUS}",
                self.n_vcpus
            )));
        }
        if u64::from(self.memory_mib) < MIN_MEMORY_MIB {
            let given = self.memory_mib;
            return Err(invalid(format!(
                "options.memory_mib is {given}: give at least {MIN_MEMORY_MIB}"
            )));
        }
        for (field, path) in [
            ("scratch_path", &self.scratch_path),
            ("kernel_path", &self.kernel_path),
            ("initrd_path", &self.initrd_path),
            ("vmm_path", &self.vmm_path),
        ] {
            if !path.is_absolute() || !path.is_file() {
                let given = path.display();
                return Err(invalid(format!(
                    "options.{field} is {given}: give the absolute path of a file"
                )));
            }
        }
        // A template that is missing is no error: the guest boots then.
        let directory = match &self.start {
            StartKind::Capture { directory, .. } => Some(("capture_directory", directory)),
            StartKind::Snapshot { directory } => Some(("snapshot_directory", directory)),
            StartKind::Boot | StartKind::Template { .. } => None,
        };
        if let Some((field, directory)) = directory
            && !(directory.is_absolute() && directory.is_dir())
        {
            let given = directory.display();
            return Err(invalid(format!(
                "options.{field} is {given}: give the absolute path of a directory"
            )));
        }
        if let Some(path) = &self.cgroup_path
            && !(path.is_absolute() && path.is_dir())
        {
            let given = path.display();
            return Err(invalid(format!(
                "options.cgroup_path is {given}: give an existing cgroup v2 directory, or leave it empty"
            )));
        }
        Ok(())
    }
}

/// A container to create.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// Its id.
    pub id: String,
    /// Its bundle; holds `config.json`.
    pub bundle: PathBuf,
    /// The image: metadata file, then layer blobs. A captured container has the one it had.
    pub image_paths: Vec<PathBuf>,
    /// It runs in the guest already, which goes on from a snapshot.
    pub is_captured: bool,
    /// Streams of its init process.
    pub stdio: StdioSpec,
    /// How the guest looks after it.
    pub lifecycle: Option<ContainerLifecycle>,
}

/// A process to add to a container.
#[derive(Debug, Clone)]
pub struct ExecSpec {
    /// OCI process as JSON.
    pub process: Vec<u8>,
    /// Its streams.
    pub stdio: StdioSpec,
}

/// Checks a container or exec id as containerd does (its `identifiers` package).
///
/// # Errors
/// `InvalidArgument`, naming `field`.
pub fn check_id(field: &str, id: &str) -> Result<()> {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = id.as_bytes();
    if bytes.len() <= MAX_ID_CHARS
        && bytes.iter().copied().all(inner)
        && ends(bytes.first())
        && ends(bytes.last())
    {
        Ok(())
    } else {
        Err(invalid(format!(
            "{field} is {id:?}: give 1 to {MAX_ID_CHARS} letters, digits, '-', '_' or '.', a letter or digit at both ends"
        )))
    }
}

/// Checks that an OCI document (`config.json`, or its `process` alone) agrees with the request about the terminal.
///
/// # Errors
/// `InvalidArgument` when it is too long, no JSON, or disagrees.
pub fn check_terminal(what: &str, document: &[u8], is_process: bool, terminal: bool) -> Result<()> {
    #[derive(serde::Deserialize, Default)]
    struct Process {
        #[serde(default)]
        terminal: bool,
    }
    #[derive(serde::Deserialize)]
    struct Config {
        #[serde(default)]
        process: Option<Process>,
    }
    if document.len() > MAX_SPEC_BYTES {
        return Err(invalid(format!(
            "{what} has {} bytes: at most {MAX_SPEC_BYTES}",
            document.len()
        )));
    }
    let parsed = if is_process {
        serde_json::from_slice::<Process>(document)
    } else {
        serde_json::from_slice::<Config>(document).map(|config| config.process.unwrap_or_default())
    };
    let process = parsed.map_err(|error| {
        Error::with_source(
            ErrorKind::InvalidArgument,
            format!("parse {what} as OCI JSON"),
            error,
        )
    })?;
    if process.terminal == terminal {
        Ok(())
    } else {
        Err(invalid(format!(
            "terminal is {terminal} in the request and {} in {what}: give the same in both",
            process.terminal
        )))
    }
}

fn invalid(context: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for good in ["a", "A-b_c.9", &"x".repeat(MAX_ID_CHARS)] {
            check_id("id", good).unwrap();
        }
        for bad in [
            "",
            "-a",
            "a.",
            "a/b",
            "a b",
            "ä",
            "\"",
            &"x".repeat(MAX_ID_CHARS + 1),
        ] {
            assert!(
                check_id("id", bad).unwrap_err().chain().starts_with("id is"),
                "{bad}"
            );
        }
    }

    #[test]
    fn terminal_must_agree() {
        check_terminal(
            "config.json",
            br#"{"ociVersion":"1.0","process":{"terminal":true}}"#,
            false,
            true,
        )
        .unwrap();
        check_terminal("config.json", b"{}", false, false).unwrap();
        check_terminal("spec", br#"{"args":["sh"]}"#, true, false).unwrap();
        for (document, terminal) in [("{\"args\":[]}", true), ("[", false), ("{\"terminal\":1}", false)] {
            assert!(
                check_terminal("spec", document.as_bytes(), true, terminal).is_err(),
                "{document}"
            );
        }
    }
}
