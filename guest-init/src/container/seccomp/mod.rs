//! System call filters: from the specification, or the guest's own default, to BPF.
//!
//! A BPF filter made by `seccompiler` knows two actions; an OCI filter any number. So one filter is made per action
//! and all are installed; the kernel runs them all and takes the most restrictive answer (seccomp(2)). The filter of
//! the default action lets every call pass that some rule names, and each other filter lets pass what it does not name.

pub mod default;
mod syscalls;

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::{
    container::spec,
    error::{Error, Result},
};

/// Rules of one filter by system call number. No rules for a call: it matches whatever its arguments.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Compiles `seccomp` to the programs to install, in this order.
///
/// # Errors
/// `InvalidArgument` names the field.
pub fn compile(seccomp: &spec::Seccomp) -> Result<Vec<BpfProgram>> {
    let default_action = action(
        "linux.seccomp.defaultAction",
        &seccomp.default_action,
        seccomp.default_errno_ret,
    )?;
    let mut allowed = Rules::new();
    let mut others: Vec<(SeccompAction, Rules)> = Vec::new();
    for (index, rule) in seccomp.syscalls.iter().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        let rule_action = action(&field, &rule.action, rule.errno_ret)?;
        if rule_action == default_action {
            continue;
        }
        let conditions = conditions(&field, &rule.args)?;
        let position = others.iter().position(|(known, _)| *known == rule_action);
        for number in rule.names.iter().filter_map(|name| syscalls::number(name)) {
            insert(&mut allowed, number, conditions.as_ref());
            if rule_action != SeccompAction::Allow {
                let position = position.unwrap_or_else(|| {
                    if others.last().is_none_or(|(known, _)| *known != rule_action) {
                        others.push((rule_action.clone(), Rules::new()));
                    }
                    others.len() - 1
                });
                insert(&mut others[position].1, number, conditions.as_ref());
            }
        }
    }
    let mut programs = Vec::new();
    for (rule_action, rules) in others {
        programs.push(program(rules, SeccompAction::Allow, rule_action)?);
    }
    if default_action != SeccompAction::Allow {
        programs.push(program(allowed, default_action, SeccompAction::Allow)?);
    }
    Ok(programs)
}

/// Adds a way for `number` to match: always, or under `rule`.
fn insert(rules: &mut Rules, number: i64, rule: Option<&SeccompRule>) {
    match rule {
        None => {
            rules.insert(number, Vec::new());
        }
        Some(rule) => match rules.get_mut(&number) {
            // An entry without rules matches always already.
            Some(known) if known.is_empty() => {}
            Some(known) => known.push(rule.clone()),
            None => {
                rules.insert(number, vec![rule.clone()]);
            }
        },
    }
}

fn program(rules: Rules, mismatch: SeccompAction, matched: SeccompAction) -> Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64)
        .map_err(|error| Error::invalid(format!("linux.seccomp: {error}")))?;
    filter
        .try_into()
        .map_err(|error: seccompiler::BackendError| Error::invalid(format!("linux.seccomp: {error}")))
}

fn action(field: &str, name: &str, errno: Option<u32>) -> Result<SeccompAction> {
    Ok(match name {
        "SCMP_ACT_ALLOW" => SeccompAction::Allow,
        "SCMP_ACT_ERRNO" => SeccompAction::Errno(errno.unwrap_or(libc::EPERM.cast_unsigned())),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => SeccompAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => SeccompAction::KillProcess,
        "SCMP_ACT_TRAP" => SeccompAction::Trap,
        "SCMP_ACT_TRACE" => SeccompAction::Trace(errno.unwrap_or(0)),
        "SCMP_ACT_LOG" => SeccompAction::Log,
        _ => {
            return Err(Error::invalid(format!(
                "{field}: action {name:?} is not known: give SCMP_ACT_ALLOW, _ERRNO, _KILL, _KILL_PROCESS, _TRAP, _TRACE or _LOG"
            )));
        }
    })
}

/// All of `args` as one rule; `None` when there are none.
fn conditions(field: &str, args: &[spec::SeccompArg]) -> Result<Option<SeccompRule>> {
    if args.is_empty() {
        return Ok(None);
    }
    let conditions = args
        .iter()
        .map(|arg| {
            let (op, value) = match arg.op.as_str() {
                "SCMP_CMP_NE" => (SeccompCmpOp::Ne, arg.value),
                "SCMP_CMP_LT" => (SeccompCmpOp::Lt, arg.value),
                "SCMP_CMP_LE" => (SeccompCmpOp::Le, arg.value),
                "SCMP_CMP_EQ" => (SeccompCmpOp::Eq, arg.value),
                "SCMP_CMP_GE" => (SeccompCmpOp::Ge, arg.value),
                "SCMP_CMP_GT" => (SeccompCmpOp::Gt, arg.value),
                "SCMP_CMP_MASKED_EQ" => (SeccompCmpOp::MaskedEq(arg.value), arg.value_two),
                other => {
                    return Err(Error::invalid(format!(
                        "{field}.args: operator {other:?} is not known"
                    )));
                }
            };
            let length = if arg.is_int {
                SeccompCmpArgLen::Dword
            } else {
                SeccompCmpArgLen::Qword
            };
            SeccompCondition::new(arg.index, length, op, value)
                .map_err(|error| Error::invalid(format!("{field}.args: {error}")))
        })
        .collect::<Result<Vec<_>>>()?;
    SeccompRule::new(conditions)
        .map(Some)
        .map_err(|error| Error::invalid(format!("{field}.args: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(names: &[&str], action: &str, errno_ret: Option<u32>) -> spec::SeccompRule {
        spec::SeccompRule {
            names: names.iter().map(ToString::to_string).collect(),
            action: action.into(),
            errno_ret,
            args: Vec::new(),
        }
    }

    #[test]
    fn one_program_per_action_that_is_not_allow() {
        let seccomp = spec::Seccomp {
            default_action: "SCMP_ACT_ERRNO".into(),
            default_errno_ret: None,
            syscalls: vec![
                rule(&["read", "write", "no_such_call"], "SCMP_ACT_ALLOW", None),
                rule(&["clone3"], "SCMP_ACT_ERRNO", Some(38)),
                rule(&["reboot"], "SCMP_ACT_KILL_PROCESS", None),
                rule(&["mount"], "SCMP_ACT_ERRNO", Some(38)),
            ],
        };
        assert_eq!(compile(&seccomp).unwrap().len(), 3);
        let open = spec::Seccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            ..Default::default()
        };
        assert!(compile(&open).unwrap().is_empty());
    }

    #[test]
    fn bad_fields_are_named() {
        let seccomp = spec::Seccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            default_errno_ret: None,
            syscalls: vec![rule(&["read"], "SCMP_ACT_SING", None)],
        };
        let message = compile(&seccomp).unwrap_err().to_string();
        assert!(
            message.starts_with("linux.seccomp.syscalls[0]: action \"SCMP_ACT_SING\""),
            "{message}"
        );
    }
}
