//! Standard streams of processes: between a vsock connection to the guest and a FIFO or a log file. Bytes wait in the
//! guest when the host side is slow; no buffer here grows.

pub mod copy;
pub mod framing;
pub mod log;

use std::{
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use crate::error::{Error, ErrorKind, Result};

/// Which standard stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard input.
    Stdin,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// The name in log lines and in the first line of a guest connection.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Where a process's output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sink {
    /// A FIFO with a reader on the host.
    Fifo(PathBuf),
    /// CRI log lines, appended to this file.
    CriLog(PathBuf),
}

/// Where the streams of a process lead; `None` is /dev/null.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioSpec {
    /// A FIFO with a writer on the host.
    pub stdin: Option<PathBuf>,
    /// Output.
    pub stdout: Option<Sink>,
    /// Errors; never with a terminal.
    pub stderr: Option<Sink>,
    /// The process has a TTY.
    pub terminal: bool,
}

impl StdioSpec {
    /// Reads the strings of a request.
    ///
    /// # Errors
    /// `InvalidArgument`, naming the field.
    pub fn parse(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Result<Self> {
        let stdin = (!stdin.is_empty()).then(|| fifo("stdin", stdin)).transpose()?;
        let stdout = sink("stdout", stdout)?;
        // containerd's clients name a stderr FIFO for terminals too; nobody writes to it.
        let stderr = if terminal { None } else { sink("stderr", stderr)? };
        Ok(Self {
            stdin,
            stdout,
            stderr,
            terminal,
        })
    }
}

fn sink(field: &str, value: &str) -> Result<Option<Sink>> {
    if value.is_empty() {
        return Ok(None);
    }
    match value.strip_prefix(protocol::CRI_LOG_SCHEME) {
        Some(path) if Path::new(path).is_absolute() => Ok(Some(Sink::CriLog(PathBuf::from(path)))),
        Some(_) => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{field} is {value:?}: give cri:// and an absolute path, as in cri:///path/to/0.log"),
        )),
        None => Ok(Some(Sink::Fifo(fifo(field, value)?))),
    }
}

fn fifo(field: &str, value: &str) -> Result<PathBuf> {
    let is_fifo = std::fs::metadata(value).is_ok_and(|metadata| metadata.file_type().is_fifo());
    if is_fifo {
        Ok(PathBuf::from(value))
    } else {
        Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{field} is {value:?}: give the path of a FIFO (mkfifo), or leave it empty"),
        ))
    }
}
