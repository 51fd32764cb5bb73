//! The `delete` action: cleans up after a shim that died. Kills what is left of it, removes its socket and files, and
//! prints what containerd wants to know. Run twice it does nothing the second time.

use std::{fs, io::Write, time::SystemTime};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::{
    args::Args,
    error::{Error, ErrorKind, Result},
    persist::{ADDRESS_FILE, Bundle, ProcessId, SHIM_PID_FILE, VMM_PID_FILE},
    sandbox::status::KILLED_EXIT_STATUS,
    service::convert,
};

/// From SIGKILL to the end of a process.
const KILL_TIMEOUT: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// Cleans up and prints a `DeleteResponse`.
///
/// # Errors
/// A process survives being killed, or the answer cannot be printed.
pub fn delete(args: &Args) -> Result<()> {
    let bundle = Bundle::new(&args.bundle);
    let pid = clean(&bundle)?;
    let response = DeleteResponse {
        pid,
        exit_status: KILLED_EXIT_STATUS,
        exited_at: MessageField::some(convert::timestamp(SystemTime::now())),
        ..Default::default()
    };
    let bytes = response
        .write_to_bytes()
        .map_err(|error| Error::with_source(ErrorKind::Internal, "write the response", error))?;
    std::io::stdout()
        .write_all(&bytes)
        .map_err(|error| Error::io("print the response", error))
}

/// Cleans a bundle; returns the VMM's process id, zero when unknown.
fn clean(bundle: &Bundle) -> Result<u32> {
    // A start that is under way is to have written down what it made. Without a directory there is none.
    let _lock = bundle.lock();
    let vmm = bundle.read_process(VMM_PID_FILE);
    // A bundle without a shim of its own is a container's in another's sandbox: its socket is not ours to remove.
    let shim = bundle.read_process(SHIM_PID_FILE);
    // The shim first: it would report the VMM's end as a crash.
    for process in [shim, vmm].into_iter().flatten() {
        kill(process)?;
    }
    if shim.is_some()
        && let Some(path) = bundle
            .read_address()
            .as_deref()
            .and_then(|address| address.strip_prefix("unix://"))
    {
        // Gone already when the shim ended in order.
        let _ = fs::remove_file(path);
    }
    for file in [VMM_PID_FILE, SHIM_PID_FILE, ADDRESS_FILE] {
        bundle.remove(file);
    }
    Ok(vmm.map_or(0, |process| process.pid))
}

/// Kills exactly this process and waits for its end; does nothing when it has gone.
fn kill(process: ProcessId) -> Result<()> {
    let failed =
        |what: &str, errno: Errno| Error::io(format!("{what} process {}", process.pid), errno.into());
    let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    // The descriptor pins whoever has the id now; the check after it tells whether that is still the one meant.
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(()),
        Err(errno) => return Err(failed("open", errno)),
    };
    if !process.is_alive() {
        return Ok(());
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => {}
        Err(Errno::SRCH) => return Ok(()),
        Err(errno) => return Err(failed("kill", errno)),
    }
    let ended = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&KILL_TIMEOUT))
        .map_err(|errno| failed("wait for the end of", errno))?;
    if ended == 0 {
        let text = format!(
            "process {} is alive {} s after SIGKILL",
            process.pid, KILL_TIMEOUT.tv_sec
        );
        return Err(Error::new(ErrorKind::DeadlineExceeded, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{net::UnixListener, process::ExitStatusExt},
        process::Command,
    };

    use super::*;

    #[test]
    fn kills_removes_and_can_be_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(dir.path());
        let mut vmm = Command::new("sleep").arg("1000").spawn().unwrap();
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        bundle
            .write(ADDRESS_FILE, &format!("unix://{}", socket.display()))
            .unwrap();
        bundle
            .write_process(VMM_PID_FILE, ProcessId::of(vmm.id()).unwrap())
            .unwrap();
        // An id that somebody else has by now: this process.
        let reused = ProcessId {
            pid: std::process::id(),
            start_ticks: 1,
        };
        bundle.write_process(SHIM_PID_FILE, reused).unwrap();
        assert_eq!(clean(&bundle).unwrap(), vmm.id());
        assert_eq!(vmm.wait().unwrap().signal(), Some(9));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(clean(&bundle).unwrap(), 0);
    }

    #[test]
    fn a_container_of_another_sandbox_leaves_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, socket) = (Bundle::new(dir.path()), dir.path().join("socket"));
        let _listener = UnixListener::bind(&socket).unwrap();
        bundle
            .write(ADDRESS_FILE, &format!("unix://{}", socket.display()))
            .unwrap();
        assert_eq!(clean(&bundle).unwrap(), 0);
        assert!(socket.exists());
    }

    #[test]
    fn waits_for_a_start_that_is_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::new(dir.path());
        let starting = bundle.lock().unwrap();
        let mut server = Command::new("sleep").arg("1000").spawn().unwrap();
        std::thread::scope(|scope| {
            let cleaning = scope.spawn(|| clean(&Bundle::new(dir.path())));
            // It writes down what it made as the last thing it does, however long that takes.
            bundle
                .write_process(SHIM_PID_FILE, ProcessId::of(server.id()).unwrap())
                .unwrap();
            drop(starting);
            cleaning.join().unwrap().unwrap();
        });
        assert_eq!(server.wait().unwrap().signal(), Some(9));
    }
}
