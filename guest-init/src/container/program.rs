//! What a new process does between `clone` and `execve`, as data.
//!
//! The guest init plans the whole program first (`plan.rs`, pure), clones, and the child runs it here, step by step.
//! Nothing in this file allocates, takes a lock or panics: every string is a `CString` made before. The first step that
//! fails ends the child; its number and `errno` go to the guest init over the report channel, which closes by itself
//! when `execve` succeeds.

use std::{
    ffi::{CStr, CString},
    fmt,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use libc::sock_filter;
use rustix::{
    fs::{self, CWD, FileType, Mode, OFlags, ResolveFlags},
    io::{self, Errno},
    mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
    net::{self, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
    process::{self, Gid, Resource, Rlimit, Uid},
    pty, stdio, system, termios, thread,
};

use crate::{
    container::capabilities::{self, Capabilities},
    sys::{self, exec::ExecImage, mount::MountAttributes},
};

/// A path below the container's root, with every leading part of it: `a`, `a/b`, `a/b/c`. Symbolic links in it are
/// followed as if the root were `/`, so it cannot leave the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InRoot {
    prefixes: Vec<CString>,
    names: Vec<CString>,
}

impl InRoot {
    /// Parses an absolute path. `None` when it is not absolute, has a `..` or a NUL.
    #[must_use]
    pub fn parse(path: &str) -> Option<Self> {
        let mut parsed = Self {
            prefixes: Vec::new(),
            names: Vec::new(),
        };
        let mut prefix = String::new();
        for name in path
            .strip_prefix('/')?
            .split('/')
            .filter(|name| !name.is_empty() && *name != ".")
        {
            if name == ".." {
                return None;
            }
            if !prefix.is_empty() {
                prefix.push('/');
            }
            prefix.push_str(name);
            parsed.prefixes.push(CString::new(prefix.clone()).ok()?);
            parsed.names.push(CString::new(name).ok()?);
        }
        Some(parsed)
    }

    fn full(&self) -> &CStr {
        self.prefixes.last().map_or(c".", |path| path)
    }
}

/// One step. Paths are the guest's before [`Step::EnterRoot`] and the container's after it, where not [`InRoot`].
#[derive(Debug)]
pub enum Step {
    /// A session of its own.
    NewSession,
    /// Writes a file of `/proc`.
    WriteFile {
        /// File.
        path: CString,
        /// What to write.
        content: Vec<u8>,
    },
    /// A cgroup namespace rooted at the cgroup the process is in.
    NewCgroupNamespace,
    /// Moves into the namespaces of the container's init.
    JoinContainer {
        /// That process.
        init: Arc<OwnedFd>,
        /// `CLONE_NEW*`.
        kinds: i32,
    },
    /// No mount made here is seen outside.
    PrivateMounts,
    /// Takes the prepared root file system as the root of [`InRoot`] paths.
    OpenRoot {
        /// Where the guest init has mounted it.
        path: CString,
    },
    /// Takes a new, empty directory that nobody can write to as the root.
    EmptyRoot {
        /// A directory to put it on.
        at: CString,
    },
    /// Mounts a file system of the kernel's.
    Mount {
        /// Where.
        target: InRoot,
        /// Its type.
        kind: CString,
        /// Its parameters; without a value: a flag.
        parameters: Vec<(CString, Option<CString>)>,
        /// Its attributes.
        attributes: MountAttributes,
    },
    /// Makes a directory or file of the guest's visible.
    Bind {
        /// The directory or file; made by the guest init.
        source: CString,
        /// Where; made if missing.
        target: InRoot,
        /// With the mounts below it.
        recursive: bool,
        /// Its attributes.
        attributes: MountAttributes,
    },
    /// A symbolic link, where there is nothing yet.
    Symlink {
        /// What it says.
        content: CString,
        /// The directory it is in, relative to the root.
        directory: CString,
        /// Its name.
        name: CString,
    },
    /// The host name.
    Hostname {
        /// Name.
        name: Vec<u8>,
    },
    /// Creates the working directory if it is missing.
    MakeDirectory {
        /// Path.
        path: InRoot,
    },
    /// Makes the root the root, and lets go of the guest's.
    EnterRoot,
    /// Hides a file or directory, if it exists.
    Mask {
        /// Path.
        path: InRoot,
    },
    /// Forbids writing below a path, if it exists.
    MakeReadOnly {
        /// Path.
        path: InRoot,
    },
    /// Forbids writing to the root file system.
    MakeRootReadOnly,
    /// Opens a new terminal, sends its controlling side to the guest init, and makes it the process's.
    Terminal {
        /// Owner.
        uid: u32,
        /// First size.
        size: Option<(u16, u16)>,
        /// Bind it to `/dev/console`.
        console: Option<InRoot>,
    },
    /// Standard input, output and error.
    Stdio {
        /// The three.
        streams: [OwnedFd; 3],
    },
    /// A resource limit.
    Limit {
        /// Which.
        resource: Resource,
        /// Soft and hard limit.
        limit: Rlimit,
    },
    /// File mode creation mask.
    Umask {
        /// Mask.
        mask: Mode,
    },
    /// Working directory.
    ChangeDirectory {
        /// Path.
        path: CString,
    },
    /// Limits what the program can ever get.
    BoundingSet {
        /// The capabilities to keep.
        keep: thread::CapabilitySet,
    },
    /// User and groups, with the capabilities kept for the next step.
    SetUser {
        /// User.
        uid: Uid,
        /// Group.
        gid: Gid,
        /// Supplementary groups.
        groups: Vec<Gid>,
    },
    /// Capabilities.
    SetCapabilities {
        /// All sets.
        capabilities: Capabilities,
    },
    /// No privileges through `execve`.
    NoNewPrivileges,
    /// The system call filter.
    Seccomp {
        /// In order.
        filter: Vec<sock_filter>,
    },
    /// Runs no program: does nothing for ever.
    Pause,
    /// Runs the program.
    Execute {
        /// Paths to try in order.
        candidates: Vec<CString>,
        /// Arguments and environment.
        image: ExecImage,
    },
}

/// A planned program.
#[derive(Debug, Default)]
pub struct Program {
    /// In order.
    pub steps: Vec<Step>,
}

/// What the child sends when a step fails: its index and `errno`, native byte order.
pub const REPORT_BYTES: usize = 8;

/// Splits a report into the step's index and the error.
#[must_use]
pub fn parse_report(report: [u8; REPORT_BYTES]) -> (usize, std::io::Error) {
    let [a, b, c, d, e, f, g, h] = report;
    let index = u32::from_ne_bytes([a, b, c, d]);
    let errno = i32::from_ne_bytes([e, f, g, h]);
    (
        usize::try_from(index).unwrap_or(usize::MAX),
        std::io::Error::from_raw_os_error(errno),
    )
}

impl Program {
    /// Runs in the child; the result is its exit status.
    pub fn run(&self, report: BorrowedFd<'_>) -> i32 {
        sys::signal::reset();
        // Until execve nothing in the container may look into this copy of the guest init.
        let _ = process::set_dumpable_behavior(process::DumpableBehavior::NotDumpable);
        let mut state = State { root: None, report };
        for (index, step) in self.steps.iter().enumerate() {
            if let Err(errno) = step.run(&mut state) {
                let mut message = [0; REPORT_BYTES];
                let (number, error) = message.split_at_mut(REPORT_BYTES / 2);
                number.copy_from_slice(&u32::try_from(index).unwrap_or(u32::MAX).to_ne_bytes());
                error.copy_from_slice(&errno.raw_os_error().to_ne_bytes());
                let _ = net::send(report, &message, SendFlags::NOSIGNAL);
                return EXIT_SETUP_FAILED;
            }
        }
        EXIT_SETUP_FAILED
    }
}

/// Exit status of a child that did not get to its program; nobody sees it, the start request fails instead.
const EXIT_SETUP_FAILED: i32 = 255;

struct State<'a> {
    root: Option<OwnedFd>,
    report: BorrowedFd<'a>,
}

