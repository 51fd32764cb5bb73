//! Which groups a Describe action is about, page by page.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{
    api::eci::{ApiError, Call, view},
    group::{
        eci::params::Reader,
        status::{Group, GroupId},
        violation::Violations,
    },
};

/// Most ids of one request.
const MAX_IDS: usize = 20;

/// A page of groups.
pub(super) struct Page {
    pub(super) total: usize,
    pub(super) groups: Vec<Group>,
    /// Empty on the last page.
    pub(super) next_token: String,
}

/// Where a page begins: after this group.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Position {
    created_at_ms: u64,
    id: String,
}

impl Position {
    fn of(group: &Group) -> Self {
        Self {
            created_at_ms: group.status.created_at_ms,
            id: group.id.to_string(),
        }
    }

    fn parse(token: &str) -> Option<Self> {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (created_at_ms, id) = text.split_once('/')?;
        Some(Self {
            created_at_ms: created_at_ms.parse().ok()?,
            id: GroupId::parse(id)?.to_string(),
        })
    }

    fn token(&self) -> String {
        URL_SAFE_NO_PAD.encode(format!("{}/{}", self.created_at_ms, self.id))
    }
}

/// Selects by the common filters; `limit` is the default and the most.
pub(super) async fn select(call: &Call<'_>, limit: u64) -> Result<Page, ApiError> {
    let ids = ids(call)?;
    let tags = tags(call)?;
    let after = match call.text("NextToken") {
        None => None,
        Some(token) => Some(Position::parse(token).ok_or_else(|| {
            ApiError::invalid(format!("NextToken is {token:?}; valid: one of an earlier reply"))
        })?),
    };
    let limit = call.number("Limit", 1..=limit)?.unwrap_or(limit);
    let zone = &call.door.config.zone_id;
    let mut groups = call.door.engine.list().await;
    groups.retain(|group| {
        ids.as_ref()
            .is_none_or(|ids| ids.iter().any(|id| id == group.id.as_str()))
            && call
                .text("ContainerGroupName")
                .is_none_or(|name| name == group.spec.name)
            && call
                .text("Status")
                .is_none_or(|status| status == view::status(group))
            && call
                .text("SecurityGroupId")
                .is_none_or(|id| group.spec.network.security_groups.iter().any(|has| has == id))
            && call.text("ZoneId").is_none_or(|wanted| wanted == zone)
            && tags.iter().all(|(key, value)| {
                group
                    .spec
                    .labels
                    .get(key)
                    .is_some_and(|has| value.is_empty() || has == value)
            })
    });
    groups.sort_by_key(Position::of);
    let total = groups.len();
    if let Some(after) = after {
        groups.retain(|group| Position::of(group) > after);
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let next_token = if groups.len() > limit {
        groups.truncate(limit);
        groups
            .last()
            .map(|group| Position::of(group).token())
            .unwrap_or_default()
    } else {
        String::new()
    };
    Ok(Page {
        total,
        groups,
        next_token,
    })
}

/// The ids asked for, JSON text.
fn ids(call: &Call<'_>) -> Result<Option<Vec<String>>, ApiError> {
    let Some(text) = call.text("ContainerGroupIds") else {
        return Ok(None);
    };
    let ids: Vec<String> = serde_json::from_str(text).map_err(|_| {
        ApiError::invalid(format!(
            "ContainerGroupIds is {text:?}; valid: [\"eci-...\",\"eci-...\"]"
        ))
    })?;
    if ids.len() > MAX_IDS {
        return Err(ApiError::new(
            400,
            "InvalidParameter.LengthExceeded",
            format!(
                "ContainerGroupIds has {} ids; valid: at most {MAX_IDS}",
                ids.len()
            ),
        ));
    }
    Ok(Some(ids))
}

fn tags(call: &Call<'_>) -> Result<Vec<(String, String)>, ApiError> {
    let found = std::cell::RefCell::new(Violations::default());
    let reader = Reader::new(&call.params, &found);
    let tags = reader
        .list("Tag")
        .iter()
        .map(|tag| {
            (
                tag.required("Key"),
                tag.text("Value").unwrap_or_default().to_owned(),
            )
        })
        .collect();
    found.take().into_result(tags).map_err(ApiError::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_way_to_the_client() {
        let position = Position {
            created_at_ms: 5,
            id: "eci-aaaaaaaaaaaaaaaaaaa1".into(),
        };
        assert_eq!(Position::parse(&position.token()), Some(position));
        for wrong in ["", "x", "5/eci", "NS9lY2k"] {
            assert_eq!(Position::parse(wrong), None);
        }
    }
}
