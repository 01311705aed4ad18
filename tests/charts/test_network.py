"""NetworkPolicies let through the edges of the picture, and no other."""

from __future__ import annotations

import pytest

from tests.charts.cases import CASES, TRAINING
from tests.charts.edges import ANYONE, Edge, allowed_edges
from tests.charts.rendering import of_kind, rendered

pytestmark = pytest.mark.deploy

MODELS = {"draft": 50051, "target": 50052, "prm": 50053, "router": 50054}
SERVICES = {"orchestrator": 50050, "gateway": 8080, **MODELS}
# The picture of README.md, with what every deployment has beside it: scrapes, the DNS, a test.
PICTURE = (
    {Edge(ANYONE, "orchestrator", 50050), Edge(ANYONE, "gateway", 8080)}
    | {Edge("gateway", "orchestrator", 50050)}
    | {Edge(ANYONE, name, 9464) for name in SERVICES}
    | {Edge("orchestrator", name, port) for name, port in MODELS.items()}
    | {Edge("orchestrator", "redis", 6379)}
    | {Edge("test", "orchestrator", 50050)}
    | {Edge(name, ANYONE, 53) for name in (*SERVICES, "test")}
)


def without_test(edges: set[Edge]) -> set[Edge]:
    """Returns the edges but those of the test's pod."""
    return {edge for edge in edges if edge.caller != "test"}


def test_the_edges_are_those_of_the_picture() -> None:
    assert allowed_edges(rendered()) == PICTURE


def test_models_never_call_each_other_and_nobody_but_the_orchestrator_calls_them() -> None:
    for edge in allowed_edges(rendered()):
        if edge.callee in MODELS and edge.port != 9464:
            assert edge.caller == "orchestrator"


def test_retraining_asks_the_models_and_takes_feedback_from_redis() -> None:
    with_training = {"routerTraining": {**TRAINING, "train": {"fromFeedback": True}}}
    assert allowed_edges(rendered(with_training)) - PICTURE == {
        Edge("router-training", "draft", 50051),
        Edge("router-training", "target", 50052),
        Edge("router-training", "prm", 50053),
        Edge("router-training", "redis", 6379),
        Edge("router-training", ANYONE, 53),
        Edge("router-training", ANYONE, 443),
    }


def test_what_is_elsewhere_is_reached_on_its_own_port_alone() -> None:
    edges = without_test(allowed_edges(rendered(*CASES["external"])))
    assert {edge for edge in edges if edge.callee == ANYONE and edge.port != 53} == {
        Edge("orchestrator", ANYONE, 50053),
        Edge("orchestrator", ANYONE, 50054),
        Edge("orchestrator", ANYONE, 6380),
        Edge("orchestrator", ANYONE, 4317),
        Edge("gateway", ANYONE, 4317),
        Edge("draft", ANYONE, 443),
        Edge("draft", ANYONE, 4317),
        Edge("target", ANYONE, 8080),
        Edge("target", ANYONE, 4317),
    }


def test_an_engine_of_kserve_is_called_by_its_generator_alone() -> None:
    edges = allowed_edges(rendered(*CASES["kserve"]))
    assert {edge for edge in edges if edge.callee == "target-engine"} == {
        Edge("target", "target-engine", 8080)
    }


def test_files_of_models_are_fetched_by_those_who_need_them() -> None:
    edges = allowed_edges(rendered(*CASES["pulled"]))
    assert {edge.caller for edge in edges if edge.port == 443} == {"draft-models", "target-models"}


def test_only_those_who_may_call_and_scrape_do() -> None:
    peer = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "test"}}}
    network = {"clients": [peer], "scrapers": [peer]}
    edges = allowed_edges(rendered({"networkPolicy": network}))
    assert {edge for edge in edges if edge.caller == ANYONE} == set()
    assert Edge("test", "orchestrator", 50050) in edges
    assert Edge("gateway", "orchestrator", 50050) in edges


def test_retraining_reaches_a_store_on_a_port_of_its_own() -> None:
    edges = allowed_edges(rendered(*CASES["trained"]))
    assert Edge("router-training", ANYONE, 9000) in edges
    assert {edge.caller for edge in edges if edge.port == 9000} == {"router-training"}


def test_every_address_of_a_list_is_reached() -> None:
    addresses = {"draft": {"address": "a.example:50051,b.example:50061"}}
    edges = allowed_edges(rendered({**addresses, "routerTraining": TRAINING}))
    for caller in ("orchestrator", "router-training"):
        for port in (50051, 50061):
            assert Edge(caller, ANYONE, port) in edges


def test_the_dns_may_listen_elsewhere() -> None:
    edges = allowed_edges(rendered({"networkPolicy": {"dns": {"ports": [5353]}}}))
    moved = {edge._replace(port=5353) if edge.port == 53 else edge for edge in PICTURE}
    assert edges == moved


def test_it_can_be_left_to_others() -> None:
    assert of_kind(rendered({"networkPolicy": {"enabled": False}}), "NetworkPolicy") == {}
