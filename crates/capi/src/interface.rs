//! The functions that C calls.

use std::ffi::{CStr, c_char, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use engram_store::{
    AddressIdentity, DirectOptions, DirectTable, MapOptions, PrefetchOptions, Prefetcher, RowFormat,
    RowSource, Storage, Table, TableHeader, TableOrigin, Ticket,
};
use half::slice::HalfFloatSliceExt;

pub use crate::failure::engram_status;
use crate::failure::{Failure, guarded, last};
use crate::handles::Handles;

/// An open table.
#[allow(non_camel_case_types)]
pub type engram_table = u64;

/// Rows that were asked for.
#[allow(non_camel_case_types)]
pub type engram_ticket = u64;

/// `engram_open`: the table is read into memory, on huge pages where the system has them, and checked.
pub const ENGRAM_RAM: i32 = 0;
/// `engram_open`: the file is mapped. It must not be shortened while it is open: the process would end.
pub const ENGRAM_MAPPED: i32 = 1;
/// `engram_open`: the file is mapped, and a handler for SIGBUS is installed in the process, so that a file that is
/// shortened, or whose disk fails, is an error.
pub const ENGRAM_MAPPED_GUARDED: i32 = 2;
/// `engram_open`: rows are read from the disk, many at a time, past the system's page cache.
pub const ENGRAM_DIRECT: i32 = 3;

/// Values of 32 bits.
pub const ENGRAM_F32: i32 = 0;
/// Brain floats of 16 bits.
pub const ENGRAM_BF16: i32 = 1;
/// IEEE floats of 16 bits.
pub const ENGRAM_F16: i32 = 2;

/// What a table is like.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types)]
pub struct engram_shape {
    /// Number of rows: ids are from 0 to one less.
    pub rows: u64,
    /// Values per row.
    pub width: u64,
    /// Bytes of a stored row.
    pub row_bytes: u64,
    /// The layer of the model, from 0.
    pub layer: u64,
    /// The addressing that the rows belong to.
    pub identity: [u8; 32],
    /// Layout of a row: 0 f32, 1 bf16, 2 fp8 (e4m3, a scale per 32 values), 3 f16, 4 fp8 with one scale, 5 int8, 6 int4.
    pub format: u32,
}

struct Opened {
    source: Arc<dyn RowSource>,
    origin: TableOrigin,
    /// Started with the first rows that are asked for.
    prefetcher: OnceLock<Prefetcher>,
    starting: Mutex<()>,
}

/// Rows under way, until they are taken.
struct Asked {
    ticket: Mutex<Option<Ticket>>,
    count: usize,
    width: usize,
}

static TABLES: Handles<Opened> = Handles::of("the table");
static TICKETS: Handles<Asked> = Handles::of("the ticket");

/// Opens the table file at `path` (UTF-8) in the tier `tier`. If `identity` (32 bytes) is not null, the rows must belong to
/// this addressing and `layer`. `table` becomes the handle.
///
/// # Safety
/// `path` is null or ends with a zero, `identity` is null or has 32 bytes, `table` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engram_open(
    path: *const c_char,
    identity: *const u8,
    layer: u64,
    tier: i32,
    table: *mut engram_table,
) -> engram_status {
    guarded(|| {
        if path.is_null() || table.is_null() {
            return Err(Failure::invalid("engram_open: path and table must not be null"));
        }
        // SAFETY: not null, and the caller's promise.
        let path = unsafe { CStr::from_ptr(path) }.to_str();
        let path = PathBuf::from(path.map_err(|_| Failure::invalid("engram_open: the path is not UTF-8"))?);
        let origin = if identity.is_null() {
            TableHeader::read(&path)?.origin
        } else {
            // SAFETY: not null, and the caller's promise.
            let bytes = unsafe { identity.cast::<[u8; 32]>().read() };
            TableOrigin { identity: AddressIdentity::from_bytes(bytes), layer }
        };
        let source: Arc<dyn RowSource> = match tier {
            ENGRAM_RAM => Arc::new(Table::read(&path, &origin, &Storage::Ram)?),
            ENGRAM_MAPPED => Arc::new(Table::open_with(&path, &origin, &MapOptions::new().guarded(false))?),
            ENGRAM_MAPPED_GUARDED => Arc::new(Table::open(&path, &origin)?),
            ENGRAM_DIRECT => Arc::new(DirectTable::open(&path, &origin, &DirectOptions::default())?),
            _ => {
                return Err(Failure::invalid(format!(
                    "engram_open: there is no tier {tier}; give one from 0 to 3"
                )));
            }
        };
        let opened = Opened { source, origin, prefetcher: OnceLock::new(), starting: Mutex::new(()) };
        // SAFETY: not null, and the caller's promise.
        unsafe { table.write(TABLES.insert(opened)) };
        Ok(())
    })
}

