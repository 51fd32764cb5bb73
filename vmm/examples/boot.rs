//! Boots a kernel in eci-vmm and shows what happens: the console on standard output, events with their times on
//! standard error. For debugging and measuring; see `--help`.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use vmm::config::{Extent, Origin, VmConfig};
use vmm::control::{self, Command, ControlError, Event, ExitReason};

const USAGE: &str = "usage: boot --kernel VMLINUX --initrd FILE [OPTION...]

  --vcpus N            (1)
  --memory MIB         (256)
  --args TEXT          kernel arguments besides the VMM's own
  --vmm FILE           eci-vmm, if it is not beside this program
  --read-only FILE     map FILE into vda, one after the other, each at a multiple of 1 GiB
  --read-write FILE    the same for vdb
  --time-limit SECONDS kill the guest after so long (60)
  --stats              print the counters when the time is up, before the kill
  --until-output       kill the guest after its first byte of console output, and tell when that was
  --possible N         vCPUs the guest knows of (as many as --vcpus)
  --save DIR           once the guest connects to a host port, write a snapshot there and kill it
  --from DIR           go on from that snapshot instead of booting; connects to guest port 1024 and kills it";

struct Options {
    kernel: PathBuf,
    initrd: PathBuf,
    vmm: PathBuf,
    config: VmConfig,
    read_only: Vec<PathBuf>,
    read_write: Vec<PathBuf>,
    time_limit: Duration,
    stats: bool,
    until_output: bool,
    save: Option<PathBuf>,
    from: Option<PathBuf>,
}

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match parse(std::env::args_os().skip(1)).and_then(boot) {
        Ok(ExitReason::Shutdown | ExitReason::Killed | ExitReason::Reset) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Options, Failure> {
    let beside = std::env::current_exe()?;
    // Examples are built into a folder beside the binaries.
    let vmm = beside
        .parent()
        .and_then(|folder| folder.parent())
        .map(|folder| folder.join("eci-vmm"));
    let mut options = Options {
        kernel: PathBuf::new(),
        initrd: PathBuf::new(),
        vmm: vmm.unwrap_or_default(),
        config: VmConfig {
            origin: Origin::Boot,
            n_vcpus: 1,
            n_possible_vcpus: 1,
            memory_mib: 256,
            hotplug_mib: 0,
            kernel_args: String::new(),
            cid: 3,
            net: None,
            read_only_extents: Vec::new(),
            read_write_extents: Vec::new(),
            io_uring: true,
        },
        read_only: Vec::new(),
        read_write: Vec::new(),
        time_limit: Duration::from_secs(60),
        stats: false,
        until_output: false,
        save: None,
        from: None,
    };
    while let Some(word) = words.next() {
        let name = word.to_string_lossy().into_owned();
        match name.as_str() {
            "--stats" => options.stats = true,
            "--until-output" => options.until_output = true,
            "--help" => return Err(USAGE.into()),
            _ => {
                let value = words
                    .next()
                    .ok_or_else(|| format!("{name} needs a value\n{USAGE}"))?;
                let text = value.to_string_lossy().into_owned();
                match name.as_str() {
                    "--kernel" => options.kernel = value.into(),
                    "--initrd" => options.initrd = value.into(),
                    "--vmm" => options.vmm = value.into(),
                    "--vcpus" => {
                        options.config.n_vcpus = text.parse()?;
                        options.config.n_possible_vcpus =
                            options.config.n_possible_vcpus.max(options.config.n_vcpus);
                    }
                    "--possible" => options.config.n_possible_vcpus = text.parse()?,
                    "--save" => options.save = Some(value.into()),
                    "--from" => {
                        options.from = Some(value.into());
                        options.config.origin = Origin::Snapshot { with_written: false };
                    }
                    "--memory" => options.config.memory_mib = text.parse()?,
                    "--args" => options.config.kernel_args = text,
                    "--read-only" => options.read_only.push(value.into()),
                    "--read-write" => options.read_write.push(value.into()),
                    "--time-limit" => options.time_limit = Duration::from_secs(text.parse()?),
                    _ => return Err(format!("unknown option {name}\n{USAGE}").into()),
                }
            }
        }
    }
    Ok(options)
}

fn open(path: &std::path::Path, write: bool) -> Result<File, Failure> {
    let file = File::options().read(true).write(write).open(path);
    file.map_err(|error| format!("open {}: {error}", path.display()).into())
}

fn extents(paths: &[PathBuf], write: bool, fds: &mut Vec<File>) -> Result<Vec<Extent>, Failure> {
    let mut extents = Vec::new();
    for (index, path) in (0..).zip(paths) {
        let file = open(path, write)?;
        let length_bytes = file.metadata()?.len().next_multiple_of(4096);
        extents.push(Extent {
            disk_offset_bytes: index << 30,
            file_offset_bytes: 0,
            length_bytes,
        });
        fds.push(file);
    }
    Ok(extents)
}

fn boot(mut options: Options) -> Result<ExitReason, Failure> {
    let (console_read, console_write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let [first, second] = match &options.from {
        None => [options.kernel.clone(), options.initrd.clone()],
        Some(dir) => [dir.join("state"), dir.join("memory")],
    };
    let mut fds = vec![
        open("/dev/kvm".as_ref(), true)?,
        open(&first, false)?,
        open(&second, false)?,
        File::from(console_write),
    ];
    options.config.read_only_extents = extents(&options.read_only, false, &mut fds)?;
    options.config.read_write_extents = extents(&options.read_write, true, &mut fds)?;

    let start = Instant::now();
    let (owner, socket) = control::pair()?;
    let mut command = std::process::Command::new(&options.vmm);
    vmm::sys::inherited::pass_control_fd(&mut command, socket);
    let mut child = command
        .spawn()
        .map_err(|error| format!("start {}: {error}", options.vmm.display()))?;
    drop(command);
    owner.send(
        &Command::Start(Box::new(options.config)),
        &fds.iter().map(AsFd::as_fd).collect::<Vec<_>>(),
    )?;
    drop(fds);

    let tell = move |what: &dyn std::fmt::Debug| {
        eprintln!("[{:9.3} ms] {what:?}", start.elapsed().as_secs_f64() * 1e3);
    };
    let owner = std::sync::Arc::new(owner);
    let console = std::thread::spawn({
        let owner = std::sync::Arc::clone(&owner);
        let until_output = options.until_output;
        move || {
            let mut buffer = [0; 4096];
            let mut first = true;
            while let Ok(length @ 1..) = rustix::io::read(&console_read, &mut buffer) {
                if first {
                    tell(&"first console output");
                    first = false;
                    if until_output {
                        let _ = owner.send(&Command::Kill, &[]);
                    }
                }
                let _ = rustix::io::write(std::io::stdout(), &buffer[..length]);
            }
        }
    });
    let (killer, limit) = (std::sync::Arc::clone(&owner), options.time_limit);
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        if options.stats {
            let _ = killer.send(&Command::Stats { id: 0 }, &[]);
        }
        let _ = killer.send(&Command::Kill, &[]);
    });
    let reason = loop {
        match owner.recv() {
            Ok((event, _fds)) => {
                tell(&event);
                match event {
                    Event::Exited(reason) => break reason,
                    Event::GuestConnected { .. } if options.save.is_some() => {
                        owner.send(&Command::Pause { id: 1 }, &[])?;
                    }
                    Event::Done { id: 1 } => {
                        let dir = options.save.clone().unwrap_or_default();
                        let files = [
                            File::create(dir.join("state"))?,
                            File::create(dir.join("memory"))?,
                        ];
                        let fds = [files[0].as_fd(), files[1].as_fd()];
                        owner.send(&Command::Snapshot { id: 2 }, &fds)?;
                    }
                    Event::Started if options.from.is_some() => {
                        let (_ours, theirs) = std::os::unix::net::UnixStream::pair()?;
                        owner.send(&Command::Connect { id: 3, port: 1024 }, &[theirs.as_fd()])?;
                    }
                    Event::Done { .. } | Event::Failed { .. } => owner.send(&Command::Kill, &[])?,
                    _ => {}
                }
            }
            Err(ControlError::Closed) => return Err("eci-vmm ended without a word".into()),
            Err(error) => return Err(error.into()),
        }
    };
    child.wait()?;
    tell(&"process gone");
    let _ = console.join();
    Ok(reason)
}
