//! Mapped files that cannot end the process.
//!
//! Touching a page of a mapped file that the file no longer has (somebody shortened it), or that the disk cannot
//! deliver, raises SIGBUS, which ends the process. No check beforehand helps, as the file may change right after
//! it; and a system call for every row (pread, process_vm_readv) costs many times a row that is in memory.
//! So the signal itself is handled. A process-wide handler knows every [`Watched`] mapping. A fault inside one of
//! them is noted, and zeros are put in place of the whole mapping, on which the interrupted read continues. Whoever
//! read asks [`Watched::fault`] *afterwards* and throws the zeros away. A faulted mapping stays so for good.
//!
//! Faults anywhere else go to the handler that was there before. A library that later installs its own handler
//! for SIGBUS without passing foreign faults on takes this protection away.

use memmap2::MmapRaw;

/// A mapping under the protection of the handler.
///
/// No reference to its bytes is ever made: the handler, or another process, may change them at any moment, which a
/// `&[u8]` promises will not happen. They are copied in and out.
#[derive(Debug)]
pub(crate) struct Watched {
    map: MmapRaw,
    /// None: it is not under the handler's protection after all.
    #[cfg(all(unix, feature = "sigbus"))]
    watch: Option<&'static handler::Watch>,
}

impl Watched {
    pub(crate) fn new(map: impl Into<MmapRaw>) -> std::io::Result<Self> {
        let map = map.into();
        Ok(Self {
            #[cfg(all(unix, feature = "sigbus"))]
            watch: Some(handler::watch(map.as_ptr() as usize, map.len())?),
            map,
        })
    }

    /// Without the handler: a fault ends the process.
    pub(crate) fn unguarded(map: impl Into<MmapRaw>) -> Self {
        Self {
            #[cfg(all(unix, feature = "sigbus"))]
            watch: None,
            map: map.into(),
        }
    }

    /// The mapping.
    pub(crate) fn map(&self) -> &MmapRaw {
        &self.map
    }

    /// The first byte of the mapping that was not delivered, once there was one. Everything that was read from
    /// the mapping before a `None` is true, nothing that was read before a `Some` may be used.
    pub(crate) fn fault(&self) -> Option<u64> {
        #[cfg(all(unix, feature = "sigbus"))]
        return self.watch.and_then(handler::Watch::fault);
        #[cfg(not(all(unix, feature = "sigbus")))]
        None
    }

    /// Copies `out.len()` bytes from `start` on. They are read once: what another process writes to the file
    /// meanwhile cannot be seen twice differently.
    ///
    /// # Panics
    /// If they are not inside the mapping.
    #[inline]
    pub(crate) fn copy(&self, start: usize, out: &mut [u8]) {
        let bytes = self.map.len();
        assert!(start <= bytes && out.len() <= bytes - start, "bytes inside the mapping");
        // SAFETY: the range is inside the mapping, as asserted, and `out`, a unique reference, cannot overlap
        // it. The mapping's bytes may change under our hands; they are only copied, and any byte is a valid u8.
        // Pages that are not delivered become zeros in the handler.
        unsafe { std::ptr::copy_nonoverlapping(self.map.as_ptr().add(start), out.as_mut_ptr(), out.len()) }
    }
}

#[cfg(all(unix, feature = "sigbus"))]
impl Drop for Watched {
    fn drop(&mut self) {
        // Before the map, a field, is unmapped: its addresses may then become anyone's.
        if let Some(watch) = self.watch {
            watch.release();
        }
    }
}

