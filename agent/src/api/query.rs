//! Query strings of the kubelet and the local door: exec and log options.

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use crate::{
    engine::{ExecRequest, LogOptions},
    error::{Error, ErrorKind, Result},
};

/// A decoded query string.
pub(super) struct Query<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> Query<'a> {
    pub(super) fn parse(query: Option<&'a str>) -> Self {
        Self(form_urlencoded::parse(query.unwrap_or_default().as_bytes()).collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.0.iter().find(|(key, _)| key == name)?;
        Some(value)
    }

    pub(super) fn all(&self, name: &str) -> Vec<String> {
        let values = self.0.iter().filter(|(key, _)| key == name);
        values.map(|(_, value)| value.clone().into_owned()).collect()
    }

    /// `1` or `true`, as Kubernetes writes it.
    pub(super) fn flag(&self, name: &str) -> Result<bool> {
        match self.get(name) {
            None | Some("" | "0" | "false" | "False") => Ok(false),
            Some("1" | "true" | "True") => Ok(true),
            Some(other) => Err(invalid(name, other, "valid: true or false")),
        }
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.get(name).filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let number = text
            .parse()
            .map_err(|_| invalid(name, text, "valid: 0 or more"))?;
        Ok(Some(number))
    }
}

fn invalid(name: &str, value: &str, valid: &str) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        format!("Query parameter {name} is {value:?}; {valid}"),
    )
}

/// Names of the parameters that switch the streams of an exec.
pub(super) struct StreamNames {
    pub(super) stdin: &'static str,
    pub(super) stdout: &'static str,
    pub(super) stderr: &'static str,
}

/// The kubelet's own.
pub(super) const KUBELET_STREAMS: StreamNames = StreamNames {
    stdin: "input",
    stdout: "output",
    stderr: "error",
};

/// Those of the local door.
pub(super) const ADMIN_STREAMS: StreamNames = StreamNames {
    stdin: "stdin",
    stdout: "stdout",
    stderr: "stderr",
};

/// Reads an exec request.
pub(super) fn exec_request(query: &Query<'_>, container: String, names: &StreamNames) -> Result<ExecRequest> {
    let command = query.all("command");
    if command.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "There is no command; give the program and its arguments as command parameters",
        ));
    }
    let tty = query.flag("tty")?;
    let size = match (query.number("rows")?, query.number("columns")?) {
        (Some(rows), Some(columns)) => match (u16::try_from(rows), u16::try_from(columns)) {
            (Ok(rows), Ok(columns)) => Some((rows, columns)),
            _ => return Err(invalid("rows", &rows.to_string(), "valid: 0 to 65535")),
        },
        _ => None,
    };
    let request = ExecRequest {
        container: Some(container),
        command,
        tty,
        stdin: query.flag(names.stdin)?,
        stdout: query.flag(names.stdout)?,
        // A TTY has one output.
        stderr: query.flag(names.stderr)? && !tty,
        size,
    };
    if !(request.stdin || request.stdout || request.stderr) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "No stream is asked for; set at least one of {}, {}, {}",
                names.stdin, names.stdout, names.stderr
            ),
        ));
    }
    Ok(request)
}

/// Reads log options (`v1.PodLogOptions`).
pub(super) fn log_options(query: &Query<'_>, container: String, now: SystemTime) -> Result<LogOptions> {
    let since = match (query.number("sinceSeconds")?, query.get("sinceTime")) {
        (Some(_), Some(_)) => {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "Both sinceSeconds and sinceTime are given; valid: at most one",
            ));
        }
        (Some(seconds), None) => Some(
            now.checked_sub(Duration::from_secs(seconds))
                .filter(|since| *since > SystemTime::UNIX_EPOCH)
                .unwrap_or(SystemTime::UNIX_EPOCH),
        ),
        (None, Some(text)) => Some(parse_time(text).ok_or_else(|| {
            invalid(
                "sinceTime",
                text,
                "valid: an RFC 3339 time such as 2026-01-01T00:00:00Z",
            )
        })?),
        (None, None) => None,
    };
    let limit_bytes = query.number("limitBytes")?;
    if limit_bytes == Some(0) {
        return Err(invalid("limitBytes", "0", "valid: 1 or more"));
    }
    Ok(LogOptions {
        container: Some(container),
        follow: query.flag("follow")?,
        previous: query.flag("previous")?,
        tail_lines: query.number("tailLines")?,
        limit_bytes,
        since,
        timestamps: query.flag("timestamps")?,
    })
}

/// An RFC 3339 time.
pub(super) fn parse_time(text: &str) -> Option<SystemTime> {
    let timestamp: jiff::Timestamp = text.parse().ok()?;
    Some(timestamp.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exec(query: &str) -> Result<ExecRequest> {
        exec_request(&Query::parse(Some(query)), "c".into(), &KUBELET_STREAMS)
    }

    fn logs(query: &str) -> Result<LogOptions> {
        log_options(&Query::parse(Some(query)), "c".into(), SystemTime::now())
    }

    #[test]
    fn commands_keep_their_order_and_spaces() {
        let request = exec("command=sh&command=-c&command=echo+a%20b&output=1&error=1&input=0").unwrap();
        assert_eq!(request.command, ["sh", "-c", "echo a b"]);
        assert!(request.stdout && request.stderr && !request.stdin && !request.tty);
        let tty = exec("command=sh&input=1&output=1&error=1&tty=1&rows=5&columns=9").unwrap();
        assert!(tty.tty && !tty.stderr);
        assert_eq!(tty.size, Some((5, 9)));
    }

    #[test]
    fn wrong_queries_name_the_parameter() {
        for (query, part) in [
            ("output=1", "no command"),
            ("command=x", "No stream"),
            ("command=x&output=maybe", "output is \"maybe\""),
            ("command=x&output=1&rows=99999&columns=1", "rows"),
        ] {
            let error = exec(query).unwrap_err();
            assert!(error.message.contains(part), "{}", error.message);
        }
        for (query, part) in [
            ("tailLines=-1", "tailLines is \"-1\""),
            ("sinceTime=yesterday", "sinceTime is \"yesterday\""),
            ("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z", "at most one"),
            ("limitBytes=0", "limitBytes"),
        ] {
            let error = logs(query).unwrap_err();
            assert!(error.message.contains(part), "{}", error.message);
        }
    }

    #[test]
    fn log_options_are_read() {
        let options =
            logs("follow=true&tailLines=5&timestamps=1&sinceTime=1970-01-01T00:00:07Z&previous=true")
                .unwrap();
        assert!(options.follow && options.timestamps && options.previous);
        assert_eq!(options.tail_lines, Some(5));
        assert_eq!(
            options.since,
            Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7))
        );
        assert_eq!(
            logs("sinceSeconds=99999999999999").unwrap().since,
            Some(SystemTime::UNIX_EPOCH)
        );
    }
}
