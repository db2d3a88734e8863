//! Programs whose jumps go to places with names.

use std::io;

use crate::{Instruction, instruction};

/// A program while it is written.
#[derive(Debug)]
pub struct Assembly<P> {
    instructions: Vec<Instruction>,
    jumps: Vec<(usize, P)>,
    places: Vec<(P, usize)>,
}

impl<P> Default for Assembly<P> {
    fn default() -> Self {
        Self { instructions: Vec::new(), jumps: Vec::new(), places: Vec::new() }
    }
}

impl<P: Copy + PartialEq> Assembly<P> {
    /// What is next.
    pub fn then(&mut self, all: impl IntoIterator<Item = Instruction>) {
        self.instructions.extend(all);
    }

    /// A jump of the kind `code`, which compares `register` with `number`, to a place that is further on.
    pub fn jump(&mut self, code: u8, register: u8, number: u32, to: P) {
        self.jumps.push((self.instructions.len(), to));
        self.instructions.push(instruction(code, register, 0, 0, number));
    }

    /// What is next is that place.
    pub fn place(&mut self, name: P) {
        self.places.push((name, self.instructions.len()));
    }

    /// The program, unless a jump leads nowhere or too far.
    pub fn finish(mut self) -> io::Result<Vec<Instruction>> {
        for (at, to) in &self.jumps {
            let place = self.places.iter().find(|(name, index)| name == to && index > at);
            let far = place.and_then(|(_, index)| i16::try_from(index - at - 1).ok());
            self.instructions[*at].offset =
                far.ok_or_else(|| io::Error::other("a jump of a program leads nowhere, or too far"))?;
        }
        Ok(self.instructions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::{EXIT, JUMP, JUMP_IF};

    #[test]
    fn jumps_go_to_their_places() {
        let mut assembly = Assembly::default();
        assembly.jump(JUMP_IF, 1, 7, 'a');
        assembly.jump(JUMP, 0, 0, 'b');
        assembly.place('a');
        assembly.then([instruction(EXIT, 0, 0, 0, 0)]);
        // A name that is used again is the next place of that name.
        assembly.jump(JUMP, 0, 0, 'a');
        assembly.place('b');
        assembly.place('a');
        let offsets: Vec<_> = assembly.finish().unwrap().iter().map(|found| found.offset).collect();
        assert_eq!(offsets, [1, 2, 0, 0]);
    }

    #[test]
    fn jumps_that_lead_nowhere_are_told() {
        let mut back = Assembly::default();
        back.place('a');
        back.jump(JUMP, 0, 0, 'a');
        assert!(back.finish().is_err());
        let mut far = Assembly::default();
        far.jump(JUMP, 0, 0, 'a');
        far.then(vec![instruction(EXIT, 0, 0, 0, 0); 0x8000]);
        far.place('a');
        assert!(far.finish().is_err());
    }
}
