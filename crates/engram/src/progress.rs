//! Progress on standard error: a bar on a terminal, now and then a line elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between lines where there is no terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// How far a job has come.
#[derive(Debug)]
pub(crate) struct Progress {
    /// None where there is no terminal.
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Progress {
    /// A job of `total` units.
    pub(crate) fn new(total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:24.cyan/black.bright} {percent:>3}%  {wide_msg}")
                .expect("a valid template")
                .progress_chars("━━─");
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
            bar.with_style(style)
        });
        Self { bar, last_line: None }
    }

    /// Shows that `done` units are done. `message` is asked for only if it will be shown.
    pub(crate) fn show(&mut self, done: u64, message: impl FnOnce() -> String) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(message());
            }
            None if self.last_line.is_none_or(|last| last.elapsed() >= BETWEEN_LINES) => {
                eprintln!("{}", message());
                self.last_line = Some(Instant::now());
            }
            None => {}
        }
    }

    /// Writes a line that stays.
    pub(crate) fn line(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
