//! What is set for the whole process before anything else.
#![allow(unsafe_code)]

/// Sets up this process, as its first step. Of what Rust's own start-up code does, a VMM needs only that: a broken pipe is an
/// error, no signal. The rest (reading `/proc` for the bounds of the main stack, an alternative signal stack for each thread)
/// costs a start of a VM more than it gives, a message when a stack overflows: the guard page ends the process either way.
pub fn set_up() {
    // SAFETY: SIG_IGN is no function of ours, and no other thread is there yet that could rely on the signal.
    // It fails only for a signal that does not exist.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // All threads share one arena of the allocator. By itself each makes its own, which costs it as much as the rest of its
    // start and some pages of memory; the threads here allocate little once they run.
    // SAFETY: the call sets a number in the allocator, under the allocator's own lock.
    // It fails only for a parameter that does not exist, and then there are more arenas.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
