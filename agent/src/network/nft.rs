//! The words of nftables' JSON (libnftables-json(5)), and how it is given to `nft`. It passes through the types of the
//! `nftables` crate, so that a mistake of ours is found before the kernel sees it.

use nftables::{
    helper::{self, NftablesError},
    schema::Nftables,
};
use serde_json::{Value, json};

use super::together::Together;
use crate::error::{Error, ErrorKind, Result};

/// The name of our tables.
pub(super) const TABLE: &str = "eci";

/// The kernel has one ruleset, and takes one change at a time.
static CHANGES: Together<Value, NftablesError> = Together::new();

/// Performs all commands or none.
pub(super) async fn apply(commands: Vec<Value>, what: &str) -> Result<()> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
        Error::with_source(ErrorKind::Internal, what.to_owned(), source)
    };
    // Looked at before it is among others'.
    ruleset(&commands).map_err(|error| failed(Box::new(error)))?;
    let run = |commands: Vec<Value>| async move {
        let ruleset = ruleset(&commands).map_err(NftablesError::NftInvalidJson)?;
        helper::apply_ruleset_async(&ruleset).await
    };
    CHANGES
        .carry_out(commands, run)
        .await
        .map_err(|error| match error {
            Some(NftablesError::NftFailed { stderr, .. }) => failed(stderr.trim().to_owned().into()),
            Some(error) => failed(Box::new(error)),
            None => failed("broken off".into()),
        })
}

fn ruleset(commands: &[Value]) -> serde_json::Result<Nftables<'static>> {
    serde_json::from_value(json!({"nftables": commands}))
}

/// Add, delete, add: a table of that name exists and is empty afterwards, whatever there was.
pub(super) fn fresh_table(family: &str) -> Vec<Value> {
    let table = json!({"table": {"family": family, "name": TABLE}});
    vec![
        json!({"add": table}),
        json!({"delete": table}),
        json!({"add": table}),
    ]
}

/// A set of elements of a type.
pub(super) fn set(family: &str, name: &str, kind: &Value) -> Value {
    json!({"add": {"set": {"family": family, "table": TABLE, "name": name, "type": kind}}})
}

/// Elements that are there afterwards.
pub(super) fn add(elements: impl IntoIterator<Item = Value>) -> Vec<Value> {
    let elements = elements.into_iter();
    elements
        .map(|element| json!({"add": {"element": element}}))
        .collect()
}

/// Elements that are not there afterwards: deleting needs an element to be there, adding one that is there changes nothing.
pub(super) fn remove(elements: impl IntoIterator<Item = Value>) -> Vec<Value> {
    let both = |element: Value| {
        [
            json!({"add": {"element": element}}),
            json!({"delete": {"element": element}}),
        ]
    };
    elements.into_iter().flat_map(both).collect()
}

/// A chain at a hook, which accepts what no rule drops.
pub(super) fn chain(family: &str, name: &str, kind: &str, hook: &str, priority: i32) -> Value {
    json!({"add": {"chain": {
        "family": family, "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
    }}})
}

/// A chain that others lead to.
pub(super) fn plain_chain(family: &str, name: &str) -> Value {
    json!({"add": {"chain": {"family": family, "table": TABLE, "name": name}}})
}

/// A rule at the end of a chain.
pub(super) fn rule(family: &str, chain: &str, expressions: &[Value]) -> Value {
    json!({"add": {"rule": {"family": family, "table": TABLE, "chain": chain, "expr": expressions}}})
}

/// A comparison.
pub(super) fn compare(operator: &str, left: &Value, right: &Value) -> Value {
    json!({"match": {"op": operator, "left": left, "right": right}})
}

/// A field of a header.
pub(super) fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

/// What is known of a packet beside its content.
pub(super) fn meta(key: &str) -> Value {
    json!({"meta": {"key": key}})
}

/// Everything in a named set.
pub(super) fn in_set(name: &str) -> Value {
    json!(format!("@{name}"))
}

pub(super) fn accept() -> Value {
    json!({"accept": null})
}

pub(super) fn drop() -> Value {
    json!({"drop": null})
}

pub(super) fn jump(chain: &str) -> Value {
    json!({"jump": {"target": chain}})
}

pub(super) fn goto(chain: &str) -> Value {
    json!({"goto": {"target": chain}})
}

/// Commands as text, one a line, as `nft` gets them.
#[cfg(test)]
pub(super) fn text(commands: &[Value]) -> String {
    let ruleset = ruleset(commands).unwrap();
    let objects = ruleset.objects.iter();
    let lines = objects.map(|object| format!("{}\n", serde_json::to_string(object).unwrap()));
    lines.collect()
}
