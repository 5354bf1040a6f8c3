//! Ctrl-C: the first asks for an orderly end, the second ends the program.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C (and a termination signal) sets [`asked`] instead of ending the program. A second signal may end
/// it anywhere, because files keep temporary names until they are complete.
pub(crate) fn listen() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })?;
    Ok(())
}

/// Waits for the first Ctrl-C or termination signal after this call, for a server that finishes its requests before it
/// ends.
///
/// # Errors
/// When the system cannot report signals.
pub(crate) fn asked_to_stop() -> std::io::Result<impl Future<Output = ()>> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut end, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(async move {
            tokio::select! {
                _ = end.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
    }
    #[cfg(windows)]
    {
        let mut interrupt = tokio::signal::windows::ctrl_c()?;
        Ok(async move { _ = interrupt.recv().await })
    }
}

/// Whether an orderly end was asked for.
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Whether an orderly end was asked for; resets the state, so that the next Ctrl-C is a first one again.
pub(crate) fn taken() -> bool {
    ASKED.swap(false, Ordering::SeqCst)
}

/// The same, for progress callbacks.
pub(crate) fn flow() -> ControlFlow<()> {
    if asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}
