//! Reads through io_uring: a queue shared with the kernel, so that a whole batch of reads costs a few system
//! calls, and memory and file that the kernel knows beforehand.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use memmap2::{MmapMut, MmapRaw};

use crate::deadline::Deadline;
use crate::span::{Failed, Span};

/// How long a wait for the kernel is at most, before it is begun again.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A ring and the buffers that its reads go to.
pub(crate) struct Uring {
    ring: IoUring,
    /// Open as long as the kernel may read from it.
    file: Arc<File>,
    /// `depth` buffers one after another, which the kernel writes to: there is no reference to one that it may be
    /// writing to. Freed only when nothing is in flight: see `drop`.
    buffers: ManuallyDrop<MmapRaw>,
    buffer_bytes: usize,
    free: Vec<u32>,
    /// The span that each buffer is being filled from.
    spans: Vec<usize>,
    in_flight: usize,
    /// Whether the kernel took buffers and file beforehand, which a limit on locked memory can forbid.
    registered: bool,
}

impl Uring {
    pub(crate) fn new(file: Arc<File>, depth: usize, buffer_bytes: usize) -> io::Result<Self> {
        let depth = u32::try_from(depth).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // Without interrupts from the kernel for every completion, where it is new enough to do without.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .build(depth)
            .or_else(|_| IoUring::builder().build(depth))?;
        if !ring.params().is_feature_ext_arg() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring has no time limits",
            ));
        }
        let buffers = MmapRaw::from(MmapMut::map_anon(depth as usize * buffer_bytes)?);
        let whole = libc::iovec { iov_base: buffers.as_mut_ptr().cast(), iov_len: buffers.len() };
        // SAFETY: the memory stays mapped while the ring knows it: `drop` takes it back from the ring before unmapping it,
        // or never unmaps it.
        let registered = unsafe { ring.submitter().register_buffers(&[whole]) }.is_ok()
            && ring.submitter().register_files(&[file.as_raw_fd()]).is_ok();
        if !registered {
            // Buffers without the file are not used: an error says that there are none.
            let _ = ring.submitter().unregister_buffers();
        }
        Ok(Self {
            ring,
            file,
            buffers: ManuallyDrop::new(buffers),
            buffer_bytes,
            free: (0..depth).rev().collect(),
            spans: vec![0; depth as usize],
            in_flight: 0,
            registered,
        })
    }

    pub(crate) fn is_registered(&self) -> bool {
        self.registered
    }

    pub(crate) fn read_all(
        &mut self,
        spans: &[Span],
        limit: Duration,
        each: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Failed> {
        let mut waiting = 0..spans.len();
        let mut again = Vec::new();
        let mut result = Ok(());
        loop {
            while result.is_ok()
                && !self.free.is_empty()
                && let Some(number) = again.pop().or_else(|| waiting.next())
            {
                self.push(number, spans[number]);
            }
            if self.in_flight == 0 {
                return result;
            }
            // Nobody can use a part of the batch: half of the queue is refilled at a time, and the end waited for at once,
            // so that a waiter is not woken, and takes no processor from others, for every read.
            let more = !again.is_empty() || !waiting.is_empty();
            let wanted = if more { self.in_flight.div_ceil(2) } else { self.in_flight };
            if let Err(source) = self.wait(wanted, limit) {
                let oldest = (0..self.spans.len() as u32).find(|slot| !self.free.contains(slot));
                let span = oldest.map_or(0, |slot| self.spans[slot as usize]);
                return result.and(Err(Failed { span, source }));
            }
            while let Some((number, slot, read)) = self.completed() {
                match read {
                    Ok(bytes) if bytes == spans[number].bytes => {
                        if result.is_ok() {
                            each(number, self.filled(slot, bytes));
                        }
                    }
                    Ok(_) => {
                        let source = io::ErrorKind::UnexpectedEof.into();
                        result = result.and(Err(Failed { span: number, source }));
                    }
                    Err(busy)
                        if matches!(busy.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) =>
                    {
                        again.push(number);
                    }
                    Err(source) => result = result.and(Err(Failed { span: number, source })),
                }
                self.free.push(slot);
            }
        }
    }

    /// Queues the read of a span into a free buffer, of which there must be one.
    fn push(&mut self, number: usize, span: Span) {
        let slot = self.free.pop().expect("a free buffer, as the caller has seen");
        assert!(span.bytes <= self.buffer_bytes, "a span that fits a buffer");
        self.spans[slot as usize] = number;
        let entry = self.entry(slot, span);
        // SAFETY: the buffer is inside the mapping, which outlives the read, and nobody looks at it before the
        // read's completion; the file is open as long.
        // The queue has an entry per buffer, so that there is room.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("as many entries as buffers");
        self.in_flight += 1;
    }

    fn entry(&self, slot: u32, span: Span) -> squeue::Entry {
        let (buffer, bytes) = (self.buffer(slot), span.bytes as u32);
        let entry = if self.registered {
            opcode::ReadFixed::new(Fixed(0), buffer, bytes, 0).offset(span.offset).build()
        } else {
            opcode::Read::new(Fd(self.file.as_raw_fd()), buffer, bytes).offset(span.offset).build()
        };
        entry.user_data(u64::from(slot))
    }

    fn buffer(&self, slot: u32) -> *mut u8 {
        self.buffers.as_mut_ptr().wrapping_add(slot as usize * self.buffer_bytes)
    }

    /// A buffer whose read is complete.
    fn filled(&self, slot: u32, bytes: usize) -> &[u8] {
        debug_assert!(bytes <= self.buffer_bytes);
        // SAFETY: inside the mapping; the kernel has finished writing to it, and starts again only through
        // `push`, which needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.buffer(slot), bytes) }
    }

    /// Submits what is queued and waits for so many completions, or for any within `limit`.
    fn wait(&mut self, wanted: usize, limit: Duration) -> io::Result<()> {
        let deadline = Deadline::after(limit);
        loop {
            // The kernel takes no more seconds than an i64 holds.
            let left = Timespec::from(deadline.left().min(LONGEST_WAIT));
            let waited = self.ring.submitter().submit_with_args(wanted, &SubmitArgs::new().timespec(&left));
            if !self.ring.completion().is_empty() {
                return Ok(());
            }
            match waited.map_err(|error| error.raw_os_error()) {
                Ok(_) | Err(Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME))
                    if !deadline.has_passed() => {}
                Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(code) => {
                    return Err(code.map_or(io::ErrorKind::Other.into(), io::Error::from_raw_os_error));
                }
            }
        }
    }

    /// The next completion: span, buffer, and the bytes read. The buffer is not free until its bytes were used.
    fn completed(&mut self) -> Option<(usize, u32, io::Result<usize>)> {
        let done: cqueue::Entry = self.ring.completion().next()?;
        self.in_flight -= 1;
        let slot = done.user_data() as u32;
        let read = usize::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()));
        Some((self.spans[slot as usize], slot, read))
    }

    /// Whether reads that were given up on are still under way.
    pub(crate) fn is_stuck(&mut self) -> bool {
        while let Some((_, slot, _)) = self.completed() {
            self.free.push(slot);
        }
        self.in_flight > 0
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // What the kernel may still write to must stay what it is: a few megabytes are lost when a disk hangs.
        let known = self.registered && self.ring.submitter().unregister_buffers().is_err();
        if !self.is_stuck() && !known {
            // SAFETY: nothing is in flight, the ring does not know the memory, and the field is not used again.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        }
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("depth", &self.spans.len())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}
