//! A log as a stream of bytes, to its end or for as long as its container lives.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures_util::{
    future::BoxFuture,
    stream::{self, BoxStream, StreamExt},
};
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use super::{line::Joiner, read::tail_offset};
use crate::engine::LogOptions;

/// Bytes read at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Longest line taken from a file; the shim cuts far earlier.
const MAX_LINE_BYTES: usize = 1 << 20;

/// The log in `path` and its rotated forerunner. With `follow`, goes on until `ended` and all was read.
///
/// # Errors
/// The file can't be opened; one that is not there yet is an empty log.
pub fn stream(
    path: PathBuf,
    options: &LogOptions,
    ended: BoxFuture<'static, ()>,
) -> io::Result<BoxStream<'static, io::Result<Bytes>>> {
    let watch = if options.follow {
        Some(Watch::new(&path)?)
    } else {
        None
    };
    let files = open(&path, options.tail_lines)?;
    let reader = Reader {
        path,
        files,
        watch,
        ended: options.follow.then_some(ended),
        joiner: Joiner::new(options.timestamps, options.since),
        partial: Vec::new(),
        left: options.limit_bytes,
        done: false,
    };
    let pieces = stream::try_unfold(reader, |mut reader| async move {
        let next = reader.next().await?;
        Ok(next.map(|bytes| (bytes, reader)))
    });
    Ok(pieces.boxed())
}

