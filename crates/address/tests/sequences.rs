//! Row ids of a sequence that grows in pieces, is forked and rolled back equal those of the whole sequence, and those
//! of a direct implementation of the definition.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use engram_address::{
    AddressConfig, Addressing, Arithmetic, Boundary, StoredAddressing, StoredLayer, Tokens, Vocabulary,
};
use proptest::prelude::*;

const TOKENS: u32 = 12;
const PAD: u32 = 2;

/// A sequence with its masks.
#[derive(Clone, Debug, Default)]
struct Sequence {
    ids: Vec<u32>,
    dead: Vec<bool>,
    starts: Vec<bool>,
}

impl Sequence {
    fn tokens(&self) -> Tokens<'_> {
        Tokens::from(&self.ids).dead(&self.dead).starts(&self.starts)
    }

    fn append(&mut self, other: &Sequence) {
        self.ids.extend(&other.ids);
        self.dead.extend(&other.dead);
        self.starts.extend(&other.starts);
    }

    fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.dead.truncate(len);
        self.starts.truncate(len);
    }
}

/// The definition, position by position and token by token, in integers too wide to overflow.
fn row_ids_by_definition(
    addressing: &Addressing,
    index: usize,
    boundary: Boundary,
    sequence: &Sequence,
) -> Vec<u64> {
    let layer = &addressing.layers()[index];
    let class = |token: u32| i64::from(addressing.vocabulary().class(token).unwrap());
    let seen = |time: usize, back: usize| {
        let Some(source) = time.checked_sub(back) else { return class(PAD) };
        let begins = |at: usize| sequence.starts[at] || boundary == Boundary::Before(sequence.ids[at]);
        let ends = |at: usize| sequence.dead[at] || boundary == Boundary::After(sequence.ids[at]);
        let cut = (source + 1..=time).any(begins) || (source..time).any(ends) || sequence.dead[time];
        if cut { class(PAD) } else { class(sequence.ids[source]) }
    };
    let mut ids = Vec::new();
    for time in 0..sequence.ids.len() {
        let mut first_row = 0;
        for (order, primes) in (2..).zip(layer.primes()) {
            let products = (0..order).map(|back| seen(time, back).wrapping_mul(layer.multipliers()[back]));
            let mix = products.fold(0, |mix, product| mix ^ product);
            for &prime in primes {
                ids.push(first_row + i128::from(mix).rem_euclid(i128::from(prime)) as u64);
                first_row += prime;
            }
        }
    }
    ids
}

/// An event in a sequence.
#[derive(Clone, Debug)]
enum Event {
    Extend(Sequence),
    /// Removes this many tokens, or as many as exist and the limit allows.
    Rollback(usize),
    /// Continues with a fork while the original takes other tokens, or the other way round.
    Fork(Sequence, bool),
}

fn sequence(len: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = Sequence> {
    let rarely = || prop::bool::weighted(0.15);
    prop::collection::vec((0..TOKENS, rarely(), rarely()), len).prop_map(|tokens| {
        let mut sequence = Sequence::default();
        for (id, dead, start) in tokens {
            sequence.append(&Sequence { ids: vec![id], dead: vec![dead], starts: vec![start] });
        }
        sequence
    })
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => sequence(0..9).prop_map(Event::Extend),
        2 => (0..7usize).prop_map(Event::Rollback),
        1 => (sequence(0..9), any::<bool>()).prop_map(|(other, swap)| Event::Fork(other, swap)),
    ]
}

fn boundary() -> impl Strategy<Value = Boundary> {
    prop_oneof![
        Just(Boundary::None),
        (0..TOKENS).prop_map(Boundary::After),
        (0..TOKENS).prop_map(Boundary::Before),
        // As in Qwen: the boundary token is also the pad.
        Just(Boundary::After(PAD)),
    ]
}

