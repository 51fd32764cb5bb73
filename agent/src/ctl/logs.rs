//! `ecictl logs`

use anyhow::bail;
use http::Method;

use super::{
    args::LogsArgs,
    client::{Client, group_path, query},
    table,
};

pub(super) async fn run(client: &Client, args: &LogsArgs) -> anyhow::Result<u8> {
    let mut parameters = vec![
        ("follow", args.follow.to_string()),
        ("timestamps", args.timestamps.to_string()),
        ("previous", args.previous.to_string()),
    ];
    if let Some(container) = &args.container {
        parameters.push(("container", container.clone()));
    }
    if let Some(lines) = args.tail {
        parameters.push(("tailLines", lines.to_string()));
    }
    if let Some(since) = &args.since {
        parameters.push(parse_since(since)?);
    }
    let path = group_path(&args.group, &format!("/logs{}", query(parameters)));
    let mut log = client.stream(Method::GET, &path, Vec::new()).await?;
    while let Some(bytes) = log.next().await? {
        table::print(&bytes)?;
    }
    Ok(0)
}

/// The query parameter of a time or duration.
fn parse_since(text: &str) -> anyhow::Result<(&'static str, String)> {
    if text.parse::<jiff::Timestamp>().is_ok() {
        return Ok(("sinceTime", text.to_owned()));
    }
    let number_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(number_end);
    let factor = match unit {
        "" | "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(86_400),
        _ => None,
    };
    let seconds = factor.and_then(|factor: u64| number.parse::<u64>().ok()?.checked_mul(factor));
    match seconds {
        Some(seconds) => Ok(("sinceSeconds", seconds.to_string())),
        None => {
            bail!(
                "--since is {text:?}; valid: a time such as 2026-01-01T00:00:00Z or a duration such as 90s, 5m, 2h, 1d"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::parse_since;

    #[test]
    fn times_and_durations() {
        assert_eq!(parse_since("5m").unwrap(), ("sinceSeconds", "300".into()));
        assert_eq!(parse_since("7").unwrap(), ("sinceSeconds", "7".into()));
        assert_eq!(parse_since("2026-01-01T00:00:00Z").unwrap().0, "sinceTime");
        for wrong in ["", "m", "5x", "yesterday", "99999999999999999999h"] {
            assert!(parse_since(wrong).is_err(), "{wrong}");
        }
    }
}
