//! A hook into the commit path of the embedded back ends, for tests that check the order of apply, sync and
//! answer, hold a sync, or let it fail. It sees stages and revisions, never data.

use std::io;

use crate::txn::Revision;

/// A place that a group of commits passes, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitStage {
    /// The group is about to be written to the engine.
    Applying { first: Revision, last: Revision },
    /// It was written; the sync is about to start.
    Syncing { last: Revision },
    /// The sync has returned: everything up to `last` survives a loss of power.
    Synced { last: Revision },
    /// One transaction is about to be answered.
    Answering { revision: Revision },
    /// The watches have been fed.
    Notified { last: Revision },
}

/// Called by the commit path itself, which waits for it.
pub trait CommitTrace: Send + Sync {
    /// An error at `Applying` or `Syncing` is treated like one of the disk; elsewhere it is logged.
    ///
    /// # Errors
    /// As the test wishes.
    fn reached(&self, stage: CommitStage) -> io::Result<()>;
}
