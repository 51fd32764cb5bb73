//! A system call filter as classic BPF (linux/filter.h, Documentation/userspace-api/seccomp_filter.rst).
//!
//! The program finds a call's number in a binary tree of ranges. That matters more than the time a call takes: when a filter
//! is installed, the kernel runs it once for every call there is (kernel/seccomp.c, `seccomp_cache_prepare`), and one that
//! compares number by number (libseccomp's, `seccompiler`'s) made half of what starting a process in the guest cost.

use std::collections::BTreeMap;

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_RET_KILL_PROCESS, sock_filter,
};

/// Longest program the kernel takes (linux/bpf_common.h, `BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;
/// Most conditions of a rule; with [`MAX_STEPS`] it keeps jumps within 255 instructions.
const MAX_CONDITIONS: usize = 32;
/// Most instructions of a condition.
const MAX_STEPS: usize = 6;
/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

/// What becomes of a call: a return value of a filter, `SECCOMP_RET_...` with its data.
pub(super) type Action = u32;

/// How an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    /// `==`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
    /// `argument & mask ==`
    MaskedEqual(u64),
}

/// A condition on one argument, unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    /// 0 to 5.
    pub index: u8,
    /// How.
    pub comparison: Comparison,
    /// With what.
    pub value: u64,
    /// Only the lower half is looked at: the kernel does not, where it takes an `int`.
    pub is_int: bool,
}

/// A way for a call to be decided: all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// None: it always holds.
    pub conditions: Vec<Condition>,
    /// What happens then.
    pub action: Action,
}

/// The rules of calls by number; the first that holds decides.
pub(super) type Rules = BTreeMap<u32, Vec<Rule>>;

/// Why there is no program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum FilterError {
    /// It is longer than the kernel takes.
    #[error("the filter has {0} instructions; valid: at most {MAX_INSTRUCTIONS}")]
    Long(usize),
    /// One rule has too many.
    #[error("a rule has {0} conditions; valid: at most {MAX_CONDITIONS}")]
    Conditions(usize),
}

/// Compiles; a call for which no rule holds is `otherwise`, a call of another architecture ends the process.
///
/// # Errors
/// [`FilterError`]
pub(super) fn compile(rules: &Rules, otherwise: Action) -> Result<Vec<sock_filter>, FilterError> {
    let most = rules.values().flatten().map(|rule| rule.conditions.len()).max();
    if let Some(n) = most.filter(|n| *n > MAX_CONDITIONS) {
        return Err(FilterError::Conditions(n));
    }
    let mut program = vec![
        load(ARCHITECTURE_OFFSET),
        jump(BPF_JEQ, ARCHITECTURE, 1, 0),
        give(SECCOMP_RET_KILL_PROCESS),
        load(NUMBER_OFFSET),
    ];
    program.extend(tree(&ranges(rules, otherwise)));
    if program.len() > MAX_INSTRUCTIONS {
        return Err(FilterError::Long(program.len()));
    }
    Ok(program)
}

/// Numbers that meet the same fate, from `first` up to the next range.
#[derive(Debug)]
struct Range<'r> {
    first: u32,
    /// With conditions, all of them.
    rules: &'r [Rule],
    /// When none of them holds.
    action: Action,
}

/// All numbers there are, in as few ranges as can be.
fn ranges(rules: &Rules, otherwise: Action) -> Vec<Range<'_>> {
    let mut all: Vec<Range<'_>> = Vec::new();
    let mut push = |first, rules, action| {
        let is_more_of_it =
            |last: &Range<'_>| last.rules.is_empty() && <[Rule]>::is_empty(rules) && last.action == action;
        if !all.last().is_some_and(is_more_of_it) {
            all.push(Range { first, rules, action });
        }
    };
    // The first number that is in no range yet.
    let mut open = Some(0);
    for (number, rules) in rules {
        if let Some(first) = open.filter(|first| first < number) {
            push(first, &[], otherwise);
        }
        match rules.iter().position(|rule| rule.conditions.is_empty()) {
            Some(certain) => push(*number, &rules[..certain], rules[certain].action),
            None => push(*number, rules.as_slice(), otherwise),
        }
        open = number.checked_add(1);
    }
    if let Some(first) = open {
        push(first, &[], otherwise);
    }
    all
}

