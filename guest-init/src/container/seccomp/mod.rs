//! System call filters: from the specification, or the guest's own default, to BPF.
//!
//! One program decides about all calls. Where several rules of a call hold, the most restrictive action counts, as if each
//! were a filter of its own (seccomp(2)).

mod bpf;
mod default;
mod syscalls;

use libc::sock_filter;
use rustix::thread::CapabilitySet;

use self::bpf::{Action, Comparison, Condition, Rule, Rules};
use crate::{
    container::spec,
    error::{Error, Result},
};

/// Compiles `seccomp`; `None` when it lets everything pass.
///
/// # Errors
/// `InvalidArgument` names the field.
pub fn compile(seccomp: &spec::Seccomp) -> Result<Option<Vec<sock_filter>>> {
    let default_action = action(
        "linux.seccomp.defaultAction",
        &seccomp.default_action,
        seccomp.default_errno_ret,
    )?;
    let mut rules = Rules::new();
    for (index, rule) in seccomp.syscalls.iter().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        let action = action(&field, &rule.action, rule.errno_ret)?;
        if action == default_action {
            continue;
        }
        let conditions = conditions(&field, &rule.args)?;
        for number in rule.names.iter().filter_map(|name| syscalls::number(name)) {
            rules.entry(number).or_default().push(Rule {
                conditions: conditions.clone(),
                action,
            });
        }
    }
    if rules.is_empty() && default_action == libc::SECCOMP_RET_ALLOW {
        return Ok(None);
    }
    for rules in rules.values_mut() {
        // The kernel's order of precedence (kernel/seccomp.c, `seccomp_run_filters`): actions as signed numbers.
        rules.sort_by_key(|rule| (rule.action & libc::SECCOMP_RET_ACTION_FULL).cast_signed());
    }
    bpf::compile(&rules, default_action)
        .map(Some)
        .map_err(|error| Error::invalid(format!("linux.seccomp: {error}")))
}

/// The guest's own filter, for a process with the bounding set `bounding`.
///
/// # Errors
/// None that is known of.
pub fn compile_default(bounding: CapabilitySet) -> Result<Vec<sock_filter>> {
    bpf::compile(&default::rules(bounding), default::OTHERWISE)
        .map_err(|error| Error::invalid(format!("the default filter: {error}")))
}

fn action(field: &str, name: &str, errno: Option<u32>) -> Result<Action> {
    let data = |default: i32| errno.unwrap_or(default.cast_unsigned()) & libc::SECCOMP_RET_DATA;
    Ok(match name {
        "SCMP_ACT_ALLOW" => libc::SECCOMP_RET_ALLOW,
        "SCMP_ACT_ERRNO" => libc::SECCOMP_RET_ERRNO | data(libc::EPERM),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => libc::SECCOMP_RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => libc::SECCOMP_RET_KILL_PROCESS,
        "SCMP_ACT_TRAP" => libc::SECCOMP_RET_TRAP,
        "SCMP_ACT_TRACE" => libc::SECCOMP_RET_TRACE | data(0),
        "SCMP_ACT_LOG" => libc::SECCOMP_RET_LOG,
        _ => {
            return Err(Error::invalid(format!(
                "{field}: action {name:?} is not known: give SCMP_ACT_ALLOW, _ERRNO, _KILL, _KILL_PROCESS, _TRAP, _TRACE or _LOG"
            )));
        }
    })
}

fn conditions(field: &str, args: &[spec::SeccompArg]) -> Result<Vec<Condition>> {
    args.iter()
        .map(|arg| {
            let (comparison, value) = match arg.op.as_str() {
                "SCMP_CMP_NE" => (Comparison::NotEqual, arg.value),
                "SCMP_CMP_LT" => (Comparison::Less, arg.value),
                "SCMP_CMP_LE" => (Comparison::LessOrEqual, arg.value),
                "SCMP_CMP_EQ" => (Comparison::Equal, arg.value),
                "SCMP_CMP_GE" => (Comparison::GreaterOrEqual, arg.value),
                "SCMP_CMP_GT" => (Comparison::Greater, arg.value),
                "SCMP_CMP_MASKED_EQ" => (Comparison::MaskedEqual(arg.value), arg.value_two),
                other => {
                    return Err(Error::invalid(format!(
                        "{field}.args: operator {other:?} is not known"
                    )));
                }
            };
            if arg.index > 5 {
                return Err(Error::invalid(format!(
                    "{field}.args: index {}: a call has arguments 0 to 5",
                    arg.index
                )));
            }
            Ok(Condition {
                index: arg.index,
                comparison,
                value,
                is_int: arg.is_int,
            })
        })
        .collect()
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
    fn a_filter_that_allows_all_is_none() {
        let open = spec::Seccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            ..Default::default()
        };
        assert!(compile(&open).unwrap().is_none());
    }

    #[test]
    fn the_most_restrictive_of_several_rules_counts() {
        let program = |actions: &[&str]| {
            let seccomp = spec::Seccomp {
                default_action: "SCMP_ACT_ERRNO".into(),
                default_errno_ret: None,
                syscalls: actions
                    .iter()
                    .map(|action| rule(&["reboot"], action, None))
                    .collect(),
            };
            compile(&seccomp).unwrap().unwrap()
        };
        let kill = program(&["SCMP_ACT_KILL_PROCESS"]);
        assert_eq!(
            program(&["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_KILL_PROCESS"]).len(),
            kill.len()
        );
        assert_eq!(
            program(&["SCMP_ACT_ALLOW", "SCMP_ACT_KILL_PROCESS"])
                .iter()
                .map(|i| i.k)
                .collect::<Vec<_>>(),
            kill.iter().map(|i| i.k).collect::<Vec<_>>()
        );
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
