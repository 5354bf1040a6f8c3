//! Many reads of one file in flight at once, each in memory that the disk can write to directly.

use std::fs::File;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use memmap2::MmapMut;

use crate::positioned::read_exact_at;
use crate::span::{Failed, Span};
#[cfg(all(target_os = "linux", feature = "io-uring"))]
use crate::uring::Uring;

/// One caller's reads. Whatever the kind, there are `depth` buffers of `buffer_bytes` each.
#[derive(Debug)]
pub(crate) enum ReadQueue {
    #[cfg(all(target_os = "linux", feature = "io-uring"))]
    Uring(Box<Uring>),
    Threads(Reader),
}

impl ReadQueue {
    /// Reads `spans`, none larger than a buffer, and calls `each` with the number and bytes of every one, in the
    /// order in which they arrive. After a failure no more are started, and those under way are waited for.
    pub(crate) fn read_all(
        &mut self,
        spans: &[Span],
        limit: Duration,
        each: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Failed> {
        match self {
            #[cfg(all(target_os = "linux", feature = "io-uring"))]
            Self::Uring(ring) => ring.read_all(spans, limit, each),
            Self::Threads(reader) => reader.read_all(spans, limit, each),
        }
    }

    /// Whether reads that were given up on are still under way: the queue is then not to be used.
    pub(crate) fn is_stuck(&mut self) -> bool {
        match self {
            #[cfg(all(target_os = "linux", feature = "io-uring"))]
            Self::Uring(ring) => ring.is_stuck(),
            Self::Threads(reader) => reader.is_stuck(),
        }
    }
}

/// Threads that read for any number of [`Reader`]s, where the system has no better queue. They end when the last
/// reader is dropped.
#[derive(Debug)]
pub(crate) struct ReadThreads {
    jobs: Sender<Job>,
}

#[derive(Debug)]
struct Job {
    file: Arc<File>,
    number: usize,
    span: Span,
    buffer: MmapMut,
    done: Sender<Done>,
}

#[derive(Debug)]
struct Done {
    number: usize,
    buffer: MmapMut,
    result: io::Result<()>,
}

impl ReadThreads {
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let (jobs, waiting) = mpsc::channel::<Job>();
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..count {
            let waiting = Arc::clone(&waiting);
            std::thread::Builder::new().name("row-reads".into()).spawn(move || work(&waiting))?;
        }
        Ok(Self { jobs })
    }
}

fn work(waiting: &Mutex<Receiver<Job>>) {
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
    while let Ok(Job { file, number, span, mut buffer, done }) = next() {
        let result = read_exact_at(&file, &mut buffer[..span.bytes], span.offset);
        // Whoever asked may have given up and gone.
        let _ = done.send(Done { number, buffer, result });
    }
}

/// One caller's side of [`ReadThreads`].
#[derive(Debug)]
pub(crate) struct Reader {
    file: Arc<File>,
    threads: Arc<ReadThreads>,
    free: Vec<MmapMut>,
    depth: usize,
    done: (Sender<Done>, Receiver<Done>),
}

impl Reader {
    pub(crate) fn new(
        file: Arc<File>,
        threads: Arc<ReadThreads>,
        depth: usize,
        buffer_bytes: usize,
    ) -> io::Result<Self> {
        let free = (0..depth).map(|_| MmapMut::map_anon(buffer_bytes)).collect::<io::Result<_>>()?;
        Ok(Self { file, threads, free, depth, done: mpsc::channel() })
    }

    fn read_all(
        &mut self,
        spans: &[Span],
        limit: Duration,
        each: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Failed> {
        let (mut next, mut result) = (0, Ok(()));
        loop {
            while result.is_ok()
                && next < spans.len()
                && let Some(buffer) = self.free.pop()
            {
                self.start(next, spans[next], buffer);
                next += 1;
            }
            if self.free.len() == self.depth {
                return result;
            }
            match self.done.1.recv_timeout(limit) {
                Ok(Done { number, buffer, result: read }) => {
                    match read {
                        Ok(()) if result.is_ok() => each(number, &buffer[..spans[number].bytes]),
                        Ok(()) => {}
                        Err(source) => result = result.and(Err(Failed { span: number, source })),
                    }
                    self.free.push(buffer);
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let source = io::ErrorKind::TimedOut.into();
                    return result.and(Err(Failed { span: next.saturating_sub(1), source }));
                }
            }
        }
    }

    fn start(&self, number: usize, span: Span, buffer: MmapMut) {
        let (file, done) = (Arc::clone(&self.file), self.done.0.clone());
        // The threads outlive the sender; were they gone, waiting for them would time out.
        let _ = self.threads.jobs.send(Job { file, number, span, buffer, done });
    }

    fn is_stuck(&mut self) -> bool {
        self.free.extend(self.done.1.try_iter().map(|done| done.buffer));
        self.free.len() < self.depth
    }
}

#[cfg(all(test, target_os = "linux", feature = "io-uring"))]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::OwnedFd;

