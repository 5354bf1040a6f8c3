//! The weights of a model by name.
//!
//! A weight's name is the path of fields to it, such as `blocks.0.attention.query_up.weight`; which variant of an
//! enum holds it does not show, so that names stay what a reader of the model's source expects.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use engram_import::HostTensor;

use crate::error::{Error, Result};

/// Every weight of `module`, by name.
pub fn export<M: Module>(module: &M) -> BTreeMap<String, HostTensor> {
    struct Export {
        path: Path,
        tensors: BTreeMap<String, HostTensor>,
    }
    impl ModuleVisitor for Export {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = param.val();
            let shape = tensor.dims().to_vec();
            let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
            let values = tensor.into_data().try_into_vec().expect("weights are f32");
            self.tensors.insert(self.path.name(), HostTensor { shape, values });
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    let mut export = Export { path: Path::default(), tensors: BTreeMap::new() };
    module.visit(&mut export);
    export.tensors
}

/// Replaces every weight of `module` by the tensor of its name. `source` names where they come from.
///
/// # Errors
/// When a weight is missing or of another shape, or a tensor belongs to no weight.
pub fn import<M: Module>(module: M, tensors: BTreeMap<String, HostTensor>, source: &str) -> Result<M> {
    struct Import<'a> {
        path: Path,
        tensors: BTreeMap<String, HostTensor>,
        source: &'a str,
        error: Option<Error>,
    }
    impl ModuleMapper for Import<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let name = self.path.name();
            let expected = param.val().dims();
            let problem = match self.tensors.remove(&name) {
                Some(tensor) if tensor.shape == expected => {
                    return param.map(|old| like(&old, tensor.values));
                }
                Some(tensor) => {
                    format!("`{name}` has shape {:?}, but the model needs {expected:?}", tensor.shape)
                }
                None => format!("`{name}` is missing"),
            };
            self.error.get_or_insert(Error::weights(self.source, problem));
            param
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    let tensors = tensors.into_iter().map(|(name, tensor)| (name_of_today(name), tensor)).collect();
    let mut import = Import { path: Path::default(), tensors, source, error: None };
    let module = module.map(&mut import);
    if let Some(error) = import.error {
        return Err(error);
    }
    match import.tensors.keys().next() {
        Some(name) => Err(Error::weights(source, format!("`{name}` is no weight of this model"))),
        None => Ok(module),
    }
}

/// The gradient of every weight of `module` that has one in `gradients`, by the weight's name.
pub fn export_gradients<M: Module>(module: &M, gradients: &mut Gradients) -> BTreeMap<String, HostTensor> {
    let taken = take_gradients(module, gradients);
    let with_shape = |(name, weight): (String, HostTensor)| {
        let values = taken.get(&name)?.clone().into_data().try_into_vec().expect("gradients are f32");
        Some((name, HostTensor { shape: weight.shape, values }))
    };
    export(module).into_iter().filter_map(with_shape).collect()
}

/// Takes the gradients of `module`'s weights out of `gradients`, flattened, by name.
pub(crate) fn take_gradients<M: Module>(
    module: &M,
    gradients: &mut Gradients,
) -> BTreeMap<String, Tensor<1>> {
    struct Take<'a> {
        path: Path,
        gradients: &'a mut Gradients,
        taken: BTreeMap<String, Tensor<1>>,
    }
    impl ModuleVisitor for Take<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = param.val().grad_remove(self.gradients) {
                let count = gradient.shape().num_elements();
                self.taken.insert(self.path.name(), gradient.reshape([count]));
            }
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    let mut take = Take { path: Path::default(), gradients, taken: BTreeMap::new() };
    module.visit(&mut take);
    take.taken
}

/// The name of a weight, or of its state, that a checkpoint may have under a name of before.
pub(crate) fn name_of_today(name: String) -> String {
    // Forms of memory without gates were a field of their own.
    name.replace(".ngrams.", ".memory.")
}

/// A weight that is not looked at, but named.
#[derive(Debug, Clone)]
pub(crate) struct Weight {
    pub(crate) name: String,
    pub(crate) id: ParamId,
    pub(crate) shape: Vec<usize>,
}

/// All weights of `module`, in the order of its fields.
pub(crate) fn list<M: Module>(module: &M) -> Vec<Weight> {
    struct List {
        path: Path,
        weights: Vec<Weight>,
    }
    impl ModuleVisitor for List {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let shape = param.val().dims().to_vec();
            self.weights.push(Weight { name: self.path.name(), id: param.id, shape });
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    let mut list = List { path: Path::default(), weights: Vec::new() };
    module.visit(&mut list);
    list.weights
}

/// What becomes of a weight: from its flat value, the only reference to it, to its new value.
type UpdateWeight<'a> = dyn FnMut(&Weight, Tensor<1>) -> Tensor<1> + 'a;

/// Replaces each weight by what `update` makes of its flat value, outside of autodiff.
pub(crate) fn update<M: Module>(module: M, update: &mut UpdateWeight<'_>) -> M {
    struct Update<'a> {
        path: Path,
        update: &'a mut UpdateWeight<'a>,
    }
    impl ModuleMapper for Update<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (name, id) = (self.path.name(), param.id);
            param.map(|old| {
                let (shape, tracked, grad) = (old.dims(), old.is_autodiff(), old.is_require_grad());
                let flat = if tracked { old.inner() } else { old }.reshape([shape.iter().product::<usize>()]);
                let weight = Weight { name, id, shape: shape.to_vec() };
                let new = (self.update)(&weight, flat).reshape(shape);
                let new = if tracked { Tensor::from_inner(new) } else { new };
                if grad { new.require_grad() } else { new }
            })
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    module.map(&mut Update { path: Path::default(), update })
}

/// Has only those weights of `module` learn whose names `learns` picks.
pub(crate) fn train_only<M: Module>(module: M, learns: &dyn Fn(&str) -> bool) -> M {
    struct Choose<'a> {
        path: Path,
        learns: &'a dyn Fn(&str) -> bool,
    }
    impl ModuleMapper for Choose<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let learns = (self.learns)(&self.path.name());
            param.set_require_grad(learns)
        }
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _name: &str, container: &str) {
            self.path.exit(container);
        }
    }
    module.map(&mut Choose { path: Path::default(), learns })
}

/// A tensor of `values` with the shape, device and autodiff state of `old`.
fn like<const D: usize>(old: &Tensor<D>, values: Vec<f32>) -> Tensor<D> {
    let device: Device = old.device();
    let new = Tensor::from_data(TensorData::new(values, old.dims()), &device);
    if old.is_require_grad() { new.require_grad() } else { new }
}

#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.push(name.to_owned());
        }
    }

    fn exit(&mut self, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.pop();
        }
    }

    fn name(&self) -> String {
        self.0.join(".")
    }
}
