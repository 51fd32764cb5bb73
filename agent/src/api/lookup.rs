//! Finding a group by what a person writes, or by what Kubernetes writes.

use crate::{
    engine::Engine,
    error::{Error, ErrorKind, Result},
    group::status::{Group, GroupId},
};

/// The group called `text`: an id, a unique beginning of one, a name, or `namespace/name`.
///
/// # Errors
/// `NotFound`, or `InvalidArgument` naming the candidates when there are several.
pub(super) async fn by_text(engine: &dyn Engine, text: &str) -> Result<Group> {
    if let Some(id) = GroupId::parse(text) {
        return engine.get(&id).await;
    }
    choose(&engine.list().await, text)
}

fn choose(groups: &[Group], text: &str) -> Result<Group> {
    let named = |group: &Group| match text.split_once('/') {
        Some((namespace, name)) => group.spec.namespace == namespace && group.spec.name == name,
        None => group.spec.name == text,
    };
    let begins = |group: &Group| {
        let id = group.id.as_str();
        !text.is_empty() && (id.starts_with(text) || id["eci-".len()..].starts_with(text)) && text != "eci-"
    };
    let mut candidates: Vec<_> = groups.iter().filter(|group| named(group)).collect();
    if candidates.is_empty() {
        candidates = groups.iter().filter(|group| begins(group)).collect();
    }
    match candidates[..] {
        [only] => Ok(only.clone()),
        [] => Err(Error::new(
            ErrorKind::NotFound,
            format!("No container group is called {text:?}"),
        )),
        _ => {
            let names: Vec<_> = candidates
                .iter()
                .take(10)
                .map(|group| format!("{} ({}/{})", group.id, group.spec.namespace, group.spec.name))
                .collect();
            Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{text:?} is the name of {} container groups; give an id: {}",
                    candidates.len(),
                    names.join(", ")
                ),
            ))
        }
    }
}

/// The group a Kubernetes path means; `uid` is the Pod's uid or the group's id.
///
/// # Errors
/// `NotFound`.
pub(super) async fn by_pod(
    engine: &dyn Engine,
    namespace: &str,
    name: &str,
    uid: Option<&str>,
) -> Result<Group> {
    let matches = |group: &Group| {
        group.spec.namespace == namespace
            && group.spec.name == name
            && uid.is_none_or(|uid| group.spec.uid.as_deref() == Some(uid) || group.id.as_str() == uid)
    };
    // The newest, should a finished group have the same name.
    engine.list().await.into_iter().rfind(matches).ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("pod \"{namespace}/{name}\" not found"),
        )
    })
}

/// The named container of the group, or its first.
///
/// # Errors
/// `NotFound`, naming the group's containers.
pub(super) fn container(group: &Group, name: Option<&str>) -> Result<String> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        let first = group.spec.containers.first();
        return first.map(|container| container.name.clone()).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("Group {} has no container", group.id),
            )
        });
    };
    let names: Vec<_> = group.spec.containers.iter().map(|c| c.name.as_str()).collect();
    if names.contains(&name) {
        Ok(name.to_owned())
    } else {
        Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "Group {} has no container {name:?}; it has {}",
                group.id,
                names.join(", ")
            ),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fake::group;

    fn find(text: &str) -> std::result::Result<String, ErrorKind> {
        let groups = [
            group("eci-aaaaaaaaaaaaaaaaaaa1", "web", "default"),
            group("eci-aaaaaaaaaaaaaaaaaaa2", "web", "shop"),
            group("eci-bbbbbbbbbbbbbbbbbbb3", "db", "default"),
        ];
        choose(&groups, text)
            .map(|group| group.id.as_str()[20..].to_owned())
            .map_err(|error| error.kind)
    }

    #[test]
    fn names_and_beginnings() {
        assert_eq!(find("shop/web").as_deref(), Ok("aaa2"));
        assert_eq!(find("db").as_deref(), Ok("bbb3"));
        assert_eq!(find("eci-b").as_deref(), Ok("bbb3"));
        assert_eq!(find("bbbb").as_deref(), Ok("bbb3"));
        assert_eq!(find("web"), Err(ErrorKind::InvalidArgument));
        assert_eq!(find("eci-a"), Err(ErrorKind::InvalidArgument));
        for nothing in ["", "eci-", "nope", "x/db"] {
            assert_eq!(find(nothing), Err(ErrorKind::NotFound), "{nothing}");
        }
    }
}
