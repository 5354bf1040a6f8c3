//! A chunk at a time, the decoder computes what the model computes over whole sequences.
#![allow(clippy::unwrap_used, reason = "a panic is a failure")]

mod common;

use common::{EVERYTHING, Fixture, PLAIN, WITHOUT_MEMORY, assert_close, departing, random_tokens};
use engram_address::History;
use engram_infer::{
    Cache, Chunk, Decoder, Dtype, Needed, Root, RowIds, RowTiers, Sequence, StepOutput, Target,
};
use proptest::prelude::*;

/// One sequence and what was computed of it.
struct Line {
    tokens: Vec<u32>,
    sequence: Sequence,
    history: Option<History>,
    memory: bool,
    logits: Vec<f32>,
    gates: Vec<Vec<f32>>,
}

struct Bench {
    decoder: Decoder,
    tiers: Option<RowTiers>,
    cache: Cache,
}

impl Bench {
    fn new(fixture: &Fixture, page: usize) -> Self {
        Self::of(fixture, page, Dtype::F32)
    }

    fn of(fixture: &Fixture, page: usize, dtype: Dtype) -> Self {
        let decoder = fixture.decoder_of(dtype);
        let cache = Cache::new(decoder.cache_layout(page), 400);
        Self { tiers: fixture.tiers(), decoder, cache }
    }

    fn line(&mut self, tokens: &[u32], memory: bool) -> Line {
        let root = if memory { Root::Memory(0) } else { Root::NoMemory };
        let sequence = self.cache.begin(root, tokens);
        let mut history = self.tiers.as_ref().filter(|_| memory).map(|tiers| tiers.addressing().history());
        if let Some(history) = &mut history {
            history.extend(&tokens[..sequence.len()]).unwrap();
        }
        Line { tokens: tokens.to_vec(), sequence, history, memory, logits: Vec::new(), gates: Vec::new() }
    }

    /// The next `counts[i]` tokens of line i, all in one step.
    fn step(&mut self, lines: &mut [Line], counts: &[usize]) -> StepOutput {
        let mut ids = RowIds::default();
        let mut next = Vec::new();
        for (line, &count) in lines.iter_mut().zip(counts) {
            let start = line.sequence.len();
            let tokens = line.tokens[start..start + count].to_vec();
            if let (Some(tiers), Some(history)) = (&self.tiers, &mut line.history) {
                ids.add(history, &tokens, tiers).unwrap();
            }
            self.cache.reserve(&mut line.sequence, count).unwrap();
            next.push(tokens);
        }
        let any = lines.iter().zip(counts).any(|(line, &count)| line.history.is_some() && count > 0);
        let mut rows: Vec<_> = self
            .tiers
            .iter()
            .filter(|_| any)
            .map(|tiers| tiers.fetch(ids.clone(), Needed::Now).unwrap())
            .collect();
        let chunks = lines.iter().zip(&next).filter(|(_, tokens)| !tokens.is_empty());
        let chunks: Vec<Chunk<'_>> = chunks
            .map(|(line, tokens)| {
                let memory = (line.memory && line.history.is_some()).then_some(0);
                Chunk { sequence: &line.sequence, tokens, memory, logits: tokens.len(), targets: &[] }
            })
            .collect();
        let output = self.decoder.step(&mut self.cache, &chunks, &mut rows).unwrap();
        drop(chunks);
        let vocabulary = self.decoder.config().vocabulary;
        let streams = self.decoder.config().streams();
        let mut row = 0;
        for (line, tokens) in lines.iter_mut().zip(&next) {
            let rows = row..row + tokens.len();
            line.logits.extend_from_slice(&output.logits[rows.start * vocabulary..rows.end * vocabulary]);
            line.gates.resize(output.gates.len(), Vec::new());
            for (line, gates) in line.gates.iter_mut().zip(&output.gates) {
                line.extend_from_slice(&gates[rows.start * streams..rows.end * streams]);
            }
            row += tokens.len();
            let len = line.sequence.len() + tokens.len();
            self.cache.commit(&mut line.sequence, len, &line.tokens);
        }
        output
    }

    /// The whole of one sequence, in one step.
    fn whole(&mut self, tokens: &[u32]) -> Line {
        let mut lines = [self.line(tokens, true)];
        let left = tokens.len() - lines[0].sequence.len();
        self.step(&mut lines, &[left]);
        let [line] = lines;
        line
    }
}

