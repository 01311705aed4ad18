"""Walks questions with draft and target and keeps what both wrote after every prefix, with scores.

The walk is the product's own loop; only its policy differs: it lets the target write too, asks
the PRM about both, remembers a row, and goes on as its prefix rule says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from tqdm import tqdm

from arbitrage.core.errors import ArbitrageError
from arbitrage.core.limits import Budgets
from arbitrage.core.policies import written_step
from arbitrage.core.ports import Models, StepRequest
from arbitrage.core.speculation import SolutionRequest, generate_solution
from arbitrage.core.steps import (
    GREEDY,
    GeneratedStep,
    ModelIdentity,
    Sampling,
    Score,
    Source,
    Verdict,
)
from arbitrage.version import VERSION
from router_training.config import Collect
from router_training.connections import Connection
from router_training.errors import DatasetInvalid, ServiceFailed
from router_training.label import advantage, binary_label
from router_training.prefixes import (
    Observed,
    OraclePrefixes,
    PrefixPolicy,
    RandomPrefixes,
    RouterPrefixes,
    drawn_policy,
)
from router_training.questions import Question
from router_training.rows import Row, RowFolder


@dataclass(frozen=True, slots=True)
class _Walk:
    """What every step of one walk has in common."""

    question: Question
    prefixes: PrefixPolicy
    settings: Collect
    connection: Connection

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """How the target's samples are drawn; a step uses a seed together with its index."""
        settings = self.settings
        if settings.target_temperature == 0.0:
            return (GREEDY,)
        first = int(self.question.question_id[:8], 16) + settings.seed
        return tuple(
            Sampling(settings.target_temperature, seed=first + sample)
            for sample in range(settings.target_samples)
        )


