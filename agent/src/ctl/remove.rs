//! `ecictl rm`

use http::Method;

use super::{
    args::RmArgs,
    client::{Client, Refused, group_path, query},
    table,
};
use crate::api::admin::wire::Created;

pub(super) async fn run(client: &Client, args: &RmArgs) -> anyhow::Result<u8> {
    let grace = if args.force { Some(0) } else { args.grace };
    let mut parameters = vec![("wait", (!args.no_wait).to_string())];
    if let Some(grace) = grace {
        parameters.push(("grace", grace.to_string()));
    }
    let suffix = query(parameters);
    let mut code = 0;
    for group in &args.groups {
        let path = group_path(group, &suffix);
        match client
            .call::<Created>(Method::DELETE, &path, "", Vec::new())
            .await
        {
            Ok(gone) => table::print(format!("{}\n", gone.id).as_bytes())?,
            Err(error) if args.force && is_missing(&error) => {}
            // The others are still deleted.
            Err(error) => {
                eprintln!("ecictl: {group}: {error:#}");
                code = 1;
            }
        }
    }
    Ok(code)
}

fn is_missing(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<Refused>()
        .is_some_and(|refused| refused.0.is_not_found())
}
