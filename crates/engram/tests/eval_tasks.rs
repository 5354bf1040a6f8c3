//! Tasks put to a checkpoint and to a model from outside, as a person would do it.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

mod common;

use std::ops::ControlFlow;

use burn::tensor::Device;
use common::Workshop;
use engram_data::Begin;
use engram_eval::tasks::{
    AskOptions, Cost, FewShot, Outcome, Request, Scorer, TargetScore, Task, ask, read_record,
};
use engram_train::Trained;
use serde_json::Value;

const INPUT: i32 = 2;

/// Who wrote to whom; the first choice is always right.
const CHOICE: &str = "data = 'letters.jsonl'\n[multiple_choice]\nprompt = '{{ who }} wrote'\n\
                      choices = '[\"to New York\", \"the old captain\"]'\nanswer = 'gold'\n";
const LETTERS: &str = "{\"who\": \"Ada\", \"gold\": 0}\n{\"who\": \"Queen Anne\", \"gold\": 0}\n\
                       {\"who\": \"Isaac\", \"gold\": 0}\n";

fn workshop() -> Workshop {
    let workshop = Workshop::trained();
    workshop.write("letters.toml", CHOICE);
    workshop.write("letters.jsonl", LETTERS);
    workshop
}

/// The same but for the last digits: numbers that were written and read again may differ there.
#[track_caller]
fn assert_same(found: &Value, expected: &Value) {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => {
            assert!(found.keys().eq(expected.keys()), "{found:?} {expected:?}");
            found.iter().for_each(|(key, value)| assert_same(value, &expected[key]));
        }
        (Value::Array(found), Value::Array(expected)) => {
            assert_eq!(found.len(), expected.len());
            found.iter().zip(expected).for_each(|(found, expected)| assert_same(found, expected));
        }
        _ => match (found.as_f64(), expected.as_f64()) {
            (Some(found), Some(expected)) => assert!((found - expected).abs() <= 1e-12 * expected.abs()),
            _ => assert_eq!(found, expected),
        },
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

#[test]
fn every_form_is_asked_and_an_interrupted_run_goes_on() {
    let workshop = workshop();
    workshop.write("end.toml", "data = 'letters.jsonl'\n[cloze]\nprompt = '{{ who }} wrote'\ntarget = 'to'");
    workshop.write("text.toml", "data = 'corpus.jsonl'\n[perplexity]\ntext = '{{ text }}'\noverlap = 8");
    let say = "data = 'letters.jsonl'\n[generation]\nprompt = '{{ who }}'\nanswers = 'who'\nstop = ['.']\ntokens = 4";
    workshop.write("say.toml", say);
    let line = "eval tasks run letters.toml end.toml text.toml say.toml --max-records 3 --json";
    let report = json(&workshop.ok(line));
    let tasks = report["tasks"].as_array().unwrap();
    let measures = |task: usize| -> Vec<&str> {
        let measures = tasks[task]["measures"].as_array().unwrap();
        measures.iter().map(|measure| measure["measure"].as_str().unwrap()).collect()
    };
    assert_eq!(measures(0), ["accuracy", "per_character", "per_byte", "per_token"]);
    assert_eq!(measures(1), ["accuracy", "perplexity"]);
    assert_eq!(measures(2), ["bits_per_byte", "token_perplexity"]);
    assert_eq!(measures(3), ["accuracy"]);
    assert!(tasks.iter().all(|task| task["questions"] == 3 && task["cut"] == 0));

    // Kept, and resumed: what was cut off is asked again, and nothing else changes.
    let kept = format!("{line} --out results");
    assert_same(&json(&workshop.ok(&kept)), &report);
    assert_eq!(workshop.list("results"), ["end.jsonl", "letters.jsonl", "say.jsonl", "text.jsonl"]);
    let whole = workshop.read("results/letters.jsonl");
    let lines: Vec<&str> = whole.lines().collect();
    assert_eq!(lines.len(), 4);
    workshop.write("results/letters.jsonl", format!("{}\n{}\n{{\"quest", lines[0], lines[2]));
    assert_same(&json(&workshop.ok(&kept)), &report);
    // In another batch: no other numbers than rounding makes.
    let other = json(&workshop.ok(&format!("{line} --batch 1")));
    let value = |report: &Value| report["tasks"][2]["measures"][0]["value"].as_f64().unwrap();
    assert!((value(&other) - value(&report)).abs() < 1e-5);

    let table = workshop.ok("eval tasks run letters.toml");
    assert!(table.contains("accuracy per byte") && table.contains(" %"), "{table}");
}

#[test]
fn two_checkpoints_are_compared_pair_by_pair() {
    let workshop = workshop();
    workshop.ok("eval tasks run letters.toml --out second");
    workshop.ok("eval tasks run/checkpoints/step-00000006 letters.toml --out first");
    let compared = json(&workshop.ok("eval compare first second --json"));
    let accuracy = &compared[0]["measures"][0];
    assert_eq!((&compared[0]["task"], &accuracy["questions"]), (&"letters".into(), &3.into()));
    let number = |key: &str| accuracy[key].as_f64().unwrap();
    assert!((number("second") - number("first") - number("difference")).abs() < 1e-12);
    let table = workshop.ok("eval compare first/letters.jsonl second/letters.jsonl");
    assert!(table.contains("only second"), "{table}");

    workshop.fails("eval tasks run letters.toml --out first", INPUT, &["letters.jsonl:1", "another model"]);
    workshop.ok("eval tasks run letters.toml --max-records 2 --out fewer");
    workshop.fails("eval compare first fewer", INPUT, &["different questions"]);
    workshop.fails("eval tasks run letters.toml --max-records 2 --out second", INPUT, &["other questions"]);
    let begun: String =
        workshop.read("first/letters.jsonl").lines().take(2).map(|line| format!("{line}\n")).collect();
    workshop.write("first/letters.jsonl", begun);
    workshop.fails("eval compare first second", INPUT, &["1 of 3 answers"]);
    workshop.fails("eval compare first letters.toml", INPUT, &["two folders, or two files"]);
}

#[test]
fn what_cannot_be_asked_is_refused_with_file_and_line() {
    let workshop = workshop();
    let fails = |task: &str, records: &str, words: &[&str]| {
        workshop.write("bad.toml", task);
        workshop.write("bad.jsonl", records);
        workshop.fails("eval tasks run bad.toml", INPUT, words);
    };
    let task = CHOICE.replace("letters", "bad");
    fails(&task.replace("answer = 'gold'", "answer ="), LETTERS, &["bad.toml:5: "]);
    fails(&task.replace("answer", "answers"), LETTERS, &["bad.toml:5: unknown field `answers`"]);
    fails(&task.replace("{{ who }}", "{{ whom }}"), LETTERS, &["bad.jsonl:1: `prompt` of bad.toml"]);
    fails(&task, "", &["bad.jsonl:1: the file has no records"]);
    fails(&task, "{\"who\": \"Ada\", \"gold\": 0}\n{\"who\"", &["bad.jsonl:2: not a JSON object"]);
    fails(&task, "{\"who\": \"Ada\", \"gold\": 2}", &["bad.jsonl:1: ", "2 is not among the choices"]);
    let long = format!("{{\"who\": \"{}\", \"gold\": 0}}", "Ada Lovelace ".repeat(40));
    fails(&task, &long, &["bad.jsonl:1: ", "the model's context is 32", "--cut"]);
    workshop.ok("eval tasks run bad.toml --cut");
    workshop.fails("eval tasks run letters.toml letters.toml", INPUT, &["two tasks are called letters"]);
    workshop.fails(
        "eval tasks run letters.toml --shots 3",
        INPUT,
        &["letters.jsonl:1: 3 records are too few"],
    );
    workshop.fails("eval tasks run nowhere.toml", INPUT, &["nowhere.toml"]);
    workshop.fails("eval tasks nowhere letters.toml", INPUT, &["no complete checkpoint"]);
    workshop.write("model.gguf", "GGML");
    workshop.fails("eval tasks model.gguf letters.toml", INPUT, &["model.gguf", "not a GGUF file"]);
}

#[test]
fn key_tokens_of_one_model_count_for_another() {
    let workshop = workshop();
    let task = "data = 'corpus.jsonl'\n[long_perplexity]\ntext = '{{ text }}'\nshort = 4\nstep = 4\n\
                alpha = 0.01\nbeta = -9.0";
    workshop.write("long.toml", task);
    let line = "eval tasks run long.toml --max-records 4 --json";
    let own = json(&workshop.ok(&format!("{line} --out own")));
    let measures = own["tasks"][0]["measures"].as_array().unwrap();
    assert_eq!(measures[0]["measure"], "long_perplexity");
    assert_eq!(measures[1]["measure"], "token_perplexity");
    // Its own keys are the same keys; another's are not of the same questions.
    let again = json(&workshop.ok(&format!("{line} --keys own/long.jsonl")));
    assert_same(&again, &own);
    workshop.fails(&format!("{line} --keys own/long.jsonl --out own"), INPUT, &["other questions"]);
    workshop.fails("eval tasks run letters.toml --keys own/long.jsonl", INPUT, &["[long_perplexity]"]);
    workshop.write("long.toml", task.replace("short = 4", "short = 40"));
    workshop.fails(line, INPUT, &["corpus.jsonl:1: a short context of 40 tokens", "32"]);
}

#[test]
fn ruler_writes_tasks_that_can_be_asked() {
    let workshop = workshop();
    let config = common::CONFIG.replace("context = 32", "context = 500").replace("steps = 12", "steps = 5");
    workshop.write("long.toml", config);
    workshop.ok("train long.toml --out long");
    let write = "eval ruler long --lengths 400,500 --kinds single,variable_tracking --samples 2";
    let table = workshop.ok(&format!("{write} --out ruler"));
    assert!(table.contains("variable_tracking-500"), "{table}");
    assert_eq!(workshop.list("ruler").len(), 8);
    let report =
        json(&workshop.ok("eval tasks long ruler/single-400.toml ruler/variable_tracking-400.toml --json"));
    assert_eq!(report["tasks"][1]["questions"], 2);
    workshop.ok(&format!("{write} --out again --seed 0"));
    assert_eq!(workshop.read("ruler/single-500.jsonl"), workshop.read("again/single-500.jsonl"));
    workshop.fails(&write.replace("500", "600"), INPUT, &["--out"]);
    // A length beyond the context is left out and named, and nothing may be left.
    let beyond = workshop.run(&format!("{write} --out beyond").replace("500", "600,400"));
    beyond.expect(0, &["--lengths 600 is left out: the model's context is 500"]);
    assert_eq!(workshop.list("beyond").len(), 4);
    let short = workshop.run(&format!("{write} --out r").replace("400,500", "30"));
    short.expect(0, &["the shortest record needs", "nothing is written"]);
    let long = workshop.run(&format!("{write} --out r").replace("400,500", "501,100000"));
    long.expect(0, &["--lengths 501", "--lengths 100000", "nothing is written"]);
    assert!(!workshop.path("r").exists());
    // Lengths that a kind cannot have are left out and named; the others are written.
    let some = workshop.run(&format!("{write} --out some").replace("400,500", "30,400"));
    some.expect(0, &["single-30 is left out: single: the shortest record needs", "variable_tracking-30"]);
    assert_eq!(workshop.list("some").len(), 4);
    workshop.fails("eval ruler long --lengths 300 --kinds needle --out r", INPUT, &["multi_query"]);
    workshop.fails("eval ruler long --lengths 300 --digits 1 --out r", INPUT, &["--digits", "2..=9"]);

    // Questions take part where they are given.
    let all = "eval ruler long --lengths 400 --samples 1";
    let words = ["question_answering is left out: it needs --questions", "the shortest record needs"];
    workshop.run(&format!("{all} --out all")).expect(0, &words);
    let question = |town: usize| {
        format!(
            "{{\"question\": \"Which river is {town}'s?\", \"answers\": [\"R{town}\", \"the R{town}\"], \"context\": \"{}\"}}\n",
            format!("Town {town} lies on R{town}. ").repeat(3)
        )
    };
    workshop.write("towns.jsonl", (0..40).map(question).collect::<String>());
    let table =
        workshop.ok(&format!("{all} --kinds single,question_answering --questions towns.jsonl --out with"));
    assert!(table.contains("question_answering-400"), "{table}");
    assert_eq!(workshop.list("with").len(), 4);
    assert!(workshop.read("with/question_answering-400.toml").contains("compare = \"contains_any\""));
    workshop.ok("eval tasks long with/question_answering-400.toml");
    let by_name = format!("{all} --kinds question_answering --out r");
    workshop.fails(&by_name, INPUT, &["question_answering needs --questions FILE", "SQuAD"]);
    workshop.fails(
        &format!("{by_name} --questions letters.jsonl"),
        INPUT,
        &["letters.jsonl:1: missing field"],
    );
    workshop.fails(
        &format!("{all} --kinds single --questions towns.jsonl --out r"),
        INPUT,
        &["--kinds leaves out"],
    );
}

/// The differentiable forward pass, which computes the whole text again for each token.
struct WholeModel<'a>(&'a Trained);

