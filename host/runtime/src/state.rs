//! What the host keeps for one call of a guest: limits, log, host calls. A fresh one per call.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};

use crate::{
    bindings::{logging, types},
    diagnostic::Host,
    error::{CallFailure, millis},
    limits::MemoryMeter,
    surroundings::Surroundings,
};

/// Messages kept of one call, and bytes kept of one message. Source: wit, `logging`.
const MAX_MESSAGES: usize = 200;
const MAX_MESSAGE_BYTES: usize = 4096;

/// One host call that a diagnostic made, with its answer: kept with the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostCall {
    /// The function, for example `probes.run`.
    pub function: String,
    /// Its arguments.
    pub arguments: serde_json::Value,
    /// What it answered: `{"ok": …}` or `{"error": …}`.
    pub answer: serde_json::Value,
    /// How long it took, in milliseconds.
    pub elapsed_ms: u64,
}

/// The data of one store.
pub(crate) struct State {
    pub(crate) memory: MemoryMeter,
    pub(crate) log: Arc<GuestLog>,
    pub(crate) out_of_time: bool,
    /// Whether the instance stands: what fails before is no fault of the called function.
    pub(crate) instantiated: bool,
    /// Why a host function ended the call, where one did.
    pub(crate) host_failure: Option<CallFailure>,
    pub(crate) host: Option<Arc<dyn Host>>,
    pub(crate) host_calls: Vec<HostCall>,
    pub(crate) host_calls_limit: u32,
    pub(crate) host_call_time: Duration,
    surroundings: Surroundings,
    wasi: Option<Box<Wasi>>,
}

struct Wasi {
    ctx: WasiCtx,
    table: ResourceTable,
}

impl State {
    pub(crate) fn new(
        memory: MemoryMeter,
        log: Arc<GuestLog>,
        host: Option<Arc<dyn Host>>,
        host_calls_limit: u32,
        host_call_time: Duration,
        surroundings: Surroundings,
    ) -> Self {
        Self {
            memory,
            log,
            out_of_time: false,
            instantiated: false,
            host_failure: None,
            host,
            host_calls: Vec::new(),
            host_calls_limit,
            host_call_time,
            surroundings,
            wasi: None,
        }
    }

    /// Runs one host function of a diagnostic: counted, with a time-out, recorded with its answer.
    pub(crate) async fn host_call<T: Serialize>(
        &mut self,
        function: &'static str,
        arguments: serde_json::Value,
        call: impl Future<Output = Result<T, crate::diagnostic::HostError>>,
    ) -> wasmtime::Result<Result<T, types::PluginError>> {
        if self.host_calls.len() >= self.host_calls_limit as usize {
            let failure = CallFailure::HostCalls {
                limit: self.host_calls_limit,
            };
            self.host_failure = Some(failure.clone());
            return Err(failure.into());
        }
        let started = Instant::now();
        let Ok(answer) = tokio::time::timeout(self.host_call_time, call).await else {
            let failure = CallFailure::HostCallTime {
                function,
                limit_ms: millis(self.host_call_time),
            };
            self.host_failure = Some(failure.clone());
            return Err(failure.into());
        };
        self.host_calls.push(HostCall {
            function: function.to_owned(),
            arguments,
            answer: match &answer {
                Ok(answer) => serde_json::json!({ "ok": answer }),
                Err(error) => serde_json::json!({ "error": error }),
            },
            elapsed_ms: millis(started.elapsed()),
        });
        Ok(answer.map_err(|error| types::PluginError {
            code: error.code,
            message: error.message,
            field: None,
        }))
    }
}

/// Types only.
impl types::Host for State {}

impl logging::Host for State {
    async fn log(
        &mut self,
        level: logging::Level,
        message: String,
        fields: Vec<(String, String)>,
    ) -> wasmtime::Result<()> {
        self.log.message(level, message, &fields);
        Ok(())
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let (log, surroundings) = (&self.log, self.surroundings);
        // Made only for guests that use it: most do not.
        let wasi = self.wasi.get_or_insert_with(|| {
            let mut builder = WasiCtxBuilder::new();
            builder
                .allow_tcp(false)
                .allow_udp(false)
                .stdout(OutputToLog(Arc::clone(log)))
                .stderr(OutputToLog(Arc::clone(log)));
            surroundings.furnish(&mut builder);
            Box::new(Wasi {
                ctx: builder.build(),
                table: ResourceTable::new(),
            })
        });
        WasiCtxView {
            ctx: &mut wasi.ctx,
            table: &mut wasi.table,
        }
    }
}

/// The log of one call: to `tracing`, bounded.
#[derive(Debug)]
pub(crate) struct GuestLog {
    plugin: Arc<str>,
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    messages: usize,
    line: Vec<u8>,
}

impl GuestLog {
    pub(crate) fn new(plugin: Arc<str>) -> Self {
        Self {
            plugin,
            written: Mutex::new(Written::default()),
        }
    }

    fn message(&self, level: logging::Level, message: String, fields: &[(String, String)]) {
        if !self.take_place() {
            return;
        }
        let message = cut(message);
        let fields = cut(format!("{fields:?}"));
        let plugin = &*self.plugin;
        match level {
            logging::Level::Trace => {
                tracing::trace!(plugin.name = plugin, guest = fields, "{message}");
            }
            logging::Level::Debug => {
                tracing::debug!(plugin.name = plugin, guest = fields, "{message}");
            }
            logging::Level::Info => {
                tracing::info!(plugin.name = plugin, guest = fields, "{message}");
            }
            logging::Level::Warn => {
                tracing::warn!(plugin.name = plugin, guest = fields, "{message}");
            }
            logging::Level::Error => {
                tracing::error!(plugin.name = plugin, guest = fields, "{message}");
            }
        }
    }

    /// Whether one more message of this call is kept.
    fn take_place(&self) -> bool {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.messages += 1;
        written.messages <= MAX_MESSAGES
    }

    fn output(&self, bytes: &[u8]) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            if byte == b'\n' || written.line.len() >= MAX_MESSAGE_BYTES {
                let line = std::mem::take(&mut written.line);
                written.messages += 1;
                if written.messages <= MAX_MESSAGES && !line.is_empty() {
                    tracing::info!(
                        plugin.name = &*self.plugin,
                        "{}",
                        String::from_utf8_lossy(&line)
                    );
                }
            }
            if byte != b'\n' {
                written.line.push(byte);
            }
        }
    }
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_MESSAGE_BYTES {
        let mut end = MAX_MESSAGE_BYTES;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

/// Standard output and error of a guest.
struct OutputToLog(Arc<GuestLog>);

impl wasmtime_wasi::cli::IsTerminal for OutputToLog {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl wasmtime_wasi::cli::StdoutStream for OutputToLog {
    fn async_stream(&self) -> Box<dyn tokio::io::AsyncWrite + Send + Sync> {
        Box::new(OutputToLog(Arc::clone(&self.0)))
    }
}

impl tokio::io::AsyncWrite for OutputToLog {
    fn poll_write(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.0.output(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
