//! A copy of this process that does one thing with what memory holds now, while this process goes on and changes it.
#![allow(unsafe_code)]

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions};

/// Longest error that a copy tells.
const MAX_MESSAGE_BYTES: u64 = 4096;

/// A copy of this process at work. Dropping it ends the work.
#[derive(Debug)]
pub struct Copy {
    process: Option<Pid>,
    /// What went wrong; closed by the copy's end.
    words: io::PipeReader,
}

impl Copy {
    /// Does `work` in a copy of this process, whose private memory is the copy's own as it is now: the kernel copies a page
    /// once either writes to it. Of this process's descriptors the copy has `kept` alone, so that it holds up nobody's end.
    ///
    /// Only this thread exists in the copy: `work` must not wait for another one, nor take a lock that another one may hold.
    /// (The C library sees to its own, so memory can be allocated.) The copy does not outlive this thread.
    ///
    /// # Errors
    /// Those of pipe(2) and fork(2).
    pub fn begin(kept: &[BorrowedFd<'_>], work: impl FnOnce() -> Result<(), String>) -> io::Result<Self> {
        let (words, mut tell) = io::pipe()?;
        let parent = rustix::process::getpid();
        // SAFETY: the copy runs on in `be_the_copy` alone, which never returns; what it may do there is said above.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                let mut fds: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
                fds.push(tell.as_raw_fd());
                be_the_copy(parent, &mut fds, &mut tell, work)
            }
            process => Ok(Self {
                process: Pid::from_raw(process),
                words,
            }),
        }
    }

    /// Waits for the end of the work; at once when the descriptor is readable.
    ///
    /// # Errors
    /// What the copy says, or how it died.
    pub fn finish(mut self) -> Result<(), String> {
        let mut message = Vec::new();
        let read = (&mut self.words)
            .take(MAX_MESSAGE_BYTES)
            .read_to_end(&mut message);
        let status = self.reap();
        match (read, status) {
            (_, Ok(Some(0))) => Ok(()),
            (Ok(n), Ok(Some(_))) if n > 0 => Err(String::from_utf8_lossy(&message).into_owned()),
            (_, Ok(status)) => Err(format!("The copy of this process died (status {status:?})")),
            (_, Err(error)) => Err(format!("The copy of this process is lost: {error}")),
        }
    }

    fn reap(&mut self) -> Result<Option<i32>, Errno> {
        let Some(process) = self.process.take() else {
            return Ok(None);
        };
        loop {
            match rustix::process::waitpid(Some(process), WaitOptions::empty()) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
                Ok(status) => return Ok(status.and_then(|(_, status)| status.exit_status())),
            }
        }
    }
}

/// Readable once the work has ended.
impl AsFd for Copy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.words.as_fd()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Some(process) = self.process {
            // Fails only when it has ended.
            let _ = rustix::process::kill_process(process, Signal::KILL);
            let _ = self.reap();
        }
    }
}

fn be_the_copy(
    parent: Pid,
    fds: &mut [RawFd],
    tell: &mut io::PipeWriter,
    work: impl FnOnce() -> Result<(), String>,
) -> ! {
    close_others(fds);
    let result = rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|errno| format!("Failed to bind the copy to its parent: {errno}"))
        .and_then(|()| {
            // It may have died before that.
            let orphan = rustix::process::getppid() != Some(parent);
            if orphan {
                Err("The VMM has ended".to_owned())
            } else {
                Ok(())
            }
        })
        .and_then(|()| {
            catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("The copy panicked".to_owned()))
        });
    let status = match result {
        Ok(()) => 0,
        Err(message) => {
            // Nobody is there to be told of a failure.
            let _ = io::Write::write_all(tell, message.as_bytes());
            1
        }
    };
    // SAFETY: ends this process without running anything that belongs to the other one's threads: exit handlers,
    // destructors.
    unsafe { libc::_exit(status) }
}

/// Closes every descriptor but these.
fn close_others(kept: &mut [RawFd]) {
    kept.sort_unstable();
    let mut first = 0;
    for fd in kept.iter().filter_map(|fd| u32::try_from(*fd).ok()) {
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: in the copy nothing is ever dropped, so no owner finds its descriptor closed; `work` was told which it has.
    // An older kernel refuses, and then descriptors stay open until the copy ends.
    let _ = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, SeekFrom, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_copy_sees_memory_as_it_was() {
        let mut file = tempfile::tempfile().unwrap();
        let mut memory = vec![1_u8; 100_000];
        let (wait, go) = io::pipe().unwrap();
        let copy = {
            let (memory, mut file, wait) = (&memory, &file, &wait);
            Copy::begin(&[file.as_fd(), wait.as_fd()], move || {
                // `go` is not kept, so the last writer is the test's.
                let mut wait = wait;
                wait.read_to_end(&mut Vec::new())
                    .map_err(|error| error.to_string())?;
                file.write_all(memory).map_err(|error| error.to_string())
            })
            .unwrap()
        };
        memory.fill(2);
        drop(go);
        assert_eq!(copy.finish(), Ok(()));
        file.seek(SeekFrom::Start(0)).unwrap();
        let mut written = Vec::new();
        file.read_to_end(&mut written).unwrap();
        assert_eq!(written, vec![1; 100_000]);
    }

    #[test]
    fn a_copy_says_what_went_wrong() {
        let failed = Copy::begin(&[], || Err("no room".to_owned())).unwrap();
        assert_eq!(failed.finish(), Err("no room".to_owned()));
        let panicked = Copy::begin(&[], || std::panic::resume_unwind(Box::new(())))
            .unwrap()
            .finish();
        assert_eq!(panicked, Err("The copy panicked".to_owned()));
    }

    #[test]
    fn a_copy_has_no_other_descriptors_and_ends_with_its_handle() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (never, _held) = io::pipe().unwrap();
        let copy = Copy::begin(&[never.as_fd()], || {
            let mut never = File::from(
                never
                    .as_fd()
                    .try_clone_to_owned()
                    .map_err(|error| error.to_string())?,
            );
            never
                .read_to_end(&mut Vec::new())
                .map_err(|error| error.to_string())?;
            Ok(())
        })
        .unwrap();
        drop(theirs);
        // Would not end while the copy has the other end too.
        assert_eq!((&ours).read(&mut [0]).unwrap(), 0);
        drop(copy);
    }
}
