"""Calls that are late are asked of a second replica too: who answers, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from arbitrage.core.errors import NotServing, TargetUnavailable
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, Sampling, Trajectory
from arbitrage.v1 import orchestrator_pb2
from services.generator.servicer import GeneratorServicer
from services.prm.servicer import PrmServicer
from services.rpc.calls import key_of
from services.rpc.clients import GrpcGenerator, GrpcScorer
from services.rpc.hedging import AnswerTimes
from services.rpc.pool import Pool, opened_pool
from tests.services.fakes_engines import FakeGeneratorEngine, FakePrmEngine, numbered
from tests.services.running import GENERATOR, PRM, House, serving, solution, until
from tests.services.running import asking as asking_solution
from tests.services.test_rpc_pool import Crew, asking, step_of

LATE_S = 0.3
TARGET_ONLY = orchestrator_pb2.TargetOnlyPolicy()


@pytest.fixture
def crew(tmp_path: Path) -> Crew:
    return Crew(tmp_path, hedge_quantile=0.95)


def know_times(pool: Pool) -> None:
    """Lets a pool think that it has seen answers, none of which took longer than `LATE_S`."""
    for kind in ("step", "first text", "score"):
        for _ in range(20):
            pool.answer_times.add(kind, LATE_S)


def other_than(crew: Crew, address: str) -> FakeGeneratorEngine:
    (other,) = crew.engines.keys() - {address}
    return crew.engines[other]


async def test_a_stuck_replicas_step_is_written_by_another_and_the_stuck_one_stops(
    crew: Crew,
) -> None:
    async with crew.open(2):
        know_times(crew.pool)
        stuck = crew.asked_first(asking(1))
        crew.engines[stuck].may_answer.clear()
        # Text that was not told may be any.
        request = asking(1, sampling=Sampling(temperature=1.0), time_limit_s=15.0)
        assert (await step_of(crew.generator, request)).text == "target 0"
        await until(lambda: crew.engines[stuck].cancelled_count)
        assert crew.metric("arbitrage_pool_hedges_total") == 1
        assert crew.metric("arbitrage_pool_hedges_won_total") == 1
        # It was slow, which is no failure.
        assert crew.metric("arbitrage_pool_ejections_total") == 0
        assert crew.metric("arbitrage_pool_retries_total") == 0
        assert [replica.inflight_count for replica in crew.pool.replicas] == [0, 0]
        # The time that the first one had is over for the second one, too.
        (asked,) = other_than(crew, stuck).requests
        assert asked.time_limit_s is not None
        assert asked.time_limit_s <= 15.0 - LATE_S


async def test_the_first_replica_may_still_be_the_first_to_answer(crew: Crew) -> None:
    async with crew.open(2):
        know_times(crew.pool)
        slow = crew.asked_first(asking(1))
        for engine in crew.engines.values():
            engine.may_answer.clear()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(step_of(crew.generator, asking(1)))
            await until(lambda: other_than(crew, slow).call_count)
            crew.engines[slow].may_answer.set()
        assert running.result().text == "target 0"
        await until(lambda: other_than(crew, slow).cancelled_count)
        assert crew.metric("arbitrage_pool_hedges_won_total") == 0
        assert crew.metric("arbitrage_pool_ejections_total") == 0


async def test_a_request_that_is_given_up_is_given_up_by_both(crew: Crew) -> None:
    async with crew.open(2):
        know_times(crew.pool)
        for engine in crew.engines.values():
            engine.may_answer.clear()
        running = asyncio.create_task(step_of(crew.generator, asking(1)))
        await until(lambda: all(engine.call_count for engine in crew.engines.values()))
        running.cancel()
        await asyncio.wait([running])
        await until(lambda: all(engine.cancelled_count for engine in crew.engines.values()))
        assert [replica.inflight_count for replica in crew.pool.replicas] == [0, 0]


async def test_one_that_fails_leaves_the_answer_to_the_other(crew: Crew) -> None:
    async with crew.open(2):
        know_times(crew.pool)
        slow = crew.asked_first(asking(1))
        crew.engines[slow].may_answer.clear()
        other_than(crew, slow).error = NotServing("closing")
        async with asyncio.TaskGroup() as group:
            running = group.create_task(step_of(crew.generator, asking(1)))
            await until(lambda: crew.metric("arbitrage_pool_ejections_total"))
            assert not running.done()
            crew.engines[slow].may_answer.set()
        assert running.result().text == "target 0"
        assert crew.engines[slow].call_count == 1
        assert crew.metric("arbitrage_pool_retries_total") == 0


@pytest.mark.parametrize("state", ["alone", "ejected", "busy"])
async def test_nobody_else_is_asked_where_nobody_else_has_a_place(crew: Crew, state: str) -> None:
    async with crew.open(1 if state == "alone" else 2):
        know_times(crew.pool)
        slow = crew.asked_first(asking(1))
        crew.engines[slow].may_answer.clear()
        for replica in crew.pool.replicas:
            if replica.address != slow and state == "busy":
                replica.inflight_count = 9
            elif replica.address != slow:
                await crew.servers[replica.address].drain(0.01)
                crew.pool.eject(replica)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(step_of(crew.generator, asking(1)))
            await asyncio.sleep(3 * LATE_S)
            crew.engines[slow].may_answer.set()
        assert running.result().text == "target 0"
        assert sum(engine.call_count for engine in crew.engines.values()) == 1
        assert crew.metric("arbitrage_pool_hedges_total") == 0


async def test_replicas_that_are_all_late_are_asked_little_more(crew: Crew) -> None:
    async with crew.open(2):
        know_times(crew.pool)
        for engine in crew.engines.values():
            engine.may_answer.clear()
        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(step_of(crew.generator, asking(number)))
            await until(lambda: sum(engine.call_count for engine in crew.engines.values()) == 45)
            await asyncio.sleep(3 * LATE_S)
            for engine in crew.engines.values():
                engine.may_answer.set()
        assert crew.metric("arbitrage_pool_hedges_total") == 5
        assert sum(engine.call_count for engine in crew.engines.values()) == 45


@pytest.mark.parametrize(("quantile", "fewest"), [(0.5, 2), (0.9, 10), (0.95, 20), (0.99, 100)])
def test_nothing_is_late_before_there_are_answers_to_compare_with(
    quantile: float, fewest: int
) -> None:
    times = AnswerTimes(quantile)
    for _ in range(fewest):
        assert times.late_s("step") is None
        times.add("step", 1.0)
    assert times.late_s("step") == 1.0
    assert times.late_s("score") is None


async def all_of(items: AsyncIterator[str | GeneratedStep]) -> list[str | GeneratedStep]:
    return [item async for item in items]


class Hesitant(FakeGeneratorEngine):
    """Says nothing at all before it may answer."""

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        await self.answer()
        async for item in super().generate_step(request):
            yield item


async def test_a_stream_that_does_not_begin_is_begun_by_another_and_told_once() -> None:
    engines = [Hesitant(write=numbered("target", 1)) for _ in range(2)]
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(serving(GENERATOR, GeneratorServicer(engine, 8)))
            for engine in engines
        ]
        address = ",".join(server.address for server in servers)
        pool = await stack.enter_async_context(opened_pool("target", address, hedge_quantile=0.95))
        know_times(pool)
        chosen = pool.choose(key_of(asking(1).trajectory.problem))
        assert chosen is not None
        stuck = engines[[server.address for server in servers].index(chosen.address)]
        stuck.may_answer.clear()
        generator = GrpcGenerator(pool, TargetUnavailable)
        items = await all_of(generator.generate_step(asking(1, stream_text=True)))
        assert items[:-1] == ["target", "0"]
        await until(lambda: stuck.cancelled_count)


async def test_a_stream_that_has_begun_is_waited_for(crew: Crew) -> None:
    async with crew.open(2):
        know_times(crew.pool)
        slow = crew.asked_first(asking(1))
        crew.engines[slow].may_answer.clear()
        items = aiter(crew.generator.generate_step(asking(1, stream_text=True)))
        assert [await anext(items), await anext(items)] == ["target", "0"]
        before = crew.metric("arbitrage_pool_hedges_total")
        async with asyncio.TaskGroup() as group:
            rest = group.create_task(all_of(items))
            await asyncio.sleep(3 * LATE_S)
            assert crew.metric("arbitrage_pool_hedges_total") == before
            crew.engines[slow].may_answer.set()
        (step,) = rest.result()
        assert isinstance(step, GeneratedStep)


async def test_a_stuck_judges_score_comes_from_another() -> None:
    engines = [FakePrmEngine(score=0.25) for _ in range(2)]
    async with (
        serving(PRM, PrmServicer(engines[0])) as one,
        serving(PRM, PrmServicer(engines[1])) as other,
        opened_pool("prm", f"{one.address},{other.address}", hedge_quantile=0.95) as pool,
    ):
        know_times(pool)
        chosen = pool.choose(key_of("1 + 1?"))
        assert chosen is not None
        stuck = engines[0] if chosen.address == one.address else engines[1]
        stuck.may_answer.clear()
        score = await GrpcScorer(pool).score_step(Trajectory("1 + 1?"), "two")
        assert score.value == 0.25
        await until(lambda: stuck.cancelled_count)


async def test_an_orchestrator_that_is_told_to_hedges_its_models_calls() -> None:
    stuck = FakeGeneratorEngine(write=numbered("target", 1))
    house = House(
        target=FakeGeneratorEngine(write=numbered("target", 1)),
        settings={"hedge_quantile": 0.9, "prefix_cache_mib": 0},
    )
    async with (
        serving(GENERATOR, GeneratorServicer(house.target, 256)) as one,
        serving(GENERATOR, GeneratorServicer(stuck, 256)) as other,
    ):
        house.settings["target_address"] = f"{one.address},{other.address}"
        async with house.open() as stub:
            requests = [
                asking_solution(problem=f"{number}?", target_only=TARGET_ONLY)
                for number in range(40)
            ]
            async with asyncio.TaskGroup() as group:
                # As many as it takes to know what is late, and all of them slow.
                for engine in (house.target, stuck):
                    engine.may_answer.clear()
                for request in requests[:10]:
                    group.create_task(solution(stub, request))
                await until(lambda: house.target.call_count + stuck.call_count == 10)
                await asyncio.sleep(LATE_S)
                house.target.may_answer.set()
                stuck.may_answer.set()
            assert house.metric("arbitrage_pool_hedges_total", role="target") == 0
            stuck.may_answer.clear()
            for request in requests[10:]:
                await solution(stub, request)
                if stuck.cancelled_count:
                    break
            assert house.metric("arbitrage_pool_hedges_won_total", role="target") == 1
