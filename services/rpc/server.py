"""A gRPC server as every program of this product runs one: health, reflection, gate, drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from arbitrage.channels import is_loopback
from services.rpc.auth import Anyone, Authenticator
from services.rpc.gate import FLUSH_GRACE_S, Gate
from services.rpc.handlers import ServiceHandlers
from services.rpc.settings import ServerSettings
from services.rpc.telemetry import Telemetry
from services.rpc.tls import TlsFiles, server_credentials, server_files

_log = logging.getLogger(__name__)
_MIB = 1 << 20
# Room for a key and for trace context; beyond its soft limit gRPC would refuse by chance.
_MAX_METADATA_BYTES = 16 << 10
_LEAST_PING_INTERVAL_MS = 1_000


class PortTaken(Exception):
    """Nobody can listen at this address, most likely because another program does."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where and how a server listens. Port 0 takes a free one.

    A caller that takes no message for `write_timeout_s` seconds loses its call. Without `tls`
    everything is plaintext. After `connection_age_s` seconds a caller is asked to connect anew;
    calls under way end where they are.
    """

    host: str
    port: int
    max_message_mib: int = 16
    write_timeout_s: float = 30.0
    tls: TlsFiles | None = None
    connection_age_s: float | None = None


class RpcServer:
    """Serves one proto service.

    It listens from `start` on, but refuses calls and is NOT_SERVING until `open`; `drain` goes
    back to that and lets the calls inside end.
    """

    def __init__(
        self, service: ServiceDescriptor, listener: Listener, telemetry: Telemetry
    ) -> None:
        self.gate = Gate()
        self._service = service
        self._listener = listener
        self._handlers = ServiceHandlers(
            service, self.gate, telemetry.rpc, telemetry.refusals, listener.write_timeout_s
        )
        self._telemetry = telemetry
        self._health = telemetry.health
        size = listener.max_message_mib * _MIB
        self._server = grpc.aio.server(
            options=(
                # By default a second server binds a taken port in silence and gets half the calls.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
                ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
                # Callers ask whether the server is there (`open_channel`), also between calls; by
                # default that is once in five minutes, and who asks more often is cut off.
                ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_INTERVAL_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                *_aging(listener.connection_age_s),
            )
        )
        self._server.add_generic_rpc_handlers((self._handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (service.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = 0

    @property
    def address(self) -> str:
        """Where a program on this machine reaches the server."""
        return local_address(self._listener.host, self.port)

    async def start(self) -> None:
        """Begins to listen.

        Raises:
            PortTaken, TlsError
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = _address(self._listener.host, self._listener.port)
        credentials = await self._credentials()
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise PortTaken(address) from error
        await self._server.start()

    async def open(self, servicer: object, authenticator: Authenticator | None = None) -> None:
        """Lets calls in that `authenticator` lets in, by default all, answered by `servicer`."""
        self._handlers.install(servicer, authenticator or Anyone())
        self.gate.open()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, grace_s: float) -> None:
        """Refuses new calls, says so to health checks, and lets running calls end.

        Those that have not ended after the grace end with `NotServing`. What they run on may be
        taken down after that.
        """
        await self._health.enter_graceful_shutdown()
        await self.gate.drain(grace_s)

    async def stop(self) -> None:
        """Stops listening and cancels what still runs, health watchers included."""
        await self._server.stop(FLUSH_GRACE_S)
        await self.gate.wait_until_empty(FLUSH_GRACE_S)

    async def _credentials(self) -> grpc.ServerCredentials | None:
        tls, host = self._listener.tls, self._listener.host
        if tls is not None:
            on_failure = self._telemetry.failed_reloads.of("tls")
            return server_credentials(await asyncio.to_thread(tls.watched, on_failure))
        if not is_loopback(_address(host, 0)):
            _log.warning(
                "listening on %s in plaintext: anyone on the way can read and change calls; set "
                "ARBITRAGE_TLS_CERTIFICATE and ARBITRAGE_TLS_KEY",
                host,
            )
        return None

    async def _set_health(
        self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType
    ) -> None:
        for name in ("", self._service.full_name):
            await self._health.set(name, status)


def rpc_server(service: ServiceDescriptor) -> Callable[[ServerSettings, Telemetry], RpcServer]:
    """Returns what makes the server of a service as its settings say."""

    def made(settings: ServerSettings, telemetry: Telemetry) -> RpcServer:
        listener = Listener(
            settings.host,
            settings.port,
            settings.max_message_mib,
            settings.write_timeout_s,
            server_files(settings),
            settings.connection_age_s,
        )
        return RpcServer(service, listener, telemetry)

    return made


def local_address(host: str, port: int) -> str:
    """Returns where a program on this machine reaches what listens on `host`."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared
    return _address(reachable, port)


def _aging(age_s: float | None) -> tuple[tuple[str, int], ...]:
    return () if age_s is None else (("grpc.max_connection_age_ms", round(1e3 * age_s)),)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
