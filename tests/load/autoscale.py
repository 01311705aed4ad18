"""Does the target pool follow the load by itself?

`python -m tests.load.autoscale --json FILE --plot FILE`: real services, a real Prometheus, the
query and the behaviour of the rendered chart, and the HorizontalPodAutoscaler's algorithm starting
and stopping real targets. The load goes 1x, 5x, 1x; at the peak Prometheus is away for a while.
Then the same wave under a rule that goes by the target's CPU. Some 15 minutes; loopback only. What
it needs, `python -m tests.charts.tools` fetches.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.results import Bar, Claim, Result
from services.cli.problems import bundled_problems
from services.engines.packs import find_pack
from tests.charts.prometheus import Prometheus
from tests.charts.rendering import Object, of_kind, rendered
from tests.load.autoscale_plot import draw
from tests.load.autoscaled import ByCpu, ByQueries, Pool, Rule, autoscale
from tests.load.horizontal_autoscaler import SYNC_S, HorizontalAutoscaler
from tests.load.processes import deployed
from tests.load.wave import Wave

_VALUES: Final[dict[str, Any]] = {
    "target": {
        "autoscaling": {
            "mode": "keda",
            "maxReplicas": 4,
            "loadPerReplica": 6,
            "keda": {"serverAddress": "http://prometheus:9090"},
        }
    },
    "metrics": {"serviceMonitor": {"enabled": True}},
}
_USERS: Final = 4
_CALM_LOOKS: Final = 3
_PEAK_LOOKS: Final = 6
# More than the fallback's threshold: Prometheus is taken for gone.
_BLIND_LOOKS: Final = 5
_LONGEST_S: Final = 900.0

BY_DEMAND: Final = "by demand"
BY_CPU: Final = "by CPU"


@asynccontextmanager
async def running(folder: Path, interval: str) -> AsyncIterator[Pool]:
    """Runs the tiny pack with one target, and Prometheus; three more targets are there to start."""
    async with deployed(
        folder,
        targets=4,
        settings={"prefix_cache_mib": "0"},
        target_settings={"max_batch": "6"},
    ) as deployment:
        prometheus = Prometheus(folder, interval)
        pool = Pool(deployment, prometheus)
        pool.adopt(deployment.named("target"))
        pool.resize(1)
        await pool.settled()
        try:
            await prometheus.start()
            yield pool
        finally:
            await prometheus.stop()


async def under(name: str, rule: Rule, pool: Pool, scaler: HorizontalAutoscaler) -> Wave:
    """Lets a wave run under a rule and returns what was seen.

    Under ours Prometheus is away for a while at the peak, and the wave goes on until one replica is
    left; under the other the rise is all that is wanted.
    """
    print(f"{name}:", flush=True)
    problems = [problem.text for problem in bundled_problems(find_pack("tiny"), 500)]
    wave = Wave(name, pool.deployment.addresses, problems)
    wave.users(_USERS, "1x")
    try:
        async with asyncio.TaskGroup() as group:
            scaling = group.create_task(autoscale(pool, rule, scaler, wave.saw))
            await risen_and_fallen(wave, pool)
            scaling.cancel()
    finally:
        await wave.over()
        await pool.settled()
    return wave


async def risen_and_fallen(wave: Wave, pool: Pool) -> None:
    """Changes the load, and Prometheus, in the rhythm of the autoscaler's looks."""
    # It rises right after a look: nobody can react later.
    await wave.looked(_CALM_LOOKS)
    wave.users(5 * _USERS, "5x")
    await wave.looked(_PEAK_LOOKS)
    if wave.rule == BY_CPU:
        return
    await pool.prometheus.stop()
    wave.mark("Prometheus away")
    await wave.looked(_BLIND_LOOKS)
    await pool.prometheus.start()
    wave.mark("Prometheus back")
    await wave.looked(2)
    wave.users(_USERS, "1x again")
    async with asyncio.timeout(_LONGEST_S):
        while len(pool.running) > 1:
            await wave.looked()
    await wave.looked(2)


def turns(replicas: Sequence[int]) -> int:
    """Returns how often the number changed its direction.

    >>> turns([1, 1, 4, 4, 3, 2, 1])
    1
    """
    changes = [after - before for before, after in itertools.pairwise(replicas) if after != before]
    return sum((one > 0) != (two > 0) for one, two in itertools.pairwise(changes))


