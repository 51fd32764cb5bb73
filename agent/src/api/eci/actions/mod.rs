//! The actions: one file each, one line each in the table.

mod clones;
mod create_container_group;
mod create_container_group_snapshot;
mod delete_container_group;
mod delete_container_group_snapshot;
mod describe_container_group_events;
mod describe_container_group_snapshots;
mod describe_container_group_status;
mod describe_container_groups;
mod describe_container_log;
mod describe_regions;
mod exec_container_command;
mod fork_container_group;
mod resize_container_group_volume;
mod restart_container_group;
mod restore_container_group;
mod selection;
mod update_container_group;

use futures_util::future::BoxFuture;

use super::{ActionResult, ApiError, Call, Fields};
use crate::group::status::{Group, GroupId};

/// What performs an action.
pub(super) type Action = for<'a> fn(&'a Call<'a>) -> BoxFuture<'a, ActionResult>;

const ACTIONS: &[(&str, Action)] = &[
    ("CreateContainerGroup", |call| {
        Box::pin(create_container_group::perform(call))
    }),
    ("CreateContainerGroupSnapshot", |call| {
        Box::pin(create_container_group_snapshot::perform(call))
    }),
    ("DeleteContainerGroup", |call| {
        Box::pin(delete_container_group::perform(call))
    }),
    ("DeleteContainerGroupSnapshot", |call| {
        Box::pin(delete_container_group_snapshot::perform(call))
    }),
    ("DescribeContainerGroupEvents", |call| {
        Box::pin(describe_container_group_events::perform(call))
    }),
    ("DescribeContainerGroupSnapshots", |call| {
        Box::pin(describe_container_group_snapshots::perform(call))
    }),
    ("DescribeContainerGroupStatus", |call| {
        Box::pin(describe_container_group_status::perform(call))
    }),
    ("DescribeContainerGroups", |call| {
        Box::pin(describe_container_groups::perform(call))
    }),
    ("DescribeContainerLog", |call| {
        Box::pin(describe_container_log::perform(call))
    }),
    ("DescribeRegions", |call| {
        Box::pin(describe_regions::perform(call))
    }),
    ("ExecContainerCommand", |call| {
        Box::pin(exec_container_command::perform(call))
    }),
    ("ForkContainerGroup", |call| {
        Box::pin(fork_container_group::perform(call))
    }),
    ("ResizeContainerGroupVolume", |call| {
        Box::pin(resize_container_group_volume::perform(call))
    }),
    ("RestartContainerGroup", |call| {
        Box::pin(restart_container_group::perform(call))
    }),
    ("RestoreContainerGroup", |call| {
        Box::pin(restore_container_group::perform(call))
    }),
    ("UpdateContainerGroup", |call| {
        Box::pin(update_container_group::perform(call))
    }),
];

/// The action of a name.
pub(super) fn find(name: &str) -> Option<Action> {
    let (_, action) = ACTIONS.iter().find(|(action, _)| *action == name)?;
    Some(*action)
}

/// Makes the fields of a reply from a JSON object.
fn fields(value: serde_json::Value) -> Fields {
    match value {
        serde_json::Value::Object(fields) => fields,
        _ => Fields::new(),
    }
}

impl Call<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        self.params.get(name)
    }

    fn required(&self, name: &str) -> Result<&str, ApiError> {
        self.text(name).ok_or_else(|| ApiError::missing(name))
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.text(name) {
            None | Some("None") => Ok(None),
            Some(text) if text.eq_ignore_ascii_case("true") => Ok(Some(true)),
            Some(text) if text.eq_ignore_ascii_case("false") => Ok(Some(false)),
            Some(text) => Err(ApiError::invalid(format!(
                "{name} is {text:?}; valid: true or false"
            ))),
        }
    }

    fn number(&self, name: &str, valid: std::ops::RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        match self.text(name) {
            None | Some("None") => Ok(None),
            Some(text) => match text.parse() {
                Ok(number) if valid.contains(&number) => Ok(Some(number)),
                _ => Err(ApiError::invalid(format!(
                    "{name} is {text:?}; valid: {} to {}",
                    valid.start(),
                    valid.end()
                ))),
            },
        }
    }

    /// The group named by `ContainerGroupId`.
    async fn group(&self) -> Result<Group, ApiError> {
        let text = self.required("ContainerGroupId")?;
        let not_found = || {
            ApiError::new(
                404,
                "InvalidParameter.NotFound",
                format!("ContainerGroupId is {text:?}; there is no such container group"),
            )
        };
        let id = GroupId::parse(text).ok_or_else(not_found)?;
        self.door.engine.get(&id).await.map_err(|_| not_found())
    }

    /// The client's idempotency token.
    fn client_token(&self) -> Result<Option<String>, ApiError> {
        match self.text("ClientToken") {
            Some(token) if token.len() > 64 || !token.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Err(ApiError::invalid(format!(
                    "ClientToken is {token:?}; valid: up to 64 ASCII characters"
                )))
            }
            token => Ok(token.map(str::to_owned)),
        }
    }
}
