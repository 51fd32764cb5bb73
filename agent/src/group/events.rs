//! The bounded list of what happened to a group. Pure.

use super::status::{Event, EventKind};

/// Events kept.
const LIMIT: usize = 50;
/// Longest message kept, bytes.
const MESSAGE_BYTES: usize = 1024;

/// Adds an event; one that says the same as an earlier one of the same container raises that one's count instead.
pub fn push(
    events: &mut Vec<Event>,
    now_ms: u64,
    kind: EventKind,
    reason: &str,
    message: String,
    container: Option<&str>,
) {
    let message = shorten(message);
    let same = |event: &Event| {
        event.reason == reason && event.message == message && event.container.as_deref() == container
    };
    if let Some(at) = events.iter().position(same) {
        let mut event = events.remove(at);
        event.count = event.count.saturating_add(1);
        event.last_ms = now_ms;
        events.push(event);
        return;
    }
    if events.len() >= LIMIT {
        events.remove(0);
    }
    events.push(Event {
        kind,
        reason: reason.to_owned(),
        message,
        container: container.map(str::to_owned),
        count: 1,
        first_ms: now_ms,
        last_ms: now_ms,
    });
}

fn shorten(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES {
        let end = (0..=MESSAGE_BYTES)
            .rev()
            .find(|at| message.is_char_boundary(*at))
            .unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_counted_and_the_list_is_bounded() {
        let mut events = Vec::new();
        for at in 0..3 {
            push(
                &mut events,
                at,
                EventKind::Warning,
                "BackOff",
                "x".into(),
                Some("c"),
            );
        }
        assert_eq!(
            (
                events.len(),
                events[0].count,
                events[0].first_ms,
                events[0].last_ms
            ),
            (1, 3, 0, 2)
        );
        for at in 0..100 {
            push(
                &mut events,
                at,
                EventKind::Normal,
                "Pulled",
                format!("{at}"),
                None,
            );
        }
        assert_eq!(events.len(), LIMIT);
        assert_eq!(events.last().unwrap().message, "99");
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let mut events = Vec::new();
        push(&mut events, 0, EventKind::Normal, "A", "ä".repeat(2000), None);
        assert!(events[0].message.len() <= MESSAGE_BYTES + 3);
    }
}
