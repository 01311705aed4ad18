"""Collecting rows as a client of running services, and what it does when they change or fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from arbitrage.core.steps import GREEDY, ModelIdentity, Source
from arbitrage.v1 import feedback_pb2
from arbitrage.v1 import orchestrator_pb2 as pb
from router_training.collect import collect
from router_training.config import Collect, Services
from router_training.connections import Connection, connected
from router_training.errors import DatasetInvalid, ServiceFailed
from router_training.feedback import rows_from_feedback
from router_training.prefixes import OraclePrefixes, PrefixPolicy, RandomPrefixes, drawn_policy
from router_training.questions import Question, question_id
from router_training.rows import Row, RowFolder
from services.rpc.feedback_log import FeedbackLog
from tests.services.certificates import Authority
from tests.services.running import House, asking, solution, until

QUESTIONS = [Question(question_id(f"{n} + 1?"), f"{n} + 1?", "sum") for n in range(12)]


@pytest.fixture
def house() -> House:
    house = House()
    house.draft.identity = ModelIdentity("draft", "r1")
    house.target.identity = ModelIdentity("target", "r1")
    return house


@pytest.fixture
def folder(tmp_path: Path) -> RowFolder:
    return RowFolder(tmp_path / "rows")


def services(house: House) -> Services:
    """Returns where the models of a house are."""
    addresses = {role: house.servers[role].address for role in ("draft", "target", "prm", "router")}
    return Services.model_validate(addresses)


async def collected(house: House, folder: RowFolder, **settings: Any) -> list[Row]:
    """Collects all questions and returns the folder's rows."""
    async with connected(services(house)) as connection:
        await collect(QUESTIONS, Collect(**settings), connection, folder)
    return await asyncio.to_thread(lambda: list(folder.read()))


def by_target(house: House) -> None:
    """Lets the PRM find the target's steps better."""
    house.prm.score_of = lambda text: 0.9 if text.startswith("target") else 0.3


async def test_a_walk_makes_a_row_of_every_step_with_all_that_labels_need(
    house: House, folder: RowFolder
) -> None:
    by_target(house)
    async with house.open():
        rows = await collected(house, folder)
    assert len(rows) == 3 * len(QUESTIONS)
    row = next(r for r in rows if r.question_id == QUESTIONS[0].question_id and r.step_index == 1)
    assert (row.problem, row.source, row.prefix_policy) == ("0 + 1?", "sum", "oracle")
    assert (row.draft_text, row.target_texts) == ("draft 1", ("target 1",))
    assert row.advantage == pytest.approx(0.6)
    assert row.label == 1
    # The oracle goes on from the better step, and the history says who wrote it.
    assert [step.source for step in row.history] == [Source.TARGET]
    assert (row.prm, row.draft, row.propensity) == (house.prm.identity, house.draft.identity, 1.0)


async def test_what_was_collected_is_not_walked_again(house: House, folder: RowFolder) -> None:
    async with house.open():
        first = await collected(house, folder)
        calls = house.target.call_count
        assert await collected(house, folder) == first
        assert house.target.call_count == calls


async def test_several_samples_of_the_target_are_drawn_with_seeds_of_their_own(
    house: House, folder: RowFolder
) -> None:
    async with house.open():
        rows = await collected(house, folder, target_samples=3, target_temperature=0.8)
    assert all(len(row.target_scores) == 3 for row in rows)
    seeds = [request.sampling.seed for request in house.target.requests]
    assert len(set(seeds)) == 3 * len(QUESTIONS)
    assert all(request.sampling == GREEDY for request in house.draft.requests)


async def test_a_prm_that_changes_half_way_stops_the_run_and_keeps_what_there_is(
    house: House, folder: RowFolder
) -> None:
    async with house.open():
        write = house.draft.write

        def changing(request: Any) -> Any:
            if request.trajectory.problem == QUESTIONS[6].problem:
                house.prm.identity = ModelIdentity("prm", "r2")
            return write(request)

        house.draft.write = changing
        with pytest.raises(
            DatasetInvalid, match=r"the prm changed from prm@r1 to prm@r2"
        ) as caught:
            await collected(house, folder, concurrency=1)
        assert "Earlier rows are intact" in str(caught.value)
        rows = await asyncio.to_thread(lambda: list(folder.read()))
        assert {row.prm.revision for row in rows} == {"r1"}
        assert len({row.question_id for row in rows}) == 6
        with pytest.raises(DatasetInvalid, match="collect into a new folder"):
            await collected(house, folder)


async def test_a_service_that_fails_is_named_and_the_next_run_goes_on(
    house: House, folder: RowFolder
) -> None:
    async with house.open():
        write = house.draft.write

        def failing(request: Any) -> Any:
            if request.trajectory.problem == QUESTIONS[6].problem:
                house.target.error = RuntimeError("broken")
            return write(request)

        house.draft.write = failing
        with pytest.raises(ServiceFailed, match="earlier rows are intact"):
            await collected(house, folder, concurrency=1)
        kept = await asyncio.to_thread(lambda: list(folder.read()))
        assert kept
        house.draft.write, house.target.error = write, None
        rows = await collected(house, folder, concurrency=1)
    assert [row for row in rows if row in kept] == kept
    assert len({(row.request_id, row.step_index) for row in rows}) == len(rows) == 36


