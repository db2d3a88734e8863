//! What libcontainer says of its failures. Its errors name the step, and its log the reason; so what it logs as an
//! error is remembered, by whichever of its processes logs it, in standard error, which is a pipe to the agent.
//! The first of a failure is the one closest to the cause.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::Mutex;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

static FIRST: Mutex<Option<String>> = Mutex::new(None);

/// From now on, errors are written to standard error.
pub fn tell() {
    let _ = tracing::subscriber::set_global_default(Teller);
}

/// The first that was said in this process.
pub fn first() -> Option<String> {
    FIRST.lock().ok()?.clone()
}

struct Teller;

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
        if let Ok(mut first) = FIRST.lock() {
            first.get_or_insert_with(|| line.0.clone());
        }
        let _ = writeln!(std::io::stderr(), "{}", line.0);
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
