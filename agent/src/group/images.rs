//! What groups need of images. The real form is `crate::image`'s store (see `crate::host`); driver tests use a fake.

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::spec::{ContainerSpec, ImagePullPolicy, RegistryCredential};
use crate::{
    engine::{ImageInfo, PullStatus},
    error::Result,
    sandbox::{client::Rootfs, oci::ResolvedProcess},
};

/// Images on this host.
#[async_trait]
pub trait Images: Send + Sync + 'static {
    /// Makes sure that the image is here. Progress is sent as far as the channel takes it.
    ///
    /// # Errors
    /// What the registry or the host said; the message names the image.
    async fn pull(
        &self,
        reference: &str,
        policy: ImagePullPolicy,
        credentials: &[RegistryCredential],
        progress: Option<mpsc::Sender<PullStatus>>,
    ) -> Result<LocalImage>;

    /// Images on this host.
    ///
    /// # Errors
    /// `Internal`.
    async fn list(&self) -> Result<Vec<ImageInfo>>;

    /// Removes an image.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while it is in use.
    async fn remove(&self, reference: &str) -> Result<()>;
}

/// Decides what runs, from an image and a container of it. Blocks.
pub type ResolveProcess = Box<dyn Fn(&ContainerSpec) -> Result<ResolvedProcess> + Send + Sync>;

/// An image on this host; it stays as long as this lives.
pub struct LocalImage {
    /// Manifest digest.
    pub digest: String,
    /// It was here before.
    pub was_present: bool,
    /// Its files.
    pub rootfs: Rootfs,
    /// What runs.
    pub resolve: ResolveProcess,
    /// Keeps the files.
    pub lease: Box<dyn Send + Sync>,
}

impl std::fmt::Debug for LocalImage {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("LocalImage")
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}
