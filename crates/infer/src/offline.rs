//! Many texts at once, with nobody waiting for a single one: what evaluation asks for.
//!
//! Beginnings that texts share are computed once, whatever their length: the cache's sequences fork there. Whole pages
//! are also found again that earlier calls have computed.

use std::collections::VecDeque;

use engram_address::{AddressError, History};
use engram_store::StoreError;

use crate::cache::{Cache, CacheFull, Root, Sequence};
use crate::decoder::{Decoder, StepOutput};
use crate::prefix_tree::{Node, ScoredText, prefix_tree};
use crate::prompt_lookup;
use crate::row_fetch::{Needed, RowIds, RowTiers};
use crate::sampling::likeliest;
use crate::step_rows::{Chunk, Target};
use crate::token_score::TokenScore;

/// A decoder that scores and continues texts.
#[derive(Debug)]
pub struct Offline {
    decoder: Decoder,
    rows: Option<RowTiers>,
    root: Root,
    cache: Cache,
    pool: rayon::ThreadPool,
}

/// Why texts are not computed.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// A token that the model does not know.
    #[error("token {token} is outside the model's vocabulary of {vocabulary}")]
    Token {
        /// The token.
        token: u32,
        /// Tokens of the vocabulary.
        vocabulary: usize,
    },
    /// More tokens than the context has.
    #[error("a text takes {tokens} tokens, but the model's context is {context}: shorten it")]
    TooLong {
        /// Tokens that the model would read.
        tokens: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// Nothing to read.
    #[error("a text has no token that could be read before the first that is asked for")]
    Empty,
    /// A single text does not fit the cache.
    #[error("a text does not fit the cache, all of whose {} pages are in use: enlarge it", .0.pages)]
    Cache(CacheFull),
    /// The caller stopped.
    #[error("interrupted")]
    Interrupted,
    /// Memory rows are unavailable.
    #[error("memory rows are unavailable")]
    Rows(#[from] StoreError),
    /// Memory rows cannot be addressed.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// There are no threads to compute with.
    #[error("cannot start the threads that compute")]
    Pool(#[from] rayon::ThreadPoolBuildError),
}

/// Tokens of a step, at most.
const STEP: usize = 1024;
/// Positions of a page.
const PAGE: usize = 16;
/// Positions whose logits are in memory at once.
const LOGITS: usize = 64;
/// Texts that are continued at once.
const TEXTS: usize = 64;
/// Whole contexts that the cache holds, at most.
const CONTEXTS: usize = 17;
/// Tokens drafted at most.
const DRAFTS: usize = 4;
/// Positions of a step, about, up to which drafts are worth their computation: reading the weights takes most of its time.
const WITH_DRAFTS: usize = 32;

impl Offline {
    /// Computes with `decoder`, the rows of whose first memory come from `rows`, on `threads` threads. The cache takes at most
    /// `cache_bytes`, but at least one context.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn new(
        decoder: Decoder,
        rows: Option<RowTiers>,
        cache_bytes: usize,
        threads: usize,
    ) -> Result<Self, OfflineError> {
        let layout = decoder.cache_layout(PAGE);
        let context = layout.pages_for(decoder.config().context);
        let pages = (cache_bytes / (4 * layout.page_values())).clamp(context, CONTEXTS * context);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        Ok(Self { cache: Cache::new(layout, pages), decoder, rows, root: Root::Memory(0), pool })
    }

    /// Switches the memory off.
    pub fn without_memory(self) -> Self {
        Self { root: Root::NoMemory, ..self }
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// How likely each scored token of each text is.
    ///
    /// # Errors
    /// When a text is empty, too long or has an unknown token, or rows are unavailable.
    pub fn score(&mut self, texts: &[ScoredText<'_>]) -> Result<Vec<Vec<TokenScore>>, OfflineError> {
        for text in texts {
            self.check(text.tokens, text.inputs().len())?;
            if text.first == 0 || text.first >= text.tokens.len() {
                return Err(OfflineError::Empty);
            }
        }
        let (lines, cache) = self.lines();
        score(&lines, cache, texts)
    }

    /// The likeliest continuation of each prompt by at most `limit` tokens, or until `end`, which is not given, or until
    /// `finished(prompt, tokens so far)`. Ends early where `interrupted`.
    ///
    /// # Errors
    /// As [`score`](Self::score), or when interrupted.
    pub fn proceed(
        &mut self,
        prompts: &[&[u32]],
        (limit, end): (usize, u32),
        finished: &mut dyn FnMut(usize, &[u32]) -> bool,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<Vec<Vec<u32>>, OfflineError> {
        for prompt in prompts {
            self.check(prompt, (prompt.len() + limit).saturating_sub(1))?;
            if prompt.is_empty() {
                return Err(OfflineError::Empty);
            }
        }
        if limit == 0 {
            return Ok(vec![Vec::new(); prompts.len()]);
        }
        let (lines, cache) = self.lines();
        proceed(&lines, cache, prompts, (limit, end), finished, interrupted)
    }

    /// The logits after each token of a text, a few positions at a time: `each` is given the first of them, from 0, and
    /// `[positions, vocabulary]`.
    ///
    /// # Errors
    /// When the text is empty, too long or has an unknown token, or rows are unavailable.
    pub fn logits(
        &mut self,
        tokens: &[u32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), OfflineError> {
        self.check(tokens, tokens.len())?;
        if tokens.is_empty() {
            return Err(OfflineError::Empty);
        }
        let (lines, cache) = self.lines();
        let mut line = [lines.begin(cache, &[])?];
        let result = logits(&lines, cache, &mut line, tokens, each);
        line.into_iter().for_each(|line| cache.release(line.sequence));
        result
    }

    fn lines(&mut self) -> (Lines<'_>, &mut Cache) {
        let Self { decoder, rows, root, cache, pool } = self;
        let rows = rows.as_ref().filter(|_| *root != Root::NoMemory);
        (Lines { decoder, rows, root: *root, pool }, cache)
    }

    fn check(&self, tokens: &[u32], read: usize) -> Result<(), OfflineError> {
        let (vocabulary, context) = (self.decoder.config().vocabulary, self.decoder.config().context);
        if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(OfflineError::Token { token, vocabulary });
        }
        if read > context { Err(OfflineError::TooLong { tokens: read, context }) } else { Ok(()) }
    }
}

/// What computes lines.
struct Lines<'a> {
    decoder: &'a Decoder,
    /// None where the memory is off.
    rows: Option<&'a RowTiers>,
    root: Root,
    pool: &'a rayon::ThreadPool,
}

/// A text as far as it has been computed.
struct Line {
    sequence: Sequence,
    history: Option<History>,
}

/// What one line has in a step.
struct Part<'a> {
    line: usize,
    tokens: &'a [u32],
    logits: usize,
    targets: Vec<Target>,
}

impl Lines<'_> {
    /// A line whose first positions are those of `tokens` that are known already.
    fn begin(&self, cache: &mut Cache, tokens: &[u32]) -> Result<Line, OfflineError> {
        let sequence = cache.begin(self.root, tokens);
        let mut history = self.rows.map(|rows| rows.addressing().history());
        if let Some(history) = &mut history {
            history.extend(&tokens[..sequence.len()])?;
        }
        Ok(Line { sequence, history })
    }

    /// Computes `parts`, for whose positions there is room. The lines are not longer for that yet.
    fn step(
        &self,
        cache: &mut Cache,
        lines: &mut [Line],
        parts: &[Part<'_>],
    ) -> Result<StepOutput, OfflineError> {
        let mut fetched = Vec::new();
        if let Some(rows) = self.rows {
            let mut ids = RowIds::default();
            for part in parts {
                if let Some(history) = &mut lines[part.line].history {
                    ids.add(history, part.tokens, rows)?;
                }
            }
            fetched.push(rows.fetch(ids, Needed::Now)?);
        }
        let chunks: Vec<Chunk<'_>> = parts
            .iter()
            .map(|part| Chunk {
                sequence: &lines[part.line].sequence,
                tokens: part.tokens,
                memory: self.rows.map(|_| 0),
                logits: part.logits,
                targets: &part.targets,
            })
            .collect();
        Ok(self.pool.install(|| self.decoder.step(cache, &chunks, &mut fetched))?)
    }
}

fn logits(
    lines: &Lines<'_>,
    cache: &mut Cache,
    line: &mut [Line; 1],
    tokens: &[u32],
    each: &mut dyn FnMut(usize, &[f32]),
) -> Result<(), OfflineError> {
    let mut first = 0;
    for part in tokens.chunks(LOGITS) {
        cache.reserve(&mut line[0].sequence, part.len()).map_err(OfflineError::Cache)?;
        let part = [Part { line: 0, tokens: part, logits: part.len(), targets: Vec::new() }];
        let output = lines.step(cache, line, &part)?;
        each(first, &output.logits);
        first += part[0].tokens.len();
        cache.commit(&mut line[0].sequence, first, tokens);
    }
    Ok(())
}

fn score(
    lines: &Lines<'_>,
    cache: &mut Cache,
    texts: &[ScoredText<'_>],
) -> Result<Vec<Vec<TokenScore>>, OfflineError> {
    let mut tree = Tree {
        lines,
        texts,
        nodes: prefix_tree(texts),
        ends: Vec::new(),
        open: Vec::new(),
        scores: texts.iter().map(|text| vec![None; text.tokens.len() - text.first]).collect(),
    };
    tree.ends.resize_with(tree.nodes.len(), || None);
    let mut waiting: Vec<usize> =
        (0..tree.nodes.len()).rev().filter(|&node| tree.nodes[node].before.is_none()).collect();
    let result = loop {
        if let Err(error) = tree.admit(cache, &mut waiting) {
            break Err(error);
        }
        if tree.open.is_empty() {
            break Ok(());
        }
        match tree.step(cache) {
            Ok(finished) => {
                let follows = |node: &Node| node.before.is_some_and(|before| finished.contains(&before));
                // The last are taken first, so that branches are done before other texts begin.
                waiting.extend((0..tree.nodes.len()).rev().filter(|&node| follows(&tree.nodes[node])));
            }
            Err(error) => break Err(error),
        }
    };
    tree.open.into_iter().for_each(|open| cache.release(open.line.sequence));
    tree.ends.into_iter().flatten().for_each(|(line, _)| cache.release(line.sequence));
    result?;
    Ok(tree.scores.into_iter().map(|scores| scores.into_iter().flatten().collect()).collect())
}

/// Texts that are being scored.
struct Tree<'a> {
    lines: &'a Lines<'a>,
    texts: &'a [ScoredText<'a>],
    nodes: Vec<Node>,
    /// Lines that end where a node does, and how many branches have still to leave there.
    ends: Vec<Option<(Line, usize)>>,
    open: Vec<OpenNode>,
    scores: Vec<Vec<Option<TokenScore>>>,
}

/// A node that is being computed, and for all of whose positions there is room.
struct OpenNode {
    node: usize,
    line: Line,
}

impl Tree<'_> {
    /// Opens nodes of `waiting`, the last first, as long as a step and the cache have room.
    fn admit(&mut self, cache: &mut Cache, waiting: &mut Vec<usize>) -> Result<(), OfflineError> {
        let left = |open: &OpenNode| self.nodes[open.node].end - open.line.sequence.len();
        let mut tokens: usize = self.open.iter().map(left).sum();
        while tokens < STEP
            && let Some(index) = waiting.pop()
        {
            let node = &self.nodes[index];
            let all = &self.texts[node.text].tokens[..node.end];
            let mut line = match node.before.and_then(|before| self.ends[before].as_ref()) {
                Some((line, _)) => {
                    Line { sequence: cache.fork(&line.sequence), history: line.history.clone() }
                }
                None => {
                    // A token before one that is scored has to be computed, known or not.
                    let first = node.scored.first().map_or(node.end, |&(_, place)| place);
                    self.lines.begin(cache, &all[..first])?
                }
            };
            let count = node.end - line.sequence.len();
            if let Err(full) = cache.reserve(&mut line.sequence, count) {
                cache.release(line.sequence);
                waiting.push(index);
                return if self.open.is_empty() { Err(OfflineError::Cache(full)) } else { Ok(()) };
            }
            if let Some(before) = node.before
                && let Some((line, branches)) = self.ends[before].take()
            {
                match branches {
                    1 => cache.release(line.sequence),
                    _ => self.ends[before] = Some((line, branches - 1)),
                }
            }
            tokens += count;
            self.open.push(OpenNode { node: index, line });
        }
        Ok(())
    }

    /// Computes what fits a step; gives the nodes that are done.
    fn step(&mut self, cache: &mut Cache) -> Result<Vec<usize>, OfflineError> {
        let (mut opened, mut lines): (Vec<usize>, Vec<Line>) =
            self.open.drain(..).map(|open| (open.node, open.line)).unzip();
        let (mut parts, mut scored, mut room) = (Vec::new(), Vec::new(), STEP);
        for (line, &node) in opened.iter().enumerate() {
            let node = &self.nodes[node];
            let first = lines[line].sequence.len();
            let count = (node.end - first).min(room);
            room -= count;
            if count == 0 {
                break;
            }
            let own = node.scored.iter().filter(|(_, place)| (first + 1..=first + count).contains(place));
            let target = |&(text, place): &(usize, usize)| Target {
                after: place - 1 - first,
                token: self.texts[text].tokens[place],
                top: 0,
            };
            let targets = own.clone().map(target).collect();
            scored.extend(own.copied());
            let tokens = &self.texts[node.text].tokens[first..first + count];
            parts.push(Part { line, tokens, logits: 0, targets });
        }
        let output = self.lines.step(cache, &mut lines, &parts);
        let counts: Vec<usize> = parts.iter().map(|part| part.tokens.len()).collect();
        drop(parts);
        let output = match output {
            Ok(output) => output,
            Err(error) => {
                lines.into_iter().for_each(|line| cache.release(line.sequence));
                return Err(error);
            }
        };
        for ((text, place), score) in scored.into_iter().zip(output.scores) {
            let first = self.texts[text].first;
            self.scores[text][place - first] = Some(score);
        }
        let mut finished = Vec::new();
        let mut counts = counts.into_iter();
        for (node, mut line) in opened.drain(..).zip(lines) {
            let of_node = &self.nodes[node];
            let len = line.sequence.len() + counts.next().unwrap_or(0);
            cache.commit(&mut line.sequence, len, self.texts[of_node.text].tokens);
            match (len == of_node.end, of_node.branches) {
                (false, _) => self.open.push(OpenNode { node, line }),
                (true, 0) => cache.release(line.sequence),
                (true, branches) => {
                    self.ends[node] = Some((line, branches));
                    finished.push(node);
                }
            }
        }
        Ok(finished)
    }
}

