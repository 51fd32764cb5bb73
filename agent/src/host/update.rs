//! Updates of groups: what is asked is checked against the group and the host, and handed to its driver.

use super::Host;
use crate::{
    capacity,
    error::{Error, ErrorKind, Result},
    group::{
        resize,
        spec::GroupSpec,
        status::{GroupId, Phase},
        update,
    },
};

impl Host {
    /// See [`Engine::update`](crate::engine::Engine::update).
    pub(super) async fn update_group(
        &self,
        id: &GroupId,
        base: &GroupSpec,
        mut spec: GroupSpec,
    ) -> Result<bool> {
        // One after the other with what is accepted: the capacity that is free here stays so until the wish is durable.
        let _one = self.accepting.lock().await;
        let handle = self.handle(id)?;
        let published = handle.now();
        let phase = published.group.status.phase;
        if !matches!(phase, Phase::Pending | Phase::Running) || published.restores.is_some() {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!("container group {id} is {phase:?}; valid: Pending or Running"),
            ));
        }
        update::carry_over(&published.group.spec, &mut spec);
        if published.group.spec == spec {
            return Ok(false);
        }
        update::check(&published.group.spec, &spec)
            .map_err(|found| Error::new(ErrorKind::InvalidArgument, found.to_string()))?;
        self.admit_to_network(&spec, Some(id))?;
        let others: Vec<_> = self
            .all()
            .into_iter()
            .filter(|other| other.group.id != *id)
            .filter_map(|other| other.reserved())
            .collect();
        // What becomes smaller fits in any case, whatever the host was promised to others since.
        let before = published.group.spec.size;
        if resize::larger(before, spec.size) != before {
            let config = &self.parts.config;
            capacity::admit(
                self.capacity,
                &config.capacity,
                &config.sandbox,
                &others,
                spec.size,
            )?;
        }
        handle.update(base.clone(), spec).await?;
        Ok(true)
    }
}