async def test_a_service_that_is_not_there_is_named_with_its_address() -> None:
    nowhere = Services(draft="127.0.0.1:1", target="127.0.0.1:1", prm="127.0.0.1:1")
    with pytest.raises(ServiceFailed, match=r"draft 127\.0\.0\.1:1"):
        async with connected(nowhere) as connection:
            assert isinstance(connection, Connection)


def services_with_tls(house: House, authority: Authority, certificate: Path, key: Path) -> Services:
    """Returns where the models of a house are, each under a name that its certificate has."""
    found = services(house).model_dump()
    for role in ("draft", "target", "prm", "router"):
        found[role] = found[role].replace("127.0.0.1", "localhost")
    tls = {"tls_ca": authority.path, "tls_certificate": certificate, "tls_key": key}
    return Services.model_validate({**found, **tls})


async def test_models_that_want_a_certificate_are_shown_one(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("training", "training.svc")
    shown = {"models_tls_certificate": own[0], "models_tls_key": own[1]}
    house = House(
        models_tls=authority.server(client_ca=authority.path),
        settings={"models_tls_ca": authority.path, **shown},
    )
    async with house.open(), connected(services_with_tls(house, authority, *own)) as connection:
        assert connection.target == house.target.identity


async def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    _, key = authority.issue("training", "training.svc")
    house = House()
    async with house.open():
        nowhere = services_with_tls(house, authority, tmp_path / "none.pem", key)
        with pytest.raises(ServiceFailed, match=r"services\.tls_certificate: .*none\.pem"):
            async with connected(nowhere):
                pass


async def test_router_prefixes_need_a_router(house: House, folder: RowFolder) -> None:
    async with house.open():
        alone = services(house).model_copy(update={"router": None})
        async with connected(alone) as connection:
            settings = Collect(prefix_policies={"router": 1.0})
            with pytest.raises(ServiceFailed, match=r"'router' needs services\.router"):
                await collect(QUESTIONS, settings, connection, folder)


async def test_router_prefixes_go_on_as_the_serving_router_says(
    house: House, folder: RowFolder
) -> None:
    house.router.score = 0.9
    async with house.open():
        rows = await collected(house, folder, prefix_policies={"router": 1.0})
    assert all(row.router_score == pytest.approx(0.9) for row in rows)
    assert all(s.source is Source.TARGET for row in rows for s in row.history)


def test_each_question_is_walked_under_one_rule_by_its_weight() -> None:
    policies: dict[PrefixPolicy, float] = {OraclePrefixes(): 0.5, RandomPrefixes(0.5, 0): 0.5}
    names = [drawn_policy(policies, 1, question_id(str(n))).name for n in range(400)]
    assert 150 < names.count("oracle") < 250
    assert names == [drawn_policy(policies, 1, question_id(str(n))).name for n in range(400)]
    only: dict[PrefixPolicy, float] = {OraclePrefixes(): 0.0, RandomPrefixes(0.5, 0): 1.0}
    assert all(drawn_policy(only, 1, str(n)).name == "random" for n in range(50))


async def test_production_records_become_rows_once(
    house: House, folder: RowFolder, tmp_path: Path
) -> None:
    feedback = tmp_path / "feedback"
    by_target(house)
    house.router.score = 0.3
    house.settings |= {
        "feedback_sample_rate": 1.0,
        "feedback_folder": feedback,
        "feedback_max_inflight": 8,
        "feedback_max_target_inflight": 8,
    }
    async with house.open() as stub:
        await solution(stub, asking(arbitrage=pb.ArbitragePolicy()))
        written = "arbitrage_feedback_records_total"
        await until(lambda: house.metric(written, result="written") == 3)
    other = feedback_pb2.ObservedStep(problem="x?", target_scores=[1.0])
    other.target_steps.add(text="y", stop_reason="STOP_REASON_SEPARATOR", token_count=1)
    other.draft_step.CopyFrom(other.target_steps[0])
    for model in (other.prm, other.router, other.target_steps[0].model, other.draft_step.model):
        model.model_id, model.revision = "other", "r9"

    def work() -> tuple[int, int, list[Row]]:
        first = rows_from_feedback(str(feedback), folder)
        FeedbackLog(feedback).write(other)
        return first, rows_from_feedback(str(feedback), folder), list(folder.read())

    first, second, rows = await asyncio.to_thread(work)
    assert (first, second) == (3, 0)
    row = next(row for row in rows if row.step_index == 2)
    assert (row.source, row.prefix_policy) == ("feedback", "router")
    assert [step.text for step in row.history] == ["draft 0", "draft 1"]
    assert row.advantage == pytest.approx(0.6)
    assert row.router_score == pytest.approx(0.3)
    assert row.propensity == 1.0


def test_a_feedback_folder_without_records_is_an_error(tmp_path: Path, folder: RowFolder) -> None:
    with pytest.raises(DatasetInvalid, match="holds no records"):
        rows_from_feedback(str(tmp_path), folder)


def test_a_record_of_a_large_seed_becomes_a_row(tmp_path: Path, folder: RowFolder) -> None:
    record = feedback_pb2.ObservedStep(problem="x?", draft_score=0.5, target_scores=[1.0])
    record.sampling.seed = 2**64 - 1
    record.target_steps.add(text="y", stop_reason="STOP_REASON_SEPARATOR", token_count=1)
    record.draft_step.CopyFrom(record.target_steps[0])
    FeedbackLog(tmp_path / "feedback").write(record)
    assert rows_from_feedback(str(tmp_path / "feedback"), folder) == 1
    assert [row.seed for row in folder.read()] == [2**63 - 1]
