//! Preparation: reads a corpus in rounds, encodes them on all threads, writes token shards in order, and resumes after a
//! kill.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::ScopedJoinHandle;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::corpus::{Corpus, Documents, Position};
use crate::damage::DamageReport;
use crate::error::{Error, Result};
use crate::files::{sync_folder, write_file};
use crate::preparation_state::{Progress, Request, resumed, to_json};
use crate::shard_file::number;
use crate::shard_writer::{SplitSummary, SplitWriter};
use crate::tokenizer::Tokenizer;
use crate::work_folder::WorkFolder;

/// Options for preparing token shards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrepareOptions {
    /// Share of the documents held out for validation, 0 ≤ share < 1. A document's text alone decides whether it is
    /// held out, so two copies are never on both sides, and a growing corpus keeps its split. If a share above 0
    /// selects none of a few documents, the nearest one is held out.
    pub hold_out: f64,
    /// A shard ends with the document that reaches this number of tokens.
    pub shard_tokens: u64,
    /// Bytes of text between two checkpoints, from which a killed preparation resumes. They do not change the result.
    #[serde(skip)]
    pub checkpoint_bytes: u64,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self { hold_out: 0.0, shard_tokens: 1 << 28, checkpoint_bytes: 256 << 20 }
    }
}

/// The progress of a preparation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrepareProgress {
    /// Stored bytes of the corpus read.
    pub done: u64,
    /// Stored bytes of the corpus.
    pub total: u64,
    /// Bytes of text turned into tokens.
    pub text_bytes: u64,
    /// Tokens made.
    pub tokens: u64,
    /// Bytes of text that an earlier process had turned into tokens; 0 if there was none.
    pub resumed: u64,
}

/// The result of a preparation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PrepareSummary {
    /// The training split, in the folder `train`.
    pub train: SplitSummary,
    /// The held-out split, in the folder `valid`; all zero if there is none.
    pub valid: SplitSummary,
    /// Empty documents, which were left out.
    pub empty_documents: u64,
    /// Damaged records.
    pub damage: DamageReport,
    /// Whether the share to hold out selected no document, so that the nearest one was held out; or none, if all
    /// documents are equal.
    pub share_missed: bool,
}

/// Turns a corpus into token shards in the new folder `out`, which appears when everything is written and flushed.
///
/// Documents keep their order. All threads of rayon's pool make tokens, and the result does not depend on their number.
/// Memory holds the documents of one round (a few MiB, or one longer document) and their tokens. A document longer than
/// 256 KiB is encoded in pieces, if this is known not to change its tokens.
///
/// A preparation that was killed, interrupted or failed to read or write resumes when it is repeated, after its last
/// checkpoint. The result is that of an uninterrupted one. The unfinished output is in the folder `.preparing-NAME`
/// beside `out`, where NAME is the name of `out`. One that ended before its first checkpoint begins again.
///
/// # Errors
/// An `out` that exists, a share outside [0, 1) or that leaves nothing to train on, errors of reading the corpus and of
/// writing, and [`Error::Interrupted`] if `progress` breaks. After these errors no output remains, except that
/// [`Error::Paused`] stands for those that can be resumed. An unfinished preparation with another request, or of inputs
/// that have changed, is refused ([`Error::OtherPreparation`], [`Error::ChangedInput`]) and left as it is.
pub fn prepare(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    out: &Path,
    options: &PrepareOptions,
    progress: &mut dyn FnMut(PrepareProgress) -> ControlFlow<()>,
) -> Result<PrepareSummary> {
    options.validate()?;
    let work = WorkFolder::claim(out)?;
    let request = Request::of(corpus, tokenizer, options)?;
    let before = unfinished(&work, &request)?;
    if before.is_none() {
        begin(&work, &request)?;
    }
    match prepare_in(&work, corpus, tokenizer, options, before, progress) {
        Ok(summary) => work.stand().map(|()| summary),
        Err(error) => {
            let error = if work.has_state() { error.paused(work.path()) } else { error };
            if !matches!(error, Error::Paused { .. } | Error::DamagedState { .. }) {
                work.clear()?;
            }
            Err(error)
        }
    }
}