/// Closes a table. Calls that are using it still succeed. Take or cancel its tickets before: rows that have not arrived are
/// an error afterwards.
#[unsafe(no_mangle)]
pub extern "C" fn engram_close(table: engram_table) -> engram_status {
    guarded(|| TABLES.remove(table).map(drop))
}

/// What a table is like.
///
/// # Safety
/// `shape` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engram_get_shape(table: engram_table, shape: *mut engram_shape) -> engram_status {
    guarded(|| {
        let opened = TABLES.get(table)?;
        if shape.is_null() {
            return Err(Failure::invalid("engram_get_shape: shape must not be null"));
        }
        let source = &opened.source;
        let found = engram_shape {
            rows: source.rows(),
            width: source.width() as u64,
            row_bytes: source.bytes_per_row() as u64,
            layer: opened.origin.layer,
            identity: *opened.origin.identity.as_bytes(),
            format: format_number(source.format()),
        };
        // SAFETY: not null, and the caller's promise.
        unsafe { shape.write(found) };
        Ok(())
    })
}

fn format_number(format: RowFormat) -> u32 {
    match format {
        RowFormat::F32 => 0,
        RowFormat::Bf16 => 1,
        RowFormat::Fp8E4m3 => 2,
        RowFormat::F16 => 3,
        RowFormat::Fp8E4m3OneScale(_) => 4,
        RowFormat::Int8 => 5,
        RowFormat::Int4 => 6,
        _ => u32::MAX,
    }
}

/// Copies the rows `ids` (`count` of them, in any order) as they are stored to `out`, which has `out_bytes` bytes: `count`
/// times `row_bytes`.
///
/// # Safety
/// `ids` is null or has `count` numbers, `out` is null or has `out_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engram_read(
    table: engram_table,
    ids: *const u64,
    count: usize,
    out: *mut c_void,
    out_bytes: usize,
) -> engram_status {
    guarded(|| {
        let opened = TABLES.get(table)?;
        // SAFETY: the caller's promises.
        let (ids, out) = unsafe { (slice(ids, count)?, bytes(out, out_bytes)?) };
        check_size(out_bytes, count, opened.source.bytes_per_row())?;
        Ok(opened.source.read(ids, out)?)
    })
}

