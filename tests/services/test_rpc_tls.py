"""TLS: who gets in, what is said of bad files, and certificates that are renewed while serving."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from arbitrage.channels import ClientTls, aio_channel
from arbitrage.client import AsyncArbitrageClient, DraftOnly
from arbitrage.core.errors import ArbitrageError, Internal, PermissionDenied, Unavailable
from arbitrage.status import from_rpc_error
from arbitrage.v1 import generator_pb2, generator_pb2_grpc
from services.generator.servicer import GeneratorServicer
from services.orchestrator.__main__ import channel_opener
from services.orchestrator.settings import OrchestratorSettings
from services.rpc.auth import AllowedCallers, Anyone
from services.rpc.server import Listener, RpcServer
from services.rpc.settings import SettingsError, read_settings
from services.rpc.telemetry import Telemetry
from services.rpc.tls import ChannelOpener, TlsError, TlsFiles
from tests.services.certificates import SERVER_NAMES, Authority
from tests.services.fakes_engines import FakeGeneratorEngine
from tests.services.running import GENERATOR, House, asking, refusal, serving, solution

ORCHESTRATOR = "orchestrator.arbitrage.svc"
SPIFFE = "spiffe://cluster.local/ns/arbitrage/sa/orchestrator"
NEEDED = {"ARBITRAGE_DRAFT_ADDRESS": "d:1", "ARBITRAGE_TARGET_ADDRESS": "t:1"}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority that the servers of a test have their certificates of."""
    return Authority(tmp_path)


def servicer() -> GeneratorServicer:
    """Returns something to call."""
    return GeneratorServicer(FakeGeneratorEngine(), 256)


def local(server: RpcServer) -> str:
    """Returns the server's address by a name that its certificate has."""
    return f"localhost:{server.port}"


async def asked_over(
    address: str, tls: ClientTls | None, options: Iterable[tuple[str, str]] = ()
) -> str:
    """Asks a generator what it is over a connection of its own; returns its model's name.

    Raises:
        ArbitrageError
    """
    async with aio_channel(address, tls, [*options, ("grpc.use_local_subchannel_pool", 1)]) as to:
        return await asked_on(to)


async def asked_on(channel: grpc.aio.Channel) -> str:
    """Asks over a channel that is there."""
    stub: generator_pb2_grpc.GeneratorServiceAsyncStub = generator_pb2_grpc.GeneratorServiceStub(
        channel
    )
    try:
        answer = await stub.GetGenerator(generator_pb2.GetGeneratorRequest(), timeout=20)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    return answer.model.model_id


async def refused(address: str, tls: ClientTls | None) -> ArbitrageError:
    """Returns the error that asking ends with."""
    with pytest.raises(ArbitrageError) as raised:
        await asked_over(address, tls)
    return raised.value


async def shown_certificate(server: RpcServer, authority: Authority) -> bytes:
    """Returns the certificate that a new caller is shown."""
    context = await asyncio.to_thread(ssl.create_default_context, cafile=str(authority.path))
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return found


async def test_a_server_with_a_certificate_serves_those_who_believe_it(
    authority: Authority,
) -> None:
    async with serving(GENERATOR, servicer(), tls=authority.server()) as server:
        assert await asked_over(local(server), await authority.client()) == "fake"
        assert isinstance(
            await refused(local(server), await asyncio.to_thread(ClientTls)), Unavailable
        )
        assert isinstance(await refused(local(server), None), Unavailable)