/// Expects the call's number in the accumulator; ends the program.
fn tree(ranges: &[Range<'_>]) -> Vec<sock_filter> {
    match ranges {
        [] => Vec::new(),
        [range] => leaf(range),
        _ => {
            let (below, above) = ranges.split_at(ranges.len() / 2);
            let (first, below, above) = (above[0].first, tree(below), tree(above));
            // A conditional jump reaches 255 instructions, an unconditional one all.
            let mut program = match u8::try_from(below.len()) {
                Ok(distance) => vec![jump(BPF_JGE, first, distance, 0)],
                Err(_) => vec![jump(BPF_JGE, first, 0, 1), skip(below.len())],
            };
            program.extend(below);
            program.extend(above);
            program
        }
    }
}

fn leaf(range: &Range<'_>) -> Vec<sock_filter> {
    let mut program: Vec<_> = range.rules.iter().flat_map(rule).collect();
    program.push(give(range.action));
    program
}

/// Gives the rule's action when all its conditions hold, or goes on behind itself.
fn rule(rule: &Rule) -> Vec<sock_filter> {
    let blocks: Vec<_> = rule.conditions.iter().map(tests).collect();
    let end = blocks.iter().map(Vec::len).sum::<usize>() + 1;
    let mut program = Vec::with_capacity(end);
    for block in blocks {
        let met = program.len() + block.len();
        for step in block {
            let behind = program.len() + 1;
            let distance = |to| {
                let target = match to {
                    To::Next => behind,
                    To::Met => met,
                    To::Fail => end,
                };
                u8::try_from(target - behind).expect("MAX_CONDITIONS keeps a rule below 256 instructions")
            };
            program.push(match step {
                Step::Load(offset) => load(offset),
                Step::And(mask) => instruction(BPF_ALU | BPF_AND | BPF_K, mask, 0, 0),
                Step::Test { kind, value, yes, no } => jump(kind, value, distance(yes), distance(no)),
            });
        }
    }
    program.push(give(rule.action));
    program
}

/// Where a test leads.
#[derive(Debug, Clone, Copy)]
enum To {
    Next,
    /// The condition holds: behind its last step.
    Met,
    /// It does not: behind the rule.
    Fail,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Load(u32),
    And(u32),
    Test { kind: u32, value: u32, yes: To, no: To },
}

/// The steps of a condition, at most [`MAX_STEPS`]. A 64-bit argument lies low half first (x86-64).
fn tests(condition: &Condition) -> Vec<Step> {
    use Comparison::{Equal, Greater, GreaterOrEqual, Less, LessOrEqual, MaskedEqual, NotEqual};
    use To::{Fail, Met, Next};
    let offset = ARGUMENTS_OFFSET + 8 * u32::from(condition.index);
    let (low, high) = halves(condition.value);
    let test = |kind, value, yes, no| Step::Test { kind, value, yes, no };
    // What the upper half alone decides, then the lower.
    let (upper, lower) = match condition.comparison {
        Equal => (
            vec![test(BPF_JEQ, high, Next, Fail)],
            vec![test(BPF_JEQ, low, Met, Fail)],
        ),
        NotEqual => (
            vec![test(BPF_JEQ, high, Next, Met)],
            vec![test(BPF_JEQ, low, Fail, Met)],
        ),
        Greater => (
            vec![test(BPF_JGT, high, Met, Next), test(BPF_JEQ, high, Next, Fail)],
            vec![test(BPF_JGT, low, Met, Fail)],
        ),
        GreaterOrEqual => (
            vec![test(BPF_JGT, high, Met, Next), test(BPF_JEQ, high, Next, Fail)],
            vec![test(BPF_JGE, low, Met, Fail)],
        ),
        Less => (
            vec![test(BPF_JGT, high, Fail, Next), test(BPF_JEQ, high, Next, Met)],
            vec![test(BPF_JGE, low, Fail, Met)],
        ),
        LessOrEqual => (
            vec![test(BPF_JGT, high, Fail, Next), test(BPF_JEQ, high, Next, Met)],
            vec![test(BPF_JGT, low, Fail, Met)],
        ),
        MaskedEqual(mask) => {
            let (low_mask, high_mask) = halves(mask);
            (
                vec![Step::And(high_mask), test(BPF_JEQ, high, Next, Fail)],
                vec![Step::And(low_mask), test(BPF_JEQ, low, Met, Fail)],
            )
        }
    };
    let mut steps = Vec::with_capacity(MAX_STEPS);
    if !condition.is_int {
        steps.push(Step::Load(offset + 4));
        steps.extend(upper);
    }
    steps.push(Step::Load(offset));
    steps.extend(lower);
    steps
}

/// Low, high.
fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0)
}

