//! Arrays of other libraries, read and written in place.
//!
//! What has the buffer protocol (numpy arrays, `array.array`, `bytearray`, `memoryview`) and what has `__dlpack__` on
//! the CPU (PyTorch tensors) is taken as it is; nothing is copied. An array of another type, shape or layout is an
//! error that names the argument, what it was and what is needed.

use std::ffi::c_void;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{
    PyByteArray, PyCapsule, PyCapsuleMethods, PyDict, PyList, PyMemoryView, PyString, PyTuple,
};

/// The type of an array's elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Bool,
    Signed(usize),
    Unsigned(usize),
    Float(usize),
    Bf16,
    Other(String),
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bool => f.write_str("bool"),
            Self::Signed(bytes) => write!(f, "int{}", 8 * bytes),
            Self::Unsigned(bytes) => write!(f, "uint{}", 8 * bytes),
            Self::Float(bytes) => write!(f, "float{}", 8 * bytes),
            Self::Bf16 => f.write_str("bfloat16"),
            Self::Other(name) => write!(f, "{name}"),
        }
    }
}

/// An array that somebody else owns, held while it is used.
#[derive(Debug)]
pub(crate) struct Array {
    /// The argument's name, for errors.
    name: &'static str,
    data: *mut u8,
    pub(crate) kind: Kind,
    item: usize,
    pub(crate) shape: Vec<usize>,
    readonly: bool,
    _owner: Owner,
}

// SAFETY: `data` points into what `_owner` keeps alive; neither is bound to a thread.
unsafe impl Send for Array {}
// SAFETY: as above.
unsafe impl Sync for Array {}

#[derive(Debug)]
enum Owner {
    Buffer { _buffer: PyUntypedBuffer },
    Capsule { _capsule: Py<PyCapsule> },
    List { _values: Vec<i64> },
    Tensor { _tensor: Py<PyAny> },
}

/// What is needed of PyTorch to know its tensors.
#[derive(Debug)]
struct Torch {
    /// The types whose values are plain tensors: subclasses may be anything.
    tensors: [Py<PyAny>; 2],
    strided: Py<PyAny>,
    kinds: Vec<(Py<PyAny>, Kind, usize)>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

impl Torch {
    /// PyTorch, if `object` is a plain tensor.
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<&'static Self>> {
        let py = object.py();
        let torch = match TORCH.get(py) {
            Some(torch) => torch,
            None => {
                // Whoever has a tensor has imported it.
                let modules = py.import("sys")?.getattr("modules")?.cast_into::<PyDict>()?;
                let Some(module) = modules.get_item("torch")? else { return Ok(None) };
                // A module that is just being imported has no tensors yet.
                let Ok(torch) = Self::new(&module) else { return Ok(None) };
                TORCH.get_or_init(py, || torch)
            }
        };
        let kind = object.get_type();
        Ok(torch.tensors.iter().any(|tensor| kind.is(tensor)).then_some(torch))
    }

    fn new(module: &Bound<'_, PyAny>) -> PyResult<Self> {
        let parameter = module.getattr("nn")?.getattr("Parameter")?.unbind();
        let kinds = [
            ("float32", Kind::Float(4), 4),
            ("float16", Kind::Float(2), 2),
            ("bfloat16", Kind::Bf16, 2),
            ("int64", Kind::Signed(8), 8),
            ("uint8", Kind::Unsigned(1), 1),
            ("bool", Kind::Bool, 1),
        ];
        let kinds =
            kinds.into_iter().map(|(name, kind, item)| Ok((module.getattr(name)?.unbind(), kind, item)));
        Ok(Self {
            tensors: [module.getattr("Tensor")?.unbind(), parameter],
            strided: module.getattr("strided")?.unbind(),
            kinds: kinds.collect::<PyResult<_>>()?,
        })
    }

    /// What elements of this dtype are, and their bytes.
    fn kind(&self, dtype: &Bound<'_, PyAny>) -> Option<(Kind, usize)> {
        let found = self.kinds.iter().find(|(known, ..)| dtype.is(known));
        found.map(|(_, kind, item)| (kind.clone(), *item))
    }
}