async def test_mutual_tls_lets_in_only_certificates_of_its_authority(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    own = {
        "good": authority.issue("good", ORCHESTRATOR),
        "expired": authority.issue("expired", ORCHESTRATOR, year=2020),
        "wrong": stranger.issue("wrong", ORCHESTRATOR),
        "none": None,
    }
    clients = {name: await authority.client(pair) for name, pair in own.items()}
    tls = authority.server(client_ca=authority.path)
    async with serving(GENERATOR, servicer(), tls=tls) as server:
        assert await asked_over(local(server), clients["good"]) == "fake"
        for name in ("expired", "wrong", "none"):
            assert isinstance(await refused(local(server), clients[name]), Unavailable), name


@pytest.mark.parametrize("name", [ORCHESTRATOR, SPIFFE])
async def test_of_callers_with_a_certificate_only_those_that_are_named_may_call(
    authority: Authority, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    issue = authority.issue_for_uri if "://" in name else authority.issue
    named = await authority.client(issue("named", name))
    other = await authority.client(authority.issue("other", "intruder.example"))
    telemetry = Telemetry()
    async with serving(
        GENERATOR,
        servicer(),
        telemetry,
        authority.server(client_ca=authority.path),
        AllowedCallers(frozenset({name}), Anyone()),
    ) as server:
        assert await asked_over(local(server), named) == "fake"
        error = await refused(local(server), other)
    assert isinstance(error, PermissionDenied)
    assert "intruder.example" in str(error)
    assert "ARBITRAGE_ALLOWED_CALLERS" in str(error)
    reason = {"reason": "caller_not_allowed"}
    assert telemetry.registry.get_sample_value("arbitrage_refused_calls_total", reason) == 1
    assert "refused (caller_not_allowed): ipv4:127.0.0.1" in caplog.text.replace("%3A", ":")


async def test_a_common_name_is_no_name_to_be_let_in_by(authority: Authority) -> None:
    # gRPC's own `peer_identities` falls back on it, and anybody may write anything there.
    unnamed = await authority.client(authority.issue("unnamed", common_name=ORCHESTRATOR))
    tls = authority.server(client_ca=authority.path)
    door = AllowedCallers(frozenset({ORCHESTRATOR}), Anyone())
    async with serving(GENERATOR, servicer(), tls=tls, authenticator=door) as server:
        error = await refused(local(server), unnamed)
    assert "no DNS name or URI" in str(error)


async def test_health_asks_for_no_name_but_for_the_certificate(authority: Authority) -> None:
    tls = authority.server(client_ca=authority.path)
    door = AllowedCallers(frozenset({ORCHESTRATOR}), Anyone())
    prober = await authority.client(authority.issue("prober", "prober.example"))
    request = health_pb2.HealthCheckRequest()
    async with serving(GENERATOR, servicer(), tls=tls, authenticator=door) as server:
        async with aio_channel(local(server), prober, ()) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with aio_channel(local(server), None, ()) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)


async def test_a_renewed_certificate_is_shown_to_the_next_caller_without_a_restart(
    authority: Authority,
) -> None:
    async with (
        serving(GENERATOR, servicer(), tls=authority.server()) as server,
        aio_channel(local(server), await authority.client(), ()) as standing,
    ):
        assert await asked_on(standing) == "fake"
        before = await shown_certificate(server, authority)
        assert await shown_certificate(server, authority) == before
        authority.issue("server", *SERVER_NAMES)
        assert await shown_certificate(server, authority) != before
        assert await asked_over(local(server), await authority.client()) == "fake"
        assert await asked_on(standing) == "fake"


async def test_an_authority_that_is_taken_away_lets_nobody_new_in(
    authority: Authority, tmp_path: Path
) -> None:
    successor = Authority(tmp_path, "successor")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.path.read_bytes())
    old = await authority.client(authority.issue("old", ORCHESTRATOR))
    new = await authority.client(successor.issue("new", ORCHESTRATOR))
    tls = authority.server(client_ca=trusted)
    async with serving(GENERATOR, servicer(), tls=tls) as server:
        assert await asked_over(local(server), old) == "fake"
        assert isinstance(await refused(local(server), new), Unavailable)
        trusted.write_bytes(successor.path.read_bytes())
        assert await asked_over(local(server), new) == "fake"
        assert isinstance(await refused(local(server), old), Unavailable)


