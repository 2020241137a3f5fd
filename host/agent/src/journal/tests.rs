use super::*;
use windlass_domain::task::{Action, Outcome, Script};

const BOOT: &str = "boot-1";

fn epoch(n: u8) -> Epoch {
    Epoch::from_bytes([n; 16])
}

fn task(node: u32, fence: u64) -> Task {
    Task {
        id: format!("ord_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f.{node}.1")
            .parse()
            .unwrap(),
        instance: Some("svc_01931c0c5b7e7c2e8a4f6d1b2c3d4e5f".parse().unwrap()),
        release: None,
        fence,
        expires_at: Timestamp::from_unix_ms(1),
        timeout_ms: 1,
        run_as: None,
        env: [].into(),
        action: Action::Script(Script {
            interpreter: vec![],
            text: "x".repeat(3000),
            working_dir: None,
        }),
    }
}

fn result() -> TaskResult {
    TaskResult {
        outcome: Outcome::Succeeded,
        exit_code: Some(0),
        output: "y".repeat(9000),
        dropped_bytes: 0,
        message: String::new(),
        fault: None,
        started_at: None,
        finished_at: Timestamp::from_unix_ms(2),
    }
}

fn open(path: &Path, fresh: u8, boot: &str) -> Journal {
    Journal::open(path, epoch(fresh), boot, Timestamp::from_unix_ms(7)).unwrap()
}

/// A journal with some history: tasks 1 to 20 accepted and started, 1 to 10 finished, 1 to 5 acknowledged.
fn filled(path: &Path) -> Journal {
    let mut journal = open(path, 1, BOOT);
    assert_eq!(journal.state(), &JournalState::Created);
    for node in 1..=20 {
        journal.accept(task(node, u64::from(node))).unwrap();
        journal
            .start(task(node, 0).id, Timestamp::from_unix_ms(3))
            .unwrap();
    }
    for node in 1..=10 {
        journal.finish(None, task(node, 0).id, result()).unwrap();
    }
    for node in 1..=5 {
        journal.acknowledge(task(node, 0).id).unwrap();
    }
    journal
}

fn assert_filled(journal: &Journal) {
    assert_eq!(journal.epoch(), epoch(1));
    assert_eq!(journal.fence(&task(1, 0).instance.unwrap()), 20);
    assert_eq!(journal.held().count(), 15);
    assert_eq!(
        journal.known(&task(3, 0).id),
        Known::Acknowledged(Outcome::Succeeded)
    );
    assert!(matches!(journal.known(&task(7, 0).id), Known::Held(entry) if entry.result.is_some()));
    assert!(
        matches!(journal.known(&task(15, 0).id), Known::Held(entry) if entry.result.is_none() && entry.started_at.is_some())
    );
    assert_eq!(journal.known(&task(99, 0).id), Known::Never);
}

/// What the journal has to hold.
fn live(journal: &Journal) -> u64 {
    let records = journal.picture.records(journal.epoch);
    records.map(|record| json_bytes(&record).unwrap()).sum()
}

fn assert_small(journal: &Journal) {
    let size = journal.path.metadata().unwrap().len();
    let most = 2 * live(journal) + SLACK + LOOK_EVERY + 2 * CHUNK;
    assert!(size <= most, "{size} > {most}");
}

/// A task whose script has so many bytes, with its end, which the server has.
fn pass(journal: &mut Journal, node: u32, bytes: usize) {
    let mut large = task(node, 20);
    if let Action::Script(script) = &mut large.action {
        script.text = "x".repeat(bytes);
    }
    let id = large.id;
    journal.finish(Some(large), id, result()).unwrap();
    journal.acknowledge(id).unwrap();
}

#[test]
fn an_agent_that_is_restarted_again_and_again_compacts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    drop(filled(&path));
    let mut written = 0;
    for start in 0..10 {
        let mut journal = open(&path, 2, BOOT);
        for node in 0..40 {
            let before = journal.end;
            pass(&mut journal, 100 + start * 40 + node, 28 << 10);
            written += journal.end.saturating_sub(before);
            assert_small(&journal);
        }
        assert_filled(&journal);
    }
    assert!(written > 2 * (SLACK + LOOK_EVERY), "{written}");
}

