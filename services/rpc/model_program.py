"""What the programs that run a model share: their settings, loading, and engine metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Thread
from typing import Annotated, Literal, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field
from transformers.utils import logging as transformers_logging

from arbitrage.core.errors import ArbitrageError
from services.engines.base import Engine
from services.engines.loading import (
    LoadedModel,
    LoadOptions,
    ModelKind,
    ModelLoadError,
    load_model,
)
from services.engines.pack_manifest import PackError
from services.engines.packs import resolve_model
from services.engines.scheduler import EngineOptions
from services.rpc.program import StartError
from services.rpc.settings import PositiveCount, ServerSettings, variable_of
from services.rpc.telemetry import Telemetry

_MIB = 1 << 20
EngineT = TypeVar("EngineT", bound=Engine)
ResultT = TypeVar("ResultT")


class ModelSettings(ServerSettings):
    """What every program that runs a model can be told."""

    model: str = Field(
        min_length=1,
        description="Model to run: a folder, org/name@revision, a .gguf file, or a pack.",
    )
    model_id: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Name people see; by default the folder's, the file's or the hub's."
    )
    device: str = Field("cpu", min_length=1, description="Torch device, such as cpu or cuda:0.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Number format; by default float32 on the CPU, bfloat16 elsewhere."
    )
    threads: PositiveCount = Field(1, description="CPU threads of the model.")
    max_batch: PositiveCount = Field(32, description="Requests that run together.")
    max_queue: int = Field(64, ge=0, description="Requests that may wait; more are refused.")
    kv_cache_mib: PositiveCount = Field(
        512, description="Memory for keys and values, in MiB, kept prefixes included."
    )
    prefill_chunk_tokens: PositiveCount = Field(
        512, description="Prompt tokens that one forward may compute."
    )
    trust_remote_code: bool = Field(
        False, description="Lets the model run code that it brings along."
    )

    @property
    def engine_options(self) -> EngineOptions:
        """The bounds of the engine."""
        return EngineOptions(
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            cache_bytes=self.kv_cache_mib * _MIB,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            cpu_threads=self.threads,
        )


class EngineMetrics(Collector):
    """Reads an engine's counts whenever metrics are read."""

    def __init__(self, engine: Engine, role: str) -> None:
        self._engine = engine
        self._role = role

    def collect(self) -> Iterator[Metric]:
        """Yields what the engine is doing now."""
        stats = self._engine.stats()
        gauges = (
            ("queued_requests", "Requests that wait for a place in the batch.", "queued_requests"),
            ("running_requests", "Requests in the batch.", "running_requests"),
            ("cache_bytes", "Memory that keys and values take.", "cache_bytes"),
            ("cache_capacity_bytes", "Memory they may take.", "cache_capacity_bytes"),
        )
        for name, text, field in gauges:
            gauge = GaugeMetricFamily(f"arbitrage_engine_{name}", text, labels=("role",))
            gauge.add_metric((self._role,), getattr(stats, field))
            yield gauge
        tokens = CounterMetricFamily(
            "arbitrage_engine_tokens",
            "Tokens by what was done with them.",
            labels=("role", "kind"),
        )
        tokens.add_metric((self._role, "decoded"), stats.decoded_token_count)
        tokens.add_metric((self._role, "prefilled"), stats.prefill_token_count)
        tokens.add_metric((self._role, "cached"), stats.cached_token_count)
        yield tokens


@asynccontextmanager
async def running_engine(
    settings: ModelSettings,
    telemetry: Telemetry,
    role: str,
    kind: ModelKind | Callable[[Path], ModelKind],
    build: Callable[[LoadedModel, EngineOptions], EngineT],
) -> AsyncIterator[EngineT]:
    """Loads the model of a program, makes its first call, and closes it on the way out.

    Raises:
        StartError: the model cannot be loaded, or cannot answer.
    """

    def load() -> EngineT:
        reference = resolved_model(settings.model, role)
        return build(load_as_told(settings, reference, kind), settings.engine_options)

    try:
        engine = await in_daemon_thread(load)
    except (ModelLoadError, PackError) as error:
        raise StartError(f"{variable_of('model')}: {error}") from error
    try:
        await made_ready(engine)
        telemetry.registry.register(EngineMetrics(engine, role))
        yield engine
    finally:
        await engine.close()


async def made_ready(engine: Engine) -> None:
    """Makes an engine's first call.

    Raises:
        StartError: it cannot answer even that: its context or its cache is too small, or its
            weights give no numbers.
    """
    try:
        await engine.warm_up()
    except ArbitrageError as error:
        raise StartError(
            f"{variable_of('model')}: its first call failed: {error}; check the model's files, or "
            f"raise {variable_of('kv_cache_mib')}"
        ) from error


def load_as_told(
    settings: ModelSettings,
    reference: str,
    kind: ModelKind | Callable[[Path], ModelKind],
    revision: str | None = None,
) -> LoadedModel:
    """Loads a model on the device and in the number format that the settings name.

    Raises:
        ModelLoadError
    """
    # A log file is no terminal, and has one format.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    options = LoadOptions(settings.device, settings.dtype, settings.trust_remote_code)
    return load_model(reference, kind, options, settings.model_id, revision)


async def in_daemon_thread(work: Callable[[], ResultT]) -> ResultT:
    """Returns what `work` does, done in a thread that a program told to stop does not wait for."""
    outcome: Future[ResultT] = Future()

    def run() -> None:
        outcome.set_running_or_notify_cancel()
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            outcome.set_exception(error)

    Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(outcome)


def resolved_model(reference: str, role: str) -> str:
    """Returns what a pack or a member of one stands for, where `reference` names it, else that."""
    return resolve_model(reference) or resolve_model(f"{reference}/{role}") or reference
