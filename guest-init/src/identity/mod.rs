//! What makes this guest itself: given by the host once, and again when it was cloned.
//!
//! A guest may come from a template, with thousands of others, or be a fork of a running group. Either way it has the
//! other's memory: random pool, clock, names, addresses. [`Handshake::perform`] replaces all of it, in an order that lets
//! nothing of the old be used for the new. No container process runs before it is done: [`crate::sandbox::Sandbox`] has
//! its containers only afterwards, and a fork's stand still in the freezer.
//!
//! Everything it needs is opened when the guest starts: what a template has done already, its clones need not do.

pub(crate) mod cpus;
mod files;
mod generation;
mod ids;

use std::{collections::HashMap, fs, path::Path, time::Instant};

use self::files::Files;
pub use self::{
    files::{Access, FILES},
    generation::GenerationWatch,
    ids::{Id, Ids},
};
use crate::{
    boot::{clock, entropy::Pool},
    container::plan::sysctl_path,
    error::{Context, Result},
    network::{Interface, Network},
    storage::Slice,
};

/// How the VM came to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Origin {
    /// It was booted.
    #[default]
    Booted,
    /// It was restored from a captured one, which others may be too.
    Cloned,
}

/// What the host gives the sandbox.
#[derive(Debug, Default)]
pub struct Identity {
    /// How the VM came to be.
    pub origin: Origin,
    /// For the kernel's random pool.
    pub entropy: Vec<u8>,
    /// Nanoseconds since the Unix epoch; 0 leaves the clock.
    pub wall_clock_ns: u64,
    /// Host name.
    pub hostname: String,
    /// Where it is known; may be empty.
    pub domain: String,
    /// Drawn when it is not given.
    pub machine_id: Option<Id>,
    /// Network interfaces.
    pub interfaces: Vec<Interface>,
    /// `resolv.conf`: name servers, search domains, options.
    pub nameservers: Vec<String>,
    /// See above.
    pub searches: Vec<String>,
    /// See above.
    pub dns_options: Vec<String>,
    /// Lines of `/etc/hosts`: address and names.
    pub host_aliases: Vec<(String, Vec<String>)>,
    /// Kernel parameters.
    pub sysctls: HashMap<String, String>,
    /// The writable slice.
    pub scratch: Option<Slice>,
    /// CPUs to have online; 0 leaves them.
    pub n_vcpus: u32,
}

/// Gives the guest its identity.
#[derive(Debug)]
pub struct Handshake {
    generation: GenerationWatch,
    pool: Pool,
    files: Files,
    network: Network,
}

impl Handshake {
    /// Opens all that is needed, with files in `directory`, which containers see.
    ///
    /// # Errors
    /// Names what cannot be opened.
    pub fn prepare(directory: &Path, generation: GenerationWatch) -> Result<Self> {
        Ok(Self {
            pool: Pool::open().context(|| "open the random pool")?,
            files: Files::make(directory)?,
            network: Network::open()?,
            generation,
        })
    }

    /// The VM may be captured from now on: only a change of its generation after this is one.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn expect_clone(&mut self) -> Result<()> {
        self.generation.forget_past()
    }

    /// Makes the guest what `identity` says, and no more what it was; the scratch slice is left to the caller.
    ///
    /// # Errors
    /// What went wrong first; it can be tried again then. `DeadlineExceeded` when the kernel saw no new VM generation.
    pub async fn perform(&mut self, identity: &Identity) -> Result<Ids> {
        let begun = Instant::now();
        if identity.origin == Origin::Cloned {
            self.generation.changed().await?;
        }
        self.pool.add(&identity.entropy).context(|| "add entropy")?;
        if identity.wall_clock_ns != 0 {
            // It was right when the request came.
            let waited_ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let now_ns = identity.wall_clock_ns.saturating_add(waited_ns);
            clock::set(now_ns).context(|| format!("set the clock to {now_ns}"))?;
        }
        if !identity.hostname.is_empty() {
            rustix::system::sethostname(identity.hostname.as_bytes())
                .context(|| format!("set the host name {:?}", identity.hostname))?;
        }
        // Drawn after the pool took its new keys.
        let ids = Ids::draw(identity.machine_id).context(|| "draw ids")?;
        self.files.write_names(identity)?;
        self.files.write_ids(&ids)?;
        self.network.configure(&identity.interfaces, identity.origin)?;
        for (name, value) in &identity.sysctls {
            let path = sysctl_path(name)?;
            let path = Path::new(path.to_str().expect("sysctl_path gives ASCII"));
            fs::write(path, value).context(|| format!("write {value:?} to {}", path.display()))?;
        }
        cpus::bring_online(identity.n_vcpus)?;
        Ok(ids)
    }
}
