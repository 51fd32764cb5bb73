//! Image references and digests, normalised once.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::Reference;

use super::error::PullError;

/// Where Docker Hub's registry really is.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_ADDRESS: &str = "registry-1.docker.io";

/// A reference in full: registry, repository, and tag or digest. `busybox` is `docker.io/library/busybox:latest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageReference(Reference);

impl ImageReference {
    /// Host and port to connect to.
    #[must_use]
    pub fn registry_address(&self) -> &str {
        match self.0.registry() {
            DOCKER_HUB => DOCKER_HUB_ADDRESS,
            address => address,
        }
    }

    /// Registry as users name it.
    #[must_use]
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// Name within the registry.
    #[must_use]
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// Digest, as `sha256:...`, if the reference has one: it decides then, and the tag is a comment.
    #[must_use]
    pub fn digest(&self) -> Option<&str> {
        self.0.digest()
    }

    /// What to ask the registry for: the digest, or else the tag.
    pub(super) fn version(&self) -> &str {
        self.0.digest().or(self.0.tag()).unwrap_or("latest")
    }
}

impl FromStr for ImageReference {
    type Err = PullError;

    fn from_str(text: &str) -> Result<Self, PullError> {
        let invalid = |reason: String| PullError::InvalidReference {
            reference: text.to_owned(),
            reason,
        };
        let reference = Reference::try_from(text).map_err(|error| invalid(error.to_string()))?;
        // The parser takes a first part in upper case for a registry and then leaves it in the repository.
        if reference
            .repository()
            .bytes()
            .any(|byte| byte.is_ascii_uppercase())
        {
            return Err(invalid("repository name has upper-case letters".into()));
        }
        if let Some(digest) = reference.digest()
            && sha256_hex(digest).is_none()
        {
            return Err(invalid(format!("digest {digest} is not a sha256 one")));
        }
        Ok(Self(reference))
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The lower-case hex part of a `sha256:` digest; safe as a file name.
pub(super) fn sha256_hex(digest: &str) -> Option<&str> {
    let hex = digest.strip_prefix("sha256:")?;
    let is_hex = hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_hex.then_some(hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str, address: &str) {
        let reference: ImageReference = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!(
            (reference.to_string().as_str(), reference.registry_address()),
            (expected, address)
        );
    }

    #[test]
    fn completes_references_as_docker_does() {
        check(
            "busybox",
            "docker.io/library/busybox:latest",
            "registry-1.docker.io",
        );
        check("a/b:1", "docker.io/a/b:1", "registry-1.docker.io");
        check("127.0.0.1:5000/a:1", "127.0.0.1:5000/a:1", "127.0.0.1:5000");
        check("localhost/a/b/c", "localhost/a/b/c:latest", "localhost");
        let digest = format!("sha256:{}", "a".repeat(64));
        check(
            &format!("r.example/a@{digest}"),
            &format!("r.example/a@{digest}"),
            "r.example",
        );
    }

    #[test]
    fn refuses_what_is_no_reference() {
        for text in [
            "",
            "UPPER/case",
            "a b",
            "a:b:c",
            "../x",
            "a@sha256:12",
            "https://r.example/a",
        ] {
            let error = text.parse::<ImageReference>().expect_err(text);
            assert!(error.to_string().contains("expected [registry"), "{error}");
        }
    }

    #[test]
    fn only_well_formed_sha256_digests_become_file_names() {
        assert!(sha256_hex(&format!("sha256:{}", "0".repeat(64))).is_some());
        assert!(sha256_hex(&format!("sha256:{}", "A".repeat(64))).is_none());
        assert!(sha256_hex("sha256:../../etc/passwd").is_none());
        assert!(sha256_hex(&format!("sha512:{}", "0".repeat(64))).is_none());
    }
}
