//! `execve(2)` with everything laid out beforehand.

use std::{
    ffi::{CStr, CString, c_char},
    io, ptr,
};

/// Arguments and environment as `execve` wants them, built before `clone` so that the child need not allocate.
#[derive(Debug)]
pub struct ExecImage {
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    _strings: (Vec<CString>, Vec<CString>),
}

impl ExecImage {
    /// Lays out `arguments` and `environment`.
    #[must_use]
    pub fn new(arguments: Vec<CString>, environment: Vec<CString>) -> Self {
        let pointers = |strings: &[CString]| {
            strings
                .iter()
                .map(|string| string.as_ptr())
                .chain([ptr::null()])
                .collect::<Vec<_>>()
        };
        Self {
            argv: pointers(&arguments),
            envp: pointers(&environment),
            _strings: (arguments, environment),
        }
    }

    /// Replaces the calling process by the program at `path`; returns only when that failed.
    #[must_use]
    pub fn exec(&self, path: &CStr) -> io::Error {
        // SAFETY: both arrays end with a null pointer and point into `_strings`, which `self` keeps alive and unmoved.
        unsafe { libc::execve(path.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        io::Error::last_os_error()
    }
}

// SAFETY: the pointers point into strings that move with the value and are never written.
unsafe impl Send for ExecImage {}
