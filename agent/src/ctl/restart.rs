//! `ecictl restart`

use http::Method;

use super::{
    client::{Client, group_path},
    table,
};
use crate::api::admin::wire::Created;

pub(super) async fn run(client: &Client, groups: &[String]) -> anyhow::Result<u8> {
    let mut code = 0;
    for group in groups {
        let path = group_path(group, "/restart");
        match client.call::<Created>(Method::POST, &path, "", Vec::new()).await {
            Ok(restarted) => table::print(format!("{}\n", restarted.id).as_bytes())?,
            // The others are still restarted.
            Err(error) => {
                eprintln!("ecictl: {group}: {error:#}");
                code = 1;
            }
        }
    }
    Ok(code)
}
