//! Rows learn as their optimiser's formula says, and rows that were not touched do not move.
#![allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests

use engram_store::{
    AddressIdentity, DistinctRows, LARGEST_DEVIATION, RowFormat, RowInit, RowOptimizer, RowSource, Storage,
    StoreError, Table, TableOrigin, TrainableTable,
};
use proptest::prelude::*;

fn origin() -> TableOrigin {
    TableOrigin { identity: AddressIdentity::from_bytes([9; 32]), layer: 0 }
}
const NORMAL: RowInit = RowInit::Normal { deviation: 0.5, seed: 11 };

fn values(table: &TrainableTable) -> Vec<f32> {
    let mut out = vec![f32::NAN; table.rows() as usize * table.width()];
    table.gather(&(0..table.rows()).collect::<Vec<_>>(), &mut out).unwrap();
    out
}

fn new(rows: u64, width: usize, optimizer: RowOptimizer) -> TrainableTable {
    TrainableTable::new(rows, width, NORMAL, optimizer, origin(), &Storage::Ram).unwrap()
}

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut out = vec![0.0; count];
    RowInit::Normal { deviation: 1.0, seed }.fill(0, &mut out);
    out
}

/// The formulas of `RowOptimizer`'s page, in f64, over whole tables.
struct Reference {
    width: usize,
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    /// Updates of the table, and of each row.
    step: i32,
    counts: Vec<i32>,
}

impl Reference {
    fn of(table: &TrainableTable) -> Self {
        let p: Vec<f64> = values(table).into_iter().map(f64::from).collect();
        Self {
            width: table.width(),
            m: vec![0.0; p.len()],
            v: vec![0.0; p.len()],
            counts: vec![0; p.len()],
            p,
            step: 0,
        }
    }

    fn update(&mut self, optimizer: RowOptimizer, ids: &[u64], grads: &[f32], rate: f64) {
        self.step += 1;
        if let RowOptimizer::BalancedMomentum { momentum, iterations, floor, scale } = optimizer {
            let mut update = self.nesterov(momentum, ids, grads);
            balance(&mut update, iterations, floor);
            for (&id, row) in ids.iter().zip(&update) {
                let p = &mut self.p[id as usize * self.width..][..self.width];
                p.iter_mut().zip(row).for_each(|(p, u)| *p -= rate * scale * u);
            }
            return;
        }
        for (&id, g) in ids.iter().zip(grads.chunks(self.width)) {
            let row = id as usize * self.width..(id as usize + 1) * self.width;
            let g = g.iter().map(|&g| f64::from(g));
            match optimizer {
                RowOptimizer::Adam { beta1, beta2, epsilon } => {
                    for (i, g) in row.zip(g) {
                        self.m[i] = beta1 * self.m[i] + (1.0 - beta1) * g;
                        self.v[i] = beta2 * self.v[i] + (1.0 - beta2) * g * g;
                        let size = (1.0 - beta2.powi(self.step)).sqrt() / (1.0 - beta1.powi(self.step));
                        self.p[i] -= rate * size * self.m[i] / (self.v[i].sqrt() + epsilon);
                    }
                }
                RowOptimizer::AdamByRow { beta1, beta2, epsilon } => {
                    let count = &mut self.counts[id as usize];
                    *count += 1;
                    for (i, g) in row.zip(g) {
                        self.m[i] = beta1 * self.m[i] + (1.0 - beta1) * g;
                        self.v[i] = beta2 * self.v[i] + (1.0 - beta2) * g * g;
                        let m = self.m[i] / (1.0 - beta1.powi(*count));
                        let v = self.v[i] / (1.0 - beta2.powi(*count));
                        self.p[i] -= rate * m / (v.sqrt() + epsilon);
                    }
                }
                RowOptimizer::RowWiseAdam { beta2, epsilon } => {
                    let mean = g.clone().map(|g| g * g).sum::<f64>() / self.width as f64;
                    let v = &mut self.v[id as usize];
                    *v = if *v == 0.0 { mean } else { beta2 * *v + (1.0 - beta2) * mean };
                    let root = v.sqrt() + epsilon;
                    row.zip(g).for_each(|(i, g)| self.p[i] -= rate * g / root);
                }
                _ => unreachable!(),
            }
        }
    }