#[cfg(all(unix, feature = "sigbus"))]
mod handler {
    use std::io;
    use std::mem::MaybeUninit;
    use std::ptr;
    use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering, compiler_fence, fence};
    use std::sync::{Mutex, OnceLock, PoisonError};

    use libc::{c_int, c_void, sigaction, siginfo_t};

    const NO_FAULT: u64 = u64::MAX;

    /// One watched range. These form a list that only grows, so that the handler can walk it at any moment;
    /// released ones are used again. The range is guarded by `generation`, odd while it is being changed.
    #[derive(Debug)]
    pub(super) struct Watch {
        generation: AtomicUsize,
        start: AtomicUsize,
        bytes: AtomicUsize,
        fault: AtomicU64,
        next: Option<&'static Watch>,
    }

    static LIST: AtomicPtr<Watch> = AtomicPtr::new(ptr::null_mut());
    /// Held to change the list or a range; never by the handler.
    static CHANGE: Mutex<()> = Mutex::new(());
    static BEFORE: OnceLock<sigaction> = OnceLock::new();

    impl Watch {
        pub(super) fn fault(&self) -> Option<u64> {
            // Reads of the mapping that come before this call stay before it, also where the handler runs on
            // this very thread; and whoever saw zeros that another thread's fault left also sees that fault,
            // which was noted before they appeared.
            compiler_fence(Ordering::SeqCst);
            fence(Ordering::SeqCst);
            Some(self.fault.load(Ordering::SeqCst)).filter(|&at| at != NO_FAULT)
        }

        pub(super) fn release(&self) {
            self.set(0, 0);
        }

        fn set(&self, start: usize, bytes: usize) {
            let _changing = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
            self.assign(start, bytes);
        }

        /// With `CHANGE` held.
        fn assign(&self, start: usize, bytes: usize) {
            self.generation.fetch_add(1, Ordering::SeqCst);
            self.start.store(start, Ordering::SeqCst);
            self.bytes.store(bytes, Ordering::SeqCst);
            self.fault.store(NO_FAULT, Ordering::SeqCst);
            self.generation.fetch_add(1, Ordering::SeqCst);
        }

        /// The range, if it is not just being changed (in which case nobody can be reading from it).
        fn range(&self) -> Option<(usize, usize)> {
            let before = self.generation.load(Ordering::SeqCst);
            let range = (self.start.load(Ordering::SeqCst), self.bytes.load(Ordering::SeqCst));
            let after = self.generation.load(Ordering::SeqCst);
            (before == after && before.is_multiple_of(2)).then_some(range)
        }
    }

    /// The list, from its newest entry on.
    fn list() -> impl Iterator<Item = &'static Watch> {
        // SAFETY: the list's head is null or came from `Box::leak`, and entries are never freed.
        let head: Option<&'static Watch> = unsafe { LIST.load(Ordering::SeqCst).as_ref() };
        std::iter::successors(head, |watch| watch.next)
    }

    pub(super) fn watch(start: usize, bytes: usize) -> io::Result<&'static Watch> {
        let _changing = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        install()?;
        if let Some(free) = list().find(|watch| watch.bytes.load(Ordering::SeqCst) == 0) {
            free.assign(start, bytes);
            return Ok(free);
        }
        let watch: &'static mut Watch = Box::leak(Box::new(Watch {
            generation: AtomicUsize::new(0),
            start: AtomicUsize::new(start),
            bytes: AtomicUsize::new(bytes),
            fault: AtomicU64::new(NO_FAULT),
            next: list().next(),
        }));
        let watch = ptr::from_mut(watch);
        LIST.store(watch, Ordering::SeqCst);
        // SAFETY: leaked above; from here on there are only shared references to it.
        Ok(unsafe { &*watch })
    }

    /// Installs the handler, once. With `CHANGE` held.
    fn install() -> io::Result<()> {
        if BEFORE.get().is_some() {
            return Ok(());
        }
        let mut before = MaybeUninit::<sigaction>::zeroed();
        // SAFETY: asks for the present action only; `before` is a valid place for it, all zeros included.
        let before = unsafe {
            if libc::sigaction(libc::SIGBUS, ptr::null(), before.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            before.assume_init()
        };
        // Known before the handler can run.
        let before = BEFORE.get_or_init(|| before);
        // SAFETY: an all-zero sigaction is valid; the fields that matter are set below.
        let mut action: sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = on_fault as *const () as usize;
        // On the alternative stack where a thread has one, as the handler before may rely on it (Rust's own
        // finds stack overflows); not blocking SIGBUS, which that handler may want to raise again.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        action.sa_mask = before.sa_mask;
        // SAFETY: `on_fault` has the signature that SA_SIGINFO asks for, and does only what a signal handler
        // may: atomics, mmap, sigaction.
        if unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: the system passes a valid siginfo, and SIGBUS carries an address.
        let at = unsafe { (*info).si_addr() } as usize;
        let covers =
            |watch: &&Watch| watch.range().is_some_and(|(start, bytes)| at.wrapping_sub(start) < bytes);
        if let Some(watch) = list().find(covers)
            && let Some((start, bytes)) = watch.range()
        {
            let offset = (at - start) as u64;
            // The first fault is the one that is reported.
            let _ = watch.fault.compare_exchange(NO_FAULT, offset, Ordering::SeqCst, Ordering::SeqCst);
            if put_zeros(start, bytes) {
                return;
            }
        }
        // SAFETY: the arguments are the system's own.
        unsafe { pass_on(signal, info, context) }
    }

    /// Replaces a watched mapping by zeros.
    fn put_zeros(start: usize, bytes: usize) -> bool {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range is exactly a mapping that its owner keeps until after it is released; the thread
        // that faulted is inside it, so that it has not been. Its bytes were unavailable in any case, and
        // nobody uses what is read from it from now on (see `Watch::fault`).
        unsafe { libc::mmap(start as *mut c_void, bytes, protection, flags, -1, 0) != libc::MAP_FAILED }
    }

    /// Hands the fault to whoever handled it before.
    ///
    /// # Safety
    /// The arguments must be those of the signal being handled.
    unsafe fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
        match BEFORE.get() {
            Some(before) if before.sa_sigaction != libc::SIG_DFL && before.sa_sigaction != libc::SIG_IGN => {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
                    // SAFETY: an action with SA_SIGINFO holds a handler of this signature.
                    let handler: Handler = unsafe { std::mem::transmute(before.sa_sigaction) };
                    handler(signal, info, context);
                } else {
                    // SAFETY: an action without it holds one of this signature.
                    let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(before.sa_sigaction) };
                    handler(signal);
                }
            }
            // Nobody: the access faults again on return and ends the process, as without this handler.
            _ => {
                // SAFETY: an all-zero sigaction is the default action.
                unsafe {
                    let default: sigaction = MaybeUninit::zeroed().assume_init();
                    libc::sigaction(signal, &default, ptr::null_mut());
                }
            }
        }
    }
}