impl State<'_> {
    fn root(&self) -> io::Result<BorrowedFd<'_>> {
        self.root.as_ref().map(AsFd::as_fd).ok_or(Errno::BADF)
    }
}

fn open_in_root(root: BorrowedFd<'_>, path: &CStr, flags: OFlags) -> io::Result<OwnedFd> {
    fs::openat2(
        root,
        path,
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT,
    )
}

/// Opens the directory `path`, making what is missing of it.
fn make_directory(root: BorrowedFd<'_>, path: &InRoot) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let mut directory = open_in_root(root, c".", flags)?;
    for (prefix, name) in path.prefixes.iter().zip(&path.names) {
        directory = match open_in_root(root, prefix, flags) {
            Err(Errno::NOENT) => {
                match fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno),
                }
                open_in_root(root, prefix, flags)?
            }
            other => other?,
        };
    }
    Ok(directory)
}

/// Opens the file `path`, making an empty one and the directories above it if there is nothing.
fn make_file(root: BorrowedFd<'_>, path: &InRoot) -> io::Result<OwnedFd> {
    match open_in_root(root, path.full(), OFlags::PATH) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let Some(name) = path.names.last() else {
        return Err(Errno::ISDIR);
    };
    let mut above = open_in_root(root, c".", OFlags::PATH | OFlags::DIRECTORY)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    for (prefix, name) in path.prefixes.iter().zip(&path.names).take(path.names.len() - 1) {
        above = match open_in_root(root, prefix, flags) {
            Err(Errno::NOENT) => {
                fs::mkdirat(&above, name, Mode::from_raw_mode(0o755))?;
                open_in_root(root, prefix, flags)?
            }
            other => other?,
        };
    }
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match fs::openat(&above, name, flags, Mode::from_raw_mode(0o644)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    open_in_root(root, path.full(), OFlags::PATH)
}

fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    mount::move_mount(mount, c"", target, c"", flags)
}

