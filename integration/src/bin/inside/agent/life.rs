//! From a container's making to its removal.

use std::time::{Duration, Instant};

use agent_api::VERSION;
use agent_api::agent::event::What;
use agent_api::agent::{ConfigureRequest, Empty, HelloRequest};
use anyhow::{Result, ensure};
use integration::agent::{CALL, Container, Streams, config};
use integration::{Ctx, Outcome, Rounds, Test};

use super::machine;
use crate::world::Inside;

pub fn tests() -> Vec<Test<Inside>> {
    vec![
        Test {
            name: "agent.hello",
            proves: "a machine of the product's kernel and initrd has an agent that answers, and turns off when told",
            run: hello,
            deadline: Duration::from_mins(3),
            rounds: Rounds::once_or(20),
            tags: &[],
        },
        Test {
            name: "agent.run",
            proves: "a container's output, exit code and events are those of its process, and it leaves nothing",
            run,
            deadline: Duration::from_mins(5),
            rounds: Rounds::once_or(5),
            tags: &[],
        },
    ]
}

fn hello(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = machine(ctx)?;
    ctx.note(format!("{:?}", machine.hello));
    ensure!(machine.hello.boot_id.is_empty(), "it has drawn {:?} already", machine.hello.boot_id);
    let empty = Empty::new();
    machine.call(async |client, context| client.settle(context, &empty).await)?;
    let request = ConfigureRequest { entropy: vec![7; 64], ..ConfigureRequest::new() };
    machine.call(async |client, context| client.configure(context, &request).await)?;
    let request = HelloRequest { version: VERSION, ..HelloRequest::new() };
    let hello = machine.call(async |client, context| client.hello(context, &request).await)?;
    ensure!(hello.boot_id.len() == 36, "its boot id is {:?}", hello.boot_id);
    machine.ends_well()?;
    Ok(Outcome::Passed)
}

fn run(ctx: &mut Ctx<'_, Inside>) -> Result<Outcome> {
    let machine = machine(ctx)?;
    let begun = Instant::now();
    let container = Container::create(&machine, "c1", &config("c1", &["echo", "hello"]), Streams::default())?;
    let created = begun.elapsed();
    let output = container.run(CALL)?;
    ctx.note(format!("created after {created:.2?}, done after {:.2?}", begun.elapsed()));
    ensure!((output.status(), output.out().as_str()) == (0, "hello\n"), "{output:?}");
    let events = machine.events(CALL)?;
    ensure!(
        matches!(&events[..], [event] if event.id == "c1" && matches!(&event.what, Some(What::Exit(exit)) if *exit == output.exit)),
        "the events are {events:?}"
    );
    container.delete()?;
    ensure!(
        machine.delete("c1", "").is_err_and(|error| error.to_string().starts_with("NOT_FOUND")),
        "deleted twice"
    );
    machine.ends_well()?;
    Ok(Outcome::Passed)
}
