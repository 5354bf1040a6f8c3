//! Rows fetched while the model computes.
//!
//! Ids depend on tokens alone, so that the rows of a batch can be asked for long before they are needed:
//! submit its ids, compute, take the rows.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::PoisonError;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::deadline::Deadline;
use crate::error::{Result, StoreError, check_length, check_rows};
use crate::row_format::RowFormat;
use crate::row_source::{RowSource, decode_rows};
use sync::{Arc, Condvar, Mutex, MutexGuard};

#[cfg(loom)]
use loom::sync;
#[cfg(not(loom))]
use std::sync;

/// How much a [`Prefetcher`] may do at once.
///
/// ```
/// use engram_store::PrefetchOptions;
///
/// let options = PrefetchOptions::default().threads(4).bytes(64 << 20);
/// assert_eq!(options.threads, 4);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PrefetchOptions {
    /// Batches fetched at once, each by a thread of its own.
    pub threads: usize,
    /// Rows of a batch that are asked for at a time. With all of them at a time a batch is there soonest; with few, those
    /// of another prefetcher wait less behind it.
    pub at_a_time: usize,
    /// Bytes of batches that are waiting, being fetched, or fetched and not yet dropped: their rows as stored, and
    /// their ids.
    pub bytes: u64,
    /// How long [`Prefetcher::submit`] waits for room, and a ticket for its rows.
    pub time_limit: Duration,
}

impl Default for PrefetchOptions {
    fn default() -> Self {
        Self { threads: 2, at_a_time: usize::MAX, bytes: 256 << 20, time_limit: Duration::from_secs(60) }
    }
}

impl PrefetchOptions {
    /// With so many batches fetched at once.
    #[must_use]
    pub const fn threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }

    /// Sets how many rows of a batch are requested at a time.
    #[must_use]
    pub const fn at_a_time(self, at_a_time: usize) -> Self {
        Self { at_a_time, ..self }
    }

    /// Sets the bytes that batches may hold while they wait, are fetched, or are fetched and not yet dropped.
    #[must_use]
    pub const fn bytes(self, bytes: u64) -> Self {
        Self { bytes, ..self }
    }

    /// With this limit on the time that is waited for room, and for rows.
    #[must_use]
    pub const fn time_limit(self, time_limit: Duration) -> Self {
        Self { time_limit, ..self }
    }
}

/// Fetches rows from a source on threads of its own, ahead of their use and in bounded memory.
///
/// ```
/// # use engram_store::{AddressIdentity, PrefetchOptions, Prefetcher, RowFormat, Storage, Table, TableOrigin};
/// # fn main() -> engram_store::Result<()> {
/// # let origin = TableOrigin { identity: AddressIdentity::from_bytes([7; 32]), layer: 1 };
/// # let fill = |id: u64, row: &mut [f32]| row.fill(id as f32);
/// # let table = Table::from_fn(1000, 4, RowFormat::F32, origin, &Storage::Ram, fill)?;
/// let prefetcher = Prefetcher::new(table, &PrefetchOptions::default())?;
/// let ticket = prefetcher.submit([17, 3, 17])?;
/// // ... compute ...
/// let mut rows = [0.0; 12];
/// ticket.take(&mut rows)?;
/// assert_eq!(rows[3..5], [17.0, 3.0]);
/// # Ok(())
/// # }
/// ```
///
/// Dropped, it fetches no more: what waits is an error for whoever holds the ticket. Batches that are being
/// fetched are not waited for, but still reach their tickets.
pub struct Prefetcher {
    source: Arc<dyn RowSource>,
    exchange: Arc<Exchange>,
    time_limit: Duration,
}