/// How far an earlier process came with the same request; None if it left nothing to resume from.
fn unfinished(work: &WorkFolder, request: &Request) -> Result<Option<Progress>> {
    let Some(state) = work.state()? else { return Ok(None) };
    let path = work.path().join(Request::FILE);
    let stored = std::fs::read(&path).map_err(Error::read(&path))?;
    resumed(&stored, &state, request, work.path()).map(Some)
}

/// Clears the folder and stores the request, to which a state belongs.
fn begin(work: &WorkFolder, request: &Request) -> Result<()> {
    work.clear()?;
    write_file(&work.path().join(Request::FILE), &to_json(request))
}

fn prepare_in(
    work: &WorkFolder,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    options: &PrepareOptions,
    before: Option<Progress>,
    progress: &mut dyn FnMut(PrepareProgress) -> ControlFlow<()>,
) -> Result<PrepareSummary> {
    let mut first = match before {
        None => Preparation::new(work, tokenizer, options, options.hold_out),
        Some(before) => Preparation::resume(work, tokenizer, options, before)?,
    };
    first.run(corpus, progress)?;
    let preparation = match first.share_of_one(options.hold_out) {
        None => first,
        // The share selected none of a few documents. A second pass holds out the nearest one.
        Some(share) => {
            drop(first);
            begin(work, &Request::of(corpus, tokenizer, options)?)?;
            let mut second = Preparation::new(work, tokenizer, options, share);
            second.run(corpus, progress)?;
            second
        }
    };
    preparation.finish(corpus, options.hold_out)
}

impl PrepareOptions {
    fn validate(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.hold_out) {
            return Err(Error::option("hold_out", self.hold_out, "must be at least 0 and below 1"));
        }
        if self.shard_tokens == 0 {
            return Err(Error::option("shard_tokens", self.shard_tokens, "must be at least 1"));
        }
        if self.checkpoint_bytes == 0 {
            return Err(Error::option("checkpoint_bytes", self.checkpoint_bytes, "must be at least 1"));
        }
        Ok(())
    }
}

struct Preparation<'a> {
    work: &'a WorkFolder,
    tokenizer: &'a Tokenizer,
    train: SplitWriter,
    valid: SplitWriter,
    hold_out: f64,
    empty_documents: u64,
    damage: DamageReport,
    /// The documents' smallest and largest value of the hash that decides the split.
    places: Option<(f64, f64)>,
    /// The place in the corpus up to which everything is written, and the stored bytes before it.
    position: Position,
    bytes_read: u64,
    checkpoint_bytes: u64,
    /// Bytes of text written since the last checkpoint.
    since_checkpoint: u64,
    /// Bytes of text that an earlier process wrote.
    resumed: u64,
}

/// Number of documents encoded at once.
struct Round {
    documents: Vec<String>,
    empty_documents: u64,
    /// The place in the corpus after this round.
    position: Position,
    /// Stored bytes of the corpus read up to the end of this round.
    bytes_read: u64,
}

impl Round {
    /// Text of a round.
    const BYTES: usize = 4 << 20;

    /// The next documents with `least` bytes of text, and the rest of the last one; none at the end.
    fn read(documents: &mut Documents<'_>, least: usize) -> Result<Option<Self>> {
        let position = Position::default();
        let mut round = Self { documents: Vec::new(), empty_documents: 0, position, bytes_read: 0 };
        let mut bytes = 0;
        while bytes < least
            && let Some(document) = documents.next().transpose()?
        {
            bytes += document.len();
            match document.is_empty() {
                true => round.empty_documents += 1,
                false => round.documents.push(document),
            }
        }
        (round.position, round.bytes_read) = (documents.reached(), documents.bytes_read());
        Ok((bytes > 0 || round.empty_documents > 0).then_some(round))
    }
}

/// A round with its tokens.
struct Encoded {
    round: Round,
    /// Stretches of the documents' tokens in order, each with its document's place in the round.
    stretches: Vec<(usize, Vec<u32>)>,
}

impl Encoded {
    /// Encodes with all threads of rayon's pool.
    fn of(round: Round, tokenizer: &Tokenizer) -> Result<Self> {
        let documents = round.documents.iter().enumerate();
        let pieces: Vec<(usize, &str)> = documents
            .flat_map(|(index, document)| tokenizer.pieces(document).map(move |piece| (index, piece)))
            .collect();
        let encode = |(index, piece): &(usize, &str)| Ok((*index, tokenizer.encode(piece)?));
        let stretches = pieces.par_iter().map(encode).collect::<Result<_>>()?;
        Ok(Self { round, stretches })
    }

