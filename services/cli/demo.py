"""`arbitrage demo`: the shipped models on held-out problems, policy beside policy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from arbitrage.calls import solution_of
from arbitrage.client import AsyncArbitrageClient
from arbitrage.core.events import Event, StepCommitted
from arbitrage.core.steps import StopReason
from arbitrage.policy_specs import Arbitrage, PolicyOptions, PolicySpec, policy_named
from arbitrage.request import BudgetSpec
from services.cli.console import Terminal
from services.cli.deployment import services_with_progress, temporary_run_folder, usable_pack
from services.cli.failures import BadInput, CommandError
from services.cli.fleet import while_alive
from services.cli.plan import ANY_PORTS, FleetPlan
from services.cli.problems import BundledProblem, bundled_problems, is_solved
from services.cli.render import StepLines
from services.cli.signals import run_until_signalled
from services.cli.summary import PolicyRun, PolicySummary, summary_table

_SHOWN_PROBLEMS = 3
_MOST_REQUEST_S = 20.0
_LEAST_REQUEST_S = 0.5


@dataclass(frozen=True, slots=True)
class LabelledPolicy:
    """A policy and the name it goes by in the demo's results."""

    label: str
    policy: PolicySpec


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What `demo` was asked for. `time_limit_s` bounds the whole, the start included."""

    pack: str
    problem_count: int
    policies: tuple[LabelledPolicy, ...]
    time_limit_s: float
    as_json: bool


def labelled_policies(listed: str) -> tuple[LabelledPolicy, ...]:
    """Returns the policies of a list such as `draft_only,random:0.3`, each labelled as written.

    Raises:
        BadInput, PolicyUnknown, FieldInvalid
    """
    policies: list[LabelledPolicy] = []
    for entry in listed.split(","):
        label = entry.strip()
        name, colon, number = label.partition(":")
        try:
            threshold = float(number) if colon else None
        except ValueError:
            raise BadInput(f"--policies: expected NAME:NUMBER, got {label!r}") from None
        if label in {policy.label for policy in policies}:
            raise BadInput(f"--policies: {label!r} is there twice; give it once")
        policies.append(LabelledPolicy(label, policy_named(name, PolicyOptions(threshold))))
    return tuple(policies)


def demo(options: DemoOptions, terminal: Terminal) -> int:
    """Starts everything, solves problems under each policy, shows what it cost, and stops.

    Raises:
        PackError, ArbitrageError, CommandError
    """
    started_s = time.monotonic()
    pack = usable_pack(options.pack, terminal)
    problems = bundled_problems(pack, options.problem_count)
    # No prefix cache: a policy must not be quick because another has asked the same before.
    plan = FleetPlan(pack, ANY_PORTS, prefix_cache_mib=0)
    comparison = _Comparison(options, terminal, started_s)
    with temporary_run_folder() as folder:
        return run_until_signalled(_compare(comparison, problems, plan, folder, terminal))


async def _compare(
    comparison: _Comparison,
    problems: Sequence[BundledProblem],
    plan: FleetPlan,
    folder: Path,
    terminal: Terminal,
) -> int:
    async with services_with_progress(
        plan, folder, terminal, start_timeout_s=comparison.time_limit_s
    ) as fleet:
        await while_alive(fleet, comparison.run(problems, fleet.address))
    comparison.report(plan.pack.name)
    return 0


class _Comparison:
    """The runs of a demo: every problem under every policy, one request at a time."""

    def __init__(self, options: DemoOptions, terminal: Terminal, started_s: float) -> None:
        self.time_limit_s = options.time_limit_s
        self._options = options
        self._terminal = terminal
        self._started_s = started_s
        self._deadline_s = started_s + options.time_limit_s
        self._first_step_s: float | None = None
        self._runs: dict[str, list[PolicyRun]] = {entry.label: [] for entry in options.policies}

    async def run(self, problems: Sequence[BundledProblem], address: str) -> None:
        """Solves the first problems before the viewer's eyes and the others behind a progress bar.

        Raises:
            CommandError: the time was over before one problem was through.
        """
        shown_count = 0 if self._options.as_json else _SHOWN_PROBLEMS
        async with AsyncArbitrageClient(address) as client:
            if await self._show_first(client, problems[:shown_count]):
                await self._solve_rest(client, problems, shown_count)
        done_count = len(self._runs[self._options.policies[0].label])
        limit_s = self._options.time_limit_s
        if done_count == 0:
            raise CommandError(
                f"no problem was through within {limit_s:g} s; give more with --time-limit"
            )
        if done_count < len(problems):
            self._terminal.note(
                f"{limit_s:g} s were over after {done_count} of {len(problems)} problems"
            )

    def report(self, pack_name: str) -> None:
        """Shows the closing table, or writes the one JSON object."""
        summaries = [PolicySummary(label, tuple(runs)) for label, runs in self._runs.items()]
        elapsed_s = time.monotonic() - self._started_s
        if self._options.as_json:
            content = {
                "pack": pack_name,
                "policies": {summary.label: summary.as_dict() for summary in summaries},
                "first_step_s": self._first_step_s,
                "elapsed_s": elapsed_s,
            }
            self._terminal.write_json(json.dumps(content))
            return
        self._terminal.show("")
        self._terminal.show(summary_table(summaries))
        first = (
            "" if self._first_step_s is None else f"first step after {self._first_step_s:.1f} s, "
        )
        self._terminal.show(Text(f"{first}{elapsed_s:.1f} s in all", "dim"))

    async def _show_first(
        self, client: AsyncArbitrageClient, problems: Sequence[BundledProblem]
    ) -> bool:
        for index, problem in enumerate(problems):
            self._terminal.show(Text(f"\n{problem.text}", "bold"))
            if not await self._round(client, index, problem, is_shown=True):
                return False
        return True

    async def _solve_rest(
        self, client: AsyncArbitrageClient, problems: Sequence[BundledProblem], first: int
    ) -> None:
        rest = problems[first:]
        with self._terminal.progress("Comparing policies", len(rest)) as advance:
            for index, problem in enumerate(rest, first):
                if not await self._round(client, index, problem, is_shown=False):
                    return
                done = index + 1
                advance(1, f"{done} of {len(problems)} problems" if done % 10 == 0 else "")

    async def _round(
        self, client: AsyncArbitrageClient, index: int, problem: BundledProblem, *, is_shown: bool
    ) -> bool:
        """Solves one problem under every policy; False, and no trace, where time ran out in it.

        Who comes first changes with the problem, beginning with the policy named last: the models
        keep what they have read of it, which makes it a little cheaper for whoever comes later.
        """
        policies = self._options.policies
        shift = -(index + 1) % len(policies)
        runs: dict[str, PolicyRun] = {}
        for entry in policies[shift:] + policies[:shift]:
            left_s = self._deadline_s - time.monotonic()
            if left_s < _LEAST_REQUEST_S:
                return False
            is_visible = is_shown and isinstance(entry.policy, Arbitrage)
            run = await self._solve(client, entry.policy, problem, left_s, is_visible=is_visible)
            is_cut = run.solution.stop_reason is StopReason.DEADLINE
            if is_cut and left_s < _MOST_REQUEST_S:
                return False
            runs[entry.label] = run
        for label, run in runs.items():
            self._runs[label].append(run)
        return True

    async def _solve(
        self,
        client: AsyncArbitrageClient,
        policy: PolicySpec,
        problem: BundledProblem,
        left_s: float,
        *,
        is_visible: bool,
    ) -> PolicyRun:
        step_lines = StepLines()
        events: list[Event] = []
        budgets = BudgetSpec(time_limit_s=min(left_s, _MOST_REQUEST_S))
        asked_s = time.monotonic()
        async with aclosing(client.stream(problem.text, policy=policy, budgets=budgets)) as stream:
            async for event in stream:
                if isinstance(event, StepCommitted) and self._first_step_s is None:
                    self._first_step_s = time.monotonic() - self._started_s
                if is_visible:
                    for line in step_lines.lines(event):
                        self._terminal.show(line)
                events.append(event)
        latency_s = time.monotonic() - asked_s
        solution = solution_of(events)
        run = PolicyRun(is_solved(solution.text, problem.answer), latency_s, solution)
        if is_visible:
            self._terminal.show(_verdict_line(run, problem))
        return run


def _verdict_line(run: PolicyRun, problem: BundledProblem) -> Text:
    if run.is_solved:
        return Text("     right", "green")
    return Text(f"     wrong: the answer is {problem.answer}", "red")
