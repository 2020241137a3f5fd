//! The shim: a small process, this same binary, that stands between the agent and everything the agent runs.
//!
//! It owns one directory (`runs/<task>` or `instances/<instance>/apps/<task>`) and one process tree: own session, child subreaper,
//! so whatever the tree does, the shim sees its end. It outlives the agent. It must not know tasks, journals or the platform.
//!
//! ```text
//!  agent ── spec on stdin ──► windlass-agent shim <dir>
//!             │ identity.json (synced) ... before anything of the task runs
//!             │ control (FIFO)
//!             ├── exec trampoline ──► the program      (joins its cgroup, drops privileges, says on a socket whether exec worked)
//!             │      stdout+stderr ──pipe──► secrets masked ──► output   (bounded)
//!             └ status.json (space taken beforehand, synced, renamed)   ... the end; never lost, also on a full disk
//!
//!  script:       starting ──► running ──► ended            time-out, `kill`: tree killed, then ended
//!  application:  starting ──► running ──► pausing (1 s … 30 s) ──► running …      `stop <grace>`: TERM, grace, KILL, ended
//! ```
//! Files: `lock` is locked as long as the shim lives (the agent opens it, locks it and passes it on as the shim's stdout, so there
//! is no moment without an owner); `identity.json` tells what runs; `status.json` tells how it ended.
//! Together they make every crash decidable: no lock, no identity → nothing was ever run; no lock, no status → it cannot be known.
//!
//! Nothing secret is in an argument, a file or the shim's own environment: the spec comes over a pipe, and goes on to the
//! trampoline over a socket.
//!
//! A script ends when its main process ends. Descendants that it left behind (services it started) are not touched; the shim goes
//! on reading their output, and ends with the last of them or when they have closed it. After a time-out, a kill or a stop, and
//! before an application is started again, nothing of the tree is left.

pub mod client;
pub mod exec;
pub mod host;
pub mod spec;
