//! Which disks a machine has while it runs, and when it goes on elsewhere.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use integration::{Ctx, Outcome, Test};
use serde_json::{Value, json};

use super::disks::{base_tree, erofs, ext4, killed, mount, push};
use super::pod::{join, sandbox};
use super::template::Configured;
use super::{A_WHILE, OURS, Piped, new_id, test};
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        test(
            "task.disk-drives",
            "containers of a pod have disks as long as its machine has drives, and give them back; one machine with disks \
             is restored as any other",
            drives,
        ),
        test(
            "task.disk-checkpoint",
            "a container with a disk goes on elsewhere with the same, and with no other; one that can write to a disk is \
             not written down",
            checkpoint,
        ),
    ]
}

/// Drives of a machine.
const DRIVES: usize = 12;

fn drives(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let _on = Configured::with("[vm]\nboot = \"restore\"\n")?;
    let api = ctx.world.api()?;
    let tree = base_tree(&ctx.path("tree"))?;
    for index in 0..DRIVES {
        fs::create_dir_all(tree.join("images").join(index.to_string()))?;
    }
    let root = ctx.path("root.erofs");
    erofs(ctx, &root, &tree)?;
    let images: Vec<_> = (0..DRIVES).map(|index| ctx.path(&format!("{index}.erofs"))).collect();
    for (index, image) in images.iter().enumerate() {
        let tree = ctx.path(&format!("tree{index}"));
        fs::create_dir(&tree)?;
        fs::write(tree.join("which"), format!("{index}\n"))?;
        erofs(ctx, image, &tree)?;
    }
    let script = "cat /images/*/which | sort -n | tr '\\n' ' '; echo; \
                  awk '$2 == \"/\" {print $3}' /proc/mounts; read line; exit 7";
    let with = |images: &[PathBuf], pod: Option<&Piped<'_>>| {
        let list = vec![mount("erofs", &root, &["ro", "loop"])];
        let (id, words) = (new_id(ctx, OURS), ["sh", "-c", script]);
        let task = Piped::on(ctx, &api, OURS, id, &words, Some(list), |spec| {
            // Its root is read-only, so that nothing can be made in it.
            push(spec, "/mounts", json!({ "destination": "/run", "type": "tmpfs", "source": "tmpfs" }));
            for (index, image) in images.iter().enumerate() {
                let at = format!("/images/{index}");
                push(spec, "/mounts", json!({ "destination": at, "type": "erofs", "source": image }));
            }
            if let Some(pod) = pod {
                join(spec, pod);
            }
        })?;
        task.container.start()?;
        anyhow::Ok(task)
    };
    let says = |task: &mut Piped<'_>, count: usize, typ: &str| {
        let said = task.stdout.read_until(&format!("{typ}\n"), A_WHILE)?;
        let all: Vec<_> = (0..count).map(|index| format!("{index} ")).collect();
        let expected = format!("{}\n{typ}\n", all.concat());
        let said = String::from_utf8_lossy(&said);
        ensure!(said == expected, "it says {said:?} and not {expected:?}");
        anyhow::Ok(())
    };
    let ended = |mut task: Piped<'_>| {
        task.stdin.write(b"\n")?;
        let code = task.container.wait(A_WHILE)?;
        ensure!(code == 7, "it ended with {code}");
        task.end(code)
    };

    // All drives of a machine of its own, which does not boot for that.
    let mut all = with(&images[..DRIVES - 1], None)?;
    says(&mut all, DRIVES - 1, "erofs")?;
    let timeline = ctx.cmd("supermachine").args(["timeline", &all.id]).ok()?;
    let shown = timeline.out();
    ensure!(shown.contains("restore") && !shown.contains("kernel"), "its machine was not restored: {shown}");
    ended(all)?;

    let (first, _) = sandbox(ctx, &api, OURS)?;
    let mut seven = with(&images[..6], Some(&first))?;
    says(&mut seven, 6, "erofs")?;
    // Five drives are left, and one root less for each that the host mounts.
    let refused = with(&images[..5], Some(&first)).err().map(|error| format!("{error:#}"));
    ensure!(
        refused.as_ref().is_some_and(|text| text.contains("no drive")),
        "with more disks than drives: {refused:?}"
    );
    let mut five = with(&images[..4], Some(&first))?;
    says(&mut five, 4, "erofs")?;
    let mut none = with(&[], Some(&first))?;
    says(&mut none, 0, "virtiofs")?;
    ended(none)?;
    ended(seven)?;
    let mut again = with(&images[..6], Some(&first))?;
    says(&mut again, 6, "erofs")?;
    ended(again)?;
    ended(five)?;
    killed(first)?;
    Ok(Outcome::Passed)
}