/// Two layers of any order and number of heads, with drawn multipliers or any 64-bit ones.
fn addressing() -> impl Strategy<Value = (Addressing, Boundary)> {
    let shape = || (2..6usize, 1..19usize, boundary());
    let drawn = (shape(), any::<u64>()).prop_map(|((max_order, heads, boundary), seed)| {
        let config = AddressConfig {
            seed,
            layers: vec![1, 14],
            max_order,
            heads,
            base_rows: (2..=max_order as u64).map(|order| 50 * order).collect(),
            pad_id: PAD,
            boundary,
            arithmetic: Arithmetic::Exact,
        };
        (Addressing::new(&config, vocabulary()).unwrap(), boundary)
    });
    let stored =
        (shape(), prop::collection::vec(any::<i64>(), 5), prop::collection::vec(1..=u32::MAX, 18 * 4))
            .prop_map(|((max_order, heads, boundary), multipliers, primes)| {
                let primes = primes.chunks(18).take(max_order - 1);
                let primes =
                    primes.map(|order| order[..heads].iter().map(|&rows| rows.into()).collect()).collect();
                let layer = StoredLayer { layer: 2, multipliers: multipliers[..max_order].to_vec(), primes };
                let arithmetic = Arithmetic::Wrapping;
                let stored = StoredAddressing { layers: vec![layer], pad_id: PAD, boundary, arithmetic };
                (Addressing::from_stored(stored, vocabulary()).unwrap(), boundary)
            });
    prop_oneof![drawn, stored]
}

/// Tokens 0 and 9 share a class, as do 4 and 11.
fn vocabulary() -> Vocabulary {
    Vocabulary::from_classes(vec![0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 4]).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn ids_are_those_of_the_definition((addressing, boundary) in addressing(), sequence in sequence(0..40)) {
        for index in 0..addressing.layers().len() {
            let mut ids = vec![77; 5];
            addressing.row_ids(index, sequence.tokens(), &mut ids).unwrap();
            prop_assert_eq!(ids, row_ids_by_definition(&addressing, index, boundary, &sequence));
        }
    }

    #[test]
    fn ids_of_pieces_are_those_of_the_whole(
        (addressing, _) in addressing(),
        events in prop::collection::vec(event(), 0..40),
        rollback in prop_oneof![Just(usize::MAX), 0..7usize],
    ) {
        let layers = addressing.layers().len();
        let mut history = addressing.history().with_rollback(rollback);
        let mut sequence = Sequence::default();
        let mut ids = vec![Vec::new(); layers];
        // What the limit must be able to remove.
        let mut promised = 0;
        for event in events {
            match event {
                Event::Extend(more) => {
                    let new = history.extend(more.tokens()).unwrap();
                    let mut ids_of_layer = Vec::new();
                    for (index, ids) in ids.iter_mut().enumerate() {
                        new.row_ids(index, &mut ids_of_layer).unwrap();
                        ids.extend_from_slice(&ids_of_layer);
                    }
                    sequence.append(&more);
                    promised = (promised + more.ids.len()).min(rollback);
                }
                Event::Rollback(tokens) => {
                    let tokens = tokens.min(promised);
                    history.rollback(tokens).unwrap();
                    promised -= tokens;
                    sequence.truncate(sequence.ids.len() - tokens);
                    for (ids, layer) in ids.iter_mut().zip(addressing.layers()) {
                        ids.truncate(sequence.ids.len() * layer.slots());
                    }
                }
                Event::Fork(other, swap) => {
                    let mut fork = history.clone();
                    if swap {
                        std::mem::swap(&mut fork, &mut history);
                    }
                    fork.extend(other.tokens()).unwrap();
                }
            }
            prop_assert_eq!(history.len(), sequence.ids.len());
        }
        for (index, ids) in ids.iter().enumerate() {
            let mut whole = Vec::new();
            addressing.row_ids(index, sequence.tokens(), &mut whole).unwrap();
            prop_assert_eq!(ids, &whole);
        }
    }
}

#[test]
fn long_sequences_are_those_of_the_definition() {
    let config = AddressConfig {
        seed: 3,
        layers: vec![0],
        max_order: 4,
        heads: 5,
        base_rows: vec![100, 200, 300],
        pad_id: PAD,
        boundary: Boundary::After(5),
        arithmetic: Arithmetic::Exact,
    };
    let addressing = Addressing::new(&config, vocabulary()).unwrap();
    let ids: Vec<u32> = (0..5000u64).map(|i| (i * i % 1009 % u64::from(TOKENS)) as u32).collect();
    let dead = ids.iter().enumerate().map(|(i, _)| i % 97 == 0).collect();
    let starts = ids.iter().enumerate().map(|(i, _)| i % 89 == 3).collect();
    let sequence = Sequence { ids, dead, starts };
    let mut ids = Vec::new();
    addressing.row_ids(0, sequence.tokens(), &mut ids).unwrap();
    assert!(ids == row_ids_by_definition(&addressing, 0, config.boundary, &sequence));
}