async def test_half_a_new_pair_keeps_the_old_one_and_is_logged_once(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry, tls = Telemetry(), authority.server()
    assert tls.certificate is not None
    assert tls.key is not None
    certificate, key = authority.issue("renewed", *SERVER_NAMES)
    async with serving(GENERATOR, servicer(), telemetry, tls) as server:
        before = await shown_certificate(server, authority)
        tls.certificate.write_bytes(certificate.read_bytes())
        for _ in range(3):
            assert await shown_certificate(server, authority) == before
        tls.key.write_bytes(key.read_bytes())
        assert await shown_certificate(server, authority) != before
    kept = [line for line in caplog.messages if "stays in force" in line]
    assert len(kept) == 1
    assert "ARBITRAGE_TLS_KEY" in kept[0]
    failed = telemetry.registry.get_sample_value("arbitrage_failed_reloads_total", {"what": "tls"})
    assert failed == 1


Spoil = Callable[[Path, Path, Authority], object]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda cert, key, ca: cert.unlink(), "ARBITRAGE_TLS_CERTIFICATE: {cert}: cannot be read"),
        (lambda cert, key, ca: key.write_bytes(b"?"), "ARBITRAGE_TLS_KEY: {key}: holds no key"),
        (
            lambda cert, key, ca: cert.write_bytes(cert.read_bytes()[:200]),
            "ARBITRAGE_TLS_CERTIFICATE: {cert}: holds no certificate",
        ),
        (
            lambda cert, key, ca: key.write_bytes(ca.issue("x", "x.example")[1].read_bytes()),
            "ARBITRAGE_TLS_KEY: {key}: is not the key of {cert}",
        ),
        (
            lambda cert, key, ca: ca.path.write_bytes(b"\xff"),
            "ARBITRAGE_TLS_CLIENT_CA: {ca}: holds no certificate",
        ),
    ],
    ids=["missing", "no-key", "cut-short", "other-key", "no-ca"],
)
def test_a_file_that_cannot_be_used_is_named_with_its_variable(
    authority: Authority, spoil: Spoil, said: str
) -> None:
    tls = authority.server(client_ca=authority.path)
    assert tls.certificate is not None
    assert tls.key is not None
    spoil(tls.certificate, tls.key, authority)
    with pytest.raises(TlsError) as raised:
        tls.read()
    expected = said.format(cert=tls.certificate, key=tls.key, ca=authority.path)
    assert str(raised.value).startswith(expected)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_password(
    authority: Authority,
) -> None:
    tls = authority.server()
    assert tls.key is not None
    key = serialization.load_pem_private_key(tls.key.read_bytes(), None)
    tls.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(TlsError, match="unencrypted"):
        tls.read()


def test_keys_are_not_shown_where_files_are(authority: Authority) -> None:
    assert "PRIVATE" not in repr(authority.server().read())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ARBITRAGE_TLS_CERTIFICATE": "c"}, "ARBITRAGE_TLS_KEY: is not set"),
        ({"ARBITRAGE_TLS_KEY": "k"}, "ARBITRAGE_TLS_CERTIFICATE: is not set"),
        ({"ARBITRAGE_TLS_CLIENT_CA": "c"}, "ARBITRAGE_TLS_CERTIFICATE: is not set"),
        ({"ARBITRAGE_ALLOWED_CALLERS": "a, b"}, "ARBITRAGE_TLS_CLIENT_CA: is not set"),
        ({"ARBITRAGE_MODELS_TLS_KEY": "k"}, "ARBITRAGE_MODELS_TLS_CERTIFICATE: is not set"),
        (
            {"ARBITRAGE_MODELS_TLS_CERTIFICATE": "c", "ARBITRAGE_MODELS_TLS_KEY": "k"},
            "ARBITRAGE_MODELS_TLS_CA: is not set",
        ),
    ],
)
def test_a_setting_that_needs_another_one_names_it(given: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError) as raised:
        read_settings(OrchestratorSettings, {**NEEDED, **given})
    assert str(raised.value).startswith(named)


def test_callers_are_named_with_commas_between_them() -> None:
    given = {
        "ARBITRAGE_TLS_CERTIFICATE": "c",
        "ARBITRAGE_TLS_KEY": "k",
        "ARBITRAGE_TLS_CLIENT_CA": "ca",
        "ARBITRAGE_ALLOWED_CALLERS": f"{ORCHESTRATOR}, {SPIFFE},",
    }
    settings = read_settings(OrchestratorSettings, {**NEEDED, **given})
    assert settings.allowed_callers == {ORCHESTRATOR, SPIFFE}


async def test_plaintext_beyond_this_machine_is_warned_of_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    for host, tls in (("0.0.0.0", None), ("127.0.0.1", None), ("0.0.0.0", authority.server())):
        server = RpcServer(GENERATOR, Listener(host, 0, tls=tls), Telemetry())
        await server.start()
        await server.stop()
    assert [line for line in caplog.messages if "plaintext" in line] == [
        "listening on 0.0.0.0 in plaintext: anyone on the way can read and change calls; set "
        "ARBITRAGE_TLS_CERTIFICATE and ARBITRAGE_TLS_KEY"
    ]


