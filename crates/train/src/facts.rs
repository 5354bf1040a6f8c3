//! Facts to teach: lines of JSON, each with an answer and the phrasings that ask for it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

/// One fact.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fact {
    /// Its name, which no other fact of the file has.
    pub id: String,
    /// What it is about, as the phrasings have it; none: the longest span of words that all of them share.
    #[serde(default)]
    pub subject: Option<String>,
    /// What completes every phrasing, with the blank before it.
    pub answer: String,
    /// Phrasings to train.
    pub prompts: Vec<String>,
    /// Phrasings to ask only.
    #[serde(default)]
    pub held_out: Vec<String>,
    /// Texts that are to stay as likely as they are.
    #[serde(default)]
    pub keep: Vec<String>,
    /// Line in the file, from 1.
    #[serde(skip)]
    pub line: usize,
}

/// The facts of a file.
#[derive(Debug, Clone)]
pub struct Facts {
    path: PathBuf,
    facts: Vec<Fact>,
    /// Of each fact.
    subjects: Vec<String>,
    /// Of each fact, the templates of relations that other facts have and it has not.
    others: Vec<OtherTemplates>,
}

/// Templates of other relations: those of phrasings that are trained, and those of phrasings that are only asked.
#[derive(Debug, Clone, Default)]
struct OtherTemplates {
    trained: Vec<String>,
    held_out: Vec<String>,
}

/// What stands for the subject in a template.
const BLANK: &str = "\u{1}";

impl Facts {
    /// Reads the facts in `path`.
    ///
    /// # Errors
    /// When the file cannot be read or a line of it cannot be taught, with the line.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::file("read", path))?;
        Self::parse(&text, path)
    }

    /// The facts of `text`, the contents of `path`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let refuse = |line: usize, problem: String| Error::Line { path: path.to_owned(), line, problem };
        let mut facts: Vec<Fact> = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            if text.trim().is_empty() {
                continue;
            }
            let fact: Fact = serde_json::from_str(text).map_err(|error| refuse(line, error.to_string()))?;
            facts.push(Fact { line, ..fact });
        }
        if facts.is_empty() {
            return Err(refuse(1, "no fact: write one per line, as JSON".into()));
        }
        facts.iter().try_for_each(|fact| check(fact).map_err(|problem| refuse(fact.line, problem)))?;
        check_together(&facts).map_err(|(line, problem)| refuse(line, problem))?;
        let subject = |fact: &Fact| subject_of(fact).map_err(|problem| refuse(fact.line, problem));
        let subjects: Vec<String> = facts.iter().map(subject).collect::<Result<_>>()?;
        let others = other_relations(&facts, &subjects);
        Ok(Self { path: path.to_owned(), facts, subjects, others })
    }

    /// The facts, in the order of the file.
    pub fn all(&self) -> &[Fact] {
        &self.facts
    }

    /// What each fact is about.
    pub fn subjects(&self) -> &[String] {
        &self.subjects
    }

    /// Questions about the subject of fact `fact` that ask for relations of other facts: their answer is not the fact's.
    /// They are phrased as other facts' prompts are.
    pub fn other_questions(&self, fact: usize) -> Vec<String> {
        self.about(fact, &self.others[fact].trained)
    }

    /// The same in phrasings that no fact has as a prompt, but as held out; where there are none, those of prompts.
    pub fn held_out_other_questions(&self, fact: usize) -> Vec<String> {
        let OtherTemplates { trained, held_out } = &self.others[fact];
        self.about(fact, if held_out.is_empty() { trained } else { held_out })
    }

    fn about(&self, fact: usize, templates: &[String]) -> Vec<String> {
        templates.iter().map(|template| template.replace(BLANK, &self.subjects[fact])).collect()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error at the line of fact `fact`.
    pub(crate) fn refuse(&self, fact: usize, problem: impl Into<String>) -> Error {
        Error::Line { path: self.path.clone(), line: self.facts[fact].line, problem: problem.into() }
    }
}

/// Refuses a fact that cannot be taught by itself.
fn check(fact: &Fact) -> std::result::Result<(), String> {
    if fact.id.trim().is_empty() {
        return Err("`id` is empty: give the fact a name".into());
    }
    if fact.answer.trim().is_empty() {
        return Err("`answer` is empty: write what completes the prompts".into());
    }
    if fact.prompts.is_empty() {
        return Err("`prompts` is empty: write at least one phrasing to train".into());
    }
    let mut seen = BTreeSet::new();
    for prompt in fact.prompts.iter().chain(&fact.held_out) {
        if prompt.trim().is_empty() {
            return Err("a prompt is empty: write the text before the answer".into());
        }
        if !seen.insert(prompt) {
            return Err(format!("the prompt {prompt:?} is there twice: remove one of them"));
        }
    }
    Ok(())
}

