//! `ecictl resize`

use anyhow::Context;
use http::Method;

use super::client::{Client, group_path, query};
use crate::api::admin::wire::Created;

pub(super) async fn run(client: &Client, group: &str, volume: &str, gib: u32) -> anyhow::Result<u8> {
    let parameters = [("volume", volume), ("gib", &gib.to_string())];
    let path = group_path(group, &format!("/resize{}", query(parameters)));
    let _: Created = client
        .call(Method::POST, &path, "", Vec::new())
        .await
        .with_context(|| format!("Failed to resize volume {volume} of {group}"))?;
    Ok(0)
}
