"""API keys: whose they are, which are refused, and a file of them that changes while serving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from arbitrage.channels import aio_channel, call_metadata
from arbitrage.client import (
    ArbitrageClient,
    AsyncArbitrageClient,
    ClientTls,
    DraftOnly,
    Random,
    Solution,
)
from arbitrage.core.errors import (
    ArbitrageError,
    FieldInvalid,
    InvalidRequest,
    PermissionDenied,
    Unauthenticated,
)
from arbitrage.v1 import generator_pb2, generator_pb2_grpc
from services.rpc.api_keys import ApiKeys, KeysError, digest_of, read_keys
from services.rpc.auth import ANONYMOUS, Caller, current_caller
from services.rpc.handlers import Context
from services.rpc.refusals import KeyRefused, Refusal, Refusals
from tests.services.certificates import Authority
from tests.services.running import GENERATOR, House, serving

KEY, OTHER_KEY = "arbitrage_acme-key", "arbitrage_globex-key"
METHOD = "GenerateSolution"


def entry(key: str, name: str, **more: object) -> str:
    """Returns the entry of a key in a keys file; `more` are TOML values."""
    lines = [f'id = "{name}-1"', f'tenant = "{name}"', f'sha256 = "{digest_of(key)}"']
    return "\n".join(["[[keys]]", *lines, *(f"{name} = {value}" for name, value in more.items())])


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """A file with the keys of two tenants."""
    path = tmp_path / "keys.toml"
    path.write_text(f"{entry(KEY, 'acme')}\n{entry(OTHER_KEY, 'globex')}\n")
    return path


async def caller_with(path: Path, *values: str | bytes) -> Caller:
    """Returns who shows these values of `authorization`."""
    keys = await asyncio.to_thread(ApiKeys, path)
    metadata = [("user-agent", "test"), *(("authorization", value) for value in values)]
    return await keys.authenticate(METHOD, metadata, frozenset())


async def refusal_of(path: Path, *values: str | bytes) -> KeyRefused:
    """Returns the refusal of these values."""
    with pytest.raises(KeyRefused) as raised:
        await caller_with(path, *values)
    return raised.value


async def asked(house: House, key: str | None, **options: Any) -> Solution:
    """Asks for a solution with a key."""
    async with AsyncArbitrageClient(house.address, api_key=key) as client:
        return await client.solve("1 + 1?", **{"policy": DraftOnly(), **options})


async def refused(house: House, key: str | None, **options: Any) -> ArbitrageError:
    """Returns the error that asking ends with."""
    with pytest.raises(ArbitrageError) as raised:
        await asked(house, key, **options)
    return raised.value


def refused_count(house: House, reason: str) -> float | None:
    """Returns how often callers were turned away for a reason."""
    return house.metric("arbitrage_refused_calls_total", reason=reason)


async def test_each_key_is_its_tenants(keys_file: Path) -> None:
    assert (await caller_with(keys_file, f"Bearer {KEY}")).tenant == "acme"
    assert (await caller_with(keys_file, f"bearer  {OTHER_KEY} ")).tenant == "globex"


async def test_a_caller_has_the_limits_that_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    limits = {"requests_per_minute": 60, "tokens_per_minute": 9_000, "max_concurrency": 4}
    path.write_text(entry(KEY, "acme", policies='["arbitrage", "draft_only"]', **limits))
    policies = frozenset({"arbitrage", "draft_only"})
    assert await caller_with(path, f"Bearer {KEY}") == Caller(
        "acme", "acme-1", policies, 60, 9_000, 4
    )


@pytest.mark.parametrize(
    "values", [(), ("",), (KEY,), (f"Basic {KEY}",), (f"Bearer {KEY}",) * 2, (b"Bearer x",)]
)
async def test_a_call_shows_exactly_one_key_as_a_bearer(
    keys_file: Path, values: tuple[str | bytes, ...]
) -> None:
    error = await refusal_of(keys_file, *values)
    assert error.refusal is Refusal.MISSING_KEY
    assert "authorization: Bearer KEY" in str(error)


async def test_a_key_that_is_not_in_the_file_is_unknown(keys_file: Path) -> None:
    for key in (KEY[:-1], KEY + "x", KEY.upper(), digest_of(KEY), ""):
        error = await refusal_of(keys_file, f"Bearer {key}")
        assert error.refusal is Refusal.UNKNOWN_KEY, key
        assert not error.key_id


async def test_a_revoked_key_says_that_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry(KEY, "acme", revoked="true"))
    error = await refusal_of(path, f"Bearer {KEY}")
    assert (error.refusal, error.key_id) == (Refusal.REVOKED_KEY, "acme-1")


async def test_a_key_serves_until_it_expires(tmp_path: Path) -> None:
    path, now = tmp_path / "keys.toml", datetime.now(UTC)
    path.write_text(entry(KEY, "acme", expires_at=(now + timedelta(hours=1)).isoformat()))
    assert (await caller_with(path, f"Bearer {KEY}")).tenant == "acme"
    path.write_text(entry(KEY, "acme", expires_at=(now - timedelta(seconds=1)).isoformat()))
    error = await refusal_of(path, f"Bearer {KEY}")
    assert (error.refusal, error.key_id) == (Refusal.EXPIRED_KEY, "acme-1")


GOOD = entry(KEY, "acme")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("keys = [", "is not TOML"),
        ("", "keys: Field required"),
        (GOOD.replace(digest_of(KEY), KEY), "keys[0].sha256: String should match pattern"),
        (GOOD.replace("acme-1", "a b"), "keys[0].id: String should match pattern"),
        (f"{GOOD}\nkey = '{KEY}'", "keys[0].key: Extra inputs are not permitted"),
        (f"{GOOD}\nexpires_at = 2030-01-01", "keys[0].expires_at: "),
        (f"{GOOD}\npolicies = ['all']", "keys[0].policies: no such policy: all; known are"),
        (f"{GOOD}\nmax_concurrency = 0", "keys[0].max_concurrency: Input should be greater"),
        (f"{GOOD}\n{GOOD}", "keys: keys acme-1 and acme-1 have the same id"),
        (f"{GOOD}\n{entry(KEY, 'globex')}", "keys acme-1 and globex-1 have the same sha256"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_place_and_without_keys(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(KeysError) as raised:
        read_keys(path)
    text = str(raised.value)
    assert text.startswith(f"ARBITRAGE_API_KEYS_FILE: {path}: ")
    assert said in text
    assert "correct it" in text
    assert KEY not in text
    assert digest_of(KEY) not in text


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="cannot be read"):
        read_keys(tmp_path / "nowhere.toml")


async def test_an_orchestrator_with_keys_answers_only_those_who_have_one(keys_file: Path) -> None:
    house = House(settings={"api_keys_file": keys_file})
    async with house.open():
        assert (await asked(house, KEY)).steps
        for reason, key in (("missing_key", None), ("unknown_key", "wrong")):
            assert refused_count(house, reason) == 0
            error = await refused(house, key)
            assert isinstance(error, Unauthenticated)
            assert "authorization" in str(error)
            assert refused_count(house, reason) == 1
        async with AsyncArbitrageClient(house.address) as client:
            with pytest.raises(Unauthenticated):
                await client.capabilities()


async def test_health_needs_no_key(keys_file: Path) -> None:
    house = House(settings={"api_keys_file": keys_file})
    async with house.open(), aio_channel(house.address, None, ()) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_key_opens_only_the_policies_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(entry(KEY, "acme", policies='["draft_only"]'))
    house = House(settings={"api_keys_file": path})
    async with house.open():
        assert (await asked(house, KEY)).steps
        error = await refused(house, KEY, policy=Random(0.5, 1))
    assert isinstance(error, PermissionDenied)
    assert "policy: random is not allowed for this API key; ask for one of draft_only" in str(error)
    assert refused_count(house, "policy_not_allowed") == 1
    assert house.target.call_count == 0


async def test_a_file_that_changes_counts_without_a_restart(
    keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(settings={"api_keys_file": keys_file})
    async with house.open(), asyncio.timeout(60):
        assert (await asked(house, KEY)).steps
        rewrite(keys_file, "keys = [")
        while not house.metric("arbitrage_failed_reloads_total", what="api_keys"):
            assert (await asked(house, KEY)).steps
        rewrite(keys_file, f"{entry(KEY, 'acme', revoked='true')}\n{entry('new', 'initech')}")
        with pytest.raises(Unauthenticated, match="acme-1 was revoked"):
            await asked_forever(house, KEY)
        assert (await asked(house, "new")).steps
        assert refused_count(house, "revoked_key") == 1
    assert len([line for line in caplog.messages if "stays in force" in line]) == 1


async def asked_forever(house: House, key: str) -> None:
    """Asks again and again."""
    while True:
        assert (await asked(house, key)).steps


def rewrite(path: Path, content: str) -> None:
    """Puts other content into a file."""
    path.write_text(content)


class Listing:
    """Notes who calls, and answers once two callers are inside."""

    def __init__(self) -> None:
        self.tenants: set[str] = set()
        self.are_both_here = asyncio.Barrier(2)

    async def GetGenerator(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GetGeneratorRequest, context: Context
    ) -> generator_pb2.GetGeneratorResponse:
        before = current_caller()
        await self.are_both_here.wait()
        assert current_caller() is before
        self.tenants.add(before.tenant)
        return generator_pb2.GetGeneratorResponse()


async def test_who_calls_is_known_inside_the_call_and_only_there(keys_file: Path) -> None:
    listing, door = Listing(), await asyncio.to_thread(ApiKeys, keys_file)
    async with (
        serving(GENERATOR, listing, authenticator=door) as server,
        aio_channel(server.address, None, ()) as channel,
    ):
        stub: generator_pb2_grpc.GeneratorServiceAsyncStub = (
            generator_pb2_grpc.GeneratorServiceStub(channel)
        )
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            for key in (KEY, OTHER_KEY):
                metadata = call_metadata(key, server.address, is_encrypted=False)
                request = generator_pb2.GetGeneratorRequest()
                group.create_task(answered(stub.GetGenerator(request, metadata=metadata)))
    assert listing.tenants == {"acme", "globex"}
    assert current_caller() is ANONYMOUS


async def answered(call: Any) -> None:
    """Waits for a call's answer."""
    await call