#[test]
fn logits_and_gates_are_those_of_the_plain_forward_pass() {
    for config in [EVERYTHING, PLAIN, WITHOUT_MEMORY] {
        let fixture = Fixture::new(config);
        let tokens = random_tokens(40, 1);
        let mut bench = Bench::new(&fixture, 4);
        let line = bench.whole(&tokens);
        assert_close(&line.logits, &fixture.plain_logits(&tokens).concat(), 1e-4);
        for (found, expected) in line.gates.iter().zip(fixture.plain_gates(&tokens)) {
            assert_close(found, &expected, 1e-4);
        }
        assert_eq!(line.gates.len(), fixture.tables.len());
    }
}

#[test]
fn every_form_of_memory_decodes_as_it_was_trained() {
    for config in departing() {
        let fixture = Fixture::new(&config);
        let tokens = random_tokens(40, 1);
        let expected = fixture.plain_logits(&tokens).concat();
        let line = Bench::new(&fixture, 4).whole(&tokens);
        assert_close(&line.logits, &expected, 2e-4);
        // The same bits in chunks and pages.
        let mut bench = Bench::new(&fixture, 7);
        let mut lines = [bench.line(&tokens, true)];
        for count in [1, 12, 3, 24] {
            bench.step(&mut lines, &[count]);
        }
        assert_eq!(lines[0].logits, line.logits, "{config}");
        assert!(line.gates.iter().flatten().all(|gate| (0.0..=1.0).contains(gate)));
        let mut without = [bench.line(&tokens, false)];
        bench.step(&mut without, &[40]);
        assert_ne!(without[0].logits, line.logits, "its memory is heard: {config}");
    }
}

#[test]
fn targets_have_the_probabilities_of_their_logits() {
    let fixture = Fixture::new(EVERYTHING);
    let mut bench = Bench::new(&fixture, 4);
    let tokens = random_tokens(20, 9);
    let logits = bench.whole(&tokens).logits;
    let mut bench = Bench::new(&fixture, 4);
    let mut line = bench.line(&tokens, true);
    bench.cache.reserve(&mut line.sequence, 20).unwrap();
    let mut ids = RowIds::default();
    ids.add(line.history.as_mut().unwrap(), &tokens, bench.tiers.as_ref().unwrap()).unwrap();
    let mut rows = [bench.tiers.as_ref().unwrap().fetch(ids, Needed::Now).unwrap()];
    // Out of order, twice after one token, and not after every token.
    let targets: Vec<Target> = [(7, 3, 0), (19, 63, 2), (7, 5, 64), (0, 1, 1)]
        .map(|(after, token, top)| Target { after, token, top })
        .into();
    let chunk =
        Chunk { sequence: &line.sequence, tokens: &tokens, memory: Some(0), logits: 0, targets: &targets };
    let output = bench.decoder.step(&mut bench.cache, &[chunk], &mut rows).unwrap();
    assert!(output.logits.is_empty());
    assert_eq!(output.scores.len(), targets.len());
    for (target, score) in targets.iter().zip(&output.scores) {
        let logits = &logits[target.after * 64..][..64];
        let total = logits.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln() as f32;
        let own = logits[target.token as usize];
        assert!((score.logprob - (own - total)).abs() < 1e-5);
        assert_eq!(score.likeliest, logits.iter().all(|&logit| logit <= own));
        assert_eq!(score.top.len(), target.top);
        assert!(score.top.is_sorted_by(|a, b| a.1 >= b.1));
        for &(token, logprob) in &score.top {
            assert!((logprob - (logits[token as usize] - total)).abs() < 1e-5);
        }
    }
}

/// Weights are normal, not trained: what rounding does to a trained model's answers is measured elsewhere.
#[test]
fn rounded_weights_change_logits_by_little() {
    for config in [EVERYTHING, PLAIN, WITHOUT_MEMORY] {
        let fixture = Fixture::new(config);
        let tokens = random_tokens(40, 1);
        let exact = Bench::new(&fixture, 4).whole(&tokens).logits;
        let size = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>().sqrt();
        for (format, most) in [(Dtype::Bf16, 0.05), (Dtype::Int8, 0.15)] {
            let found = Bench::of(&fixture, 4, format).whole(&tokens).logits;
            let errors: Vec<f32> = found.iter().zip(&exact).map(|(found, exact)| found - exact).collect();
            let share = size(&errors) / size(&exact);
            assert!(share > 0.0 && share < most, "{format:?}: {share}");
        }
    }
}

#[test]
fn a_page_once_computed_serves_every_sequence_that_begins_with_it() {
    let fixture = Fixture::new(EVERYTHING);
    let mut bench = Bench::new(&fixture, 4);
    let tokens = random_tokens(30, 2);
    let first = bench.whole(&tokens);
    let second = bench.whole(&tokens);
    assert_eq!(second.logits.len(), 2 * 64, "28 of 30 positions were there");
    assert_eq!(second.logits, first.logits[28 * 64..]);
}

