//! Calling plugins (CNI specification 1.0.0, sections 2 to 4): programs that get their configuration on standard input.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use super::conf::{self, Capability, Network, type_of};
use crate::{
    error::{Error, ErrorKind, Result},
    group::status::GroupId,
};

/// The interface that plugins make.
pub(super) const INTERFACE: &str = "eth0";
/// Longest time for a plugin.
const LIMIT: Duration = Duration::from_secs(60);
/// Most that is shown of what a plugin says that is no JSON.
const MAX_WORDS: usize = 400;

/// What is asked of plugins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Add,
    Del,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
        }
    }
}

/// Of whom it is asked, and for which group.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) network: &'a Network,
    pub(super) bin_dirs: &'a [PathBuf],
    pub(super) id: &'a GroupId,
    pub(super) netns: &'a Path,
    /// `CNI_ARGS`.
    pub(super) args: &'a str,
    /// What plugins of each capability are told.
    pub(super) runtime: &'a Map<String, Value>,
}

/// How a plugin fails.
#[derive(Deserialize)]
struct Failure {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Call<'_> {
    /// Adds the group to the network: each plugin is told the answer of the one before. The last answer.
    pub(super) async fn add(&self) -> Result<Value> {
        let mut answer = None;
        for plugin in &self.network.plugins {
            let text = self.run(Verb::Add, plugin, answer.as_ref()).await?;
            let parsed = serde_json::from_str(&text).map_err(|error| {
                let what = format!(
                    "CNI plugin {}: read its answer {:?}",
                    type_of(plugin),
                    shortened(&text)
                );
                Error::with_source(ErrorKind::Internal, what, error)
            })?;
            answer = Some(parsed);
        }
        answer.ok_or_else(|| Error::new(ErrorKind::Internal, "a CNI network has no plugins"))
    }

    /// Takes it out again, in reverse; what was answered then is told again, if anything was. Plugins take what is gone as done.
    pub(super) async fn del(&self, answer: Option<&Value>) -> Result<()> {
        for plugin in self.network.plugins.iter().rev() {
            self.run(Verb::Del, plugin, answer).await?;
        }
        Ok(())
    }

    async fn run(&self, verb: Verb, plugin: &Map<String, Value>, answer: Option<&Value>) -> Result<String> {
        let kind = type_of(plugin);
        let program = self.find(kind)?;
        let failed = |what: &str| {
            let what = format!("CNI plugin {kind}: {what}");
            move |error| Error::with_source(ErrorKind::Internal, what, error)
        };
        let bin_dirs: Vec<_> = self.bin_dirs.iter().map(|dir| dir.to_string_lossy()).collect();
        let mut child = Command::new(&program)
            .env("CNI_COMMAND", verb.name())
            .env("CNI_CONTAINERID", self.id.as_str())
            .env("CNI_NETNS", self.netns)
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_ARGS", self.args)
            .env("CNI_PATH", bin_dirs.join(":"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed("start it"))?;
        let input = self.input(plugin, answer).to_string();
        let stdin = child.stdin.take();
        let work = async {
            if let Some(mut stdin) = stdin {
                // One that does not read says itself what is wrong.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        let Ok(ended) = timeout(LIMIT, work).await else {
            return Err(Error::new(
                ErrorKind::DeadlineExceeded,
                format!("CNI plugin {kind}: {} was not done within {LIMIT:?}", verb.name()),
            ));
        };
        let ended = ended.map_err(failed("wait for it"))?;
        let text = String::from_utf8_lossy(&ended.stdout).into_owned();
        if ended.status.success() {
            return Ok(text);
        }
        let said = match serde_json::from_str::<Failure>(&text) {
            Ok(Failure { code, msg, details }) => format!("{msg} (code {code}) {details}"),
            Err(_) => format!(
                "{} {}",
                shortened(&text),
                shortened(&String::from_utf8_lossy(&ended.stderr))
            ),
        };
        Err(Error::new(
            ErrorKind::Internal,
            format!(
                "CNI plugin {kind}: {} failed, {}: {}",
                verb.name(),
                ended.status,
                said.trim()
            ),
        ))
    }

    fn find(&self, kind: &str) -> Result<PathBuf> {
        let mut candidates = self.bin_dirs.iter().map(|dir| dir.join(kind));
        candidates.find(|path| path.is_file()).ok_or_else(|| {
            Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "there is no CNI plugin {kind} in {:?}: install it, or set network.cni.bin_dirs",
                    self.bin_dirs
                ),
            )
        })
    }

