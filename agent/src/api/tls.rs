//! TLS of the doors: configured certificates, or a self-signed one that is made once and kept in the state directory.

use std::{
    fs,
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio_rustls::TlsAcceptor;

use super::listener::ListenError;

/// Certificate chain and key, as PEM files.
#[derive(Debug, Clone)]
pub(super) struct CertificateFiles {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

fn failed<E>(step: &'static str, path: &Path) -> impl FnOnce(E) -> ListenError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let path = path.to_owned();
    move |source| ListenError::Tls {
        step,
        path,
        source: source.into(),
    }
}

/// An acceptor with these files. With `client_ca` a client may show a certificate, which is then verified.
pub(super) fn acceptor(
    files: &CertificateFiles,
    client_ca: Option<&Path>,
) -> Result<TlsAcceptor, ListenError> {
    let read_chain = |step, path: &Path| -> Result<Vec<_>, ListenError> {
        let chain: Vec<_> = CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect)
            .map_err(failed(step, path))?;
        if chain.is_empty() {
            return Err(failed(step, path)("the file holds no PEM certificate"));
        }
        Ok(chain)
    };
    let chain = read_chain("read the TLS certificate", &files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(failed("read the TLS key", &files.key))?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(failed("set up TLS with", &files.certificate))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in read_chain("read the client certificate authority", path)? {
                roots
                    .add(certificate)
                    .map_err(failed("use the client certificate authority", path))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()
                .map_err(failed("use the client certificate authority", path))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let config = builder
        .with_single_cert(chain, key)
        .map_err(failed("use the TLS certificate", &files.certificate))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The self-signed certificate of the state directory, made if it is not there.
pub(super) fn self_signed(
    state_dir: &Path,
    node_name: &str,
    address: IpAddr,
) -> Result<CertificateFiles, ListenError> {
    let files = CertificateFiles {
        certificate: state_dir.join("kubelet.crt"),
        key: state_dir.join("kubelet.key"),
    };
    if files.certificate.exists() && files.key.exists() {
        return Ok(files);
    }
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    if !node_name.is_empty() {
        names.push(node_name.to_owned());
    }
    if !address.is_unspecified() && !address.is_loopback() {
        names.push(address.to_string());
    }
    let made = rcgen::generate_simple_self_signed(names)
        .map_err(failed("make the self-signed certificate", &files.certificate))?;
    fs::create_dir_all(state_dir).map_err(failed("create the directory of", &files.key))?;
    let key = made.signing_key.serialize_pem();
    write_private(&files.key, &key).map_err(failed("write the TLS key", &files.key))?;
    write_private(&files.certificate, &made.cert.pem())
        .map_err(failed("write the TLS certificate", &files.certificate))?;
    Ok(files)
}

/// Whole or not at all, and for the owner only.
fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension("new");
    // Left by an agent that was killed here.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_self_signed_certificate_is_made_once_and_usable() {
        let directory = tempfile::tempdir().unwrap();
        let make = || self_signed(directory.path(), "node-1", "10.0.0.1".parse().unwrap()).unwrap();
        let files = make();
        let first = fs::read(&files.certificate).unwrap();
        assert_eq!(
            fs::metadata(&files.key).unwrap().permissions().mode() & 0o777,
            0o600
        );
        make();
        assert_eq!(fs::read(&files.certificate).unwrap(), first);
        acceptor(&files, None).unwrap();
        acceptor(&files, Some(&files.certificate)).unwrap();
    }

    #[test]
    fn unusable_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let files = CertificateFiles {
            certificate: directory.path().join("a.crt"),
            key: directory.path().join("a.key"),
        };
        let error = acceptor(&files, None).err().unwrap().to_string();
        assert!(error.contains("a.crt"), "{error}");
        fs::write(&files.certificate, "nothing").unwrap();
        assert!(acceptor(&files, None).is_err());
    }
}
