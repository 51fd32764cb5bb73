//! The VM generation id: sees the kernel take a new one.
//!
//! The kernel's driver (`drivers/virt/vmgenid.c`) mixes a new id into the random pool and makes the generator take a new
//! key, in one go. Released kernels send no event about it (the uevent of 6.9-rc was taken back before the release); what
//! they do is say so in their log (`add_vmfork_randomness` in `drivers/char/random.c`), provided the generator was ready
//! before. `/dev/kmsg` gives each record with its facility, and the kernel's own, 0, cannot be written from user space.

use std::{io, os::fd::OwnedFd, time::Duration};

use rustix::{
    fs::{Mode, OFlags, SeekFrom},
    io::Errno,
};
use tokio::time::timeout;

use crate::{
    boot::entropy,
    error::{Context, Error, ErrorKind, Result},
    sys,
};

/// How long the kernel may take to see the new id.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longer records than the one looked for are cut by no kernel: `PRINTKRB_RECORD_MAX` is 1024.
const MAX_RECORD_BYTES: usize = 2048;
/// Where it is.
const KERNEL_LOG: &str = "/dev/kmsg";
/// What the kernel says.
const CHANGED: &[u8] = b"random: crng reseeded due to virtual machine fork";
/// Records of facilities above the kernel's have priorities from here on (`LOG_FACSHIFT` in `linux/syslog.h`).
const FIRST_FOREIGN_PRIORITY: u32 = 8;

/// The kernel's log, read from one point on.
#[derive(Debug)]
pub struct GenerationWatch {
    records: OwnedFd,
    /// There was one already.
    has_changed: bool,
}

impl GenerationWatch {
    /// Opens the kernel's log at its end: changes from now on are seen. Waits until the random generator is ready,
    /// because the kernel says nothing about a change before.
    ///
    /// # Errors
    /// When there is no `/dev/kmsg`.
    pub fn of_kernel() -> Result<Self> {
        entropy::fill(&mut [0]).context(|| "wait for the random generator")?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let log =
            rustix::fs::open(KERNEL_LOG, flags, Mode::empty()).context(|| format!("open {KERNEL_LOG}"))?;
        rustix::fs::seek(&log, SeekFrom::End(0)).context(|| format!("go to the end of {KERNEL_LOG}"))?;
        Ok(Self::of_records(log))
    }

    /// Sees changes in records that come, one a read, from the non-blocking `records`.
    #[must_use]
    pub fn of_records(records: OwnedFd) -> Self {
        Self {
            records,
            has_changed: false,
        }
    }

    /// Only changes from now on count.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn forget_past(&mut self) -> Result<()> {
        while self.read_to_change().context(|| "read the kernel's log")? {}
        self.has_changed = false;
        Ok(())
    }

    /// Returns once the kernel has seen a new id.
    ///
    /// # Errors
    /// `DeadlineExceeded` when it does not in time.
    pub async fn changed(&mut self) -> Result<()> {
        self.changed_within(DEADLINE).await
    }

    async fn changed_within(&mut self, deadline: Duration) -> Result<()> {
        let failed = |error| Error::system("read the kernel's log", error);
        if !self.has_changed && !self.read_to_change().map_err(failed)? {
            match timeout(deadline, self.wait()).await {
                Ok(waited) => waited.map_err(failed)?,
                Err(_) => {
                    return Err(Error::new(
                        ErrorKind::DeadlineExceeded,
                        format!("the kernel saw no new VM generation id within {deadline:?}"),
                    ));
                }
            }
        }
        self.has_changed = true;
        Ok(())
    }

    async fn wait(&self) -> io::Result<()> {
        let readable = sys::poll::watch(self.records.try_clone()?)?;
        loop {
            let mut ready = readable.readable().await?;
            if self.read_to_change()? {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    /// Reads records up to the one about a change; false at the end of the log.
    fn read_to_change(&self) -> io::Result<bool> {
        let mut record = [0; MAX_RECORD_BYTES];
        loop {
            match rustix::io::read(&self.records, &mut record) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(false),
                Ok(length) if is_change(&record[..length]) => return Ok(true),
                // A record was overwritten before it was read: what follows is still there.
                Ok(_) | Err(Errno::PIPE | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether a record (`Documentation/ABI/testing/dev-kmsg`: `priority,sequence,microseconds,flags;text`) is the kernel's
/// word about a new id.
fn is_change(record: &[u8]) -> bool {
    let Some(split) = record.iter().position(|byte| *byte == b';') else {
        return false;
    };
    let priority = record[..split]
        .split(|byte| *byte == b',')
        .next()
        .and_then(|digits| str::from_utf8(digits).ok()?.parse::<u32>().ok());
    let text = record[split + 1..].split(|byte| *byte == b'\n').next();
    priority.is_some_and(|priority| priority < FIRST_FOREIGN_PRIORITY) && text == Some(CHANGED)
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    const RECORD: &[u8] = b"5,312,1200345,-;random: crng reseeded due to virtual machine fork\n";

    #[test]
    fn only_the_kernels_own_word_counts() {
        assert!(is_change(RECORD));
        assert!(is_change(
            b"5,312,1200345,-,caller=T1;random: crng reseeded due to virtual machine fork\n SUBSYSTEM=x\n"
        ));
        for record in [
            // Facility 1: written by a program.
            &b"13,312,1200345,-;random: crng reseeded due to virtual machine fork\n"[..],
            b"5,312,1200345,-;x random: crng reseeded due to virtual machine fork\n",
            b"5,312,1200345,-;random: crng reseeded due to virtual machine fork x\n",
            b"random: crng reseeded due to virtual machine fork\n",
            b";random: crng reseeded due to virtual machine fork\n",
            b"",
        ] {
            assert!(!is_change(record), "{}", String::from_utf8_lossy(record));
        }
    }

    /// A pipe gives one record a read as long as the other end writes one at a time and waits.
    fn log() -> (GenerationWatch, OwnedFd) {
        let (log, kernel) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (GenerationWatch::of_records(log), kernel)
    }

    #[tokio::test]
    async fn a_change_counts_until_the_next_is_due() {
        let (mut watch, kernel) = log();
        rustix::io::write(&kernel, RECORD).unwrap();
        watch.changed().await.unwrap();
        watch.changed().await.unwrap();
        rustix::io::write(&kernel, RECORD).unwrap();
        watch.forget_past().unwrap();
        let error = watch.changed_within(Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::DeadlineExceeded);
        assert!(error.to_string().contains("VM generation id"), "{error}");
    }

    #[tokio::test]
    async fn a_change_that_comes_late_is_waited_for() {
        let (mut watch, kernel) = log();
        rustix::io::write(&kernel, b"6,1,2,-;eth0: link becomes ready\n").unwrap();
        let changed = tokio::spawn(async move { watch.changed().await });
        tokio::task::yield_now().await;
        rustix::io::write(&kernel, RECORD).unwrap();
        changed.await.unwrap().unwrap();
    }
}
