//! What all cases share: a registry with one small image, and an agent that has it, so that groups of one small
//! container start from a template and all others boot. Each case leaves the host as it was.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::{
    host::{Host, Templates},
    leftovers::Snapshot,
    pod::Pod,
    product::Product,
    registry::Registry,
};

/// The small image's repository and tag.
const TOOLS: &str = "demo/tools:latest";

/// Set to `off`, every group boots: tells whether templates are at fault.
const TEMPLATES_VARIABLE: &str = "ECI_TEST_TEMPLATES";

/// A host and its registry.
#[derive(Debug)]
pub struct Stage {
    /// What is tested.
    pub product: Product,
    /// The registry.
    pub registry: Registry,
    /// The host.
    pub host: Host,
    dir: TempDir,
}

impl Stage {
    /// Starts registry and agent.
    ///
    /// # Errors
    /// Something is missing or does not start.
    pub fn set_up() -> Result<Self> {
        let product = Product::find()?;
        // Sparse images want a disk; the L1 host has one here.
        let base = match std::env::var_os("ECI_L1") {
            Some(_) => Path::new("/var/lib/eci-agent"),
            None => Path::new("/var/tmp"),
        };
        let dir = tempfile::Builder::new()
            .prefix("eci-system.")
            .tempdir_in(base)
            .with_context(|| format!("make a directory in {}", base.display()))?;
        let registry = Registry::start(dir.path())?;
        registry.push(&product.images.join("tools"), TOOLS)?;
        let templates = match std::env::var(TEMPLATES_VARIABLE).as_deref() {
            Ok("off") => Templates::Off,
            _ => Templates::OfSmallGroups,
        };
        let agent_dir = dir.path().join("agent");
        let host = Host::start(
            &product,
            &agent_dir,
            &agent_dir.join("state"),
            &registry.name(),
            templates,
        )?;
        let mut stage = Self {
            product,
            registry,
            host,
            dir,
        };
        stage.warm_up(templates)?;
        Ok(stage)
    }

    /// Has the host make what it makes once and keeps: the image, the template of small groups, and the list of pages that the first
    /// group made from it has written to.
    fn warm_up(&mut self, templates: Templates) -> Result<()> {
        let pod = Pod::new("first").container("main", &self.tools(), "exec sleep 100000");
        self.host.create(&pod)?;
        if templates == Templates::OfSmallGroups {
            self.host.wait_log("template is ready")?;
            self.host.remove(pod.name())?;
            self.host.create(&pod)?;
        }
        self.host.remove(pod.name())
    }

    /// The reference of an image with busybox, which the host has.
    pub fn tools(&self) -> String {
        self.registry.image(TOOLS)
    }

    /// A directory for whatever a case needs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The layout of the small image.
    pub fn tools_layout(&self) -> PathBuf {
        self.product.images.join("tools")
    }

    /// Runs a case without the shared agent, which is there again afterwards.
    ///
    /// # Errors
    /// The case's, or those of ending and starting the agent.
    pub fn without_host(&mut self, case: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        self.host.pause()?;
        let result = case(self);
        self.host.restart_agent()?;
        result
    }

    /// Runs a case, and compares the host before and after it.
    ///
    /// # Errors
    /// The case's, or what it left behind, with the end of the agent's log.
    pub fn run(&mut self, case: fn(&mut Self) -> Result<()>) -> Result<()> {
        let before = Snapshot::take(&self.host)?;
        let result = case(self).and_then(|()| before.ensure_same(&self.host));
        result.map_err(|error| {
            let log = self.host.last_log_lines(40);
            let cleared = match self.clear() {
                Ok(()) => String::new(),
                Err(error) => format!("\nthe host was not cleared for the next case: {error:#}"),
            };
            error.context(format!("the agent's log:\n{log}{cleared}\nthe case"))
        })
    }

    /// Removes the groups that a failed case left, so that the next one finds the host it expects.
    fn clear(&mut self) -> Result<()> {
        if self.host.group_names().is_err() {
            self.host.restart_agent()?;
        }
        for group in self.host.group_names()? {
            self.host.remove(&group)?;
        }
        Ok(())
    }

    /// Ends the agent.
    ///
    /// # Errors
    /// It does not end well.
    pub fn take_down(self) -> Result<()> {
        self.host.stop()
    }
}