impl Array {
    /// The array `object`, which is the argument `name`.
    ///
    /// # Errors
    /// `TypeError` if it is no array; `ValueError` if it is not C-contiguous or not on the CPU.
    pub(crate) fn of(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        // An exception for what has no buffers would take longer than a thousand rows.
        // SAFETY: the interpreter is held, and the object alive.
        if unsafe { pyo3::ffi::PyObject_CheckBuffer(object.as_ptr()) } != 0
            && let Ok(buffer) = PyUntypedBuffer::get(object)
        {
            return Self::of_buffer(name, buffer);
        }
        if let Some(torch) = Torch::of(object)?
            && let Some(array) = Self::of_tensor(name, object, torch)?
        {
            return Ok(array);
        }
        if object.hasattr("__dlpack__")? {
            return Self::of_dlpack(name, object);
        }
        if object.is_instance_of::<PyList>() || object.is_instance_of::<PyTuple>() {
            let values: Vec<i64> = object.extract().map_err(|_| {
                PyTypeError::new_err(format!("`{name}`: a list may hold integers only; pass an array"))
            })?;
            let (data, shape) = (values.as_ptr() as *mut u8, vec![values.len()]);
            let _owner = Owner::List { _values: values };
            return Ok(Self { name, data, kind: Kind::Signed(8), item: 8, shape, readonly: true, _owner });
        }
        Err(PyTypeError::new_err(format!(
            "`{name}` is a {}: pass an array (anything with the buffer protocol, or `__dlpack__` on the CPU)",
            object.get_type().name()?
        )))
    }

    /// A plain tensor of PyTorch in the CPU's memory, without the detour of DLPack, which takes 30 µs.
    fn of_tensor(name: &'static str, tensor: &Bound<'_, PyAny>, torch: &Torch) -> PyResult<Option<Self>> {
        let py = tensor.py();
        let is =
            |method: &Bound<'_, PyString>| -> PyResult<bool> { tensor.call_method0(method)?.is_truthy() };
        let has = |name: &Bound<'_, PyString>| -> PyResult<bool> { tensor.getattr(name)?.is_truthy() };
        let Some((kind, item)) = torch.kind(&tensor.getattr(intern!(py, "dtype"))?) else { return Ok(None) };
        // What is none of this is left to DLPack, which says what is wrong with it.
        let strided = tensor.getattr(intern!(py, "layout"))?.is(&torch.strided);
        if !strided
            || !has(intern!(py, "is_cpu"))?
            || has(intern!(py, "requires_grad"))?
            || is(intern!(py, "is_neg"))?
            || !is(intern!(py, "is_contiguous"))?
        {
            return Ok(None);
        }
        let shape: Vec<usize> = tensor.getattr(intern!(py, "shape"))?.extract()?;
        let data: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let _owner = Owner::Tensor { _tensor: tensor.clone().unbind() };
        let data = std::ptr::with_exposed_provenance_mut(data);
        Ok(Some(Self { name, data, kind, item, shape, readonly: false, _owner }))
    }

    fn of_buffer(name: &'static str, buffer: PyUntypedBuffer) -> PyResult<Self> {
        let shape = buffer.shape().to_vec();
        if !buffer.is_c_contiguous() {
            let strides = buffer.strides().to_vec();
            return Err(not_contiguous(name, &shape, &strides, "bytes"));
        }
        let kind = kind_of_format(buffer.format().to_bytes(), buffer.item_size());
        let (data, item, readonly) = (buffer.buf_ptr().cast(), buffer.item_size(), buffer.readonly());
        Ok(Self { name, data, kind, item, shape, readonly, _owner: Owner::Buffer { _buffer: buffer } })
    }

