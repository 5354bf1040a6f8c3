//! Asking a checkpoint of Engram. Its texts go on the plain way, each token from the whole text: whoever has a decoder
//! gives a [`Scorer`] of his own that asks this one for likelihoods and continues texts with that.

use engram_data::Begin;
use engram_model::TargetScore;
use engram_train::{Sampling, Trained, generate};

use super::error::Result;
use super::scorer::{Cost, Request, Scorer};

impl Scorer for Trained {
    fn identity(&self) -> String {
        Self::identity(self).to_owned()
    }

    fn context(&self) -> usize {
        self.config().model.context
    }

    fn begin(&self) -> Begin {
        Self::begin(self)
    }

    fn cost(&self) -> Cost {
        Cost::PaddedTokens
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer().encode(text).map_err(engram_train::Error::from)?)
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        Ok(self.tokenizer().decode(tokens).map_err(engram_train::Error::from)?)
    }

    /// Requests that read the same, or what another begins with, are computed with it; the rest are filled up to one
    /// length. Positions see only those before them, so what stands behind changes nothing.
    fn score(&self, batch: &[&Request]) -> Result<Vec<Vec<TargetScore>>> {
        let (sequences, of) = longest(batch);
        let time = sequences.iter().map(|sequence| sequence.len()).max().unwrap_or(0);
        let fill = self.tokenizer().end_of_text();
        let mut tokens = Vec::with_capacity(sequences.len() * time);
        for sequence in &sequences {
            tokens.extend_from_slice(sequence);
            tokens.resize(tokens.len().next_multiple_of(time), fill);
        }
        let mut targets = Vec::new();
        for (request, &sequence) in batch.iter().zip(&of) {
            let rows = sequence * time + request.first()..;
            targets.extend(rows.zip(request.targets().iter().copied()));
        }
        let mut scores = self.target_scores(&tokens, sequences.len(), &targets)?.into_iter();
        let own = |request: &&Request| scores.by_ref().take(request.targets().len()).collect();
        Ok(batch.iter().map(own).collect())
    }

    fn proceed(
        &self,
        prompts: &[&[u32]],
        limit: usize,
        finished: &mut dyn FnMut(usize, &[u32]) -> bool,
    ) -> Result<Vec<Vec<u32>>> {
        let greedy = Sampling { temperature: 0.0, top_k: None, top_p: 1.0, seed: 0 };
        let text = |(index, prompt): (usize, &&[u32])| {
            let mut text = Vec::new();
            generate(self, prompt, limit, greedy, &mut |token| {
                text.push(token);
                !finished(index, &text)
            })?;
            Ok(text)
        };
        prompts.iter().enumerate().map(text).collect()
    }
}

/// The sequences that no other begins with, and for each request the one that its inputs begin.
fn longest<'a>(batch: &[&'a Request]) -> (Vec<&'a [u32]>, Vec<usize>) {
    let mut order: Vec<usize> = (0..batch.len()).collect();
    // What a sequence begins with comes before it: from behind, the longest first.
    order.sort_by_key(|&index| std::cmp::Reverse(batch[index].inputs()));
    let (mut sequences, mut of) = (Vec::<&[u32]>::new(), vec![0; batch.len()]);
    for index in order {
        let inputs = batch[index].inputs();
        if !sequences.last().is_some_and(|sequence| sequence.starts_with(inputs)) {
            sequences.push(inputs);
        }
        of[index] = sequences.len() - 1;
    }
    (sequences, of)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_request_is_a_beginning_of_its_sequence(
            texts in proptest::collection::vec(proptest::collection::vec(0_u32..3, 2..7), 1..12),
        ) {
            let requests: Vec<Request> =
                texts.iter().map(|text| Request::new(&text[..1], &text[1..]).unwrap()).collect();
            let batch: Vec<&Request> = requests.iter().collect();
            let (sequences, of) = longest(&batch);
            for (request, &sequence) in requests.iter().zip(&of) {
                prop_assert!(sequences[sequence].starts_with(request.inputs()));
            }
            for (index, sequence) in sequences.iter().enumerate() {
                let others = sequences.iter().enumerate().filter(|(other, _)| *other != index);
                prop_assert!(others.into_iter().all(|(_, other)| !other.starts_with(sequence)));
            }
        }
    }
}