impl Prefetcher {
    /// Starts the threads.
    ///
    /// # Errors
    /// If an option is 0, or threads cannot be started.
    pub fn new(source: impl RowSource + 'static, options: &PrefetchOptions) -> Result<Self> {
        if options.threads == 0 {
            return Err(StoreError::setting("threads", 0, "at least 1"));
        }
        if options.at_a_time == 0 {
            return Err(StoreError::setting("at_a_time", 0, "at least 1"));
        }
        if options.bytes == 0 {
            return Err(StoreError::setting("bytes", 0, "at least 1"));
        }
        #[cfg(not(loom))]
        let source: Arc<dyn RowSource> = Arc::new(source);
        #[cfg(loom)]
        let source: Arc<dyn RowSource> = Arc::from_std(std::sync::Arc::new(source));
        let exchange = Arc::new(Exchange::new(options.bytes));
        let prefetcher = Self { source, exchange, time_limit: options.time_limit };
        for _ in 0..options.threads {
            let (source, exchange) = (Arc::clone(&prefetcher.source), Arc::clone(&prefetcher.exchange));
            let at_a_time = options.at_a_time;
            std::thread::Builder::new()
                .name("row-prefetch".into())
                .spawn(move || while exchange.serve(&|ids| fetch(&*source, ids, at_a_time)) {})
                .map_err(|source| StoreError::Memory {
                    bytes: 0,
                    place: "a thread to prefetch with".into(),
                    source,
                })?;
        }
        Ok(prefetcher)
    }

    /// Has the rows `ids` fetched, waiting until there is room for them. Ids may repeat and have any order.
    ///
    /// The room is other tickets' and what was taken from them: a thread that holds on to all of it waits in
    /// vain. Async code asks with [`try_submit`](Self::try_submit).
    ///
    /// # Errors
    /// If an id is not a row, the rows alone are more than all of the room, or there is none within the limit.
    pub fn submit(&self, ids: impl Into<Vec<u64>>) -> Result<Ticket> {
        let (ids, bytes) = self.check(ids.into())?;
        let lease = Exchange::wait_for_room(&self.exchange, bytes, self.time_limit)?;
        Ok(self.ticket(ids, lease))
    }

    /// Has the rows `ids` fetched if there is room for them now; `None` if there is not.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), but for the limit.
    pub fn try_submit(&self, ids: impl Into<Vec<u64>>) -> Result<Option<Ticket>> {
        let (ids, bytes) = self.check(ids.into())?;
        Ok(Exchange::room(&self.exchange, bytes).map(|lease| self.ticket(ids, lease)))
    }

    /// Bytes of batches that are waiting, being fetched, or fetched and not yet dropped.
    pub fn bytes_in_use(&self) -> u64 {
        self.exchange.lock().in_use
    }

    fn check(&self, ids: Vec<u64>) -> Result<(Vec<u64>, u64)> {
        check_rows(&ids, self.source.rows())?;
        let bytes = (ids.len() * (8 + self.source.bytes_per_row())) as u64;
        if bytes > self.exchange.room {
            let rule = "at most what the prefetcher may hold: submit in parts, or allow it more";
            return Err(StoreError::setting("bytes of rows to fetch", bytes, rule));
        }
        Ok((ids, bytes))
    }

    fn ticket(&self, ids: Vec<u64>, lease: Lease) -> Ticket {
        let (format, width) = (self.source.format(), self.source.width());
        let request = Arc::new(Request::new(ids, lease));
        self.exchange.queue(Arc::clone(&request));
        Ticket { request, exchange: Arc::clone(&self.exchange), format, width, time_limit: self.time_limit }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.exchange.close();
    }
}

impl fmt::Debug for Prefetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefetcher").field("bytes_in_use", &self.bytes_in_use()).finish_non_exhaustive()
    }
}

/// Rows as they are stored; a source that panics is an error for the waiter.
fn fetch(source: &dyn RowSource, ids: &[u64], at_a_time: usize) -> Result<Vec<u8>> {
    let read = || {
        let row = source.bytes_per_row();
        let mut stored = vec![0; ids.len() * row];
        let some = at_a_time.min(ids.len().max(1));
        for (ids, rows) in ids.chunks(some).zip(stored.chunks_mut(some * row)) {
            source.read(ids, rows)?;
        }
        Ok(stored)
    };
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|&text| text.to_owned());
        let message = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(StoreError::SourcePanicked { message: message.unwrap_or_else(|| "no message".into()) })
    })
}

