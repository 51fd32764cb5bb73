//! Entry points of the fuzz targets in `fuzz/` at the top of the repository: what a hostile guest answers. Built for fuzzers
//! and for tests only; the tests replay the seeds.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use protobuf::Message;

use crate::guest::{Guest, Identity, Origin, ProcessKey};
use crate::resource::slices::Slice;
use crate::service::convert;

/// A target: its name and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this crate.
pub const TARGETS: &[Target] = &[("guest_answer", guest_answer)];

/// Header of a ttrpc message: payload length and stream id, big endian, then type and flags.
const HEADER_BYTES: usize = 10;
const RESPONSE: u8 = 2;
/// The id a client gives its first call.
const FIRST_STREAM: u32 = 1;
/// A call is over soon after its connection is; generous, for machines that are busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// One call of the shim and what the guest sends back before it hangs up. The first byte chooses the call, and whether the
/// rest is raw bytes, a payload (framed here), or the message inside a payload that reports success.
///
/// # Panics
/// When the call outlives its connection.
pub fn guest_answer(data: &[u8]) {
    let Some((choice, rest)) = data.split_first() else {
        return;
    };
    let answer = match choice >> 6 {
        0 => rest.to_vec(),
        1 => framed(rest),
        _ => {
            let response = ttrpc::Response {
                payload: rest.to_vec(),
                ..Default::default()
            };
            framed(&response.write_to_bytes().expect("a message in memory"))
        }
    };
    let (ours, mut theirs) = UnixStream::pair().expect("descriptors can be had");
    ours.set_nonblocking(true).expect("sockets can be non-blocking");
    let guest = std::thread::spawn(move || {
        let mut request = [0; HEADER_BYTES];
        // The shim may hang up first.
        if theirs.read_exact(&mut request).is_ok() {
            let _ = theirs.write_all(&answer);
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be had");
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(ours).expect("a runtime is here");
        tokio::time::timeout(PATIENCE, call(&Guest::new(stream), choice & 7))
            .await
            .expect("a call ends with its connection");
    });
    guest.join().expect("the guest's thread does not panic");
}

fn framed(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("inputs are small");
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend_from_slice(&FIRST_STREAM.to_be_bytes());
    bytes.extend_from_slice(&[RESPONSE, 0]);
    bytes.extend_from_slice(payload);
    bytes
}

/// Refusals and lost connections are what the guest is free to cause.
async fn call(guest: &Guest, which: u8) {
    let key = ProcessKey::init("c");
    match which {
        0 => drop(guest.wait_process(&key).await),
        1 => drop(guest.list_processes("c").await),
        2 => {
            if let Ok(stats) = guest.container_stats("c").await {
                convert::container_metrics(&stats).expect("every statistic can be passed on");
            }
        }
        3 => {
            if let Ok(stats) = guest.sandbox_stats().await {
                convert::sandbox_metrics(stats).expect("every statistic can be passed on");
            }
        }
        4 => drop(guest.events(0).await),
        5 => {
            let scratch = Slice {
                partition: 1,
                offset_bytes: 0,
                length_bytes: 4096,
                files: Vec::new(),
            };
            let origin = Origin::Template { n_vcpus: 2 };
            drop(guest.configure(Identity::default(), &scratch, origin).await);
        }
        6 => drop(guest.signal_process(&key, 15, false).await),
        _ => drop(guest.shutdown(Duration::ZERO).await),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Seeds and former findings, and what is left of each when its end is lost.
    #[test]
    fn seeds_replay() {
        for (target, run) in super::TARGETS {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../fuzz/seeds")
                .join(target);
            let mut seeds: Vec<_> = std::fs::read_dir(&directory)
                .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
                .map(|entry| entry.unwrap().path())
                .collect();
            assert!(!seeds.is_empty(), "{} has no seeds", directory.display());
            seeds.sort();
            for seed in seeds {
                println!("{}", seed.display());
                let bytes = std::fs::read(&seed).unwrap();
                run(&bytes);
                for eighth in 0..8 {
                    run(&bytes[..bytes.len() * eighth / 8]);
                }
            }
        }
    }
}