    const LIMIT: Duration = Duration::from_millis(50);
    const SPAN: [Span; 1] = [Span { offset: 0, bytes: 4096 }];

    #[test]
    fn a_ring_whose_reads_do_not_end_times_out_is_stuck_and_recovers() {
        // A pipe that nobody writes to is a disk that does not answer.
        let (read, mut write) = io::pipe().unwrap();
        let file = Arc::new(File::from(OwnedFd::from(read)));
        let Ok(ring) = Uring::new(file, 4, 4096) else {
            return std::io::stderr().write_all(b"SKIPPED: no io_uring here\n").unwrap();
        };
        let mut queue = ReadQueue::Uring(Box::new(ring));
        let failed = queue.read_all(&SPAN, LIMIT, &mut |_, _| panic!("nothing was read")).unwrap_err();
        assert_eq!((failed.span, failed.source.kind()), (0, io::ErrorKind::TimedOut));
        assert!(queue.is_stuck());
        write.write_all(&[1; 4096]).unwrap();
        while queue.is_stuck() {
            std::thread::yield_now();
        }
        write.write_all(&[7; 4096]).unwrap();
        queue.read_all(&SPAN, LIMIT, &mut |_, bytes| assert_eq!(bytes, [7; 4096])).unwrap();
        // Fewer bytes than asked for are an error.
        write.write_all(&[1; 100]).unwrap();
        let failed = queue.read_all(&SPAN, LIMIT, &mut |_, _| panic!("too short")).unwrap_err();
        assert_eq!(failed.source.kind(), io::ErrorKind::UnexpectedEof);
        // Dropped with a read under way, its memory stays for the kernel to write to.
        queue.read_all(&SPAN, LIMIT, &mut |_, _| ()).unwrap_err();
        drop(queue);
        write.write_all(&[1; 4096]).unwrap();
    }

    #[test]
    fn a_limit_without_end_is_one() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4096]).unwrap();
        let file = Arc::new(file);
        let mut queues = vec![ReadQueue::Threads(
            Reader::new(Arc::clone(&file), Arc::new(ReadThreads::start(1).unwrap()), 1, 4096).unwrap(),
        )];
        match Uring::new(file, 4, 4096) {
            Ok(ring) => queues.push(ReadQueue::Uring(Box::new(ring))),
            Err(_) => std::io::stderr().write_all(b"SKIPPED: no io_uring here\n").unwrap(),
        }
        for mut queue in queues {
            for limit in [Duration::MAX, Duration::from_secs(u64::MAX / 2)] {
                queue.read_all(&SPAN, limit, &mut |_, bytes| assert_eq!(bytes, [7; 4096])).unwrap();
            }
        }
    }

    #[test]
    fn threads_that_do_not_answer_are_given_up_on_and_recover() {
        let (jobs, waiting) = mpsc::channel();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 4096]).unwrap();
        let threads = Arc::new(ReadThreads { jobs });
        let reader = Reader::new(Arc::new(file), threads, 4, 4096).unwrap();
        let mut queue = ReadQueue::Threads(reader);
        let failed = queue.read_all(&SPAN, LIMIT, &mut |_, _| panic!("nobody reads")).unwrap_err();
        assert_eq!((failed.span, failed.source.kind()), (0, io::ErrorKind::TimedOut));
        assert!(queue.is_stuck());
        let worker = std::thread::spawn(move || work(&Mutex::new(waiting)));
        while queue.is_stuck() {
            std::thread::yield_now();
        }
        queue.read_all(&SPAN, LIMIT, &mut |_, bytes| assert_eq!(bytes, [7; 4096])).unwrap();
        let beyond = [Span { offset: 8192, bytes: 4096 }, SPAN[0]];
        let failed = queue.read_all(&beyond, LIMIT, &mut |_, _| ()).unwrap_err();
        assert_eq!((failed.span, failed.source.kind()), (0, io::ErrorKind::UnexpectedEof));
        drop(queue);
        worker.join().unwrap();
    }
}
