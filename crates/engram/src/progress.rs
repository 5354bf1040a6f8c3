//! Progress on standard error: a bar on a terminal, otherwise a line now and then.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use engram_train::Pace;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::interrupt;
use crate::note::note;
use crate::number::{bytes, duration, short};
use crate::terminal;

/// Time between lines without a terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// The progress of a job.
#[derive(Debug)]
pub(crate) struct Progress {
    /// None without a terminal.
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Progress {
    /// A job of `total` units.
    pub(crate) fn new(total: u64) -> Self {
        let bar = terminal::takes_controls(&std::io::stderr()).then(|| {
            let style = ProgressStyle::with_template("{bar:16.cyan/black.bright} {percent:>3}%  {wide_msg}")
                .expect("a valid template")
                .progress_chars("━━─");
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
            bar.with_style(style)
        });
        Self { bar, last_line: None }
    }

    /// Shows that `done` units are done. Calls `message` only if it is shown.
    pub(crate) fn show(&mut self, done: u64, message: impl FnOnce() -> String) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(message());
            }
            None if self.last_line.is_none_or(|last| last.elapsed() >= BETWEEN_LINES) => {
                note(message());
                self.last_line = Some(Instant::now());
            }
            None => {}
        }
    }

    /// Writes a line that stays.
    pub(crate) fn line(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(text)),
            None => note(text),
        }
    }
}

/// A turning mark on a terminal, for work whose progress cannot be measured. Dropping it removes the mark.
#[derive(Debug)]
pub(crate) struct Busy(Option<ProgressBar>);

impl Busy {
    /// Shows `what` beside the mark.
    pub(crate) fn new(what: String) -> Self {
        let bar = terminal::takes_controls(&std::io::stderr()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8));
            bar.set_message(what);
            bar.enable_steady_tick(Duration::from_millis(125));
            bar
        });
        Self(bar)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// A job over data: its progress, speed and remaining time.
#[derive(Debug)]
pub(crate) struct Passage {
    name: String,
    progress: Progress,
    pace: Pace,
    begun: Instant,
    unit: Unit,
}

/// The unit of progress.
#[derive(Debug, Clone, Copy)]
enum Unit {
    /// Steps of this many bytes each.
    Bytes(u64),
    Tokens,
}

impl Unit {
    fn amount(self, count: u64) -> String {
        match self {
            Self::Bytes(each) => bytes(count * each),
            Self::Tokens => short(count),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Bytes(_) => "",
            Self::Tokens => " tokens",
        }
    }
}

impl Passage {
    /// A job called `name` over `total` units of `bytes` bytes each.
    pub(crate) fn new(name: &str, total: u64, bytes: u64) -> Self {
        Self::of(name, total, Unit::Bytes(bytes))
    }

    /// A job called `name` over `total` tokens.
    pub(crate) fn of_tokens(name: &str, total: u64) -> Self {
        Self::of(name, total, Unit::Tokens)
    }

    fn of(name: &str, total: u64, unit: Unit) -> Self {
        let name = name.to_owned();
        Self { name, progress: Progress::new(total), pace: Pace::new(0), begun: Instant::now(), unit }
    }

    /// Shows that `done` units of `total` are done. Returns whether to continue.
    pub(crate) fn show(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        let &mut Self { ref name, ref pace, begun, unit, .. } = self;
        self.progress.show(done, || {
            let speed = done as f64 / begun.elapsed().as_secs_f64().max(1e-9);
            let speed = unit.amount(speed as u64);
            let left =
                pace.left(done, total).map_or(String::new(), |left| format!(", {} left", duration(left)));
            let of = format!("{} of {}{}", unit.amount(done), unit.amount(total), unit.name());
            format!("{name}: {of}, {speed}/s{left}")
        });
        interrupt::flow()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
