//! The L1 host itself: what it promises to the tests that run in it.
//!
//! `make test` names the static binary in `NESTED`. The tests work on a checkout of their own, so that an L1 host of
//! this one is left alone.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// For an L1 host on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

struct Bed {
    program: PathBuf,
    checkout: TempDir,
}

impl Bed {
    /// `None`, said aloud, where the program has not been built.
    fn new() -> Option<Self> {
        let Some(program) = std::env::var_os("NESTED") else {
            eprintln!("skipped: NESTED does not name the static `nested` binary; `make test` sets it");
            return None;
        };
        let program = PathBuf::from(program)
            .canonicalize()
            .expect("NESTED names a program");
        let checkout = tempfile::tempdir().unwrap();
        fs::create_dir_all(checkout.path().join("tests/nested")).unwrap();
        fs::write(checkout.path().join("tests/nested/Cargo.toml"), "").unwrap();
        Some(Self { program, checkout })
    }

    fn path(&self) -> &Path {
        self.checkout.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .current_dir(self.path())
            .env("ECI_NESTED", "emulated")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, script: &str) -> Output {
        self.command(&["run", "--", "sh", "-c", script]).output().unwrap()
    }

    fn start(&self, script: &str) -> Child {
        self.command(&["run", "--", "sh", "-c", script])
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// The QEMU processes of this checkout.
    fn qemus(&self) -> Vec<i32> {
        let mark = self.path().to_str().unwrap();
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid: &i32| {
                let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let command = String::from_utf8_lossy(&command);
                command.starts_with("qemu-system") && command.contains(mark)
            })
            .collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = self.command(&["down"]).output();
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "{what}: not within {} s",
            PATIENCE.as_secs()
        );
        thread::sleep(Duration::from_millis(50));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

#[test]
fn a_host_that_stays_up_keeps_its_promises() {
    let Some(bed) = Bed::new() else { return };
    let up = bed.command(&["up"]).output().unwrap();
    assert!(up.status.success(), "{}", text(&up.stderr));
    let qemu = bed.qemus();
    assert_eq!(qemu.len(), 1);

    exit_codes_pass_through(&bed);
    streams_stay_apart(&bed);
    input_and_much_output_pass_through(&bed);
    kvm_answers(&bed);
    files_are_fresh_on_both_sides(&bed);
    the_time_limit_kills(&bed);
    background_processes_end_with_their_command(&bed);
    a_signal_or_the_death_of_the_runner_ends_the_command(&bed);
    a_closed_output_ends_the_command(&bed);
    assert_eq!(bed.qemus(), qemu, "all of it ran in the same host");

    assert!(bed.command(&["down"]).status().unwrap().success());
    eventually("QEMU ends", || bed.qemus().is_empty());
    assert!(!bed.path().join("target/nested/control.sock").exists());
    assert_eq!(bed.command(&["status"]).output().unwrap().status.code(), Some(3));
}

fn exit_codes_pass_through(bed: &Bed) {
    for code in [0, 1, 42, 255] {
        assert_eq!(bed.run(&format!("exit {code}")).status.code(), Some(code));
    }
    assert_eq!(bed.run("kill -9 $$").status.code(), Some(128 + 9));
    let missing = bed.command(&["run", "--", "no-such-program"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(127));
    assert!(text(&missing.stderr).contains("no-such-program"));
}

fn streams_stay_apart(bed: &Bed) {
    let output = bed.run("echo out; echo err >&2; pwd");
    assert_eq!(text(&output.stdout), format!("out\n{}\n", bed.path().display()));
    assert_eq!(text(&output.stderr), "err\n");
    let output = bed
        .command(&["run", "--env", "A=b c", "--", "sh", "-c", "echo \"$A\""])
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout), "b c\n");
}