    fn nesterov(&mut self, momentum: f64, ids: &[u64], grads: &[f32]) -> Vec<Vec<f64>> {
        let rows = ids.iter().zip(grads.chunks(self.width));
        let row = |(&id, g): (&u64, &[f32])| {
            let m = &mut self.m[id as usize * self.width..][..self.width];
            m.iter_mut().zip(g).for_each(|(m, &g)| *m = momentum * *m + f64::from(g));
            m.iter().zip(g).map(|(m, &g)| f64::from(g) + momentum * m).collect()
        };
        rows.map(row).collect()
    }

    fn check(&self, table: &TrainableTable) {
        for (i, (&wanted, found)) in self.p.iter().zip(values(table)).enumerate() {
            let error = (wanted - f64::from(found)).abs();
            assert!(error <= 1e-6 + 1e-5 * wanted.abs(), "value {i}: {found}, not {wanted}");
        }
    }
}

/// Rows and columns by turns to root mean square 1; rows below the floor are zero.
fn balance(update: &mut [Vec<f64>], iterations: u32, floor: f64) {
    let norm = |values: &[f64]| (values.iter().map(|u| u * u).sum::<f64>() / values.len() as f64).sqrt();
    let total = norm(&update.concat());
    update.iter_mut().filter(|row| norm(row) <= floor * total).for_each(|row| row.fill(0.0));
    let mut active: Vec<_> = update.iter_mut().filter(|row| norm(row) > 0.0).collect();
    for iteration in 0..iterations {
        if iteration % 2 == 0 {
            for row in &mut active {
                let norm = norm(row);
                row.iter_mut().for_each(|u| *u /= norm);
            }
            continue;
        }
        for column in 0..active.first().map_or(0, |row| row.len()) {
            let values: Vec<f64> = active.iter().map(|row| row[column]).collect();
            active.iter_mut().for_each(|row| row[column] /= norm(&values));
        }
    }
}

fn optimizers() -> [RowOptimizer; 7] {
    [
        RowOptimizer::balanced_momentum(),
        RowOptimizer::BalancedMomentum { momentum: 0.5, iterations: 2, floor: 0.6, scale: 1.0 },
        RowOptimizer::adam(),
        RowOptimizer::Adam { beta1: 0.5, beta2: 0.9, epsilon: 1e-3 },
        RowOptimizer::AdamByRow { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        RowOptimizer::AdamByRow { beta1: 0.5, beta2: 0.9, epsilon: 1e-3 },
        RowOptimizer::RowWiseAdam { beta2: 0.9, epsilon: 1e-6 },
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn follows_the_formula_on_touched_rows_and_leaves_the_rest(
        rows in 1..40u64,
        width in 1..40usize,
        batches in prop::collection::vec(prop::collection::vec(any::<u64>(), 0..30), 1..12),
        optimizer in prop::sample::select(optimizers().to_vec()),
    ) {
        let mut table = new(rows, width, optimizer);
        let mut reference = Reference::of(&table);
        for (seed, batch) in (0..).zip(&batches) {
            let batch: Vec<u64> = batch.iter().map(|id| id % rows).collect();
            let distinct = DistinctRows::of(&batch);
            let occurrences = numbers(batch.len() * width, seed);
            let mut grads = vec![0.0; distinct.len() * width];
            distinct.sum(&occurrences, width, &mut grads).unwrap();
            let before = values(&table);
            table.update(distinct.ids(), &grads, 0.01).unwrap();
            reference.update(optimizer, distinct.ids(), &grads, f64::from(0.01f32));
            for id in (0..rows).filter(|id| !batch.contains(id)) {
                let row = id as usize * width..(id as usize + 1) * width;
                prop_assert_eq!(table.row(id).unwrap(), &before[row]);
            }
        }
        prop_assert_eq!(table.step(), batches.len() as u64);
        reference.check(&table);
    }
}

#[test]
fn reproduces_pytorch_sparse_adam() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("golden/sparse_adam.json")).unwrap();
    let floats = |value: &serde_json::Value| -> Vec<f32> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
    };
    let (rows, width) = (golden["rows"].as_u64().unwrap(), golden["width"].as_u64().unwrap() as usize);
    let optimizer = RowOptimizer::Adam {
        beta1: golden["betas"][0].as_f64().unwrap(),
        beta2: golden["betas"][1].as_f64().unwrap(),
        epsilon: golden["epsilon"].as_f64().unwrap(),
    };
    let initial = floats(&golden["initial"]);
    let source = Table::from_fn(rows, width, RowFormat::F32, origin(), &Storage::Ram, |id, row| {
        row.copy_from_slice(&initial[id as usize * width..][..width]);
    });
    let mut table = TrainableTable::from_rows(&source.unwrap(), optimizer, origin(), &Storage::Ram).unwrap();
    let rate = golden["rate"].as_f64().unwrap() as f32;
    for (number, step) in golden["steps"].as_array().unwrap().iter().enumerate() {
        let ids: Vec<u64> = step["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        table.update(&ids, &floats(&step["grads"]), rate).unwrap();
        for (found, wanted) in values(&table).into_iter().zip(floats(&step["values"])) {
            assert!(
                (found - wanted).abs() <= 1e-6 * wanted.abs().max(0.1),
                "step {number}: {found}, not {wanted}"
            );
        }
    }
}

