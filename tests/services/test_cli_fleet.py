"""Services as processes: all start, all stop in order, and none is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from arbitrage.core.errors import TargetUnavailable
from services.cli.fleet import Fleet, ServiceDied, running_fleet, while_alive
from services.cli.plan import GATEWAY, MODEL_ROLES, ORCHESTRATOR, ServicePlan

ALL_NAMES = {*MODEL_ROLES, ORCHESTRATOR, GATEWAY}
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SmallPlan:
    """A deployment of five small services; `fates` names those that do not simply serve."""

    folder: Path
    fates: Mapping[str, str] = field(default_factory=dict)

    @property
    def stops(self) -> Path:
        """Names of the services that were told to stop, in that order."""
        return self.folder / "stops.txt"

    def stopped(self) -> list[str]:
        """Returns what `stops` holds."""
        return self.stops.read_text().split()

    def first_services(self) -> tuple[ServicePlan, ...]:
        """Returns four of them."""
        return tuple(self._service(role) for role in MODEL_ROLES)

    def orchestrator(self, addresses: Mapping[str, str]) -> ServicePlan:
        """Returns the fifth."""
        assert set(addresses) == set(MODEL_ROLES)
        return self._service(ORCHESTRATOR)

    def last_services(self, orchestrator_address: str) -> tuple[ServicePlan, ...]:
        """Returns the sixth."""
        return (self._service(GATEWAY),)

    def _service(self, name: str) -> ServicePlan:
        environ = {
            "SMALL_SERVICE_NAME": name,
            "SMALL_SERVICE_FATE": self.fates.get(name, "serve"),
            "SMALL_SERVICE_STOPS": str(self.stops),
            # Services are installed, tests are not, and the working directory does not count.
            "PYTHONPATH": str(REPOSITORY),
        }
        return ServicePlan(name, "tests.services.small_service", environ)


def is_running(pid: int) -> bool:
    """Tells whether a process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def are_gone_within(time_s: float, running: Iterable[int]) -> bool:
    """Tells whether all processes have ended, or do so in that time."""
    left = tuple(running)
    deadline_s = time.monotonic() + time_s
    while (left := tuple(filter(is_running, left))) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not left


def pids(fleet: Fleet) -> dict[str, int]:
    return {name: service.pid for name, service in fleet.services.items()}


async def test_every_service_is_started_and_stopped_before_those_that_it_calls(
    tmp_path: Path,
) -> None:
    plan = SmallPlan(tmp_path)
    seen: list[str] = []
    async with running_fleet(plan, tmp_path, on_ready=lambda s: seen.append(s.name)) as fleet:
        assert set(fleet.services) == ALL_NAMES
        assert seen[-2:] == [ORCHESTRATOR, GATEWAY]
        assert fleet.address == "127.0.0.1:1"
        running = pids(fleet)
        assert all(is_running(pid) for pid in running.values())
    assert not any(is_running(pid) for pid in running.values())
    assert plan.stopped()[:2] == [GATEWAY, ORCHESTRATOR]
    assert set(plan.stopped()) == ALL_NAMES
    assert "starting with fate serve" in (tmp_path / "draft.log").read_text()


async def test_a_service_that_cannot_start_stops_the_rest_and_tells_its_log(
    tmp_path: Path,
) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(ServiceDied, match=r"prm ended .*exit code 2") as caught:
        async with running_fleet(SmallPlan(tmp_path, {"prm": "fail"}), tmp_path):
            pass
    assert "ARBITRAGE_MODEL: expected a folder, got 'nowhere'" in caught.value.details
    assert set(psutil.Process().children()) <= before


async def test_services_import_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ctypes", "json", "services"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w').close(); raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    async with running_fleet(SmallPlan(tmp_path), tmp_path) as fleet:
        assert set(fleet.services) == ALL_NAMES
    assert not (tmp_path / "imported").exists()


async def test_a_death_is_told_also_without_a_log(tmp_path: Path) -> None:
    async with running_fleet(SmallPlan(tmp_path), tmp_path) as fleet:
        fleet.log_path("draft").unlink()
        os.kill(fleet.services["draft"].pid, signal.SIGKILL)
        with pytest.raises(ServiceDied, match=r"draft ended .*signal 9") as caught:
            await fleet.watch()
    assert caught.value.details == ()


async def test_only_the_end_of_a_long_log_is_told(tmp_path: Path) -> None:
    async with running_fleet(SmallPlan(tmp_path), tmp_path) as fleet:
        log = fleet.log_path("draft")
        log.write_text("one line without an end" * 100_000 + "\nthe last line\n")
        os.kill(fleet.services["draft"].pid, signal.SIGKILL)
        with pytest.raises(ServiceDied) as caught:
            await fleet.watch()
    assert caught.value.details[-1] == "the last line"
    assert sum(len(line) for line in caught.value.details) <= 64 << 10


