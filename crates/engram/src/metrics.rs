//! `metrics.jsonl`: a run's metrics, one JSON object per line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use engram_train::{HeldOut, StepReport};
use serde::{Deserialize, Serialize};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Metric {
    /// A training step.
    Step(StepReport),
    /// The held-out loss of a named source after a step.
    SourceHeldOut {
        /// The step.
        step: u64,
        /// The source's name.
        source: String,
        /// The loss.
        #[serde(flatten)]
        loss: HeldOut,
    },
    /// The held-out loss after a step; of several sources, the mean by their weights.
    HeldOut {
        /// The step.
        step: u64,
        /// The loss.
        #[serde(flatten)]
        loss: HeldOut,
    },
}

impl Metric {
    fn step(&self) -> u64 {
        match self {
            Self::Step(report) => report.step,
            Self::HeldOut { step, .. } | Self::SourceHeldOut { step, .. } => *step,
        }
    }
}

/// The open file, for appending.
#[derive(Debug)]
pub(crate) struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the log of the run in `folder` at `step`. Removes lines of later steps: a run that was killed after its
    /// last checkpoint repeats them.
    pub(crate) fn open(folder: &Path, step: u64) -> anyhow::Result<Self> {
        let path = folder.join("metrics.jsonl");
        let open = || -> std::io::Result<File> {
            let mut file =
                OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
            let keep = whole_until(&file, step)?;
            file.set_len(keep)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        let file = open().with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { path, file })
    }

    /// Adds a line.
    pub(crate) fn add(&mut self, metric: Metric) -> anyhow::Result<()> {
        let mut line = serde_json::to_string(&metric)?;
        line.push('\n');
        // One write per line: a killed run leaves at most its last line unfinished.
        self.file.write_all(line.as_bytes()).with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// Flushes the lines to disk.
    pub(crate) fn flush(&mut self) -> anyhow::Result<()> {
        self.file.sync_data().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Bytes of the complete lines up to `step`.
fn whole_until(file: &File, step: u64) -> std::io::Result<u64> {
    let (mut reader, mut line, mut bytes) = (BufReader::new(file), String::new(), 0);
    while reader.read_line(&mut line)? > 0 {
        match serde_json::from_str::<Metric>(&line) {
            Ok(metric) if line.ends_with('\n') && metric.step() <= step => bytes += line.len() as u64,
            _ => break,
        }
        line.clear();
    }
    Ok(bytes)
}

/// All lines of the run in `folder`.
pub(crate) fn read(folder: &Path) -> anyhow::Result<Vec<Metric>> {
    let path = folder.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let metric = |(index, line)| {
        serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), index + 1))
    };
    text.lines().enumerate().map(metric).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Metric {
        let (loss, gradient_norm, schedule, tokens, epoch, seconds) = (4.5, 1.0, 0.5, 128 * step, 0.25, 0.01);
        let skipped = false;
        Metric::Step(StepReport { step, loss, gradient_norm, schedule, tokens, epoch, seconds, skipped })
    }

    #[test]
    fn what_came_after_the_checkpoint_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(folder.path(), 0).unwrap();
        let held_out = HeldOut { nats_per_token: 4.0, bits_per_byte: 2.0, tokens: 100, bytes: 300 };
        let metrics = [step(1), step(2), Metric::HeldOut { step: 2, loss: held_out }, step(3)];
        metrics.iter().for_each(|metric| log.add(metric.clone()).unwrap());
        assert_eq!(read(folder.path()).unwrap(), metrics);

        let mut log = MetricsLog::open(folder.path(), 2).unwrap();
        assert_eq!(read(folder.path()).unwrap(), metrics[..3]);
        log.add(step(3)).unwrap();
        assert_eq!(read(folder.path()).unwrap(), metrics);
    }

    #[test]
    fn a_skipped_step_can_be_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(folder.path(), 0).unwrap();
        let Metric::Step(report) = step(1) else { unreachable!() };
        log.add(Metric::Step(StepReport { loss: f32::NAN, skipped: true, ..report })).unwrap();
        let [Metric::Step(found)] = read(folder.path()).unwrap()[..] else { panic!("one step") };
        assert!(found.skipped && found.loss.is_nan(), "{found:?}");
    }

    #[test]
    fn an_unfinished_line_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(folder.path(), 0).unwrap();
        log.add(step(1)).unwrap();
        log.file.write_all(b"{\"kind\":\"step\",\"step\":2,\"lo").unwrap();
        MetricsLog::open(folder.path(), 9).unwrap();
        assert_eq!(read(folder.path()).unwrap(), [step(1)]);
    }
}
