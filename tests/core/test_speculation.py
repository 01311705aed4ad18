"""The loop: who is asked, what is committed, how it ends, and what it is said to have cost."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbitrage.core.errors import (
    ContextTooLong,
    DraftUnavailable,
    PrmUnavailable,
    RouterUnavailable,
    TargetUnavailable,
)
from arbitrage.core.events import DraftProposed, Event, Finished, StepCommitted, TokenDelta
from arbitrage.core.ledger import Ledger
from arbitrage.core.limits import Budgets
from arbitrage.core.policies import (
    ArbitragePolicy,
    DraftOnlyPolicy,
    FirstTokenEntropyPolicy,
    OraclePolicy,
    Policy,
    RandomPolicy,
    RsdPolicy,
    TargetOnlyPolicy,
)
from arbitrage.core.ports import Models, StepRequest
from arbitrage.core.speculation import RouterFallback, SolutionRequest, generate_solution
from arbitrage.core.steps import (
    Degradation,
    GeneratedStep,
    ModelIdentity,
    Score,
    Source,
    StopReason,
    Trajectory,
)
from tests.fakes import (
    FakeClock,
    FakeGenerator,
    FakeScorer,
    PoolStep,
    PoolWorld,
    events_of,
    step,
    texts_in_order,
)

scores = st.floats(0.0, 1.0, allow_nan=False, width=32)
pools = st.lists(
    st.builds(
        PoolStep,
        draft_score=scores,
        target_score=scores,
        router_score=scores,
        draft_tokens=st.integers(1, 9),
        target_tokens=st.integers(1, 9),
        entropy=st.floats(0.0, 5.0, allow_nan=False, width=32),
    ),
    min_size=1,
    max_size=8,
)
policies = st.one_of(
    st.builds(ArbitragePolicy, scores),
    st.builds(RsdPolicy, scores),
    st.builds(OraclePolicy, st.floats(-1.0, 1.0, allow_nan=False, width=32)),
    st.builds(RandomPolicy, scores, st.integers(0, 99)),
    st.builds(DraftOnlyPolicy),
    st.builds(TargetOnlyPolicy),
    st.builds(FirstTokenEntropyPolicy, st.floats(0.0, 5.0, allow_nan=False, width=32)),
)


def solve(world: PoolWorld, policy: Policy, **options: object) -> list[Event]:
    request = SolutionRequest("1 + 1?", policy, **options)  # type: ignore[arg-type]
    return asyncio.run(events_of(request, world.models))


def commits(events: list[Event]) -> list[StepCommitted]:
    return [event for event in events if isinstance(event, StepCommitted)]


def texts(events: list[Event]) -> list[str]:
    return [event.step.text for event in commits(events)]


def finished(events: list[Event]) -> Finished:
    last = events[-1]
    assert isinstance(last, Finished)
    return last


def ledger(events: list[Event]) -> Ledger:
    return finished(events).ledger


@given(pools, policies)
def test_the_target_is_asked_only_for_rejected_drafts(pool: list[PoolStep], policy: Policy) -> None:
    world = PoolWorld(pool)
    cost = ledger(solve(world, policy))
    asked = len(world.target.requests)
    assert cost.target.call_count == asked
    if isinstance(policy, OraclePolicy):
        assert asked == len(pool)  # it cannot decide without the target's step
    elif isinstance(policy, TargetOnlyPolicy):
        assert asked == len(pool)
        assert not world.draft.requests
        assert cost.escalation_count == cost.routed_step_count == 0
    else:
        assert asked == cost.escalation_count


@given(pools, policies)
def test_the_ledger_adds_up_to_the_tokens_streamed(pool: list[PoolStep], policy: Policy) -> None:
    world = PoolWorld(pool)
    events = solve(world, policy)
    cost = ledger(events)
    streamed = {
        source: sum(c.token_count for c in commits(events) if c.step.source is source)
        for source in Source
    }
    assert cost.draft.kept_count == streamed[Source.DRAFT]
    assert cost.target.kept_count == streamed[Source.TARGET]
    drafted = sum(pool[len(r.trajectory.steps)].draft_tokens for r in world.draft.requests)
    targeted = sum(pool[len(r.trajectory.steps)].target_tokens for r in world.target.requests)
    assert cost.draft.kept_count + cost.draft.discarded_count == drafted
    assert cost.target.kept_count + cost.target.discarded_count == targeted
    assert cost.draft.pending_count == cost.target.pending_count == 0
    assert cost.step_count == len(commits(events)) == len(pool)
    assert cost.escalation_count == sum(c.escalated for c in commits(events))


@given(pools, policies)
def test_every_stream_has_one_finished_and_it_is_last(pool: list[PoolStep], policy: Policy) -> None:
    events = solve(PoolWorld(pool), policy)
    assert [isinstance(event, Finished) for event in events].count(True) == 1
    assert finished(events).stop_reason is StopReason.END_OF_SEQUENCE
    assert [c.step_index for c in commits(events)] == list(range(len(pool)))


@given(pools)
def test_a_tie_accepts_the_draft(pool: list[PoolStep]) -> None:
    even = [PoolStep(p.draft_score, p.draft_score, p.router_score) for p in pool]
    assert ledger(solve(PoolWorld(even), OraclePolicy(0.0))).escalation_count == 0
    same = [PoolStep(0.25, 1.0, 0.25, entropy=1.5) for _ in pool]
    for policy in (ArbitragePolicy(0.25), RsdPolicy(0.25), FirstTokenEntropyPolicy(1.5)):
        assert ledger(solve(PoolWorld(same), policy)).escalation_count == 0


@given(pools)
def test_threshold_extremes_agree_with_draft_only_and_target_only(pool: list[PoolStep]) -> None:
    world = PoolWorld([PoolStep(0.5, 0.5, 0.5, entropy=0.5) for _ in pool])
    draft_only = texts(solve(world, DraftOnlyPolicy()))
    target_only = texts(solve(world, TargetOnlyPolicy()))
    for never in (
        ArbitragePolicy(1.0),
        RsdPolicy(0.0),
        OraclePolicy(1.0),
        RandomPolicy(0.0),
        FirstTokenEntropyPolicy(100.0),
    ):
        assert texts(solve(world, never)) == draft_only
    for always in (
        ArbitragePolicy(0.0),
        RsdPolicy(1.0),
        OraclePolicy(-1.0),
        RandomPolicy(1.0),
        FirstTokenEntropyPolicy(0.0),
    ):
        assert texts(solve(world, always)) == target_only


async def test_a_result_does_not_depend_on_the_requests_beside_it() -> None:
    pool = [PoolStep(0.2, 0.9, i / 7, entropy=i / 7) for i in range(8)]
    policies: list[Policy] = [
        policy
        for i in range(8)
        for policy in (
            ArbitragePolicy(i / 8),
            RandomPolicy(0.5, i),
            OraclePolicy(i / 8),
            RsdPolicy(i / 8),
        )
    ]
    world = PoolWorld(pool)
    requests = [SolutionRequest(f"problem {i}", policy) for i, policy in enumerate(policies)]
    alone = [await events_of(request, world.models) for request in requests]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(events_of(request, world.models)) for request in requests]
    assert [texts(task.result()) for task in tasks] == [texts(events) for events in alone]


def test_the_random_coin_depends_on_seed_problem_and_step() -> None:
    pool = [PoolStep(0.0, 1.0) for _ in range(8)]

    def coins(problem: str, seed: int) -> list[str]:
        request = SolutionRequest(problem, RandomPolicy(0.5, seed))
        return texts(asyncio.run(events_of(request, PoolWorld(pool).models)))

    assert coins("a", 1) == coins("a", 1)
    assert len({tuple(coins(problem, seed)) for problem in "abcd" for seed in range(4)}) > 8


def test_a_committed_step_carries_what_it_was_judged_by() -> None:
    events = solve(PoolWorld([PoolStep(0.1, 0.9, 0.8)]), ArbitragePolicy(0.3))
    proposed = [event for event in events if isinstance(event, DraftProposed)]
    (committed,) = commits(events)
    assert [p.text for p in proposed] == ["draft 0"]
    assert committed.escalated
    assert committed.step.text == "target 0"
    assert committed.verdict is not None
    assert committed.verdict.threshold == 0.3
    assert committed.verdict.router_score is not None
    assert committed.verdict.router_score.value == 0.8
    assert committed.verdict.router_score.model.model_id == "fake-router"


def test_a_step_may_use_what_is_left_of_the_request_and_no_more() -> None:
    world = PoolWorld([PoolStep(1.0, 1.0, draft_tokens=4) for _ in range(9)])
    budgets = Budgets(max_tokens=10, max_step_tokens=6)
    events = solve(world, DraftOnlyPolicy(), budgets=budgets)
    assert [request.max_tokens for request in world.draft.requests] == [6, 6, 2]
    assert finished(events).stop_reason is StopReason.TOTAL_LENGTH


def test_the_step_limit_ends_the_request() -> None:
    events = solve(
        PoolWorld([PoolStep(1.0, 1.0) for _ in range(9)]),
        DraftOnlyPolicy(),
        budgets=Budgets(max_steps=4),
    )
    assert finished(events).stop_reason is StopReason.STEP_LIMIT
    assert len(commits(events)) == 4


def test_a_step_cut_by_its_cap_goes_on() -> None:
    cut = FakeGenerator(
        lambda request: step(
            f"part {len(request.trajectory.steps)}",
            StopReason.END_OF_SEQUENCE if request.trajectory.steps else StopReason.STEP_LENGTH,
        )
    )
    models = Models(cut, cut, FakeScorer(lambda *_: 1.0), FakeScorer(lambda *_: 0.0))
    events = asyncio.run(events_of(SolutionRequest("p", DraftOnlyPolicy()), models))
    assert [c.step.stop_reason for c in commits(events)] == [
        StopReason.STEP_LENGTH,
        StopReason.END_OF_SEQUENCE,
    ]


def test_a_used_up_target_budget_accepts_every_later_draft_and_says_so() -> None:
    world = PoolWorld([PoolStep(0.0, 1.0, 0.9) for _ in range(4)])
    events = solve(world, ArbitragePolicy(0.5), budgets=Budgets(max_target_steps=2))
    assert [c.step.source for c in commits(events)] == [Source.TARGET] * 2 + [Source.DRAFT] * 2
    assert [c.degradations for c in commits(events)] == [()] * 2 + [
        (Degradation.TARGET_BUDGET,)
    ] * 2
    assert len(world.target.requests) == ledger(events).escalation_count == 2
    assert world.router.call_count == ledger(events).routed_step_count == 2
    assert ledger(events).degraded_step_count == 2


def test_target_only_stops_at_its_target_budget() -> None:
    events = solve(
        PoolWorld([PoolStep(0.0, 1.0)] * 4), TargetOnlyPolicy(), budgets=Budgets(max_target_steps=3)
    )
    assert len(commits(events)) == 3
    assert finished(events).stop_reason is StopReason.STEP_LIMIT


def models_of(
    draft: FakeGenerator, target: FakeGenerator, router_score: float = 0.0
) -> tuple[Models, FakeScorer]:
    router = FakeScorer(lambda *_: router_score)
    return Models(draft, target, FakeScorer(lambda *_: 1.0), router), router


def test_a_repeated_draft_step_is_escalated_once_without_asking_the_router() -> None:
    draft = FakeGenerator(texts_in_order(["a", "a", "c"]))
    target = FakeGenerator(texts_in_order(["b"]))
    models, router = models_of(draft, target)
    budgets = Budgets(max_steps=3)
    events = asyncio.run(events_of(SolutionRequest("p", ArbitragePolicy(0.5), budgets), models))
    assert texts(events) == ["a", "b", "c"]
    assert router.call_count == 2
    assert ledger(events).escalation_count == len(target.requests) == 1


def test_the_same_step_from_both_models_ends_the_request() -> None:
    draft, target = FakeGenerator(lambda _: step("a")), FakeGenerator(lambda _: step("a"))
    models, _ = models_of(draft, target)
    events = asyncio.run(events_of(SolutionRequest("p", ArbitragePolicy(0.5)), models))
    assert texts(events) == ["a"]
    assert finished(events).stop_reason is StopReason.REPETITION
    assert ledger(events).target.discarded_count == 3
    assert ledger(events).escalation_count == len(target.requests) == 1


def test_draft_only_ends_at_a_repeated_step_without_a_target_call() -> None:
    draft, target = FakeGenerator(lambda _: step("a")), FakeGenerator(lambda _: step("b"))
    models, _ = models_of(draft, target)
    events = asyncio.run(events_of(SolutionRequest("p", DraftOnlyPolicy()), models))
    assert texts(events) == ["a"]
    assert finished(events).stop_reason is StopReason.REPETITION
    assert not target.requests


def test_an_empty_step_is_not_a_step() -> None:
    draft = FakeGenerator(lambda _: step(" \n", StopReason.END_OF_SEQUENCE))
    target = FakeGenerator(lambda _: step("", StopReason.END_OF_SEQUENCE))
    models, _ = models_of(draft, target)
    events = asyncio.run(events_of(SolutionRequest("p", ArbitragePolicy(0.5)), models))
    assert texts(events) == []
    assert finished(events).stop_reason is StopReason.END_OF_SEQUENCE
    assert ledger(events).step_count == 0
    assert ledger(events).draft.discarded_count == 3


def test_a_draft_that_says_it_is_finished_ends_the_request_without_a_target_call() -> None:
    draft = FakeGenerator(
        lambda r: step("", StopReason.END_OF_SEQUENCE) if r.trajectory.steps else step("a")
    )
    target = FakeGenerator(lambda _: step("b"))
    models, _ = models_of(draft, target)
    events = asyncio.run(events_of(SolutionRequest("p", RandomPolicy(0.0)), models))
    assert texts(events) == ["a"]
    assert finished(events).stop_reason is StopReason.END_OF_SEQUENCE
    assert not target.requests
    assert ledger(events).routed_step_count == 1


def test_equal_text_after_a_cut_step_is_no_repetition() -> None:
    ones = ["1", "1", " \n", "1"]
    draft = FakeGenerator(
        lambda r: step(
            ones[len(r.trajectory.steps)],
            StopReason.STEP_LENGTH if len(r.trajectory.steps) < 3 else StopReason.END_OF_SEQUENCE,
        )
    )
    models, _ = models_of(draft, FakeGenerator(lambda _: step("t")))
    events = asyncio.run(events_of(SolutionRequest("p", DraftOnlyPolicy()), models))
    assert texts(events) == ones
    assert finished(events).stop_reason is StopReason.END_OF_SEQUENCE


def test_a_cut_step_without_any_text_is_no_step_either() -> None:
    draft = FakeGenerator(lambda _: step("", StopReason.STEP_LENGTH))
    models, _ = models_of(draft, FakeGenerator(lambda _: step("t")))
    events = asyncio.run(events_of(SolutionRequest("p", DraftOnlyPolicy()), models))
    assert texts(events) == []
    assert finished(events).stop_reason is StopReason.REPETITION


def test_the_oracle_takes_no_empty_step_for_a_better_one() -> None:
    draft = FakeGenerator(lambda r: step("a", StopReason.END_OF_SEQUENCE))
    target = FakeGenerator(lambda _: step("", StopReason.END_OF_SEQUENCE))
    prm = FakeScorer(lambda _, text: 0.0 if text else 1.0)
    models = Models(draft, target, prm, FakeScorer(lambda *_: 0.0))
    events = asyncio.run(events_of(SolutionRequest("p", OraclePolicy()), models))
    assert texts(events) == ["a"]
    assert ledger(events).escalation_count == 0
    assert ledger(events).target.discarded_count == 3


def test_the_oracle_without_a_target_keeps_the_draft_where_allowed() -> None:
    world = PoolWorld([PoolStep(0.0, 1.0)])
    world.target.error = TargetUnavailable("no replica")
    events = solve(world, OraclePolicy(), allow_degraded=True)
    assert commits(events)[0].degradations == (Degradation.TARGET_UNAVAILABLE,)
    with pytest.raises(TargetUnavailable):
        solve(world, OraclePolicy())


def test_no_advantage_mixes_the_scores_of_two_prms() -> None:
    class ChangingPrm(FakeScorer):
        async def score_step(self, trajectory: Trajectory, step_text: str) -> Score:
            score = await super().score_step(trajectory, step_text)
            return replace(score, model=ModelIdentity("prm", f"r{self.call_count}"))

    world = PoolWorld([PoolStep(0.0, 1.0)])
    world.prm = ChangingPrm(world.prm.score)
    with pytest.raises(PrmUnavailable, match="changed"):
        solve(world, OraclePolicy())


async def test_the_ledger_of_an_unfinished_request_counts_what_was_decoded() -> None:
    world = PoolWorld([PoolStep(0.0, 1.0, 0.9, draft_tokens=5)])
    cost = Ledger()
    request = SolutionRequest("p", ArbitragePolicy(0.5))
    events = generate_solution(request, world.models, FakeClock(), ledger=cost)
    assert isinstance(await anext(events), DraftProposed)
    await events.aclose()
    assert (cost.draft.decoded_count, cost.draft.cancelled_count) == (5, 5)
    assert cost.draft.pending_count == 0


def test_time_counts_from_the_requests_arrival() -> None:
    async def run() -> list[Event]:
        world = PoolWorld([PoolStep(0.0, 1.0)])
        request = SolutionRequest("p", DraftOnlyPolicy(), Budgets(time_limit_s=5.0))
        clock = FakeClock(now_s=100.0)
        events = generate_solution(request, world.models, clock, started_s=94.0)
        return [event async for event in events]

    events = asyncio.run(run())
    assert finished(events).stop_reason is StopReason.DEADLINE
    assert ledger(events).elapsed_s == 6.0


def test_text_is_streamed_only_on_request_and_joins_to_the_step() -> None:
    world = PoolWorld([PoolStep(0.0, 1.0, 0.9)])
    silent = solve(world, ArbitragePolicy(0.5))
    assert not [event for event in silent if isinstance(event, TokenDelta)]
    events = solve(world, ArbitragePolicy(0.5), stream_text=True)
    deltas = [event for event in events if isinstance(event, TokenDelta)]
    for source, text in ((Source.DRAFT, "draft 0"), (Source.TARGET, "target 0")):
        assert "".join(d.text for d in deltas if d.source is source) == text


def test_the_time_limit_ends_the_request_with_its_tokens_accounted() -> None:
    clock = FakeClock()

    def slow_draft(request: StepRequest) -> GeneratedStep:
        clock.now_s += 4.0
        return step(f"s{len(request.trajectory.steps)}")

    target = FakeGenerator(lambda _: step("t"))
    models, _ = models_of(FakeGenerator(slow_draft), target, router_score=1.0)
    request = SolutionRequest("p", ArbitragePolicy(1.0), Budgets(time_limit_s=10.0))
    events = asyncio.run(events_of(request, models, clock))
    assert texts(events) == ["s0", "s1"]
    assert finished(events).stop_reason is StopReason.DEADLINE
    assert ledger(events).draft.kept_count == 6
    assert ledger(events).draft.cancelled_count == 3
    assert not target.requests


def test_a_target_step_cut_for_time_is_an_escalation_whose_draft_was_finished() -> None:
    target = FakeGenerator(lambda _: step("half a", StopReason.DEADLINE, token_count=2))
    models, _ = models_of(FakeGenerator(lambda _: step("d")), target, router_score=1.0)
    events = asyncio.run(events_of(SolutionRequest("p", ArbitragePolicy(0.5)), models))
    cost = ledger(events)
    assert finished(events).stop_reason is StopReason.DEADLINE
    assert (cost.target.call_count, cost.escalation_count, cost.escalation_rate) == (1, 1, 1.0)
    assert (cost.draft.discarded_count, cost.draft.cancelled_count) == (3, 0)
    assert (cost.target.discarded_count, cost.target.cancelled_count) == (0, 2)


def test_a_draft_that_repeats_while_the_target_is_away_ends_a_degraded_request() -> None:
    draft = FakeGenerator(lambda _: step("again"))
    target = FakeGenerator(lambda _: step("t"), error=TargetUnavailable("away"))
    models, _ = models_of(draft, target, router_score=0.0)
    request = SolutionRequest("p", ArbitragePolicy(0.5), allow_degraded=True)
    events = asyncio.run(events_of(request, models))
    assert texts(events) == ["again"]
    assert finished(events).stop_reason is StopReason.REPETITION


def test_a_step_the_engine_cut_for_time_is_not_committed() -> None:
    draft = FakeGenerator(lambda _: step("half a", StopReason.DEADLINE))
    models, _ = models_of(draft, FakeGenerator(lambda _: step("t")))
    events = asyncio.run(events_of(SolutionRequest("p", ArbitragePolicy(0.5)), models))
    assert texts(events) == []
    assert finished(events).stop_reason is StopReason.DEADLINE
    assert ledger(events).draft.cancelled_count == 3


def test_a_solution_that_outgrows_the_context_ends_with_what_it_has() -> None:
    full = ContextTooLong("prompt", "99 tokens", "does not fit", "shorten it")

    def draft(request: StepRequest) -> GeneratedStep:
        if len(request.trajectory.steps) == 2:
            raise full
        return step(f"s{len(request.trajectory.steps)}")

    models, _ = models_of(FakeGenerator(draft), FakeGenerator(lambda _: step("t")))
    events = asyncio.run(events_of(SolutionRequest("p", ArbitragePolicy(0.5)), models))
    assert texts(events) == ["s0", "s1"]
    assert finished(events).stop_reason is StopReason.TOTAL_LENGTH
    with pytest.raises(ContextTooLong):
        asyncio.run(
            events_of(
                SolutionRequest("p", DraftOnlyPolicy()),
                models_of(FakeGenerator(lambda _: step("x"), full), FakeGenerator(draft))[0],
            )
        )


def test_what_is_left_of_the_time_travels_with_each_call() -> None:
    clock = FakeClock()
    draft = FakeGenerator(lambda r: step(f"s{len(r.trajectory.steps)}"))
    models, _ = models_of(draft, FakeGenerator(lambda _: step("t")))

    async def run() -> None:
        request = SolutionRequest("p", DraftOnlyPolicy(), Budgets(max_steps=3, time_limit_s=9.0))
        async with aclosing(generate_solution(request, models, clock)) as events:
            async for event in events:
                if isinstance(event, StepCommitted):
                    clock.now_s += 2.0

    asyncio.run(run())
    assert [request.time_limit_s for request in draft.requests] == [9.0, 7.0, 5.0]


async def test_closing_the_stream_stops_the_model_that_is_working() -> None:
    world = PoolWorld([PoolStep(0.0, 1.0)])
    request = SolutionRequest("p", DraftOnlyPolicy(), stream_text=True)
    events = generate_solution(request, world.models)
    assert isinstance(await anext(events), TokenDelta)
    await events.aclose()
    assert world.draft.closed_early_count == 1


def test_without_a_target_a_degraded_request_keeps_the_draft_and_says_so() -> None:
    world = PoolWorld([PoolStep(0.0, 1.0, 0.9), PoolStep(0.0, 1.0, 0.1)])
    world.target.error = TargetUnavailable("no replica")
    events = solve(world, ArbitragePolicy(0.5), allow_degraded=True)
    assert texts(events) == ["draft 0", "draft 1"]
    assert [c.degradations for c in commits(events)] == [(Degradation.TARGET_UNAVAILABLE,), ()]
    assert not any(c.escalated for c in commits(events))
    assert ledger(events).escalation_count == 0
    with pytest.raises(TargetUnavailable):
        solve(world, ArbitragePolicy(0.5))


@pytest.mark.parametrize(
    ("fallback", "expected"),
    [(RouterFallback.ACCEPT_DRAFT, "draft 0"), (RouterFallback.ESCALATE, "target 0")],
)
def test_without_a_router_the_configured_fallback_decides(
    fallback: RouterFallback, expected: str
) -> None:
    world = PoolWorld([PoolStep(0.0, 1.0, 0.9)])
    world.router.error = RouterUnavailable("no replica")
    events = solve(world, ArbitragePolicy(0.5), router_fallback=fallback)
    assert texts(events) == [expected]
    assert commits(events)[0].degradations == (Degradation.ROUTER_UNAVAILABLE,)


def test_a_router_fallback_of_fail_fails_the_request() -> None:
    world = PoolWorld([PoolStep(0.0, 1.0, 0.9)])
    world.router.error = RouterUnavailable("no replica")
    with pytest.raises(RouterUnavailable):
        solve(world, ArbitragePolicy(0.5), router_fallback=RouterFallback.FAIL)


def test_without_a_draft_the_target_writes_and_draft_only_fails() -> None:
    world = PoolWorld([PoolStep(0.0, 1.0, 0.1)] * 2)
    world.draft.error = DraftUnavailable("no replica")
    events = solve(world, ArbitragePolicy(0.5))
    assert texts(events) == ["target 0", "target 1"]
    assert {c.degradations for c in commits(events)} == {(Degradation.DRAFT_UNAVAILABLE,)}
    with pytest.raises(DraftUnavailable):
        solve(world, DraftOnlyPolicy())


def test_model_time_and_orchestrator_time_make_up_the_whole() -> None:
    clock = FakeClock(tick_s=0.25)
    world = PoolWorld([PoolStep(0.0, 1.0, 0.9)] * 3)
    events = asyncio.run(events_of(SolutionRequest("p", ArbitragePolicy(0.5)), world.models, clock))
    cost = ledger(events)
    models_s = cost.draft.time_s + cost.target.time_s + cost.router.time_s
    assert models_s > 0.0
    assert cost.orchestrator_time_s == pytest.approx(cost.elapsed_s - models_s)
    assert sum(c.target_time_s for c in commits(events)) == pytest.approx(cost.target.time_s)


policies = st.one_of(
    st.builds(ArbitragePolicy, st.floats(0, 1, allow_nan=False, width=32)),
    st.builds(RandomPolicy, st.floats(0, 1, allow_nan=False), st.integers(0, 9)),
    st.builds(TargetOnlyPolicy),
)


@given(pools, policies, st.integers(1, 5), st.integers(1, 3), st.data())
async def test_a_solution_that_goes_on_elsewhere_ends_as_if_it_had_never_stopped(
    pool: list[PoolStep], policy: Policy, max_steps: int, max_target_steps: int, data: st.DataObject
) -> None:
    budgets = Budgets(max_steps=max_steps, max_tokens=17, max_target_steps=max_target_steps)
    request = SolutionRequest("p", policy, budgets)
    whole = await events_of(request, PoolWorld(pool).models)
    steps = [event for event in whole if isinstance(event, StepCommitted)]
    known = data.draw(st.integers(0, len(steps)))
    ledger = Ledger()
    # What the first part had cost when it stopped.
    begun = generate_solution(request, PoolWorld(pool).models, FakeClock(), ledger=ledger)
    async with aclosing(begun) as events:
        while ledger.step_count < known:
            await anext(events)
        ledger = deepcopy(ledger)
    rest = generate_solution(
        request, PoolWorld(pool).models, FakeClock(), ledger=ledger, committed=steps[:known]
    )
    async with aclosing(rest) as events:
        again = [event async for event in events]
    assert again == whole[len(whole) - len(again) :]
    assert [event for event in again if isinstance(event, StepCommitted)] == steps[known:]