def models_settings(authority: Authority, own: tuple[Path, Path]) -> dict[str, Any]:
    """Returns the settings of an orchestrator whose models are behind mutual TLS."""
    return {
        "models_tls_ca": authority.path,
        "models_tls_certificate": own[0],
        "models_tls_key": own[1],
    }


async def test_an_orchestrator_reaches_its_models_over_mutual_tls(authority: Authority) -> None:
    own = authority.issue("own", ORCHESTRATOR)
    house = House(
        settings=models_settings(authority, own),
        models_tls=authority.server(client_ca=authority.path),
    )
    async with house.open() as stub:
        assert len(await solution(stub, asking())) > 1


async def test_a_model_that_turns_the_orchestrator_away_is_not_the_callers_fault(
    authority: Authority,
) -> None:
    house = House()
    async with house.open() as stub:
        house.servers["draft"]._handlers.install(
            servicer(), AllowedCallers(frozenset({ORCHESTRATOR}), Anyone())
        )
        error = await refusal(stub, asking())
    assert isinstance(error, Internal)
    assert "draft" in str(error)


async def test_the_whole_way_may_be_encrypted(authority: Authority) -> None:
    own = authority.issue("own", ORCHESTRATOR)
    house = House(
        settings=models_settings(authority, own),
        models_tls=authority.server(client_ca=authority.path),
        tls=authority.server(),
    )
    tls = await authority.client()
    async with house.open(), AsyncArbitrageClient(house.address, tls=tls) as client:
        assert (await client.solve("1 + 1?", policy=DraftOnly())).steps


async def test_an_opener_says_when_channels_should_be_opened_again(
    authority: Authority, tmp_path: Path
) -> None:
    own = authority.issue("own", ORCHESTRATOR)
    files: dict[str, Any] = dict(models_settings(authority, own))
    settings = OrchestratorSettings(draft_address="d:1", target_address="t:1", **files)
    opener = await asyncio.to_thread(channel_opener, settings, Telemetry())
    tls = authority.server(client_ca=authority.path)
    async with serving(GENERATOR, servicer(), tls=tls) as server:
        async with opener(local(server)) as channel:
            assert await asked_on(channel) == "fake"
        assert not await asyncio.to_thread(opener.changed)
        own[1].write_bytes(b"half a key")
        assert not await asyncio.to_thread(opener.changed)
        authority.issue("own", ORCHESTRATOR)
        assert await asyncio.to_thread(opener.changed)
        assert await asyncio.to_thread(opener.changed)
        async with opener(local(server)) as channel:
            assert await asked_on(channel) == "fake"
        assert not await asyncio.to_thread(opener.changed)


async def test_an_address_that_was_looked_up_is_checked_by_the_name_it_had(
    authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("pod", "target.arbitrage.svc")
    files = TlsFiles(authority.path, None, None, "models_tls")
    opener = ChannelOpener(16, await asyncio.to_thread(files.watched, lambda: None))
    async with serving(GENERATOR, servicer(), tls=TlsFiles(None, certificate, key)) as server:
        async with opener(server.address, "target.arbitrage.svc") as channel:
            assert await asked_on(channel) == "fake"
        async with opener(server.address) as channel:
            with pytest.raises(Unavailable):
                await asked_on(channel)


def test_an_opener_without_files_never_changes() -> None:
    assert not ChannelOpener(16).changed()


async def test_metadata_beyond_the_limit_is_refused_before_it_is_read() -> None:
    async with (
        serving(GENERATOR, servicer()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: generator_pb2_grpc.GeneratorServiceAsyncStub = (
            generator_pb2_grpc.GeneratorServiceStub(channel)
        )
        # Between gRPC's two limits it refuses by chance, so each size is tried often.
        codes = {
            size: {await code_with(stub, size) for _ in range(12)} for size in (15_000, 17_500)
        }
    assert codes == {15_000: {grpc.StatusCode.OK}, 17_500: {grpc.StatusCode.RESOURCE_EXHAUSTED}}


async def code_with(
    stub: generator_pb2_grpc.GeneratorServiceAsyncStub, size: int
) -> grpc.StatusCode:
    """Returns how a call with metadata of this many bytes ends."""
    request = generator_pb2.GetGeneratorRequest()
    return await stub.GetGenerator(request, timeout=20, metadata=(("x", "a" * size),)).code()
