"""`arbitrage ask`: one question, its steps streamed with who wrote each and why."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from arbitrage.calls import RequestOptions
from arbitrage.client import AsyncArbitrageClient, ClientTls
from arbitrage.core.events import Event, Finished
from arbitrage.core.limits import Budgets, Caps
from arbitrage.core.steps import Sampling, StopReason
from arbitrage.policy_specs import POLICY_NAMES, PolicySpec
from arbitrage.request import BudgetSpec, build_request
from services.cli.console import Terminal
from services.cli.deployment import services_with_progress, temporary_run_folder, usable_pack
from services.cli.failures import FAILED
from services.cli.fleet import while_alive
from services.cli.plan import ANY_PORTS, FleetPlan
from services.cli.render import StepLines, event_as_json
from services.cli.signals import run_until_signalled
from services.orchestrator.requests import RequestRules

# Those of the services that `ask` starts.
_RULES = RequestRules(Caps(), Budgets(), POLICY_NAMES)


@dataclass(frozen=True, slots=True)
class AskOptions:
    """What `ask` was asked for. Without an `address` it starts services of its own."""

    problem: str
    policy: PolicySpec
    budgets: BudgetSpec
    sampling: Sampling
    allow_degraded: bool
    timeout_s: float | None
    address: str | None
    tls: ClientTls | None
    api_key: str | None = field(repr=False)
    pack: str
    as_json: bool


def ask(options: AskOptions, terminal: Terminal) -> int:
    """Streams the solution and returns the exit code.

    Raises:
        ArbitrageError, PackError, CommandError
    """
    if options.address is not None:
        return run_until_signalled(_stream(options, options.address, terminal))
    # Bad input is told before five programs are started for it.
    _RULES.asked(
        build_request(
            options.problem, options.policy, budgets=options.budgets, sampling=options.sampling
        )
    )
    plan = FleetPlan(usable_pack(options.pack, terminal), ANY_PORTS, prefix_cache_mib=0)
    with temporary_run_folder() as folder:
        return run_until_signalled(_stream_from_own_services(options, plan, folder, terminal))


async def _stream_from_own_services(
    options: AskOptions, plan: FleetPlan, folder: Path, terminal: Terminal
) -> int:
    async with services_with_progress(plan, folder, terminal) as fleet:
        return await while_alive(fleet, _stream(options, fleet.address, terminal))


async def _stream(options: AskOptions, address: str, terminal: Terminal) -> int:
    step_lines = StepLines()
    stop_reason = StopReason.ERROR
    asked = RequestOptions(
        policy=options.policy,
        budgets=options.budgets,
        sampling=options.sampling,
        allow_degraded=options.allow_degraded,
    )
    if options.timeout_s is not None:
        asked["timeout_s"] = options.timeout_s
    client = AsyncArbitrageClient(address, tls=options.tls, api_key=options.api_key)
    async with client:
        events = client.stream(options.problem, **asked)
        async with aclosing(events):
            async for event in events:
                _show(event, step_lines, options.as_json, terminal)
                if isinstance(event, Finished):
                    stop_reason = event.stop_reason
    return FAILED if stop_reason in {StopReason.ERROR, StopReason.CANCELLED} else 0


def _show(event: Event, step_lines: StepLines, as_json: bool, terminal: Terminal) -> None:
    if as_json:
        terminal.write_json(event_as_json(event))
    else:
        for line in step_lines.lines(event):
            terminal.show(line)
