"""The prefix cache: what it answers, what it never answers, and who waits for whom."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from arbitrage.core.errors import DeadlineExceeded, TargetUnavailable
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import (
    GeneratedStep,
    ModelIdentity,
    Sampling,
    Score,
    Source,
    Step,
    StopReason,
    Trajectory,
)
from services.orchestrator.cached_models import CachedGenerator, CachedScorer, OwnSteps
from services.orchestrator.digests import prefix_digest, score_question, step_question
from services.orchestrator.prefix_cache import PrefixCache
from services.orchestrator.store import MemoryStore
from services.orchestrator.telemetry import CacheMetrics
from tests.fakes import FakeClock
from tests.services.fakes_engines import FakeGeneratorEngine, numbered
from tests.services.running import until

TRAJECTORY = Trajectory("p", (Step("one", Source.DRAFT),))
REQUEST = StepRequest(TRAJECTORY, max_tokens=8)

texts = st.text(st.characters(codec="utf-8"), max_size=3)
steps = st.builds(Step, texts, st.sampled_from(Source), st.sampled_from(StopReason))
trajectories = st.builds(Trajectory, texts, st.lists(steps, max_size=3).map(tuple))


class WatchedStore(MemoryStore):
    """Tells which keys were looked for, and which were claimed without a look."""

    def __init__(self, max_bytes: int, clock: FakeClock) -> None:
        super().__init__(max_bytes, clock)
        self.looks: list[bytes] = []
        self.unseen: list[bytes] = []

    async def claim(self, key: bytes) -> bytes | bool:
        """Notes the look."""
        self.looks.append(key)
        return await super().claim(key)

    def claim_unseen(self, key: bytes) -> None:
        """Notes the claim."""
        self.unseen.append(key)


class World:
    """A cache in front of one generator and one judge."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.registry = CollectorRegistry()
        self.store = WatchedStore(1 << 20, self.clock)
        self.cache = PrefixCache(self.store, 3600.0, CacheMetrics(self.registry), self.clock)
        self.engine = FakeGeneratorEngine(write=numbered("step", 3))
        own = OwnSteps()
        self.generator = CachedGenerator(self.engine, self.cache, Source.TARGET, own)
        self.score = Score(0.5, ModelIdentity("router", "r1"), 13, 4)
        self.ask_count = 0
        self.router = CachedScorer(self._ask, self.cache, "router", own, None)

    async def _ask(self, trajectory: Trajectory, text: str, deadline_s: float | None) -> Score:
        self.ask_count += 1
        return self.score

    async def items(self, request: StepRequest = REQUEST) -> list[str | GeneratedStep]:
        """Returns what the cached generator yields."""
        return [item async for item in self.generator.generate_step(request)]

    def count(self, result: str, role: str = "target") -> float | None:
        """Returns how many calls had that result."""
        name = "arbitrage_prefix_cache_requests_total"
        return self.registry.get_sample_value(name, {"role": role, "result": result})


@pytest.fixture
def world() -> World:
    return World()


async def test_the_second_of_two_equal_calls_is_answered_from_the_cache(world: World) -> None:
    (first,) = await world.items()
    (second,) = await world.items()
    assert isinstance(first, GeneratedStep)
    assert second == replace(first, prefill_token_count=0, cached_token_count=9)
    assert world.engine.call_count == 1
    assert (world.count("miss"), world.count("hit")) == (1, 1)


def other_request(world: World) -> None:
    """Lets what follows be asked by another request: no step is its own."""
    own = OwnSteps()
    world.generator = replace(world.generator, own=own)
    world.router = replace(world.router, own=own)


async def test_beyond_a_step_that_a_request_had_written_the_store_is_not_waited_for(
    world: World,
) -> None:
    world.cache.serves("target", "r1")
    world.cache.serves("router", "r1")
    (step,) = await world.items()
    assert isinstance(step, GeneratedStep)
    assert (len(world.store.looks), len(world.store.unseen)) == (1, 0)
    longer = replace(REQUEST, trajectory=TRAJECTORY.append(Step(step.text, Source.TARGET)))
    await world.router.estimate_advantage(TRAJECTORY, step.text)
    await world.items(longer)
    assert (len(world.store.looks), len(world.store.unseen)) == (1, 2)
    # All of it is there for the next request, which looks, finds, and so looks again.
    other_request(world)
    await world.items()
    await world.router.estimate_advantage(TRAJECTORY, step.text)
    await world.items(longer)
    assert (len(world.store.looks), len(world.store.unseen)) == (4, 2)
    assert (world.engine.call_count, world.ask_count) == (2, 1)


