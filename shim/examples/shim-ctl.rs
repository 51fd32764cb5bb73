//! Drives one shim by hand: starts it, boots a sandbox, runs one container (and execs) in it, stops it again.
//!
//! ```text
//! shim-ctl --shim target/debug/containerd-shim-eci-v2 --vmm target/debug/eci-vmm --kernel vmlinux --initrd initrd \
//!          --scratch scratch.ext4 --dir /tmp/group [--image meta.erofs --layer blob]... [--tap tap0 --mac 02:..]
//!          [--cpus 1] [--memory 256] [--kernel-args ...] [--exec 'uname -a'] -- /bin/echo hello
//! ```
//!
//! Without `--image` it only boots and stops. The container's output goes to `<dir>/c1/0.log` and is printed at the end;
//! every step is printed with its time.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::{
    api::{CreateTaskRequest, DeleteRequest, ExecProcessRequest, Mount, StartRequest, WaitRequest},
    sandbox_api::{
        CreateSandboxRequest, SandboxMetricsRequest, SandboxStatusRequest, ShutdownSandboxRequest,
        StartSandboxRequest, StopSandboxRequest,
    },
    sandbox_async::SandboxClient,
    shim_async::{Client, TaskClient},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use protocol::sandbox::{Network, SandboxOptions};
use ttrpc::context;

const ID: &str = "shim-ctl";
const CONTAINER: &str = "c1";

#[derive(Default)]
struct Options {
    shim: String,
    dir: PathBuf,
    image: Option<String>,
    layers: Vec<String>,
    execs: Vec<String>,
    args: Vec<String>,
    sandbox: SandboxOptions,
}

fn parse() -> Result<Options> {
    let mut options = Options {
        sandbox: SandboxOptions {
            n_vcpus: 1,
            memory_mib: 256,
            hostname: ID.into(),
            ..Default::default()
        },
        ..Default::default()
    };
    let mut given = std::env::args().skip(1);
    while let Some(flag) = given.next() {
        if flag == "--" {
            options.args = given.collect();
            break;
        }
        let value = given.next().with_context(|| format!("{flag} lacks its value"))?;
        // The shim wants absolute paths: it runs in another directory.
        let path = |value: &str| -> Result<String> {
            let path = std::fs::canonicalize(value).with_context(|| format!("find {value}"))?;
            Ok(path.to_string_lossy().into_owned())
        };
        match flag.as_str() {
            "--shim" => options.shim = path(&value)?,
            "--vmm" => options.sandbox.vmm_path = path(&value)?,
            "--kernel" => options.sandbox.kernel_path = path(&value)?,
            "--initrd" => options.sandbox.initrd_path = path(&value)?,
            "--scratch" => options.sandbox.scratch_path = path(&value)?,
            "--image" => options.image = Some(path(&value)?),
            "--layer" => options.layers.push(path(&value)?),
            "--cpus" => options.sandbox.n_vcpus = value.parse()?,
            "--memory" => options.sandbox.memory_mib = value.parse()?,
            "--kernel-args" => options.sandbox.kernel_args = value,
            "--exec" => options.execs.push(value),
            "--tap" => network(&mut options.sandbox).tap = value,
            "--mac" => network(&mut options.sandbox).mac = value,
            "--ip" => network(&mut options.sandbox).addresses.push(value),
            "--gateway" => network(&mut options.sandbox).gateways.push(value),
            "--dir" => {
                std::fs::create_dir_all(&value)?;
                options.dir = path(&value)?.into();
            }
            _ => bail!("unknown flag {flag}"),
        }
    }
    Ok(options)
}

fn network(options: &mut SandboxOptions) -> &mut Network {
    options.network.mut_or_insert_default()
}

/// Prints what was done and how long it took.
async fn step<T>(what: &str, work: impl Future<Output = ttrpc::Result<T>>) -> Result<T> {
    let begun = Instant::now();
    let done = work.await.with_context(|| what.to_owned());
    let outcome = if done.is_ok() { "done" } else { "FAILED" };
    println!(
        "{what}: {outcome} after {:.1} ms",
        begun.elapsed().as_secs_f64() * 1e3
    );
    done
}

fn soon() -> context::Context {
    context::with_duration(Duration::from_secs(120))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let options = parse()?;
    let output = Command::new(&options.shim)
        .args(["-namespace", "default", "-id", ID, "-debug", "-socket-dir"])
        .arg(options.dir.join("s"))
        .arg("start")
        .current_dir(&options.dir)
        .output()
        .with_context(|| format!("run {}", options.shim))?;
    if !output.status.success() {
        bail!("shim start: {}", String::from_utf8_lossy(&output.stderr));
    }
    let address = String::from_utf8(output.stdout)?;
    println!("shim serves at {address}");
    let client = Client::connect(&address).await?;
    let (sandbox, task) = (SandboxClient::new(client.clone()), TaskClient::new(client));
    let outcome = drive(&options, &sandbox, &task).await;
    let status = SandboxStatusRequest {
        sandbox_id: ID.into(),
        verbose: true,
        ..Default::default()
    };
    if let Ok(status) = sandbox.sandbox_status(soon(), &status).await {
        println!("status: {} {:#?}", status.state, status.info);
    }
    let request = ShutdownSandboxRequest {
        sandbox_id: ID.into(),
        ..Default::default()
    };
    step("shut the shim down", sandbox.shutdown_sandbox(soon(), &request)).await?;
    outcome
}