/// Decodes the rows `ids` to `out` as values of `type`, `count` times `width` of them; `out_bytes` is the size of `out`.
///
/// # Safety
/// `ids` is null or has `count` numbers, `out` is null or has `out_bytes` bytes and is aligned for its type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engram_gather(
    table: engram_table,
    ids: *const u64,
    count: usize,
    r#type: i32,
    out: *mut c_void,
    out_bytes: usize,
) -> engram_status {
    guarded(|| {
        let opened = TABLES.get(table)?;
        // SAFETY: the caller's promises.
        let ids = unsafe { slice(ids, count)? };
        let source = &opened.source;
        // SAFETY: the caller's promises.
        unsafe {
            decode(r#type, count, source.width(), out, out_bytes, |values| Ok(source.gather(ids, values)?))
        }
    })
}

/// Begins to fetch the rows `ids` on other threads. `ticket` becomes their handle; take or cancel it. The status is
/// ENGRAM_NO_ROOM while too many rows are under way: take some first.
///
/// # Safety
/// `ids` is null or has `count` numbers, `ticket` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engram_prefetch_submit(
    table: engram_table,
    ids: *const u64,
    count: usize,
    ticket: *mut engram_ticket,
) -> engram_status {
    guarded(|| {
        let opened = TABLES.get(table)?;
        // SAFETY: the caller's promise.
        let ids = unsafe { slice(ids, count)? };
        if ticket.is_null() {
            return Err(Failure::invalid("engram_prefetch_submit: ticket must not be null"));
        }
        let Some(submitted) = opened.prefetcher()?.try_submit(ids)? else {
            return Err(Failure::new(
                engram_status::ENGRAM_NO_ROOM,
                "too many rows are under way; take or cancel some first",
            ));
        };
        let asked = Asked { ticket: Mutex::new(Some(submitted)), count, width: opened.source.width() };
        // SAFETY: not null, and the caller's promise.
        unsafe { ticket.write(TICKETS.insert(asked)) };
        Ok(())
    })
}

/// Whether the rows of a ticket are there: `ready` becomes 1 or 0. `engram_prefetch_take` waits where they are not.
///
/// # Safety
/// `ready` is null or can be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engram_prefetch_poll(ticket: engram_ticket, ready: *mut i32) -> engram_status {
    guarded(|| {
        let asked = TICKETS.get(ticket)?;
        if ready.is_null() {
            return Err(Failure::invalid("engram_prefetch_poll: ready must not be null"));
        }
        let held = asked.ticket.lock().unwrap_or_else(PoisonError::into_inner);
        let is_ready = held.as_ref().is_none_or(Ticket::is_ready);
        // SAFETY: not null, and the caller's promise.
        unsafe { ready.write(i32::from(is_ready)) };
        Ok(())
    })
}

/// Waits for the rows of a ticket and decodes them to `out` as `engram_gather` does. The ticket is then gone, unless
/// `out` was refused.
///
/// # Safety
/// `out` is null or has `out_bytes` bytes and is aligned for its type.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engram_prefetch_take(
    ticket: engram_ticket,
    r#type: i32,
    out: *mut c_void,
    out_bytes: usize,
) -> engram_status {
    guarded(|| {
        let asked = TICKETS.get(ticket)?;
        let take = |values: &mut [f32]| -> Result<(), Failure> {
            let own = TICKETS.remove(ticket)?;
            let held = own.ticket.lock().unwrap_or_else(PoisonError::into_inner).take();
            let held =
                held.ok_or_else(|| Failure::new(engram_status::ENGRAM_NO_HANDLE, "the ticket was taken"))?;
            Ok(held.take(values)?)
        };
        // SAFETY: the caller's promise.
        unsafe { decode(r#type, asked.count, asked.width, out, out_bytes, take) }
    })
}

/// Gives up the rows of a ticket.
#[unsafe(no_mangle)]
pub extern "C" fn engram_prefetch_cancel(ticket: engram_ticket) -> engram_status {
    guarded(|| TICKETS.remove(ticket).map(drop))
}

/// Copies the last error of this thread to `text`, at most `bytes` bytes with the zero at the end. Returns the bytes that
/// the whole message needs, with the zero; `text` may be null.
///
/// # Safety
/// `text` is null or has `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engram_last_error(text: *mut c_char, bytes: usize) -> usize {
    let message = last();
    if !text.is_null() && bytes > 0 {
        // No half of a character.
        let mut end = message.len().min(bytes - 1);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        // SAFETY: `text` has `bytes` bytes, and `end` is less.
        unsafe {
            std::ptr::copy_nonoverlapping(message.as_ptr(), text.cast(), end);
            text.add(end).write(0);
        }
    }
    message.len() + 1
}

impl Opened {
    fn prefetcher(&self) -> Result<&Prefetcher, Failure> {
        let _starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.prefetcher.get().is_none() {
            let started = Prefetcher::new(Arc::clone(&self.source), &PrefetchOptions::default())?;
            let _ = self.prefetcher.set(started);
        }
        self.prefetcher.get().ok_or_else(|| Failure::new(engram_status::ENGRAM_DEFECT, "no prefetcher"))
    }
}

/// # Safety
/// `ids` is null or has `count` numbers.
unsafe fn slice<'a>(ids: *const u64, count: usize) -> Result<&'a [u64], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    if ids.is_null() || !ids.is_aligned() || count > isize::MAX as usize / 8 {
        return Err(Failure::invalid(format!("ids must be {count} numbers of 64 bits, not null")));
    }
    // SAFETY: the caller's promise, and checked as far as it can be.
    Ok(unsafe { std::slice::from_raw_parts(ids, count) })
}

