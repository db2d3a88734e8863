//! Container images made here, of a static busybox: no registry is needed to have one.
//!
//! One OCI layout holds both, so one `ctr image import` or `docker load` brings them in.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::cache::hex;
use crate::spec::Arch;

/// The image of the tests, and the one that holds a Kubernetes pod together.
const IMAGES: [(&str, &[&str]); 2] = [
    ("docker.io/library/busybox:latest", &["sh"]),
    ("localhost/pause:latest", &["/bin/busybox", "sleep", "2147483647"]),
];

/// What a busybox container offers as commands.
const APPLETS: &str = "[ [[ arping ash awk base64 basename bunzip2 bzcat bzip2 cat chgrp chmod chown chroot cksum clear \
    cmp cp cut date dc dd df diff dirname dmesg dnsdomainname du echo ed egrep env expand expr factor fallocate \
    false fgrep find fold free fsync ftpget ftpput getopt grep groups gunzip gzip head hexdump hostid hostname \
    httpd id ifconfig install ip ipaddr iplink ipneigh iproute kill killall last less link ln logger login ls \
    lsof lzcat md5sum mesg mkdir mkfifo mknod mktemp more mount mv nc netstat nice nl nohup nproc nslookup od \
    paste patch pgrep pidof ping ping6 pkill printenv printf ps pwd readlink realpath renice reset rev rm rmdir \
    route script sed seq setpriv setsid sh sha1sum sha256sum sha512sum shred shuf sleep sort split stat strings \
    stty su sync sysctl tac tail tar taskset tee telnet test tftp time timeout top touch tr traceroute true \
    truncate tty uname unexpand uniq unlink unshare unxz unzip uptime usleep uuencode vi watch wc wget which \
    who whoami xargs xxd xz xzcat yes zcat";

/// The commands of a busybox that get a name of their own.
pub fn applets() -> impl Iterator<Item = &'static str> {
    APPLETS.split_whitespace()
}

/// Writes the layout of both images, as a tar, to `to`.
pub fn write_images(busybox: &Path, arch: Arch, to: &Path) -> Result<()> {
    let layer = layer(&fs::read(busybox).with_context(|| format!("reading {}", busybox.display()))?)?;
    let mut layout = Builder::new(File::create(to)?);
    append(&mut layout, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut blob = |media: &str, data: &[u8]| -> Result<Value> {
        let digest = hex(&Sha256::digest(data));
        append(&mut layout, &format!("blobs/sha256/{digest}"), data)?;
        Ok(json!({ "mediaType": media, "digest": format!("sha256:{digest}"), "size": data.len() }))
    };
    let layer_descriptor = blob("application/vnd.oci.image.layer.v1.tar", &layer)?;
    let mut manifests = Vec::new();
    // The older form of the same, which docker load still wants.
    let mut archive = Vec::new();
    for (name, command) in IMAGES {
        let config = json!({
            "architecture": arch.oci(),
            "os": "linux",
            "config": { "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": command },
            "rootfs": { "type": "layers", "diff_ids": [layer_descriptor["digest"]] },
        });
        let config = blob("application/vnd.oci.image.config.v1+json", &serde_json::to_vec(&config)?)?;
        archive.push(json!({
            "Config": blob_path(&config), "RepoTags": [name], "Layers": [blob_path(&layer_descriptor)],
        }));
        let media = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media, "config": config, "layers": [layer_descriptor],
        });
        let mut descriptor = blob(media, &serde_json::to_vec(&manifest)?)?;
        descriptor["annotations"] = json!({
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.rsplit(':').next(),
        });
        descriptor["platform"] = json!({ "architecture": arch.oci(), "os": "linux" });
        manifests.push(descriptor);
    }
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    append(&mut layout, "index.json", &serde_json::to_vec(&index)?)?;
    append(&mut layout, "manifest.json", &serde_json::to_vec(&archive)?)?;
    layout.into_inner()?.flush()?;
    Ok(())
}

fn blob_path(descriptor: &Value) -> String {
    format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
}

fn layer(busybox: &[u8]) -> io::Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    for (dir, mode) in [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("home", 0o755),
        ("proc", 0o555),
        ("root", 0o700),
        ("sys", 0o555),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("usr/sbin", 0o755),
        ("var", 0o755),
        ("var/tmp", 0o1777),
    ] {
        let mut header = header(EntryType::Directory, mode, 0);
        tar.append_data(&mut header, dir, io::empty())?;
    }
    tar.append_data(&mut header(EntryType::Regular, 0o755, busybox.len()), "bin/busybox", busybox)?;
    for applet in applets() {
        tar.append_link(&mut header(EntryType::Symlink, 0o777, 0), format!("bin/{applet}"), "busybox")?;
    }
    for (path, text) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\ndaemon:x:1:\nwheel:x:10:daemon\nnogroup:x:65534:\n"),
    ] {
        tar.append_data(&mut header(EntryType::Regular, 0o644, text.len()), path, text.as_bytes())?;
    }
    tar.into_inner()
}

fn append(layout: &mut Builder<File>, path: &str, data: &[u8]) -> io::Result<()> {
    layout.append_data(&mut header(EntryType::Regular, 0o644, data.len()), path, data)
}

/// Everything belongs to root and dates from the epoch, so that equal images have equal digests.
fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}
