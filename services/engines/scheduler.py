"""Runs the jobs of one model together, in one thread: they join and leave between forwards.

The event loop hands jobs in and gets answers back through mailboxes; only the thread touches the
model, its buffers and the prefix cache.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from arbitrage.core.errors import ArbitrageError, Internal, NotServing, Overloaded
from services.engines.base import EngineStats
from services.engines.jobs import Job
from services.engines.packed import Chunk, PackedModel, SequenceKv
from services.engines.prefix_cache import Admission, PrefixCache, as_tokens

_log = logging.getLogger(__name__)

# Sequences that are in use or kept for reuse. A lookup takes some microseconds for each.
_CACHE_ENTRIES = 256

JobT = TypeVar("JobT", bound=Job)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds of an engine.

    `max_batch` requests run together and `max_queue` more may wait. `cache_bytes` bounds the keys
    and values of all of them and of finished ones kept for reuse. `prefill_chunk_tokens` is how
    many prompt tokens one forward may compute, so that a long prompt does not hold up decoding.
    `cpu_threads` is torch's, for the whole process; None leaves it as it is.
    """

    max_batch: int = 32
    max_queue: int = 64
    cache_bytes: int = 512 * 2**20
    prefill_chunk_tokens: int = 512
    cpu_threads: int | None = 1

    def __post_init__(self) -> None:
        for name in ("max_batch", "cache_bytes", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.max_queue < 0:
            raise ValueError(f"max_queue: must not be negative, got {self.max_queue}")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads: must be at least 1 or None, got {self.cpu_threads}")


@dataclass(slots=True, eq=False)
class _Running(Generic[JobT]):
    job: JobT
    entry_id: int
    kv: SequenceKv
    started_s: float


class Scheduler(Generic[JobT]):
    """Owns a model and the thread that runs it.

    After each forward, `read` gets the hidden states [rows, width] that jobs asked for, and the
    jobs with their row counts in the same order; it appends decoded tokens to a job's `tokens`
    or marks the job finished.
    """

    def __init__(
        self,
        model: PackedModel,
        read: Callable[[Tensor, Sequence[tuple[JobT, int]]], None],
        options: EngineOptions,
        name: str,
    ) -> None:
        self._model = model
        self._read = read
        self._options = options
        self._bytes_per_token = model.kv_shape.bytes_per_token
        self._cache = PrefixCache(
            options.cache_bytes // self._bytes_per_token,
            max_entries=max(_CACHE_ENTRIES, 2 * options.max_batch),
        )
        # A request that fits the context always fits an otherwise idle cache.
        self.max_context_tokens = min(model.max_context_tokens, self._cache.capacity_tokens)
        self._kvs: dict[int, SequenceKv] = {}
        self._waiting: deque[JobT] = deque()
        self._running: list[_Running[JobT]] = []
        self._without_room: JobT | None = None  # waits until one of those running has left
        self._changed = threading.Condition()
        self._is_closing = False
        self._decoded_token_count = 0
        self._prefill_token_count = 0
        self._cached_token_count = 0
        self._mean_job_s = 0.1
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: JobT) -> None:
        """Queues a job.

        Raises:
            Overloaded: as many jobs as may are running and waiting.
            NotServing: the engine is closing.
        """
        options = self._options
        with self._changed:
            if self._is_closing:
                raise NotServing("the engine is closing")
            # Jobs that the thread will admit or drop at its next turn do not count as waiting.
            jobs = (*self._waiting, *(running.job for running in self._running))
            queued = sum(not job.is_cancelled for job in jobs) - options.max_batch
            if queued >= options.max_queue:
                wait_s = self._mean_job_s * (1 + queued / options.max_batch)
                raise Overloaded(
                    f"{options.max_batch} requests run and {queued} wait; "
                    f"retry in {wait_s:.2f} s or raise max_queue",
                    retry_after_s=max(0.05, wait_s),
                )
            self._waiting.append(job)
            self._changed.notify()

    def stats(self) -> EngineStats:
        """Returns what the thread is doing now."""
        return EngineStats(
            queued_requests=len(self._waiting),
            running_requests=len(self._running),
            decoded_token_count=self._decoded_token_count,
            prefill_token_count=self._prefill_token_count,
            cached_token_count=self._cached_token_count,
            cache_bytes=self._cache.held_tokens * self._bytes_per_token,
            cache_capacity_bytes=self._cache.capacity_tokens * self._bytes_per_token,
        )

    async def close(self) -> None:
        """Stops the thread after the forward it is in; jobs still there end with `NotServing`."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        if self._options.cpu_threads is not None:
            torch.set_num_threads(self._options.cpu_threads)
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._is_closing):
                    self._changed.wait()
                if self._is_closing:
                    break
            try:
                with torch.inference_mode():
                    self._turn()
            except Exception as error:  # noqa: BLE001 - see below; the trace is logged
                # The border of the thread: a defect ends the jobs it may have touched, not the
                # engine. Their buffers are dropped because nobody knows what is in them.
                self._log_failure("a forward failed", error)
                broken, self._running = self._running, []
                self._without_room = None
                for running in broken:
                    self._forget(running.entry_id)
                    self._give_up(running.job, Internal("the model failed; the log has the trace"))
        closing = NotServing("the engine is closing")
        abandoned = [*(running.job for running in self._running), *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._kvs.clear()
        for job in abandoned:
            self._give_up(job, closing)

    def _log_failure(self, what: str, error: Exception) -> None:
        # An exception's own words may quote a prompt, so its kind and where it was raised must do.
        frames = "".join(traceback.format_tb(error.__traceback__))
        _log.error("%s: %s (%s)\n%s", self._thread.name, what, type(error).__name__, frames)

    def _give_up(self, job: JobT, error: ArbitrageError) -> None:
        job.fail(error)
        job.deliver()

    def _turn(self) -> None:
        """Lets jobs join, runs one forward, and lets jobs leave."""
        self._join(time.monotonic())
        if not self._running:
            return
        turns = self._next_chunks()
        hidden = self._model.forward([Chunk(r.kv, token_ids) for r, token_ids in turns])
        self._hand_out(turns, hidden)
        self._leave(time.monotonic())

    def _leave(self, now_s: float) -> None:
        for running in self._running:
            running.job.check_time(now_s)
        ended = [r for r in self._running if r.job.is_finished or r.job.is_cancelled]
        if not ended:
            return
        self._without_room = None
        for running in ended:
            self._mean_job_s += 0.1 * (now_s - running.started_s - self._mean_job_s)
            job, kv = running.job, running.kv
            if kv.token_count == 0 or job.has_failed:
                self._forget(running.entry_id)
            else:
                tokens = as_tokens(job.tokens[: kv.token_count])
                self._cache.release(running.entry_id, tokens, kv.capacity_tokens)
            self._running.remove(running)
            # Last, so that whoever gets the answer finds the engine done with it.
            if job.is_finished:
                job.deliver()

    def _join(self, now_s: float) -> None:
        if not self._waiting:
            return
        with self._changed:
            waiting = tuple(self._waiting)
        has_room = True
        for job in waiting:
            job.check_time(now_s)
            if job.is_finished or job.is_cancelled:
                self._take_from_queue(job)
                if job.is_finished:
                    job.deliver()
            elif job is self._without_room:
                has_room = False
            elif has_room and len(self._running) < self._options.max_batch:
                running = self._admit(job, now_s)
                # In order of arrival: where one waits for room, none behind it overtakes.
                has_room = running is not None
                if running is not None:
                    self._take_from_queue(job, running)

    def _take_from_queue(self, job: JobT, running: _Running[JobT] | None = None) -> None:
        # In one step, so that `submit` counts the job once.
        with self._changed:
            self._waiting.remove(job)
            if running is not None:
                self._running.append(running)

    def _admit(self, job: JobT, now_s: float) -> _Running[JobT] | None:
        admission = self._cache.admit(as_tokens(job.tokens), job.first_row, job.limit_tokens)
        if admission is None:
            self._without_room = job
            return None
        for entry_id in admission.evicted_ids:
            del self._kvs[entry_id]
        try:
            kv = self._buffers(admission)
        except RuntimeError as error:  # as torch calls it when there is no memory left
            self._log_failure("no memory for a request", error)
            self._cache.discard(admission.entry_id)
            self._kvs.pop(admission.entry_id, None)
            self._take_from_queue(job)
            self._give_up(
                job, Internal("no memory for the request; lower the engine's cache_bytes")
            )
            return None
        self._kvs[admission.entry_id] = kv
        job.cached_token_count = job.fed_token_count = admission.reused_count
        self._cached_token_count += admission.reused_count
        return _Running(job, admission.entry_id, kv, now_s)

    def _buffers(self, admission: Admission) -> SequenceKv:
        if admission.source_id is None:
            return SequenceKv(self._model.kv_shape, admission.limit_tokens)
        source = self._kvs[admission.source_id]
        if not admission.is_in_place:
            return source.copy_prefix(admission.reused_count, admission.limit_tokens)
        source.truncate(admission.reused_count)
        source.limit_tokens = admission.limit_tokens
        return source

    def _next_chunks(self) -> list[tuple[_Running[JobT], Sequence[int]]]:
        budget = self._options.prefill_chunk_tokens
        turns: list[tuple[_Running[JobT], Sequence[int]]] = []
        for running in self._running:
            job, start = running.job, running.kv.token_count
            if start >= job.prompt_token_count:
                turns.append((running, job.tokens[start:]))
            elif budget > 0:
                token_ids = job.tokens[start : start + budget]
                budget -= len(token_ids)
                self._prefill_token_count += len(token_ids)
                turns.append((running, token_ids))
        return turns

    def _hand_out(
        self, turns: Sequence[tuple[_Running[JobT], Sequence[int]]], hidden: Tensor
    ) -> None:
        readers: list[tuple[JobT, int]] = []
        indices: list[int] = []
        offset = 0
        for running, token_ids in turns:
            job, stop = running.job, running.kv.token_count
            start = stop - len(token_ids)
            job.fed_token_count = stop
            rows = job.rows(start, stop)
            if rows:
                readers.append((job, len(rows)))
                indices.extend(offset + row - start for row in rows)
            if stop == job.prompt_token_count:
                self._cache.publish(running.entry_id, as_tokens(job.tokens))
            offset += len(token_ids)
        if not readers:
            return
        known_count = sum(len(job.tokens) for job, _ in readers)
        if len(indices) < len(hidden):
            hidden = hidden[indices]
        self._read(hidden, readers)
        self._decoded_token_count += sum(len(job.tokens) for job, _ in readers) - known_count

    def _forget(self, entry_id: int) -> None:
        self._cache.discard(entry_id)
        del self._kvs[entry_id]