    /// The configuration of a plugin, as it is called with.
    fn input(&self, plugin: &Map<String, Value>, answer: Option<&Value>) -> Value {
        let mut input = plugin.clone();
        input.insert("name".into(), self.network.name.clone().into());
        input.insert("cniVersion".into(), self.network.version.clone().into());
        let known = [Capability::PortMappings, Capability::Bandwidth].into_iter();
        let told: Map<String, Value> = known
            .filter(|capability| conf::has(plugin, *capability))
            .filter_map(|capability| {
                let value = self.runtime.get(capability.name())?;
                Some((capability.name().to_owned(), value.clone()))
            })
            .collect();
        if !told.is_empty() {
            input.insert("runtimeConfig".into(), told.into());
        }
        if let Some(answer) = answer {
            input.insert("prevResult".into(), answer.clone());
        }
        input.into()
    }
}

fn shortened(text: &str) -> &str {
    text.char_indices()
        .nth(MAX_WORDS)
        .map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::json;

    use super::*;

    /// Notes how it is called, adds its type to the answer before, and fails where there is a file `fail`.
    const PLUGIN: &str = r#"#!/bin/sh
dir=$(dirname "$0"); kind=$(basename "$0"); input=$(cat)
echo "$CNI_COMMAND $kind $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $input" >> "$dir/calls"
if [ -e "$dir/fail" ]; then echo '{"cniVersion":"1.0.0","code":11,"msg":"no address is left"}'; exit 1; fi
echo "{\"cniVersion\":\"1.0.0\",\"ips\":[],\"by\":\"$kind\"}"
"#;

    struct Bench {
        dir: tempfile::TempDir,
        network: Network,
        id: GroupId,
        runtime: Map<String, Value>,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for kind in ["first", "second"] {
                let path = dir.path().join(kind);
                std::fs::write(&path, PLUGIN).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            }
            let network = json!({ "cniVersion": "1.0.0", "name": "n", "plugins": [
                { "type": "first" }, { "type": "second", "capabilities": { "portMappings": true } },
            ] });
            Self {
                dir,
                network: conf::parse(&network.to_string()).unwrap(),
                id: GroupId::parse("eci-0123456789abcdefghij").unwrap(),
                runtime: json!({ "portMappings": [7], "bandwidth": {} })
                    .as_object()
                    .unwrap()
                    .clone(),
            }
        }

        async fn call<T>(&self, act: impl AsyncFnOnce(Call<'_>) -> T) -> (T, Vec<String>) {
            let bin_dirs = ["/nowhere".into(), self.dir.path().to_owned()];
            let calls = self.dir.path().join("calls");
            let _ = std::fs::remove_file(&calls);
            let done = act(Call {
                network: &self.network,
                bin_dirs: &bin_dirs,
                id: &self.id,
                netns: Path::new("/run/x"),
                args: "A=b",
                runtime: &self.runtime,
            })
            .await;
            let text = std::fs::read_to_string(calls).unwrap_or_default();
            (done, text.lines().map(str::to_owned).collect())
        }
    }

    #[tokio::test]
    async fn each_plugin_is_told_what_the_one_before_answered() {
        let bench = Bench::new();
        let (answer, calls) = bench.call(async |call| call.add().await).await;
        assert_eq!(answer.unwrap()["by"], "second");
        let head = |kind| format!("ADD {kind} eci-0123456789abcdefghij /run/x eth0 ");
        let first: Value = serde_json::from_str(calls[0].strip_prefix(&head("first")).unwrap()).unwrap();
        assert_eq!(
            first,
            json!({ "cniVersion": "1.0.0", "name": "n", "type": "first" })
        );
        let second: Value = serde_json::from_str(calls[1].strip_prefix(&head("second")).unwrap()).unwrap();
        assert_eq!(second["prevResult"]["by"], "first");
        assert_eq!(second["runtimeConfig"], json!({ "portMappings": [7] }));
        let answer = json!({ "by": "second" });
        let (done, calls) = bench.call(async |call| call.del(Some(&answer)).await).await;
        done.unwrap();
        assert!(
            calls[0].starts_with("DEL second ") && calls[1].starts_with("DEL first "),
            "{calls:?}"
        );
        assert!(
            calls
                .iter()
                .all(|call| call.contains(r#""prevResult":{"by":"second"}"#)),
            "{calls:?}"
        );
    }

    #[tokio::test]
    async fn what_a_plugin_says_is_told_and_a_missing_one_is_named() {
        let mut bench = Bench::new();
        std::fs::write(bench.dir.path().join("fail"), "").unwrap();
        let (answer, calls) = bench.call(async |call| call.add().await).await;
        let error = answer.unwrap_err().chain();
        assert!(
            error.contains("plugin first: ADD failed") && error.contains("no address is left (code 11)"),
            "{error}"
        );
        assert_eq!(calls.len(), 1);
        bench.network.plugins[0].insert("type".into(), "third".into());
        let (answer, _) = bench.call(async |call| call.add().await).await;
        let error = answer.unwrap_err().chain();
        assert!(
            error.contains("no CNI plugin third") && error.contains("network.cni.bin_dirs"),
            "{error}"
        );
    }
}