/// A text that is being continued.
struct OpenText {
    index: usize,
    tokens: Vec<u32>,
    drafts: usize,
}

fn proceed(
    lines: &Lines<'_>,
    cache: &mut Cache,
    prompts: &[&[u32]],
    (limit, end): (usize, u32),
    finished: &mut dyn FnMut(usize, &[u32]) -> bool,
    interrupted: &dyn Fn() -> bool,
) -> Result<Vec<Vec<u32>>, OfflineError> {
    let mut texts: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
    let mut waiting: VecDeque<usize> = (0..prompts.len()).collect();
    let (mut open, mut of_open): (Vec<OpenText>, Vec<Line>) = (Vec::new(), Vec::new());
    let result = loop {
        if interrupted() {
            break Err(OfflineError::Interrupted);
        }
        if let Err(error) = admit(lines, cache, (prompts, limit), &mut waiting, &mut open, &mut of_open) {
            break Err(error);
        }
        if open.is_empty() {
            break Ok(());
        }
        // What follows the positions that are computed, with drafts where the prompt has been read.
        let mut parts = Vec::new();
        let mut room = STEP;
        let paying = (WITH_DRAFTS / open.len()).saturating_sub(1);
        let nexts: Vec<(Vec<u32>, usize)> = open
            .iter()
            .zip(&of_open)
            .map(|(text, line)| {
                let first = line.sequence.len();
                let mut next = text.tokens[first..].to_vec();
                let left = limit - (text.tokens.len() - prompts[text.index].len());
                let most = if next.len() == 1 { text.drafts.min(left - 1).min(paying) } else { 0 };
                let drafts = prompt_lookup::draft(&text.tokens, most);
                next.extend_from_slice(drafts);
                (next, drafts.len())
            })
            .collect();
        for (line, (next, drafts)) in nexts.iter().enumerate() {
            let count = next.len().min(room);
            room -= count;
            let logits = if count == next.len() { drafts + 1 } else { 0 };
            if count > 0 {
                parts.push(Part { line, tokens: &next[..count], logits, targets: Vec::new() });
            }
        }
        let output = match lines.step(cache, &mut of_open, &parts) {
            Ok(output) => output,
            Err(error) => break Err(error),
        };
        let mut logits = output.logits.chunks_exact(lines.decoder.config().vocabulary);
        let mut done = Vec::new();
        let mut failed = None;
        for part in &parts {
            let (text, line) = (&mut open[part.line], &mut of_open[part.line]);
            let first = line.sequence.len();
            let drafted = &part.tokens[part.tokens.len() - part.logits.saturating_sub(1)..];
            let mut right = 0;
            for (place, logits) in logits.by_ref().take(part.logits).enumerate() {
                if place > right || done.last() == Some(&part.line) {
                    continue;
                }
                let token = likeliest(logits);
                let own = &mut texts[text.index];
                if token == end {
                    done.push(part.line);
                    continue;
                }
                own.push(token);
                text.tokens.push(token);
                if finished(text.index, own) || own.len() == limit {
                    done.push(part.line);
                } else if drafted.get(place) == Some(&token) {
                    right += 1;
                }
            }
            let wrong = drafted.len() - right;
            cache.commit(&mut line.sequence, first + part.tokens.len() - wrong, &text.tokens);
            if let Some(history) = &mut line.history
                && let Err(error) = history.rollback(wrong)
            {
                failed = Some(error);
            }
            if !drafted.is_empty() {
                text.drafts = DRAFTS.min(right + 1);
            }
        }
        drop(parts);
        if let Some(error) = failed {
            break Err(error.into());
        }
        for line in done.into_iter().rev() {
            open.swap_remove(line);
            cache.release(of_open.swap_remove(line).sequence);
        }
    };
    of_open.into_iter().for_each(|line| cache.release(line.sequence));
    result.map(|()| texts)
}

