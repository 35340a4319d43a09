"""The settings of a server, one dataclass a section of the configuration file, and those of an engine.

A value of "auto" is resolved where the facts are known (dtype and device: the engine; log format: `main`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .limits import Limits

Role = Literal["user", "admin"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """`[model]`: what is served, and by which engine.

    `model`: "fable" (the embedded model), a Hugging Face folder, or a hub id. `name`: what callers say; by
    default the last part of `model`. `threads`: CPU threads of the computation; 0 leaves the library's own
    choice.
    """

    model: str = "fable"
    name: str = ""
    engine: str = "transformers"
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    allow_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class ListenSettings:
    """`[server]`: where it listens, and how it stops.

    `listen`: HOST:PORT or unix:PATH; port 0 picks a free one. `metrics`: HOST:PORT of the Prometheus page;
    empty for none. `insecure_listen`: allow plaintext beyond loopback. `drain_timeout_s`: how long requests
    in flight may go on after the first SIGTERM. `reflection`: tell callers the services' schema.
    """

    listen: str = "127.0.0.1:50051"
    metrics: str = ""
    insecure_listen: bool = False
    drain_timeout_s: float = 30.0
    reflection: bool = True


@dataclass(frozen=True, kw_only=True)
class TlsSettings:
    """`[tls]`: PEM files. `client_ca`: clients must show a certificate it signed (mutual TLS)."""

    certificate: str = ""
    private_key: str = ""
    client_ca: str = ""

    @property
    def enabled(self) -> bool:
        """Whether the server speaks TLS."""
        return bool(self.certificate or self.private_key or self.client_ca)


@dataclass(frozen=True, kw_only=True)
class KeySettings:
    """`[keys]`: who may call. Neither field set: anyone may.

    `entries`: "NAME ROLE SHA256" each, ROLE "user" or "admin", SHA256 the hex digest of the key. `file`: a
    file of such lines; blank ones and those that start with # are skipped.
    """

    file: str = ""
    entries: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """`[log]`. `format`: "auto" (console on a terminal, else json), "console" or "json"."""

    format: str = "auto"
    level: str = "info"


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """`[streams]`: how tokens are gathered into messages.

    A stream's messages are at least `gather_ms_per_stream` milliseconds times the number of open streams
    apart, and never kept more than `max_gather_ms` apart: each message costs the server a fixed amount of
    work, so many streams send fewer, fuller ones. The first token is never held, nor the last where a stream goes on to
    its max_tokens. 0 sends every token as it comes.
    """

    gather_ms_per_stream: float = 2.0
    max_gather_ms: float = 60.0


@dataclass(frozen=True, kw_only=True)
class RegistrySettings:
    """`[registry]`: where directions, probes, monitors and feature labels are kept.

    `data`: the folder of the embedded registry, an SQLite file with its tensors beside it; by default
    $GLASSHOUSE_DATA, or `glasshouse` in the user's data folder. `url`: another database, sqlite:///PATH or
    postgresql://USER@HOST/DATABASE, or "memory" for a registry that is gone when the server stops. `blobs`: path or
    URL of the tensors, the same for all servers that share a database. `max_cache_bytes`: directions and probes kept
    in memory, which go on being served while the database is away.
    """

    data: str = ""
    url: str = ""
    blobs: str = ""
    max_cache_bytes: int = 256 << 20


@dataclass(frozen=True, kw_only=True)
class VllmSettings:
    """`[vllm]`: what the vLLM engine is made with. 0 and "" leave vLLM's own choice.

    `tensor_parallel_size`, `pipeline_parallel_size`: workers a layer is split over, and stages. `distributed_executor`:
    "mp" or "ray". `quantization`: how the weights are stored. `max_model_len`: positions of one sequence, the
    model's context by default. `gpu_memory_utilization`: share of a GPU's memory to take. `kv_cache_bytes`: keys and
    values; on a CPU by default what `limits.max_running` sequences need, up to `limits.max_cache_bytes`.
    `block_size`, `num_blocks`: of the key-value cache. `max_num_batched_tokens`: tokens of one step.
    `enable_prefix_caching`, `enforce_eager`: as vLLM has them. `max_edits`, `max_vectors`: edits, and vectors, of all
    running requests together. `join_timeout_s`: how long a token waits for what was read before it.
    `speculative`: vLLM's speculative configuration. `arguments`: any other of vLLM's engine arguments.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor: str = ""
    quantization: str = ""
    max_model_len: int = 0
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int = 0
    block_size: int = 0
    num_blocks: int = 0
    max_num_batched_tokens: int = 0
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    max_edits: int = 4096
    max_vectors: int = 4096
    join_timeout_s: float = 30.0
    speculative: Mapping[str, object] = field(default_factory=dict)
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AttributionSettings:
    """`[attribution]`: what explaining may take, and where its results are kept.

    `folder`: where graphs and circuits are stored; empty for a temporary one, gone when the server stops.
    `keep_s`: how long each is kept. `max_stored_bytes`: of all together. `max_memory_bytes`, `max_seconds`: of one
    operation as estimated before it starts; more is refused. `max_call_seconds`: the same of a call that is no
    operation. `max_running`: operations computed together; `max_queued`: those, and calls, that may wait.
    `threads`: CPU threads of the computation. `niceness`: how much it stands back for generation (Unix), 0 to 19.
    """

    folder: str = ""
    keep_s: float = 86_400.0
    max_stored_bytes: int = 8 << 30
    max_memory_bytes: int = 8 << 30
    max_seconds: float = 3600.0
    max_call_seconds: float = 120.0
    max_running: int = 1
    max_queued: int = 16
    threads: int = 1
    niceness: int = 10


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """`[monitors]`: what monitors may do, and how long their events are kept.

    `text`: whether a request's text may be in an event that asks for it: "caller", where the caller allows it, or
    "never". `webhook_hosts`: hosts that events may be posted to, such as "alerts.example.com", "*.example.com" or
    "127.0.0.1:*"; none by default. `webhook_attempts`: deliveries tried of one event. `server_name`: what this server is
    called in events; by default the host's name. `retention_days`, `max_events_per_monitor`: events in the registry
    beyond these are removed. `max_queued_events`: events waiting to be written.
    """

    max_monitors: int = 64
    text: str = "caller"
    webhook_hosts: tuple[str, ...] = ()
    webhook_attempts: int = 5
    webhook_timeout_s: float = 5.0
    server_name: str = ""
    retention_days: float = 30.0
    max_events_per_monitor: int = 100_000
    max_queued_events: int = 10_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration. `dictionaries`: name -> path. `secrets`: name -> "env:VARIABLE" or "file:PATH"."""

    model: ModelSettings = field(default_factory=ModelSettings)
    dictionaries: Mapping[str, str] = field(default_factory=dict)
    server: ListenSettings = field(default_factory=ListenSettings)
    streams: StreamSettings = field(default_factory=StreamSettings)
    attribution: AttributionSettings = field(default_factory=AttributionSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    keys: KeySettings = field(default_factory=KeySettings)
    log: LogSettings = field(default_factory=LogSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    monitors: MonitorSettings = field(default_factory=MonitorSettings)
    secrets: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    vllm: VllmSettings = field(default_factory=VllmSettings)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine is made from. `model`: a folder or hub id. `threads`: None is the library's choice."""

    model: str
    name: str
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    limits: Limits = field(default_factory=Limits)
    allow_remote_code: bool = False
    dictionaries: Mapping[str, str] = field(default_factory=dict)
    vllm: VllmSettings = field(default_factory=VllmSettings)
