//! The image store as the groups see it.

use std::{
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{
    engine::{ImageInfo, PullStatus},
    error::{Error, ErrorKind, Result},
    group::{
        images::{Images, LocalImage},
        spec::{ContainerSpec, ImagePullPolicy, RegistryCredential},
    },
    image::{
        Credentials, Image, ImageReference, ImageStore, PullError, PullErrorKind, PullPhase, PullPolicy,
        StoreError,
        runtime_config::{ProcessOverrides, process_args},
    },
    sandbox::{client::Rootfs, oci::ResolvedProcess},
};

/// Images of this host, from its store and from registries.
#[derive(Debug)]
pub struct StoreImages {
    store: ImageStore,
}

impl StoreImages {
    /// Around an open store.
    pub fn new(store: ImageStore) -> Self {
        Self { store }
    }

    fn local(&self, image: Image, was_present: bool) -> Result<LocalImage> {
        let lease = self.store.lease(&image).map_err(from_store)?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        Ok(LocalImage {
            digest: image.manifest_digest.clone(),
            was_present,
            rootfs: Rootfs {
                metadata: text(&image.rootfs.metadata),
                blobs: image.rootfs.blobs.iter().map(|blob| text(blob)).collect(),
            },
            lease: Box::new(lease),
            resolve: Box::new(move |container| resolve(&image, container)),
        })
    }
}

fn resolve(image: &Image, container: &ContainerSpec) -> Result<ResolvedProcess> {
    let read = |path: &str| {
        image
            .read_file(path)
            .map(Option::unwrap_or_default)
            .map_err(|error| {
                Error::with_source(
                    ErrorKind::Internal,
                    format!("read {path} of image {}", container.image),
                    error,
                )
            })
    };
    let user = match (container.run_as_user, container.run_as_group) {
        (Some(user), Some(group)) => Some(format!("{user}:{group}")),
        (Some(user), None) => Some(user.to_string()),
        (None, _) => None,
    };
    let overrides = ProcessOverrides {
        command: container.command.clone(),
        args: container.args.clone(),
        working_dir: container.working_dir.clone(),
        user,
        ..ProcessOverrides::default()
    };
    let process = process_args(
        &image.config,
        &overrides,
        &read("/etc/passwd")?,
        &read("/etc/group")?,
    )
    .map_err(|error| {
        Error::with_source(
            ErrorKind::InvalidArgument,
            format!("container {} of image {}", container.name, container.image),
            error,
        )
    })?;
    Ok(ResolvedProcess {
        args: process.args,
        image_env: process.env,
        cwd: process.cwd,
        uid: process.uid,
        gid: container.run_as_group.unwrap_or(process.gid),
        additional_gids: process.additional_gids,
    })
}

/// The login for an image's registry, where there is one.
fn credentials_for(reference: &str, credentials: &[RegistryCredential]) -> Option<Credentials> {
    let parsed: ImageReference = reference.parse().ok()?;
    let registry = parsed.registry();
    let server = |credential: &&RegistryCredential| {
        let server = credential.server.trim_end_matches('/');
        let server = server.split_once("://").map_or(server, |(_, rest)| rest);
        server.split('/').next() == Some(registry)
    };
    credentials
        .iter()
        .find(server)
        .map(|credential| Credentials::Basic {
            username: credential.username.clone(),
            password: credential.password.clone(),
        })
}

#[async_trait]
impl Images for StoreImages {
    async fn pull(
        &self,
        reference: &str,
        policy: ImagePullPolicy,
        credentials: &[RegistryCredential],
        progress: Option<mpsc::Sender<PullStatus>>,
    ) -> Result<LocalImage> {
        let was_present = policy != ImagePullPolicy::Always && self.store.get(reference).is_some();
        let policy = match policy {
            ImagePullPolicy::Always => PullPolicy::Always,
            ImagePullPolicy::IfNotPresent => PullPolicy::IfNotPresent,
            ImagePullPolicy::Never => PullPolicy::Never,
        };
        let report = Arc::new(move |news: crate::image::PullProgress| {
            if let Some(sender) = &progress {
                let status = PullStatus {
                    phase: match news.phase {
                        PullPhase::Waiting => "resolving",
                        PullPhase::Downloading | PullPhase::Present | PullPhase::Complete => "downloading",
                        PullPhase::Merging => "converting",
                    }
                    .to_owned(),
                    layer: (!news.layer_digest.is_empty()).then_some(news.layer_digest),
                    done_bytes: news.done_bytes,
                    total_bytes: news.total_bytes,
                    digest: None,
                };
                // News that nobody takes in time are dropped: the next ones say more.
                let _ = sender.try_send(status);
            }
        });
        let image = self
            .store
            .pull(reference, credentials_for(reference, credentials), policy, report)
            .await
            .map_err(from_pull)?;
        self.local(image, was_present)
    }

    async fn list(&self) -> Result<Vec<ImageInfo>> {
        let millis = |time: SystemTime| {
            let elapsed = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX)
        };
        let info = |image: Image| ImageInfo {
            in_use: self.store.in_use(&image),
            reference: image.reference,
            digest: image.manifest_digest,
            size_bytes: image.size_bytes,
            pulled_at_ms: millis(image.pulled_at),
        };
        Ok(self.store.list().into_iter().map(info).collect())
    }

    async fn remove(&self, reference: &str) -> Result<()> {
        let (store, reference) = (self.store.clone(), reference.to_owned());
        let work = tokio::task::spawn_blocking(move || {
            store.remove(&reference)?;
            store.gc().map(|_| ())
        });
        work.await
            .map_err(|error| Error::with_source(ErrorKind::Internal, "remove an image", error))?
            .map_err(from_store)
    }
}

fn from_pull(error: PullError) -> Error {
    let kind = match error.kind() {
        PullErrorKind::NotFound | PullErrorKind::NotPresent => ErrorKind::NotFound,
        PullErrorKind::Unavailable | PullErrorKind::Cancelled => ErrorKind::Unavailable,
        PullErrorKind::DiskFull => ErrorKind::ResourceExhausted,
        PullErrorKind::Internal => ErrorKind::Internal,
        PullErrorKind::Unauthorized => ErrorKind::FailedPrecondition,
        _ => ErrorKind::InvalidArgument,
    };
    let message = error.to_string();
    with_cause(kind, message, error)
}

fn from_store(error: StoreError) -> Error {
    let kind = match error {
        StoreError::NotFound { .. } => ErrorKind::NotFound,
        StoreError::InvalidReference { .. } => ErrorKind::InvalidArgument,
        StoreError::InUse { .. } | StoreError::Locked { .. } => ErrorKind::FailedPrecondition,
        _ => ErrorKind::Internal,
    };
    let message = error.to_string();
    with_cause(kind, message, error)
}

/// The error's own text becomes the message; its causes, as text, the source.
fn with_cause(kind: ErrorKind, message: String, error: impl std::error::Error) -> Error {
    let mut causes = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        causes.push(error.to_string());
        cause = error.source();
    }
    if causes.is_empty() {
        Error::new(kind, message)
    } else {
        Error::with_source(kind, message, causes.join(": "))
    }
}
