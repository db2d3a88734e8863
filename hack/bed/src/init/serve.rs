//! The port on which the tool's requests arrive.

use std::fs::File;
use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};

use crate::listen::{Listener, Stream};
use crate::{command, prepare};
use testbed::{Kind, Reply, Request, read_frame, write_json};

/// The script that starts the services, and where what it prints goes.
const SERVICES: &str = "/usr/local/lib/testbed/services";
const SERVICES_LOG: &str = "/var/log/services.log";
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// For the answer to reach whoever asked for the end.
const HEARD: Duration = Duration::from_secs(2);

/// How far the services are: `None` while they start.
type Services = Arc<(Mutex<Option<Result<(), String>>>, Condvar)>;

/// In a host: starts the services and answers requests; returns only when it cannot go on.
pub fn serve_host() -> Error {
    let prepared = || {
        prepare::network().context("bringing up the network")?;
        Listener::tcp()
    };
    let services = Services::default();
    let starting = Arc::clone(&services);
    prepared().map_or_else(
        |error| error,
        |listener| {
            thread::spawn(move || {
                let outcome = start_services().map_err(|error| format!("{error:#}"));
                let (state, changed) = &*starting;
                *state.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
                changed.notify_all();
            });
            serve(&listener, &services)
        },
    )
}

/// In a guest, which has no services: the same.
pub fn serve_guest() -> Error {
    let services: Services = Arc::new((Mutex::new(Some(Ok(()))), Condvar::new()));
    match Listener::vsock() {
        Ok(listener) => {
            println!("testbed-init: guest ready");
            serve(&listener, &services)
        }
        Err(error) => error,
    }
}

fn serve(listener: &Listener, services: &Services) -> Error {
    loop {
        let stream = match listener.accept() {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        let services = Arc::clone(services);
        thread::spawn(move || {
            if let Err(error) = answer(&stream, &services) {
                println!("testbed-init: request dropped: {error:#}");
            }
        });
    }
}

fn start_services() -> Result<()> {
    let log = File::create(SERVICES_LOG)?;
    let status = Command::new(SERVICES)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .env("PATH", command::PATH)
        .status()
        .with_context(|| format!("running {SERVICES}"))?;
    if !status.success() {
        bail!("{SERVICES} ended with {status}:\n{}", std::fs::read_to_string(SERVICES_LOG)?);
    }
    prepare::keep_a_machine()
}

fn answer(stream: &Stream, services: &Services) -> Result<()> {
    stream.set_read_timeout(Some(REQUEST_DEADLINE))?;
    let request = match read_frame(stream)? {
        Some((Kind::Request, payload)) => serde_json::from_slice(&payload)?,
        Some((kind, _)) => bail!("the first frame is {kind:?}"),
        None => return Ok(()),
    };
    stream.set_read_timeout(None)?;
    let done = |outcome: Result<()>| match outcome {
        Ok(()) => Reply::Done,
        Err(error) => Reply::Failed(format!("{error:#}")),
    };
    let reply = match request {
        Request::Ping => Reply::Done,
        Request::Prepare(how) => done(wait_for_services(services).and_then(|()| prepare::prepare(&how))),
        Request::Exec(what) => return command::run(stream, &what),
        Request::Quiesce => done(wait_for_services(services).and_then(|()| prepare::quiesce())),
        Request::PowerOff => {
            write_json(stream, Kind::Reply, &Reply::Done)?;
            until_heard(stream, HEARD);
            return prepare::power_off();
        }
    };
    match write_json(stream, Kind::Reply, &reply) {
        // The tool gave up waiting; it asks again on a new connection.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// An answer that is still under way would go with the machine: whoever has it hangs up.
fn until_heard(mut stream: &Stream, within: Duration) {
    let _ = stream.set_read_timeout(Some(within));
    let _ = stream.read(&mut [0]);
}

fn wait_for_services(services: &Services) -> Result<()> {
    let (state, changed) = &**services;
    let state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let state =
        changed.wait_while(state, |outcome| outcome.is_none()).unwrap_or_else(PoisonError::into_inner);
    match &*state {
        Some(Err(why)) => bail!("{why}"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn an_answer_is_heard_before_the_end() {
        let (asking, answering) = Stream::pair().unwrap();
        let long = Duration::from_secs(20);
        let begun = Instant::now();
        let hearing = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(asking);
        });
        until_heard(&answering, long);
        assert!((Duration::from_millis(100)..long).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        hearing.join().unwrap();
        // Nobody is waited for in vain.
        let (_silent, answering) = Stream::pair().unwrap();
        until_heard(&answering, Duration::from_millis(50));
    }
}
