//! Many wishes at once: those that come while some are being carried out wait, and are then carried out together. A call of `nft`
//! costs much, and little more for many elements than for one; fifty groups that start at once need a few, not fifty.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Mutex as Turn, oneshot};

/// Most wishes carried out together.
const MAX_TOGETHER: usize = 256;

/// Who is told how a wish ended.
type Waiter<E> = oneshot::Sender<Result<(), E>>;

/// Wishes, each a list of commands that are carried out all or not at all, in the order they came.
#[derive(Debug)]
pub(super) struct Together<C, E> {
    waiting: Mutex<Vec<(Vec<C>, Waiter<E>)>>,
    turn: Turn<()>,
}

impl<C: Clone + Send + 'static, E: Send + 'static> Together<C, E> {
    /// Nothing waits.
    pub(super) const fn new() -> Self {
        Self {
            waiting: Mutex::new(Vec::new()),
            turn: Turn::const_new(()),
        }
    }

    /// Carries out `commands` by `run`, with what others wish. Where that fails for all together, each is tried alone, so that one
    /// is not refused for another's sake. Once begun it goes on, also when the caller is gone.
    ///
    /// # Errors
    /// What `run` says of these commands; `None` when it was broken off.
    pub(super) async fn carry_out<F>(
        &'static self,
        commands: Vec<C>,
        run: impl Fn(Vec<C>) -> F + Send + Sync + 'static,
    ) -> Result<(), Option<E>>
    where
        F: Future<Output = Result<(), E>> + Send,
    {
        let (tell, told) = oneshot::channel();
        self.lock().push((commands, tell));
        tokio::spawn(async move {
            let _turn = self.turn.lock().await;
            let batch: Vec<_> = {
                let mut waiting = self.lock();
                let n = waiting.len().min(MAX_TOGETHER);
                waiting.drain(..n).collect()
            };
            let all = batch.iter().flat_map(|(commands, _)| commands).cloned().collect();
            let n = batch.len();
            // Somebody else's turn did what there was.
            if n == 0 {
                return;
            }
            let together = run(all).await;
            let is_done = together.is_ok();
            let mut only = Some(together);
            for (commands, waiter) in batch {
                let result = match only.take() {
                    Some(result) if n == 1 => result,
                    _ if is_done => Ok(()),
                    _ => run(commands).await,
                };
                // The caller may be gone.
                let _ = waiter.send(result);
            }
        });
        match told.await {
            Ok(result) => result.map_err(Some),
            Err(_) => Err(None),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<(Vec<C>, Waiter<E>)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Runs that wait for leave, and what they were given.
    struct Runs {
        given: Mutex<Vec<Vec<u32>>>,
        leave: tokio::sync::Semaphore,
    }

    fn runs() -> Arc<Runs> {
        Arc::new(Runs {
            given: Mutex::default(),
            leave: tokio::sync::Semaphore::new(0),
        })
    }

    /// Fails whatever has a 13 in it.
    fn run(
        runs: &Arc<Runs>,
    ) -> impl Fn(Vec<u32>) -> futures_util::future::BoxFuture<'static, Result<(), String>> + use<> {
        let runs = Arc::clone(runs);
        move |commands| {
            let runs = Arc::clone(&runs);
            Box::pin(async move {
                runs.given.lock().unwrap().push(commands.clone());
                runs.leave.acquire().await.unwrap().forget();
                if commands.contains(&13) {
                    Err("13".to_owned())
                } else {
                    Ok(())
                }
            })
        }
    }

    fn together() -> &'static Together<u32, String> {
        Box::leak(Box::new(Together::new()))
    }

    /// Lets every other task go as far as it can.
    async fn settle() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_comes_meanwhile_is_carried_out_together_and_in_order() {
        let (all, runs) = (together(), runs());
        let first = tokio::spawn(all.carry_out(vec![1], run(&runs)));
        settle().await;
        let others: Vec<_> = [vec![2, 3], vec![4], vec![]]
            .into_iter()
            .map(|commands| tokio::spawn(all.carry_out(commands, run(&runs))))
            .collect();
        settle().await;
        assert_eq!(*runs.given.lock().unwrap(), [vec![1]]);
        runs.leave.add_permits(2);
        assert_eq!(first.await.unwrap(), Ok(()));
        for other in others {
            assert_eq!(other.await.unwrap(), Ok(()));
        }
        assert_eq!(*runs.given.lock().unwrap(), [vec![1], vec![2, 3, 4]]);
    }

    #[tokio::test]
    async fn one_is_not_refused_for_anothers_sake() {
        let (all, runs) = (together(), runs());
        let first = tokio::spawn(all.carry_out(vec![13], run(&runs)));
        settle().await;
        let others: Vec<_> = [vec![2], vec![13, 3], vec![4]]
            .into_iter()
            .map(|commands| tokio::spawn(all.carry_out(commands, run(&runs))))
            .collect();
        settle().await;
        runs.leave.add_permits(10);
        assert_eq!(first.await.unwrap(), Err(Some("13".to_owned())));
        let mut results = Vec::new();
        for other in others {
            results.push(other.await.unwrap());
        }
        assert_eq!(results, [Ok(()), Err(Some("13".to_owned())), Ok(())]);
        assert_eq!(
            *runs.given.lock().unwrap(),
            [vec![13], vec![2, 13, 3, 4], vec![2], vec![13, 3], vec![4]]
        );
    }

    #[tokio::test]
    async fn a_caller_that_is_gone_holds_nobody_up() {
        let (all, runs) = (together(), runs());
        let first = tokio::spawn(all.carry_out(vec![1], run(&runs)));
        settle().await;
        let gone = tokio::spawn(all.carry_out(vec![2], run(&runs)));
        let last = tokio::spawn(all.carry_out(vec![3], run(&runs)));
        settle().await;
        first.abort();
        gone.abort();
        runs.leave.add_permits(10);
        assert_eq!(last.await.unwrap(), Ok(()));
        assert_eq!(*runs.given.lock().unwrap(), [vec![1], vec![2, 3]]);
    }
}