impl Scorer for WholeModel<'_> {
    fn identity(&self) -> String {
        self.0.identity().to_owned()
    }

    fn context(&self) -> usize {
        self.0.config().model.context
    }

    fn begin(&self) -> Begin {
        self.0.begin()
    }

    fn cost(&self) -> Cost {
        Cost::PaddedTokens
    }

    fn encode(&self, text: &str) -> engram_eval::tasks::Result<Vec<u32>> {
        Ok(self.0.tokenizer().encode(text).unwrap())
    }

    fn decode(&self, tokens: &[u32]) -> engram_eval::tasks::Result<String> {
        Ok(self.0.tokenizer().decode(tokens).unwrap())
    }

    fn score(&self, _: &[&Request]) -> engram_eval::tasks::Result<Vec<Vec<TargetScore>>> {
        unreachable!("these tasks ask for texts only")
    }

    fn proceed(
        &self,
        prompts: &[&[u32]],
        limit: usize,
        finished: &mut dyn FnMut(usize, &[u32]) -> bool,
    ) -> engram_eval::tasks::Result<Vec<Vec<u32>>> {
        let end = self.0.tokenizer().end_of_text();
        let text = |(index, prompt): (usize, &&[u32])| {
            let (mut tokens, start) = (prompt.to_vec(), prompt.len());
            while tokens.len() - start < limit {
                let logits = self.0.next_logits(&tokens).unwrap();
                // Of equal ones the first, as everywhere.
                let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                if best as u32 == end {
                    break;
                }
                tokens.push(best as u32);
                if finished(index, &tokens[start..]) {
                    break;
                }
            }
            tokens.split_off(start)
        };
        Ok(prompts.iter().enumerate().map(text).collect())
    }
}