/// # Safety
/// `out` is null or has `bytes` bytes.
unsafe fn bytes<'a>(out: *mut c_void, bytes: usize) -> Result<&'a mut [u8], Failure> {
    if bytes == 0 {
        return Ok(&mut []);
    }
    if out.is_null() || bytes > isize::MAX as usize {
        return Err(Failure::invalid("out must not be null"));
    }
    // SAFETY: the caller's promise. That the bytes were written before is not needed for plain bytes of C's memory.
    Ok(unsafe { std::slice::from_raw_parts_mut(out.cast(), bytes) })
}

fn check_size(out_bytes: usize, count: usize, each: usize) -> Result<(), Failure> {
    match count.checked_mul(each) {
        Some(needed) if needed == out_bytes => Ok(()),
        needed => Err(Failure::invalid(format!(
            "out has {out_bytes} bytes, but {count} rows of {each} bytes need {}",
            needed.map_or("more than there is".into(), |needed| needed.to_string())
        ))),
    }
}

/// Has `fill` give `count` rows of `width` values, and writes them to `out` as values of the type.
///
/// # Safety
/// `out` is null or has `out_bytes` bytes.
unsafe fn decode(
    r#type: i32,
    count: usize,
    width: usize,
    out: *mut c_void,
    out_bytes: usize,
    fill: impl FnOnce(&mut [f32]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let size = match r#type {
        ENGRAM_F32 => 4,
        ENGRAM_BF16 | ENGRAM_F16 => 2,
        _ => return Err(Failure::invalid(format!("there is no type {}; give one from 0 to 2", r#type))),
    };
    check_size(out_bytes, count, size * width)?;
    if out_bytes > 0 && (out.is_null() || !out.addr().is_multiple_of(size)) {
        return Err(Failure::invalid("out must not be null, and aligned for its type"));
    }
    let values = count * width;
    if values == 0 {
        return fill(&mut []);
    }
    match r#type {
        // SAFETY: `out` has the bytes of so many values, and is aligned for them.
        ENGRAM_F32 => fill(unsafe { std::slice::from_raw_parts_mut(out.cast::<f32>(), values) }),
        _ => {
            let mut wide = vec![0.0; values];
            fill(&mut wide)?;
            // SAFETY: as above.
            let narrow = unsafe { std::slice::from_raw_parts_mut(out.cast::<u16>(), values) };
            narrow_values(r#type, &wide, narrow);
            Ok(())
        }
    }
}

/// Rounds to nearest, ties to even.
fn narrow_values(r#type: i32, wide: &[f32], narrow: &mut [u16]) {
    if r#type == ENGRAM_BF16 {
        half::slice::HalfBitsSliceExt::reinterpret_cast_mut::<half::bf16>(narrow)
            .convert_from_f32_slice(wide);
    } else {
        half::slice::HalfBitsSliceExt::reinterpret_cast_mut::<half::f16>(narrow).convert_from_f32_slice(wide);
    }
}