#[test]
fn a_journal_that_grew_under_an_older_agent_is_small_once_it_was_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let mut journal = filled(&path);
    journal.look_at = u64::MAX;
    for node in 100..300 {
        pass(&mut journal, node, 28 << 10);
    }
    assert!(journal.end > SLACK + LOOK_EVERY, "{}", journal.end);
    drop(journal);
    // A crash in an earlier attempt left this.
    std::fs::write(dir.path().join("journal.new"), vec![7; 100_000]).unwrap();
    let journal = open(&path, 2, BOOT);
    assert_eq!(journal.state(), &JournalState::Intact);
    assert!(journal.end < LOOK_EVERY, "{}", journal.end);
    assert_small(&journal);
    assert_filled(&journal);
    drop(journal);
    let journal = open(&path, 3, BOOT);
    assert_filled(&journal);
    assert_eq!(
        journal.known(&task(299, 0).id),
        Known::Acknowledged(Outcome::Succeeded)
    );
}

#[test]
fn more_than_a_frame_takes_is_written_anew_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let mut journal = filled(&path);
    journal.look_at = u64::MAX;
    // Ends that nobody took yet: more than one frame may hold.
    let mut large = result();
    large.output = "y".repeat(200 << 10);
    for node in 100..130 {
        journal
            .finish(Some(task(node, 20)), task(node, 0).id, large.clone())
            .unwrap();
    }
    assert!(live(&journal) > MAX_CONTENT as u64);
    for node in 200..290 {
        pass(&mut journal, node, 200 << 10);
    }
    drop(journal);
    let before = path.metadata().unwrap().len();
    let journal = open(&path, 2, BOOT);
    assert!(before > 2 * live(&journal) + SLACK, "{before}");
    assert!(journal.end < before / 2, "{}", journal.end);
    assert_eq!(journal.held().count(), 15 + 30);
    assert!(
        matches!(journal.known(&task(129, 0).id), Known::Held(entry) if entry.result.as_ref() == Some(&large))
    );
}

#[test]
fn one_that_cannot_be_written_anew_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let in_the_way = dir.path().join("journal.new");
    let mut journal = filled(&path);
    std::fs::create_dir(&in_the_way).unwrap();
    for node in 100..300 {
        pass(&mut journal, node, 28 << 10);
    }
    assert!(journal.end > SLACK + LOOK_EVERY, "{}", journal.end);
    assert_filled(&journal);
    std::fs::remove_dir(&in_the_way).unwrap();
    for node in 300..340 {
        pass(&mut journal, node, 28 << 10);
    }
    assert_small(&journal);
    assert!(!in_the_way.exists());
    drop(journal);
    assert_filled(&open(&path, 2, BOOT));
}

#[test]
fn the_two_latest_damaged_journals_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    drop(filled(&path));
    // The clock goes back before the last.
    for at in [10, 30, 200, 5] {
        std::fs::write(&path, b"damaged").unwrap();
        let now = Timestamp::from_unix_ms(at);
        let journal = Journal::open(&path, epoch(2), BOOT, now).unwrap();
        assert!(matches!(journal.state(), JournalState::Replaced { .. }));
    }
    let mut names: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["journal", "journal.damaged-200", "journal.damaged-5"]
    );
}

#[test]
fn it_is_read_as_it_was_written_and_compacts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let mut journal = filled(&path);
    assert_filled(&journal);
    for node in 100..600 {
        journal
            .finish(Some(task(node, 20)), task(node, 0).id, result())
            .unwrap();
        journal.acknowledge(task(node, 0).id).unwrap();
    }
    assert_small(&journal);
    drop(journal);
    let journal = open(&path, 2, BOOT);
    assert_eq!(journal.state(), &JournalState::Intact);
    assert_filled(&journal);
    assert_eq!(
        journal.known(&task(100, 0).id),
        Known::Acknowledged(Outcome::Succeeded)
    );
}