def test_refusals_are_logged_once_a_second_with_how_many_were_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = [0.0]
    refusals = Refusals(CollectorRegistry(), lambda: now_s[0])
    with caplog.at_level(logging.WARNING):
        for moment in (0.0, 0.1, 0.2, 1.5):
            now_s[0] = moment
            refusals.count_error(KeyRefused(Refusal.REVOKED_KEY, "…", "acme-1"), "ipv4:10.0.0.1:5")
    assert caplog.messages == [
        "refused (revoked_key): ipv4:10.0.0.1:5, key acme-1; 0 more since the last line",
        "refused (revoked_key): ipv4:10.0.0.1:5, key acme-1; 2 more since the last line",
    ]


def test_the_sync_and_the_async_client_send_the_key_over_tls(
    keys_file: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    tls, house = ClientTls(ca=authority.path), House(settings={"api_keys_file": keys_file})
    house.tls = authority.server()

    def synchronous() -> Solution:
        with ArbitrageClient(house.address, tls=tls, api_key=KEY) as client:
            assert client.capabilities().policies
            return client.solve("1 + 1?", policy=DraftOnly())

    async def both() -> tuple[Solution, Solution]:
        async with house.open():
            first = await asyncio.to_thread(synchronous)
            async with AsyncArbitrageClient(house.address, tls=tls, api_key=KEY) as client:
                assert (await client.capabilities()).policies
                return first, await client.solve("1 + 1?", policy=DraftOnly())

    first, second = asyncio.run(both())
    assert first.text == second.text == "draft 0\n\ndraft 1\n\ndraft 2"


@pytest.mark.parametrize("kind", [ArbitrageClient, AsyncArbitrageClient])
async def test_a_key_is_not_sent_in_plaintext_beyond_this_machine(
    kind: Callable[..., Any],
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        kind("orchestrator.example:50050", api_key=KEY)
    assert "address: would get the API key in plaintext" in str(raised.value)
    assert KEY not in str(raised.value)
    kind("orchestrator.example:50050", api_key=KEY, allow_plaintext_key=True)
    kind("127.0.0.1:50050", api_key=KEY)


@pytest.mark.parametrize("key", ["", "two words", "line\n", "schlüssel"])
async def test_what_is_no_key_is_refused_before_it_is_sent_and_not_shown(key: str) -> None:
    with pytest.raises(FieldInvalid, match="api_key: is empty or has") as raised:
        AsyncArbitrageClient("127.0.0.1:1", api_key=key)
    assert not key or key not in str(raised.value)


def test_the_files_of_a_client_are_named_where_they_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FieldInvalid, match=r"tls\.ca: cannot be read"):
        ClientTls(ca=tmp_path / "nowhere.pem")
    with pytest.raises(FieldInvalid, match=r"tls\.key: is needed beside tls\.certificate"):
        ClientTls(certificate=tmp_path / "own.pem")
