//! `ecictl image`

use std::{
    collections::HashMap,
    io::{IsTerminal, Read},
};

use anyhow::{Context, bail};
use http::Method;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{
    args::{ImageCommand, Output},
    client::{Client, Refused, query},
    table,
};
use crate::{
    api::admin::wire::{Login, Pull, PullLine},
    engine::{ImageInfo, PullStatus},
    group::spec::ImagePullPolicy,
};

pub(super) async fn run(client: &Client, command: ImageCommand) -> anyhow::Result<u8> {
    match command {
        ImageCommand::Pull {
            reference,
            if_not_present,
            username,
            password_stdin: _,
        } => {
            let login = username.map(read_login).transpose()?;
            let policy = if if_not_present {
                ImagePullPolicy::IfNotPresent
            } else {
                ImagePullPolicy::Always
            };
            let pull = Pull {
                reference,
                policy,
                login,
            };
            self::pull(client, &pull).await
        }
        ImageCommand::Ls { output } => {
            let images: Vec<ImageInfo> = client.get("/v1/images").await?;
            let text = match output {
                Output::Json => format!("{}\n", serde_json::to_string_pretty(&images)?),
                Output::Table => render(&images, table::now_ms()),
            };
            table::print(text.as_bytes())?;
            Ok(0)
        }
        ImageCommand::Rm { references } => {
            let mut code = 0;
            for reference in references {
                let path = format!("/v1/images{}", query([("reference", &reference)]));
                if let Err(error) = client.call::<()>(Method::DELETE, &path, "", Vec::new()).await {
                    eprintln!("ecictl: {reference}: {error:#}");
                    code = 1;
                }
            }
            Ok(code)
        }
    }
}

fn read_login(username: String) -> anyhow::Result<Login> {
    let mut password = String::new();
    std::io::stdin()
        .lock()
        .read_to_string(&mut password)
        .context("Failed to read the password from standard input")?;
    Ok(Login {
        username,
        password: password.trim_end_matches(['\r', '\n']).to_owned(),
    })
}

fn render(images: &[ImageInfo], now_ms: u64) -> String {
    let rows: Vec<_> = images
        .iter()
        .map(|image| {
            let digest = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
            vec![
                image.reference.clone(),
                digest.chars().take(12).collect(),
                table::bytes(image.size_bytes),
                table::age(image.pulled_at_ms, now_ms),
                if image.in_use { "yes" } else { "no" }.into(),
            ]
        })
        .collect();
    table::columns(&["REFERENCE", "DIGEST", "SIZE", "AGE", "IN USE"], &rows)
}

async fn pull(client: &Client, pull: &Pull) -> anyhow::Result<u8> {
    let body = serde_json::to_vec(pull)?;
    let mut lines = client.lines(Method::POST, "/v1/images/pull", body).await?;
    let mut progress = Progress::new(std::io::stderr().is_terminal());
    let mut digest = None;
    while let Some(line) = lines.next::<PullLine>().await? {
        match line {
            PullLine::Status(status) => {
                progress.show(&status);
                digest = status.digest.or(digest);
            }
            PullLine::Failure(failure) => {
                progress.clear();
                return Err(anyhow::Error::new(Refused(failure))
                    .context(format!("Failed to pull {}", pull.reference)));
            }
        }
    }
    progress.clear();
    match digest {
        Some(digest) => table::print(format!("{digest}\n").as_bytes())?,
        None => bail!("The agent ended the pull of {} without a result", pull.reference),
    }
    Ok(0)
}

/// Bars on a terminal, a line for each new phase elsewhere.
struct Progress {
    bars: Option<MultiProgress>,
    layers: HashMap<String, ProgressBar>,
    said: HashMap<String, String>,
}

impl Progress {
    fn new(terminal: bool) -> Self {
        Self {
            bars: terminal.then(MultiProgress::new),
            layers: HashMap::new(),
            said: HashMap::new(),
        }
    }

    fn show(&mut self, status: &PullStatus) {
        let name: String = match &status.layer {
            Some(layer) => layer
                .strip_prefix("sha256:")
                .unwrap_or(layer)
                .chars()
                .take(12)
                .collect(),
            None => "image".into(),
        };
        match &self.bars {
            Some(bars) => {
                let bar = self.layers.entry(name.clone()).or_insert_with(|| {
                    let style = ProgressStyle::with_template(
                        "{prefix:12} {msg:12} [{bar:30}] {binary_bytes}/{binary_total_bytes}",
                    )
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                    bars.add(
                        ProgressBar::new(status.total_bytes)
                            .with_style(style)
                            .with_prefix(name),
                    )
                });
                bar.set_length(status.total_bytes);
                bar.set_position(status.done_bytes);
                bar.set_message(table::clean(&status.phase));
            }
            None => {
                if self.said.get(&name) != Some(&status.phase) {
                    let total = match status.total_bytes {
                        0 => String::new(),
                        total => format!(" {}", table::bytes(total)),
                    };
                    eprintln!("{name}: {}{total}", table::clean(&status.phase));
                    self.said.insert(name, status.phase.clone());
                }
            }
        }
    }

    fn clear(&self) {
        if let Some(bars) = &self.bars {
            let _ = bars.clear();
        }
    }
}
