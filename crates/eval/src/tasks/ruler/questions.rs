//! Questions about one paragraph among others (RULER, section 3, question answering).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use super::super::data_file;
use super::super::error::{Error, Result};

/// Paragraphs, and questions that one of them answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Questions {
    path: PathBuf,
    /// Each once.
    paragraphs: Vec<Paragraph>,
    questions: Vec<Question>,
    unanswerable: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Paragraph {
    /// Its article.
    title: Option<String>,
    text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Question {
    text: String,
    /// Right answers; any of them counts.
    answers: Vec<String>,
    paragraph: usize,
}

/// A record of JSON lines.
#[derive(Deserialize)]
struct Line {
    question: String,
    answers: Answers,
    context: String,
    title: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "`answers` must be a list of texts, or hold one as `text`")]
enum Answers {
    List(Vec<String>),
    Spans { text: Vec<String> },
}

/// SQuAD's format (Rajpurkar et al. 2016, arXiv 1606.05250; 2018, arXiv 1806.03822).
#[derive(Deserialize)]
struct Squad {
    data: Vec<SquadArticle>,
}

#[derive(Deserialize)]
struct SquadArticle {
    title: String,
    paragraphs: Vec<SquadParagraph>,
}

#[derive(Deserialize)]
struct SquadParagraph {
    context: String,
    qas: Vec<SquadQuestion>,
}

#[derive(Deserialize)]
struct SquadQuestion {
    question: String,
    answers: Vec<SquadAnswer>,
    /// Whether its answers are only plausible, not right.
    #[serde(default)]
    is_impossible: bool,
}

#[derive(Deserialize)]
struct SquadAnswer {
    text: String,
}

impl Questions {
    /// Reads `path`: SQuAD's `.json`, or records with `question`, `answers`, `context` and optionally `title`, the
    /// title of the context's article. Questions without an answer are left out; their paragraphs are kept.
    ///
    /// # Errors
    /// A file that cannot be read, an invalid record (with its line), or no question with an answer.
    pub fn read(path: &Path) -> Result<Self> {
        let (paragraphs, questions) = (Vec::new(), Vec::new());
        let mut all = Self { path: path.to_owned(), paragraphs, questions, unanswerable: 0 };
        let mut places = HashMap::new();
        if path.extension().is_some_and(|extension| extension == "json") {
            all.add_squad(&mut places)?;
        } else {
            all.add_records(&mut places)?;
        }
        if all.questions.is_empty() {
            return Err(Error::line(path, 1, "no question that has an answer"));
        }
        Ok(all)
    }

    /// Questions that have an answer.
    pub fn count(&self) -> usize {
        self.questions.len()
    }

    /// Number of questions left out because they have no answer.
    pub fn unanswerable(&self) -> usize {
        self.unanswerable
    }

    /// Number of different paragraphs.
    pub fn paragraphs(&self) -> usize {
        self.paragraphs.len()
    }

