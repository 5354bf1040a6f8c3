//! The studies in `configs/studies` can be begun, and the tasks in `configs/tasks` be asked.

use std::path::{Path, PathBuf};

use engram_eval::study::{Cost, Kind, StudyConfig, arms};
use engram_eval::tasks::{Task, TaskKind};

#[allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests
fn studies() -> Vec<(PathBuf, Kind, StudyConfig)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/studies");
    let mut studies = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let config = StudyConfig::load(&path).unwrap();
        let study = &config.study;
        let there = [
            (Kind::Allocation, study.allocation.is_some()),
            (Kind::Memory, study.memory.is_some()),
            (Kind::Placement, study.placement.is_some()),
            (Kind::Ablation, study.ablation.is_some()),
            (Kind::Baselines, study.baselines.is_some()),
        ];
        let kinds = there.into_iter().filter(|(_, there)| *there).map(|(kind, _)| kind);
        studies.extend(kinds.map(|kind| (path.clone(), kind, config.clone())));
    }
    studies
}

#[test]
fn every_study_has_a_configuration_and_every_arm_a_model() {
    let studies = studies();
    for kind in [Kind::Allocation, Kind::Memory, Kind::Placement, Kind::Ablation, Kind::Baselines] {
        assert!(studies.iter().any(|(_, there, _)| *there == kind), "no configuration of {kind:?}");
    }
    for (path, kind, config) in studies {
        let arms = arms(kind, &config, &path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(arms.len() >= 3, "{}: {kind:?}", path.display());
        assert!(config.study.seeds.len() >= 3, "{}: one seed tells nothing of another", path.display());
    }
}

#[test]
fn allocation_costs_the_same_everywhere_and_slots_span_two_decades() {
    for (path, kind, config) in studies() {
        let arms = arms(kind, &config, &path).unwrap();
        match kind {
            Kind::Allocation => {
                assert!(arms.len() >= 6, "the curve has six points");
                for arm in &arms {
                    for (cost, tolerance) in [(Cost::Total, 0.005), (Cost::Flops, 0.01)] {
                        let [found, first] =
                            [arm, &arms[0]].map(|arm| cost.of(&arm.config.model).unwrap() as f64);
                        assert!((found / first - 1.0).abs() <= tolerance, "{}: {cost:?}", arm.name);
                    }
                }
            }
            Kind::Memory => {
                let slots: Vec<f64> = arms.iter().filter_map(|arm| arm.x).collect();
                let [least, most] =
                    [f64::min, f64::max].map(|end| slots.iter().copied().reduce(end).unwrap());
                assert!(most / least >= 99.0, "{least} to {most}");
            }
            _ => {}
        }
    }
}

#[test]
fn every_task_says_what_it_tests() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tasks");
    let mut kinds = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let task = Task::load(&path).unwrap();
            kinds.push(task.kind().unwrap_or_else(|| panic!("{}: no `kind`", path.display())));
        }
    }
    for kind in [TaskKind::Facts, TaskKind::Reading] {
        assert!(
            kinds.iter().filter(|found| **found == kind).count() >= 2,
            "errors over tasks need two of {kind:?}"
        );
    }
}