    fn of_dlpack(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (device, _): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
        if device != DL_CPU && device != DL_CUDA_HOST {
            return Err(PyValueError::new_err(format!(
                "`{name}` is on an accelerator (DLPack device {device}): copy it to the CPU first"
            )));
        }
        let exported = object.call_method0("__dlpack__").map_err(|error| {
            PyValueError::new_err(format!("`{name}` cannot be exported: {error}; detach it first"))
        })?;
        let capsule = exported.cast_into::<PyCapsule>()?;
        let pointer = capsule.pointer_checked(Some(c"dltensor"))?.cast::<DlTensor>();
        // SAFETY: a capsule of this name points to a DLManagedTensor, which begins with its DLTensor. The capsule is
        // kept, and frees the tensor, as it does whenever nobody renames it.
        let tensor = unsafe { pointer.as_ref() };
        let dimensions = tensor.dimensions.max(0) as usize;
        let shape: Vec<usize> = if dimensions == 0 {
            Vec::new()
        } else {
            // SAFETY: `shape` has an entry for every dimension.
            unsafe { std::slice::from_raw_parts(tensor.shape, dimensions) }
                .iter()
                .map(|&n| n as usize)
                .collect()
        };
        if dimensions > 0 && !tensor.strides.is_null() {
            // SAFETY: `strides`, where there are any, has an entry for every dimension.
            let strides = unsafe { std::slice::from_raw_parts(tensor.strides, dimensions) };
            let strides: Vec<isize> = strides.iter().map(|&stride| stride as isize).collect();
            if !is_contiguous(&shape, &strides) {
                return Err(not_contiguous(name, &shape, &strides, "elements"));
            }
        }
        let bytes = usize::from(tensor.bits.div_ceil(8));
        let kind = match (tensor.code, tensor.lanes) {
            (0, 1) => Kind::Signed(bytes),
            (1, 1) => Kind::Unsigned(bytes),
            (2, 1) => Kind::Float(bytes),
            (4, 1) => Kind::Bf16,
            (6, 1) => Kind::Bool,
            (code, lanes) => {
                Kind::Other(format!("DLPack type {code} of {} bits, {lanes} lanes", tensor.bits))
            }
        };
        // SAFETY: the offset is within the tensor's allocation.
        let data = unsafe { tensor.data.cast::<u8>().add(tensor.byte_offset as usize) };
        let _owner = Owner::Capsule { _capsule: capsule.unbind() };
        Ok(Self { name, data, kind, item: bytes, shape, readonly: false, _owner })
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements as `T`, whose size the caller has checked against the kind.
    fn elements<T>(&self) -> &[T] {
        debug_assert_eq!(size_of::<T>(), self.item);
        if self.len() == 0 {
            return &[];
        }
        // SAFETY: a contiguous array of `len` elements of this size, alive as long as `self`, whose alignment
        // `check_alignment` has seen. That nobody writes to it meanwhile is the caller's part, as with every
        // library that lets go of the interpreter while it computes.
        unsafe { std::slice::from_raw_parts(self.data.cast(), self.len()) }
    }

    fn elements_mut<T>(&mut self) -> &mut [T] {
        debug_assert_eq!(size_of::<T>(), self.item);
        if self.len() == 0 {
            return &mut [];
        }
        // SAFETY: as in `elements`; it is writable, and overlaps no other argument (`check_apart`).
        unsafe { std::slice::from_raw_parts_mut(self.data.cast(), self.len()) }
    }

    fn check_alignment(&self, alignment: usize) -> PyResult<()> {
        if self.len() == 0 || (self.data as usize).is_multiple_of(alignment) {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("`{}` is not aligned to {alignment} bytes: copy it", self.name)))
    }

    fn check_kind(&self, allowed: &[Kind]) -> PyResult<()> {
        if allowed.contains(&self.kind) {
            return self.check_alignment(self.item);
        }
        let names: Vec<String> = allowed.iter().map(Kind::to_string).collect();
        Err(PyTypeError::new_err(format!(
            "`{}` holds {}, but must hold {}",
            self.name,
            self.kind,
            names.join(" or ")
        )))
    }

