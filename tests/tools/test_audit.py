"""The audit: which packages fail it, and what it makes of pip-audit's answers."""

from __future__ import annotations

import json

from tools.audit import CONSTRAINTS, Advice, advice_of, audit, pins_of

PINS = "# what was tested\nnumpy==2.4.6\nTorch==2.13.0  # why\nold==1; python_version < '3'\n"
INSTALLED = {"numpy": "2.4.6", "torch": "2.13.0+cpu", "pip": "24.0", "arbitrage": "0.1.0"}
# As pip-audit 2.10 writes it.
SAFE = {"name": "numpy", "version": "2.4.6", "vulns": []}
UNSAFE = {
    "name": "torch",
    "version": "2.13.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.13.1"], "aliases": [], "description": "…"}],
}
SKIPPED = {"name": "numpy", "skip_reason": "Dependency not found on PyPI"}


def answer(*dependencies: object) -> str:
    """Returns pip-audit's JSON."""
    return json.dumps({"dependencies": dependencies, "fixes": []})


def unreached() -> Advice:
    """Stands for a machine without the network."""
    return advice_of("", "Traceback …\nConnectionError: no such host")


def test_the_pinned_packages_pass_and_an_unreachable_service_is_told_in_one_line() -> None:
    assert audit(INSTALLED, PINS, unreached) == (
        0,
        ["known vulnerabilities were not looked for: ConnectionError: no such host"],
    )


def test_a_package_without_a_pin_fails_also_offline() -> None:
    code, lines = audit({**INSTALLED, "left-pad": "1.0"}, PINS, unreached)
    assert code == 1
    assert lines[0] == "left-pad 1.0: has no pin in constraints.txt"


def test_a_package_at_another_version_fails() -> None:
    code, lines = audit({**INSTALLED, "numpy": "2.4.7"}, PINS, unreached)
    assert code == 1
    assert lines[0] == "numpy 2.4.7: constraints.txt says ==2.4.6"


def test_a_pin_that_is_no_version_fails() -> None:
    code, lines = audit(INSTALLED, PINS.replace("numpy==", "numpy>="), unreached)
    assert code == 1
    assert "no exact version" in lines[0]


def test_a_pin_for_another_python_is_none() -> None:
    assert sorted(pins_of(PINS)) == ["numpy", "torch"]


def test_a_known_vulnerability_fails_and_says_where_it_is_mended() -> None:
    code, lines = audit(INSTALLED, PINS, lambda: advice_of(answer(SAFE, UNSAFE), ""))
    assert (code, lines) == (1, ["torch 2.13.0: PYSEC-1, mended in 2.13.1"])


def test_no_known_vulnerability_says_nothing() -> None:
    assert audit(INSTALLED, PINS, lambda: advice_of(answer(SAFE), "")) == (0, [])


def test_an_answer_about_no_package_is_no_answer() -> None:
    # pip-audit says "No known vulnerabilities found" and exits 0 here.
    for written in (answer(SKIPPED, SKIPPED), answer()):
        assert advice_of(written, "").unreached is not None


def test_packages_that_the_service_does_not_know_are_named() -> None:
    code, lines = audit(INSTALLED, PINS, lambda: advice_of(answer(SKIPPED, {**SAFE}), ""))
    assert (code, lines) == (0, ["the advisory service knows nothing of numpy"])


def test_the_projects_own_constraints_are_exact() -> None:
    pins = pins_of(CONSTRAINTS.read_text(encoding="utf-8"))
    assert [name for name, pin in pins.items() if not str(pin.specifier).startswith("==")] == []
