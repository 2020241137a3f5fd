//! The writer of the journal: batches, files, and what is dropped. One thread, which nothing waits for but a flush.

use std::{
    fs, io,
    sync::{
        Arc, PoisonError,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use windlass_domain::{Timestamp, id::CallId};

use super::{
    Message, Shared,
    entry::{CallSummary, weight, write_line},
    segment::{Head, Segment, merge, sync_directory},
};
use crate::call::CallRecord;

/// How often age is looked at when nothing is written.
const IDLE: Duration = Duration::from_secs(30);
/// Frames of a file that is written to: many small ones are merged when it is closed.
const MAX_OPEN_FRAMES: usize = 1024;
/// Files smaller than this share of their wanted size are merged with their neighbours.
const SMALL_SHARE: u64 = 4;

pub(super) struct Writer {
    shared: Arc<Shared>,
    /// What is written to, and since when.
    open: Option<(Segment, Instant)>,
    lines: Vec<u8>,
    head: Option<Head>,
    batch_since: Instant,
    /// Whether the last write failed: said once.
    failing: bool,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            open: None,
            lines: Vec::new(),
            head: None,
            batch_since: Instant::now(),
            failing: false,
        }
    }

    pub(super) fn run(mut self, messages: &Receiver<Message>) {
        self.retain();
        self.merge_small();
        loop {
            let wait = match &self.head {
                Some(_) => self
                    .shared
                    .settings
                    .batch_time
                    .saturating_sub(self.batch_since.elapsed()),
                None => IDLE,
            };
            match messages.recv_timeout(wait) {
                Ok(Message::Call(at, record)) => self.take(at, &record),
                Ok(Message::Flush(answer)) => {
                    self.write_batch();
                    // Nobody waits any more: fine.
                    let _told_or_gone = answer.send(());
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.write_batch();
                    self.close_old();
                    self.retain();
                }
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.write_batch();
        if let Some((segment, _)) = self.open.take()
            && let Err(error) = segment.sync()
        {
            tracing::error!("the call journal was not synced at its end: {error}");
        }
    }

    fn take(&mut self, at: Timestamp, record: &CallRecord) {
        self.shared
            .queued_bytes
            .fetch_sub(weight(record), Ordering::Relaxed);
        let summary = CallSummary::of(
            CallId::from_uuid((self.shared.settings.new_id)()),
            at,
            record,
        );
        if self.head.is_none() {
            self.batch_since = Instant::now();
        }
        self.head
            .get_or_insert_with(|| Head::of(&summary))
            .add(&summary);
        write_line(&mut self.lines, &summary, record);
        if self.lines.len() >= self.shared.settings.batch_bytes
            || self.batch_since.elapsed() >= self.shared.settings.batch_time
        {
            self.write_batch();
        }
    }

    fn write_batch(&mut self) {
        if let Some(head) = self.head.take() {
            match self.append(&head) {
                Ok(()) => {
                    self.failing = false;
                    self.shared.written.fetch_add(head.calls, Ordering::Relaxed);
                }
                Err(error) => {
                    self.shared.dropped.fetch_add(head.calls, Ordering::Relaxed);
                    if !std::mem::replace(&mut self.failing, true) {
                        tracing::error!(
                            "the call journal cannot be written, calls are dropped: {error}"
                        );
                    }
                }
            }
            self.lines.clear();
            // One large batch does not hold its memory for good.
            self.lines.shrink_to(self.shared.settings.batch_bytes * 2);
        }
    }

    fn append(&mut self, head: &Head) -> io::Result<()> {
        if self.open.is_none() {
            let segment = Segment::create(&self.shared.settings.dir, head.first)?;
            self.open = Some((segment, Instant::now()));
        }
        let Some((segment, since)) = &mut self.open else {
            return Ok(());
        };
        segment.append(head, &self.lines)?;
        let is_first = segment.frames.len() == 1;
        let settings = &self.shared.settings;
        let is_full = segment.bytes >= settings.file_bytes
            || segment.frames.len() >= MAX_OPEN_FRAMES
            || since.elapsed() >= settings.file_time;
        let snapshot = Arc::new(segment.snapshot());
        {
            let mut segments = self
                .shared
                .segments
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            if !is_first {
                segments.pop();
            }
            segments.push(snapshot);
        }
        if is_full {
            self.close_file()?;
            self.retain();
        }
        Ok(())
    }

    fn close_old(&mut self) {
        let is_old = self
            .open
            .as_ref()
            .is_some_and(|(_, since)| since.elapsed() >= self.shared.settings.file_time);
        if is_old && let Err(error) = self.close_file() {
            tracing::error!("a file of the call journal was not closed well: {error}");
        }
    }

    fn close_file(&mut self) -> io::Result<()> {
        if let Some((segment, _)) = self.open.take() {
            segment.sync()?;
            sync_directory(&self.shared.settings.dir)?;
            self.merge_small();
        }
        Ok(())
    }

    /// Merges the youngest closed files while they are small or have many small frames.
    fn merge_small(&mut self) {
        if self.open.is_some() {
            return;
        }
        let settings = &self.shared.settings;
        let small = |segment: &Segment| segment.bytes * SMALL_SHARE < settings.file_bytes;
        let crumbs = |segment: &Segment| {
            let raw: u64 = segment
                .frames
                .iter()
                .map(|frame| frame.head.raw_bytes)
                .sum();
            segment.frames.len() > 16
                && raw / (segment.frames.len() as u64) < settings.batch_bytes as u64 / SMALL_SHARE
        };
        let segments = self.shared.snapshot();
        let youngest = segments
            .iter()
            .rev()
            .take_while(|segment| small(segment))
            .count();
        let from = segments.len() - youngest.max(usize::from(!segments.is_empty()));
        let group = &segments[from..];
        let worthwhile = group.len() > 1 || group.iter().any(|segment| crumbs(segment));
        if !worthwhile {
            return;
        }
        let oldest = self.shared.oldest_kept();
        match merge(&settings.dir, group, settings.batch_bytes, oldest) {
            Ok(Some(merged)) => {
                let mut segments = self
                    .shared
                    .segments
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                segments.truncate(from);
                segments.push(Arc::new(merged));
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!("files of the call journal were not merged: {error}");
            }
        }
    }

    /// Drops the oldest files: by age, and beyond the size.
    fn retain(&mut self) {
        let settings = &self.shared.settings;
        let oldest = self.shared.oldest_kept();
        let open = self.open.as_ref().map(|(segment, _)| segment.path.clone());
        let mut dropped = Vec::new();
        {
            let mut segments = self
                .shared
                .segments
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            let mut bytes: u64 = segments.iter().map(|segment| segment.bytes).sum();
            let mut count = 0;
            for segment in segments.iter() {
                let is_old = segment.youngest().is_some_and(|youngest| youngest < oldest);
                if open.as_ref() == Some(&segment.path) || !(is_old || bytes > settings.max_bytes) {
                    break;
                }
                bytes -= segment.bytes;
                count += 1;
            }
            dropped.extend(segments.drain(..count));
        }
        for segment in dropped {
            if let Err(error) = fs::remove_file(&segment.path) {
                tracing::error!(file = %segment.path.display(), "an old file of the call journal cannot be removed: {error}");
            }
        }
    }
}