/// Opens texts while there is room. A text waits while a prompt that begins like it is being read, so that the beginning is
/// computed once.
fn admit(
    lines: &Lines<'_>,
    cache: &mut Cache,
    (prompts, limit): (&[&[u32]], usize),
    waiting: &mut VecDeque<usize>,
    open: &mut Vec<OpenText>,
    of_open: &mut Vec<Line>,
) -> Result<(), OfflineError> {
    while open.len() < TEXTS
        && let Some(&index) = waiting.front()
    {
        let mut unread =
            open.iter().zip(&*of_open).filter(|(text, line)| line.sequence.len() + 1 < text.tokens.len());
        if unread.any(|(text, _)| shares_page(&text.tokens, prompts[index])) {
            return Ok(());
        }
        let mut line = lines.begin(cache, prompts[index])?;
        let count = prompts[index].len() + limit - 1 - line.sequence.len();
        if let Err(full) = cache.reserve(&mut line.sequence, count) {
            cache.release(line.sequence);
            return if open.is_empty() { Err(OfflineError::Cache(full)) } else { Ok(()) };
        }
        waiting.pop_front();
        open.push(OpenText { index, tokens: prompts[index].to_vec(), drafts: 1 });
        of_open.push(line);
    }
    Ok(())
}

/// Whether the first page of two texts is the same.
fn shares_page(one: &[u32], other: &[u32]) -> bool {
    one.len() >= PAGE && other.get(..PAGE) == one.get(..PAGE)
}
