//! The engine and everything that is made once: pool, linkers, ticker, places for calls.
//!
//! Isolation: a guest runs in a fresh store, in a slot of a pool, under a memory meter and the epoch. The ticker raises the
//! epoch every 2 ms while calls run; a guest that runs through a tick yields its worker, and one that computed through its
//! budget is interrupted: fair, and still a hard stop. Epochs do not reach into host calls: those have time-outs
//! of their own (see `state`).

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::Semaphore;
use wasmtime::{
    Cache, CacheConfig, Config, Engine, EngineWeak, InstanceAllocationStrategy,
    PoolingAllocationConfig,
    component::{HasSelf, Linker},
};

use crate::{
    bindings::{deployment_strategy, diagnostic, public_command, tech_stack},
    error::OpenError,
    limits::RuntimeLimits,
    state::State,
};

/// Length of one tick of the epoch.
const TICK: Duration = Duration::from_millis(2);

/// Cache of compiled code: cleaned by wasmtime when it outgrows these.
const CACHE_BYTES: u64 = 512 * 1024 * 1024;
const CACHE_FILES: u64 = 4096;

pub(crate) struct Sandbox {
    pub(crate) engine: Engine,
    pub(crate) linkers: Linkers,
    pub(crate) limits: RuntimeLimits,
    pub(crate) places: Arc<Semaphore>,
    pub(crate) ticker: Ticker,
    cache: Option<Cache>,
}

/// One linker per world, built once. WASI stands in each of them for guests whose language needs it; it is empty.
pub(crate) struct Linkers {
    pub(crate) tech_stack: Linker<State>,
    pub(crate) deployment_strategy: Linker<State>,
    pub(crate) diagnostic: Linker<State>,
    pub(crate) public_command: Linker<State>,
}

impl Sandbox {
    /// `cache_dir` holds compiled code, where it is kept.
    pub(crate) fn new(limits: RuntimeLimits, cache_dir: Option<&Path>) -> Result<Self, OpenError> {
        let cache = cache_dir
            .map(cache)
            .transpose()
            .map_err(OpenError::Engine)?;
        let engine = match Engine::new(&pooled(&limits, cache.clone())) {
            Ok(engine) => engine,
            Err(error) => {
                tracing::error!(
                    "the pool for plugin instances cannot be set up, calls will be slower: {error:#}. \
                     A limit of the address space (`ulimit -v`) is the usual cause"
                );
                Engine::new(&config(cache.clone())).map_err(OpenError::Engine)?
            }
        };
        Ok(Self {
            linkers: Linkers::new(&engine).map_err(OpenError::Engine)?,
            ticker: Ticker::start(engine.weak()).map_err(OpenError::Thread)?,
            places: Arc::new(Semaphore::new(limits.calls_at_once as usize)),
            engine,
            limits,
            cache,
        })
    }

    /// How often compiled code was found in the cache.
    pub(crate) fn cache_hits(&self) -> usize {
        self.cache.as_ref().map_or(0, Cache::cache_hits)
    }

    /// Names what compiled code depends on: engine version and settings.
    pub(crate) fn compatibility(&self) -> String {
        // Only equality within one build matters, and a build has one hasher.
        let mut hasher = DefaultHasher::new();
        self.engine
            .precompile_compatibility_hash()
            .hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }
}

/// The cache of compiled code in a directory.
pub(crate) fn cache(dir: &Path) -> wasmtime::Result<Cache> {
    let mut cache = CacheConfig::new();
    cache
        .with_directory(dir)
        .with_files_total_size_soft_limit(CACHE_BYTES)
        .with_file_count_soft_limit(CACHE_FILES);
    Cache::new(cache)
}

/// What compiled code depends on. The compiling child and the server use the same, so that the cache is shared.
pub(crate) fn config(cache: Option<Cache>) -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .concurrency_support(false)
        .cache(cache);
    config
}

fn pooled(limits: &RuntimeLimits, cache: Option<Cache>) -> Config {
    let calls = limits.calls_at_once;
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(calls)
        .total_core_instances(calls.saturating_mul(4))
        .total_memories(calls.saturating_mul(2))
        .total_tables(calls.saturating_mul(4))
        .total_stacks(calls)
        .max_core_instances_per_component(64)
        .max_memories_per_component(8)
        .max_tables_per_component(32)
        .max_component_instance_size(1 << 20)
        .max_core_instance_size(1 << 20)
        .table_elements(100_000)
        .linear_memory_keep_resident(0)
        .max_memory_size(usize::try_from(limits.max_memory_bytes).unwrap_or(usize::MAX));
    let mut config = config(cache);
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

impl Linkers {
    fn new(engine: &Engine) -> wasmtime::Result<Self> {
        let mut wasi = Linker::new(engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut wasi)?;
        let mut tech_stack = wasi.clone();
        tech_stack::TechStack::add_to_linker::<_, HasSelf<_>>(&mut tech_stack, |state| state)?;
        let mut deployment_strategy = wasi.clone();
        deployment_strategy::DeploymentStrategy::add_to_linker::<_, HasSelf<_>>(
            &mut deployment_strategy,
            |state| state,
        )?;
        let mut diagnostic = wasi.clone();
        diagnostic::Diagnostic::add_to_linker::<_, HasSelf<_>>(&mut diagnostic, |state| state)?;
        let mut public_command = wasi;
        public_command::PublicCommand::add_to_linker::<_, HasSelf<_>>(
            &mut public_command,
            |state| state,
        )?;
        Ok(Self {
            tech_stack,
            deployment_strategy,
            diagnostic,
            public_command,
        })
    }
}

/// Raises the epoch while at least one call runs; sleeps otherwise.
pub(crate) struct Ticker {
    shared: Arc<Ticking>,
    thread: Option<JoinHandle<()>>,
}

struct Ticking {
    calls: AtomicUsize,
    stop: AtomicBool,
}

/// One running call; dropped with it, however it ends.
pub(crate) struct RunningCall(Arc<Ticking>);

impl Ticker {
    fn start(engine: EngineWeak) -> std::io::Result<Self> {
        let shared = Arc::new(Ticking {
            calls: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let ticking = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("plugin-ticker".to_owned())
            .spawn(move || {
                while !ticking.stop.load(Ordering::Acquire) {
                    if ticking.calls.load(Ordering::Acquire) == 0 {
                        std::thread::park();
                    } else {
                        std::thread::sleep(TICK);
                        match engine.upgrade() {
                            Some(engine) => engine.increment_epoch(),
                            None => break,
                        }
                    }
                }
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn begin(&self) -> RunningCall {
        if self.shared.calls.fetch_add(1, Ordering::AcqRel) == 0
            && let Some(thread) = &self.thread
        {
            thread.thread().unpark();
        }
        RunningCall(Arc::clone(&self.shared))
    }
}

impl Drop for RunningCall {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the plugin ticker ended with a panic");
            }
        }
    }
}
