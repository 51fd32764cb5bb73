//! From an image's configuration and a container's wishes to the process to start, as Kubernetes defines it.

use std::fmt;

use oci_spec::image::ImageConfiguration;

/// What Linux programs find when nobody sets `PATH`.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container's author says about its process. Empty means "as the image says".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessOverrides {
    /// Replaces the image's entry point and drops its arguments.
    pub command: Vec<String>,
    /// Replaces the image's arguments.
    pub args: Vec<String>,
    /// `NAME=value`, added to those of the image; the same name replaces.
    pub env: Vec<(String, String)>,
    /// Replaces the image's working directory.
    pub working_dir: Option<String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; replaces the image's.
    pub user: Option<String>,
    /// Groups besides those the user has in the image.
    pub supplementary_groups: Vec<u32>,
}

/// The process to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessArgs {
    /// Program and arguments, never empty.
    pub args: Vec<String>,
    /// `NAME=value`, always with `PATH` and `HOME`.
    pub env: Vec<String>,
    /// Absolute.
    pub cwd: String,
    /// User.
    pub uid: u32,
    /// Main group.
    pub gid: u32,
    /// Further groups, rising, without the main one.
    pub additional_gids: Vec<u32>,
}

/// Why there is no process to start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// Neither image nor container names a program.
    #[error("No command: the image has no entry point and the container gives none")]
    NoCommand,
    /// The image does not know the user.
    #[error("User '{user}' is not in the image's /etc/passwd")]
    UnknownUser {
        /// Name as given.
        user: String,
    },
    /// The image does not know the group.
    #[error("Group '{group}' is not in the image's /etc/group")]
    UnknownGroup {
        /// Name as given.
        group: String,
    },
    /// A relative working directory.
    #[error("Working directory '{path}' is not an absolute path")]
    RelativeWorkingDir {
        /// As given.
        path: String,
    },
    /// An environment variable without a usable name.
    #[error("Environment variable name '{name}' is not valid: it must not be empty or contain '=' or NUL")]
    InvalidEnv {
        /// As given.
        name: String,
    },
}

/// Decides what to start. `passwd` and `group` are the image's `/etc/passwd` and `/etc/group`, empty if it has none
/// ([`super::Image::read_file`]).
///
/// # Errors
/// See [`ProcessError`]; each names the value at fault.
pub fn process_args(
    image: &ImageConfiguration,
    overrides: &ProcessOverrides,
    passwd: &[u8],
    group: &[u8],
) -> Result<ProcessArgs, ProcessError> {
    let config = image.config().as_ref();
    let list = |field: Option<&Option<Vec<String>>>| field.cloned().flatten().unwrap_or_default();
    let (mut args, defaults) = if overrides.command.is_empty() {
        (
            list(config.map(|config| config.entrypoint())),
            list(config.map(|config| config.cmd())),
        )
    } else {
        (overrides.command.clone(), Vec::new())
    };
    args.extend(if overrides.args.is_empty() {
        defaults
    } else {
        overrides.args.clone()
    });
    if args.is_empty() {
        return Err(ProcessError::NoCommand);
    }
    let text = |field: Option<&Option<String>>| field.cloned().flatten().filter(|text| !text.is_empty());
    let user = overrides.user.clone().filter(|user| !user.is_empty());
    let user = user
        .or_else(|| text(config.map(|config| config.user())))
        .unwrap_or_default();
    let resolved = resolve_user(&user, &Table(passwd), &Table(group))?;
    let cwd = overrides.working_dir.clone().filter(|path| !path.is_empty());
    let cwd = cwd
        .or_else(|| text(config.map(|config| config.working_dir())))
        .unwrap_or_else(|| "/".into());
    if !cwd.starts_with('/') {
        return Err(ProcessError::RelativeWorkingDir { path: cwd });
    }
    let mut env = list(config.map(|config| config.env()));
    for (name, value) in &overrides.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(ProcessError::InvalidEnv { name: name.clone() });
        }
        set_env(&mut env, name, value);
    }
    if !has_env(&env, "PATH") {
        env.insert(0, DEFAULT_PATH.to_owned());
    }
    if !has_env(&env, "HOME") {
        env.push(format!("HOME={}", resolved.home));
    }
    let mut additional_gids = resolved.groups;
    additional_gids.extend(&overrides.supplementary_groups);
    additional_gids.sort_unstable();
    additional_gids.dedup();
    additional_gids.retain(|gid| *gid != resolved.gid);
    Ok(ProcessArgs {
        args,
        env,
        cwd,
        uid: resolved.uid,
        gid: resolved.gid,
        additional_gids,
    })
}

