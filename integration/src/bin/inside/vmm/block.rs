//! Disks.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::guest::Guest;
use integration::{Ctx, Outcome, Rounds, Test, pattern};

use super::{A_MOMENT, boot, initrd, up};
use crate::world::Inside;

const MIB: u64 = 1 << 20;

/// The host's: by its bare name the guest's busybox would take it for one of its own.
const DISCARD: &str = "chroot /h /usr/sbin/blkdiscard";

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.block",
        proves: "a disk keeps what fio writes to it, a read-only one stays as it is, and what is discarded or \
                 zeroed is so in its image",
        run,
        deadline: Duration::from_mins(40),
        rounds: Rounds::once_or(1),
        tags: &[],
    }]
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let size = ctx.either(16u64, 256) * MIB;
    let (disk, fixed) = (ctx.path("disk"), ctx.path("fixed"));
    File::create(&disk)?.set_len(size)?;
    let content = pattern::bytes(3, 4 * MIB as usize);
    fs::write(&fixed, &content)?;
    let machine = boot(ctx, "g")
        .options(["--cpus", "2"])
        .share("host", Path::new("/"), true)
        .block(&disk, false)
        .options(["--block".to_owned(), format!("{}:serial=nr-20_bytes.12345678:ro", fixed.display())]);
    let guest = up(ctx, machine, &initrd(ctx)?)?;
    // The host's own tools, with the guest's devices.
    guest.sh(
        "mkdir /h; mount -t virtiofs -o ro host /h; mount --rbind /dev /h/dev; mount -t proc proc /h/proc; \
         mount -t sysfs sysfs /h/sys; mount -t tmpfs tmpfs /h/tmp",
        A_MOMENT,
    )?;
    for (device, expected, serial) in [("vda", size, "disk"), ("vdb", 4 * MIB, "nr-20_bytes.12345678")] {
        let found = guest.sh(&format!("cat /sys/block/{device}/size"), A_MOMENT)?;
        ensure!(found.trim() == (expected / 512).to_string(), "{device} has {found} sectors");
        let found = guest.sh(&format!("cat /sys/block/{device}/serial"), A_MOMENT)?;
        ensure!(found.trim() == serial, "{device} has the serial number {found:?}");
    }
    fio(ctx, &guest, size)?;
    discard_and_zero(&guest, &disk)?;
    read_only(&guest, &fixed, &content)?;
    guest.ends_well()?;
    Ok(Outcome::Passed)
}

fn fio(ctx: &Ctx<'_, Inside>, guest: &Guest, size: u64) -> Result<()> {
    // Several times what it takes.
    let within = ctx.either(Duration::from_secs(90), Duration::from_mins(15));
    for (direction, block) in [("randwrite", "4k"), ("write", "256k")] {
        let script = format!(
            "cd /h/tmp; chroot /h fio --name=v --filename=/dev/vda --rw={direction} --bs={block} --size={size} \
             --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --do_verify=1 \
             --fsync=64 --aux-path=/tmp --minimal >/dev/null"
        );
        guest.sh(&script, within).with_context(|| format!("fio, {direction} of {block}"))?;
    }
    Ok(())
}

/// In an image full of bytes, the second MiB is discarded and the fourth zeroed.
fn discard_and_zero(guest: &Guest, image: &Path) -> Result<()> {
    let full = pattern::bytes(4, 8 * MIB as usize);
    let file = File::options().read(true).write(true).open(image)?;
    file.write_all_at(&full, 0)?;
    let before = file.metadata()?.blocks();
    let range = |at: u64| format!("--offset {} --length {MIB} /dev/vda", at * MIB);
    guest.sh(&format!("{DISCARD} {}", range(1)), A_MOMENT).context("discarding")?;
    guest.sh(&format!("{DISCARD} --zeroout {}", range(3)), A_MOMENT).context("zeroing")?;
    let after = file.metadata()?.blocks();
    ensure!(
        after + MIB / 512 <= before,
        "discarding did not make room: {before} blocks before, {after} after"
    );
    let mut found = vec![0; full.len()];
    file.read_exact_at(&mut found, 0)?;
    for (index, part) in (0u64..).zip(found.chunks(MIB as usize)) {
        let zero = part.iter().all(|byte| *byte == 0);
        ensure!(zero == (index == 1 || index == 3), "MiB {index} is {}zero", if zero { "" } else { "not " });
        ensure!(zero || pattern::wrong(4, index * MIB, part).is_none(), "MiB {index} has changed");
    }
    Ok(())
}

fn read_only(guest: &Guest, image: &Path, content: &[u8]) -> Result<()> {
    let ran = guest.run(["sh", "-c", "echo garbage | dd of=/dev/vdb conv=fsync"], A_MOMENT)?;
    ensure!(ran.code != 0, "a read-only disk was written");
    let ran = guest
        .run(["sh", "-c", "echo 0 > /sys/block/vdb/ro; chroot /h /usr/sbin/blkdiscard /dev/vdb"], A_MOMENT)?;
    ensure!(ran.code != 0, "a read-only disk was discarded");
    ensure!(
        guest.sh("cat /sys/block/vdb/ro", A_MOMENT)?.trim() == "1",
        "the guest does not know it is read-only"
    );
    ensure!(fs::read(image)? == content, "the image of a read-only disk has changed");
    let sum = guest.sh("dd if=/dev/vdb bs=64k 2>/dev/null | sha256sum", A_MOMENT)?;
    let ours = integration::command::Cmd::new("sha256sum", A_MOMENT).stdin(content).ok()?;
    ensure!(sum == ours.out(), "the guest reads something else: {sum:?}, here {:?}", ours.out());
    Ok(())
}
