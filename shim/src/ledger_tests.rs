use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use ttrpc::Code;

use super::*;

fn ledger() -> (Ledger, UnboundedReceiver<Event>) {
    let (send, receive) = unbounded_channel();
    (Ledger::new(send), receive)
}

/// Topics of what was emitted, with the exec if it has one and the status of exits.
fn emitted(events: &mut UnboundedReceiver<Event>) -> Vec<String> {
    let mut seen = Vec::new();
    while let Ok(event) = events.try_recv() {
        let topic = event.topic().trim_start_matches("/tasks/");
        seen.push(match &event {
            Event::Exit(exit) => format!("{topic} {} {}", exit.id, exit.exit_status),
            Event::ExecAdded(exec) => format!("{topic} {}", exec.exec_id),
            Event::ExecStarted(exec) => format!("{topic} {}", exec.exec_id),
            _ => topic.to_owned(),
        });
    }
    seen
}

fn create(ledger: &Ledger) {
    ledger.reserve("c").unwrap();
    ledger.made("c", Made { pid: 7, bundle: "/b".into(), ..Made::default() }).unwrap();
}

fn run(ledger: &Ledger, exec: &str) {
    ledger.starting("c", exec).unwrap();
    ledger.started("c", exec, 9).unwrap();
}

fn exit(status: u32) -> Exit {
    Exit { status, at: 1 }
}

fn code<T: std::fmt::Debug>(result: Result<T>) -> Code {
    result.unwrap_err().code
}

#[test]
fn a_life() {
    let (ledger, mut events) = ledger();
    create(&ledger);
    run(&ledger, "");
    let waiter = ledger.waiter("c", "").unwrap();
    ledger.exited("c", "", exit(3));
    ledger.exited("c", "", exit(4));
    assert_eq!(*waiter.borrow(), Some(exit(3)));
    ledger.deleting("c", "").unwrap();
    assert_eq!(ledger.deleted("c", "").unwrap(), (7, exit(3)));
    assert_eq!(emitted(&mut events), ["create", "start", "exit c 3", "delete"]);
    assert_eq!(code(ledger.deleted("c", "")), Code::NOT_FOUND);
    assert!(ledger.is_empty());
}

#[test]
fn exits_wait_for_starts() {
    let (ledger, mut events) = ledger();
    create(&ledger);
    ledger.starting("c", "").unwrap();
    ledger.exited("c", "", exit(1));
    assert_eq!(emitted(&mut events), ["create"]);
    assert_eq!(ledger.view("c", "").unwrap().exit, None);
    assert_eq!(ledger.started("c", "", 99).unwrap(), 7);
    assert_eq!(emitted(&mut events), ["start", "exit c 1"]);
}

#[test]
fn a_containers_own_exit_is_last() {
    let (ledger, mut events) = ledger();
    create(&ledger);
    run(&ledger, "");
    for exec in ["a", "b", "never"] {
        ledger.exec_added("c", exec, Io::default()).unwrap();
    }
    run(&ledger, "a");
    ledger.starting("c", "b").unwrap();
    emitted(&mut events);
    ledger.exited("c", "", exit(137));
    assert_eq!(ledger.overdue("c"), ["a", "b"]);
    ledger.exited("c", "a", exit(1));
    assert_eq!(emitted(&mut events), ["exit a 1"]);
    ledger.exited("c", "b", exit(2));
    assert!(emitted(&mut events).is_empty());
    ledger.started("c", "b", 5).unwrap();
    assert_eq!(emitted(&mut events), ["exec-started b", "exit b 2", "exit c 137"]);
    assert!(ledger.overdue("c").is_empty());
}

#[test]
fn a_start_that_fails_lets_the_container_exit() {
    let (ledger, mut events) = ledger();
    create(&ledger);
    run(&ledger, "");
    ledger.exec_added("c", "a", Io::default()).unwrap();
    ledger.starting("c", "a").unwrap();
    ledger.exited("c", "", exit(0));
    emitted(&mut events);
    ledger.not_started("c", "a");
    assert_eq!(emitted(&mut events), ["exit c 0"]);
    assert_eq!(code(ledger.starting("c", "a")), Code::FAILED_PRECONDITION);
}

#[test]
fn pausing() {
    let (ledger, mut events) = ledger();
    create(&ledger);
    assert_eq!(code(ledger.may_pause("c", true)), Code::FAILED_PRECONDITION);
    run(&ledger, "");
    ledger.may_pause("c", true).unwrap();
    ledger.paused("c", true).unwrap();
    assert_eq!(code(ledger.may_pause("c", true)), Code::FAILED_PRECONDITION);
    assert_eq!(code(ledger.deleting("c", "")), Code::FAILED_PRECONDITION);
    ledger.paused("c", false).unwrap();
    ledger.paused("c", true).unwrap();
    ledger.exited("c", "", exit(137));
    assert_eq!(emitted(&mut events), ["create", "start", "paused", "resumed", "paused", "exit c 137"]);
}

#[test]
fn refusals_have_the_codes_that_clients_match_on() {
    let (ledger, _events) = ledger();
    assert_eq!(code(ledger.starting("c", "")), Code::NOT_FOUND);
    ledger.reserve("c").unwrap();
    assert_eq!(code(ledger.reserve("c")), Code::ALREADY_EXISTS);
    assert_eq!(code(ledger.starting("c", "")), Code::FAILED_PRECONDITION);
    assert_eq!(code(ledger.exec_added("c", "e", Io::default())), Code::FAILED_PRECONDITION);
    ledger.forget("c");
    create(&ledger);
    assert_eq!(code(ledger.starting("c", "e")), Code::NOT_FOUND);
    ledger.exec_added("c", "e", Io::default()).unwrap();
    assert_eq!(code(ledger.exec_added("c", "e", Io::default())), Code::ALREADY_EXISTS);
    assert_eq!(code(ledger.starting("c", "e")), Code::FAILED_PRECONDITION);
    run(&ledger, "");
    assert_eq!(code(ledger.starting("c", "")), Code::FAILED_PRECONDITION);
    assert_eq!(code(ledger.deleting("c", "")), Code::FAILED_PRECONDITION);
    run(&ledger, "e");
    assert_eq!(code(ledger.deleting("c", "e")), Code::FAILED_PRECONDITION);
    ledger.exited("c", "e", exit(0));
    ledger.deleting("c", "e").unwrap();
    assert_eq!(code(ledger.deleting("c", "e")), Code::NOT_FOUND);
    ledger.deleted("c", "e").unwrap();
    assert_eq!(code(ledger.view("c", "e")), Code::NOT_FOUND);
}

#[test]
fn waiters_of_what_never_ran_learn_of_its_end() {
    let (ledger, mut events) = ledger();
    create(&ledger);
    let waiter = ledger.waiter("c", "").unwrap();
    ledger.deleting("c", "").unwrap();
    ledger.deleted("c", "").unwrap();
    assert_eq!(*waiter.borrow(), Some(Exit::default()));
    assert_eq!(emitted(&mut events), ["create", "delete"]);
}

#[test]
fn a_machine_that_is_gone_ends_all_of_its_processes() {
    let (ledger, mut events) = ledger();
    create(&ledger);
    run(&ledger, "");
    ledger.exec_added("c", "a", Io::default()).unwrap();
    ledger.exec_added("c", "never", Io::default()).unwrap();
    run(&ledger, "a");
    emitted(&mut events);
    for (id, exec) in ledger.live() {
        ledger.exited(&id, &exec, exit(137));
    }
    assert_eq!(emitted(&mut events), ["exit a 137", "exit c 137"]);
}
