//! Replies as JSON, or as XML for clients that ask for it.

use serde_json::{Map, Value, json};

use super::{error::ApiError, http1::Reply};

/// Form of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    Xml,
}

impl Format {
    /// What `Format` asks for; JSON unless it is XML.
    pub(super) fn of(parameter: Option<&str>) -> Self {
        match parameter {
            Some(format) if format.eq_ignore_ascii_case("xml") => Self::Xml,
            _ => Self::Json,
        }
    }
}

/// The reply to a request.
pub(super) fn reply(
    format: Format,
    action: &str,
    request_id: &str,
    host: &str,
    result: Result<Map<String, Value>, ApiError>,
) -> Reply {
    let (status, mut object) = match result {
        Ok(object) => (200, object),
        Err(error) => {
            let object = json!({
                "Code": error.code,
                "Message": error.message,
                "HostId": host,
                "Recommend": "",
            });
            let Value::Object(object) = object else {
                unreachable!("written as an object above")
            };
            (error.status, object)
        }
    };
    object.insert("RequestId".into(), Value::String(request_id.to_owned()));
    let mut headers = vec![("x-acs-request-id", request_id.to_owned())];
    if status == 400
        && object
            .get("Code")
            .and_then(Value::as_str)
            .is_some_and(|code| code.starts_with("Throttling"))
    {
        headers.push(("x-acs-retry-after", "5".into()));
    }
    let body = match format {
        Format::Json => {
            headers.push(("content-type", "application/json;charset=utf-8".into()));
            serde_json::to_vec(&object).unwrap_or_default()
        }
        Format::Xml => {
            headers.push(("content-type", "text/xml;charset=utf-8".into()));
            let root = if status == 200 {
                format!("{}Response", element_name(action))
            } else {
                "Error".into()
            };
            let mut text = String::from("<?xml version='1.0' encoding='UTF-8'?>");
            write_xml(&root, &Value::Object(object), &mut text);
            text.into_bytes()
        }
    };
    Reply {
        status,
        headers,
        body,
    }
}

/// Letters and digits only; the action may be anything a client sent.
fn element_name(text: &str) -> String {
    text.chars().filter(char::is_ascii_alphanumeric).collect()
}

/// Each item of a list repeats the list's own name, without a wrapper.
fn write_xml(name: &str, value: &Value, text: &mut String) {
    match value {
        Value::Array(items) => {
            for item in items {
                write_xml(name, item, text);
            }
        }
        Value::Object(fields) => {
            text.push_str(&format!("<{name}>"));
            for (name, field) in fields {
                write_xml(name, field, text);
            }
            text.push_str(&format!("</{name}>"));
        }
        Value::Null => {}
        Value::String(content) => text.push_str(&format!("<{name}>{}</{name}>", escape(content))),
        Value::Bool(_) | Value::Number(_) => text.push_str(&format!("<{name}>{value}</{name}>")),
    }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '"' => escaped.push_str("&quot;"),
            // XML 1.0 has no way to write these.
            c if c.is_control() && !matches!(c, '\n' | '\r' | '\t') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_all_fields() {
        let error = ApiError::new(404, "X", "m");
        let reply = reply(Format::Json, "A", "R-1", "h:111", Err(error));
        let value: Value = serde_json::from_slice(&reply.body).unwrap();
        assert_eq!(reply.status, 404);
        assert_eq!(
            value,
            json!({"Code": "X", "Message": "m", "RequestId": "R-1", "HostId": "h:111", "Recommend": ""})
        );
    }

    #[test]
    fn lists_in_xml_repeat_their_name() {
        let Value::Object(object) = json!({"Zones": ["a", "b<"], "N": 1, "E": {"F": true}}) else {
            unreachable!()
        };
        let reply = reply(Format::Xml, "Describe<Regions", "R", "h", Ok(object));
        let text = String::from_utf8(reply.body).unwrap();
        for part in [
            "<DescribeRegionsResponse>",
            "<Zones>a</Zones><Zones>b&lt;</Zones>",
            "<N>1</N>",
            "<E><F>true</F></E>",
            "<RequestId>R</RequestId>",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
