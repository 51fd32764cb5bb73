//! The agent's doors, used by the programs of others.

use std::process::Command;

use anyhow::Result;
use tests::{
    host::{KEY_ID, KEY_SECRET},
    process,
    stage::Stage,
};

pub(crate) fn the_official_sdk_drives_a_live_group(stage: &mut Stage) -> Result<()> {
    let output = process::run(
        Command::new(&stage.product.python)
            .arg(stage.product.sdk_scripts.join("eci_sdk.py"))
            .args(["--sdk", "current", "--timeout", "120"])
            .args(["--endpoint", &stage.host.eci().to_string()])
            .args(["--key", KEY_ID, "--secret", KEY_SECRET])
            .args(["--image", &stage.tools()]),
        b"",
    )?
    .success()?;
    eprint!("{output}");
    Ok(())
}
