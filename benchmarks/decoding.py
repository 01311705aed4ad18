"""What does the service add to the bare model? `python -m benchmarks.decoding --json FILE`.

Ratios, each of two things measured in turn within one run, medians over rounds:

1. the draft's time for a step at 2,000 prefix tokens over that at 200 (same step length);
2. time per token through the service over that of a bare, hand-driven KV-cache loop on the same
   model in this process, for whole steps with all that a call costs, and for each further token;
3. tokens per second of eight concurrent requests over those of one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from arbitrage.v1 import generator_pb2, generator_pb2_grpc, trajectory_pb2
from benchmarks.fleet import Fleet, running_fleet
from benchmarks.results import Bar, Claim, Result, bootstrap
from services.engines.pack_manifest import PROBLEMS_NAME, Pack

MOST_STEP_TOKENS = 64
STEP_TOKENS = 12  # below the length of any step of the domain, so that none ends early
FEW_TOKENS = 2
SEED = 20261123
MOST_GROWTH = 1.3
MOST_OVERHEAD = 1.15
LEAST_SPEEDUP = 2.5
CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Prefix:
    """A problem with steps behind it, as the service is asked to continue it."""

    problem: str
    steps: tuple[str, ...]

    def request(self, max_tokens: int) -> generator_pb2.GenerateStepRequest:
        """Asks for the next step."""
        return generator_pb2.GenerateStepRequest(
            problem=self.problem,
            steps=[
                trajectory_pb2.Step(
                    text=text,
                    source=trajectory_pb2.SOURCE_DRAFT,
                    stop_reason=trajectory_pb2.STOP_REASON_SEPARATOR,
                )
                for text in self.steps
            ],
            max_tokens=max_tokens,
        )

    def pieces(self) -> list[str]:
        """Returns the prompt as the service tokenises it."""
        closed = [piece for text in self.steps for piece in (text, "\n\n")]
        return [self.problem + "\n", *closed]


def load_prefixes(pack: Pack, count: int) -> list[Prefix]:
    """Returns bundled problems with their solutions up to the step before the last two."""
    rows = [json.loads(line) for line in (pack.folder / PROBLEMS_NAME).read_text().splitlines()]
    prefixes = [Prefix(row["problem"], tuple(row["steps"][:-2])) for row in rows]
    return [prefix for prefix in prefixes if prefix.steps][:count]


def token_count(tokenizer: object, prefix: Prefix) -> int:
    """Returns the length of the prompt in tokens."""
    return len(_ids(tokenizer, prefix))


def _ids(tokenizer: object, prefix: Prefix) -> list[int]:
    encode = tokenizer.encode  # type: ignore[attr-defined]
    return [i for piece in prefix.pieces() for i in encode(piece, add_special_tokens=False)]


def prefix_of_length(tokenizer: object, prefix: Prefix, tokens: int) -> Prefix:
    """Returns `prefix` with its steps repeated until the prompt is `tokens` long or just above."""
    steps: tuple[str, ...] = ()
    while token_count(tokenizer, Prefix(prefix.problem, steps)) < tokens:
        steps = (*steps, prefix.steps[len(steps) % len(prefix.steps)])
    return Prefix(prefix.problem, steps)


class Service:
    """One generator service over real gRPC, asked one step at a time."""

    def __init__(self, address: str) -> None:
        self._stub = generator_pb2_grpc.GeneratorServiceStub(grpc.insecure_channel(address))

    def step(
        self, prefix: Prefix, max_tokens: int = STEP_TOKENS
    ) -> tuple[generator_pb2.GeneratedStep, float]:
        """Returns the step and the seconds it took at the client."""
        started = time.perf_counter()
        (last,) = list(self._stub.GenerateStep(prefix.request(max_tokens), timeout=60.0))
        return last.result, time.perf_counter() - started


class BareLoop:
    """The same model driven by hand: one forward per token, argmax, nothing else."""

    def __init__(self, folder: Path) -> None:
        # `from_pretrained` hands the model over in evaluation mode.
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.cache = DynamicCache()
        self.prompt = torch.empty(1, 0, dtype=torch.long)

    @torch.inference_mode()
    def prefill(self, prefix: Prefix) -> None:
        """Computes the prompt but for its last token."""
        self.prompt = torch.tensor([_ids(self.tokenizer, prefix)])
        self.cache = DynamicCache()
        self.model(self.prompt[:, :-1], past_key_values=self.cache, use_cache=True)

    @torch.inference_mode()
    def decode(self, token_count: int) -> float:
        """Returns the seconds that `token_count` greedy tokens take."""
        started = time.perf_counter()
        token = self.prompt[:, -1:]
        for _ in range(token_count):
            logits = self.model(token, past_key_values=self.cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            int(token)  # whoever drives it by hand has to look at the token too
        elapsed = time.perf_counter() - started
        self.cache.crop(-token_count)  # as many as were fed
        return elapsed


def is_full_length(service: Service, prefix: Prefix) -> bool:
    """Whether the step after `prefix` is as long as measured; asking also warms the cache."""
    return service.step(prefix)[0].token_count == STEP_TOKENS


def measure_growth(
    service: Service, tokenizer: object, prefixes: Sequence[Prefix], rounds: int
) -> list[float]:
    """Returns the step times at 2,000 over those at 200 prefix tokens, a ratio per round."""
    for prefix in prefixes:
        short, long = (prefix_of_length(tokenizer, prefix, tokens) for tokens in (200, 2000))
        if is_full_length(service, short) and is_full_length(service, long):
            break
    else:
        raise SystemExit(f"no bundled problem gives steps of {STEP_TOKENS} tokens at both lengths")
    ratios = []
    for _ in range(rounds):
        (_, short_s), (step, long_s) = service.step(short), service.step(long)
        assert step.prefill_token_count == 1, step
        ratios.append(long_s / short_s)
    return ratios


def measure_overhead(
    service: Service, bare: BareLoop, prefixes: Sequence[Prefix]
) -> tuple[list[float], float]:
    """Returns service over bare seconds per token, a ratio per prefix, and bare tokens/s."""
    ratios, bare_rates = [], []
    for prefix in prefixes:
        step, _ = service.step(prefix, MOST_STEP_TOKENS)
        bare.prefill(prefix)
        bare.decode(step.token_count)
        _, through_s = service.step(prefix, MOST_STEP_TOKENS)
        alone_s = bare.decode(step.token_count)
        ratios.append(through_s / alone_s)
        bare_rates.append(step.token_count / alone_s)
    return ratios, statistics.median(bare_rates)


def measure_further_tokens(
    service: Service, bare: BareLoop, prefixes: Sequence[Prefix]
) -> list[float]:
    """Returns service over bare seconds for the tokens after the first few, a ratio per prefix."""
    ratios = []
    for prefix in prefixes:
        if not is_full_length(service, prefix):
            continue
        bare.prefill(prefix)
        bare.decode(STEP_TOKENS)
        (_, few_s), (_, all_s) = service.step(prefix, FEW_TOKENS), service.step(prefix)
        ratios.append((all_s - few_s) / (bare.decode(STEP_TOKENS) - bare.decode(FEW_TOKENS)))
    return ratios


async def measure_concurrency(address: str, prefixes: Sequence[Prefix], rounds: int) -> list[float]:
    """Returns concurrent over serial tokens per second, a ratio per round of eight requests."""
    ratios = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)

        async def step(prefix: Prefix) -> int:
            last = [m async for m in stub.GenerateStep(prefix.request(STEP_TOKENS), timeout=60.0)][
                -1
            ]
            return int(last.result.token_count)

        for prefix in prefixes[:CONCURRENCY]:
            await step(prefix)
        for _ in range(rounds):
            started = time.perf_counter()
            serial = sum([await step(prefix) for prefix in prefixes[:CONCURRENCY]])
            serial_s = time.perf_counter() - started
            started = time.perf_counter()
            together = sum(await asyncio.gather(*map(step, prefixes[:CONCURRENCY])))
            together_s = time.perf_counter() - started
            assert serial == together
            ratios.append(serial_s / together_s)
    return ratios


def measure(fleet: Fleet, rounds: int) -> Result:
    """Measures all ratios on the running services."""
    claims: list[Claim] = []

    def claim(name: str, ratios: list[float], bar: Bar, how: str) -> None:
        values = np.array(ratios)
        interval = bootstrap(len(values), lambda drawn: float(np.median(values[drawn])), SEED)
        how = f"{how}; median of the rounds' ratios, bootstrap over rounds"
        claims.append(Claim(name, float(np.median(values)), "×", how, len(values), bar, interval))

    prefixes = load_prefixes(fleet.pack, rounds)
    for role in ("draft", "target"):
        address, bare = fleet.addresses[role], BareLoop(Path(fleet.pack.model_reference(role)))
        service = Service(address)
        if role == "draft":
            claim(
                "draft's step time at 2,000 prefix tokens over 200",
                measure_growth(service, bare.tokenizer, prefixes, rounds),
                Bar("at most", MOST_GROWTH),
                f"{STEP_TOKENS}-token steps in turn, over gRPC",
            )
        ratios, bare_rate = measure_overhead(service, bare, prefixes)
        claim(
            f"{role}: time per token through the service over a bare loop",
            ratios,
            Bar("at most", MOST_OVERHEAD),
            f"whole steps at batch 1, in turn; the bare loop makes {bare_rate:.0f} tokens/s",
        )
        claim(
            f"{role}: time of each further token through the service over a bare loop",
            measure_further_tokens(service, bare, prefixes),
            Bar("at most", MOST_OVERHEAD),
            f"from token {FEW_TOKENS} to {STEP_TOKENS} of a step at batch 1, in turn: what is left "
            "of the ratio without what one call costs, however long the step",
        )
        claim(
            f"{role}: tokens per second of {CONCURRENCY} concurrent requests over one",
            asyncio.run(measure_concurrency(address, prefixes, max(10, rounds // 3))),
            Bar("at least", LEAST_SPEEDUP),
            "the same requests serially and together, in turn",
        )
    return Result("decoding", (SEED,), tuple(claims))


async def run(rounds: int) -> Result:
    """Starts the system, measures it from a thread of its own, and stops it."""
    async with running_fleet() as fleet:
        return await asyncio.to_thread(measure, fleet, rounds)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--rounds", type=int, default=60, help="how many times each is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the services run
    result = asyncio.run(run(arguments.rounds))
    result.print_claims()
    if arguments.json:
        result.write(arguments.json)


if __name__ == "__main__":
    main()