/// The whole model's answer, computed again for each token.
fn said_by_the_whole_model(model: &Trained, task: &Task) -> Vec<Outcome> {
    let questions = task.questions(None, FewShot { count: None, seed: 0 }, None).unwrap();
    let all: Vec<usize> = (0..questions.len()).collect();
    let mut outcomes = Vec::new();
    let mut each = |outcome| {
        outcomes.push(outcome);
        Ok(())
    };
    let mut on = |_, _| ControlFlow::Continue(());
    let options = AskOptions { cut: true, ..AskOptions::default() };
    ask(&WholeModel(model), (task, &questions), &all, options, &mut each, &mut on).unwrap();
    outcomes.sort_by_key(|outcome| outcome.question);
    outcomes
}

#[test]
fn texts_are_those_of_the_whole_model() {
    let workshop = workshop();
    // As long as the context: each is cut, and there are more than are continued at once.
    let long = "data = 'corpus.jsonl'\n[generation]\nprompt = '{{ text }}'\nanswers = 'text'\nstop = ['.']\ntokens = 9";
    workshop.write("long.toml", long);
    let short =
        "data = 'letters.jsonl'\n[generation]\nprompt = '{{ who }}'\nanswers = 'who'\nstop = []\ntokens = 20";
    workshop.write("short.toml", short);
    for (memory, out) in [("", "on"), ("--without-memory", "off")] {
        workshop.ok(&format!("eval tasks run long.toml short.toml --cut {memory} --out {out}"));
        let mut model = Trained::open(&workshop.path("run"), &Device::flex()).unwrap();
        if out == "off" {
            model.switch_memory_off().unwrap();
        }
        for name in ["long", "short"] {
            let task = Task::load(&workshop.path(&format!("{name}.toml"))).unwrap();
            let expected = said_by_the_whole_model(&model, &task);
            let (_, mut found) = read_record(&workshop.path(&format!("{out}/{name}.jsonl"))).unwrap();
            found.sort_by_key(|outcome| outcome.question);
            assert_eq!(found, expected, "{name}, memory {out}");
        }
    }
    assert_ne!(workshop.read("on/long.jsonl"), workshop.read("off/long.jsonl"));
}