    /// Adds this round to what is reached.
    fn count(&self, reached: &mut PrepareProgress) {
        let documents = &self.round.documents;
        reached.done = self.round.bytes_read;
        reached.text_bytes += documents.iter().map(|document| document.len() as u64).sum::<u64>();
        let tokens: usize = self.stretches.iter().map(|(_, tokens)| tokens.len()).sum();
        reached.tokens += (tokens + documents.len()) as u64;
    }
}

/// Sends the documents after `position` in rounds of `least` bytes. Returns the damaged records.
fn read_rounds(
    corpus: &Corpus,
    position: &Position,
    least: usize,
    rounds: &SyncSender<Round>,
) -> Result<DamageReport> {
    let mut documents = corpus.documents_after(position)?;
    while let Some(round) = Round::read(&mut documents, least)? {
        if rounds.send(round).is_err() {
            // The receiver has failed, and reports why.
            break;
        }
    }
    Ok(documents.damage().clone())
}

/// Encodes rounds and sends them on, in order.
fn encode_rounds(
    rounds: Receiver<Round>,
    tokenizer: &Tokenizer,
    encoded: &SyncSender<Encoded>,
    mut reached: PrepareProgress,
    progress: &mut dyn FnMut(PrepareProgress) -> ControlFlow<()>,
) -> Result<()> {
    for round in rounds {
        let round = Encoded::of(round, tokenizer)?;
        round.count(&mut reached);
        if encoded.send(round).is_err() {
            // The writer has failed, and reports why.
            break;
        }
        if progress(reached).is_break() {
            return Err(Error::Interrupted);
        }
    }
    Ok(())
}