fn checkpoint(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let api = ctx.world.api()?;
    let images = ["here", "there"].map(|name| {
        let (tree, image) = (ctx.path(&format!("{name}.tree")), ctx.path(&format!("{name}.erofs")));
        fs::create_dir(&tree)?;
        fs::write(tree.join("which"), format!("{name}\n"))?;
        fs::write(tree.join("more"), format!("of {name}\n").repeat(30_000))?;
        erofs(ctx, &image, &tree)?;
        anyhow::Ok(image)
    });
    let [here, there] = images;
    let (here, there) = (here?, there?);
    let give = |spec: &mut Value, typ: &str, image: &Path, options: &[&str]| {
        let disk = json!({ "destination": "/disk", "type": typ, "source": image, "options": options });
        push(spec, "/mounts", disk);
    };
    let script = "exec 5</disk/which; echo ready; read line; cat <&5; md5sum /disk/more; exit 7";
    let words = ["sh", "-c", script];
    let mut first = Piped::new(ctx, &api, OURS, &words, |spec| give(spec, "erofs", &here, &["ro"]))?;
    first.container.start()?;
    first.stdout.read_until("ready\n", A_WHILE)?;
    let mut told = Vec::new();
    let finish = |mut task: Piped<'_>| {
        task.stdin.write(b"\n")?;
        let code = task.container.wait(A_WHILE)?;
        let out = task.stdout.read_to_end(A_WHILE)?;
        task.end(code)?;
        ensure!(code == 7, "it ended with {code}: {}", String::from_utf8_lossy(&out));
        anyhow::Ok(String::from_utf8_lossy(&out).into_owned())
    };
    {
        let checkpoint = first.container.checkpoint(false)?;
        let go_on = |edit: &dyn Fn(&mut Value)| {
            Piped::from(ctx, &api, &checkpoint, new_id(ctx, OURS), &words, |spec| edit(spec))
        };
        for (why, image) in
            [("is not the one that the container had", Some(&there)), ("this one is to have 0", None)]
        {
            let made = go_on(&|spec| {
                if let Some(image) = image {
                    give(spec, "erofs", image, &["ro"]);
                }
            });
            let error = made.err().map_or_else(|| "taken".to_owned(), |error| format!("{error:#}"));
            ensure!(error.contains(why), "{why}: {error}");
        }
        // Two at a time, beside the one that goes on.
        let both = [(); 2].map(|()| go_on(&|spec| give(spec, "erofs", &here, &["ro"])));
        for task in both {
            let task = task?;
            task.container.start()?;
            told.push(finish(task)?);
        }
    }
    told.push(finish(first)?);
    ensure!(told[0].starts_with("here\n") && told.iter().all(|one| one == &told[0]), "they say {told:?}");

    let (tree, image) = (ctx.path("rw.tree"), ctx.path("rw.ext4"));
    fs::create_dir(&tree)?;
    ext4(ctx, &image, &tree)?;
    let writes = Piped::new(ctx, &api, OURS, &["sleep", "1000"], |spec| give(spec, "ext4", &image, &[]))?;
    writes.container.start()?;
    let error = writes.container.checkpoint(false).err().map(|error| format!("{error:#}"));
    ensure!(
        error.as_ref().is_some_and(|text| text.contains("can write to")),
        "with a disk to write to: {error:?}"
    );
    killed(writes)?;
    Ok(Outcome::Passed)
}
