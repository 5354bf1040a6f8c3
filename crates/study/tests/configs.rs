//! The studies in `configs/studies` can be started, and the tasks in `configs/tasks` can be asked.

use std::path::{Path, PathBuf};

use engram_eval::tasks::{Ask, FewShot, Task, TaskKind};
use engram_study::{Cost, Kind, StudyConfig, arms};

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
        assert!(
            config.study.seeds.len() >= 3,
            "{}: one seed shows no variation between seeds",
            path.display()
        );
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

/// For each data set of the hub: a record, and what is asked: the prompts, then the choices, the right one marked, or
/// the answer.
const ON_THE_HUB: [(&str, &str, &[&str]); 8] = [
    (
        "arc_easy",
        r#"{"id": "1", "question": "Which is a gas?", "choices": {"text": ["iron", "air", "salt"], "label": ["A", "B", "C"]}, "answerKey": "B"}"#,
        &["Question: Which is a gas?\nAnswer:", "iron", "*air", "salt"],
    ),
    (
        "arc_challenge",
        r#"{"id": "1", "question": "Which is a gas?", "choices": {"text": ["iron", "air"], "label": ["1", "2"]}, "answerKey": "2"}"#,
        &["Question: Which is a gas?\nAnswer:", "iron", "*air"],
    ),
    (
        "openbookqa",
        r#"{"id": "1", "question_stem": "Air is", "choices": {"text": ["a gas", "a metal"], "label": ["A", "B"]}, "answerKey": "A"}"#,
        &["Air is", "*a gas", "a metal"],
    ),
    (
        "boolq",
        r#"{"question": "is air a gas", "answer": true, "passage": "Air is a gas."}"#,
        &["Passage: Air is a gas.\nQuestion: is air a gas?\nAnswer:", "no", "*yes"],
    ),
    (
        "piqa",
        r#"{"goal": "Open a door.", "sol1": "Pull it.", "sol2": "Eat it.", "label": 0}"#,
        &["Question: Open a door.\nAnswer:", "*Pull it.", "Eat it."],
    ),
    (
        "winogrande",
        r#"{"sentence": "Ann thanked Eve, as _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"}"#,
        &["Ann thanked Eve, as Ann", "Ann thanked Eve, as Eve", "had helped.", "*had helped."],
    ),
    (
        "gsm8k",
        r##"{"question": "What is 2000 + 125?", "answer": "It is <<2000+125=2125>>2125.\n#### 2,125"}"##,
        &["Question: What is 2000 + 125?\nAnswer:", "2,125"],
    ),
    (
        "lambada",
        r#"{"text": "\"Look,\" she said\nto  him. \"Look, Ann"}"#,
        &["\"Look,\" she said\nto  him. \"Look,", "Ann"],
    ),
];

#[test]
fn records_of_the_hub_fit_the_tasks() {
    let tasks = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/tasks");
    let with_hub = std::fs::read_dir(&tasks).unwrap().map(|entry| entry.unwrap().path());
    let with_hub = with_hub.filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
    let with_hub = with_hub.filter(|path| Task::load(path).unwrap().hub().is_some()).count();
    assert_eq!(with_hub, ON_THE_HUB.len(), "each has a record here");
    for (name, record, expected) in ON_THE_HUB {
        let task = Task::load(&tasks.join(format!("{name}.toml"))).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("there.jsonl");
        std::fs::write(&there, record).unwrap();
        let records = task.hub().unwrap().records(&there).unwrap().unwrap();
        std::fs::write(task.data_path(Some(folder.path())), records).unwrap();
        let questions =
            task.questions(Some(folder.path()), FewShot { count: Some(0), seed: 0 }, None).unwrap();
        let found: Vec<String> = match &questions[0].ask {
            Ask::Choice { statements, choices, answer } => {
                let mut found: Vec<String> = statements.iter().map(|said| said.prompt.clone()).collect();
                found.dedup();
                let mark = |index| if index == *answer { "*" } else { "" };
                found.extend(
                    choices.iter().enumerate().map(|(index, choice)| format!("{}{choice}", mark(index))),
                );
                found
            }
            Ask::Cloze(statement) => {
                vec![statement.prompt.clone(), statement.continuation.trim_start().to_owned()]
            }
            Ask::Generation { prompt, answers } => [std::slice::from_ref(prompt), answers].concat(),
            Ask::Document { text } => vec![text.clone()],
        };
        assert_eq!(found, expected, "{name}");
    }
}