/// The result of a thread, or its panic.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl<'a> Preparation<'a> {
    fn new(work: &'a WorkFolder, tokenizer: &'a Tokenizer, options: &PrepareOptions, share: f64) -> Self {
        Self {
            work,
            tokenizer,
            train: SplitWriter::new(work, "train", tokenizer, options.shard_tokens),
            valid: SplitWriter::new(work, "valid", tokenizer, options.shard_tokens),
            hold_out: share,
            empty_documents: 0,
            damage: DamageReport::default(),
            places: None,
            position: Position::default(),
            bytes_read: 0,
            checkpoint_bytes: options.checkpoint_bytes,
            since_checkpoint: 0,
            resumed: 0,
        }
    }

    /// A preparation that an earlier process left in `work`. Drops its output after the checkpoint.
    fn resume(
        work: &'a WorkFolder,
        tokenizer: &'a Tokenizer,
        options: &PrepareOptions,
        progress: Progress,
    ) -> Result<Self> {
        let mut this = Self::new(work, tokenizer, options, progress.share);
        this.train.resume(progress.train)?;
        this.valid.resume(progress.valid)?;
        this.resumed = this.train.summary.text_bytes + this.valid.summary.text_bytes;
        Ok(Self {
            empty_documents: progress.empty_documents,
            places: progress.places,
            position: progress.position,
            bytes_read: progress.bytes_read,
            ..this
        })
    }

    /// Flushes the output and stores how far it came.
    fn checkpoint(&mut self) -> Result<()> {
        let (train, valid) = (self.train.checkpoint()?, self.valid.checkpoint()?);
        sync_folder(&self.work.output())?;
        let progress = Progress {
            position: self.position.clone(),
            bytes_read: self.bytes_read,
            empty_documents: self.empty_documents,
            share: self.hold_out,
            places: self.places,
            train,
            valid,
        };
        self.work.save_state(&to_json(&progress))?;
        self.since_checkpoint = 0;
        Ok(())
    }

    /// What is reached before the next round.
    fn reached(&self, corpus: &Corpus) -> PrepareProgress {
        PrepareProgress {
            done: self.bytes_read,
            total: corpus.bytes(),
            text_bytes: self.resumed,
            tokens: self.train.summary.tokens + self.valid.summary.tokens,
            resumed: self.resumed,
        }
    }

    /// Reads in a thread of its own and writes in another, so that all other cores always have documents to encode.
    fn run(
        &mut self,
        corpus: &Corpus,
        progress: &mut dyn FnMut(PrepareProgress) -> ControlFlow<()>,
    ) -> Result<()> {
        let (tokenizer, reached, position) = (self.tokenizer, self.reached(corpus), self.position.clone());
        if self.resumed > 0 && progress(reached).is_break() {
            return Err(Error::Interrupted);
        }
        let least = Round::BYTES.min(usize::try_from(self.checkpoint_bytes).unwrap_or(usize::MAX));
        let (damage, written) = std::thread::scope(|scope| {
            let (rounds, read) = sync_channel(1);
            let reader = scope.spawn(move || read_rounds(corpus, &position, least, &rounds));
            let (encoded, to_write) = sync_channel(1);
            let this = &mut *self;
            let writer = scope.spawn(move || to_write.into_iter().try_for_each(|round| this.write(round)));
            let outcome = encode_rounds(read, tokenizer, &encoded, reached, progress);
            drop(encoded);
            let (written, damage) = (joined(writer), joined(reader));
            outcome.map(|()| (damage, written))
        })?;
        written?;
        self.damage = damage?;
        Ok(())
    }

    /// The share that holds out the nearest document, if a share was requested that holds out none. None if no other
    /// share is needed, or if it would leave nothing to train on.
    fn share_of_one(&self, asked: f64) -> Option<f64> {
        let (least, greatest) = self.places?;
        let none_held_out = asked > 0.0 && self.valid.summary.documents == 0;
        (none_held_out && least < greatest).then(|| least.next_up())
    }

    fn write(&mut self, round: Encoded) -> Result<()> {
        self.empty_documents += round.round.empty_documents;
        for stretches in round.stretches.chunk_by(|(one, _), (other, _)| one == other) {
            let document = &round.round.documents[stretches[0].0];
            let place = place(document);
            let (least, greatest) = self.places.unwrap_or((place, place));
            self.places = Some((least.min(place), greatest.max(place)));
            let split = if place < self.hold_out { &mut self.valid } else { &mut self.train };
            split.write(document.len() as u64, stretches.iter().map(|(_, tokens)| tokens.as_slice()))?;
            self.since_checkpoint += document.len() as u64;
        }
        (self.position, self.bytes_read) = (round.round.position, round.round.bytes_read);
        if self.since_checkpoint >= self.checkpoint_bytes { self.checkpoint() } else { Ok(()) }
    }

    /// `asked` is the requested share.
    fn finish(self, corpus: &Corpus, asked: f64) -> Result<PrepareSummary> {
        let (train, valid) = (self.train.finish()?, self.valid.finish()?);
        let all = train.documents + valid.documents;
        if all == 0 {
            return Err(corpus.empty(&self.damage));
        }
        if train.documents == 0 {
            let reason =
                format!("leaves none of the corpus's {all} documents for training; choose another share");
            return Err(Error::option("hold_out", self.hold_out, reason));
        }
        let share_missed = asked > 0.0 && (valid.documents == 0 || asked != self.hold_out);
        Ok(PrepareSummary {
            train,
            valid,
            empty_documents: self.empty_documents,
            damage: self.damage,
            share_missed,
        })
    }
}

