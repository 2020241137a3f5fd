//! How the weights of a pool's members divide its traffic.
//!
//! A load balancer sends each member its weight's part of the sum. To give some members a share of the whole, both sides
//! keep the proportions that they had among themselves; the larger factor that still fits 100 is taken, so that rounding to
//! whole weights moves the share as little as possible. Source: spec "Blue-green release" (shift at cell level), "Canary".

use crate::id::ServerId;

/// The largest weight.
pub const MAX_WEIGHT: u32 = 100;

/// A member of a pool whose traffic is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// The server.
    pub server: ServerId,
    /// Its weight before the order touched it, 0 to 100.
    pub before: u32,
    /// On which side it is.
    pub side: Side,
}

/// The sides of a division.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Together they get the share.
    Share,
    /// They get the rest.
    Rest,
}

/// The weights that give one side `percent` of the traffic. A side without any member gets nothing: the other has it all,
/// unless its part is 0. A side whose members all had 0 is divided evenly.
#[must_use]
pub fn divide(members: &[Member], percent: u32) -> Vec<(ServerId, u32)> {
    let percent = percent.min(100);
    let share = proportions(members, Side::Share);
    let rest = proportions(members, Side::Rest);
    let (of_share, of_rest) = if percent == 0 {
        (0.0, largest_factor(&rest))
    } else if percent == 100 || rest.is_empty() {
        (largest_factor(&share), 0.0)
    } else if share.is_empty() {
        (0.0, largest_factor(&rest))
    } else {
        // share × x : (share × x + rest × y) = percent : 100
        let x_for_y = f64::from(percent) * sum(&rest) / (f64::from(100 - percent) * sum(&share));
        let y = largest_factor(&rest).min(largest_factor(&share) / x_for_y);
        (x_for_y * y, y)
    };
    let mut weights = whole(&share, of_share);
    weights.extend(whole(&rest, of_rest));
    weights
}

/// The part of the sum, in percent, that members with these weights get; `None` where nobody has any.
#[must_use]
pub fn share_of(mine: u32, all: u32) -> Option<f64> {
    (all > 0).then(|| 100.0 * f64::from(mine) / f64::from(all))
}

fn proportions(members: &[Member], side: Side) -> Vec<(ServerId, u32)> {
    let mine: Vec<(ServerId, u32)> = members
        .iter()
        .filter(|member| member.side == side)
        .map(|member| (member.server, member.before.min(MAX_WEIGHT)))
        .collect();
    if mine.iter().all(|(_, weight)| *weight == 0) {
        return mine
            .into_iter()
            .map(|(server, _)| (server, MAX_WEIGHT))
            .collect();
    }
    mine
}

fn sum(members: &[(ServerId, u32)]) -> f64 {
    members.iter().map(|(_, weight)| f64::from(*weight)).sum()
}

fn largest_factor(members: &[(ServerId, u32)]) -> f64 {
    let largest = members.iter().map(|(_, weight)| *weight).max();
    largest.map_or(0.0, |largest| f64::from(MAX_WEIGHT) / f64::from(largest))
}

/// Whole weights whose sum is as near as can be to the exact one: what is cut off goes to those that lost most.
fn whole(members: &[(ServerId, u32)], factor: f64) -> Vec<(ServerId, u32)> {
    let exact = |weight: u32| f64::from(weight) * factor;
    let wanted = members
        .iter()
        .map(|(_, weight)| exact(*weight))
        .sum::<f64>();
    let mut cut: Vec<(ServerId, u32, f64)> = members
        .iter()
        .map(|(server, weight)| {
            let exact = exact(*weight);
            let floor = to_weight(exact.floor());
            (*server, floor, exact - f64::from(floor))
        })
        .collect();
    // A side that has a part keeps at least a trace of it.
    let least = if wanted > 0.0 { 1.0 } else { 0.0 };
    let mut missing = wanted.round().max(least)
        - cut
            .iter()
            .map(|(_, floor, _)| f64::from(*floor))
            .sum::<f64>();
    let mut by_loss: Vec<usize> = (0..cut.len()).collect();
    by_loss.sort_by(|one, two| cut[*two].2.total_cmp(&cut[*one].2));
    for index in by_loss {
        if missing < 1.0 {
            break;
        }
        let (_, weight, lost) = &mut cut[index];
        if *lost > 0.0 && *weight < MAX_WEIGHT {
            *weight += 1;
            missing -= 1.0;
        }
    }
    cut.into_iter()
        .map(|(server, weight, _)| (server, weight))
        .collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to 0..=100 just before"
)]
fn to_weight(exact: f64) -> u32 {
    exact.clamp(0.0, f64::from(MAX_WEIGHT)) as u32
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn members(share: &[u32], rest: &[u32]) -> Vec<Member> {
        let side = |side| move |before: &u32| (side, *before);
        share
            .iter()
            .map(side(Side::Share))
            .chain(rest.iter().map(side(Side::Rest)))
            .zip(1u128..)
            .map(|((side, before), number)| Member {
                server: ServerId::from_uuid(Uuid::from_u128(number)),
                before,
                side,
            })
            .collect()
    }

    fn weights(share: &[u32], rest: &[u32], percent: u32) -> Vec<u32> {
        let divided = divide(&members(share, rest), percent);
        divided.into_iter().map(|(_, weight)| weight).collect()
    }

    #[test]
    fn both_sides_keep_their_proportions() {
        for (share, rest, percent, expect) in [
            (
                &[100, 100][..],
                &[100, 100][..],
                50,
                &[100, 100, 100, 100][..],
            ),
            (&[100, 100], &[100, 100], 0, &[0, 0, 100, 100]),
            (&[100, 100], &[100, 100], 100, &[100, 100, 0, 0]),
            (&[100], &[100, 100, 100], 25, &[100, 100, 100, 100]),
            (&[100], &[100, 100, 100], 50, &[100, 34, 33, 33]),
            (&[100], &[100], 20, &[25, 100]),
            (&[50, 100], &[100], 75, &[50, 100, 50]),
            // Who stands by without traffic gets its share all the same.
            (&[0, 0], &[100, 100], 100, &[100, 100, 0, 0]),
            (&[0, 100], &[100], 50, &[0, 100, 100]),
            // Nobody on a side: the other has it all.
            (&[], &[40, 80], 30, &[50, 100]),
            (&[40, 80], &[], 30, &[50, 100]),
            (&[40, 80], &[], 0, &[0, 0]),
        ] {
            assert_eq!(
                weights(share, rest, percent),
                expect,
                "{percent} % to {share:?} of {rest:?}"
            );
        }
    }

    #[test]
    fn whole_weights_move_a_share_by_less_than_a_point() {
        for (new, old) in [
            (1, 1),
            (1, 2),
            (1, 9),
            (2, 8),
            (5, 5),
            (8, 2),
            (1, 49),
            (30, 70),
        ] {
            for percent in 1..100 {
                let weights = weights(&vec![100; new], &vec![100; old], percent);
                assert!(weights.iter().all(|weight| *weight <= MAX_WEIGHT));
                let mine: u32 = weights[..new].iter().sum();
                let got = share_of(mine, weights.iter().sum()).unwrap();
                assert!(
                    (got - f64::from(percent)).abs() < 1.0,
                    "{new} of {} get {got} instead of {percent} %: {weights:?}",
                    new + old
                );
            }
        }
    }
}