#[cfg(all(test, unix, feature = "sigbus"))]
#[allow(clippy::unwrap_used)] // clippy counts only functions marked #[test] as tests
mod tests {
    use super::*;
    use memmap2::{Mmap, MmapMut};
    use std::process::Command;

    fn mapped(bytes: u64) -> (std::fs::File, Watched) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        // SAFETY: read through `Watched::copy` only.
        let map = unsafe { Mmap::map(&file) }.unwrap();
        (file, Watched::new(map).unwrap())
    }

    /// Reads, even where the optimiser sees that nobody uses the result.
    fn touch(map: &Watched, start: usize) -> [u8; 8] {
        let mut out = [1; 8];
        map.copy(start, &mut out);
        std::hint::black_box(out)
    }

    #[test]
    fn a_shortened_file_is_a_fault_for_every_thread_and_for_good() {
        let (file, map) = mapped(1 << 20);
        assert_eq!((touch(&map, 700_000), map.fault()), ([0; 8], None));
        file.set_len(500_000).unwrap();
        touch(&map, 100);
        assert_eq!(map.fault(), None, "what is still there can be read");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    touch(&map, 700_000);
                    assert_eq!(map.fault().map(|at| at / 4096), Some(700_000 / 4096));
                });
            }
        });
        file.set_len(1 << 20).unwrap();
        assert!(map.fault().is_some(), "zeros were put in place: it never recovers");
    }

    #[test]
    fn writing_to_what_is_gone_does_not_end_the_process_either() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        // SAFETY: the file has no name, and is shortened before its one mapping is used.
        let map = unsafe { MmapMut::map_mut(&file) }.unwrap();
        let map = Watched::new(map).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: inside the mapping, of which nobody has a reference.
        unsafe { map.map().as_mut_ptr().add(5000).write(1) };
        assert_eq!(map.fault(), Some(4096 + 904));
    }

    #[test]
    fn mappings_come_and_go_while_others_fault() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let (file, map) = mapped(64 << 10);
                        file.set_len(4096).unwrap();
                        touch(&map, 100);
                        assert_eq!(map.fault(), None, "nobody else's fault");
                        touch(&map, 9_000);
                        assert!(map.fault().is_some());
                    }
                });
            }
        });
    }

    /// The process that the test below starts.
    #[test]
    #[ignore = "ends the process"]
    fn a_fault_elsewhere() {
        let (_file, _map) = mapped(4096);
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        // SAFETY: reading it is meant to end the process.
        let foreign = unsafe { Mmap::map(&file) }.unwrap();
        file.set_len(0).unwrap();
        std::hint::black_box(foreign[7]);
    }

    #[test]
    fn faults_outside_still_end_the_process() {
        use std::os::unix::process::ExitStatusExt;
        let this = std::env::current_exe().unwrap();
        let arguments = ["--ignored", "--exact", "mapping::tests::a_fault_elsewhere", "--test-threads=1"];
        let ended = Command::new(this).args(arguments).output().unwrap().status;
        assert_eq!(ended.signal(), Some(libc::SIGBUS), "{ended}");
    }
}