#[test]
fn without_its_memory_a_model_says_something_else_and_gates_are_shut() {
    let fixture = Fixture::new(EVERYTHING);
    let mut bench = Bench::new(&fixture, 4);
    let tokens = random_tokens(20, 3);
    let with = bench.whole(&tokens);
    let mut lines = [bench.line(&tokens, false), bench.line(&tokens, true)];
    assert_eq!((lines[0].sequence.len(), lines[1].sequence.len()), (0, 16), "nothing is shared");
    bench.step(&mut lines, &[20, 4]);
    assert_ne!(lines[0].logits, with.logits);
    assert!(lines[0].gates.iter().flatten().all(|&gate| gate == 0.0));
    assert_eq!(lines[1].logits, with.logits[16 * 64..], "its neighbour's memory is on");
}

#[test]
fn rolled_back_tokens_leave_no_trace() {
    let fixture = Fixture::new(EVERYTHING);
    let mut bench = Bench::new(&fixture, 4);
    let tokens = random_tokens(30, 4);
    let expected = bench.whole(&tokens);
    for page in [3, 5, 16] {
        let mut bench = Bench::new(&fixture, page);
        let mut wrong = tokens[..13].to_vec();
        wrong.extend(random_tokens(12, 5));
        let mut lines = [bench.line(&wrong, true)];
        bench.step(&mut lines, &[25]);
        let [line] = &mut lines;
        bench.cache.truncate(&mut line.sequence, 13);
        line.history.as_mut().unwrap().rollback(12).unwrap();
        line.tokens = tokens.clone();
        line.logits.truncate(13 * 64);
        bench.step(&mut lines, &[17]);
        assert_eq!(lines[0].logits, expected.logits);
    }
}

#[test]
fn a_fork_goes_its_own_way() {
    let fixture = Fixture::new(EVERYTHING);
    let mut bench = Bench::new(&fixture, 4);
    let (left, mut right) = (random_tokens(30, 6), random_tokens(30, 7));
    right[..18].copy_from_slice(&left[..18]);
    let mut fresh = Bench::new(&fixture, 4);
    let expected = [fresh.whole(&left).logits, fresh.whole(&right).logits];
    let mut lines = vec![bench.line(&left, true)];
    bench.step(&mut lines, &[18]);
    let fork = Line {
        tokens: right,
        sequence: bench.cache.fork(&lines[0].sequence),
        history: lines[0].history.clone(),
        memory: true,
        logits: lines[0].logits.clone(),
        gates: lines[0].gates.clone(),
    };
    lines.push(fork);
    bench.step(&mut lines, &[5, 1]);
    bench.step(&mut lines, &[7, 11]);
    assert_eq!(lines[0].logits, expected[0]);
    assert_eq!(lines[1].logits[18 * 64..], expected[1][expected[1].len() - 12 * 64..]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Bit for bit: alone in one step, or in any batch, chunks and pages.
    #[test]
    fn neither_batch_nor_chunks_nor_pages_change_a_bit(
        config in prop_oneof![Just(EVERYTHING), Just(PLAIN), Just(WITHOUT_MEMORY)],
        format in prop_oneof![Just(Dtype::F32), Just(Dtype::Bf16), Just(Dtype::Int8)],
        page in 1_usize..20,
        lengths in prop::collection::vec(1_usize..60, 1..7),
        shared in 0_usize..40,
        chunks in prop::collection::vec(prop::collection::vec(0_usize..20, 7), 1..8),
        seed: u64,
    ) {
        let fixture = Fixture::new(config);
        let common = random_tokens(shared, seed);
        let lines: Vec<Vec<u32>> = (1..).zip(&lengths).map(|(index, &length)| {
            let tokens = random_tokens(length, seed ^ index);
            common.iter().copied().take(length / 2).chain(tokens).take(length).collect()
        }).collect();
        let alone: Vec<Vec<f32>> =
            lines.iter().map(|tokens| Bench::of(&fixture, 7, format).whole(tokens).logits).collect();

        let mut bench = Bench::of(&fixture, page, format);
        let mut together: Vec<Line> = lines.iter().map(|tokens| bench.line(tokens, true)).collect();
        for counts in chunks.iter().chain(std::iter::once(&vec![usize::MAX; 7])) {
            let counts: Vec<usize> = together.iter().zip(counts)
                .map(|(line, &count)| count.min(line.tokens.len() - line.sequence.len())).collect();
            if counts.iter().any(|&count| count > 0) {
                bench.step(&mut together, &counts);
            }
        }
        for (line, alone) in together.iter().zip(&alone) {
            prop_assert_eq!(&line.logits, alone);
        }
    }
}
