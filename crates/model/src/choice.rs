//! Which experts see which token.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor};
use rayon::prelude::*;

use crate::host::int;
use crate::sequences::Sequences;

/// The experts chosen for each token, `[tokens, active]`, best first.
#[derive(Debug, Clone)]
pub struct Choice {
    pub(crate) experts: Arc<[u32]>,
    pub(crate) active: usize,
    pub(crate) routed: usize,
}

impl Choice {
    /// Takes the `active` largest of `scores + balance` per token, `[tokens, routed]`; ties go to the lower index.
    pub(crate) fn best(scores: &[f32], balance: &[f32], active: usize) -> Self {
        let routed = balance.len();
        let mut experts = vec![0; scores.len() / routed * active];
        let rows = scores.par_chunks_exact(routed).with_min_len(1 << 10);
        rows.zip(experts.par_chunks_exact_mut(active)).for_each_with(Vec::new(), |order, (row, best)| {
            order.clear();
            order.extend(
                row.iter().zip(balance).zip(0..).map(|((score, bias), expert)| (score + bias, expert)),
            );
            let better = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            if active < routed {
                order.select_nth_unstable_by(active - 1, better);
                order.truncate(active);
            }
            order.sort_unstable_by(better);
            best.iter_mut().zip(order).for_each(|(best, &mut (_, expert))| *best = expert);
        });
        Self { experts: experts.into(), active, routed }
    }

    /// Tokens that each expert sees, `[routed]`.
    pub fn loads(&self) -> Vec<u64> {
        let mut loads = vec![0; self.routed];
        for &expert in self.experts.iter() {
            loads[expert as usize] += 1;
        }
        loads
    }

    /// f_i / (T·S) for every token and expert, `[tokens, routed]`: T is the length of the token's sequence, S the number
    /// of sequences, and f_i the tokens of the sequence that see expert i, in units of the number that each expert would
    /// see if all saw as many.
    pub(crate) fn sequence_factors(&self, sequences: &Sequences) -> Vec<f32> {
        let mut factors = Vec::with_capacity(self.experts.len() / self.active * self.routed);
        let mut rest = &self.experts[..];
        for time in sequences.lengths() {
            let (chosen, later) = rest.split_at(time * self.active);
            let mut loads = vec![0.0_f32; self.routed];
            chosen.iter().for_each(|&expert| loads[expert as usize] += 1.0);
            let mean = chosen.len() as f32 / self.routed as f32;
            let share = 1.0 / (mean * (time * sequences.len()) as f32);
            loads.iter_mut().for_each(|load| *load *= share);
            (0..time).for_each(|_| factors.extend_from_slice(&loads));
            rest = later;
        }
        factors
    }

    /// Tokens take the places of their experts in order.
    pub(crate) fn dispatch(&self) -> Dispatch {
        let loads = self.loads();
        let most = loads.iter().max().map_or(0, |&most| most as usize);
        let places = most.next_multiple_of(PLACES);
        let tokens = self.experts.len() / self.active;
        let mut token: Vec<u32> = (0..self.routed * places).map(|place| (place % tokens) as u32).collect();
        let mut next: Vec<usize> = (0..self.routed).map(|expert| expert * places).collect();
        let mut place = Vec::with_capacity(self.experts.len());
        for (slot, &expert) in self.experts.iter().enumerate() {
            let next = &mut next[expert as usize];
            token[*next] = (slot / self.active) as u32;
            place.push(*next as u32);
            *next += 1;
        }
        Dispatch { token: token.into(), place: place.into() }
    }

    pub(crate) fn tensor(&self, device: &Device) -> Tensor<2, Int> {
        let tokens = self.experts.len() / self.active;
        int(&self.experts, device).reshape([tokens, self.active])
    }
}

/// Which token stands where when every expert has equally many places.
pub(crate) struct Dispatch {
    /// Of each place of each expert, `[routed·places]`. Those that no token chose hold some other token, whose result
    /// is ignored.
    pub(crate) token: Arc<[u32]>,
    /// Where each token's chosen experts see it, `[tokens·active]`.
    pub(crate) place: Arc<[u32]>,
}

/// Places of an expert come in so many: shapes then change seldom, and products are in whole tiles.
const PLACES: usize = 64;
