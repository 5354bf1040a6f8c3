//! Token ids to row ids.

use engram_address::{AddressConfig, StoredAddressing, Tokens, Vocabulary};
use engram_store::TableOrigin;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::array::{Array, new_array};
use crate::error::address;
use crate::history::History;

/// From token ids to row ids: the exact addressing of Engram's hashed n-gram tables.
///
/// An addressing has one or more memory layers. `row_ids` and `rows` speak of one of them: `layer(id)` chooses it, and
/// where there is only one, it is chosen already.
///
/// Addressing works in forked processes and shares no lock with anybody: call it in `DataLoader` workers.
#[pyclass(module = "engram_lm", frozen)]
#[derive(Clone, Debug)]
pub(crate) struct Addressing {
    pub(crate) inner: engram_address::Addressing,
    /// The chosen layer's place among the memory layers.
    chosen: Option<usize>,
}

#[pymethods]
impl Addressing {
    /// A published addressing: "v41" (DeepSeek-V4.1-Flash: blocks 1 and 14, 2- to 4-grams, 8 heads from 16,000,000 rows)
    /// or "demo" (the paper's demonstration: blocks 1 and 15, 2- and 3-grams, 8 heads from 646,400 rows).
    ///
    /// `tokenizer`: path of a `tokenizer.json`, or of its folder; or `classes`: the class of every token, or a number
    /// of tokens, each a class of its own. `layer`: the block to choose.
    ///
    /// Raises `ValueError` for an unknown preset, a wrong tokenizer, or a block without memory.
    #[staticmethod]
    #[pyo3(signature = (name, *, tokenizer=None, classes=None, layer=None))]
    fn preset<'py>(
        py: Python<'py>,
        name: &str,
        tokenizer: Option<Bound<'py, PyAny>>,
        classes: Option<Bound<'py, PyAny>>,
        layer: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        helper(py)?.call_method1("preset", (name, tokenizer, classes, layer))
    }

    /// The addressing of a configuration's `[model.memory]`; other arguments as in `preset`.
    ///
    /// Raises `ValueError` naming the key that is wrong, `OSError` if the file cannot be read.
    #[staticmethod]
    #[pyo3(signature = (path, *, tokenizer=None, classes=None, layer=None))]
    fn from_config<'py>(
        py: Python<'py>,
        path: Bound<'py, PyAny>,
        tokenizer: Option<Bound<'py, PyAny>>,
        classes: Option<Bound<'py, PyAny>>,
        layer: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        helper(py)?.call_method1("from_config", (path, tokenizer, classes, layer))
    }

    /// The addressing of a checkpoint, or of the newest one of a run's folder.
    ///
    /// Raises as `from_config`.
    #[staticmethod]
    #[pyo3(signature = (path, *, layer=None))]
    fn from_checkpoint<'py>(
        py: Python<'py>,
        path: Bound<'py, PyAny>,
        layer: Option<usize>,
    ) -> PyResult<Bound<'py, PyAny>> {
        helper(py)?.call_method1("from_checkpoint", (path, layer))
    }

    /// Draws multipliers and finds the primes that the configuration asks for.
    ///
    /// `classes`: the class of every token, `[vocabulary]` integers (see `vocabulary_classes`).
    /// `config`: JSON of seed, layers, max_order, heads, base_rows, pad_id, boundary, arithmetic.
    ///
    /// Raises `ValueError` naming the key that cannot be used.
    #[staticmethod]
    fn _from_config(config: &str, classes: &Bound<'_, PyAny>) -> PyResult<Self> {
        let config: AddressConfig =
            serde_json::from_str(config).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let vocabulary = vocabulary(classes)?;
        Ok(Self::of(engram_address::Addressing::new(&config, vocabulary).map_err(address)?))
    }

    /// Takes multipliers and primes as a checkpoint spells them out (`to_json`).
    ///
    /// `classes`: the class of every token, `[vocabulary]` integers.
    ///
    /// Raises `ValueError` naming what cannot be used.
    #[staticmethod]
    fn from_json(text: &str, classes: &Bound<'_, PyAny>) -> PyResult<Self> {
        let stored: StoredAddressing =
            serde_json::from_str(text).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self::of(engram_address::Addressing::from_stored(stored, vocabulary(classes)?).map_err(address)?))
    }

    /// Multipliers (as strings, exactly), primes, pad and boundary, as JSON; the vocabulary is not in it.
    fn to_json(&self) -> PyResult<String> {
        serde_json::to_string(&self.inner.to_stored())
            .map_err(|error| PyValueError::new_err(error.to_string()))
    }

    /// The same addressing with the memory layer of block `layer` (counted from 0) chosen.
    ///
    /// Raises `ValueError` if that block has no memory.
    fn layer(&self, layer: usize) -> PyResult<Self> {
        let found = self.inner.layers().iter().position(|own| own.layer() == layer);
        match found {
            Some(index) => Ok(Self { inner: self.inner.clone(), chosen: Some(index) }),
            None => Err(PyValueError::new_err(format!(
                "block {layer} has no memory; those with memory are {:?}",
                self.layers()
            ))),
        }
    }

    /// Blocks with memory, counted from 0, in the order of the configuration.
    #[getter]
    fn layers(&self) -> Vec<usize> {
        self.inner.layers().iter().map(|layer| layer.layer()).collect()
    }

    /// The chosen layer's block.
    #[getter]
    fn layer_id(&self) -> PyResult<usize> {
        Ok(self.inner.layers()[self.index()?].layer())
    }

    /// Rows of the chosen layer's table.
    #[getter]
    fn rows(&self) -> PyResult<u64> {
        self.chosen_rows()
    }

    /// Rows that a token reads of the chosen layer: one for each order and head.
    #[getter]
    fn slots(&self) -> PyResult<usize> {
        Ok(self.inner.layers()[self.index()?].slots())
    }

    /// Rows of each head of the chosen layer, `[order][head]`, 2-grams first.
    #[getter]
    fn primes(&self) -> PyResult<Vec<Vec<u64>>> {
        Ok(self.inner.layers()[self.index()?].primes().to_vec())
    }

    /// Multipliers of the chosen layer, the current token's first.
    #[getter]
    fn multipliers(&self) -> PyResult<Vec<i64>> {
        Ok(self.inner.layers()[self.index()?].multipliers().to_vec())
    }

    /// Length of the longest n-gram.
    #[getter]
    fn max_order(&self) -> usize {
        self.inner.max_order()
    }

    /// Tokens of the vocabulary.
    #[getter]
    fn vocabulary(&self) -> usize {
        self.inner.vocabulary().len()
    }

    /// Classes of the vocabulary.
    #[getter]
    fn classes(&self) -> usize {
        self.inner.vocabulary().classes()
    }

    /// The hash over everything that decides row ids, 64 hexadecimal digits. Tables and checkpoints carry it.
    #[getter]
    fn identity(&self) -> String {
        self.inner.identity().to_string()
    }

    /// The class of every token, `[vocabulary]` int64.
    fn vocabulary_classes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        classes_view(py, self.inner.vocabulary())
    }

    /// Row ids of whole sequences in the chosen layer's table.
    ///
    /// `tokens`: `[..., time]` int32 or int64 (uint32, uint64, a list of integers as well); every row along the last
    /// dimension is a sequence of its own.
    /// `dead`: bool of the same shape; a dead position (an image token in V4.1), and everything older as seen from a
    /// later token, counts as pad.
    /// `starts`: bool of the same shape; the first token of a document, which sees nothing older.
    /// `out`: int64 `[..., time, slots]`, written in place and returned; none: a new memoryview.
    ///
    /// Raises `TypeError` for another dtype; `ValueError` for a wrong shape, a layout that is not contiguous, or a
    /// token outside the vocabulary (with its position in its sequence).
    #[pyo3(signature = (tokens, dead=None, starts=None, out=None))]
    fn row_ids<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyAny>,
        dead: Option<&Bound<'py, PyAny>>,
        starts: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let index = self.index()?;
        let slots = self.inner.layers()[index].slots();
        let given = Given::of(tokens, dead, starts)?;
        let shape = [&given.tokens.shape[..], &[slots]].concat();
        let (mut array, result) = room(py, out, &shape)?;
        given.check_apart(&array)?;
        let time = given.tokens.shape.last().copied().unwrap_or(0);
        let (ids, dead, starts) = given.slices()?;
        let out = array.row_ids_mut()?;
        let addressing = &self.inner;
        py.detach(|| {
            if time == 0 {
                return Ok(());
            }
            let sequences = ids.chunks_exact(time).zip(out.chunks_exact_mut(time * slots)).enumerate();
            sequences.into_iter().try_for_each(|(number, (ids, out))| {
                let range = number * time..(number + 1) * time;
                let tokens = masked(ids, dead, starts, range);
                addressing.row_ids_into(index, tokens, out).map_err(address)
            })
        })?;
        Ok(result)
    }

    /// The history of a sequence that has not begun. `rollback`: how many tokens can be taken back; none: all.
    #[pyo3(signature = (rollback=None))]
    fn history(&self, rollback: Option<usize>) -> History {
        let history = self.inner.history();
        let history = match rollback {
            Some(tokens) => history.with_rollback(tokens),
            None => history,
        };
        History::new(history, self.clone())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, Pickled<'py>)> {
        let py = slf.py();
        let this = slf.get();
        let classes = this.inner.vocabulary().as_slice();
        let bytes: Vec<u8> = classes.iter().flat_map(|class| class.to_le_bytes()).collect();
        let layer = this.chosen.map(|index| this.inner.layers()[index].layer());
        Ok((slf.get_type().getattr("_restore")?, (this.to_json()?, PyBytes::new(py, &bytes), layer)))
    }

    #[staticmethod]
    fn _restore(text: &str, classes: &[u8], layer: Option<usize>) -> PyResult<Self> {
        let classes = classes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        let stored: StoredAddressing =
            serde_json::from_str(text).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let vocabulary = Vocabulary::from_classes(classes).map_err(address)?;
        let restored =
            Self::of(engram_address::Addressing::from_stored(stored, vocabulary).map_err(address)?);
        layer.map_or(Ok(restored.clone()), |layer| restored.layer(layer))
    }

    fn __repr__(&self) -> String {
        let chosen = match self.chosen {
            Some(index) => format!(", layer {}", self.inner.layers()[index].layer()),
            None => String::new(),
        };
        format!("Addressing(layers {:?}{chosen}, identity {})", self.layers(), self.inner.identity().short())
    }
}