@pytest.mark.parametrize(
    "elsewhere",
    [
        Trajectory("p", (Step("step 1", Source.TARGET),)),  # the same text in another place
        TRAJECTORY.append(Step("step 1", Source.DRAFT)),  # written by the other model
        TRAJECTORY.append(Step("step", Source.TARGET)),
    ],
)
async def test_another_step_than_its_own_is_looked_beyond(
    world: World, elsewhere: Trajectory
) -> None:
    world.cache.serves("target", "r1")
    (step,) = await world.items()
    assert isinstance(step, GeneratedStep)
    assert step.text == "step 1"
    await world.items(replace(REQUEST, trajectory=elsewhere))
    assert (len(world.store.looks), len(world.store.unseen)) == (2, 0)


async def test_a_judgement_is_given_once_for_every_prefix_and_candidate(world: World) -> None:
    assert await world.router.estimate_advantage(TRAJECTORY, "two") == world.score
    again = await world.router.estimate_advantage(TRAJECTORY, "two")
    assert again == replace(world.score, prefill_token_count=0, cached_token_count=17)
    await world.router.estimate_advantage(TRAJECTORY, "three")
    assert world.ask_count == 2


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, max_tokens=9),
        replace(REQUEST, entropy_token_count=4),
        replace(REQUEST, sampling=Sampling(temperature=0.5, seed=1)),
        replace(REQUEST, trajectory=Trajectory("q", TRAJECTORY.steps)),
        replace(REQUEST, trajectory=TRAJECTORY.append(Step("two", Source.DRAFT))),
        replace(
            REQUEST,
            trajectory=Trajectory("p", (Step("one", Source.DRAFT, StopReason.STEP_LENGTH),)),
        ),
        replace(REQUEST, trajectory=Trajectory("p", (Step("one", Source.TARGET),))),
    ],
)
async def test_whatever_a_step_depends_on_makes_another_question(
    world: World, other: StepRequest
) -> None:
    await world.items()
    await world.items(other)
    assert world.engine.call_count == 2


async def test_what_greedy_decoding_does_not_look_at_makes_no_other_question(
    world: World,
) -> None:
    await world.items()
    await world.items(replace(REQUEST, sampling=Sampling(top_k=5, seed=3), time_limit_s=9.0))
    assert world.engine.call_count == 1


@given(trajectories, trajectories)
def test_only_equal_prefixes_have_equal_digests(one: Trajectory, other: Trajectory) -> None:
    assert (prefix_digest(one) == prefix_digest(other)) == (one == other)


def test_a_step_and_a_score_of_one_prefix_are_different_questions() -> None:
    assert step_question(REQUEST) != score_question(TRAJECTORY, "")


async def test_sampling_that_is_not_deterministic_is_never_cached(world: World) -> None:
    for _ in range(2):
        await world.items(replace(REQUEST, sampling=Sampling(temperature=0.5)))
    assert world.engine.call_count == 2
    assert world.count("bypass") == 2


async def test_a_step_that_ran_out_of_time_is_not_kept(world: World) -> None:
    cut = GeneratedStep("st", StopReason.DEADLINE, 1, ModelIdentity("m", "r1"))
    world.engine.write = lambda request: cut
    for _ in range(2):
        assert await world.items() == [cut]
    assert world.engine.call_count == 2


async def test_an_answer_of_another_revision_is_not_read(world: World) -> None:
    await world.items()
    write = world.engine.write
    world.engine.write = lambda request: replace(
        write(request), text="new", model=ModelIdentity("step", "r2")
    )
    # Another question tells the cache that another model answers now.
    await world.items(replace(REQUEST, max_tokens=99))
    (step,) = await world.items()
    assert isinstance(step, GeneratedStep)
    assert step.text == "new"


async def test_a_revision_is_believed_for_half_a_minute(world: World) -> None:
    await world.items()
    world.clock.now_s = 29.0
    await world.items()
    assert world.engine.call_count == 1
    world.clock.now_s = 31.0
    await world.items()
    assert world.engine.call_count == 2


