//! What programs are made of.

use std::os::fd::{AsFd, AsRawFd};

/// An instruction, as the kernel has it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u8,
    /// The one that it is done to, and above it the other one.
    pub registers: u8,
    /// How far, from a register's address or from the next instruction.
    pub offset: i16,
    /// A number.
    pub immediate: i32,
}

/// What instructions do. The kernel's function that is called has its arguments in registers from 1 on and answers in 0.
pub mod code {
    /// `to = *(u32 *)(from + offset)`
    pub const LOAD_WORD: u8 = 0x61;
    /// `to = *(u16 *)(from + offset)`
    pub const LOAD_HALF: u8 = 0x69;
    /// `to = *(u8 *)(from + offset)`
    pub const LOAD_BYTE: u8 = 0x71;
    /// `*(u32 *)(to + offset) = from`
    pub const STORE_WORD: u8 = 0x63;
    /// `to = from`
    pub const MOVE: u8 = 0xbf;
    /// `to = immediate`
    pub const MOVE_NUMBER: u8 = 0xb7;
    /// `to += immediate`
    pub const ADD_NUMBER: u8 = 0x07;
    /// `to &= immediate`
    pub const AND_NUMBER: u8 = 0x57;
    /// `to >>= immediate`
    pub const SHIFT_RIGHT: u8 = 0x77;
    /// Goes on `offset` further.
    pub const JUMP: u8 = 0x05;
    /// Goes on `offset` further if `to` is not `immediate`.
    pub const JUMP_UNLESS: u8 = 0x55;
    /// The same of the lower 32 bits.
    pub const JUMP_UNLESS_WORD: u8 = 0x56;
    /// Goes on `offset` further if `to` is `immediate`.
    pub const JUMP_IF: u8 = 0x15;
    /// The same of the lower 32 bits.
    pub const JUMP_IF_WORD: u8 = 0x16;
    /// Calls the function with the number `immediate`.
    pub const CALL: u8 = 0x85;
    /// Ends with what is in register 0.
    pub const EXIT: u8 = 0x95;
}

/// One instruction.
pub const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction { code, registers: to | from << 4, offset, immediate: immediate.cast_signed() }
}

/// `to` becomes the address of a map.
pub fn map_address(to: u8, map: &impl AsFd) -> [Instruction; 2] {
    const LOAD_DOUBLE: u8 = 0x18;
    const OF_DESCRIPTOR: u8 = 1;
    let fd = map.as_fd().as_raw_fd().cast_unsigned();
    [instruction(LOAD_DOUBLE, to, OF_DESCRIPTOR, 0, fd), instruction(0, 0, 0, 0, 0)]
}