fn jump(kind: u32, value: u32, yes: u8, no: u8) -> sock_filter {
    instruction(BPF_JMP | kind | BPF_K, value, yes, no)
}

fn skip(n_instructions: usize) -> sock_filter {
    // What does not fit is too long a program in any case.
    let distance = u32::try_from(n_instructions).unwrap_or(u32::MAX);
    instruction(BPF_JMP | BPF_JA, distance, 0, 0)
}

fn give(action: Action) -> sock_filter {
    instruction(BPF_RET | BPF_K, action, 0, 0)
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    let code = u16::try_from(code).expect("codes of classic BPF have 16 bits");
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALLOW: Action = libc::SECCOMP_RET_ALLOW;
    const REFUSE: Action = libc::SECCOMP_RET_ERRNO | 1;

    /// Runs a program as the kernel does (net/core/filter.c), for the instructions that are used here. Also how many there
    /// were.
    fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> (Action, usize) {
        let mut data = [number.to_le_bytes(), architecture.to_le_bytes()].concat();
        data.extend([0; 8]);
        data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
        let (mut at, mut accumulator, mut n) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            n += 1;
            let mut branch = |holds: bool| at += usize::from(if holds { jt } else { jf });
            match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    let word = data[k as usize..][..4].try_into().unwrap();
                    accumulator = u32::from_le_bytes(word);
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => branch(accumulator == k),
                code if code == BPF_JMP | BPF_JGT | BPF_K => branch(accumulator > k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => branch(accumulator >= k),
                code if code == BPF_JMP | BPF_JA => at += k as usize,
                code if code == BPF_RET | BPF_K => return (k, n),
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    /// What the rules say, read plainly.
    fn decide(rules: &Rules, otherwise: Action, number: u32, arguments: [u64; 6]) -> Action {
        let holds = |condition: &Condition| {
            let cut = |value: u64| {
                if condition.is_int {
                    value & 0xffff_ffff
                } else {
                    value
                }
            };
            let argument = cut(arguments[usize::from(condition.index)]);
            let value = cut(condition.value);
            match condition.comparison {
                Comparison::Equal => argument == value,
                Comparison::NotEqual => argument != value,
                Comparison::Less => argument < value,
                Comparison::LessOrEqual => argument <= value,
                Comparison::Greater => argument > value,
                Comparison::GreaterOrEqual => argument >= value,
                Comparison::MaskedEqual(mask) => argument & cut(mask) == value,
            }
        };
        let rules = rules.get(&number).map_or(&[][..], Vec::as_slice);
        let found = rules.iter().find(|rule| rule.conditions.iter().all(holds));
        found.map_or(otherwise, |rule| rule.action)
    }

    fn some_value() -> impl Strategy<Value = u64> {
        prop_oneof![
            0..4_u64,
            any::<u64>(),
            Just(1 << 32),
            Just((1 << 32) + 1),
            Just(u64::MAX)
        ]
    }

    fn some_condition() -> impl Strategy<Value = Condition> {
        let comparison = prop_oneof![
            Just(Comparison::Equal),
            Just(Comparison::NotEqual),
            Just(Comparison::Less),
            Just(Comparison::LessOrEqual),
            Just(Comparison::Greater),
            Just(Comparison::GreaterOrEqual),
            some_value().prop_map(Comparison::MaskedEqual),
        ];
        (0..6_u8, comparison, some_value(), any::<bool>()).prop_map(|(index, comparison, value, is_int)| {
            Condition {
                index,
                comparison,
                value,
                is_int,
            }
        })
    }

    fn some_rules() -> impl Strategy<Value = Rules> {
        let rule =
            (prop::collection::vec(some_condition(), 0..4), 0..5_u32).prop_map(|(conditions, data)| Rule {
                conditions,
                action: libc::SECCOMP_RET_ERRNO | data,
            });
        let number = prop_oneof![0..40_u32, any::<u32>(), Just(u32::MAX)];
        prop::collection::btree_map(number, prop::collection::vec(rule, 0..4), 0..40)
    }

    proptest! {
        #[test]
        fn programs_decide_as_the_rules_say(
            rules in some_rules(), number in 0..41_u32, arguments in prop::array::uniform6(some_value()),
        ) {
            let program = compile(&rules, REFUSE).unwrap();
            let known = rules.keys().flat_map(|number| [*number, number.wrapping_sub(1), number.wrapping_add(1)]);
            for number in known.chain([number, 0x4000_0000, u32::MAX]) {
                let (action, _) = run(&program, ARCHITECTURE, number, arguments);
                prop_assert_eq!(action, decide(&rules, REFUSE, number, arguments), "call {}", number);
            }
            prop_assert_eq!(run(&program, 0x4000_0003, number, arguments).0, SECCOMP_RET_KILL_PROCESS);
        }
    }

    fn always(action: Action) -> Vec<Rule> {
        vec![Rule {
            conditions: Vec::new(),
            action,
        }]
    }

    #[test]
    fn many_ranges_take_few_steps() {
        // Every second of a thousand calls: a thousand ranges, and jumps longer than 255.
        let rules: Rules = (0..1000)
            .step_by(2)
            .map(|number| (number, always(ALLOW)))
            .collect();
        let program = compile(&rules, REFUSE).unwrap();
        for number in 0..1000 {
            let (action, n) = run(&program, ARCHITECTURE, number, [0; 6]);
            assert_eq!(
                action,
                if number % 2 == 0 { ALLOW } else { REFUSE },
                "call {number}"
            );
            assert!(n < 32, "call {number} takes {n} instructions");
        }
    }

    #[test]
    fn neighbours_are_one_range() {
        let rules: Rules = (10..300).map(|number| (number, always(ALLOW))).collect();
        assert_eq!(ranges(&rules, REFUSE).len(), 3);
    }

    #[test]
    fn what_the_kernel_would_refuse_is_an_error() {
        let rules: Rules = (0..9000)
            .step_by(2)
            .map(|number| (number, always(ALLOW)))
            .collect();
        assert!(matches!(compile(&rules, REFUSE), Err(FilterError::Long(_))));
        let condition = Condition {
            index: 0,
            comparison: Comparison::Greater,
            value: 1,
            is_int: false,
        };
        let with = |n| {
            let conditions = vec![condition; n];
            compile(
                &Rules::from([(
                    1,
                    vec![Rule {
                        conditions,
                        action: ALLOW,
                    }],
                )]),
                REFUSE,
            )
        };
        assert!(with(MAX_CONDITIONS).is_ok());
        assert!(matches!(
            with(MAX_CONDITIONS + 1),
            Err(FilterError::Conditions(33))
        ));
    }
}
