//! Which device nodes a container may use: in cgroup v2 a program that the kernel runs when one is opened or made.
//!
//! The last rule that is about a device decides; without one nothing is allowed. What every container has is
//! allowed after all that the spec says, as runc does it. The program is straight: for each rule, the last first, a
//! few comparisons that end in a verdict or go on to the next.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bpf::code::{AND_NUMBER, EXIT, JUMP_IF, JUMP_UNLESS, LOAD_WORD, MOVE, MOVE_NUMBER, SHIFT_RIGHT};
use bpf::{Instruction, Kind, Program, instruction};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// What the program is asked with, as the kernel numbers it: of devices, and of what is done to them.
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;
const MAKE: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MAKE | READ | WRITE;

/// So many that the kernel takes the program; a container has a few dozen.
const MOST: usize = 512;

/// A rule. What is not said fits all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    /// For a disk of the machine.
    pub fn disk(major: i64, minor: i64, access: &str) -> Result<Self> {
        let number = |number: i64| u32::try_from(number).map(Some).context("the number of a disk");
        Ok(Self {
            allow: true,
            kind: Some(BLOCK),
            major: number(major)?,
            minor: number(minor)?,
            access: letters(access),
        })
    }

    fn of(rule: &LinuxDeviceCgroup) -> Self {
        let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
        Self {
            allow: rule.allow(),
            kind: match rule.typ() {
                Some(LinuxDeviceType::B) => Some(BLOCK),
                Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
                _ => None,
            },
            major: number(rule.major()),
            minor: number(rule.minor()),
            access: rule.access().as_deref().map_or(ALL, letters),
        }
    }
}

fn letters(access: &str) -> u32 {
    access.chars().fold(0, |all, letter| match letter {
        'm' => all | MAKE,
        'r' => all | READ,
        'w' => all | WRITE,
        _ => all,
    })
}

/// The whole list for a container: what the spec says, disks, and what every container has.
pub fn rules(spec: &[LinuxDeviceCgroup], disks: &[Rule]) -> Vec<Rule> {
    let any = |kind| Rule { allow: true, kind: Some(kind), major: None, minor: None, access: MAKE };
    let own =
        |major, minor| Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: ALL };
    let mut rules: Vec<_> = spec.iter().map(Rule::of).collect();
    rules.extend(disks);
    rules.extend([any(CHARACTER), any(BLOCK)]);
    rules.extend([3, 5, 7, 8, 9].map(|minor| own(1, Some(minor))));
    rules.extend([0, 1, 2].map(|minor| own(5, Some(minor))));
    rules.push(own(136, None));
    rules
}

/// Lays the rules on a cgroup, in the place of those of `before`.
pub fn lay(rules: &[Rule], cgroup: &Path, before: Option<&Program>) -> Result<Program> {
    ensure!(rules.len() <= MOST, "{} rules about devices are more than {MOST}", rules.len());
    let program =
        Program::load(Kind::Device, &compile(rules)).context("loading the program that guards devices")?;
    let cgroup = File::open(cgroup).context("opening the cgroup")?;
    program.attach(cgroup, before).context("laying it on the cgroup")?;
    Ok(program)
}

/// Registers: the verdict, the question, its parts, and room.
const VERDICT: u8 = 0;
const QUESTION: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const ROOM: u8 = 6;

fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, QUESTION, 0, 0),
        instruction(MOVE, ACCESS, KIND, 0, 0),
        instruction(AND_NUMBER, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, QUESTION, 4, 0),
        instruction(LOAD_WORD, MINOR, QUESTION, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(block(rule));
        let for_all =
            rule.kind.is_none() && rule.major.is_none() && rule.minor.is_none() && rule.access == ALL;
        // The kernel refuses instructions that nothing leads to.
        if for_all {
            return program;
        }
    }
    program.extend(verdict(false));
    program
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [instruction(MOVE_NUMBER, VERDICT, 0, 0, u32::from(allow)), instruction(EXIT, 0, 0, 0, 0)]
}

