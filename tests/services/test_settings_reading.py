"""Settings are strict: what is wrong is named, with what was expected."""

from __future__ import annotations

import pytest

from services.generator.settings import GeneratorSettings
from services.orchestrator.settings import OrchestratorSettings
from services.rpc.settings import SettingsError, read_settings

NEEDED = {"ARBITRAGE_DRAFT_ADDRESS": "d:1", "ARBITRAGE_TARGET_ADDRESS": "t:1"}


def problems(**variables: str) -> str:
    """Returns what is said of these variables."""
    with pytest.raises(SettingsError) as raised:
        read_settings(OrchestratorSettings, {**NEEDED, **variables})
    return str(raised.value)


def test_variables_of_other_programs_are_left_alone() -> None:
    settings = read_settings(OrchestratorSettings, {**NEEDED, "PATH": "/bin", "HOME": "/"})
    assert (settings.port, settings.draft_address) == (50050, "d:1")


def test_a_bad_value_is_named_with_what_was_expected() -> None:
    said = problems(ARBITRAGE_MAX_STEPS="ten")
    assert said == "ARBITRAGE_MAX_STEPS: expected an integer, got 'ten'"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ARBITRAGE_PORT", "70000", "at most 65535"),
        ("ARBITRAGE_PORT", "-1", "at least 0"),
        ("ARBITRAGE_CALL_TIMEOUT_S", "nan", "a number"),
        ("ARBITRAGE_CALL_TIMEOUT_S", "0", "more than 0"),
        ("ARBITRAGE_ROUTER_FALLBACK", "panic", "one of accept_draft, escalate or fail"),
        ("ARBITRAGE_LOG_LEVEL", "loud", "one of DEBUG, INFO, WARNING or ERROR"),
        ("ARBITRAGE_PRM_ADDRESS", "", "some text"),
    ],
)
def test_each_kind_of_bad_value_says_what_it_should_be(
    name: str, value: str, expected: str
) -> None:
    assert problems(**{name: value}) == f"{name}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(
    "address",
    [
        *("target", "target:", ":1", "target:0", "target:99999", "target:-1", "target:many"),
        *("http://target:1", "target:1/", "target: 1", " target:1", "a..b:1", "t\u00e4:1"),
        *("::1:1", "[::1]", "[target]:1", "file://replicas", "file:replicas", "l" * 64 + ":1"),
    ],
)
def test_an_address_that_is_none_is_refused_at_the_start(address: str) -> None:
    expected = "host:port with a port from 1 to 65535, several of them as a:1,b:1, or file:///path"
    name = "ARBITRAGE_TARGET_ADDRESS"
    assert problems(**{name: address}) == f"{name}: expected {expected}, got {address!r}"


@pytest.mark.parametrize("address", ["a:1,", ",a:1", "a:1,,b:1"])
def test_a_list_of_addresses_has_no_empty_entries(address: str) -> None:
    assert f"which '' is not, got {address!r}" in problems(ARBITRAGE_ROUTER_ADDRESS=address)


@pytest.mark.parametrize(
    "address",
    ["target:1", "10.0.0.1:65535,[::1]:2", "target-0.target.models.svc.:50052", "file:///a b"],
)
def test_an_address_may_have_any_of_its_forms(address: str) -> None:
    variables = {**NEEDED, "ARBITRAGE_TARGET_ADDRESS": address}
    assert read_settings(OrchestratorSettings, variables).target_address == address


def test_an_unknown_variable_is_named_with_the_nearest_known_one() -> None:
    said = problems(ARBITRAGE_MAX_STEP="3")
    assert said == "ARBITRAGE_MAX_STEP: no such setting; did you mean ARBITRAGE_MAX_STEPS?"


def test_every_problem_is_told_at_once() -> None:
    said = problems(ARBITRAGE_MAX_STEPS="ten", ARBITRAGE_PORT="x", ARBITRAGE_NO="1").split("\n")
    assert len(said) == 3


def test_a_setting_without_a_default_has_to_be_given() -> None:
    with pytest.raises(SettingsError, match="ARBITRAGE_DRAFT_ADDRESS: is not set"):
        read_settings(OrchestratorSettings, {})


def test_a_default_above_its_cap_is_refused() -> None:
    said = problems(ARBITRAGE_DEFAULT_STEPS="9", ARBITRAGE_MAX_STEPS="8")
    assert said == "ARBITRAGE_DEFAULT_STEPS: expected at most ARBITRAGE_MAX_STEPS (8), got 9"


@pytest.mark.parametrize(("role", "port"), [("draft", 50051), ("target", 50052)])
def test_a_generator_listens_on_the_port_of_its_role(role: str, port: int) -> None:
    variables = {"ARBITRAGE_ROLE": role, "ARBITRAGE_MODEL": "tiny"}
    assert read_settings(GeneratorSettings, variables).port == port
    assert read_settings(GeneratorSettings, {**variables, "ARBITRAGE_PORT": "1"}).port == 1


def test_every_setting_is_described() -> None:
    for kind in (GeneratorSettings, OrchestratorSettings):
        for name, field in kind.model_fields.items():
            assert field.description, name


@pytest.mark.parametrize("name", ["ARBITRAGE_\udcff", "ARBITRAGE_A\nB", "ARBITRAGE_" + "N" * 9_999])
def test_a_variable_with_an_odd_name_is_named_on_one_short_line(name: str) -> None:
    said = problems(**{name: "1"})
    assert said.startswith("ARBITRAGE_")
    assert "no such setting" in said
    assert said.isprintable()
    assert len(said) < 2_000


def test_a_variable_in_other_letters_is_unknown_rather_than_a_second_value() -> None:
    said = problems(ARBITRAGE_MAX_STEPS="300", ARBITRAGE_max_steps="4")
    assert said == "ARBITRAGE_max_steps: no such setting; did you mean ARBITRAGE_MAX_STEPS?"


def test_a_long_value_is_shortened() -> None:
    assert len(problems(ARBITRAGE_MAX_STEPS="9" * 9_999)) < 200
