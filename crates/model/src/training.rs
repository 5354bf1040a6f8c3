//! How each weight is trained, declared by the module that holds it.
//!
//! A module knows which of its weights are matrices and where one tensor holds several side by side. It declares that
//! next to the weight's construction, so that no optimiser has to guess from a weight's name or shape.

use std::collections::BTreeMap;

use burn::module::{Param, ParamId};
use burn::tensor::Tensor;

/// How a weight is trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WeightTraining {
    /// By Muon: each of these matrices is orthogonalised by itself, and all decay.
    Muon(Matrices),
    /// By Adam.
    Adam {
        /// Whether the decay of Adam's weights shrinks it: matrices and embeddings, but not norms, biases and scales.
        decay: bool,
    },
}

/// The matrices that a weight `[…, in, out]` holds. Leading dimensions count matrices, as for a stack of experts.
///
/// Its columns are equal groups, one per head, and each group is divided into parts such as a key and a value. A part's
/// columns of all groups make up one matrix (a key projection of all heads), or, where heads are trained apart, one
/// matrix per group.
///
/// ```text
/// keys and values of two heads:   k₀ k₀ v₀ | k₁ k₁ v₁     groups 2, parts [2, 1]
/// matrices:                       k₀ k₀ k₁ k₁ and v₀ v₁
/// with heads apart:               k₀ k₀, k₁ k₁, v₀ and v₁
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrices {
    stacked: usize,
    groups: usize,
    parts: Vec<usize>,
}

impl Matrices {
    /// One matrix of `columns`.
    pub fn whole(columns: usize) -> Self {
        Self::side_by_side(vec![columns])
    }

    /// One matrix after another, of these columns each.
    pub fn side_by_side(parts: Vec<usize>) -> Self {
        Self { stacked: 1, groups: 1, parts }
    }

    /// For every one of `heads`, columns divided into `parts`.
    pub fn of_heads(heads: usize, parts: Vec<usize>) -> Self {
        Self { stacked: 1, groups: heads, parts }
    }

    /// `count` matrices of equally many rows on top of each other.
    pub fn stacked(count: usize, columns: usize) -> Self {
        Self { stacked: count, groups: 1, parts: vec![columns] }
    }

    /// The matrices of `weight`, whose shape is `[…, in, out]`: a batch `[matrices, rows, columns]` for every part.
    ///
    /// # Panics
    /// When the shape is not what was declared.
    pub fn split(&self, weight: Tensor<1>, shape: &[usize], heads_apart: bool) -> Vec<Tensor<3>> {
        let [count, rows, columns] = self.layout(shape);
        if self.groups == 1 && self.parts.len() == 1 {
            return vec![weight.reshape([count, rows, columns])];
        }
        let (groups, group) = (self.groups, columns / self.groups);
        let weight = weight.reshape([count, rows, groups, group]);
        let part = |(start, width): (usize, usize)| {
            let part = weight.clone().narrow(3, start, width);
            match heads_apart {
                true => part.swap_dims(1, 2).reshape([count * groups, rows, width]),
                false => part.reshape([count, rows, groups * width]),
            }
        };
        self.places().map(part).collect()
    }

    /// The weight, flat, of which [`split`](Self::split) made `parts`.
    ///
    /// # Panics
    /// When the parts are not those of such a weight.
    pub fn join(&self, parts: Vec<Tensor<3>>, shape: &[usize], heads_apart: bool) -> Tensor<1> {
        let [count, rows, columns] = self.layout(shape);
        let all = count * rows * columns;
        let groups = self.groups;
        let part = |(part, &width): (Tensor<3>, &usize)| match heads_apart {
            true => part.reshape([count, groups, rows, width]).swap_dims(1, 2),
            false => part.reshape([count, rows, groups, width]),
        };
        let mut parts: Vec<Tensor<4>> = parts.into_iter().zip(&self.parts).map(part).collect();
        match parts.len() {
            1 => parts.remove(0).reshape([all]),
            _ => Tensor::cat(parts, 3).reshape([all]),
        }
    }