impl Addressing {
    fn of(inner: engram_address::Addressing) -> Self {
        let chosen = (inner.layers().len() == 1).then_some(0);
        Self { inner, chosen }
    }

    /// The chosen layer's place among the memory layers.
    pub(crate) fn index(&self) -> PyResult<usize> {
        self.chosen.ok_or_else(|| {
            PyValueError::new_err(format!(
                "the addressing has memory in the blocks {:?}: choose one with `.layer(id)`",
                self.layers()
            ))
        })
    }

    /// Rows of the chosen layer's table.
    pub(crate) fn chosen_rows(&self) -> PyResult<u64> {
        Ok(self.inner.layers()[self.index()?].rows())
    }

    /// What the rows of the chosen layer's table belong to.
    pub(crate) fn origin(&self) -> PyResult<TableOrigin> {
        let layer = self.inner.layers()[self.index()?].layer() as u64;
        Ok(TableOrigin { identity: self.inner.identity(), layer })
    }
}

/// What `_restore` takes.
type Pickled<'py> = (String, Bound<'py, PyBytes>, Option<usize>);

/// What knows configurations and checkpoints.
fn helper(py: Python<'_>) -> PyResult<Bound<'_, PyModule>> {
    py.import("engram_lm._addressing")
}

/// Tokens with their masks, as given.
pub(crate) struct Given {
    pub(crate) tokens: Array,
    dead: Option<Array>,
    starts: Option<Array>,
}

type Slices<'a> = (std::borrow::Cow<'a, [u32]>, Option<&'a [bool]>, Option<&'a [bool]>);