#[test]
fn a_balanced_step_is_as_long_for_a_rare_row_as_for_a_frequent_one() {
    let mut table = new(20, 64, RowOptimizer::balanced_momentum());
    let ids: Vec<u64> = (0..20).collect();
    for seed in 0..100 {
        table.update(&ids[..19], &numbers(19 * 64, seed), 1e-3).unwrap();
    }
    let before = values(&table);
    table.update(&ids, &numbers(20 * 64, 5), 1e-3).unwrap();
    for (before, after) in before.chunks(64).zip(values(&table).chunks(64)) {
        let moved = before.iter().zip(after).map(|(b, a)| f64::from(a - b).powi(2)).sum::<f64>();
        assert!(((moved / 64.0).sqrt() / 0.18e-3 - 1.0).abs() < 1e-3);
    }
}

#[test]
fn frozen_rows_stay_as_they_were_made() {
    let folder = tempfile::tempdir().unwrap();
    let mut table = new(20, 5, RowOptimizer::Frozen);
    let before = values(&table);
    table.update(&[3, 7], &numbers(10, 1), 1.0).unwrap();
    assert_eq!((values(&table), table.step()), (before.clone(), 1));
    table.save(folder.path().join("table")).unwrap();
    let table = TrainableTable::load(folder.path().join("table"), &origin(), &Storage::Ram).unwrap();
    assert_eq!((values(&table), table.step(), table.optimizer()), (before, 1, RowOptimizer::Frozen));
    assert!(new(20, 5, RowOptimizer::Frozen).update(&[20], &[0.0; 5], 1.0).is_err());
}

#[test]
fn a_row_first_touched_late_takes_a_first_step_of_the_rate() {
    let mut table = new(2, 64, RowOptimizer::row_wise_adam());
    for seed in 0..1000 {
        table.update(&[0], &numbers(64, seed), 1e-3).unwrap();
    }
    let before = table.row(1).unwrap().to_vec();
    table.update(&[1], &numbers(64, 5), 1e-3).unwrap();
    let moved = table.row(1).unwrap().iter().zip(&before).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    assert!(((moved / 64.0).sqrt() / 1e-3 - 1.0).abs() < 1e-3);
}