fn has_env(env: &[String], name: &str) -> bool {
    env.iter().any(|entry| entry.split('=').next() == Some(name))
}

/// Replaces in place, so that the image's order stays.
fn set_env(env: &mut Vec<String>, name: &str, value: &str) {
    let entry = format!("{name}={value}");
    match env.iter_mut().find(|old| old.split('=').next() == Some(name)) {
        Some(old) => *old = entry,
        None => env.push(entry),
    }
}

struct ResolvedUser {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

/// `user[:group]`, each a name or a number. A number need not be in the tables; a name must be.
fn resolve_user(text: &str, passwd: &Table<'_>, group: &Table<'_>) -> Result<ResolvedUser, ProcessError> {
    let (user, group_text) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = user.parse::<u32>().ok();
    // A name made of digits counts as a number, as in Docker and containerd.
    let found = passwd.rows().find(|row| match number {
        Some(uid) => row.get(2).and_then(|field| field.parse().ok()) == Some(uid),
        None => row.first() == Some(&user),
    });
    let id = |row: &Vec<&str>, at: usize| row.get(at).and_then(|field| field.parse::<u32>().ok());
    let uid = number.or_else(|| found.as_ref().and_then(|row| id(row, 2)));
    let uid = uid.ok_or_else(|| ProcessError::UnknownUser {
        user: user.to_owned(),
    })?;
    let name = found
        .as_ref()
        .and_then(|row| row.first().copied())
        .unwrap_or(user);
    let gid = match group_text {
        Some(text) => {
            let listed = || {
                group
                    .rows()
                    .find(|row| row.first() == Some(&text))
                    .and_then(|row| id(&row, 2))
            };
            text.parse()
                .ok()
                .or_else(listed)
                .ok_or_else(|| ProcessError::UnknownGroup {
                    group: text.to_owned(),
                })?
        }
        None => found.as_ref().and_then(|row| id(row, 3)).unwrap_or(0),
    };
    let is_member = |row: &Vec<&str>| {
        row.get(3)
            .is_some_and(|members| members.split(',').any(|who| who == name))
    };
    let groups = match group_text {
        // An explicit group leaves out those of the user, as in Docker.
        Some(_) => Vec::new(),
        None => group
            .rows()
            .filter(is_member)
            .filter_map(|row| id(&row, 2))
            .collect(),
    };
    let home = found
        .as_ref()
        .and_then(|row| row.get(5).copied())
        .filter(|home| !home.is_empty());
    let home = home.unwrap_or(if uid == 0 { "/root" } else { "/" }).to_owned();
    Ok(ResolvedUser {
        uid,
        gid,
        groups,
        home,
    })
}

/// A file of lines with fields separated by colons.
struct Table<'t>(&'t [u8]);

impl<'t> Table<'t> {
    fn rows(&self) -> impl Iterator<Item = Vec<&'t str>> + use<'t> {
        let lines = self
            .0
            .split(|byte| *byte == b'\n')
            .filter_map(|line| std::str::from_utf8(line).ok());
        lines.map(|line| line.trim_end_matches('\r').split(':').collect())
    }
}

