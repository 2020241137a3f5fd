//! The journal's bytes: frames made, read and judged. The format is in the head of [`super`].

use windlass_protocol::Epoch;

use super::{
    CHUNK, JournalError,
    picture::{Picture, Record},
};

const FRAME_HEAD: usize = 12;
/// A frame holds at most a task and its result; a pushed task fits into 1 MiB.
pub(super) const MAX_CONTENT: usize = 4 << 20;

pub(super) fn frame(records: &[Record]) -> Result<Vec<u8>, JournalError> {
    let content = serde_json::to_vec(records).map_err(JournalError::Json)?;
    let length = u32::try_from(content.len())
        .ok()
        .filter(|_| content.len() <= MAX_CONTENT)
        .ok_or(JournalError::TooLarge {
            bytes: content.len(),
        })?;
    let mut frame = Vec::with_capacity(FRAME_HEAD + content.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&crc32fast::hash(&content).to_le_bytes());
    frame.extend_from_slice(&crc32fast::hash(&frame).to_le_bytes());
    frame.extend_from_slice(&content);
    Ok(frame)
}

/// The length and the checksum of the content, from the head of the frame that begins at `at`; `None` when there is no whole one.
fn head_at(bytes: &[u8], at: usize) -> Option<(usize, u32)> {
    let number = |from: usize| {
        let digits = bytes.get(at + from..at + from + 4)?;
        Some(u32::from_le_bytes(digits.try_into().ok()?))
    };
    let (length, crc, check) = (number(0)?, number(4)?, number(8)?);
    let length = usize::try_from(length).ok()?;
    let whole = crc32fast::hash(&bytes[at..at + 8]) == check;
    (whole && length > 0 && length <= MAX_CONTENT).then_some((length, crc))
}

/// The content of the frame that begins at `at`; `None` when there is no whole one.
fn content_at(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let (length, crc) = head_at(bytes, at)?;
    let content = bytes.get(at + FRAME_HEAD..at + FRAME_HEAD + length)?;
    (crc32fast::hash(content) == crc).then_some(content)
}

/// The picture, the epoch and the end of the last whole frame; or what is wrong with the file.
pub(super) fn read(bytes: &[u8], boot_id: &str) -> Result<(Picture, Epoch, u64), String> {
    if bytes.is_empty() || !(bytes.len() as u64).is_multiple_of(CHUNK) {
        return Err(format!(
            "it has {} bytes, which is no whole number of {CHUNK}-byte chunks: it was cut",
            bytes.len()
        ));
    }
    let mut picture = Picture::default();
    let mut at = 0;
    while let Some(content) = content_at(bytes, at) {
        let records: Vec<Record> = serde_json::from_slice(content)
            .map_err(|error| format!("the record at byte {at} cannot be understood: {error}"))?;
        for record in records {
            if let Record::Header { format, .. } = record
                && format != 1
            {
                return Err(format!("its format is {format}; this agent knows format 1"));
            }
            picture.apply(record);
        }
        at += FRAME_HEAD + content.len();
    }
    let epoch = picture.epoch.ok_or("it does not begin with a header")?;
    if (bytes.len() as u64) < picture.size {
        return Err(format!(
            "it has {} bytes and once had {}: it was cut",
            bytes.len(),
            picture.size
        ));
    }
    let rest = &bytes[at..];
    if rest.iter().any(|byte| *byte != 0) {
        judge_torn(rest, picture.boot_id != boot_id)
            .map_err(|reason| format!("after byte {at}: {reason}"))?;
    }
    Ok((picture, epoch, at as u64))
}

/// Whether what follows the last whole frame can be a write that was cut.
fn judge_torn(rest: &[u8], machine_restarted: bool) -> Result<(), String> {
    let later = (1..rest.len().saturating_sub(FRAME_HEAD)).any(|at| content_at(rest, at).is_some());
    if later {
        return Err("a damaged record is followed by whole ones".into());
    }
    if machine_restarted {
        return Ok(());
    }
    let written = rest
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    // Content never ends with a zero, so a frame that was written to its end shows it.
    let whole = match head_at(rest, 0) {
        Some((length, _)) => FRAME_HEAD + length,
        None => FRAME_HEAD,
    };
    if written >= whole {
        return Err("the last record is damaged".into());
    }
    Ok(())
}