/// One rule: comparisons, each of which leads behind the verdict if the rule is not about the question.
fn block(rule: &Rule) -> Vec<Instruction> {
    let mut block = Vec::new();
    for (register, wanted) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(wanted) = wanted {
            block.push(instruction(JUMP_UNLESS, register, 0, 0, wanted));
        }
    }
    if rule.access != ALL {
        block.push(instruction(MOVE, ROOM, ACCESS, 0, 0));
        // Allowed is what asks for nothing else; forbidden, what asks for any of it.
        let (mask, jump) =
            if rule.allow { (ALL & !rule.access, JUMP_UNLESS) } else { (rule.access, JUMP_IF) };
        block.push(instruction(AND_NUMBER, ROOM, 0, 0, mask));
        block.push(instruction(jump, ROOM, 0, 0, 0));
    }
    block.extend(verdict(rule.allow));
    let length = block.len();
    for (index, instruction) in block.iter_mut().enumerate() {
        if matches!(instruction.code, JUMP_UNLESS | JUMP_IF) {
            // A block has a handful of instructions.
            instruction.offset = i16::try_from(length - index - 1).unwrap_or(i16::MAX);
        }
    }
    block
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// What the program says to a question. Of a program that goes on for ever or astray there is none.
    fn ask(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let question = [kind | access << 16, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let number = u64::from(immediate.cast_unsigned());
            at += 1;
            match code {
                LOAD_WORD => registers[to] = question[usize::try_from(offset).unwrap() / 4].into(),
                MOVE => registers[to] = registers[from],
                MOVE_NUMBER => registers[to] = number,
                AND_NUMBER => registers[to] &= number,
                SHIFT_RIGHT => registers[to] >>= number,
                JUMP_UNLESS if registers[to] == number => {}
                JUMP_IF if registers[to] != number => {}
                JUMP_UNLESS | JUMP_IF => at += usize::try_from(offset).unwrap(),
                EXIT => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn allowed(spec: &Value, (kind, access, major, minor): (u32, &str, u32, u32)) -> bool {
        let spec: Vec<LinuxDeviceCgroup> = serde_json::from_value(spec.clone()).unwrap();
        let disks = [Rule::disk(254, 16, "r").unwrap()];
        ask(&compile(&rules(&spec, &disks)), kind, letters(access), major, minor)
    }

    #[test]
    fn what_is_allowed() {
        let nothing = json!([{ "allow": false, "access": "rwm" }]);
        let all = json!([{ "allow": true, "access": "rwm" }]);
        let fuse = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" },
        ]);
        let no_writing = json!([
            { "allow": true, "access": "rwm" },
            { "allow": false, "type": "b", "major": 8, "minor": 0, "access": "w" },
        ]);
        for (spec, question, expected) in [
            (&nothing, (CHARACTER, "rw", 1, 3), true),
            (&nothing, (CHARACTER, "rw", 136, 77), true),
            (&nothing, (CHARACTER, "m", 10, 229), true),
            (&nothing, (CHARACTER, "rw", 10, 229), false),
            (&nothing, (CHARACTER, "rw", 1, 1), false),
            (&nothing, (BLOCK, "r", 254, 0), false),
            (&nothing, (BLOCK, "r", 254, 16), true),
            (&nothing, (BLOCK, "rw", 254, 16), false),
            (&nothing, (CHARACTER, "r", 254, 16), false),
            (&json!([]), (BLOCK, "r", 8, 0), false),
            (&all, (BLOCK, "rwm", 8, 0), true),
            (&fuse, (CHARACTER, "rw", 10, 229), true),
            (&fuse, (CHARACTER, "r", 10, 229), true),
            (&fuse, (CHARACTER, "rw", 10, 228), false),
            (&fuse, (BLOCK, "rw", 10, 229), false),
            (&no_writing, (BLOCK, "r", 8, 0), true),
            (&no_writing, (BLOCK, "rw", 8, 0), false),
            (&no_writing, (BLOCK, "rw", 8, 1), true),
        ] {
            assert_eq!(allowed(spec, question), expected, "{question:?} of {spec}");
        }
    }
}