    /// Fails unless the array has this shape.
    ///
    /// # Errors
    /// `ValueError` with both shapes.
    pub(crate) fn check_shape(&self, expected: &[usize]) -> PyResult<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "`{}` has the shape {:?}, but must have {expected:?}",
            self.name, self.shape
        )))
    }

    fn check_writable(&self) -> PyResult<()> {
        if self.readonly {
            return Err(PyValueError::new_err(format!(
                "`{}` is read-only: pass a writable array",
                self.name
            )));
        }
        Ok(())
    }

    /// Fails if `self`, which is written, shares bytes with `other`, which is read.
    ///
    /// # Errors
    /// `ValueError` with both names.
    pub(crate) fn check_apart(&self, other: &Array) -> PyResult<()> {
        let range = |array: &Array| (array.data as usize, array.data as usize + array.len() * array.item);
        let ((start, end), (other_start, other_end)) = (range(self), range(other));
        if self.len() == 0 || other.len() == 0 || end <= other_start || other_end <= start {
            return Ok(());
        }
        Err(PyValueError::new_err(format!(
            "`{}` and `{}` share memory: pass another `{}`",
            self.name, other.name, self.name
        )))
    }

    /// Row ids: int64 or uint64.
    ///
    /// # Errors
    /// `TypeError` if they are of another type; `ValueError` if one is negative.
    pub(crate) fn row_ids(&self) -> PyResult<&[u64]> {
        self.check_kind(&[Kind::Signed(8), Kind::Unsigned(8)])?;
        let ids = self.elements::<u64>();
        if self.kind == Kind::Signed(8)
            && let Some(at) = ids.iter().position(|&id| (id as i64) < 0)
        {
            return Err(PyValueError::new_err(format!(
                "`{}` holds {} at position {at}: a row id is not negative",
                self.name, ids[at] as i64
            )));
        }
        Ok(ids)
    }

    /// Token ids: integers of 32 or 64 bits. Those of 64 bits are copied; there are far fewer of them than of rows.
    ///
    /// # Errors
    /// `TypeError` if they are of another type; `ValueError` if one has not its place in 32 bits.
    pub(crate) fn token_ids(&self) -> PyResult<std::borrow::Cow<'_, [u32]>> {
        use std::borrow::Cow;
        self.check_kind(&[Kind::Signed(8), Kind::Unsigned(8), Kind::Signed(4), Kind::Unsigned(4)])?;
        let wrong = |at: usize, value: i128| {
            PyValueError::new_err(format!(
                "`{}` holds {value} at position {at}: a token id lies between 0 and 2^32 - 1",
                self.name
            ))
        };
        if self.item == 4 {
            let ids = self.elements::<u32>();
            let negative = |&id: &u32| (id as i32) < 0;
            return match ids.iter().position(negative) {
                Some(at) if self.kind == Kind::Signed(4) => Err(wrong(at, i128::from(ids[at] as i32))),
                _ => Ok(Cow::Borrowed(ids)),
            };
        }
        let ids = self.elements::<u64>();
        let narrow = |(at, &id): (usize, &u64)| {
            let value = if self.kind == Kind::Signed(8) { i128::from(id as i64) } else { i128::from(id) };
            u32::try_from(value).map_err(|_| wrong(at, value))
        };
        ids.iter().enumerate().map(narrow).collect::<PyResult<Vec<u32>>>().map(Cow::Owned)
    }

    /// A mask: bool, or uint8 of 0 and 1.
    ///
    /// # Errors
    /// `TypeError` if it has another type; `ValueError` if a byte is neither.
    pub(crate) fn mask(&self) -> PyResult<&[bool]> {
        self.check_kind(&[Kind::Bool, Kind::Unsigned(1)])?;
        let bytes = self.elements::<u8>();
        if let Some(at) = bytes.iter().position(|&byte| byte > 1) {
            return Err(PyValueError::new_err(format!(
                "`{}` holds {} at position {at}: a mask holds 0 and 1",
                self.name, bytes[at]
            )));
        }
        // SAFETY: every byte is 0 or 1, which are the two values of a bool.
        Ok(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) })
    }

    /// Values: float32.
    ///
    /// # Errors
    /// `TypeError` if they are of another type.
    pub(crate) fn values(&self) -> PyResult<&[f32]> {
        self.check_kind(&[Kind::Float(4)])?;
        Ok(self.elements())
    }

    /// Any bytes.
    ///
    /// # Errors
    /// `TypeError` unless they are uint8.
    pub(crate) fn bytes(&self) -> PyResult<&[u8]> {
        self.check_kind(&[Kind::Unsigned(1)])?;
        Ok(self.elements())
    }

    /// Room for row ids: int64 or uint64, writable.
    ///
    /// # Errors
    /// `TypeError` for another type, `ValueError` if it is read-only.
    pub(crate) fn row_ids_mut(&mut self) -> PyResult<&mut [u64]> {
        self.check_kind(&[Kind::Signed(8), Kind::Unsigned(8)])?;
        self.check_writable()?;
        Ok(self.elements_mut())
    }

    /// Room for stored rows: uint8, writable.
    ///
    /// # Errors
    /// As [`row_ids_mut`](Self::row_ids_mut).
    pub(crate) fn bytes_mut(&mut self) -> PyResult<&mut [u8]> {
        self.check_kind(&[Kind::Unsigned(1)])?;
        self.check_writable()?;
        Ok(self.elements_mut())
    }

    /// Room for values of type `dtype`, writable.
    ///
    /// # Errors
    /// As [`row_ids_mut`](Self::row_ids_mut).
    pub(crate) fn values_mut(&mut self, dtype: Dtype) -> PyResult<ValuesMut<'_>> {
        match dtype {
            Dtype::F32 => self.check_kind(&[Kind::Float(4)])?,
            Dtype::F16 => self.check_kind(&[Kind::Float(2), Kind::Unsigned(2), Kind::Signed(2)])?,
            Dtype::Bf16 => self.check_kind(&[Kind::Bf16, Kind::Unsigned(2), Kind::Signed(2)])?,
        }
        self.check_writable()?;
        Ok(match dtype {
            Dtype::F32 => ValuesMut::F32(self.elements_mut()),
            Dtype::F16 => ValuesMut::F16(self.elements_mut()),
            Dtype::Bf16 => ValuesMut::Bf16(self.elements_mut()),
        })
    }
}

