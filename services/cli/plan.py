"""Says which programs make up a deployment on one machine, and with which settings. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from services.engines.pack_manifest import Pack

GENERATOR_ROLES = ("draft", "target")
MODEL_ROLES = (*GENERATOR_ROLES, "prm", "router")
ORCHESTRATOR = "orchestrator"
GATEWAY = "gateway"
REDIS = "redis"
EMBEDDED = "embedded"
DEFAULT_PORTS: Mapping[str, int] = {
    "gateway": 8080,
    "orchestrator": 50050,
    "draft": 50051,
    "target": 50052,
    "prm": 50053,
    "router": 50054,
}
ANY_PORTS: Mapping[str, int] = dict.fromkeys(DEFAULT_PORTS, 0)
_ENGINE, _HERE = "ARBITRAGE_ENGINE", "transformers"
_MODULES = {
    "draft": "services.generator",
    "target": "services.generator",
    "prm": "services.prm",
    "router": "services.router",
    "orchestrator": "services.orchestrator",
    "gateway": "services.gateway",
}


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One program to start: its name, its module, and its part of the environment."""

    name: str
    module: str
    environ: Mapping[str, str]


class Plan(Protocol):
    """Names the programs of a deployment."""

    def first_services(self) -> tuple[ServicePlan, ...]:
        """Returns the services that need nobody else."""
        ...

    def orchestrator(self, addresses: Mapping[str, str]) -> ServicePlan:
        """Returns the orchestrator, given where the others listen."""
        ...

    def last_services(self, orchestrator_address: str) -> tuple[ServicePlan, ...]:
        """Returns the services that need the orchestrator."""
        ...


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """A whole deployment. A port of 0 means any free one.

    `threads` is per model process. One is the default because a tiny model decodes as fast with
    one thread as with two, and four of them share the machine. `shutdown_grace_s` is what running
    calls get for ending, in each service. `extra` holds further variables by service name;
    `device` is torch's name of where the models run; `redis` is the URL of one, or `embedded` for
    one that is started too; `has_gateway` puts the OpenAI API in front.
    """

    pack: Pack
    ports: Mapping[str, int]
    host: str = "127.0.0.1"
    threads: int = 1
    prefix_cache_mib: int = 64
    shutdown_grace_s: float = 3.0
    extra: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    device: str = "cpu"
    redis: str | None = None
    has_gateway: bool = False

    @property
    def roles(self) -> tuple[str, ...]:
        """The models of the pack; one without a PRM or a router serves the policies it can."""
        return tuple(role for role in MODEL_ROLES if role in self.pack.models)

    def first_services(self) -> tuple[ServicePlan, ...]:
        """Returns the services that run a model, and Redis; they need nobody else."""
        models = tuple(self._service(role, self._of_model(role)) for role in self.roles)
        if self.redis != EMBEDDED:
            return models
        return (*models, ServicePlan(REDIS, "services.cli.redis_server", {}))

    def orchestrator(self, addresses: Mapping[str, str]) -> ServicePlan:
        """Returns the orchestrator, which needs the addresses of all others."""
        store_url = addresses.get(REDIS, self.redis)
        return self._service(
            ORCHESTRATOR,
            {
                **({} if store_url is None else {"ARBITRAGE_STORE_URL": store_url}),
                "ARBITRAGE_PREFIX_CACHE_MIB": str(self.prefix_cache_mib),
                **{f"ARBITRAGE_{role.upper()}_ADDRESS": addresses[role] for role in self.roles},
            },
        )

    def last_services(self, orchestrator_address: str) -> tuple[ServicePlan, ...]:
        """Returns the gateway, where there is one."""
        if not self.has_gateway:
            return ()
        own = {"ARBITRAGE_ORCHESTRATOR_ADDRESS": orchestrator_address}
        return (self._service(GATEWAY, own),)

    def _of_model(self, role: str) -> Mapping[str, str]:
        environ = {
            "ARBITRAGE_MODEL": self.pack.model_reference(role),
            "ARBITRAGE_MODEL_ID": f"{self.pack.name}/{role}",
            "ARBITRAGE_DEVICE": self.device,
            "ARBITRAGE_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
        }
        if role in GENERATOR_ROLES:
            environ["ARBITRAGE_ROLE"] = role
            environ["ARBITRAGE_ENGINE_PROMPT"] = self.pack.models[role].prompt
            if self.extra.get(role, {}).get(_ENGINE, _HERE) != _HERE:
                # Another server has the weights; how they are prompted the pack knows.
                environ["ARBITRAGE_ENGINE_TOKENIZER"] = self.pack.model_reference(role)
        return environ

    def _service(self, name: str, own: Mapping[str, str]) -> ServicePlan:
        # Metrics ports are free ones: the programs of one machine cannot share the default.
        common = {
            "ARBITRAGE_HOST": self.host,
            "ARBITRAGE_PORT": str(self.ports[name]),
            "ARBITRAGE_METRICS_PORT": "0",
            "ARBITRAGE_SHUTDOWN_GRACE_S": str(self.shutdown_grace_s),
        }
        environ = {**common, **own, **self.extra.get(name, {})}
        return ServicePlan(name, _MODULES[name], environ)