/// The files of a log, oldest first, each at the offset where reading begins.
fn open(path: &Path, tail_lines: Option<u64>) -> io::Result<VecDeque<File>> {
    let mut rotated = path.to_owned().into_os_string();
    rotated.push(".1");
    let mut files = Vec::new();
    for path in [path, Path::new(&rotated)] {
        match File::open(path) {
            Ok(file) => files.push(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    // Newest first up to here: that is the order in which the last lines are found.
    let mut left = tail_lines;
    for file in &mut files {
        if let Some(n) = left {
            let (offset, found) = tail_offset(file, n)?;
            file.seek(SeekFrom::Start(offset))?;
            left = Some(n - found);
        }
    }
    files.reverse();
    Ok(files.into())
}

/// Tells of changes in a log's directory: writes, new files, renames.
struct Watch {
    inotify: AsyncFd<OwnedFd>,
}

impl Watch {
    fn new(path: &Path) -> io::Result<Self> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(dir)?;
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let flags = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::DELETE_SELF;
        inotify::add_watch(&fd, dir, flags)?;
        #[expect(deprecated, reason = "an `OwnedFd` is all that its unsafe successor asks for")]
        let inotify = AsyncFd::new(fd)?;
        Ok(Self { inotify })
    }

    /// Waits for a change and forgets all there are. Cancellation-safe.
    async fn changed(&self) -> io::Result<()> {
        let mut ready = self.inotify.readable().await?;
        let mut buffer = [0_u8; 4096];
        while rustix::io::read(self.inotify.get_ref(), &mut buffer).is_ok_and(|length| length > 0) {}
        ready.clear_ready();
        Ok(())
    }
}

struct Reader {
    path: PathBuf,
    files: VecDeque<File>,
    watch: Option<Watch>,
    ended: Option<BoxFuture<'static, ()>>,
    joiner: Joiner,
    /// The begin of a line whose end is not written yet.
    partial: Vec<u8>,
    left: Option<u64>,
    done: bool,
}

impl Reader {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if self.done || self.left == Some(0) {
                return Ok(None);
            }
            let text = self.read_more()?;
            if let Some(text) = text {
                if !text.is_empty() {
                    return Ok(Some(self.limited(text)));
                }
                continue;
            }
            // All that is written was read.
            let (Some(watch), Some(ended)) = (&self.watch, &mut self.ended) else {
                return Ok(self.finish());
            };
            let over = tokio::select! {
                changed = watch.changed() => {
                    changed?;
                    false
                }
                () = ended => true,
            };
            if over {
                // Once more to the end: the last lines were written before the end was told.
                self.ended = None;
            }
        }
    }

    /// Reads a piece; `None` at the present end of the log.
    fn read_more(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let Some(file) = self.files.front_mut() else {
                return Ok(self.open_next()?.then(Vec::new));
            };
            let length = file.read(&mut chunk)?;
            if length > 0 {
                return Ok(Some(self.take_in(&chunk[..length])));
            }
            if self.files.len() > 1 {
                self.files.pop_front();
            } else if !self.open_next()? {
                return Ok(None);
            }
        }
    }

    /// Goes on to a file that has taken this one's place by rotation.
    fn open_next(&mut self) -> io::Result<bool> {
        let next = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        let key = |file: &File| file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        if let Some(now) = self.files.back()
            && key(now)? == key(&next)?
        {
            return Ok(false);
        }
        self.files.push_back(next);
        Ok(true)
    }

    fn take_in(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut text = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if self.partial.last() == Some(&b'\n') {
                self.partial.pop();
                text.extend(self.joiner.push(&self.partial).unwrap_or_default());
                self.partial.clear();
            } else if self.partial.len() > MAX_LINE_BYTES {
                // No line of ours is that long.
                self.partial.clear();
            }
        }
        text
    }

    fn finish(&mut self) -> Option<Bytes> {
        self.done = true;
        let rest = self.joiner.finish();
        (!rest.is_empty()).then(|| self.limited(rest))
    }

    fn limited(&mut self, mut text: Vec<u8>) -> Bytes {
        if let Some(left) = &mut self.left {
            text.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= text.len() as u64;
        }
        text.into()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::OpenOptions, io::Write, time::UNIX_EPOCH};

    use futures_util::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    fn append(path: &Path, lines: &[&str]) {
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        for line in lines {
            writeln!(file, "2026-01-02T03:04:05Z stdout {line}").unwrap();
        }
    }

    async fn read(path: &Path, options: &LogOptions) -> String {
        let mut stream = stream(path.to_owned(), options, futures_util::future::ready(()).boxed()).unwrap();
        let mut all = Vec::new();
        while let Some(piece) = stream.next().await {
            all.extend_from_slice(&piece.unwrap());
        }
        String::from_utf8(all).unwrap()
    }

    #[tokio::test]
    async fn options_choose_what_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        assert_eq!(read(&path, &LogOptions::default()).await, "");
        append(&dir.path().join("0.log.1"), &["F one", "F two"]);
        append(&path, &["P th", "F ree", "F four"]);
        let check =
            async |options: LogOptions, expected: &str| assert_eq!(read(&path, &options).await, expected);
        check(LogOptions::default(), "one\ntwo\nthree\nfour\n").await;
        for (n, expected) in [(1, "four\n"), (2, "three\nfour\n"), (3, "two\nthree\nfour\n")] {
            let options = LogOptions {
                tail_lines: Some(n),
                ..LogOptions::default()
            };
            check(options, expected).await;
        }
        let options = LogOptions {
            limit_bytes: Some(6),
            ..LogOptions::default()
        };
        check(options, "one\ntw").await;
        let options = LogOptions {
            tail_lines: Some(1),
            timestamps: true,
            ..LogOptions::default()
        };
        check(options, "2026-01-02T03:04:05Z four\n").await;
        let options = LogOptions {
            since: Some(UNIX_EPOCH + std::time::Duration::from_secs(4_000_000_000)),
            ..LogOptions::default()
        };
        check(options, "").await;
    }

    #[tokio::test]
    async fn following_sees_writes_rotation_and_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c").join("0.log");
        let (end, ended) = oneshot::channel::<()>();
        let options = LogOptions {
            follow: true,
            ..LogOptions::default()
        };
        let ended = ended.map(|_| ()).boxed();
        let mut stream = stream(path.clone(), &options, ended).unwrap();
        append(&path, &["F a"]);
        assert_eq!(stream.next().await.unwrap().unwrap(), "a\n");
        append(&path, &["F b"]);
        assert_eq!(stream.next().await.unwrap().unwrap(), "b\n");
        std::fs::rename(&path, dir.path().join("c").join("0.log.1")).unwrap();
        append(&path, &["F c"]);
        assert_eq!(stream.next().await.unwrap().unwrap(), "c\n");
        append(&path, &["F d"]);
        drop(end);
        let mut rest = Vec::new();
        while let Some(piece) = stream.next().await {
            rest.extend_from_slice(&piece.unwrap());
        }
        assert_eq!(rest, b"d\n");
    }
}