/// What gathered rows are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    /// By name: "f32", "f16", "bf16", and numpy's and PyTorch's names for them.
    ///
    /// # Errors
    /// `ValueError` for another name.
    pub(crate) fn named(name: &str) -> PyResult<Self> {
        match name {
            "f32" | "float32" => Ok(Self::F32),
            "f16" | "float16" => Ok(Self::F16),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            _ => Err(PyValueError::new_err(format!(
                "`dtype` is {name:?}, but must be \"f32\", \"f16\" or \"bf16\""
            ))),
        }
    }

    /// The dtype that `out` has; f32 without one.
    ///
    /// # Errors
    /// `TypeError` if `out` holds no floats.
    pub(crate) fn of(out: Option<&Array>) -> PyResult<Self> {
        match out.map(|array| &array.kind) {
            None | Some(Kind::Float(4)) => Ok(Self::F32),
            Some(Kind::Float(2)) => Ok(Self::F16),
            Some(Kind::Bf16) => Ok(Self::Bf16),
            Some(other) => Err(PyTypeError::new_err(format!(
                "`out` holds {other}, but must hold float32, float16 or bfloat16 (with dtype=\"bf16\", uint16 as well)"
            ))),
        }
    }
}

/// Room for gathered rows.
#[derive(Debug)]
pub(crate) enum ValuesMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [half::f16]),
    Bf16(&'a mut [half::bf16]),
}

/// A new array for a result: the array, and the object that is returned.
///
/// `format` is that of the module `struct`. With no element in it, the view has one dimension: Python has no others.
///
/// # Errors
/// If Python refuses the memory.
pub(crate) fn new_array<'py>(
    py: Python<'py>,
    name: &'static str,
    format: &str,
    item: usize,
    shape: &[usize],
) -> PyResult<(Array, Bound<'py, PyAny>)> {
    let count: usize = shape.iter().product();
    let bytes = PyByteArray::new_with(py, count * item, |_| Ok(()))?;
    let flat = PyMemoryView::from(&bytes)?;
    let view = match count {
        0 => flat.call_method1("cast", (format,))?,
        _ => flat.call_method1("cast", (format, PyList::new(py, shape)?))?,
    };
    let mut array = Array::of(name, &view)?;
    array.shape = shape.to_vec();
    Ok((array, view))
}

fn not_contiguous(name: &str, shape: &[usize], strides: &[isize], unit: &str) -> PyErr {
    PyValueError::new_err(format!(
        "`{name}` with the shape {shape:?} and strides of {strides:?} {unit} is not C-contiguous: pass a contiguous copy"
    ))
}

fn is_contiguous(shape: &[usize], strides: &[isize]) -> bool {
    if shape.contains(&0) {
        return true;
    }
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&size, &stride)| {
        let fits = size == 1 || stride == expected;
        expected *= size as isize;
        fits
    })
}

fn kind_of_format(format: &[u8], item: usize) -> Kind {
    let letter = match format {
        [letter] | [b'@' | b'=' | b'<', letter] => *letter,
        other => return Kind::Other(format!("elements of format {:?}", String::from_utf8_lossy(other))),
    };
    match letter {
        b'?' => Kind::Bool,
        b'b' | b'h' | b'i' | b'l' | b'q' | b'n' => Kind::Signed(item),
        b'B' | b'c' | b'H' | b'I' | b'L' | b'Q' | b'N' => Kind::Unsigned(item),
        b'e' | b'f' | b'd' => Kind::Float(item),
        other => Kind::Other(format!("elements of format {:?}", char::from(other))),
    }
}

const DL_CPU: i32 = 1;
const DL_CUDA_HOST: i32 = 3;

/// DLPack's `DLTensor`, the beginning of what a capsule named `dltensor` holds.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: [i32; 2],
    dimensions: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}
