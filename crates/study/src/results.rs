//! `results.jsonl`: one line per finished run.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::arm::Costs;
use crate::error::{Error, Result};
use crate::measure::Documents;

/// The result of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunResult {
    /// The run's name.
    pub run: String,
    /// Its arm.
    pub arm: String,
    /// Its seed.
    pub seed: u64,
    /// Factor of the base's rates.
    pub factor: f32,
    /// Whether it is a pilot.
    pub pilot: bool,
    /// The cost of its arm.
    pub costs: Costs,
    /// Steps taken.
    pub steps: u64,
    /// Training tokens.
    pub training_tokens: u64,
    /// Seconds since it was last started or resumed.
    pub seconds: f64,
    /// The program, machine and device that finished it; empty in older results.
    #[serde(default)]
    pub origin: String,
    /// Held-out loss; none if it diverged.
    pub nats_per_token: Option<f64>,
    /// The same in bits per byte.
    pub bits_per_byte: Option<f64>,
    /// The held-out documents, in order; empty if it diverged.
    pub documents: Documents,
}

/// The open file, for appending.
#[derive(Debug)]
pub struct ResultsLog {
    path: PathBuf,
    file: Mutex<File>,
}

impl ResultsLog {
    /// Opens the file in `folder`. Removes an incomplete last line: its run is measured again.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = path(folder);
        let open = || -> std::io::Result<File> {
            let file = OpenOptions::new().read(true).append(true).create(true).open(&path)?;
            let text = std::fs::read(&path)?;
            let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            file.set_len(whole as u64)?;
            Ok(file)
        };
        let file = open().map_err(Error::file("open", &path))?;
        Ok(Self { file: Mutex::new(file), path })
    }

    /// Adds a line and flushes it to disk.
    ///
    /// # Errors
    /// When the file system fails.
    pub fn add(&self, result: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(result).expect("a result is representable as JSON");
        line.push('\n');
        // A thread that panicked with the lock has at worst left an incomplete line.
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.write_all(line.as_bytes())
            .and_then(|()| file.sync_data())
            .map_err(Error::file("write", &self.path))
    }
}

/// The results in `folder`; empty if there is no file yet. An incomplete last line is left out.
///
/// # Errors
/// When the file cannot be read, or a line is not a result.
pub fn read_results(folder: &Path) -> Result<Vec<RunResult>> {
    read_lines(folder)
}

/// The results of any kind in `folder`, as [`read_results`].
pub(crate) fn read_lines<T: DeserializeOwned>(folder: &Path) -> Result<Vec<T>> {
    let path = path(folder);
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(Error::file("read", &path))?,
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let result = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| Error::Results {
            path: path.clone(),
            line: index + 1,
            problem: error.to_string(),
        })
    };
    whole.lines().enumerate().map(result).collect()
}

fn path(folder: &Path) -> PathBuf {
    folder.join("results.jsonl")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::measure::Class;

    /// A result of documents of 10 tokens and 40 bytes each.
    pub(crate) fn result(arm: &str, seed: u64, nats: &[f64]) -> RunResult {
        let count = nats.len();
        let half = nats.iter().map(|nats| nats / 2.0).collect();
        let seen = Class { occurrences: (1, Some(9)), tokens: vec![5; count], nats: half };
        let documents = Documents {
            tokens: vec![10; count],
            bytes: vec![40; count],
            nats: nats.to_vec(),
            classes: vec![seen],
        };
        RunResult {
            run: format!("{arm}.seed-{seed}"),
            arm: arm.to_owned(),
            seed,
            factor: 1.0,
            pilot: false,
            costs: Costs {
                total_parameters: 10,
                active_parameters: 5,
                expert_parameters: 2,
                memory_parameters: 3,
                memory_rows: 3,
                routed_experts: 4,
                forward_flops_per_token: 20,
            },
            steps: 5,
            training_tokens: 100,
            seconds: 1.5,
            origin: "here".to_owned(),
            nats_per_token: documents.nats_per_token(),
            bits_per_byte: documents.bits_per_byte(),
            documents,
        }
    }

    #[test]
    fn lines_come_back_and_an_unfinished_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read_results(folder.path()).unwrap(), []);
        let (one, two) = (result("a", 0, &[20.0, 22.0]), result("b", 0, &[19.5, 21.0]));
        let log = ResultsLog::open(folder.path()).unwrap();
        log.add(&one).unwrap();
        log.file.lock().unwrap().write_all(b"{\"run\":\"b.se").unwrap();
        assert_eq!(read_results(folder.path()).unwrap(), std::slice::from_ref(&one));

        let log = ResultsLog::open(folder.path()).unwrap();
        log.add(&two).unwrap();
        assert_eq!(read_results(folder.path()).unwrap(), [one, two]);
    }

    #[test]
    fn a_foreign_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(path(folder.path()), "{\"kind\":\"step\"}\n").unwrap();
        let message = read_results(folder.path()).unwrap_err().to_string();
        assert!(message.contains("results.jsonl:1: unknown field `kind`"), "{message}");
    }
}