#[test]
fn any_cut_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let end = filled(&path).end;
    let whole = std::fs::read(&path).unwrap();
    assert!(whole.len() as u64 >= 3 * CHUNK, "{}", whole.len());
    for len in [
        0,
        1,
        7,
        100,
        end - 1,
        end,
        end + 1,
        CHUNK,
        2 * CHUNK,
        whole.len() as u64 - 1,
    ] {
        std::fs::write(&path, &whole[..usize::try_from(len).unwrap()]).unwrap();
        let journal = open(&path, 2, BOOT);
        assert!(
            matches!(journal.state(), JournalState::Replaced { .. }),
            "cut to {len}"
        );
        assert_eq!(journal.epoch(), epoch(2));
        assert_eq!(journal.held().count(), 0);
        std::fs::remove_file(dir.path().join("journal.damaged-7")).unwrap();
    }
}

#[test]
fn any_damage_is_seen_and_a_torn_last_record_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let mut journal = filled(&path);
    let last = journal.end;
    journal.accept(task(50, 20)).unwrap();
    let end = journal.end;
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    let reopen = |bytes: &[u8], boot: &str| {
        std::fs::write(&path, bytes).unwrap();
        let journal = open(&path, 2, boot);
        if matches!(journal.state(), JournalState::Replaced { .. }) {
            std::fs::remove_file(dir.path().join("journal.damaged-7")).unwrap();
        }
        journal
    };
    // A flipped bit anywhere: in the first, a middle and the last record.
    for at in [
        2,
        6,
        20,
        40_000,
        last,
        last + 5,
        last + 9,
        last + 20,
        end - 1,
    ] {
        let mut bytes = whole.clone();
        bytes[usize::try_from(at).unwrap()] ^= 0x10;
        let journal = reopen(&bytes, BOOT);
        assert!(
            matches!(journal.state(), JournalState::Replaced { .. }),
            "bit at {at} of {last}..{end}"
        );
    }
    // The last write cut at any byte: never acted on, so nothing is lost.
    for cut in [last + 1, last + 4, last + 9, last + 12, last + 13, end - 1] {
        let mut bytes = whole.clone();
        bytes[usize::try_from(cut).unwrap()..].fill(0);
        let journal = reopen(&bytes, BOOT);
        assert_eq!(journal.state(), &JournalState::Intact, "cut at {cut}");
        assert_filled(&journal);
    }
    // After a power failure the blocks of the last write may be anything.
    let mut bytes = whole.clone();
    bytes[usize::try_from(last).unwrap() + 100] ^= 1;
    let journal = reopen(&bytes, "boot-2");
    assert_eq!(journal.state(), &JournalState::Intact);
    assert_filled(&journal);
    // And what was torn does not come back after more was written.
    drop(journal);
    let journal = open(&path, 3, "boot-2");
    assert_filled(&journal);
}

#[test]
fn a_deleted_journal_is_a_new_life() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    drop(filled(&path));
    std::fs::remove_file(&path).unwrap();
    let journal = open(&path, 2, BOOT);
    assert_eq!(
        (journal.state(), journal.epoch()),
        (&JournalState::Created, epoch(2))
    );
}

#[test]
fn acceptance_and_start_together_are_both_there_or_neither() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let mut journal = open(&path, 1, BOOT);
    let begin = journal.end;
    let at = Timestamp::from_unix_ms(3);
    journal.accept_and_start(task(1, 4), at).unwrap();
    let end = journal.end;
    drop(journal);
    let whole = std::fs::read(&path).unwrap();
    let id = task(1, 4).id;
    let journal = open(&path, 2, BOOT);
    assert!(
        matches!(journal.known(&id), Known::Held(entry) if entry.started_at == Some(at) && entry.task.is_some())
    );
    drop(journal);
    for cut in (begin + 1..end).step_by(331) {
        let mut bytes = whole.clone();
        bytes[usize::try_from(cut).unwrap()..].fill(0);
        std::fs::write(&path, bytes).unwrap();
        let journal = open(&path, 2, BOOT);
        assert_eq!(journal.state(), &JournalState::Intact, "cut at {cut}");
        assert_eq!(journal.known(&id), Known::Never, "cut at {cut}");
    }
}