def claims_of(ours: Wave, cpu: Wave, pool: Pool, objects: Sequence[Object]) -> tuple[Claim, ...]:
    """Returns what was to be shown."""
    replicas = [look.replicas for look in ours.looks]
    looks, most = len(replicas), max(replicas)
    away, back = (ours.began_s + ours.marks_s[f"Prometheus {what}"] for what in ("away", "back"))
    taken = [look.before - look.replicas for look in ours.looks if away < look.at_s < back]
    errors = [one.error for wave in (ours, cpu) for one in wave.solved if one.error]
    for error in errors:
        print(f"  failed: {error}")
    count = len(ours.solved) + len(cpu.solved)
    scaled = of_kind(list(objects), "ScaledObject")
    compared = (
        f"ours after {ours.seconds_to(most):.0f} s; by CPU as many after "
        f"{cpu.seconds_to(most):.0f} s, one more than before after {cpu.seconds_to_more():.0f} s"
    )
    # One that had not got there when the wave was over got there then at the soonest.
    cpu_s = min(cpu.seconds_to(most), _PEAK_LOOKS * SYNC_S)
    return (
        Claim("replicas before the wave", ours.looks[_CALM_LOOKS - 1].replicas, "replicas",
              "the look before it", looks, Bar("at most", 1)),
        Claim("replicas in the wave", most, "replicas", "the most", looks, Bar("at least", 3)),
        Claim("replicas after the wave", replicas[-1], "replicas", "the last look", looks,
              Bar("at most", 1)),
        Claim("turns of the number of replicas", turns(replicas), "turns",
              "up and down once is one", looks, Bar("at most", 1)),
        Claim("components that scale", len(scaled), "components", "rendered ScaledObjects",
              len(objects), Bar("at most", 1)),
        Claim("requests that failed", len(errors), "requests", "client errors, both waves", count,
              Bar("at most", 0)),
        Claim("targets that ended with another exit code than 0",
              sum(code != 0 for code in pool.exit_codes), "targets", "SIGTERM under load",
              len(pool.exit_codes), Bar("at most", 0)),
        Claim("replicas taken while Prometheus was away", sum(taken), "replicas",
              "stopped at the peak", len(taken), Bar("at most", 0)),
        Claim("from the wave to the first replica more, ours", ours.seconds_to_more(), "s",
              f"the autoscaler looks every {SYNC_S:g} s", 1, Bar("at most", 2 * SYNC_S)),
        Claim("sooner than the CPU rule: from the wave to all replicas that it took",
              cpu_s - ours.seconds_to(most), "s",
              compared, 1,
              Bar("above", 0)),
    )  # fmt: skip


async def measured(plot: Path | None) -> Result:
    """Runs both waves and returns what they came to."""
    objects = rendered(_VALUES)
    spec: Mapping[str, Any] = of_kind(objects, "ScaledObject")["try-arbitrage-target"]["spec"]
    monitor = of_kind(objects, "ServiceMonitor")["try-arbitrage-target"]["spec"]
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]

    def scaler() -> HorizontalAutoscaler:
        return HorizontalAutoscaler(behavior, spec["minReplicaCount"], spec["maxReplicaCount"])

    with tempfile.TemporaryDirectory(prefix="arbitrage-autoscale-") as name:
        async with running(Path(name), monitor["endpoints"][0]["interval"]) as pool:
            ours = await under(BY_DEMAND, ByQueries(pool.prometheus, spec), pool, scaler())
            pool.resize(1)
            await pool.settled()
            # A GPU's pod asks for cores that it leaves idle; a target here computes on its one.
            by_cpu = ByCpu(wanted=0.8, requested_cores=1.0)
            cpu = await under(BY_CPU, by_cpu, pool, scaler())
    if plot is not None:
        draw(plot, ours, cpu)
    rows: tuple[dict[str, object], ...] = tuple(
        {
            "rule": wave.rule,
            "at_s": round(look.at_s - wave.began_s, 1),
            **{name: None if v is None else round(v, 3) for name, v in look.values.items()},
            "wished": look.wished,
            "replicas": look.replicas,
            "ready": look.ready,
        }
        for wave in (ours, cpu)
        for look in wave.looks
    )
    command = " ".join(["python -m tests.load.autoscale", *sys.argv[1:]])
    arms = (*ours.latencies(), *cpu.latencies())
    return Result("autoscale", (), claims_of(ours, cpu, pool, objects), rows, arms, command=command)


def main() -> int:
    """Runs the command line; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    result = asyncio.run(asyncio.wait_for(measured(options.plot), 40 * 60))
    result.print_claims()
    print(*result.arms, sep="\n")
    if options.json is not None:
        result.write(options.json)
    return 0 if all(claim.as_json()["holds"] for claim in result.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
