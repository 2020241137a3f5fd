//! The journal's records, and the picture of the tasks that they make one after the other.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use windlass_domain::{
    Timestamp,
    id::InstanceId,
    task::{Outcome, Task, TaskId, TaskResult},
};
use windlass_protocol::Epoch;

use super::TOMBSTONES;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Record {
    Header {
        format: u32,
        epoch: Epoch,
    },
    /// The file was opened in this start of the machine.
    Opened {
        boot_id: String,
    },
    /// The file has at least so many bytes from now on.
    Size {
        bytes: u64,
    },
    Accepted {
        task: Box<Task>,
    },
    Started {
        task_id: TaskId,
        at: Timestamp,
    },
    Finished {
        task_id: TaskId,
        result: Box<TaskResult>,
    },
    Acked {
        task_id: TaskId,
        outcome: Outcome,
    },
    /// The highest fence seen of an instance, kept over compaction.
    Fence {
        instance: InstanceId,
        fence: u64,
    },
}

/// A task that is not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The task; `None` when only its revoke was seen.
    pub task: Option<Task>,
    /// When it started, if it did.
    pub started_at: Option<Timestamp>,
    /// How it ended, if it did.
    pub result: Option<TaskResult>,
}

/// What the journal knows about an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Known {
    /// Nothing.
    Never,
    /// It is held.
    Held(Box<Entry>),
    /// It ended so, and the server has the result.
    Acknowledged(Outcome),
}

#[derive(Debug, Default)]
pub(super) struct Picture {
    pub(super) epoch: Option<Epoch>,
    pub(super) boot_id: String,
    pub(super) size: u64,
    pub(super) held: BTreeMap<TaskId, Entry>,
    /// Held ids, oldest first.
    pub(super) order: Vec<TaskId>,
    pub(super) fences: BTreeMap<InstanceId, u64>,
    pub(super) tombstones: VecDeque<(TaskId, Outcome)>,
}

impl Picture {
    pub(super) fn apply(&mut self, record: Record) {
        match record {
            Record::Header { epoch, .. } => self.epoch = Some(epoch),
            Record::Opened { boot_id } => self.boot_id = boot_id,
            Record::Size { bytes } => self.size = bytes,
            Record::Accepted { task } => {
                if let Some(instance) = task.instance {
                    self.raise_fence(instance, task.fence);
                }
                let entry = self.entry(task.id);
                entry.task = Some(*task);
            }
            Record::Started { task_id, at } => self.entry(task_id).started_at = Some(at),
            Record::Finished { task_id, result } => self.entry(task_id).result = Some(*result),
            Record::Acked { task_id, outcome } => {
                self.held.remove(&task_id);
                self.order.retain(|id| *id != task_id);
                self.tombstones.push_back((task_id, outcome));
                if self.tombstones.len() > TOMBSTONES {
                    self.tombstones.pop_front();
                }
            }
            Record::Fence { instance, fence } => self.raise_fence(instance, fence),
        }
    }

    fn entry(&mut self, id: TaskId) -> &mut Entry {
        if !self.held.contains_key(&id) {
            self.order.push(id);
        }
        self.held.entry(id).or_insert(Entry {
            task: None,
            started_at: None,
            result: None,
        })
    }

    fn raise_fence(&mut self, instance: InstanceId, fence: u64) {
        let highest = self.fences.entry(instance).or_insert(fence);
        *highest = (*highest).max(fence);
    }

    /// The records that make this picture from nothing, one after the other: all of them at once may be large.
    pub(super) fn records(&self, epoch: Epoch) -> impl Iterator<Item = Record> + '_ {
        let begin = [
            Record::Header { format: 1, epoch },
            Record::Opened {
                boot_id: self.boot_id.clone(),
            },
        ];
        let fences = self.fences.iter().map(|(instance, fence)| Record::Fence {
            instance: *instance,
            fence: *fence,
        });
        let tombstones = self
            .tombstones
            .iter()
            .map(|(task_id, outcome)| Record::Acked {
                task_id: *task_id,
                outcome: *outcome,
            });
        let held = self.order.iter().flat_map(|id| {
            let entry = self.held.get(id);
            let task = entry.and_then(|entry| entry.task.clone());
            let at = entry.and_then(|entry| entry.started_at);
            let result = entry.and_then(|entry| entry.result.clone());
            [
                task.map(|task| Record::Accepted {
                    task: Box::new(task),
                }),
                at.map(|at| Record::Started { task_id: *id, at }),
                result.map(|result| Record::Finished {
                    task_id: *id,
                    result: Box::new(result),
                }),
            ]
            .into_iter()
            .flatten()
        });
        begin
            .into_iter()
            .chain(fences)
            .chain(tombstones)
            .chain(held)
    }
}
