//! Drives: disks that are put in and taken out.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::command::Cmd;
use integration::guest::Guest;
use integration::{Ctx, Outcome, Rounds, Test, pattern};

use super::{A_MOMENT, boot, initrd, up};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.drives",
        proves: "more drives than there are interrupts take disks while a machine runs, all are read and written at the \
                 same time, and give them back when the guest lets go of them",
        run,
        deadline: Duration::from_mins(10),
        rounds: Rounds::once_or(5),
        tags: &[],
    }]
}

/// x86_64 has eighteen interrupts for all devices.
const DRIVES: usize = 20;
const LEN: usize = 1 << 20;
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_blk";

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = boot(ctx, "g").controlled().options(["--cpus", "2"]);
    let machine = (0..DRIVES).fold(machine, |machine, _| machine.options(["--drive", "none"]));
    let guest = up(ctx, machine, &initrd(ctx)?)?;
    // The driver has begun with all of them.
    let empty = guest.sh("cat /sys/block/vd*/size | sort -u", A_MOMENT)?;
    ensure!(empty.trim() == "0", "empty drives have {empty:?} sectors");
    let ran = guest.run(["sh", "-c", "dd if=/dev/vda of=/dev/null count=1"], A_MOMENT)?;
    ensure!(ran.code != 0 || ran.out().is_empty(), "something was read from an empty drive");
    let image = |index: usize| ctx.path(&format!("image{index}"));
    fs::write(image(0), pattern::bytes(0, LEN))?;
    let early = insert(&guest, 0, &image(0), "")?;
    ensure!(early.contains("its guest uses it"), "a disk for a driver that is at work: {early:?}");
    guest.sh(&format!("cd {DRIVER}; for drive in virtio*; do echo $drive >unbind; done"), A_MOMENT)?;
    for index in 0..DRIVES {
        // What is written is the sum of what is read.
        fs::write(image(index), [pattern::bytes(index as u64, LEN), vec![0; 4096]].concat())?;
        let options = format!(":serial=number-{index}");
        ensure!(insert(&guest, index, &image(index), &options)?.is_empty(), "a disk was not put in");
    }
    let full = insert(&guest, 3, &image(4), ":ro")?;
    ensure!(
        full.contains("in use by another machine") || full.contains("there is a disk"),
        "a second one: {full:?}"
    );
    guest.sh(
        &format!(
            "cd /sys/bus/virtio/devices; for drive in virtio*; do \
             [ $(cat $drive/device) = 0x0002 ] && echo $drive >{DRIVER}/bind; done; true"
        ),
        A_MOMENT,
    )?;
    // All at once, so that those who share an interrupt are asked together.
    let script = format!(
        "for disk in /sys/block/vd*; do ( \
           name=$(basename $disk); sum=$(dd if=/dev/$name bs=16k count={} iflag=direct 2>/dev/null | sha256sum); \
           echo \"$(cat $disk/serial) $sum\" >/tmp/$name; \
           dd if=/tmp/$name of=/dev/$name bs=4096 seek={} conv=sync,fsync 2>/dev/null \
         ) & done; wait; cat /tmp/vd*",
        LEN / (16 << 10),
        LEN / 4096
    );
    let said = guest.sh(&script, Duration::from_mins(3))?;
    for index in 0..DRIVES {
        let content = pattern::bytes(index as u64, LEN);
        let sum = Cmd::new("sha256sum", A_MOMENT).stdin(content.clone()).ok()?.out().trim().to_owned();
        let line = format!("number-{index} {sum}\n");
        ensure!(said.contains(&line), "of {line:?} the guest says\n{said}");
        let found = fs::read(image(index))?;
        ensure!(found.starts_with(&content), "the image {index} has changed");
        ensure!(
            found[LEN..].starts_with(line.as_bytes()),
            "what was written to the image {index} is not there"
        );
    }
    let used = guest.try_ctl(["eject", "drive.0"])?.expect_code(1)?;
    ensure!(used.err().contains("its guest uses it"), "a disk that is in use is taken out: {}", used.err());
    guest.sh(&format!("cd {DRIVER}; for drive in virtio*; do echo $drive >unbind; done"), A_MOMENT)?;
    for index in 0..DRIVES {
        guest.ctl(["eject".to_owned(), format!("drive.{index}")])?;
        fs::File::open(image(index))?.try_lock().context("the image is still in use")?;
    }
    let none = guest.try_ctl(["eject".to_owned(), format!("drive.{DRIVES}")])?.expect_code(1)?;
    ensure!(none.err().contains("there is no drive"), "of a drive that is not there: {}", none.err());
    guest.ends_well()?;
    Ok(Outcome::Passed)
}

/// Puts an image into a drive; what was said against it.
fn insert(guest: &Guest, drive: usize, image: &Path, options: &str) -> Result<String> {
    let words = ["disk".to_owned(), format!("drive.{drive}"), format!("{}{options}", image.display())];
    Ok(guest.try_ctl(words)?.err().into_owned())
}
