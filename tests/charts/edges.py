"""Who may speak with whom, as the rendered NetworkPolicies and pods say it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tests.charts.rendering import Object, of_kind, pods

ANYONE = "*"
_COMPONENT = "app.kubernetes.io/component"


class Edge(NamedTuple):
    """A connection that is let through."""

    caller: str
    callee: str
    port: int


def allowed_edges(objects: list[Object]) -> set[Edge]:
    """Returns every connection that both ends allow; what is outside allows all."""
    policies = list(of_kind(objects, "NetworkPolicy").values())
    labels = {}
    for _, pod in pods(objects):
        found = pod["metadata"]["labels"]
        labels[found[_COMPONENT]] = found
    outgoing = {name: set(_outgoing(name, policies, labels)) for name in labels}
    incoming = {name: set(_incoming(name, policies, labels)) for name in labels}
    edges = {
        edge
        for edges in outgoing.values()
        for edge in edges
        if edge.callee == ANYONE or edge in incoming[edge.callee]
    }
    return edges | {edge for edges in incoming.values() for edge in edges if edge.caller == ANYONE}


def _outgoing(name: str, policies: list[Object], labels: dict[str, Object]) -> Iterator[Edge]:
    for rule in _rules(name, policies, labels, "egress"):
        for peer in _peers(rule.get("to"), labels):
            for port in rule["ports"]:
                yield Edge(name, peer, port["port"])


def _incoming(name: str, policies: list[Object], labels: dict[str, Object]) -> Iterator[Edge]:
    for rule in _rules(name, policies, labels, "ingress"):
        for peer in _peers(rule.get("from"), labels):
            for port in rule["ports"]:
                yield Edge(peer, name, port["port"])
                if peer == ANYONE:
                    yield from (Edge(caller, name, port["port"]) for caller in labels)


def _rules(
    name: str, policies: list[Object], labels: dict[str, Object], direction: str
) -> Iterator[Object]:
    chosen = [p["spec"] for p in policies if _selects(p["spec"]["podSelector"], labels[name])]
    assert chosen, f"no NetworkPolicy selects {name}, so everything may reach it"
    for spec in chosen:
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        yield from spec.get(direction, ())


def _peers(given: list[Object] | None, labels: dict[str, Object]) -> Iterator[str]:
    if given is None:
        yield ANYONE
    for peer in given or ():
        if peer.keys() == {"podSelector"}:
            yield from (name for name in labels if _selects(peer["podSelector"], labels[name]))
        else:
            yield ANYONE


def _selects(selector: Object, labels: Object) -> bool:
    wanted: Object = selector["matchLabels"]
    return wanted.items() <= labels.items()