async def test_a_cached_step_is_streamed_as_one_piece(world: World) -> None:
    await world.items()
    text, step = await world.items(replace(REQUEST, stream_text=True))
    assert isinstance(step, GeneratedStep)
    assert text == step.text


async def test_equal_calls_at_the_same_time_make_one(world: World) -> None:
    world.engine.may_answer.clear()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(world.items()) for _ in range(5)]
        await asyncio.sleep(0)
        world.engine.may_answer.set()
    assert len({str(task.result()[0].text) for task in tasks}) == 1  # type: ignore[union-attr]
    assert world.engine.call_count == 1
    assert (world.count("miss"), world.count("shared")) == (1, 4)


async def test_who_waits_for_a_call_that_is_given_up_takes_it_over(world: World) -> None:
    world.engine.may_answer.clear()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(world.items())
        await asyncio.sleep(0)
        others = [group.create_task(world.items()) for _ in range(3)]
        await asyncio.sleep(0)
        first.cancel()
        await until(lambda: world.engine.call_count == 2)
        world.engine.may_answer.set()
    assert first.cancelled()
    assert all(len(other.result()) == 1 for other in others)
    assert world.engine.call_count == 2


async def test_who_waits_for_a_call_that_fails_makes_a_call_of_its_own(world: World) -> None:
    world.engine.may_answer.clear()
    world.engine.error = TargetUnavailable("gone")

    async def failure() -> str:
        with pytest.raises(TargetUnavailable) as raised:
            await world.items()
        return str(raised.value)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(failure()) for _ in range(3)]
        await asyncio.sleep(0)
        assert world.engine.call_count == 1
        world.engine.may_answer.set()
        # The first call is let go and fails; those after it are held, both at the same time.
        world.engine.may_answer.clear()
        await until(lambda: world.engine.call_count == 3)
        world.engine.may_answer.set()
    assert [task.result() for task in tasks] == ["gone"] * 3
    world.engine.error = None
    assert len(await world.items()) == 1


async def test_who_waits_does_so_within_its_own_time(world: World) -> None:
    world.engine.may_answer.clear()
    async with asyncio.TaskGroup() as group:
        leader = group.create_task(world.items())
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await world.items(replace(REQUEST, time_limit_s=0.01))
        world.engine.may_answer.set()
    assert len(leader.result()) == 1


async def test_of_those_who_wait_for_a_call_whose_time_is_over_one_goes_on(world: World) -> None:
    world.engine.may_answer.clear()
    world.engine.error = DeadlineExceeded("its own time")
    async with asyncio.TaskGroup() as group:
        hasty = group.create_task(raised_by(world))
        await asyncio.sleep(0)
        patient = [group.create_task(world.items()) for _ in range(3)]
        await asyncio.sleep(0)
        # The first call is let go; those after it are held.
        world.engine.may_answer.set()
        world.engine.may_answer.clear()
        await hasty
        world.engine.error = None
        await until(lambda: world.engine.call_count > 1)
        world.engine.may_answer.set()
    assert world.engine.call_count == 2
    assert [len(task.result()) for task in patient] == [1, 1, 1]


async def raised_by(world: World) -> None:
    with pytest.raises(DeadlineExceeded):
        await world.items()


async def test_the_wait_for_anothers_call_uses_up_the_requests_time(world: World) -> None:
    world.engine.may_answer.clear()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(world.items())
        await asyncio.sleep(0)
        heir = group.create_task(world.items(replace(REQUEST, time_limit_s=60.0)))
        await asyncio.sleep(0.05)
        first.cancel()
        await until(lambda: world.engine.call_count == 2)
        world.engine.may_answer.set()
    assert len(heir.result()) == 1
    limit_s = world.engine.requests[1].time_limit_s
    assert limit_s is not None
    assert limit_s <= 60.0 - 0.05


async def test_nobody_waits_for_a_call_that_is_read_as_a_stream(world: World) -> None:
    streamed = world.generator.generate_step(replace(REQUEST, stream_text=True))
    async with aclosing(streamed) as items:
        await anext(items)
        async with asyncio.timeout(10):
            assert len(await world.items()) == 1
    assert world.count("shared") == 0
