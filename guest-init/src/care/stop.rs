//! The end of a container: its hook, SIGTERM, grace, SIGKILL.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{Carer, check, runs};
use crate::{container::Container, events::EventKind};

/// What is left of the grace after a hook, at least.
const MIN_AFTER_HOOK: Duration = Duration::from_secs(2);

/// Begins to end a container, or brings its end forward.
pub fn begin(carer: &Carer, container: &Arc<Container>, grace: Duration) {
    let until = Instant::now() + grace;
    let mut is_first = false;
    container.care.end.send_if_modified(|end| match *end {
        None => {
            is_first = true;
            *end = Some(until);
            true
        }
        Some(before) if until < before => {
            *end = Some(until);
            true
        }
        Some(_) => false,
    });
    if !is_first {
        return;
    }
    let (carer, container) = (carer.clone(), Arc::clone(container));
    tokio::spawn(async move {
        let Ok(init) = container.process("") else { return };
        tokio::select! {
            _ = init.wait() => {}
            () = end(&carer, &container, !grace.is_zero()) => {}
        }
    });
}

async fn end(carer: &Carer, container: &Arc<Container>, has_grace: bool) {
    let mut until = container.care.end.subscribe();
    if has_grace {
        if let Some(hook) = &container.care.wanted.pre_stop {
            let result = tokio::select! {
                result = check::perform_hook(carer, container, hook) => result,
                () = over(&mut until) => Err("it was not done when the grace period was over".to_owned()),
            };
            // A container that ends by its hook has done what it should.
            if let Err(message) = result
                && runs(container)
            {
                carer.event(container, EventKind::PreStopFailed, message, None);
            }
            let least = Instant::now() + MIN_AFTER_HOOK;
            container
                .care
                .end
                .send_modify(|end| *end = end.map(|end| end.max(least)));
        }
        // It may have ended meanwhile.
        let _ = container.signal("", libc::SIGTERM);
        over(&mut until).await;
    }
    if let Err(error) = container.signal_all(libc::SIGKILL) {
        crate::log::failure("kill a container", &error);
    }
}

/// Waits for the end of the grace, wherever it is moved to.
async fn over(until: &mut watch::Receiver<Option<Instant>>) {
    loop {
        let at = until.borrow_and_update().unwrap_or_else(Instant::now);
        tokio::select! {
            () = sleep_until(at) => return,
            // An error means that the container is gone.
            changed = until.changed() => if changed.is_err() { return },
        }
    }
}
