"""How well, how fast and at what share of the target does each policy solve real problems?

`python -m benchmarks.problems --dataset FILE_OR_ID --pack NAME --n 50 --json FILE` asks every
question under every policy, one request at a time, the policies taking turns, and goes on where an
earlier run was stopped: its attempts lie in FILE's `.attempts.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from arbitrage.client import AsyncArbitrageClient, Solution
from arbitrage.core.errors import ArbitrageError
from arbitrage.core.steps import Source
from arbitrage.request import BudgetSpec
from benchmarks.attempt_log import Attempt, AttemptLog
from benchmarks.fleet import running_fleet
from benchmarks.grading import is_right
from benchmarks.problem_claims import arms, claims, rows
from benchmarks.problem_sets import Question, load_questions, sample
from benchmarks.results import Result
from services.cli.arguments import ServiceSetting, service_setting
from services.cli.demo import LabelledPolicy, labelled_policies
from services.cli.failures import BadInput, CommandError
from services.engines.pack_manifest import PackError
from services.engines.packs import find_pack

INSTRUCTION = "Reason step by step, and put the final answer within \\boxed{}."
# Policies that need no judge, so that any pair runs them.
POLICIES = (
    "draft_only,target_only,random:0.25,random:0.5,random:0.75,"
    "first_token_entropy:0.5,first_token_entropy:0.8,first_token_entropy:1.1"
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: who is asked what, and what bounds a solution."""

    policies: tuple[LabelledPolicy, ...]
    questions: tuple[Question, ...]
    instruction: str
    max_tokens: int
    max_step_tokens: int
    timeout_s: float

    def prompt(self, question: Question) -> str:
        """Returns what is asked."""
        return f"{question.text}\n\n{self.instruction}" if self.instruction else question.text


async def attempt(
    client: AsyncArbitrageClient, run: Run, question: Question, policy: LabelledPolicy
) -> Attempt:
    """Asks one question under one policy."""
    began_s = time.perf_counter()
    solution = await client.solve(
        run.prompt(question),
        policy=policy.policy,
        budgets=BudgetSpec(max_tokens=run.max_tokens, max_step_tokens=run.max_step_tokens),
        timeout_s=run.timeout_s,
    )
    seconds = time.perf_counter() - began_s
    return _attempt_of(solution, question, policy.label, seconds)


def _attempt_of(solution: Solution, question: Question, arm: str, seconds: float) -> Attempt:
    by_target = [step for step in solution.steps if step.step.source is Source.TARGET]
    return Attempt(
        question_id=question.question_id,
        arm=arm,
        is_right=is_right(solution.text, question.answer),
        seconds=round(seconds, 3),
        steps=len(solution.steps),
        target_steps=len(by_target),
        tokens=sum(step.token_count for step in solution.steps),
        target_tokens=sum(step.token_count for step in by_target),
        stop_reason=solution.stop_reason.value,
        text=solution.text,
    )


async def ask_all(run: Run, log: AttemptLog, address: str, stopping: asyncio.Event) -> None:
    """Makes every attempt that the log has not, until it is told to stop between two of them.

    The policies take turns in their order too: what a model keeps of a prefix helps whoever comes
    after.
    """
    total = len(run.questions) * len(run.policies)
    async with AsyncArbitrageClient(address) as client:
        for number, question in enumerate(run.questions):
            shift = number % len(run.policies)
            for policy in (*run.policies[shift:], *run.policies[:shift]):
                if (question.question_id, policy.label) in log.attempts:
                    continue
                if stopping.is_set():
                    return
                made = await attempt(client, run, question, policy)
                log.add(made)
                verdict = "right" if made.is_right else "wrong"
                count = len(_attempts_of(run, log))
                print(
                    f"{count}/{total} {policy.label}: {verdict}, {made.seconds:.1f} s, "
                    f"{made.target_steps} of {made.steps} steps by the target, {made.stop_reason}",
                    flush=True,
                )


async def measured(options: argparse.Namespace, run: Run, log: AttemptLog) -> bool:
    """Starts the services and asks; whether everything was asked."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    pack = find_pack(options.pack)
    extra = _by_service(options.set)
    async with running_fleet(pack, options.device, extra=extra, threads=options.threads) as fleet:
        await ask_all(run, log, fleet.addresses["orchestrator"], stopping)
    return len(_attempts_of(run, log)) == len(run.questions) * len(run.policies)


def _attempts_of(run: Run, log: AttemptLog) -> list[Attempt]:
    """Returns those of a run; the log may hold more, of other policies and questions."""
    wanted = {(q.question_id, policy.label) for q in run.questions for policy in run.policies}
    return [made for key, made in log.attempts.items() if key in wanted]


def _by_service(settings: Sequence[ServiceSetting]) -> Mapping[str, Mapping[str, str]]:
    extra: dict[str, dict[str, str]] = {}
    for setting in settings:
        extra.setdefault(setting.name, {})[setting.variable] = setting.value
    return extra


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help=".jsonl file, known name or datasets id")
    parser.add_argument("--pack", default="tiny", help="model pack (%(default)s)")
    parser.add_argument("--policies", default=POLICIES, help="as of arbitrage demo (%(default)s)")
    parser.add_argument("--n", type=int, default=50, help="questions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument(
        "--instruction",
        default=INSTRUCTION,
        help="put behind each question; '' for models that know no other text, as of tiny",
    )
    parser.add_argument("--max-tokens", type=int, default=400, help="of a solution (%(default)s)")
    parser.add_argument("--max-step-tokens", type=int, default=256, help="of a step (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of a request")
    parser.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a model (%(default)s)")
    parser.add_argument(
        "--set",
        type=service_setting,
        action="append",
        default=[],
        help="SERVICE.SETTING=VALUE, such as draft.engine_url=http://gpu:8000/v1; may be repeated",
    )
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Runs the command line; 3 where it was stopped before the end."""
    options = options_of(arguments)
    try:
        questions = sample(load_questions(options.dataset), options.n, options.seed)
        run = Run(
            labelled_policies(options.policies),
            questions,
            options.instruction,
            options.max_tokens,
            options.max_step_tokens,
            options.timeout,
        )
        log = AttemptLog(options.json.with_suffix(".attempts.jsonl"), _identity(options))
        is_whole = asyncio.run(measured(options, run, log))
    except (CommandError, PackError, ArbitrageError) as error:
        for line in getattr(error, "details", ()):
            print(line, file=sys.stderr)
        print(f"problems: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput | PackError) else 1
    if not is_whole:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 3
    labels = [policy.label for policy in run.policies]
    attempts = _attempts_of(run, log)
    result = Result(
        options.json.stem,
        (options.seed,),
        claims(labels, attempts, len(questions)),
        rows(options),
        arms(labels, attempts),
        command=" ".join(["python -m benchmarks.problems", *arguments]),
    )
    result.print_claims()
    for arm in result.arms:
        print(arm)
    result.write(options.json)
    return 0


def _identity(options: argparse.Namespace) -> Mapping[str, object]:
    """What two runs must have in common for one to go on with the other's attempts.

    Not the policies and the number of questions: more of either only adds attempts.
    """
    names = ("pack", "seed", "instruction", "max_tokens", "max_step_tokens", "device", "threads")
    return {
        "dataset": Path(options.dataset).name,
        **{name: getattr(options, name) for name in names},
        "settings": [f"{s.name}.{s.variable}={s.value}" for s in sorted(options.set)],
    }


if __name__ == "__main__":
    sys.exit(main())
