//! The origin of a study's results.

use serde::{Deserialize, Serialize};

/// Where and with what a study was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The command that repeats it.
    pub command: String,
    /// The version and commit of the program that wrote the report.
    pub program: String,
    /// Number of runs at a time, and of threads per run.
    pub workers: String,
    /// The text of the configuration file.
    pub configuration: String,
}