fn clone_tree(source: BorrowedFd<'_>, path: &CStr, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    mount::open_tree(source, path, flags)
}

fn set_attributes(mount: BorrowedFd<'_>, attributes: MountAttributes, recursive: bool) -> io::Result<()> {
    if attributes == MountAttributes::default() {
        return Ok(());
    }
    sys::mount::set_attributes(mount, attributes, recursive).map_err(errno)
}

fn is_directory(file: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(fs::fstat(file)?.st_mode) == FileType::Directory)
}

/// Every [`std::io::Error`] of `sys` is made from an error number.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn new_file_system(
    kind: &CStr,
    parameters: &[(CString, Option<CString>)],
    attributes: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let context = mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in parameters {
        match value {
            Some(value) => mount::fsconfig_set_string(context.as_fd(), key.as_c_str(), value.as_c_str())?,
            None => mount::fsconfig_set_flag(context.as_fd(), key.as_c_str())?,
        }
    }
    mount::fsconfig_create(context.as_fd())?;
    mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

impl Step {
    fn run(&self, state: &mut State<'_>) -> io::Result<()> {
        match self {
            Self::NewSession => process::setsid().map(drop),
            Self::WriteFile { path, content } => {
                let file = fs::open(path.as_c_str(), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
                io::write(&file, content).map(drop)
            }
            Self::NewCgroupNamespace => sys::namespace::unshare(libc::CLONE_NEWCGROUP).map_err(errno),
            Self::JoinContainer { init, kinds } => {
                sys::namespace::join(init.as_fd(), *kinds).map_err(errno)?;
                state.root = Some(fs::open(
                    c"/",
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                    Mode::empty(),
                )?);
                Ok(())
            }
            Self::PrivateMounts => {
                let root = fs::open(
                    c"/",
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                let private = MountAttributes {
                    propagation: libc::MS_PRIVATE,
                    ..Default::default()
                };
                set_attributes(root.as_fd(), private, true)
            }
            Self::OpenRoot { path } => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                state.root = Some(fs::open(path.as_c_str(), flags, Mode::empty())?);
                Ok(())
            }
            Self::EmptyRoot { at } => {
                let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
                    | MountAttrFlags::MOUNT_ATTR_NOSUID
                    | MountAttrFlags::MOUNT_ATTR_NODEV
                    | MountAttrFlags::MOUNT_ATTR_NOEXEC;
                let mount = new_file_system(c"tmpfs", &[], attributes)?;
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                attach(
                    mount.as_fd(),
                    fs::open(at.as_c_str(), flags, Mode::empty())?.as_fd(),
                )?;
                state.root = Some(mount);
                Ok(())
            }
            Self::Mount {
                target,
                kind,
                parameters,
                attributes,
            } => {
                let mount = new_file_system(kind, parameters, MountAttrFlags::empty())?;
                set_attributes(mount.as_fd(), *attributes, false)?;
                attach(mount.as_fd(), make_directory(state.root()?, target)?.as_fd())
            }
            Self::Bind {
                source,
                target,
                recursive,
                attributes,
            } => {
                let mount = clone_tree(CWD, source, *recursive)?;
                set_attributes(mount.as_fd(), *attributes, *recursive)?;
                let target = if is_directory(mount.as_fd())? {
                    make_directory(state.root()?, target)?
                } else {
                    make_file(state.root()?, target)?
                };
                attach(mount.as_fd(), target.as_fd())
            }
            Self::Symlink {
                content,
                directory,
                name,
            } => {
                let directory = open_in_root(state.root()?, directory, OFlags::PATH | OFlags::DIRECTORY)?;
                match fs::symlinkat(content.as_c_str(), &directory, name.as_c_str()) {
                    Err(Errno::EXIST) => Ok(()),
                    other => other,
                }
            }
            Self::Hostname { name } => system::sethostname(name),
            Self::MakeDirectory { path } => make_directory(state.root()?, path).map(drop),
            Self::EnterRoot => {
                process::fchdir(state.root()?)?;
                // The old root ends up on top of the new one, at the same place, and is then taken off (pivot_root(2)).
                process::pivot_root(c".", c".")?;
                mount::unmount(c".", UnmountFlags::DETACH)?;
                process::chdir(c"/")
            }
            Self::Mask { path } => {
                let target = match open_in_root(state.root()?, path.full(), OFlags::PATH) {
                    Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
                    other => other?,
                };
                let mount = if is_directory(target.as_fd())? {
                    new_file_system(c"tmpfs", &[], MountAttrFlags::MOUNT_ATTR_RDONLY)?
                } else {
                    let null = open_in_root(state.root()?, c"dev/null", OFlags::PATH)?;
                    clone_tree(null.as_fd(), c"", false)?
                };
                attach(mount.as_fd(), target.as_fd())
            }
            Self::MakeReadOnly { path } => {
                let target = match open_in_root(state.root()?, path.full(), OFlags::PATH) {
                    Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
                    other => other?,
                };
                let mount = clone_tree(target.as_fd(), c"", true)?;
                let read_only = MountAttributes {
                    set: libc::MOUNT_ATTR_RDONLY,
                    ..Default::default()
                };
                set_attributes(mount.as_fd(), read_only, true)?;
                attach(mount.as_fd(), target.as_fd())
            }
            Self::MakeRootReadOnly => {
                let read_only = MountAttributes {
                    set: libc::MOUNT_ATTR_RDONLY,
                    ..Default::default()
                };
                set_attributes(state.root()?, read_only, false)
            }
            Self::Terminal { uid, size, console } => terminal(state, *uid, *size, console.as_ref()),
            Self::Stdio {
                streams: [input, output, error],
            } => {
                stdio::dup2_stdin(input)?;
                stdio::dup2_stdout(output)?;
                stdio::dup2_stderr(error)
            }
            Self::Limit { resource, limit } => process::setrlimit(*resource, *limit),
            Self::Umask { mask } => {
                process::umask(*mask);
                Ok(())
            }
            Self::ChangeDirectory { path } => process::chdir(path.as_c_str()),
            Self::BoundingSet { keep } => {
                for capability in capabilities::all() {
                    if !keep.contains(capability) {
                        thread::remove_capability_from_bounding_set(capability)?;
                    }
                }
                Ok(())
            }
            Self::SetUser { uid, gid, groups } => {
                thread::set_keep_capabilities(true)?;
                thread::set_thread_groups(groups)?;
                thread::set_thread_res_gid(*gid, *gid, *gid)?;
                thread::set_thread_res_uid(*uid, *uid, *uid)?;
                thread::set_keep_capabilities(false)
            }
            Self::SetCapabilities { capabilities } => {
                thread::set_capabilities(None, capabilities.sets)?;
                thread::clear_ambient_capability_set()?;
                for capability in capabilities::all() {
                    if capabilities.ambient.contains(capability) {
                        thread::configure_capability_in_ambient_set(capability, true)?;
                    }
                }
                Ok(())
            }
            Self::NoNewPrivileges => thread::set_no_new_privs(true),
            Self::Seccomp { filter } => sys::seccomp::install(filter).map_err(errno),
            Self::Pause => {
                thread::set_name(c"pause")?;
                // The report channel too: this has succeeded.
                sys::namespace::close_all().map_err(errno)?;
                sys::signal::rest()
            }
            Self::Execute { candidates, image } => execute(candidates, image),
        }
    }
}

/// Opens a terminal of the container's own `devpts`.
fn terminal(
    state: &State<'_>,
    uid: u32,
    size: Option<(u16, u16)>,
    console: Option<&InRoot>,
) -> io::Result<()> {
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let controller = open_in_root(state.root()?, c"dev/pts/ptmx", flags)?;
    pty::unlockpt(&controller)?;
    let peer_flags = pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY | pty::OpenptFlags::CLOEXEC;
    let terminal = pty::ioctl_tiocgptpeer(&controller, peer_flags)?;
    if let Some((ws_row, ws_col)) = size {
        termios::tcsetwinsize(
            &terminal,
            termios::Winsize {
                ws_row,
                ws_col,
                ws_xpixel: 0,
                ws_ypixel: 0,
            },
        )?;
    }
    fs::fchown(&terminal, Some(Uid::from_raw(uid)), None)?;
    if let Some(console) = console {
        let mount = clone_tree(terminal.as_fd(), c"", false)?;
        attach(mount.as_fd(), make_file(state.root()?, console)?.as_fd())?;
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [controller.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    net::sendmsg(
        state.report,
        &[std::io::IoSlice::new(b"t")],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    process::ioctl_tiocsctty(&terminal)?;
    stdio::dup2_stdin(&terminal)?;
    stdio::dup2_stdout(&terminal)?;
    stdio::dup2_stderr(&terminal)
}

/// Tries `candidates` as the shell does: the first that exists counts, and one that may not be run is remembered in case
/// no other is found.
fn execute(candidates: &[CString], image: &ExecImage) -> io::Result<()> {
    sys::namespace::close_on_exec_from(3).map_err(errno)?;
    let mut refused = Errno::NOENT;
    for path in candidates {
        match errno(image.exec(path)) {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => refused = Errno::ACCESS,
            other => return Err(other),
        }
    }
    Err(refused)
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |path: &CStr| path.to_string_lossy().into_owned();
        let in_root = |path: &InRoot| format!("/{}", text(path.full()));
        match self {
            Self::NewSession => f.write_str("start a session"),
            Self::WriteFile { path, content } => {
                write!(
                    f,
                    "write {:?} to {}",
                    String::from_utf8_lossy(content),
                    text(path)
                )
            }
            Self::NewCgroupNamespace => f.write_str("make a cgroup namespace"),
            Self::JoinContainer { .. } => f.write_str("join the namespaces of the container's init"),
            Self::PrivateMounts => f.write_str("make all mounts private"),
            Self::OpenRoot { path } => write!(f, "open the root file system {}", text(path)),
            Self::EmptyRoot { at } => write!(f, "mount an empty root at {}", text(at)),
            Self::Mount { target, kind, .. } => write!(f, "mount {} at {}", text(kind), in_root(target)),
            Self::Bind { source, target, .. } => write!(f, "bind {} to {}", text(source), in_root(target)),
            Self::Symlink { directory, name, .. } => {
                write!(f, "make the symbolic link /{}/{}", text(directory), text(name))
            }
            Self::Hostname { name } => write!(f, "set host name {:?}", String::from_utf8_lossy(name)),
            Self::MakeDirectory { path } => write!(f, "make the working directory {}", in_root(path)),
            Self::EnterRoot => f.write_str("change the root"),
            Self::Mask { path } => write!(f, "mask {}", in_root(path)),
            Self::MakeReadOnly { path } => write!(f, "make {} read-only", in_root(path)),
            Self::MakeRootReadOnly => f.write_str("make the root file system read-only"),
            Self::Terminal { .. } => f.write_str("open a terminal on /dev/pts"),
            Self::Stdio { .. } => f.write_str("connect standard input, output and error"),
            Self::Limit { resource, limit } => write!(f, "set the limit {resource:?} to {limit:?}"),
            Self::Umask { .. } => f.write_str("set the umask"),
            Self::ChangeDirectory { path } => write!(f, "change to the working directory {}", text(path)),
            Self::BoundingSet { .. } => f.write_str("drop capabilities from the bounding set"),
            Self::SetUser { uid, gid, .. } => {
                write!(f, "become user {} and group {}", uid.as_raw(), gid.as_raw())
            }
            Self::SetCapabilities { .. } => f.write_str("set capabilities"),
            Self::NoNewPrivileges => f.write_str("set no_new_privs"),
            Self::Seccomp { .. } => f.write_str("install the system call filter"),
            Self::Pause => f.write_str("rest"),
            Self::Execute { candidates, .. } => match candidates.as_slice() {
                [path] => write!(f, "execute {}", text(path)),
                [path, ..] => {
                    write!(
                        f,
                        "execute {} found through PATH",
                        text(path).rsplit('/').next().unwrap_or_default()
                    )
                }
                [] => f.write_str("execute nothing"),
            },
        }
    }
}

/// For messages that name what is wrong with a path.
impl fmt::Display for InRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.full().to_string_lossy())
    }
}
