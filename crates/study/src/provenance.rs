//! What made the results of a study.

use serde::{Deserialize, Serialize};

/// Where a study was made, and with what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The command that repeats it.
    pub command: String,
    /// The version and commit of the program that wrote it up.
    pub program: String,
    /// Runs at a time, and threads of each.
    pub workers: String,
    /// The configuration file, as it is.
    pub configuration: String,
}
