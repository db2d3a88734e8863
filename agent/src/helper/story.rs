//! What libcontainer says of its failures. Its errors name the step, and its log the reason; so what it logs as an
//! error is written to a pipe to the agent, by whichever of its processes logs it, also when its standard error has
//! become the container's. The first line is the one closest to the cause.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// From now on, errors are written to what is standard error now.
pub fn tell() {
    if let Ok(pipe) = std::io::stderr().as_fd().try_clone_to_owned() {
        let _ = tracing::subscriber::set_global_default(Teller(pipe.into()));
    }
}

struct Teller(File);

impl Subscriber for Teller {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let _ = writeln!(&self.0, "{}", line.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let space = if self.0.is_empty() { "" } else { " " };
        let _ = match field.name() {
            "message" => write!(self.0, "{space}{value:?}"),
            name => write!(self.0, "{space}{name}={value:?}"),
        };
    }
}