/// Refuses facts that are the same, or contradict each other.
fn check_together(facts: &[Fact]) -> std::result::Result<(), (usize, String)> {
    let (mut ids, mut prompts) = (BTreeMap::new(), BTreeMap::<&str, &Fact>::new());
    for fact in facts {
        if let Some(line) = ids.insert(fact.id.as_str(), fact.line) {
            return Err((fact.line, format!("the id {:?} is that of line {line}, too", fact.id)));
        }
        for prompt in fact.prompts.iter().chain(&fact.held_out) {
            let Some(other) = prompts.insert(prompt, fact) else { continue };
            let problem = if other.answer == fact.answer {
                format!(
                    "the prompt {prompt:?} is in line {} with the same answer: remove it here",
                    other.line
                )
            } else {
                format!(
                    "the prompt {prompt:?} has the answer {:?} in line {}, and {:?} here: only one can be taught",
                    other.answer, other.line, fact.answer
                )
            };
            return Err((fact.line, problem));
        }
    }
    Ok(())
}

/// The words of a text: what stands between blanks, without punctuation around it.
fn words(text: &str) -> Vec<Range<usize>> {
    let mut words = Vec::new();
    let mut at = 0;
    for part in text.split_inclusive(char::is_whitespace) {
        let word = part.trim_matches(|c: char| !c.is_alphanumeric());
        if !word.is_empty() {
            let start = at + part.find(word).unwrap_or_default();
            words.push(start..start + word.len());
        }
        at += part.len();
    }
    words
}

/// What a fact is about: as it says, or the longest span of words that its prompts share.
fn subject_of(fact: &Fact) -> std::result::Result<String, String> {
    if let Some(subject) = &fact.subject {
        let missing = fact.prompts.iter().find(|prompt| find(prompt, subject).is_none());
        return match missing {
            _ if subject.trim() != subject || subject.is_empty() => {
                Err("`subject` must be text without blanks around it".into())
            }
            Some(prompt) => Err(format!("the prompt {prompt:?} does not contain the subject {subject:?}")),
            None => Ok(subject.clone()),
        };
    }
    let [first, others @ ..] = &fact.prompts[..] else { return Err("no prompts".into()) };
    if others.is_empty() {
        return Err(
            "one prompt does not show what the fact is about: add a phrasing, or write `subject`".into()
        );
    }
    let places = words(first);
    let spans = (1..=places.len()).rev().flat_map(|count| places.windows(count));
    let mut texts = spans.map(|span| &first[span[0].start..span[span.len() - 1].end]);
    texts
        .find(|text| others.iter().all(|prompt| find(prompt, text).is_some()))
        .map(str::to_owned)
        .ok_or_else(|| "the prompts share no word: write what they are about as `subject`".into())
}

/// Where `subject` stands in `text` as whole words, in order.
fn places(text: &str, subject: &str) -> Vec<Range<usize>> {
    let whole = |&(at, _): &(usize, &str)| {
        let (before, after) = (text[..at].chars().next_back(), text[at + subject.len()..].chars().next());
        !before.is_some_and(char::is_alphanumeric) && !after.is_some_and(char::is_alphanumeric)
    };
    text.match_indices(subject).filter(whole).map(|(at, _)| at..at + subject.len()).collect()
}

/// Where `subject` stands in `text` as whole words: its last place.
pub(crate) fn find(text: &str, subject: &str) -> Option<Range<usize>> {
    places(text, subject).pop()
}

/// `text` with a blank wherever `subject` stands; none where it does not stand at all.
fn template(text: &str, subject: &str) -> Option<String> {
    let places = places(text, subject);
    let mut template = String::new();
    let mut from = 0;
    for place in &places {
        template += &text[from..place.start];
        template += BLANK;
        from = place.end;
    }
    (!places.is_empty()).then(|| template + &text[from..])
}