/// The document's hash as a number in [0, 1). The document is held out if it is below the share.
pub(crate) fn place(document: &str) -> f64 {
    let hash = number(blake3::hash(document.as_bytes()).as_bytes(), 0);
    // The upper 53 bits fit a double: the division is exact, and the quotient below 1.
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::shard_file::HEADER;
    use crate::token_shards::TokenShards;
    use crate::tokenizer::TokenizerTraining;

    fn texts() -> Vec<String> {
        (0..60)
            .map(|number| format!("Document {number}: the whale, the whale!\n").repeat(1 + number % 5))
            .collect()
    }

    fn corpus(texts: &[String]) -> Corpus {
        let lines: String =
            texts.iter().map(|text| serde_json::json!({ "text": text }).to_string() + "\n").collect();
        Corpus::embedded("test.jsonl", lines.leak().as_bytes()).unwrap()
    }

    fn tokenizer() -> &'static Tokenizer {
        static ONCE: OnceLock<Tokenizer> = OnceLock::new();
        ONCE.get_or_init(|| train(290))
    }

    fn train(vocabulary: usize) -> Tokenizer {
        let options = TokenizerTraining { vocabulary, byte_budget: 1 << 20 };
        Tokenizer::train(&corpus(&texts()), &options, &mut |_| ControlFlow::Continue(())).unwrap()
    }

    /// A tokenizer whose ids need four bytes: ours, with one more token far away.
    fn wide() -> Tokenizer {
        let mut json: serde_json::Value = serde_json::from_slice(tokenizer().json()).unwrap();
        let mut token = json["added_tokens"][0].clone();
        (token["id"], token["content"]) = (70_000.into(), "<|far|>".into());
        json["added_tokens"].as_array_mut().unwrap().push(token);
        json["model"]["vocab"]["<|far|>"] = 70_000.into();
        Tokenizer::from_json(json.to_string().as_bytes(), "wide", None).unwrap()
    }

    fn go_on(_: PrepareProgress) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn prepared(options: &PrepareOptions) -> (TempDir, PathBuf, PrepareSummary) {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let summary = prepare(&corpus(&texts()), tokenizer(), &out, options, &mut go_on).unwrap();
        (folder, out, summary)
    }

    fn expected(tokenizer: &Tokenizer, texts: &[String]) -> Vec<u32> {
        let document =
            |text: &String| [tokenizer.encode(text).unwrap(), vec![tokenizer.end_of_text()]].concat();
        texts.iter().flat_map(document).collect()
    }

    #[test]
    fn shards_hold_the_documents_in_order() {
        let everything = PrepareOptions::default();
        let several = PrepareOptions { shard_tokens: 300, ..Default::default() };
        for (options, least) in [(everything, 1), (several, 5)] {
            let (_folder, out, summary) = prepared(&options);
            let shards = TokenShards::open(&out.join("train")).unwrap();
            shards.verify().unwrap();
            shards.check_tokenizer(tokenizer()).unwrap();
            let tokens = expected(tokenizer(), &texts());
            assert_eq!(shards.tokens(0..shards.len()).unwrap(), tokens);
            assert!(summary.train.shards >= least && summary.train.shards as usize == files(&out).len());
            let bytes: usize = texts().iter().map(String::len).sum();
            assert_eq!((shards.text_bytes(), summary.train.text_bytes), (bytes as u64, bytes as u64));
            assert_eq!((shards.document_count(), summary.train.documents), (60, 60));
            assert_eq!((shards.vocabulary(), shards.end_of_text()), (290, 0));
            assert!(!out.join("valid").exists() && summary.valid == SplitSummary::default());
            let mut next = 0;
            for (document, text) in shards.documents().zip(texts()) {
                assert_eq!((document.tokens.start, document.bytes), (next, text.len() as u64));
                next = document.tokens.end;
                let tokens = shards.tokens(document.tokens).unwrap();
                assert_eq!(tokenizer().decode(&tokens).unwrap(), text);
                assert_eq!(tokens.last(), Some(&0));
            }
            assert_eq!(next, shards.len());
        }
    }

    #[test]
    fn a_large_vocabulary_takes_four_bytes_a_token() {
        let (folder, tokenizer) = (tempfile::tempdir().unwrap(), wide());
        let out = folder.path().join("data");
        prepare(&corpus(&texts()), &tokenizer, &out, &Default::default(), &mut go_on).unwrap();
        let shards = TokenShards::open(&out.join("train/00000.tokens")).unwrap();
        shards.verify().unwrap();
        assert_eq!(shards.vocabulary(), 70_001);
        assert_eq!(files(&out)[0].1[12], 4, "bytes of a token");
        assert_eq!(shards.tokens(0..shards.len()).unwrap(), expected(&tokenizer, &texts()));
    }

    #[test]
    fn held_out_documents_are_the_same_at_every_preparation() {
        let options = PrepareOptions { hold_out: 0.3, ..Default::default() };
        let (_folder, out, summary) = prepared(&options);
        assert_eq!(summary.train.documents + summary.valid.documents, 60);
        assert!((8..28).contains(&summary.valid.documents), "{}", summary.valid.documents);
        let (held, kept): (Vec<_>, Vec<_>) = texts().into_iter().partition(|text| place(text) < 0.3);
        for (name, texts) in [("train", kept), ("valid", held)] {
            let shards = TokenShards::open(&out.join(name)).unwrap();
            assert_eq!(shards.tokens(0..shards.len()).unwrap(), expected(tokenizer(), &texts));
        }
    }

    /// Every file below a folder, by name.
    fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let mut files = Vec::new();
        for split in ["train", "valid"] {
            for entry in std::fs::read_dir(folder.join(split)).into_iter().flatten() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                files.push((name, std::fs::read(path).unwrap()));
            }
        }
        files.sort();
        files
    }

    /// Enough documents for several rounds, each different.
    fn rounds(parts: &[String]) -> Corpus {
        let document = |number: usize| {
            let part = &parts[number % parts.len()];
            format!("{number} {part}\n").repeat(1 + number % 7 * 100)
        };
        let mut bytes = 0;
        let long = (0..).map(document).take_while(|text| {
            bytes += text.len();
            bytes < 3 * Round::BYTES
        });
        corpus(&long.collect::<Vec<_>>())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(6))]
        #[test]
        fn the_bytes_are_the_same_at_any_number_of_threads(parts in proptest::collection::vec("\\PC{0,60}|[a-e '.0-9]{9,60}", 1..9)) {
            let corpus = rounds(&parts);
            let options = PrepareOptions { hold_out: 0.2, shard_tokens: 1 << 20, ..Default::default() };
            let bytes = |threads| {
                let folder = tempfile::tempdir().unwrap();
                let out = folder.path().join("data");
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let summary = pool.install(|| prepare(&corpus, tokenizer(), &out, &options, &mut go_on)).unwrap();
                (files(&out), summary)
            };
            let (one, summary) = bytes(1);
            prop_assert!(one.len() > 2 && one.len() == (summary.train.shards + summary.valid.shards) as usize);
            for threads in [2, 4] {
                prop_assert!(bytes(threads) == (one.clone(), summary.clone()), "{threads} threads");
            }
        }
    }

    #[test]
    fn a_document_longer_than_a_piece_has_the_tokens_of_the_whole() {
        let text = texts().concat().repeat(100);
        assert!(text.len() > 2 * crate::cut::PIECE);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let documents = [text, "short".to_owned()];
        prepare(&corpus(&documents), tokenizer(), &out, &Default::default(), &mut go_on).unwrap();
        let shards = TokenShards::open(&out.join("train")).unwrap();
        assert_eq!(shards.tokens(0..shards.len()).unwrap(), expected(tokenizer(), &documents));
        assert_eq!(shards.document_count(), 2);
    }

    #[test]
    fn progress_is_reported_and_stops_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let corpus = corpus(&texts());
        let mut last = None;
        let mut stop = |progress| {
            last = Some(progress);
            ControlFlow::Break(())
        };
        let stopped = prepare(&corpus, tokenizer(), &out, &Default::default(), &mut stop);
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let last = last.unwrap();
        assert_eq!((last.done, last.total), (corpus.bytes(), corpus.bytes()));
        assert_eq!(last.text_bytes, texts().iter().map(|text| text.len() as u64).sum::<u64>());
    }

    #[test]
    fn errors_leave_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("data");
        let run = |corpus: &Corpus, options: &PrepareOptions| {
            prepare(corpus, tokenizer(), &out, options, &mut go_on).unwrap_err().to_string()
        };
        let usual = PrepareOptions::default();
        let hold_out = |hold_out| PrepareOptions { hold_out, ..Default::default() };
        let bad = Corpus::embedded("bad.jsonl", b"{\"text\": \"x\"}\n{\"tex\": \"x\"}\n").unwrap();
        assert!(run(&bad, &usual).contains("bad.jsonl: line 2: no field \"text\""));
        let empty = Corpus::embedded("empty.jsonl", b"{\"text\": \"\"}\n").unwrap();
        assert_eq!(run(&empty, &usual), "the corpus is empty: no text in 1 file(s): empty.jsonl");
        assert!(run(&bad, &hold_out(1.0)).starts_with("hold_out = 1: "));
        assert!(run(&bad, &hold_out(f64::NAN)).starts_with("hold_out = NaN: "));
        let one = corpus(&texts()[..1]);
        assert!(
            run(&one, &hold_out(0.999999)).contains("leaves none of the corpus's 1 documents for training")
        );
        let none = PrepareOptions { shard_tokens: 0, ..Default::default() };
        assert!(run(&one, &none).starts_with("shard_tokens = 0: "));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        std::fs::create_dir(&out).unwrap();
        assert!(run(&one, &usual).contains("already exists; remove it"));
    }

    #[test]
    fn a_share_between_the_documents_holds_out_the_nearest() {
        let small = PrepareOptions { hold_out: 1e-9, ..Default::default() };
        let (_folder, out, summary) = prepared(&small);
        assert_eq!((summary.train.documents, summary.valid.documents), (59, 1));
        assert!(summary.share_missed);
        let mut sorted = texts();
        sorted.sort_by(|one, other| place(one).total_cmp(&place(other)));
        let valid = TokenShards::open(&out.join("valid")).unwrap();
        assert_eq!(valid.tokens(0..valid.len()).unwrap(), expected(tokenizer(), &sorted[..1]));
        // With one document, or only copies of it, all are needed for training.
        let folder = tempfile::tempdir().unwrap();
        let copies = corpus(&[texts()[0].clone(), texts()[0].clone()]);
        let out = folder.path().join("data");
        let summary = prepare(&copies, tokenizer(), &out, &small, &mut go_on).unwrap();
        assert_eq!((summary.train.documents, summary.valid.documents, summary.share_missed), (2, 0, true));
        assert!(!out.join("valid").exists());
    }

    #[test]
    fn damaged_records_are_counted() {
        let lines =
            b"{\"text\": \"one\"}\n{\"text\": null}\n{\"text\": \"t\xffwo\"}\n{\"text\": \"three\"}\n";
        let corpus = Corpus::embedded("a.jsonl", lines).unwrap();
        let run = |replace, skip| {
            let folder = tempfile::tempdir().unwrap();
            let corpus = corpus.clone().with_damage(crate::OnDamage { replace, skip });
            prepare(&corpus, tokenizer(), &folder.path().join("data"), &Default::default(), &mut go_on)
        };
        let counts = |replace, skip| {
            let summary = run(replace, skip).unwrap();
            (summary.train.documents, summary.damage.skipped, summary.damage.replaced)
        };
        assert_eq!(counts(false, true), (2, 2, 0));
        assert_eq!(counts(true, true), (3, 1, 1));
        assert!(run(true, false).is_err() && run(false, false).is_err());
    }

    #[test]
    fn documents_without_text_are_counted() {
        let (folder, mut texts) = (tempfile::tempdir().unwrap(), texts());
        texts[3].clear();
        let out = folder.path().join("data");
        let summary = prepare(&corpus(&texts), tokenizer(), &out, &Default::default(), &mut go_on).unwrap();
        assert_eq!((summary.empty_documents, summary.train.documents), (1, 59));
    }

    #[test]
    fn another_tokenizer_is_refused_by_name() {
        let (_folder, out, _) = prepared(&PrepareOptions::default());
        let other = train(289);
        let message =
            TokenShards::open(&out.join("train")).unwrap().check_tokenizer(&other).unwrap_err().to_string();
        assert!(message.contains(&format!(
            "made with tokenizer {}, not with {}",
            tokenizer().hash(),
            other.hash()
        )));
    }

    #[test]
    fn a_changed_bit_or_a_missing_end_is_found() {
        let (folder, out, _) = prepared(&PrepareOptions { shard_tokens: u64::MAX, ..Default::default() });
        let whole = std::fs::read(out.join("train/00000.tokens")).unwrap();
        let path = folder.path().join("damaged.tokens");
        let try_all = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            TokenShards::open(&path).and_then(|shards| shards.verify())
        };
        try_all(&whole).unwrap();
        for at in (0..whole.len()).step_by(7).chain(0..HEADER) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            let message = try_all(&damaged).unwrap_err().to_string();
            assert!(message.contains("damaged.tokens: "), "byte {at}: {message}");
            // Reading without verifying may give other tokens, but only valid ones, and never fails otherwise.
            if let Ok(shards) = TokenShards::open(&path) {
                let tokens = shards.tokens(0..shards.len());
                assert!(
                    tokens.is_err() || tokens.is_ok_and(|tokens| tokens.iter().all(|token| *token < 290))
                );
            }
        }
        for length in [0, 1, HEADER - 1, HEADER, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(matches!(TokenShards::open(&path), Err(Error::MalformedShard { .. })), "{length} bytes");
        }
        std::fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
        let message = TokenShards::open(&path).unwrap_err().to_string();
        let expected = format!("has {} bytes instead of {}", whole.len() + 1, whole.len());
        assert!(message.contains(&expected), "{message}");
    }

    #[test]
    fn other_files_and_incomplete_folders_are_refused() {
        let (_folder, out, _) = prepared(&PrepareOptions { shard_tokens: 300, ..Default::default() });
        let refused = |path: &Path, expected: &str| {
            let message = TokenShards::open(path).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        refused(&out, "no .tokens file in this folder");
        refused(&out.join("nothing"), "cannot read ");
        let train = out.join("train");
        let (second, hidden) = (train.join("00001.tokens"), train.join("hidden"));
        std::fs::rename(&second, &hidden).unwrap();
        refused(&train, "is shard 2, and shard 1 is missing");
        let (_other_folder, other, _) = prepared(&PrepareOptions::default());
        std::fs::copy(other.join("train/00000.tokens"), &second).unwrap();
        refused(&train, "comes from a different preparation");
        std::fs::write(&second, b"{}".repeat(200)).unwrap();
        refused(&train, "00001.tokens: is not a token shard");
        std::fs::rename(&hidden, &second).unwrap();
        let count = std::fs::read_dir(&train).unwrap().count();
        std::fs::remove_file(train.join(format!("{:05}.tokens", count - 1))).unwrap();
        refused(&train, &format!("has {} of {count} shards", count - 1));
    }

    #[test]
    fn a_range_beyond_the_end_is_refused() {
        let (_folder, out, _) = prepared(&PrepareOptions::default());
        let shards = TokenShards::open(&out.join("train")).unwrap();
        let end = shards.len();
        assert!(shards.tokens(end - 1..end).is_ok());
        let message = shards.tokens(end - 1..end + 1).unwrap_err().to_string();
        assert!(
            message.contains(&format!("2 tokens from {} on exceed its {end} tokens", end - 1)),
            "{message}"
        );
        assert!(shards.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(shards.tokens(0..u64::MAX).is_err());
    }

    #[test]
    fn sampled_batches_hold_the_tokens_of_their_windows() {
        let (_folder, out, _) = prepared(&PrepareOptions { shard_tokens: 300, ..Default::default() });
        let shards = TokenShards::open(&out.join("train")).unwrap();
        let mut sampler = crate::Sampler::new(3, 32, 5, shards.len()).unwrap();
        let batch = sampler.next_batch(&shards).unwrap();
        assert_eq!((batch.len(), batch.tokens.len()), (5, 5 * 33));
        for (start, window) in batch.starts.iter().zip(batch.tokens.chunks(33)) {
            assert_eq!(window, shards.tokens(*start..start + 33).unwrap());
        }
        let message = crate::Sampler::new(3, 32, 5, 99).unwrap().next_batch(&shards).unwrap_err().to_string();
        assert!(message.starts_with("tokens = 99: "), "{message}");
    }

    #[test]
    fn other_data_have_another_identity() {
        let identity = |out: &Path| TokenShards::open(&out.join("train")).unwrap().identity();
        let (_one, one, _) = prepared(&PrepareOptions::default());
        let (_same, same, _) = prepared(&PrepareOptions::default());
        let (_other, other, _) = prepared(&PrepareOptions { hold_out: 0.3, ..Default::default() });
        assert_eq!(identity(&one), identity(&same));
        assert_ne!(identity(&one), identity(&other));
    }

    proptest! {
        #[test]
        fn any_range_over_any_shards_is_the_slice(start in 0..2000usize, count in 0..1500usize) {
            static DATA: OnceLock<(TempDir, TokenShards, Vec<u32>)> = OnceLock::new();
            let (_, shards, tokens) = DATA.get_or_init(|| {
                let (folder, out, _) = prepared(&PrepareOptions { shard_tokens: 200, ..Default::default() });
                (folder, TokenShards::open(&out.join("train")).unwrap(), expected(tokenizer(), &texts()))
            });
            let start = start.min(tokens.len());
            let end = (start + count).min(tokens.len());
            prop_assert_eq!(&shards.tokens(start as u64..end as u64).unwrap(), &tokens[start..end]);
        }
    }
}
