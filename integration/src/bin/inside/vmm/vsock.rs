//! Streams between guest and host.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::guest::Guest;
use integration::pattern;
use integration::streams::{Ask, answer, ask, taken};
use integration::{Ctx, Outcome, Rounds, Test};

use super::{boot, initrd_with_part, up};
use crate::world::Inside;

/// Where the guest's program answers.
const PORT: u16 = 5000;
/// Where the host does.
const HOST_PORT: u16 = 6000;
const AT_ONCE: u64 = 200;

pub fn tests() -> Vec<Test<Inside>> {
    vec![Test {
        name: "vmm.vsock",
        proves: "streams carry 1 GiB (32 MiB for every change) each way unharmed, 200 of them at once, and one \
                 direction may end before the other",
        run,
        deadline: Duration::from_mins(10),
        rounds: Rounds::once_or(1),
        tags: &[],
    }]
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let length = ctx.either(32u64, 1024) << 20;
    let initrd = initrd_with_part(ctx)?;
    let guest = up(ctx, boot(ctx, "g").options(["--cpus", "2", "--log", "debug"]), &initrd)?;
    let mut serving =
        guest.begin(["guest-part".to_owned(), "serve".to_owned(), PORT.to_string()], ctx.left())?;
    serving.until_stdout_has("listening")?;
    let step = |name: &str, step: &dyn Fn() -> Result<()>| -> Result<()> {
        let begun = Instant::now();
        step().with_context(|| name.to_owned())?;
        ctx.note(format!("{name}: {:.2} s", begun.elapsed().as_secs_f64()));
        Ok(())
    };
    step("a port where nobody listens", &|| {
        ensure!(guest.connect(PORT + 1).is_err(), "there was a stream to it");
        Ok(())
    })?;
    step(&format!("{} MiB to the guest", length >> 20), &|| {
        let stream = stream(ctx, &guest)?;
        ask(&stream, Ask::Take, 1, length)?;
        pattern::send(&stream, 1, length)?;
        Ok(taken(&stream)?)
    })?;
    step(&format!("{} MiB from the guest", length >> 20), &|| {
        let mut stream = stream(ctx, &guest)?;
        ask(&stream, Ask::Give, 2, length)?;
        pattern::receive(&stream, 2, length)?;
        ensure!(stream.read(&mut [0])? == 0, "more came than was asked for");
        Ok(())
    })?;
    step("a stream the guest begins", &|| called(ctx, &guest))?;
    step("half a stream's end", &|| half_closed(ctx, &guest))?;
    step(&format!("{AT_ONCE} streams at once"), &|| at_once(ctx, &guest))?;
    drop(serving);
    let done = guest.power_off()?.expect_code(0)?;
    ensure!(!done.err().contains("warn:"), "the monitor complained of something: {}", done.err());
    Ok(Outcome::Passed)
}

fn stream(ctx: &Ctx<'_, Inside>, guest: &Guest) -> Result<UnixStream> {
    let stream = guest.connect(PORT)?;
    stream.set_read_timeout(Some(ctx.left()))?;
    stream.set_write_timeout(Some(ctx.left()))?;
    Ok(stream)
}

/// The guest connects to a port of the host, which is a socket's file; one that is not there is refused.
fn called(ctx: &Ctx<'_, Inside>, guest: &Guest) -> Result<()> {
    let path = guest.sockets().join(format!("vsock_{HOST_PORT}"));
    let call =
        ["guest-part".to_owned(), "call".to_owned(), HOST_PORT.to_string(), "7".into(), "3000001".into()];
    let refused = guest.run(&call, ctx.left().mul_f64(0.5))?;
    ensure!(refused.code != 0, "the guest reached a port where nobody listens");
    let listener = UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    let left = ctx.left();
    thread::scope(|scope| {
        // Ends with the guest's connection: a guest that never calls has failed by its exit code before,
        // and the last call below wakes a listener that still waits.
        let answering = scope.spawn(|| -> Result<()> {
            let (stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(left))?;
            Ok(answer(&stream)?)
        });
        let ran = guest.run(&call, left.mul_f64(0.5));
        if !matches!(&ran, Ok(ran) if ran.code == 0) {
            let _ = UnixStream::connect(&path);
        }
        let answered = answering.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the host's end panicked")));
        let ran = ran?;
        ensure!(ran.code == 0, "in the guest: {ran}");
        answered.context("the host's end")
    })
}

fn half_closed(ctx: &Ctx<'_, Inside>, guest: &Guest) -> Result<()> {
    const LENGTH: u64 = 300_000;
    let stream = stream(ctx, guest)?;
    ask(&stream, Ask::GiveAfterEnd, 5, LENGTH)?;
    pattern::send(&stream, 6, LENGTH)?;
    stream.set_read_timeout(Some(Duration::from_millis(300)))?;
    ensure!((&stream).read(&mut [0]).is_err(), "an answer came before the end it was to wait for");
    stream.set_read_timeout(Some(ctx.left()))?;
    stream.shutdown(Shutdown::Write)?;
    pattern::receive(&stream, 5, LENGTH)?;
    ensure!((&stream).read(&mut [0])? == 0, "the other direction did not end");
    Ok(())
}

/// All are open at the same time, and each has a message of its own on the way.
fn at_once(ctx: &Ctx<'_, Inside>, guest: &Guest) -> Result<()> {
    const LENGTH: usize = 3000;
    let mut streams = Vec::new();
    for number in 0..AT_ONCE {
        let stream = stream(ctx, guest).with_context(|| format!("stream {number}"))?;
        ask(&stream, Ask::Echo, 0, 0)?;
        streams.push(stream);
    }
    for (number, mut stream) in (0..).zip(&streams) {
        stream.write_all(&pattern::bytes(number, LENGTH))?;
    }
    for (number, stream) in (0..AT_ONCE).rev().zip(streams.iter().rev()) {
        pattern::receive(stream, number, LENGTH as u64).with_context(|| format!("stream {number}"))?;
        stream.shutdown(Shutdown::Write)?;
    }
    for (number, mut stream) in (0..).zip(&streams) {
        let end = stream.read(&mut [0]).with_context(|| format!("the end of stream {number}"))?;
        ensure!(end == 0, "stream {number} had more to say");
    }
    Ok(())
}