fn input_and_much_output_pass_through(bed: &Bed) {
    let input: Vec<u8> = (0..2_000_000_u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    let mut child = bed
        .command(&["run", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let sent = input.clone();
    let writer = thread::spawn(move || stdin.write_all(&sent));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    assert!(output.stdout == input, "2 MB came back changed");
}

fn kvm_answers(bed: &Bed) {
    // KVM_GET_API_VERSION (linux/kvm.h) is 12 for ever.
    let output =
        bed.run("/usr/bin/python3 -c 'import fcntl; print(fcntl.ioctl(open(\"/dev/kvm\"), 0xAE00))'");
    assert_eq!(text(&output.stdout), "12\n", "{}", text(&output.stderr));
}

fn files_are_fresh_on_both_sides(bed: &Bed) {
    let file = bed.path().join("changing");
    for content in ["first", "second, longer", "3"] {
        fs::write(&file, content).unwrap();
        assert_eq!(text(&bed.run("cat changing").stdout), content);
    }
    // Replaced, as compilers do it.
    fs::write(bed.path().join("new"), "renamed").unwrap();
    fs::rename(bed.path().join("new"), &file).unwrap();
    assert_eq!(
        text(&bed.run("cat changing; echo written >>inside").stdout),
        "renamed"
    );
    assert_eq!(
        fs::read_to_string(bed.path().join("inside")).unwrap(),
        "written\n"
    );
}

fn the_time_limit_kills(bed: &Bed) {
    let output = bed
        .command(&["run", "--time-limit", "2", "--", "sleep", "1000"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(124));
    assert!(
        text(&output.stderr).contains("time limit of 2 s"),
        "{}",
        text(&output.stderr)
    );
    assert!(!is_running(bed, "[s]leep 1000"));
}

fn background_processes_end_with_their_command(bed: &Bed) {
    bed.run("setsid sleep 1001 & exit 0");
    assert!(!is_running(bed, "[s]leep 1001"));
    // Also when they have left the command's cgroup.
    bed.run("mkdir /sys/fs/cgroup/elsewhere; (echo 0 >/sys/fs/cgroup/elsewhere/cgroup.procs; exec sleep 1002) & sleep 1");
    assert!(!is_running(bed, "[s]leep 1002"));
}

fn a_signal_or_the_death_of_the_runner_ends_the_command(bed: &Bed) {
    for (sent, duration, code) in [
        (Signal::SIGTERM, 1003, Some(128 + 15)),
        (Signal::SIGINT, 1004, Some(128 + 2)),
        (Signal::SIGKILL, 1005, None),
    ] {
        let mut runner = bed.start(&format!("trap '' HUP; sleep {duration} & wait; sleep {duration}"));
        let name = format!("[s]leep {duration}");
        eventually("the command runs", || is_running(bed, &name));
        signal(&runner, sent);
        let status = runner.wait().unwrap();
        assert_eq!(status.code(), code, "after {sent}");
        eventually("the command ends", || !is_running(bed, &name));
    }
}

fn a_closed_output_ends_the_command(bed: &Bed) {
    let mut runner = bed
        .command(&["run", "--", "yes", "for-ever"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(runner.stdout.take());
    assert_eq!(runner.wait().unwrap().code(), Some(128 + 13));
}

fn is_running(bed: &Bed, pattern: &str) -> bool {
    let output = bed.run(&format!(
        "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c '{pattern}'"
    ));
    text(&output.stdout).trim() != "0"
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    let Some(bed) = Bed::new() else { return };
    for (sent, code) in [(Signal::SIGINT, Some(128 + 2)), (Signal::SIGKILL, None)] {
        let started = bed.path().join("started");
        let mut runner = bed.start("touch started; exec sleep 1000");
        eventually("the command runs", || started.exists());
        assert_eq!(bed.qemus().len(), 1);
        signal(&runner, sent);
        assert_eq!(runner.wait().unwrap().code(), code, "after {sent}");
        eventually("QEMU ends", || bed.qemus().is_empty());
        fs::remove_file(started).unwrap();
    }
    let mut left: Vec<_> = fs::read_dir(bed.path().join("target/nested"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["console.log"]);
}

#[test]
fn a_host_that_cannot_boot_is_reported_with_its_console() {
    let Some(bed) = Bed::new() else { return };
    // Too little memory for the kernel.
    let output = bed
        .command(&["run", "--memory", "80", "--", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    let said = text(&output.stderr);
    assert!(
        said.contains("did not boot") && said.contains("console.log"),
        "{said}"
    );
    eventually("QEMU ends", || bed.qemus().is_empty());
}
