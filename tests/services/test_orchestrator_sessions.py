"""Solutions that are resumed: on a real Redis, by orchestrators that know nothing of each other."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis

from arbitrage.core.errors import (
    ArbitrageError,
    FieldInvalid,
    SessionNotFound,
    SessionStoreAway,
    SessionTaken,
)
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep
from arbitrage.v1 import orchestrator_pb2 as pb
from arbitrage.v1 import session_pb2
from arbitrage.v1.trajectory_pb2 import (
    SOURCE_DRAFT,
    STOP_REASON_DEADLINE,
    STOP_REASON_SEPARATOR,
    SamplingConfig,
)
from services.orchestrator.redis_link import opened_redis
from services.orchestrator.sessions import Session, SessionName, SessionRules, Sessions
from services.orchestrator.telemetry import SessionMetrics, StoreMetrics
from services.rpc.auth import ANONYMOUS
from tests.services.redis_servers import RedisServer, redis_server
from tests.services.running import House, Solution, asking, committed, refusal, solution, until

SHORT_LEASE = SessionRules(lease_s=0.2, patience_s=5.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


def house_at(server: RedisServer, **settings: object) -> House:
    """Returns a deployment that keeps sessions, and asks its models for every step."""
    return House(
        settings={
            "store_url": server.url,
            "prefix_cache_mib": 0,
            "session_lease_s": 0.5,
            **settings,
        }
    )


def resuming(after: int = 0, **fields: object) -> pb.GenerateSolutionRequest:
    """Returns a request that can be resumed."""
    return asking(**{"request_id": "id-1", "resume_after_step": after, **fields})


@asynccontextmanager
async def sessions_at(
    server: RedisServer, rules: SessionRules = SHORT_LEASE
) -> AsyncIterator[Sessions]:
    registry = CollectorRegistry()
    async with opened_redis(server.url, StoreMetrics(registry), 5.0) as link:
        yield Sessions(link, rules, SessionMetrics(registry))


def session_of(sessions: Sessions, after: int = 0) -> Session:
    return sessions.session(SessionName.of(resuming(), "tenant"), after)


def step(index: int) -> session_pb2.SessionRecord:
    return session_pb2.SessionRecord(step_committed=pb.StepCommitted(step_index=index))


def ended() -> session_pb2.SessionRecord:
    record = session_pb2.SessionRecord()
    record.finished.SetInParent()
    return record


async def joined(session: Session) -> list[int]:
    """Follows a session to its lease or its end; returns the steps it was told of."""
    return [
        record.step_committed.step_index
        async for record in session.follow(None)
        if record.HasField("step_committed")
    ]


def told(events: Solution) -> list[tuple[int, str]]:
    return [(step.step_index, step.step.text) for step in committed(events)]


async def test_a_solution_that_has_ended_is_told_again_without_a_model_call(
    server: RedisServer,
) -> None:
    one, other = house_at(server), house_at(server)
    async with one.open() as stub, other.open() as second:
        first = await solution(stub, resuming())
        again = await solution(second, resuming())
        rest = await solution(second, resuming(after=2))
    sent = [event for event in first if not event.HasField("draft_proposed")]
    assert again == sent
    assert rest == sent[2:]
    assert other.draft.call_count == 0
    assert other.metric("arbitrage_sessions_total", result="replayed") == 2


async def test_a_solution_whose_caller_left_goes_on_on_another_orchestrator(
    server: RedisServer,
) -> None:
    undisturbed = House()
    async with undisturbed.open() as stub:
        whole = await solution(stub, asking())
    for known in range(3):
        one, other = house_at(server), house_at(server)
        request_id = f"id-{known}"
        async with one.open() as stub, other.open() as second:
            call = stub.GenerateSolution(resuming(request_id=request_id), timeout=20)
            events: Solution = []
            while len(committed(events)) < known:
                events.append(await anext(aiter(call)))
            call.cancel()
            rest = await solution(second, resuming(known, request_id=request_id))
        assert told(events)[:known] + told(rest) == told(whole)
        ledger = rest[-1].finished.ledger
        assert ledger.step_count == 3
        assert ledger.draft.kept_count == whole[-1].finished.ledger.draft.kept_count
        assert other.draft.call_count <= 3 - known


async def test_equal_calls_at_the_same_time_are_one_solution(server: RedisServer) -> None:
    one, other = house_at(server), house_at(server)
    one.draft.may_answer.clear()
    async with one.open() as stub, other.open() as second, asyncio.TaskGroup() as group:
        first = group.create_task(solution(stub, resuming()))
        await until(lambda: one.draft.call_count == 1)
        follower = group.create_task(solution(second, resuming()))
        # Far longer than the lease: it is renewed.
        await asyncio.sleep(1.5)
        one.draft.may_answer.set()
    assert told(first.result()) == told(follower.result())
    assert first.result()[-1] == follower.result()[-1]
    assert other.draft.call_count == 0


async def test_a_follower_takes_over_from_an_orchestrator_that_died(server: RedisServer) -> None:
    house = house_at(server)
    async with sessions_at(server) as dead:
        # It has the lease and one step, and is never heard of again.
        session = dead.session(SessionName.of(resuming(), ANONYMOUS.tenant), 0)
        assert await joined(session) == []
        async with house.open() as stub:
            call = solution(stub, resuming())
            async with asyncio.timeout(20):
                assert len(told(await call)) == 3


async def test_another_request_under_a_known_id_is_refused(server: RedisServer) -> None:
    async with house_at(server).open() as stub:
        await solution(stub, resuming())
        error = await refusal(stub, resuming(problem="2 + 2?"))
        assert isinstance(error, FieldInvalid)
        assert error.field == "request_id"
        # How it is read is no part of what is asked.
        assert len(told(await solution(stub, resuming(stream_text=True)))) == 3


@pytest.mark.parametrize("request_id", ["", "two words", "x" * 129, "ünïcode", "line\nbreak"])
async def test_an_id_that_is_none_is_refused(server: RedisServer, request_id: str) -> None:
    async with house_at(server).open() as stub:
        error = await refusal(stub, resuming(request_id=request_id))
    assert isinstance(error, FieldInvalid)
    assert error.field == "request_id"


async def test_steps_that_no_session_has_cannot_be_resumed_after(server: RedisServer) -> None:
    async with house_at(server).open() as stub:
        assert isinstance(await refusal(stub, resuming(after=2)), SessionNotFound)
        # The refusal has left nothing behind.
        assert len(told(await solution(stub, resuming()))) == 3


async def test_an_orchestrator_that_lost_its_lease_adds_nothing(server: RedisServer) -> None:
    async with sessions_at(server) as slow, sessions_at(server) as other:
        late = session_of(slow)
        assert await joined(late) == []
        await late.append(step(0), None)
        heir = session_of(other)
        assert await joined(heir) == [0]
        with pytest.raises(SessionTaken):
            await late.append(step(1), None)
        await heir.append(step(1), None)
        assert await joined(session_of(other)) == [0, 1]


async def test_a_lease_that_ran_out_is_still_good_while_nobody_took_it(
    server: RedisServer,
) -> None:
    async with sessions_at(server) as sessions:
        session = session_of(sessions)
        await joined(session)
        await asyncio.sleep(0.4)
        await session.append(step(0), None)


async def test_a_lease_that_is_given_back_is_free_at_once(server: RedisServer) -> None:
    async with sessions_at(server, SessionRules(lease_s=600.0)) as sessions:
        session = session_of(sessions)
        await joined(session)
        await session.release()
        assert await joined(session_of(sessions)) == []


async def test_a_record_whose_acknowledgement_was_lost_is_not_doubled(server: RedisServer) -> None:
    async with sessions_at(server) as sessions:
        session = session_of(sessions)
        await joined(session)
        await session.append(step(0), None)
        session.records.pop()
        await session.append(step(0), None)
        await session.append(step(1), None)
        assert await joined(session_of(sessions)) == [0, 1]


async def test_a_redis_that_forgot_everything_is_told_again(server: RedisServer) -> None:
    async with sessions_at(server) as sessions:
        session = session_of(sessions)
        await joined(session)
        await session.append(step(0), None)
        await asyncio.to_thread(_forget, server)
        await session.append(step(1), None)
        assert await joined(session_of(sessions, after=2)) == [0, 1]


async def test_a_holder_from_before_redis_forgot_everything_is_not_the_next_one(
    server: RedisServer,
) -> None:
    async with sessions_at(server) as slow, sessions_at(server) as other:
        late = session_of(slow)
        await joined(late)
        await late.append(step(0), None)
        await asyncio.to_thread(_forget, server)
        heir = session_of(other)
        assert await joined(heir) == []
        await heir.append(step(0), None)
        with pytest.raises(SessionTaken):
            await late.append(step(1), None)


async def test_a_solution_whose_records_were_evicted_is_begun_anew(server: RedisServer) -> None:
    async with sessions_at(server) as sessions, asyncio.timeout(20):
        session = session_of(sessions)
        await joined(session)
        await session.append(step(0), None)
        await session.append(ended(), None)
        await session.release()
        assert await joined(session_of(sessions)) == [0]

        def evict() -> None:
            with Redis(port=server.port) as client:
                client.delete(*client.keys("*:records"))

        await asyncio.to_thread(evict)
        again = session_of(sessions)
        assert await joined(again) == []
        await again.append(step(0), None)


async def test_who_follows_waits_for_a_redis_that_hangs(server: RedisServer) -> None:
    rules = SessionRules(lease_s=600.0, patience_s=10.0)
    async with sessions_at(server, rules) as sessions, sessions_at(server, rules) as others:
        session = session_of(sessions)
        await joined(session)
        await session.append(step(0), None)
        following = asyncio.create_task(joined(session_of(others)))
        await asyncio.sleep(0.2)
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(1.0)
        server.process.send_signal(signal.SIGCONT)
        assert not following.done()
        await session.append(ended(), None)
        async with asyncio.timeout(20):
            assert await following == [0]


async def test_a_step_waits_for_a_redis_that_is_away(server: RedisServer) -> None:
    async with sessions_at(server) as sessions:
        session = session_of(sessions)
        await joined(session)
        await asyncio.to_thread(server.kill)
        appending = asyncio.create_task(session.append(step(0), None))
        await asyncio.sleep(0.3)
        assert not appending.done()
        await asyncio.to_thread(server.start)
        await appending
        assert await joined(session_of(sessions, after=1)) == [0]


async def test_a_redis_that_stays_away_ends_the_call_for_another_try(server: RedisServer) -> None:
    async with sessions_at(server, SessionRules(patience_s=0.2)) as sessions:
        session = session_of(sessions)
        await joined(session)
        await asyncio.to_thread(server.kill)
        with pytest.raises(SessionStoreAway):
            await session.append(step(0), None)


async def test_what_is_sampled_without_a_seed_is_drawn_alike_when_it_is_resumed(
    server: RedisServer,
) -> None:
    one, other = house_at(server), house_at(server)
    sampled = SamplingConfig(temperature=1.0)
    async with one.open() as stub, other.open() as second:
        call = stub.GenerateSolution(resuming(sampling=sampled), timeout=20)
        while not (await anext(aiter(call))).HasField("step_committed"):
            pass
        call.cancel()
        await solution(second, resuming(1, sampling=sampled))
    seeds = {request.sampling.seed for request in (*one.draft.requests, *other.draft.requests)}
    assert len(seeds) == 1
    assert None not in seeds


async def test_time_that_was_spent_before_is_spent(server: RedisServer) -> None:
    house = house_at(server)
    limited = resuming()
    limited.budgets.time_limit.FromMilliseconds(60_000)
    async with sessions_at(server) as sessions:
        session = sessions.session(SessionName.of(limited, ANONYMOUS.tenant), 0)
        await joined(session)
        record = session_pb2.SessionRecord()
        record.CopyFrom(_known_step())
        record.ledger.elapsed.FromMilliseconds(60_001)
        await session.append(record, None)
        await session.release()
    async with house.open() as stub:
        events = await solution(stub, limited)
    assert events[-1].finished.stop_reason == STOP_REASON_DEADLINE
    assert house.draft.call_count == 0


async def test_time_spent_while_a_call_followed_another_counts_once(server: RedisServer) -> None:
    house, began_s = house_at(server), time.monotonic()
    async with sessions_at(server) as dying:
        session = dying.session(SessionName.of(resuming(), ANONYMOUS.tenant), 0)
        await joined(session)
        async with house.open() as stub, asyncio.TaskGroup() as group:
            following = group.create_task(solution(stub, resuming()))
            for _ in range(10):
                await asyncio.sleep(0.1)
                await session.renew(0.5)
            record = session_pb2.SessionRecord()
            record.CopyFrom(_known_step())
            record.ledger.elapsed.FromMilliseconds(1_000)
            # The last that is heard of it.
            await session.append(record, None)
        passed_s = time.monotonic() - began_s
    assert following.result()[-1].finished.ledger.elapsed.ToTimedelta().total_seconds() < passed_s


async def test_two_tenants_may_use_one_id() -> None:
    one, other = SessionName.of(resuming(), "one"), SessionName.of(resuming(), "other")
    assert one.key != other.key
    assert one.request == other.request


async def test_a_session_whose_call_failed_can_be_taken_up_at_once(server: RedisServer) -> None:
    house = house_at(server)

    def failing(request: StepRequest) -> GeneratedStep:
        raise ArbitrageError("broken")

    write, house.draft.write = house.draft.write, failing
    async with house.open() as stub:
        await refusal(stub, resuming())
        house.draft.write = write
        async with asyncio.timeout(20):
            assert len(told(await solution(stub, resuming()))) == 3


def _known_step() -> session_pb2.SessionRecord:
    record = step(0)
    record.step_committed.step.text = "one"
    record.step_committed.step.source = SOURCE_DRAFT
    record.step_committed.step.stop_reason = STOP_REASON_SEPARATOR
    return record


def _forget(server: RedisServer) -> None:
    with Redis(port=server.port) as client:
        client.flushall()


async def test_nothing_of_a_session_outlives_its_time(server: RedisServer) -> None:
    async with sessions_at(server, SessionRules(lease_s=0.1, ttl_s=0.3)) as sessions:
        session = session_of(sessions)
        async with aclosing(session.follow(None)) as records:
            assert [record async for record in records] == []
        await session.append(step(0), None)

    def count() -> int:
        with Redis(port=server.port) as client:
            return int(client.dbsize())

    assert await asyncio.to_thread(count) == 2
    async with asyncio.timeout(10):
        while await asyncio.to_thread(count):  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.05)