async fn drive(options: &Options, sandbox: &SandboxClient, task: &TaskClient) -> Result<()> {
    let packed = Any {
        type_url: protocol::SANDBOX_OPTIONS_TYPE_URL.into(),
        value: options.sandbox.write_to_bytes()?,
        ..Default::default()
    };
    let request = CreateSandboxRequest {
        sandbox_id: ID.into(),
        bundle_path: options.dir.to_string_lossy().into_owned(),
        options: MessageField::some(packed),
        ..Default::default()
    };
    step("create the sandbox", sandbox.create_sandbox(soon(), &request)).await?;
    let request = StartSandboxRequest {
        sandbox_id: ID.into(),
        ..Default::default()
    };
    step("start the sandbox", sandbox.start_sandbox(soon(), &request)).await?;
    if let Some(image) = &options.image {
        container(options, image, task).await?;
    }
    let request = SandboxMetricsRequest {
        sandbox_id: ID.into(),
        ..Default::default()
    };
    let metrics = step("read metrics", sandbox.sandbox_metrics(soon(), &request)).await?;
    println!(
        "{}",
        protocol::guest::SandboxStatsResponse::parse_from_bytes(&metrics.metrics.data.value)?
    );
    let request = StopSandboxRequest {
        sandbox_id: ID.into(),
        timeout_secs: 10,
        ..Default::default()
    };
    step("stop the sandbox", sandbox.stop_sandbox(soon(), &request)).await?;
    Ok(())
}

async fn container(options: &Options, image: &str, task: &TaskClient) -> Result<()> {
    let bundle = options.dir.join(CONTAINER);
    std::fs::create_dir_all(&bundle)?;
    std::fs::write(bundle.join("config.json"), config(&options.args).to_string())?;
    let log = bundle.join("0.log");
    let request = CreateTaskRequest {
        id: CONTAINER.into(),
        bundle: bundle.to_string_lossy().into_owned(),
        rootfs: vec![Mount {
            type_: protocol::ROOTFS_MOUNT_TYPE.into(),
            source: image.into(),
            options: options
                .layers
                .iter()
                .map(|layer| format!("device={layer}"))
                .collect(),
            ..Default::default()
        }],
        stdout: log_uri(&log),
        stderr: log_uri(&log),
        ..Default::default()
    };
    step("create the container", task.create(soon(), &request)).await?;
    let request = StartRequest {
        id: CONTAINER.into(),
        ..Default::default()
    };
    step("start the container", task.start(soon(), &request)).await?;
    for (n, script) in options.execs.iter().enumerate() {
        exec(&format!("e{n}"), script, &bundle, task).await?;
    }
    let request = WaitRequest {
        id: CONTAINER.into(),
        ..Default::default()
    };
    let ended = step("wait for the container", task.wait(soon(), &request)).await?;
    println!("exit status {}", ended.exit_status);
    print!("{}", std::fs::read_to_string(&log)?);
    let request = DeleteRequest {
        id: CONTAINER.into(),
        ..Default::default()
    };
    step("delete the container", task.delete(soon(), &request)).await?;
    Ok(())
}

async fn exec(exec_id: &str, script: &str, bundle: &Path, task: &TaskClient) -> Result<()> {
    let log = bundle.join(format!("{exec_id}.log"));
    let args = ["/bin/sh", "-c", script].map(String::from);
    let request = ExecProcessRequest {
        id: CONTAINER.into(),
        exec_id: exec_id.into(),
        stdout: log_uri(&log),
        stderr: log_uri(&log),
        spec: MessageField::some(Any {
            value: process(&args).to_string().into_bytes(),
            ..Default::default()
        }),
        ..Default::default()
    };
    step(&format!("create exec {script:?}"), task.exec(soon(), &request)).await?;
    let request = StartRequest {
        id: CONTAINER.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    };
    step("start it", task.start(soon(), &request)).await?;
    let request = WaitRequest {
        id: CONTAINER.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    };
    let ended = step("wait for it", task.wait(soon(), &request)).await?;
    println!("exit status {}", ended.exit_status);
    print!("{}", std::fs::read_to_string(&log)?);
    let request = DeleteRequest {
        id: CONTAINER.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    };
    step("delete it", task.delete(soon(), &request)).await?;
    Ok(())
}

fn log_uri(path: &Path) -> String {
    format!("{}{}", protocol::CRI_LOG_SCHEME, path.display())
}

fn process(args: &[String]) -> serde_json::Value {
    serde_json::json!({
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
    })
}

fn config(args: &[String]) -> serde_json::Value {
    let mount = |destination: &str, type_: &str, options: &[&str]| serde_json::json!({"destination": destination, "type": type_, "source": type_, "options": options});
    serde_json::json!({
        "ociVersion": "1.2.0",
        "process": process(args),
        "root": {"path": "rootfs"},
        "hostname": ID,
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]},
    })
}