impl fmt::Debug for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:Web:/var/www:/bin/sh\n\xff\n";
    const GROUP: &[u8] = b"root:x:0:\nweb:x:34:\nlogs:x:50:web,other\nlast:x:60:other,web\nnone:x:70:webx\n";

    fn image(config: &str) -> ImageConfiguration {
        let text = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[]}},"config":{config}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn typical() -> ImageConfiguration {
        image(
            r#"{"Entrypoint":["/entry"],"Cmd":["a","b"],"Env":["A=1","PATH=/bin"],"WorkingDir":"/srv","User":"web"}"#,
        )
    }

    fn start(image: &ImageConfiguration, overrides: &ProcessOverrides) -> Result<ProcessArgs, ProcessError> {
        process_args(image, overrides, PASSWD, GROUP)
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn check_args(command: &[&str], args: &[&str], expected: &[&str]) {
        let overrides = ProcessOverrides {
            command: strings(command),
            args: strings(args),
            ..ProcessOverrides::default()
        };
        assert_eq!(start(&typical(), &overrides).unwrap().args, expected);
    }

    #[test]
    fn command_replaces_entry_point_and_args_replace_cmd() {
        check_args(&[], &[], &["/entry", "a", "b"]);
        check_args(&["/c"], &[], &["/c"]);
        check_args(&[], &["x"], &["/entry", "x"]);
        check_args(&["/c"], &["x", "y"], &["/c", "x", "y"]);
    }

    #[test]
    fn an_image_without_anything_runs_as_root_in_the_root_with_defaults() {
        let bare = image("null");
        assert_eq!(
            start(&bare, &ProcessOverrides::default()),
            Err(ProcessError::NoCommand)
        );
        let overrides = ProcessOverrides {
            command: strings(&["/x"]),
            ..ProcessOverrides::default()
        };
        let process = process_args(&bare, &overrides, b"", b"").unwrap();
        assert_eq!((process.uid, process.gid, process.cwd.as_str()), (0, 0, "/"));
        assert_eq!(process.env, [DEFAULT_PATH, "HOME=/root"]);
    }

    #[test]
    fn environment_keeps_the_images_order_and_takes_the_containers_values() {
        let overrides = ProcessOverrides {
            env: vec![("B".into(), "2=2".into()), ("A".into(), String::new())],
            ..ProcessOverrides::default()
        };
        assert_eq!(
            start(&typical(), &overrides).unwrap().env,
            ["A=", "PATH=/bin", "B=2=2", "HOME=/var/www"]
        );
        let overrides = ProcessOverrides {
            env: vec![("A=B".into(), "1".into())],
            ..ProcessOverrides::default()
        };
        assert_eq!(
            start(&typical(), &overrides),
            Err(ProcessError::InvalidEnv { name: "A=B".into() })
        );
    }

    fn check_user(user: &str, uid: u32, gid: u32, groups: &[u32]) {
        let overrides = ProcessOverrides {
            user: Some(user.to_owned()),
            ..ProcessOverrides::default()
        };
        let process = start(&typical(), &overrides).unwrap_or_else(|error| panic!("{user}: {error}"));
        assert_eq!(
            (process.uid, process.gid, process.additional_gids.as_slice()),
            (uid, gid, groups),
            "{user}"
        );
    }

    #[test]
    fn users_and_groups_are_names_or_numbers() {
        check_user("", 33, 34, &[50, 60]);
        check_user("web", 33, 34, &[50, 60]);
        check_user("33", 33, 34, &[50, 60]);
        check_user("web:logs", 33, 50, &[]);
        check_user("1000:7", 1000, 7, &[]);
        check_user("1000", 1000, 0, &[]);
        check_user("0", 0, 0, &[]);
        let unknown = |user: &str| {
            let overrides = ProcessOverrides {
                user: Some(user.to_owned()),
                ..ProcessOverrides::default()
            };
            start(&typical(), &overrides).unwrap_err()
        };
        assert_eq!(
            unknown("nobody"),
            ProcessError::UnknownUser {
                user: "nobody".into()
            }
        );
        assert_eq!(
            unknown("web:nogroup"),
            ProcessError::UnknownGroup {
                group: "nogroup".into()
            }
        );
    }

    #[test]
    fn supplementary_groups_add_to_the_images() {
        let overrides = ProcessOverrides {
            supplementary_groups: vec![60, 5, 34],
            ..ProcessOverrides::default()
        };
        assert_eq!(
            start(&typical(), &overrides).unwrap().additional_gids,
            [5, 50, 60]
        );
    }

    #[test]
    fn working_directory_must_be_absolute() {
        let overrides = ProcessOverrides {
            working_dir: Some("tmp".into()),
            ..ProcessOverrides::default()
        };
        assert_eq!(
            start(&typical(), &overrides),
            Err(ProcessError::RelativeWorkingDir { path: "tmp".into() })
        );
    }
}