#[test]
fn threads_and_storage_do_not_change_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    let ids: Vec<u64> = (0..6_000).map(|i| i * 3 + i % 3).collect();
    let run = |threads: usize, storage: &Storage, optimizer: RowOptimizer| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut table = TrainableTable::new(20_000, 48, NORMAL, optimizer, origin(), storage).unwrap();
            for seed in 0..3 {
                table.update(&ids, &numbers(ids.len() * 48, seed), 0.01).unwrap();
            }
            values(&table)
        })
    };
    for optimizer in optimizers() {
        let wanted = run(1, &Storage::Ram, optimizer);
        assert!(run(4, &Storage::Ram, optimizer) == wanted);
        assert!(run(2, &Storage::MappedIn(folder.path().to_owned()), optimizer) == wanted);
    }
}

#[test]
fn a_refused_update_changes_nothing() {
    let mut table = new(10, 2, RowOptimizer::adam());
    let before = values(&table);
    let refused = table.update(&[1, 10], &[1.0; 4], 0.1).unwrap_err();
    assert!(matches!(refused, StoreError::RowOutOfRange { row: 10, position: 1, rows: 10 }));
    let refused = table.update(&[4, 4], &[1.0; 4], 0.1).unwrap_err();
    assert!(matches!(refused, StoreError::RowsNotAscending { row: 4, position: 1, before: 4 }));
    assert!(table.update(&[5, 2], &[1.0; 4], 0.1).unwrap_err().to_string().contains("row 2, at position 1"));
    assert!(matches!(table.update(&[5], &[1.0; 4], 0.1), Err(StoreError::WrongLength { .. })));
    for (at, value) in [(3, f32::NAN), (41, f32::NEG_INFINITY), (40, f32::INFINITY)] {
        let mut grads = [1.0; 42];
        grads[at] = value;
        let mut wide = new(10, 14, RowOptimizer::adam());
        let refused = wide.update(&[2, 5, 9], &grads, 0.1).unwrap_err();
        let named = matches!(refused, StoreError::GradientNotFinite { row, position, .. }
            if (row, position) == ([2, 5, 9][at / 14], at / 14));
        assert!(named && wide.step() == 0, "{refused}");
    }
    for rate in [f32::NAN, f32::INFINITY, -0.1] {
        assert!(table.update(&[5], &[1.0; 2], rate).unwrap_err().to_string().starts_with("rate is"));
    }
    assert_eq!((values(&table), table.step()), (before, 0));
}