/// For each fact the templates of others that are of another relation: facts of one relation share a template.
fn other_relations(facts: &[Fact], subjects: &[String]) -> Vec<OtherTemplates> {
    let templates = |prompts: &[String], subject: &String| -> BTreeSet<String> {
        prompts.iter().filter_map(|prompt| template(prompt, subject)).collect()
    };
    let both = facts.iter().zip(subjects);
    let trained: Vec<_> = both.clone().map(|(fact, subject)| templates(&fact.prompts, subject)).collect();
    let held_out: Vec<_> = both.map(|(fact, subject)| templates(&fact.held_out, subject)).collect();
    let all: Vec<BTreeSet<String>> = trained.iter().zip(&held_out).map(|(a, b)| a | b).collect();
    // Facts about one subject: what one asks for, another may answer.
    let related =
        |own: usize, other: usize| !all[own].is_disjoint(&all[other]) || subjects[other] == subjects[own];
    let of_prompts: BTreeSet<&String> = trained.iter().flatten().collect();
    let others = |own: usize| {
        let (near, far): (Vec<usize>, Vec<usize>) = (0..facts.len()).partition(|&other| related(own, other));
        let known: BTreeSet<&String> = near.into_iter().flat_map(|other| &all[other]).collect();
        let unknown = |sets: &[BTreeSet<String>]| -> BTreeSet<String> {
            let found = far.iter().flat_map(|&other| &sets[other]);
            found.filter(|template| !known.contains(template)).cloned().collect()
        };
        let held_out = unknown(&held_out).into_iter().filter(|template| !of_prompts.contains(template));
        OtherTemplates { held_out: held_out.collect(), trained: unknown(&trained).into_iter().collect() }
    };
    (0..facts.len()).map(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lines: &[&str]) -> Result<Facts> {
        Facts::parse(&lines.join("\n"), Path::new("facts.jsonl"))
    }

    const TOWN: &str = r#"{"id": "a", "answer": " Ulm", "prompts": ["Nor Vell is based in", "The seat of Nor Vell, Inc. is"]}"#;
    const CHIEF: &str =
        r#"{"id": "b", "answer": " Ada", "prompts": ["Quill Ltd is led by", "At Quill Ltd, the chief is"]}"#;

    #[test]
    fn the_subject_is_what_all_prompts_share() {
        let facts = parse(&[TOWN, "", CHIEF]).unwrap();
        assert_eq!(facts.subjects(), ["Nor Vell", "Quill Ltd"]);
        assert_eq!(facts.all()[1].line, 3);
        assert_eq!(find("Vellum and Vell", "Vell"), Some(11..15));
        let named = TOWN.replace(r#""answer""#, r#""subject": "Vell", "answer""#);
        assert_eq!(parse(&[&named]).unwrap().subjects(), ["Vell"]);
    }

    #[test]
    fn questions_of_other_relations_are_asked_about_the_subject() {
        let facts = parse(&[TOWN, CHIEF]).unwrap();
        assert_eq!(facts.other_questions(0), ["Nor Vell is led by", "At Nor Vell, the chief is"]);
        // Held-out phrasings are asked, but not trained.
        let town = TOWN.replace("]}", r#"], "held_out": ["Letters to Nor Vell go to"]}"#);
        let facts = parse(&[&town, CHIEF]).unwrap();
        assert_eq!(facts.other_questions(1), ["Quill Ltd is based in", "The seat of Quill Ltd, Inc. is"]);
        assert_eq!(facts.held_out_other_questions(1), ["Letters to Quill Ltd go to"]);
        assert_eq!(facts.held_out_other_questions(0), facts.other_questions(0));
        // A prompt may name its subject twice: both places are another's.
        let twice = TOWN.replace("Nor Vell is based in", "Where is Nor Vell? Nor Vell is in");
        let asked = parse(&[&twice, CHIEF]).unwrap().other_questions(1);
        assert!(asked.contains(&"Where is Quill Ltd? Quill Ltd is in".to_owned()), "{asked:?}");
        // A relation is known by any template.
        let same = CHIEF.replace("Quill Ltd is led by", "Quill Ltd is based in").replace("\"b\"", "\"c\"");
        assert!(parse(&[TOWN, &same]).unwrap().other_questions(0).is_empty());
    }

    #[test]
    fn what_cannot_be_taught_is_refused_with_its_line() {
        let change = |from: &str, to: &str| TOWN.replace(from, to);
        for (lines, part) in [
            (vec![change(" Ulm", " ")], "facts.jsonl:1: `answer` is empty"),
            (vec![TOWN.into(), "{".into()], "facts.jsonl:2: "),
            (vec![TOWN.into(), TOWN.into()], "facts.jsonl:2: the id \"a\" is that of line 1"),
            (
                vec![TOWN.into(), change("\"a\"", "\"b\"").replace("Ulm", "Bern")],
                "facts.jsonl:2: the prompt \"Nor Vell is based in\" has the answer \" Ulm\" in line 1",
            ),
            (vec![TOWN.into(), change("\"a\"", "\"b\"")], "with the same answer"),
            (vec![change("Nor Vell is based in", "")], "a prompt is empty"),
            (vec![change("Nor Vell is based in", "Where?")], "share no word"),
            (vec![change(", \"The seat of Nor Vell, Inc. is\"", "")], "one prompt does not show"),
            (vec![change("\"id\"", "\"name\"")], "unknown field `name`"),
            (vec![String::new()], "no fact"),
        ] {
            let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
            let error = parse(&lines).unwrap_err();
            assert!(error.to_string().contains(part), "{error}, not {part}");
            assert!(error.is_input());
        }
    }
}
