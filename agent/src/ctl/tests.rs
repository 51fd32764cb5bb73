use clap::CommandFactory;

use super::args::Cli;

/// The help of a subcommand (or of the program) as a user sees it.
fn help(path: &[&str]) -> String {
    let mut command = Cli::command();
    command.build();
    let mut at = &mut command;
    for name in path {
        at = at.find_subcommand_mut(name).unwrap();
    }
    at.render_long_help().to_string()
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn help_is_as_recorded() {
    let mut text = help(&[]);
    for path in [
        &["create"][..],
        &["ps"],
        &["describe"],
        &["logs"],
        &["exec"],
        &["top"],
        &["events"],
        &["resize"],
        &["restart"],
        &["rm"],
        &["snapshot", "create"],
        &["snapshot", "ls"],
        &["snapshot", "rm"],
        &["restore"],
        &["fork"],
        &["image", "pull"],
        &["image", "ls"],
        &["image", "rm"],
        &["disk", "ls"],
        &["disk", "rm"],
        &["completion"],
    ] {
        text.push_str(&format!("\n# ecictl {}\n\n{}", path.join(" "), help(path)));
    }
    // The default may come from the environment of whoever runs the test.
    let recorded = include_str!("snapshots/help.txt");
    if std::env::var_os("ECI_UPDATE_SNAPSHOTS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/ctl/snapshots/help.txt");
        std::fs::write(path, &text).unwrap();
        return;
    }
    assert!(
        text == recorded,
        "the help changed; run again with ECI_UPDATE_SNAPSHOTS=1 if it should:\n{text}"
    );
}
