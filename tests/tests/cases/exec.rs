//! Commands in containers.

use std::fmt::Write;

use anyhow::{Context, Result, bail, ensure};
use tests::{pod::Pod, process::Finished, stage::Stage};

use super::SAY_HELLO;

const GROUP: &str = "exec";
const LINES: usize = 100_000;

/// Runs a case with a group that has one container.
fn with_group(
    stage: &Stage,
    case: impl FnOnce(&dyn Fn(&[&str], &[u8]) -> Result<Finished>) -> Result<()>,
) -> Result<()> {
    let host = &stage.host;
    host.create(&Pod::new(GROUP).container("main", &stage.tools(), SAY_HELLO))?;
    case(&|command, input| host.exec_with(GROUP, "main", command, input))?;
    host.remove(GROUP)
}

fn shell(script: &str) -> [&str; 3] {
    ["/bin/sh", "-c", script]
}

/// That two long texts are the same; the message has the first line that is not.
fn ensure_lines(what: &str, got: &str, expected: &str) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let at = got
        .lines()
        .zip(expected.lines())
        .position(|(got, expected)| got != expected);
    let at = at.unwrap_or_else(|| got.lines().count().min(expected.lines().count()));
    bail!(
        "{what}: {} lines instead of {}, and line {} is {:?} instead of {:?}",
        got.lines().count(),
        expected.lines().count(),
        at + 1,
        got.lines().nth(at),
        expected.lines().nth(at)
    )
}

pub(crate) fn a_hundred_thousand_lines_arrive_complete_and_in_order(stage: &mut Stage) -> Result<()> {
    let mut lines = String::new();
    for line in 1..=LINES {
        writeln!(lines, "{line}").context("write a line")?;
    }
    with_group(stage, |exec| {
        let output = exec(&["/bin/seq", "1", &LINES.to_string()], b"")?.success()?;
        ensure_lines("output", &output, &lines)?;
        let output = exec(&["/bin/cat"], lines.as_bytes())?.success()?;
        ensure_lines("input and output", &output, &lines)?;
        // Neither stream holds the other up.
        let both = exec(&shell("cat | tee /dev/stderr"), lines.as_bytes())?;
        ensure!(both.code == 0, "it ended with {}", both.code);
        ensure_lines("output beside errors", &both.stdout, &lines)?;
        ensure_lines("errors beside output", &both.stderr, &lines)
    })
}

pub(crate) fn exit_codes_come_back_exactly(stage: &mut Stage) -> Result<()> {
    with_group(stage, |exec| {
        for (script, code) in [
            ("exit 0", 0),
            ("exit 1", 1),
            ("exit 42", 42),
            ("exit 255", 255),
            // A shell's own codes: no such program, not a program.
            ("/no/such/program", 127),
            ("/etc/passwd", 126),
            ("kill -TERM $$", 128 + 15),
            ("kill -KILL $$", 128 + 9),
            ("kill -SEGV $$", 128 + 11),
        ] {
            let finished = exec(&shell(script), b"")?;
            ensure!(
                finished.code == code,
                "{script:?} should end with {code}: {finished}"
            );
        }
        Ok(())
    })
}

pub(crate) fn input_ends_where_the_caller_ends_it(stage: &mut Stage) -> Result<()> {
    with_group(stage, |exec| {
        let finished = exec(&shell("wc -c; echo after the end; exit 3"), b"four")?;
        ensure!(
            (finished.code, finished.stdout.as_str()) == (3, "4\nafter the end\n"),
            "output and exit code come after the end of input: {finished}"
        );
        let nothing = exec(&shell("wc -c"), b"")?.success()?;
        ensure!(nothing == "0\n", "no input is an end too: {nothing:?}");
        // The other way round: the command is done with its input before the caller is.
        let finished = exec(&shell("exec <&-; echo enough; exit 5"), &vec![b'x'; 1 << 20])?;
        ensure!(
            (finished.code, finished.stdout.as_str()) == (5, "enough\n"),
            "a command need not read its input: {finished}"
        );
        Ok(())
    })
}

pub(crate) fn what_cannot_be_run_is_named(stage: &mut Stage) -> Result<()> {
    with_group(stage, |exec| {
        exec(&["/no/such/program"], b"")?.refused(125, &["/no/such/program"])?;
        exec(&["/etc/passwd"], b"")?.refused(125, &["/etc/passwd"])
    })?;
    stage
        .host
        .exec("nobody", "main", &["/bin/true"])?
        .refused(125, &["nobody"])
}