    /// Their file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn add_records(&mut self, places: &mut HashMap<String, usize>) -> Result<()> {
        for record in data_file::read(&self.path, None)? {
            let line = serde_json::from_value::<Line>(record.fields.into())
                .map_err(|error| Error::line(&self.path, record.line, error.to_string()))?;
            let paragraph = self.place(places, line.title, line.context);
            let (Answers::List(answers) | Answers::Spans { text: answers }) = line.answers;
            if answers.iter().any(|answer| answer.trim().is_empty()) {
                return Err(Error::line(
                    &self.path,
                    record.line,
                    "an answer is empty: any text would contain it",
                ));
            }
            self.add(line.question, answers, paragraph);
        }
        Ok(())
    }

    fn add_squad(&mut self, places: &mut HashMap<String, usize>) -> Result<()> {
        let text = std::fs::read_to_string(&self.path).map_err(Error::file("read", &self.path))?;
        let squad: Squad = serde_json::from_str(&text).map_err(|error| {
            let problem = format!("not SQuAD's JSON: {error}; for one record per line, use .jsonl");
            Error::line(&self.path, error.line().max(1), problem)
        })?;
        for article in squad.data {
            for SquadParagraph { context, qas } in article.paragraphs {
                let paragraph = self.place(places, Some(article.title.clone()), context);
                for SquadQuestion { question, answers, is_impossible } in qas {
                    let answers = answers.into_iter().map(|answer| answer.text);
                    let answers = answers.filter(|answer| !is_impossible && !answer.trim().is_empty());
                    self.add(question, answers.collect(), paragraph);
                }
            }
        }
        Ok(())
    }

    /// The place of a paragraph, which may exist already.
    fn place(&mut self, places: &mut HashMap<String, usize>, title: Option<String>, text: String) -> usize {
        *places.entry(text).or_insert_with_key(|text| {
            self.paragraphs.push(Paragraph { title, text: text.clone() });
            self.paragraphs.len() - 1
        })
    }

    fn add(&mut self, text: String, mut answers: Vec<String>, paragraph: usize) {
        if answers.is_empty() {
            self.unanswerable += 1;
            return;
        }
        let mut seen = std::collections::HashSet::new();
        answers.retain(|answer| seen.insert(answer.clone()));
        self.questions.push(Question { text, answers, paragraph });
    }

    /// Question number `index` in an order drawn by `seed`, with its paragraph among `documents` in all: first those of
    /// its article, as published.
    pub(super) fn ask(
        &self,
        documents: usize,
        (seed, index): (u64, u64),
        random: &mut ChaCha8Rng,
    ) -> (String, Vec<String>) {
        let mut order: Vec<usize> = (0..self.questions.len()).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let question = &self.questions[order[index as usize % order.len()]];
        let right = &self.paragraphs[question.paragraph];
        let is_near = |other: &Paragraph| right.title.is_some() && other.title == right.title;
        let others = (0..self.paragraphs.len()).filter(|&place| place != question.paragraph);
        let (mut near, mut far): (Vec<_>, Vec<_>) =
            others.partition(|&place| is_near(&self.paragraphs[place]));
        near.shuffle(random);
        far.shuffle(random);
        let mut shown: Vec<usize> = near.into_iter().chain(far).take(documents.saturating_sub(1)).collect();
        // Shuffle all of them; otherwise those of the article would stand together.
        shown.shuffle(random);
        shown.insert(random.random_range(0..=shown.len()), question.paragraph);
        let document = |(number, &place): (usize, &usize)| {
            format!("Document {}:\n{}\n", number + 1, self.paragraphs[place].text.trim())
        };
        let text: Vec<String> = shown.iter().enumerate().map(document).collect();
        let prompt = format!(
            "One of these documents answers a question. Answer it with as few words as you can.\n\n{}\n\
             Question: {}\nAnswer:",
            text.join("\n"),
            question.text.trim()
        );
        (prompt, question.answers.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::tests::{haystack_with, words};
    use super::super::{Haystack, Ruler};
    use super::*;

    fn read(name: &str, text: &str) -> Result<Questions> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), text).unwrap();
        Questions::read(&folder.path().join(name))
    }

    #[test]
    fn the_answer_is_in_one_document_among_those_of_its_article() {
        let haystack = haystack_with(30, 5);
        let kind = Ruler::QuestionAnswering;
        let records = kind.records(&haystack, (200, 10), 7, &words).unwrap();
        let asked: HashSet<&str> =
            records.iter().map(|record| record.prompt.rsplit("Question: ").next().unwrap()).collect();
        assert_eq!(asked.len(), 10, "no question is asked twice");
        let mut places = HashSet::new();
        for record in &records {
            let documents: Vec<&str> = record.prompt.split("Document ").skip(1).collect();
            assert!(documents.len() > 5);
            let town = record.prompt.rsplit("through ").next().unwrap().trim_end_matches("?\nAnswer:");
            let right: Vec<usize> =
                (0..documents.len()).filter(|&at| documents[at].contains(&format!("{town} lies"))).collect();
            assert_eq!(right.len(), 1, "{town}");
            places.insert(right[0]);
            assert!(record.answers.iter().any(|answer| documents[right[0]].contains(answer.as_str())));
            let number: usize = town.trim_start_matches('t').parse().unwrap();
            let near = (number / 5 * 5..number / 5 * 5 + 5).map(|near| format!("t{near} lies"));
            assert!(near.into_iter().all(|near| record.prompt.contains(&near)), "its article's come first");
        }
        assert!(places.len() > 3, "{places:?}");
    }

    #[test]
    fn the_same_distractors_stay_as_more_come() {
        let haystack = haystack_with(30, 1);
        let texts = [2, 5, 30].map(|documents| {
            let mut random = ChaCha8Rng::seed_from_u64(3);
            let questions = haystack.questions().unwrap();
            questions.ask(documents, (3, 0), &mut random).0
        });
        let towns = |text: &str| -> HashSet<String> {
            let lies = text.split(" lies").filter_map(|before| before.rsplit('\n').next());
            lies.filter(|word| word.starts_with('t')).map(str::to_owned).collect()
        };
        assert!(
            towns(&texts[0]).is_subset(&towns(&texts[1])) && towns(&texts[1]).is_subset(&towns(&texts[2]))
        );
        assert_eq!(texts.each_ref().map(|text| towns(text).len()), [2, 5, 30]);
    }

    #[test]
    fn squads_own_files_are_read() {
        let squad = r#"{"version": "v2.0", "data": [{"title": "Rivers", "paragraphs": [
            {"context": "The Rhine flows north.", "qas": [
                {"id": "1", "question": "Where to?", "answers": [{"text": "north", "answer_start": 16}, {"text": "north", "answer_start": 16}]},
                {"id": "2", "question": "Why?", "answers": [], "plausible_answers": [{"text": "Rhine", "answer_start": 4}], "is_impossible": true}]},
            {"context": "The Po flows east.", "qas": []}]}]}"#;
        let found = read("dev.json", squad).unwrap();
        assert_eq!((found.count(), found.unanswerable(), found.paragraphs()), (1, 1, 2));
        let lines = "{\"question\": \"Where to?\", \"answers\": [\"north\"], \"context\": \"The Rhine flows north.\", \"title\": \"Rivers\"}\n\
                     {\"question\": \"Why?\", \"answers\": {\"text\": [], \"answer_start\": []}, \"context\": \"The Po flows east.\", \"title\": \"Rivers\"}\n";
        let same = read("dev.jsonl", lines).unwrap();
        assert_eq!((&found.paragraphs, &found.questions), (&same.paragraphs, &same.questions));
        assert_eq!(same.unanswerable(), 1);
    }

    #[test]
    fn what_is_no_question_is_named_with_its_line() {
        let good = "{\"question\": \"q\", \"answers\": [\"a\"], \"context\": \"c\"}\n";
        let cases = [
            (
                "a.jsonl",
                format!("{good}{{\"question\": \"q\", \"answers\": [\"a\"]}}"),
                "a.jsonl:2: missing field `context`",
            ),
            (
                "a.jsonl",
                format!("{good}{}", good.replace("[\"a\"]", "3")),
                "a.jsonl:2: `answers` must be a list",
            ),
            ("a.jsonl", format!("{good}{}", good.replace("\"a\"", "\"\"")), "a.jsonl:2: an answer is empty"),
            ("a.jsonl", good.replace("\"a\"", ""), "a.jsonl:1: no question that has an answer"),
            ("a.json", good.repeat(2), "a.json:1: not SQuAD's JSON"),
            ("a.json", "{\"data\": [\n{\"title\": \"t\"}]}".into(), "a.json:2: not SQuAD's JSON"),
            ("a.txt", good.into(), "unknown format"),
        ];
        for (name, text, message) in cases {
            let error = read(name, &text).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn too_few_questions_or_paragraphs_are_refused() {
        let refused = |haystack: &Haystack, size| {
            Ruler::QuestionAnswering.records(haystack, size, 0, &words).unwrap_err().to_string()
        };
        let haystack = haystack_with(10, 1);
        assert!(refused(&haystack, (100, 11)).contains("has only 10 questions with an answer, but 11"));
        let error = refused(&haystack, (5000, 1));
        assert!(error.contains("all 10 paragraphs of") && error.contains("of 5000 tokens"), "{error}");
        assert!(refused(&Haystack::repeated(), (100, 1)).contains("question_answering needs questions"));
    }
}
