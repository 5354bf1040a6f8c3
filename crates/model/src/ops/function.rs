//! Functions composed of Burn's primitives, with a backward pass of their own: for devices without fused operations,
//! where the backward pass that Burn derives is slow.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Backend, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::{Device, Tensor};

/// A differentiable function of one tensor. Both passes see tensors without a graph.
pub(super) trait Function<const D: usize>: Debug + Clone + Send + Sync + 'static {
    /// What the backward pass needs.
    type Kept: Debug + Clone + Send + Sync + 'static;

    /// The value at `x`, and what is kept.
    fn forward(&self, x: Tensor<D>) -> (Tensor<D>, Self::Kept);

    /// The gradient of x, from that of the value.
    fn backward(&self, kept: Self::Kept, gradient: Tensor<D>) -> Tensor<D>;
}

/// `function` of `x`, as one node of the graph if there is one.
pub(super) fn apply<F: Function<D>, const D: usize>(function: F, x: Tensor<D>) -> Tensor<D> {
    if !x.is_autodiff() {
        return function.forward(x).0;
    }
    #[cfg(feature = "cuda")]
    if x.device().inner() != Device::flex() {
        return apply_on::<burn::backend::Cuda, F, D>(function, x);
    }
    debug_assert!(x.device().inner() == Device::flex(), "a backend that this crate is not built for");
    apply_on::<Flex, F, D>(function, x)
}

/// [`apply`] on the backend `B`.
fn apply_on<B: Backend, F: Function<D>, const D: usize>(function: F, x: Tensor<D>) -> Tensor<D>
where
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
{
    let x = x.try_into_primitive::<Autodiff<B>>().expect("a tracked tensor of the backend");
    let node = x.node();
    let (value, kept) = function.forward(Tensor::from_primitive::<B>(x.into_primitive()));
    let value = value.try_into_primitive::<B>().expect("a tensor of the backend");
    let prepared = Backward::<B, 1>::prepare::<NoCheckpointing>(Node::<(F, [(); D])>(PhantomData), [node])
        .compute_bound()
        .stateful();
    let value = match prepared {
        OpsKind::Tracked(prepared) => prepared.finish((function, kept), value),
        OpsKind::UnTracked(prepared) => prepared.finish(value),
    };
    Tensor::from_primitive::<Autodiff<B>>(value)
}

/// A function as a node of the graph: `(F, [(); D])`, for Burn's trait has to be told the dimensions, too.
struct Node<F>(PhantomData<F>);

impl<F> Debug for Node<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(std::any::type_name::<F>())
    }
}

impl<B: Backend, F: Function<D>, const D: usize> Backward<B, 1> for Node<(F, [(); D])>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = (F, F::Kept);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = Tensor::<D>::from_primitive::<B>(grads.consume::<B>(&ops.node));
        let [Some(parent)] = ops.parents else { return };
        let (function, kept) = ops.state;
        let gradient = function.backward(kept, gradient);
        grads.register::<B>(parent.id, gradient.try_into_primitive::<B>().expect("a tensor of the backend"));
    }
}