async def test_a_service_that_never_serves_is_given_up_on(tmp_path: Path) -> None:
    plan = SmallPlan(tmp_path, {"router": "hang"})
    with pytest.raises(ServiceDied, match=r"router.* did not serve within 3 s"):
        async with running_fleet(plan, tmp_path, start_timeout_s=3.0):
            pass


async def test_the_death_of_one_service_ends_the_work_and_stops_the_rest(tmp_path: Path) -> None:
    running: dict[str, int] = {}

    async def work(fleet: Fleet) -> None:
        running.update(pids(fleet))
        os.kill(running["target"], signal.SIGKILL)
        await asyncio.sleep(30)

    with pytest.raises(ServiceDied, match=r"target ended .*signal 9"):
        async with running_fleet(SmallPlan(tmp_path), tmp_path) as fleet:
            await while_alive(fleet, work(fleet))
    assert not any(is_running(pid) for pid in running.values())


async def test_a_request_that_notices_a_death_first_tells_of_the_death(tmp_path: Path) -> None:
    async def ask(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        raise TargetUnavailable("no target answered")

    with pytest.raises(ServiceDied, match="target ended"):
        async with running_fleet(SmallPlan(tmp_path), tmp_path) as fleet:
            await while_alive(fleet, ask(fleet.services["target"].pid))


async def test_an_error_of_the_work_itself_stays_what_it_is(tmp_path: Path) -> None:
    async def ask() -> None:
        raise ValueError("not the fleet's fault")

    with pytest.raises(ValueError, match="not the fleet's fault"):
        async with running_fleet(SmallPlan(tmp_path), tmp_path) as fleet:
            await while_alive(fleet, ask())


async def test_what_the_work_comes_to_is_returned(tmp_path: Path) -> None:
    async with running_fleet(SmallPlan(tmp_path), tmp_path) as fleet:
        assert await while_alive(fleet, asyncio.sleep(0, "an answer")) == "an answer"


async def test_a_service_that_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    plan = SmallPlan(tmp_path, {"draft": "stubborn"})
    async with running_fleet(plan, tmp_path, stop_grace_s=0.5) as fleet:
        running = pids(fleet)
        stopping_s = time.monotonic()
    assert time.monotonic() - stopping_s < 10
    assert not any(is_running(pid) for pid in running.values())
    assert "draft" not in plan.stopped()


async def test_a_stop_that_is_cancelled_kills_at_once(tmp_path: Path) -> None:
    plan = SmallPlan(tmp_path, {ORCHESTRATOR: "stubborn"})
    running: dict[str, int] = {}
    everything_serves = asyncio.Event()

    async def run() -> None:
        async with running_fleet(plan, tmp_path, stop_grace_s=60) as fleet:
            running.update(pids(fleet))
            everything_serves.set()
            await asyncio.sleep(30)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(run())
        await everything_serves.wait()
        task.cancel()
        await asyncio.sleep(0.5)
        assert is_running(running[ORCHESTRATOR])
        task.cancel()
    assert not any(is_running(pid) for pid in running.values())


async def test_a_stop_that_is_cancelled_again_leaves_none_running(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, stop_grace_s=5)
    await fleet.start(SmallPlan(tmp_path, dict.fromkeys(ALL_NAMES, "stubborn")), id, 30)
    try:
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(fleet.stop())
            await asyncio.sleep(0.2)
            # The first ends the grace, the second the wait for the first process that is killed.
            stopping.cancel()
            await asyncio.sleep(0)
            stopping.cancel()
        assert await asyncio.to_thread(are_gone_within, 3, pids(fleet).values())
    finally:
        await fleet.stop()


@pytest.mark.parametrize("fate", ["serve", "stubborn"])
def test_no_service_outlives_a_parent_that_is_killed(tmp_path: Path, fate: str) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from services.cli.fleet import running_fleet\n"
        "from tests.services.test_cli_fleet import ALL_NAMES, SmallPlan, pids\n"
        "async def main():\n"
        "    folder = pathlib.Path(sys.argv[1])\n"
        "    plan = SmallPlan(folder, dict.fromkeys(ALL_NAMES, sys.argv[2]))\n"
        "    async with running_fleet(plan, folder) as fleet:\n"
        "        print(*pids(fleet).values(), flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), fate], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == len(ALL_NAMES)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert are_gone_within(5, children)
