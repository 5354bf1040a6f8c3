//! Studies that measure where memory pays.
//!
//! A study is a grid of *arms* and seeds. An arm is a run's configuration, made from a common base: by a share of
//! experts and memory in a common budget, by a number of rows, or by a change that the file states. Every arm is
//! trained with every seed, at rates chosen by one stated rule, and measured on the same held-out documents. So
//! differences are paired ([`statistics`](engram_eval::statistics)).
//!
//! [`Plan::of`] reports every error it can before the first run starts. [`Workers`] execute runs, several at a time. A
//! [`StudyFolder`] holds the results; a killed study resumes from it and ends with the same results.

mod arm;
mod budget;
mod conduct;
mod config;
mod error;
mod execute;
mod figures;
mod findings;
mod folder;
mod graft;
mod measure;
mod patch;
mod plan;
mod provenance;
mod report;
mod results;

pub use arm::{Arm, Costs, Kind, arms};
pub use budget::{Cost, Solve};
pub use conduct::{Remaining, write_up};
pub use config::{Allocation, Grid, GridArm, MemorySweep, RateRule, StudyConfig, StudyTable};
pub use error::{Error, Result};
pub use execute::{Event, Speed, Watch, Workers};
pub use figures::figures;
pub use findings::{ArmFinding, ClassFinding, Findings, Fit, Interval};
pub use folder::StudyFolder;
pub use graft::{
    GraftArm, GraftArmFinding, GraftFindings, GraftMaterial, GraftResult, GraftStudy, GraftTable, GraftWatch,
    TokenQuestion,
};
pub use measure::{Class, Documents};
pub use patch::Patch;
pub use plan::{Factor, Plan, Run};
pub use provenance::Provenance;
pub use results::{ResultsLog, RunResult, read_results};
