//! `seccomp(2)`.

use std::io;

use libc::sock_filter;

/// Installs `filter` on the calling thread; it can never be removed. It does not set
/// `no_new_privs`: the container's specification decides that.
///
/// # Errors
/// `EACCES` without `no_new_privs` and `CAP_SYS_ADMIN`, `EINVAL` for a filter the kernel refuses.
pub fn install(filter: &[sock_filter]) -> io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog {
        len,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: `program` points to `len` instructions, which the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    super::check(result).map(drop)
}
