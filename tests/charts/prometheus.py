"""A real Prometheus that scrapes service processes, under the labels that the chart gives them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.charts.rendering import NAMESPACE, RELEASE
from tests.charts.tools import prometheus
from tests.services.redis_servers import free_port


class Unanswered(Exception):
    """Prometheus said nothing, or something that no autoscaler can go by."""


@dataclass
class Prometheus:
    """One server. It may be stopped, and started again on what it had."""

    folder: Path
    interval: str
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def _scraped(self) -> Path:
        return self.folder / "scraped.json"

    def scrape(self, metrics_ports: Mapping[str, int]) -> None:
        """Says which services there are: each one's pod name, and the port of its metrics."""
        groups = [
            {
                "targets": [f"127.0.0.1:{port}"],
                "labels": {"namespace": NAMESPACE, "release": RELEASE, "pod": pod},
            }
            for pod, port in metrics_ports.items()
        ]
        partial = self._scraped.with_suffix(".partial")
        partial.write_text(json.dumps(groups))
        partial.replace(self._scraped)

    def launch(self) -> None:
        """Starts it without waiting."""
        assert prometheus().exists(), "Prometheus is missing: run `python -m tests.charts.tools`"
        job = {"job_name": "arbitrage", "file_sd_configs": [{"files": [str(self._scraped)]}]}
        config = {"global": {"scrape_interval": self.interval}, "scrape_configs": [job]}
        path = self.folder / "prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [
            *(str(prometheus()), f"--config.file={path}"),
            f"--storage.tsdb.path={self.folder / 'series'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        with (self.folder / "prometheus.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    async def start(self) -> None:
        """Starts it and waits until it answers."""
        self.launch()
        async with asyncio.timeout(60):
            while True:
                try:
                    await self.query("vector(1)")
                except Unanswered:
                    await asyncio.sleep(0.1)
                else:
                    return

    async def stop(self) -> None:
        """Ends it."""
        if self.process is not None:
            self.process.terminate()
            await asyncio.to_thread(self.process.wait)
            self.process = None

    async def query(self, expression: str) -> list[float]:
        """Returns the values of an instant query.

        Raises:
            Unanswered
        """
        query = urllib.parse.urlencode({"query": expression})

        def ask() -> Any:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=5) as answer:
                return json.load(answer)

        try:
            answer = await asyncio.to_thread(ask)
        except OSError as error:
            raise Unanswered(f"{self.url}: {error}") from None
        return [float(element["value"][1]) for element in answer["data"]["result"]]

    async def one(self, expression: str) -> float:
        """Returns the value of a query that must give exactly one element.

        Raises:
            Unanswered
        """
        values = await self.query(expression)
        if len(values) != 1:
            raise Unanswered(f"{len(values)} elements, not one: {expression}")
        return values[0]