/// The right to rows that were submitted. Take them from a thread with [`take`](Self::take) or
/// [`wait`](Self::wait), in async code with `.await`, which needs no particular runtime.
///
/// Dropped, it cancels: rows that wait are not fetched, rows that are being fetched are thrown away, and their
/// room is free again.
#[must_use = "a ticket that is dropped cancels its fetch"]
pub struct Ticket {
    request: Arc<Request>,
    exchange: Arc<Exchange>,
    format: RowFormat,
    width: usize,
    time_limit: Duration,
}

impl Ticket {
    /// Waits for the rows and decodes them to `out` \[ids, width\].
    ///
    /// # Errors
    /// If they could not be fetched, for whatever reason the source gives; if they are not there within the limit;
    /// if `out` has another length.
    pub fn take(self, out: &mut [f32]) -> Result<()> {
        check_length("gathered rows", self.request.ids.len() * self.width, out.len())?;
        self.wait()?.decode(out)
    }

    /// Waits for the rows, as they are stored.
    ///
    /// # Errors
    /// If they could not be fetched, or are not there within the limit.
    pub fn wait(self) -> Result<FetchedRows> {
        let fetched = self.request.wait(self.time_limit)?;
        Ok(self.rows(fetched))
    }

    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_ready(&self) -> bool {
        self.request.lock().outcome.is_some()
    }

    fn rows(&self, (stored, lease): (Vec<u8>, Lease)) -> FetchedRows {
        FetchedRows { stored, format: self.format, width: self.width, _lease: lease }
    }
}

impl Future for Ticket {
    type Output = Result<FetchedRows>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = self.request.poll(context.waker());
        polled.map_ok(|fetched| self.rows(fetched))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.exchange.cancel(&self.request);
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket").field("rows", &self.request.ids.len()).finish_non_exhaustive()
    }
}

/// Rows taken from a [`Ticket`]; their room is free when they are dropped.
pub struct FetchedRows {
    stored: Vec<u8>,
    format: RowFormat,
    width: usize,
    _lease: Lease,
}

impl FetchedRows {
    /// The rows as they are stored, \[ids, bytes per row\].
    pub fn stored(&self) -> &[u8] {
        &self.stored
    }

    /// Decodes the rows to `out` \[ids, width\].
    ///
    /// # Errors
    /// If `out` has another length.
    pub fn decode(&self, out: &mut [f32]) -> Result<()> {
        let rows = self.stored.len() / self.format.bytes_per_row(self.width);
        check_length("gathered rows", rows * self.width, out.len())?;
        decode_rows(self.format, self.width, &self.stored, out);
        Ok(())
    }
}

impl fmt::Debug for FetchedRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FetchedRows").field("bytes", &self.stored.len()).finish_non_exhaustive()
    }
}

/// Between those who ask and those who fetch: the requests that wait, and the room that is left.
///
/// Two kinds of locks, of which no thread ever holds two: the exchange's, and one per request. What a request
/// holds of the room is a [`Lease`], given back wherever the last owner of the request or its rows lets go.
struct Exchange {
    room: u64,
    state: Mutex<State>,
    /// A request waits, or none will come any more.
    work: Condvar,
    /// Room became free.
    freed: Condvar,
}

struct State {
    waiting: VecDeque<Arc<Request>>,
    in_use: u64,
    closed: bool,
}

