//! Asking a model from outside.

use std::collections::HashMap;

use engram_data::Begin;
use engram_kernels::Segment;
use engram_model::TargetScore;

use super::error::{Error, Result};
use super::scorer::{Cost, Request, Scorer};
use engram_import::{LlamaState, OutsideModel, PrefixRows};

impl Scorer for OutsideModel {
    fn identity(&self) -> String {
        OutsideModel::identity(self).to_owned()
    }

    fn context(&self) -> usize {
        self.llama().config().context
    }

    fn begin(&self) -> Begin {
        OutsideModel::begin(self)
    }

    fn cost(&self) -> Cost {
        Cost::DistinctTokens
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer().encode(text).map_err(engram_train::Error::from)?)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        Ok(self.tokenizer().decode(tokens).map_err(engram_train::Error::from)?)
    }

    fn score(&self, batch: &[&Request]) -> Result<Vec<Vec<TargetScore>>> {
        let inputs: Vec<&[u32]> = batch.iter().map(|request| request.inputs()).collect();
        check(self, &inputs)?;
        let rows = PrefixRows::of(&inputs);
        let mut state = LlamaState::default();
        let hidden = self.llama().hidden(&rows.tokens, &rows.positions, &rows.segments, &mut state);
        // A token that several requests predict at one place is scored once.
        let (mut places, mut targets, mut scored) = (HashMap::new(), Vec::new(), Vec::new());
        let (mut before, width) = (Vec::new(), self.llama().config().width);
        for (index, request) in batch.iter().enumerate() {
            let predicting = rows.rows(index, request.first()..request.inputs().len());
            for (row, &target) in predicting.zip(request.targets()) {
                let place = *places.entry((row, target)).or_insert_with(|| {
                    before.extend_from_slice(&hidden[row * width..][..width]);
                    targets.push(target);
                    targets.len() - 1
                });
                scored.push(place);
            }
        }
        let scores = self.llama().scores(&before, &targets);
        let mut scores = scored.into_iter().map(|place| TargetScore {
            log_probability: scores[place].log_probability,
            likeliest: scores[place].likeliest == targets[place],
        });
        let own = |request: &&Request| scores.by_ref().take(request.targets().len()).collect();
        Ok(batch.iter().map(own).collect())
    }

    fn proceed(
        &self,
        prompts: &[&[u32]],
        limit: usize,
        finished: &mut dyn FnMut(usize, &[u32]) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        check(self, prompts)?;
        let rows = PrefixRows::of(prompts);
        let (mut state, width) = (LlamaState::default(), self.llama().config().width);
        let hidden = self.llama().hidden(&rows.tokens, &rows.positions, &rows.segments, &mut state);
        let mut texts = vec![Vec::new(); prompts.len()];
        // Of each text that goes on: its number, the rows before the next token, and the state after the last.
        let mut open: Vec<(usize, Vec<std::ops::Range<usize>>)> =
            rows.paths.into_iter().enumerate().collect();
        let last = |path: &[std::ops::Range<usize>]| path.last().map_or(0, |rows| rows.end - 1);
        let mut after: Vec<f32> =
            open.iter().flat_map(|(_, path)| &hidden[last(path) * width..][..width]).copied().collect();
        for _ in 0..limit {
            if open.is_empty() {
                break;
            }
            let scores = self.llama().scores(&after, &vec![0; open.len()]);
            let mut next = Vec::new();
            open = (open.into_iter().zip(scores))
                .filter_map(|((index, path), score)| {
                    if score.likeliest == self.tokenizer().end_of_text() {
                        return None;
                    }
                    texts[index].push(score.likeliest);
                    if finished(index, &texts[index]) {
                        return None;
                    }
                    next.push((score.likeliest, prompts[index].len() + texts[index].len() - 1));
                    Some((index, path))
                })
                .collect();
            if next.is_empty() {
                break;
            }
            let (tokens, positions): (Vec<u32>, Vec<usize>) = next.into_iter().unzip();
            let first = state.rows();
            let segments: Vec<Segment> = (open.iter().enumerate())
                .map(|(at, (_, path))| Segment { seen: path.clone(), rows: first + at..first + at + 1 })
                .collect();
            after = self.llama().hidden(&tokens, &positions, &segments, &mut state);
            for (at, (_, path)) in open.iter_mut().enumerate() {
                path.push(first + at..first + at + 1);
            }
        }
        Ok(texts)
    }
}

fn check(model: &OutsideModel, sequences: &[&[u32]]) -> Result<()> {
    let vocabulary = model.llama().config().vocabulary;
    match sequences.iter().copied().flatten().find(|&&token| token as usize >= vocabulary) {
        Some(token) => Err(Error::Mismatch(format!("token {token} is outside the model's vocabulary"))),
        None => Ok(()),
    }
}