impl Given {
    pub(crate) fn of(
        tokens: &Bound<'_, PyAny>,
        dead: Option<&Bound<'_, PyAny>>,
        starts: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let tokens = Array::of("tokens", tokens)?;
        if tokens.shape.is_empty() {
            return Err(PyValueError::new_err("`tokens` is a single number: pass an array [..., time]"));
        }
        let mask = |name: &'static str, mask: Option<&Bound<'_, PyAny>>| {
            let Some(mask) = mask else { return Ok(None) };
            let array = Array::of(name, mask)?;
            array.check_shape(&tokens.shape)?;
            Ok::<_, PyErr>(Some(array))
        };
        let (dead, starts) = (mask("dead", dead)?, mask("starts", starts)?);
        Ok(Self { tokens, dead, starts })
    }

    pub(crate) fn check_apart(&self, out: &Array) -> PyResult<()> {
        let inputs = [Some(&self.tokens), self.dead.as_ref(), self.starts.as_ref()];
        inputs.into_iter().flatten().try_for_each(|input| out.check_apart(input))
    }

    pub(crate) fn slices(&self) -> PyResult<Slices<'_>> {
        let dead = self.dead.as_ref().map(Array::mask).transpose()?;
        let starts = self.starts.as_ref().map(Array::mask).transpose()?;
        Ok((self.tokens.token_ids()?, dead, starts))
    }
}

