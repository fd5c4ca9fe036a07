//! From the table to the program that the kernel runs before each call.
//!
//! ```text
//!            nr >= middle? -- yes --> ...              a leaf:  nr == call? -- no --> trap
//!           /                                                    |
//!         no --> nr >= middle of the lower half? ...             arguments --> allow, or trap
//! ```
//!
//! When a filter is put up, the kernel walks it for each call that there is, to know those that it need not be asked for again
//! (`seccomp_cache_prepare` in its `kernel/seccomp.c`); the guest's first instruction waits for that. With a search
//! tree a walk is a dozen steps, where a list of rules has hundreds.

use std::collections::BTreeMap;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_RET_ALLOW, SECCOMP_RET_TRAP,
};
use seccompiler::{BpfProgram, sock_filter};

use super::Role;
use super::table::{self, Limit};

// `struct seccomp_data` (linux/seccomp.h): number, architecture, address of the call, six arguments of 64 bits.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;
/// `AUDIT_ARCH_X86_64` (linux/audit.h). Calls of 32-bit programs have numbers of their own, and none is allowed.
const X86_64: u32 = 0xc000_003e;

/// The program of `role` in the process `own`.
pub(super) fn compile(role: Role, own: u32) -> BpfProgram {
    let calls: BTreeMap<u32, Limit> = table::rules(role)
        .map(|rule| (rule.call.id() as u32, rule.limit))
        .collect();
    let calls: Vec<_> = calls.into_iter().collect();
    let mut program = vec![
        load(ARCHITECTURE_AT),
        jump(BPF_JEQ, X86_64, 1, 0),
        trap(),
        load(NUMBER_AT),
    ];
    program.extend(tree(&calls, own));
    program
}

fn tree(calls: &[(u32, Limit)], own: u32) -> BpfProgram {
    match calls {
        [] => vec![trap()],
        [(number, limit)] => {
            let mut leaf = vec![jump(BPF_JEQ, *number, 1, 0), trap()];
            leaf.extend(arguments(*limit, own));
            leaf
        }
        _ => {
            let (low, high) = calls.split_at(calls.len() / 2);
            let (low, high) = (tree(low, own), tree(high, own));
            let middle = calls[calls.len() / 2].0;
            // A conditional jump reaches 255 instructions far, this one any number.
            let over = statement(BPF_JMP | BPF_JA, low.len() as u32);
            [vec![jump(BPF_JGE, middle, 0, 1), over], low, high].concat()
        }
    }
}

/// Ends in a return whatever the arguments are.
fn arguments(limit: Limit, own: u32) -> BpfProgram {
    // Little-endian: the lower half of an argument comes first.
    let argument = |index: u8| load(ARGUMENTS_AT + 8 * u32::from(index));
    let one_of = |mut program: BpfProgram, values: &[u32]| {
        for (at, value) in values.iter().enumerate() {
            // Over the values that are left and the trap; the table's lists are short.
            program.push(jump(BPF_JEQ, *value, (values.len() - at) as u8, 0));
        }
        program.extend([trap(), allow()]);
        program
    };
    let numbers =
        |values: &[table::Value]| values.iter().map(|value| value.number as u32).collect::<Vec<_>>();
    match limit {
        Limit::Free => vec![allow()],
        Limit::OneOf(index, values) => one_of(vec![argument(index)], &numbers(values)),
        Limit::OneOfBeside(index, beside, values) => {
            let rest = statement(BPF_ALU | BPF_AND | BPF_K, !(beside.number as u32));
            one_of(vec![argument(index), rest], &numbers(values))
        }
        Limit::Without(index, bits) => {
            vec![
                argument(index),
                jump(BPF_JSET, bits.number as u32, 1, 0),
                allow(),
                trap(),
            ]
        }
        Limit::OwnProcess(index) => one_of(vec![argument(index)], &[own]),
    }
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    }
}

fn jump(condition: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter {
        jt,
        jf,
        ..statement(BPF_JMP | condition | BPF_K, k)
    }
}

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn allow() -> sock_filter {
    statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
}

fn trap() -> sock_filter {
    statement(BPF_RET | BPF_K, SECCOMP_RET_TRAP)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest way through, ending at the first look at an argument: what the kernel walks for each call.
    fn walk(program: &[sock_filter], at: usize) -> usize {
        let here = program[at].clone();
        let next = |skip: u32| walk(program, at + 1 + skip as usize);
        match u32::from(here.code) & 7 {
            BPF_RET => 1,
            BPF_LD if here.k >= ARGUMENTS_AT => 1,
            BPF_JMP if u32::from(here.code) & 0xf0 == BPF_JA => 1 + next(here.k),
            BPF_JMP => 1 + next(here.jt.into()).max(next(here.jf.into())),
            _ => 1 + next(0),
        }
    }

    #[test]
    fn a_walk_is_short() {
        for role in Role::ALL {
            let program = compile(role, 1);
            let calls = table::rules(role).count();
            let depth = calls.next_power_of_two().ilog2() as usize;
            let longest = walk(&program, 0);
            // Prologue; two instructions a level; the leaf.
            assert!(
                longest <= 3 + 2 * depth + 3,
                "{role:?}: {longest} steps for {calls} calls"
            );
        }
    }
}
