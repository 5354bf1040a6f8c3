//! Fused operations: hand-written CPU kernels inside Burn's graph, and the choice between them and Burn's primitives.
//!
//! Burn's `flex` backend runs every primitive by itself, so that a norm is seven passes over memory. An operation
//! of [`engram_kernels`] with its own backward is one node of the graph instead. [`apply`] takes tensors that live
//! on `flex`, tracked or not; on any other backend the operation is composed of Burn's primitives ([`choose`]).

use std::cell::Cell;
use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::{Device, Tensor, TensorData};

type FlexTensor = <Flex as burn::backend::BackendTypes>::FloatTensorPrimitive;
type Tracked = <Autodiff<Flex> as burn::backend::BackendTypes>::FloatTensorPrimitive;

/// A differentiable function of `N` float tensors, given as row-major slices, to one.
pub(super) trait Operation<const N: usize>: Debug + Send + Sync + 'static {
    /// What the backward pass needs besides inputs and output.
    type Saved: Debug + Send + Sync + 'static;

    /// The output's values, and what is kept for the backward pass.
    fn forward(&self, inputs: [&[f32]; N]) -> (Vec<f32>, Self::Saved);

    /// Gradients of the inputs from that of the output.
    fn backward(&self, pass: Pass<'_, Self::Saved, N>) -> [Vec<f32>; N];
}

/// What a backward pass sees.
pub(super) struct Pass<'a, S, const N: usize> {
    pub(super) inputs: [&'a [f32]; N],
    pub(super) output: &'a [f32],
    pub(super) saved: &'a S,
    pub(super) gradient: &'a [f32],
}

/// A tensor of the `flex` backend, out of Burn's type-erased wrapper.
#[derive(Clone)]
pub(super) enum Input {
    Plain(FlexTensor),
    Tracked(Tracked),
}

impl Input {
    fn plain(&self) -> FlexTensor {
        match self {
            Self::Plain(tensor) => tensor.clone(),
            Self::Tracked(tensor) => tensor.primitive().clone(),
        }
    }

    fn into_tracked(self) -> Tracked {
        match self {
            Self::Plain(tensor) => Tracked::new(tensor),
            Self::Tracked(tensor) => tensor,
        }
    }
}

/// What `fused` makes of `inputs`, which live on `device`, if it has fused operations; else what `composed` makes of them.
pub(super) fn choose<I, T>(
    device: &Device,
    inputs: I,
    fused: impl FnOnce(I) -> T,
    composed: impl FnOnce(I) -> T,
) -> T {
    if fused_on(device) { fused(inputs) } else { composed(inputs) }
}

/// Whether operations run fused on `device`: on `flex`, unless they are to be [`composed`].
pub fn fused_on(device: &Device) -> bool {
    !COMPOSED.get() && (*device == Device::flex() || *device == Device::flex().autodiff())
}

thread_local! {
    static COMPOSED: Cell<bool> = const { Cell::new(false) };
}

/// Does `work` with every operation composed of Burn's primitives on this thread, as on all backends but `flex`:
/// the model in its plainest form, to check the fused operations against.
pub fn composed<T>(work: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            COMPOSED.set(self.0);
        }
    }
    let _restore = Restore(COMPOSED.replace(true));
    work()
}

/// Takes a tensor out of its wrapper.
///
/// # Panics
/// When it does not live on `flex`, which [`choose`] sees to.
pub(super) fn input<const D: usize>(tensor: Tensor<D>) -> Input {
    if tensor.is_autodiff() {
        Input::Tracked(tensor.try_into_primitive::<Autodiff<Flex>>().expect("a tensor of the flex backend"))
    } else {
        Input::Plain(tensor.try_into_primitive::<Flex>().expect("a tensor of the flex backend"))
    }
}

/// Runs `operation` as one node of the graph.
pub(super) fn apply<O: Operation<N>, const N: usize, const D: usize>(
    operation: O,
    inputs: [Input; N],
    shape: [usize; D],
) -> Tensor<D> {
    if inputs.iter().all(|input| matches!(input, Input::Plain(_))) {
        let inputs = inputs.map(|input| contiguous(input.plain()));
        let (values, _) = operation.forward(inputs.each_ref().map(slice));
        return Tensor::from_primitive::<Flex>(tensor(values, &shape));
    }
    let tracked = inputs.map(Input::into_tracked);
    let nodes = tracked.each_ref().map(|tensor| tensor.node());
    let inputs = tracked.map(|tensor| contiguous(tensor.into_primitive()));
    let (values, saved) = operation.forward(inputs.each_ref().map(slice));
    let output = tensor(values, &shape);
    let prepared =
        Node(std::marker::PhantomData::<O>).prepare::<NoCheckpointing>(nodes).compute_bound().stateful();
    let output = match prepared {
        OpsKind::Tracked(prepared) => {
            let state = State { operation, inputs, output: output.clone(), saved };
            prepared.finish(Shared(Arc::new(state)), output)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    };
    Tensor::from_primitive::<Autodiff<Flex>>(output)
}

struct State<O: Operation<N>, const N: usize> {
    operation: O,
    inputs: [FlexTensor; N],
    output: FlexTensor,
    saved: O::Saved,
}

struct Shared<O: Operation<N>, const N: usize>(Arc<State<O, N>>);

impl<O: Operation<N>, const N: usize> Clone for Shared<O, N> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<O: Operation<N>, const N: usize> Debug for Shared<O, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.operation.fmt(f)
    }
}

#[derive(Debug)]
struct Node<O>(std::marker::PhantomData<O>);

impl<O: Operation<N>, const N: usize> Backward<Flex, N> for Node<O> {
    type State = Shared<O, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let gradient = contiguous(grads.consume::<Flex>(&ops.node));
        let State { operation, inputs, output, saved } = &*ops.state.0;
        let pass = Pass {
            inputs: inputs.each_ref().map(slice),
            output: slice(output),
            saved,
            gradient: slice(&gradient),
        };
        let gradients = operation.backward(pass);
        for ((parent, values), input) in ops.parents.into_iter().zip(gradients).zip(inputs) {
            if let Some(parent) = parent {
                let shape: Vec<usize> = input.layout().shape().iter().copied().collect();
                grads.register::<Flex>(parent.id, tensor(values, &shape));
            }
        }
    }
}

fn contiguous(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice().expect("fused operations work on contiguous f32 tensors")
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
}