class CollectingPolicy:
    """Measures the advantage of every step it decides on, and keeps a row of it."""

    name: ClassVar[str] = "collect"
    first_writer: ClassVar[Source] = Source.DRAFT
    may_escalate: ClassVar[bool] = True

    def __init__(self, walk: _Walk) -> None:
        self._walk = walk
        self.rows: list[Row] = []

    @property
    def entropy_token_count(self) -> int:
        """First tokens whose entropy the draft has to report."""
        return self._walk.settings.entropy_token_count

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Lets the target write, scores both, keeps the row, and lets the prefix rule choose."""
        targets = [
            await written_step(models.target, replace(request, sampling=sampling))
            for sampling in self._walk.samplings
        ]
        if any(step.is_empty for step in targets):
            # No step, no reward: the target says that the solution was finished one step ago.
            return Verdict(escalate=False)
        texts = {draft.text, *(step.text for step in targets)}
        scores = {
            text: await models.prm.score_step(request.trajectory, text) for text in sorted(texts)
        }
        self._check_models(draft, targets, list(scores.values()))
        gap = advantage(scores[draft.text].value, [scores[step.text].value for step in targets])
        choice = await self._walk.prefixes.choose(
            Observed(request.trajectory, draft.text, gap), models
        )
        self.rows.append(self._row(request, draft, targets, scores, choice.router_score))
        return Verdict(
            escalate=choice.escalate, router_score=choice.router_score, target_step=targets[0]
        )

    def _check_models(
        self, draft: GeneratedStep, targets: Sequence[GeneratedStep], scores: Sequence[Score]
    ) -> None:
        known = self._walk.connection
        answered = {
            "draft": (known.draft, {draft.model}),
            "target": (known.target, {step.model for step in targets}),
            "prm": (known.prm, {score.model for score in scores}),
        }
        for role, (expected, found) in answered.items():
            for other in found - {expected}:
                raise DatasetInvalid(
                    f"the {role} changed from {named(expected)} to {named(other)} while rows were "
                    "collected; no "
                    "advantage mixes two: collect into a new folder, or bring the old one back. "
                    "Earlier rows are intact"
                )

    def _row(
        self,
        request: StepRequest,
        draft: GeneratedStep,
        targets: Sequence[GeneratedStep],
        scores: dict[str, Score],
        router_score: Score | None,
    ) -> Row:
        walk, prefix = self._walk, request.trajectory
        target_scores = tuple(scores[step.text].value for step in targets)
        gap = advantage(scores[draft.text].value, target_scores)
        return Row(
            request_id=f"{walk.question.question_id}-{walk.prefixes.name}",
            question_id=walk.question.question_id,
            source=walk.question.stratum,
            step_index=len(prefix.steps),
            problem=prefix.problem,
            history=prefix.steps,
            draft_text=draft.text,
            draft_token_count=draft.token_count,
            draft_entropy=draft.first_token_entropy,
            target_texts=tuple(step.text for step in targets),
            target_token_counts=tuple(step.token_count for step in targets),
            draft_score=scores[draft.text].value,
            target_scores=target_scores,
            advantage=gap,
            label=binary_label(gap),
            prm=walk.connection.prm,
            draft=walk.connection.draft,
            target=walk.connection.target,
            router=None if router_score is None else router_score.model,
            router_score=None if router_score is None else router_score.value,
            prefix_policy=walk.prefixes.name,
            propensity=1.0,
            seed=walk.settings.seed,
            code_version=VERSION,
        )


async def collect(
    questions: Sequence[Question], settings: Collect, connection: Connection, folder: RowFolder
) -> None:
    """Walks the questions that `folder` has no rows of, several at a time, and appends their rows.

    Raises:
        DatasetInvalid: the folder's rows come from other models, or a model changes on the way.
        ServiceFailed, StorageFailed: what was written before is intact; run it again to go on.
    """
    await asyncio.to_thread(_check_same_models, folder, connection)
    done = await asyncio.to_thread(folder.walked_question_ids)
    todo = [question for question in questions if question.question_id not in done]
    policies = await _prefix_policies(settings, connection)
    pending: list[Row] = []
    finished_count = 0
    writing = asyncio.Lock()

    async def flush() -> None:
        async with writing:
            rows, pending[:] = list(pending), []
            await asyncio.to_thread(folder.append, rows)

    with tqdm(total=len(questions), initial=len(questions) - len(todo), unit="question") as bar:

        async def walk_one(question: Question) -> None:
            nonlocal finished_count
            prefixes = drawn_policy(policies, settings.seed, question.question_id)
            pending.extend(await _rows_of(_Walk(question, prefixes, settings, connection)))
            finished_count += 1
            bar.update()
            if finished_count % settings.questions_per_part == 0:
                await flush()

        try:
            await _few_at_a_time([walk_one(q) for q in todo], settings.concurrency)
        finally:
            # What was walked to its end is kept, also where another walk failed.
            await flush()


async def _rows_of(walk: _Walk) -> list[Row]:
    policy = CollectingPolicy(walk)
    budgets = Budgets(
        max_steps=walk.settings.max_steps,
        max_tokens=walk.settings.max_steps * walk.settings.max_step_tokens,
        max_step_tokens=walk.settings.max_step_tokens,
    )
    request = SolutionRequest(walk.question.problem, policy, budgets)
    try:
        async for _ in generate_solution(request, walk.connection.models):
            pass
    except ArbitrageError as error:
        raise ServiceFailed(
            f"question {walk.question.question_id}: {error}; mend the service and run the same "
            "command again: earlier rows are intact"
        ) from None
    return policy.rows


async def _prefix_policies(settings: Collect, connection: Connection) -> dict[PrefixPolicy, float]:
    weights = settings.prefix_policies
    policies: dict[PrefixPolicy, float] = {
        OraclePrefixes(): weights.get("oracle", 0.0),
        RandomPrefixes(settings.random_rate, settings.seed): weights.get("random", 0.0),
    }
    if weights.get("router", 0.0):
        if connection.router is None:
            raise ServiceFailed(
                "collect.prefix_policies: 'router' needs services.router; add its address or "
                "leave the policy out"
            )
        try:
            described = await connection.router.describe()
        except ArbitrageError as error:
            raise ServiceFailed(f"services.router: {error}; start it or correct it") from None
        policies[RouterPrefixes(described.default_threshold)] = weights["router"]
    return policies


def _check_same_models(folder: RowFolder, connection: Connection) -> None:
    row = folder.first()
    if row is None:
        return
    for role in ("draft", "target", "prm"):
        known, now = getattr(row, role), getattr(connection, role)
        if known != now:
            raise DatasetInvalid(
                f"the rows so far are by {role} {named(known)}, the service has {named(now)}; no "
                "advantage mixes two: collect into a new folder, or deploy the old model again"
            )


async def _few_at_a_time(walks: Sequence[object], concurrency: int) -> None:
    remaining = iter(walks)

    async def worker() -> None:
        for walk in remaining:
            await walk  # type: ignore[misc]  # coroutines

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise _first(errors) from None
    finally:
        for walk in remaining:
            walk.close()  # type: ignore[attr-defined]  # never begun


def named(model: ModelIdentity) -> str:
    """Returns a model's name as messages have it."""
    return f"{model.model_id}@{model.revision}"


def _first(errors: ExceptionGroup) -> Exception:
    error: Exception = errors
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
