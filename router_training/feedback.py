"""Turns production records into rows: what `collect --from-feedback` does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from arbitrage.core.errors import ArbitrageError
from arbitrage.core.shown import one_line
from arbitrage.core.steps import ModelIdentity
from arbitrage.v1 import feedback_pb2
from router_training.errors import DatasetInvalid, ServiceFailed
from router_training.label import advantage, binary_label
from router_training.questions import question_id
from router_training.rows import Row, RowFolder
from services.rpc.convert import (
    generated_step_from_proto,
    identity_from_proto,
    sampling_from_proto,
    steps_from_proto,
)
from services.rpc.feedback_log import read_feedback
from services.rpc.feedback_stream import read_feedback_stream
from services.rpc.redis_client import AWAY, RedisUnusable, opened_client, redacted, server_info

_log = logging.getLogger(__name__)
_SOURCE = "feedback"
_ANSWER_TIMEOUT_S: Final = 10.0
_LONGEST_SHOWN: Final = 400


def rows_from_feedback(feedback: str, folder: RowFolder) -> int:
    """Appends a row for each record that has none yet; returns how many.

    `feedback` is a folder of them, or the URL of the Redis where orchestrators keep them.

    Records of another PRM, draft or target than the rows that are there, or than the newest
    record where there are none, are passed over: no advantage mixes two.

    Raises:
        DatasetInvalid: there are no records in a folder, or one cannot be read.
        ServiceFailed: Redis cannot be read.
        StorageFailed
    """
    shown = one_line(redacted(feedback) if _is_url(feedback) else feedback, _LONGEST_SHOWN)
    try:
        records = sorted(_records(feedback), key=lambda r: r.observed_at.ToNanoseconds())
        rows = [_row(record) for record in records]
    except (ValueError, ArbitrageError) as error:
        raise DatasetInvalid(f"--from-feedback {shown}: {error}; remove the record") from None
    if not rows:
        nothing = (
            f"--from-feedback {shown}: it holds no records; is feedback_sample_rate above 0, and "
            "does feedback_folder or store_url name this place?"
        )
        if not _is_url(feedback):
            raise DatasetInvalid(nothing)
        # A Redis that answers is the right one most likely, and a schedule must not end on a day
        # without records.
        _log.warning("%s", nothing)
        return 0
    known = folder.first() or rows[-1]
    done = {(row.request_id, row.step_index) for row in folder.read()}
    fitting = [row for row in rows if _models(row) == _models(known)]
    if len(fitting) < len(rows):
        _log.warning(
            "%d of %d records are of other models and passed over",
            len(rows) - len(fitting),
            len(rows),
        )
    new = [row for row in fitting if (row.request_id, row.step_index) not in done]
    folder.append(new)
    return len(new)


def _is_url(feedback: str) -> bool:
    return "://" in feedback


def _records(feedback: str) -> Sequence[feedback_pb2.ObservedStep]:
    if _is_url(feedback):
        return asyncio.run(_records_of_redis(feedback))
    return list(read_feedback(Path(feedback)))


async def _records_of_redis(url: str) -> Sequence[feedback_pb2.ObservedStep]:
    shown = one_line(redacted(url), _LONGEST_SHOWN)
    try:
        async with opened_client(url, _ANSWER_TIMEOUT_S) as client:
            await server_info(client)
            return [record async for record in read_feedback_stream(client)]
    except RedisUnusable as error:
        raise ServiceFailed(f"--from-feedback {shown}: {error}") from None
    except AWAY as error:
        raise ServiceFailed(
            f"--from-feedback {shown}: it cannot be read ({str(error) or type(error).__name__}); "
            "start Redis or correct the URL, and run the same command again"
        ) from None


def _models(row: Row) -> tuple[ModelIdentity, ...]:
    return row.prm, row.draft, row.target


def _row(record: feedback_pb2.ObservedStep) -> Row:
    history = steps_from_proto(record.steps)
    draft = generated_step_from_proto(record.draft_step)
    targets = [generated_step_from_proto(step) for step in record.target_steps]
    if not targets or len(targets) != len(record.target_scores):
        raise ValueError(f"a record of {record.request_id} lacks target steps or their scores")
    gap = advantage(record.draft_score, list(record.target_scores))
    return Row(
        request_id=record.request_id,
        question_id=question_id(record.problem),
        source=_SOURCE,
        step_index=len(history),
        problem=record.problem,
        history=history,
        draft_text=draft.text,
        draft_token_count=draft.token_count,
        draft_entropy=draft.first_token_entropy,
        target_texts=tuple(step.text for step in targets),
        target_token_counts=tuple(step.token_count for step in targets),
        draft_score=record.draft_score,
        target_scores=tuple(record.target_scores),
        advantage=gap,
        label=binary_label(gap),
        prm=identity_from_proto(record.prm),
        draft=draft.model,
        target=targets[0].model,
        router=identity_from_proto(record.router),
        router_score=record.router_score,
        prefix_policy="router",
        propensity=record.propensity,
        # A row's seed has 63 bits, a request's 64.
        seed=(sampling_from_proto(record.sampling).seed or 0) % 2**63,
        code_version=record.code_version,
    )