#[test]
fn settings_outside_their_range_are_refused() {
    let refused = |init, optimizer| {
        TrainableTable::new(4, 4, init, optimizer, origin(), &Storage::Ram).unwrap_err().to_string()
    };
    let adam = |beta1, beta2, epsilon| refused(NORMAL, RowOptimizer::Adam { beta1, beta2, epsilon });
    assert!(adam(1.0, 0.9, 1e-8).starts_with("beta1 is 1"));
    assert!(adam(0.9, f64::NAN, 1e-8).starts_with("beta2 is NaN"));
    assert!(adam(0.9, 0.9, 0.0).starts_with("epsilon is 0"));
    let balanced = |momentum, iterations, floor, scale| {
        refused(NORMAL, RowOptimizer::BalancedMomentum { momentum, iterations, floor, scale })
    };
    assert!(balanced(1.0, 11, 0.0, 1.0).starts_with("momentum is 1"));
    assert!(balanced(0.9, 0, 0.0, 1.0).starts_with("iterations is 0"));
    assert!(balanced(0.9, 11, -0.1, 1.0).starts_with("floor is -0.1"));
    assert!(balanced(0.9, 11, 0.0, f64::INFINITY).starts_with("scale is inf"));
    let init = RowInit::Normal { deviation: -1.0, seed: 0 };
    assert!(refused(init, RowOptimizer::adam()).starts_with("deviation is -1"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever finite gradients come, at whatever width: they are refused, or all stays finite, also in the steps after.
    #[test]
    fn finite_gradients_never_poison_a_row(
        width in prop::sample::select(vec![1usize, 3, 8, 64, 1000]),
        exponents in prop::collection::vec(-149..128i32, 1..12),
        optimizer in prop::sample::select(optimizers().to_vec()),
        seed in any::<u64>(),
    ) {
        let mut table = new(4, width, optimizer);
        for (step, exponent) in (0..).zip(exponents) {
            // Up to 2^128 · (1 − 2⁻²⁴), the largest there is.
            let scale = 2f64.powi(exponent) * 1.999_999_9;
            let numbers = numbers(2 * width, seed.wrapping_add(step));
            let grads: Vec<f32> =
                numbers.iter().map(|number| (scale * f64::from(number.clamp(-1.0, 1.0))) as f32).collect();
            prop_assert!(grads.iter().all(|grad| grad.is_finite()));
            let before = values(&table);
            match table.update(&[1, 3], &grads, 0.01) {
                Ok(()) => prop_assert!(values(&table).iter().all(|value| value.is_finite())),
                Err(StoreError::GradientTooLarge { row, value, largest, .. }) => {
                    prop_assert!([1, 3].contains(&row) && value.abs() > largest);
                    prop_assert_eq!(before, values(&table));
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
        let folder = tempfile::tempdir().unwrap();
        table.save(folder.path().join("table")).unwrap();
        TrainableTable::load(folder.path().join("table"), &origin(), &Storage::Ram).unwrap();
    }
}

#[test]
fn the_largest_gradients_are_named_and_the_largest_allowed_ones_are_taken() {
    for optimizer in optimizers() {
        for (width, large, small) in [(4, 2e19, 4e18f32), (256, 1e18, 5e17)] {
            let mut table = new(8, width, optimizer);
            let mut grads = vec![0.0; 3 * width];
            grads[width + 2] = large;
            let refused = table.update(&[2, 5, 7], &grads, 0.1).unwrap_err();
            assert!(
                matches!(refused, StoreError::GradientTooLarge { row: 5, position: 1, .. }),
                "{optimizer:?}: {refused}"
            );
            assert_eq!(table.step(), 0);
            grads.fill(small);
            for _ in 0..100 {
                table.update(&[2, 5, 7], &grads, 0.1).unwrap();
            }
            assert!(values(&table).iter().all(|value| value.is_finite()), "{optimizer:?}");
        }
    }
}

#[test]
fn what_is_not_finite_is_neither_saved_nor_taken_in() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table");
    for optimizer in optimizers() {
        let mut table = new(5000, 4, optimizer);
        table.save(&path).unwrap();
        let good = std::fs::read(&path).unwrap();
        // A rate that no gradient is to blame for.
        for _ in 0..20 {
            table.update(&[4321], &[1.0, -1.0, 1.0, 2.0], f32::MAX).unwrap();
        }
        let refused = table.save(&path).unwrap_err();
        assert!(
            matches!(refused, StoreError::StateNotFinite { what: "a value", row: 4321, .. }),
            "{optimizer:?}: {refused}"
        );
        assert!(std::fs::read(&path).unwrap() == good, "{optimizer:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let fill = |id: u64, row: &mut [f32]| row[1] = if id == 1030 { bad } else { 1.0 };
        let rows = Table::from_fn(2000, 4, RowFormat::F32, origin(), &Storage::Ram, fill).unwrap();
        let adam = RowOptimizer::adam();
        let refused = TrainableTable::from_rows(&rows, adam, origin(), &Storage::Ram).unwrap_err();
        assert!(matches!(refused, StoreError::StateNotFinite { row: 1030, .. }), "{refused}");
    }
    let wide = RowInit::Normal { deviation: 1e38, seed: 1 };
    TrainableTable::new(10, 4, wide, RowOptimizer::adam(), origin(), &Storage::Ram).unwrap_err();
    let wide = RowInit::Normal { deviation: LARGEST_DEVIATION, seed: 1 };
    TrainableTable::new(9000, 32, wide, RowOptimizer::adam(), origin(), &Storage::Ram)
        .unwrap()
        .save(&path)
        .unwrap();
}
