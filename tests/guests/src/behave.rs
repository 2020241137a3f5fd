//! Ways to misbehave that every kind shares.

use std::hint::black_box;

/// Misbehaves as asked; returns only for texts that are no misbehaviour.
pub fn behave(how: &str) {
    match how {
        "loop" => {
            let mut rounds = 0_u64;
            while black_box(rounds) != u64::MAX {
                rounds = rounds.wrapping_add(2);
            }
        }
        "allocate" => {
            let mut kept = Vec::new();
            loop {
                kept.push(vec![1_u8; 1 << 20]);
                black_box(&mut kept);
            }
        }
        "trap" => panic!("this guest traps on purpose"),
        "recurse" => {
            black_box(recurse(black_box(0)));
        }
        "chatter" => {
            for _ in 0..10_000 {
                windlass_sdk::log::info(&"blah ".repeat(2000));
            }
        }
        _ => {}
    }
}

fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    if frame[0] == u64::MAX {
        return 0;
    }
    recurse(depth + 1) + frame[0]
}

/// More text than a guest may hand over at once.
#[must_use]
pub fn giant_text() -> String {
    "a".repeat(16 * 1024 * 1024)
}

/// The `behave` parameter.
#[must_use]
pub fn how(parameters: &str) -> String {
    serde_json::from_str::<serde_json::Value>(parameters)
        .ok()
        .and_then(|parameters| Some(parameters["behave"].as_str()?.to_owned()))
        .unwrap_or_default()
}