    /// First column and width of each part of a group.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.parts.iter().scan(0, |next, &width| {
            *next += width;
            Some((*next - width, width))
        })
    }

    /// Matrices on top of each other, their rows and columns.
    fn layout(&self, shape: &[usize]) -> [usize; 3] {
        let [leading @ .., rows, columns] = shape else { panic!("{shape:?} is not the shape of a matrix") };
        assert_eq!(*columns, self.groups * self.parts.iter().sum::<usize>(), "columns are not as declared");
        assert!(rows.is_multiple_of(self.stacked), "rows are not as declared");
        [leading.iter().product::<usize>() * self.stacked, rows / self.stacked, *columns]
    }
}

/// What the modules of a model declare: for every weight that learns, how.
#[derive(Debug, Default)]
pub struct TrainingPlan {
    by_weight: BTreeMap<ParamId, WeightTraining>,
}

impl TrainingPlan {
    /// What `module` declares.
    pub fn of(module: &impl DeclareTraining) -> Self {
        let mut plan = Self::default();
        module.declare_training(&mut plan);
        plan
    }

    /// The training of the weight `id`; none: no module declared it.
    pub fn get(&self, id: ParamId) -> Option<&WeightTraining> {
        self.by_weight.get(&id)
    }

    /// Muon trains the `matrices` of `weight`.
    pub fn muon<const D: usize>(&mut self, weight: &Param<Tensor<D>>, matrices: Matrices) {
        self.by_weight.insert(weight.id, WeightTraining::Muon(matrices));
    }

    /// Adam trains `weight`, a matrix or embedding, which decays.
    pub fn adam<const D: usize>(&mut self, weight: &Param<Tensor<D>>) {
        self.by_weight.insert(weight.id, WeightTraining::Adam { decay: true });
    }

    /// Adam trains `weight`, a norm's weight, a bias or a scale, which does not decay.
    pub fn adam_without_decay<const D: usize>(&mut self, weight: &Param<Tensor<D>>) {
        self.by_weight.insert(weight.id, WeightTraining::Adam { decay: false });
    }
}

/// A module that says how each of its weights is trained.
pub trait DeclareTraining {
    /// Declares every weight of this module, and has its parts declare theirs.
    fn declare_training(&self, plan: &mut TrainingPlan);
}

impl<T: DeclareTraining> DeclareTraining for Option<T> {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        self.iter().for_each(|module| module.declare_training(plan));
    }
}

impl<T: DeclareTraining> DeclareTraining for Vec<T> {
    fn declare_training(&self, plan: &mut TrainingPlan) {
        self.iter().for_each(|module| module.declare_training(plan));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};
    use proptest::prelude::*;

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|value| value as f32).collect()
    }

    fn tensor(values: Vec<f32>) -> Tensor<1> {
        let count = values.len();
        Tensor::from_data(TensorData::new(values, [count]), &Device::flex())
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().try_into_vec().unwrap()
    }

    #[test]
    fn keys_and_values_of_all_heads_are_a_matrix_each() {
        // One row: k₀ k₀ v₀ k₁ k₁ v₁.
        let matrices = Matrices::of_heads(2, vec![2, 1]);
        let split = |apart| -> Vec<Vec<f32>> {
            matrices.split(tensor(numbers(6)), &[1, 6], apart).into_iter().map(values).collect()
        };
        assert_eq!(split(false), [vec![0.0, 1.0, 3.0, 4.0], vec![2.0, 5.0]]);
        let dims = |apart| -> Vec<[usize; 3]> {
            matrices.split(tensor(numbers(6)), &[1, 6], apart).iter().map(|part| part.dims()).collect()
        };
        assert_eq!(dims(false), [[1, 1, 4], [1, 1, 2]]);
        assert_eq!(dims(true), [[2, 1, 2], [2, 1, 1]]);
    }

    #[test]
    fn stacked_matrices_are_parts_of_the_rows() {
        let split = Matrices::stacked(2, 3).split(tensor(numbers(12)), &[4, 3], false);
        assert_eq!((split.len(), split[0].dims()), (1, [2, 2, 3]));
    }

    proptest! {
        #[test]
        fn joined_parts_are_the_weight(
            leading in 1_usize..3, rows in 1_usize..4, heads in 1_usize..4,
            parts in prop::collection::vec(1_usize..4, 1..4), apart: bool,
        ) {
            let shape = [leading, rows, heads * parts.iter().sum::<usize>()];
            let matrices = Matrices::of_heads(heads, parts);
            let weight = numbers(shape.iter().product());
            let split = matrices.split(tensor(weight.clone()), &shape, apart);
            prop_assert_eq!(values(matrices.join(split, &shape, apart)), weight);
        }
    }
}