/// The tokens with the masks' entries in `range`.
pub(crate) fn masked<'a>(
    ids: &'a [u32],
    dead: Option<&'a [bool]>,
    starts: Option<&'a [bool]>,
    range: std::ops::Range<usize>,
) -> Tokens<'a> {
    let mut tokens = Tokens::from(ids);
    if let Some(dead) = dead {
        tokens = tokens.dead(&dead[range.clone()]);
    }
    if let Some(starts) = starts {
        tokens = tokens.starts(&starts[range]);
    }
    tokens
}

/// Room for row ids of this shape: `out`, or a new view.
pub(crate) fn room<'py>(
    py: Python<'py>,
    out: Option<&Bound<'py, PyAny>>,
    shape: &[usize],
) -> PyResult<(Array, Bound<'py, PyAny>)> {
    match out {
        Some(out) => {
            let array = Array::of("out", out)?;
            array.check_shape(shape)?;
            Ok((array, out.clone()))
        }
        None => new_array(py, "out", "q", 8, shape),
    }
}

fn vocabulary(classes: &Bound<'_, PyAny>) -> PyResult<Vocabulary> {
    let array = Array::of("classes", classes)?;
    Vocabulary::from_classes(array.token_ids()?.into_owned()).map_err(address)
}

/// The class of every token of the tokenizer at `path` (a Hugging Face `tokenizer.json`), `[vocabulary]` int64: tokens
/// whose normalised texts agree share one.
///
/// Raises `ValueError` if it is not a tokenizer.
#[pyfunction]
pub(crate) fn classes_of_tokenizer(py: Python<'_>, path: std::path::PathBuf) -> PyResult<Bound<'_, PyAny>> {
    let vocabulary = py.detach(|| Vocabulary::from_tokenizer_file(&path)).map_err(address)?;
    classes_view(py, &vocabulary)
}

fn classes_view<'py>(py: Python<'py>, vocabulary: &Vocabulary) -> PyResult<Bound<'py, PyAny>> {
    let (mut array, view) = new_array(py, "classes", "q", 8, &[vocabulary.len()])?;
    let classes = vocabulary.as_slice().iter().map(|&class| u64::from(class));
    array.row_ids_mut()?.iter_mut().zip(classes).for_each(|(out, class)| *out = class);
    Ok(view)
}