impl Exchange {
    fn new(room: u64) -> Self {
        let state = State { waiting: VecDeque::new(), in_use: 0, closed: false };
        Self { room, state: Mutex::new(state), work: Condvar::new(), freed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing between locking and unlocking can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn room(exchange: &Arc<Self>, bytes: u64) -> Option<Lease> {
        exchange.lock().lend(exchange, bytes)
    }

    fn wait_for_room(exchange: &Arc<Self>, bytes: u64, limit: Duration) -> Result<Lease> {
        let deadline = Deadline::after(limit);
        let mut state = exchange.lock();
        loop {
            if let Some(lease) = state.lend(exchange, bytes) {
                return Ok(lease);
            }
            let Some(left) = left(deadline) else {
                let what = "room for more rows to fetch (take or drop the tickets before)";
                return Err(StoreError::TooSlow { what, limit });
            };
            state = wait(&exchange.freed, state, left);
        }
    }

    fn queue(&self, request: Arc<Request>) {
        self.lock().waiting.push_back(request);
        self.work.notify_one();
    }

    /// Serves one request, waiting for it; `false` when no more will come.
    fn serve(&self, fetch: &dyn Fn(&[u64]) -> Result<Vec<u8>>) -> bool {
        let mut state = self.lock();
        let request = loop {
            if let Some(request) = state.waiting.pop_front() {
                break request;
            }
            if state.closed {
                return false;
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        let outcome = fetch(&request.ids);
        request.complete(outcome);
        true
    }

    /// Takes back a request that still waits.
    fn cancel(&self, request: &Arc<Request>) {
        let mut state = self.lock();
        let place = state.waiting.iter().position(|waiting| Arc::ptr_eq(waiting, request));
        let cancelled = place.and_then(|place| state.waiting.remove(place));
        drop(state);
        // Its lease locks the exchange.
        drop(cancelled);
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.work.notify_all();
        waiting.iter().for_each(|request| request.complete(Err(StoreError::PrefetcherDropped)));
    }
}

impl State {
    fn lend(&mut self, exchange: &Arc<Exchange>, bytes: u64) -> Option<Lease> {
        if bytes > exchange.room - self.in_use {
            return None;
        }
        self.in_use += bytes;
        Some(Lease { exchange: Arc::clone(exchange), bytes })
    }
}

/// A part of the room.
struct Lease {
    exchange: Arc<Exchange>,
    bytes: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.exchange.lock().in_use -= self.bytes;
        self.exchange.freed.notify_all();
    }
}

/// Ids, and what became of them.
struct Request {
    ids: Vec<u64>,
    progress: Mutex<Progress>,
    done: Condvar,
}

struct Progress {
    /// Until the rows take it along.
    lease: Option<Lease>,
    outcome: Option<Result<Vec<u8>>>,
    waker: Option<Waker>,
}

impl Request {
    fn new(ids: Vec<u64>, lease: Lease) -> Self {
        let progress = Progress { lease: Some(lease), outcome: None, waker: None };
        Self { ids, progress: Mutex::new(progress), done: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, outcome: Result<Vec<u8>>) {
        let mut progress = self.lock();
        // An error takes no room.
        let lease = if outcome.is_err() { progress.lease.take() } else { None };
        progress.outcome = Some(outcome);
        let waker = progress.waker.take();
        drop(progress);
        self.done.notify_all();
        drop(lease);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn wait(&self, limit: Duration) -> Result<(Vec<u8>, Lease)> {
        let deadline = Deadline::after(limit);
        let mut progress = self.lock();
        loop {
            if let Some(taken) = progress.take() {
                return taken;
            }
            let Some(left) = left(deadline) else {
                return Err(StoreError::TooSlow { what: "rows that are being fetched", limit });
            };
            progress = wait(&self.done, progress, left);
        }
    }

    fn poll(&self, waker: &Waker) -> Poll<Result<(Vec<u8>, Lease)>> {
        let mut progress = self.lock();
        if let Some(taken) = progress.take() {
            return Poll::Ready(taken);
        }
        progress.waker = Some(waker.clone());
        Poll::Pending
    }
}

impl Progress {
    fn take(&mut self) -> Option<Result<(Vec<u8>, Lease)>> {
        let outcome = self.outcome.take()?;
        Some(
            outcome.map(|stored| (stored, self.lease.take().expect("rows that were not taken have a lease"))),
        )
    }
}

/// What is left; none after the end.
fn left(deadline: Deadline) -> Option<Duration> {
    Some(deadline.left()).filter(|left| !left.is_zero())
}

fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>, limit: Duration) -> MutexGuard<'a, T> {
    condition.wait_timeout(guard, limit).unwrap_or_else(PoisonError::into_inner).0
}

#[cfg(all(test, not(loom)))]
#[allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::task::Wake;
    use std::time::Instant;

    const BYTES: u64 = 16;

    /// Row `id` is `id` as bytes. Row 13 is broken, row 99 panics, and while the gate is locked nothing is read.
    #[derive(Default)]
    struct Numbers {
        gate: Mutex<()>,
        reads: AtomicUsize,
    }

    impl RowSource for Numbers {
        fn rows(&self) -> u64 {
            1000
        }

        fn width(&self) -> usize {
            2
        }

        fn format(&self) -> RowFormat {
            RowFormat::F32
        }

        fn read(&self, ids: &[u64], out: &mut [u8]) -> Result<()> {
            drop(self.gate.lock());
            self.reads.fetch_add(1, Ordering::SeqCst);
            assert!(!ids.contains(&99), "row 99 panics");
            if ids.contains(&13) {
                return Err(StoreError::setting("row 13", "broken", "whole"));
            }
            ids.iter().zip(out.chunks_mut(8)).for_each(|(id, out)| out.copy_from_slice(&id.to_le_bytes()));
            Ok(())
        }
    }

    fn prefetcher(threads: usize, rows: u64) -> (Arc<Numbers>, Prefetcher) {
        let numbers = Arc::new(Numbers::default());
        let time_limit = Duration::from_secs(5);
        let options =
            PrefetchOptions { threads, bytes: rows * BYTES, time_limit, ..PrefetchOptions::default() };
        (Arc::clone(&numbers), Prefetcher::new(numbers, &options).unwrap())
    }

    fn is_rows(ids: &[u64], rows: &FetchedRows) {
        assert!(ids.iter().zip(rows.stored().chunks(8)).all(|(id, row)| row == id.to_le_bytes()));
        assert_eq!(rows.stored().len(), ids.len() * 8);
    }

    fn eventually(what: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !what() {
            assert!(Instant::now() < deadline, "it never comes");
            std::thread::yield_now();
        }
    }

    /// The smallest of runtimes.
    fn block_on<F: Future>(future: F) -> F::Output {
        struct Unpark(std::thread::Thread);
        impl Wake for Unpark {
            fn wake(self: std::sync::Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
        let mut future = std::pin::pin!(future);
        loop {
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(done) => return done,
                Poll::Pending => std::thread::park_timeout(Duration::from_secs(5)),
            }
        }
    }

    #[test]
    fn a_limit_without_end_is_one() {
        let options =
            PrefetchOptions { time_limit: Duration::MAX, bytes: 2 * BYTES, ..PrefetchOptions::default() };
        let numbers = Arc::new(Numbers::default());
        let prefetcher = Prefetcher::new(Arc::clone(&numbers), &options).unwrap();
        let gate = numbers.gate.lock().unwrap();
        let tickets = [prefetcher.submit([1]).unwrap(), prefetcher.submit([2]).unwrap()];
        std::thread::scope(|scope| {
            // Waits for room, and for its rows.
            let third = scope.spawn(|| prefetcher.submit([3]).unwrap().wait().unwrap().stored()[0]);
            drop(gate);
            tickets.into_iter().for_each(|ticket| drop(ticket.wait().unwrap()));
            assert_eq!(third.join().unwrap(), 3);
        });
    }

    #[test]
    fn rows_come_to_threads_and_to_async_code_in_any_order() {
        let (numbers, prefetcher) = prefetcher(2, 100);
        let gate = numbers.gate.lock().unwrap();
        let [first, second, third] =
            [vec![3, 4, 3], vec![7], vec![]].map(|ids| prefetcher.submit(ids).unwrap());
        assert!(!first.is_ready());
        drop(gate);
        is_rows(&[7], &second.wait().unwrap());
        is_rows(&[3, 4, 3], &block_on(first).unwrap());
        is_rows(&[], &block_on(third).unwrap());
        let mut values = [0.0; 2];
        prefetcher.submit([5]).unwrap().take(&mut values).unwrap();
        assert_eq!(values.map(f32::to_bits), [5, 0]);
        assert!(prefetcher.submit([5]).unwrap().take(&mut [0.0; 3]).is_err());
        eventually(|| prefetcher.bytes_in_use() == 0);
    }

    #[test]
    fn an_error_reaches_whoever_takes_the_ticket_and_nobody_else() {
        let (_, prefetcher) = prefetcher(1, 100);
        let [good, broken, panics, after] = [[1], [13], [99], [2]].map(|ids| prefetcher.submit(ids).unwrap());
        assert!(broken.wait().unwrap_err().to_string().contains("row 13"));
        let panicked = block_on(panics).unwrap_err();
        assert!(matches!(&panicked, StoreError::SourcePanicked { message } if message == "row 99 panics"));
        is_rows(&[1], &good.wait().unwrap());
        is_rows(&[2], &after.wait().unwrap());
        assert!(matches!(prefetcher.submit([1000]), Err(StoreError::RowOutOfRange { .. })));
        eventually(|| prefetcher.bytes_in_use() == 0);
    }

    #[test]
    fn room_is_bounded_and_comes_back_when_rows_are_dropped() {
        let (_, prefetcher) = prefetcher(1, 10);
        assert!(prefetcher.submit((0..11).collect::<Vec<_>>()).unwrap_err().to_string().contains("in parts"));
        let rows = prefetcher.submit((0..8).collect::<Vec<_>>()).unwrap().wait().unwrap();
        assert_eq!(prefetcher.bytes_in_use(), 8 * BYTES);
        assert!(prefetcher.try_submit([1, 2, 3]).unwrap().is_none());
        let two = prefetcher.try_submit([1, 2]).unwrap().unwrap();
        std::thread::scope(|scope| {
            let (started, start) = mpsc::channel();
            let waits = scope.spawn(|| {
                let started = started;
                started.send(()).unwrap();
                prefetcher.submit([1, 2, 3]).unwrap().wait().unwrap()
            });
            start.recv().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waits.is_finished(), "no room yet");
            drop(rows);
            is_rows(&[1, 2, 3], &waits.join().unwrap());
        });
        drop(two);
        eventually(|| prefetcher.bytes_in_use() == 0);
        let limit = Duration::from_millis(20);
        let options =
            PrefetchOptions { threads: 1, bytes: BYTES, time_limit: limit, ..PrefetchOptions::default() };
        let numbers = Arc::new(Numbers::default());
        let prefetcher = Prefetcher::new(Arc::clone(&numbers), &options).unwrap();
        let gate = numbers.gate.lock().unwrap();
        let held = prefetcher.submit([1]).unwrap();
        assert!(matches!(prefetcher.submit([2]), Err(StoreError::TooSlow { .. })));
        assert!(matches!(held.wait(), Err(StoreError::TooSlow { .. })));
        drop(gate);
    }

    #[test]
    fn rows_are_asked_for_as_many_at_a_time_as_wanted() {
        let numbers = Arc::new(Numbers::default());
        let options = PrefetchOptions { at_a_time: 4, ..PrefetchOptions::default() };
        let prefetcher = Prefetcher::new(Arc::clone(&numbers), &options).unwrap();
        for (count, reads) in [(10, 3), (4, 4), (1, 5), (0, 5)] {
            let ids: Vec<u64> = (20..20 + count).collect();
            is_rows(&ids, &prefetcher.submit(ids.clone()).unwrap().wait().unwrap());
            assert_eq!(numbers.reads.load(Ordering::SeqCst), reads);
        }
        let none = PrefetchOptions { at_a_time: 0, ..options };
        assert!(Prefetcher::new(numbers, &none).unwrap_err().to_string().contains("at_a_time"));
    }

    #[test]
    fn a_dropped_ticket_is_not_fetched_and_gives_its_room_back() {
        let (numbers, prefetcher) = prefetcher(1, 10);
        let gate = numbers.gate.lock().unwrap();
        let fetching = prefetcher.submit([1]).unwrap();
        eventually(|| prefetcher.exchange.lock().waiting.is_empty());
        let waiting = prefetcher.submit([2, 3]).unwrap();
        drop(waiting);
        assert_eq!(prefetcher.bytes_in_use(), BYTES);
        drop(fetching);
        drop(gate);
        eventually(|| prefetcher.bytes_in_use() == 0);
        is_rows(&[4], &prefetcher.submit([4]).unwrap().wait().unwrap());
        assert_eq!(numbers.reads.load(Ordering::SeqCst), 2, "the one that waited was never read");
    }

    #[test]
    fn a_dropped_prefetcher_is_an_error_for_those_who_wait() {
        let (numbers, prefetcher) = prefetcher(1, 10);
        let gate = numbers.gate.lock().unwrap();
        let fetching = prefetcher.submit([1]).unwrap();
        eventually(|| prefetcher.exchange.lock().waiting.is_empty());
        let waiting = prefetcher.submit([2]).unwrap();
        drop(prefetcher);
        assert!(matches!(waiting.wait(), Err(StoreError::PrefetcherDropped)));
        drop(gate);
        is_rows(&[1], &fetching.wait().unwrap());
        eventually(|| Arc::strong_count(&numbers) == 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_schedule_gives_everyone_their_rows_and_all_room_back(
            threads in 1..4usize,
            plans in prop::collection::vec(
                prop::collection::vec((prop::collection::vec(0..120u64, 0..9), 0..4u8), 1..25), 1..4),
        ) {
            let (_, prefetcher) = prefetcher(threads, 40);
            std::thread::scope(|scope| for plan in &plans {
                let prefetcher = &prefetcher;
                scope.spawn(move || for (ids, how) in plan {
                    let ticket = prefetcher.submit(ids.clone()).unwrap();
                    let rows = match how {
                        0 => {
                            drop(ticket);
                            continue;
                        }
                        1 => block_on(ticket),
                        _ => ticket.wait(),
                    };
                    match rows {
                        Ok(rows) => is_rows(ids, &rows),
                        Err(_) => assert!(ids.contains(&13) || ids.contains(&99)),
                    }
                });
            });
            eventually(|| prefetcher.bytes_in_use() == 0);
        }
    }
}

/// Every schedule of the exchange's threads with at most three preemptions, which is where errors are:
/// `RUSTFLAGS="--cfg loom" cargo test --release -p engram-store --lib prefetch`.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::thread;

    const LIMIT: Duration = Duration::from_secs(3600);

    fn model(threads: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(threads);
    }

    fn submit(exchange: &Arc<Exchange>, id: u64) -> Arc<Request> {
        let lease = Exchange::wait_for_room(exchange, 1, LIMIT).unwrap();
        let request = Arc::new(Request::new(vec![id], lease));
        exchange.queue(Arc::clone(&request));
        request
    }

    fn serving(exchange: &Arc<Exchange>) -> thread::JoinHandle<()> {
        let exchange = Arc::clone(exchange);
        let fetch = |ids: &[u64]| match ids[0] {
            9 => Err(StoreError::PrefetcherDropped),
            id => Ok(vec![id as u8]),
        };
        thread::spawn(move || while exchange.serve(&fetch) {})
    }

    #[test]
    fn everyone_gets_their_rows_through_room_for_one() {
        model(|| {
            let exchange = Arc::new(Exchange::new(1));
            let server = serving(&exchange);
            for id in [1, 9, 2] {
                let request = submit(&exchange, id);
                match request.wait(LIMIT) {
                    Ok((rows, _lease)) => assert_eq!(rows, [id as u8]),
                    Err(_) => assert_eq!(id, 9),
                }
            }
            exchange.close();
            server.join().unwrap();
            assert_eq!(exchange.lock().in_use, 0);
        });
    }

    #[test]
    fn cancelling_at_any_moment_gives_the_room_back_to_who_waits_for_it() {
        model(|| {
            let exchange = Arc::new(Exchange::new(1));
            let server = serving(&exchange);
            let request = submit(&exchange, 1);
            let other = {
                let exchange = Arc::clone(&exchange);
                thread::spawn(move || {
                    let (rows, _lease) = submit(&exchange, 2).wait(LIMIT).unwrap();
                    assert_eq!(rows, [2]);
                })
            };
            exchange.cancel(&request);
            drop(request);
            other.join().unwrap();
            exchange.close();
            server.join().unwrap();
            assert_eq!(exchange.lock().in_use, 0);
        });
    }

    #[test]
    fn closing_at_any_moment_leaves_nobody_waiting() {
        model(|| {
            let exchange = Arc::new(Exchange::new(2));
            let server = serving(&exchange);
            let requests = [submit(&exchange, 1), submit(&exchange, 2)];
            exchange.close();
            for (id, request) in [1, 2].iter().zip(requests) {
                if let Ok((rows, _lease)) = request.wait(LIMIT) {
                    assert_eq!(rows, [*id]);
                }
            }
            server.join().unwrap();
            assert_eq!(exchange.lock().in_use, 0);
        });
    }
}
