//! What goes in and comes out of a command in the emulated host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration::{Ctx, Outcome, Rounds, Test};
use sha2::{Digest, Sha256};

use crate::world::Outside;

pub fn tests() -> Vec<Test<Outside>> {
    let test = |name, proves, run| Test {
        name,
        proves,
        run,
        // The first of them may have to build what it runs on.
        deadline: Duration::from_mins(30),
        rounds: Rounds::once_or(3),
        tags: &["control"],
    };
    vec![
        test(
            "bed.exit-codes",
            "exit codes 0, 7 and 255 and the death by a signal are carried out",
            exit_codes,
        ),
        test("bed.streams", "stdout and stderr are carried out, apart from each other", streams),
        test("bed.large-output", "1 MiB of output arrives whole and in order", large_output),
        test("bed.stdin", "1 MiB piped in arrives inside, and so does its end", stdin),
        test("bed.share", "files go in and out through the shared directory", share),
        test("bed.timeout", "a command that outlives --timeout is ended, and the code is 124", timeout),
    ]
}

fn exit_codes(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    for code in [0, 7, 255] {
        let script = format!("exit {code}");
        Outside::run(ctx, &[], ["sh", "-c", &script])?.run()?.expect_code(code)?;
    }
    // As a shell tells it.
    Outside::run(ctx, &[], ["sh", "-c", "kill -TERM $$"])?.run()?.expect_code(128 + 15)?;
    Ok(Outcome::Passed)
}

fn streams(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let script = "echo out-1; echo err-1 >&2; printf 'out-2'; printf 'err-2' >&2";
    let done = Outside::run(ctx, &[], ["sh", "-c", script])?.ok()?;
    ensure!(done.out() == "out-1\nout-2", "stdout is {:?}", done.out());
    // The tool's own progress goes to stderr as well.
    ensure!(
        done.err().contains("err-1\n") && done.err().ends_with("err-2") && !done.err().contains("out-"),
        "stderr is {:?}",
        done.err()
    );
    Ok(Outcome::Passed)
}

const MEBIBYTE: usize = 1 << 20;

fn large_output(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    // The checksum is of the same bytes, taken inside, and comes by the other stream.
    let script = format!(
        "head -c {MEBIBYTE} /dev/urandom > /tmp/random; sha256sum < /tmp/random >&2; cat /tmp/random"
    );
    let done = Outside::run(ctx, &[], ["sh", "-c", &script])?.ok()?;
    ensure!(done.stdout.len() == MEBIBYTE, "{} bytes arrived of {MEBIBYTE}", done.stdout.len());
    let sum = sha256(&done.stdout);
    ensure!(done.err().contains(&sum), "what arrived has checksum {sum}, inside it was {}", done.err());
    Ok(Outcome::Passed)
}

fn stdin(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let bytes = bytes(MEBIBYTE);
    let sum = sha256(&bytes);
    let done = Outside::run(ctx, &[], ["sha256sum"])?.stdin(bytes).ok()?;
    ensure!(done.out().starts_with(&sum), "inside the checksum is {}, it should be {sum}", done.out());
    Ok(Outcome::Passed)
}

fn share(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let directory = ctx.path("shared");
    fs::create_dir(&directory).context("creating the directory to share")?;
    let sent = bytes(MEBIBYTE + 1);
    fs::write(directory.join("in"), &sent).context("writing the file to send")?;
    let script = "cat /share/in /share/in > /share/out && mkdir /share/sub && echo deep > /share/sub/file \
                  && rm /share/in";
    let place = directory.display().to_string();
    Outside::run(ctx, &["--share", &place], ["sh", "-c", script])?.ok()?;
    let received = fs::read(directory.join("out")).context("reading what was written inside")?;
    ensure!(
        received == [&sent[..], &sent[..]].concat(),
        "{} bytes came back, or not the right ones",
        received.len()
    );
    ensure!(fs::read(directory.join("sub/file")).context("reading sub/file")? == b"deep\n");
    ensure!(!directory.join("in").exists(), "a file removed inside is still here");
    Ok(Outcome::Passed)
}

fn timeout(ctx: &mut Ctx<'_, Outside>) -> Result<Outcome> {
    let done = Outside::run(ctx, &["--timeout", "2"], ["sh", "-c", "echo begun; sleep 1000"])?.run()?;
    let done = done.expect_code(124)?;
    ensure!(done.out() == "begun\n", "before its end the command said {:?}", done.out());
    Ok(Outcome::Passed)
}

/// `count` bytes without a short period.
fn bytes(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..count).map(|_| next()).collect()
}

fn sha256(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut hex = String::new();
    for byte in Sha256::digest(bytes) {
        let _ = write!(hex, "{byte:02x}");
    }
    hex
}
