//! The two slice disks: files with an image and an empty scratch file system at their offsets.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command,
};

pub(crate) const IMAGE_OFFSET: u64 = 1 << 20;
pub(crate) const IMAGE_BYTES: u64 = 8 << 20;
pub(crate) const SCRATCH_OFFSET: u64 = 2 << 20;
pub(crate) const SCRATCH_BYTES: u64 = 64 << 20;

/// Runs a command that must succeed; its output.
pub(crate) fn command(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Makes both files in `directory`.
pub(crate) fn make(directory: &Path) {
    let root = directory.join("image");
    for name in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).unwrap();
    for applet in command("busybox", &["--list"])
        .lines()
        .filter(|applet| *applet != "busybox")
    {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/tmp:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\nlogs:x:40:web\n").unwrap();
    fs::write(root.join("etc/broken"), [0x7f, b'X', 1, 2]).unwrap();
    fs::set_permissions(root.join("etc/broken"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("/..", root.join("escape")).unwrap();
    symlink("/etc", root.join("abs")).unwrap();

    let erofs = directory.join("erofs");
    command(
        "mkfs.erofs",
        &[
            "-T0",
            "--all-root",
            &erofs.to_string_lossy(),
            &root.to_string_lossy(),
        ],
    );
    let mut disk = File::create(directory.join("vda")).unwrap();
    disk.set_len(IMAGE_OFFSET + IMAGE_BYTES).unwrap();
    disk.seek(SeekFrom::Start(IMAGE_OFFSET)).unwrap();
    let image = fs::read(erofs).unwrap();
    assert!(image.len() as u64 <= IMAGE_BYTES);
    disk.write_all(&image).unwrap();

    let path = directory.join("vdb");
    File::create(&path)
        .unwrap()
        .set_len(SCRATCH_OFFSET + SCRATCH_BYTES)
        .unwrap();
    let (offset, blocks) = (
        format!("offset={SCRATCH_OFFSET}"),
        (SCRATCH_BYTES / 4096).to_string(),
    );
    command(
        "mkfs.ext4",
        &[
            "-q",
            "-F",
            "-b",
            "4096",
            "-O",
            "^has_journal",
            "-E",
            &offset,
            &path.to_string_lossy(),
            &blocks,
        ],
    );
}
