"""A run's configuration is refused key by key, whatever stands in its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_training.config import parsed_overrides, read_config
from router_training.errors import ConfigInvalid

TINY = Path(__file__).parents[2] / "router_training" / "configs" / "tiny.toml"


@pytest.mark.parametrize("text", ["a = " + "[" * 9_999, "a = " + "9" * 9_999, "a = 1\na = 2"])
def test_what_toml_breaks_on_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigInvalid, match="it is no TOML"):
        read_config(path)


@pytest.mark.parametrize("value", ["[" * 9_999, "9" * 9_999])
def test_a_value_that_toml_breaks_on_is_a_text(value: str) -> None:
    assert parsed_overrides([f"promote.location={value}"]) == {"promote.location": value}


@pytest.mark.parametrize("pair", ["=x", "a\nb=1", "n" * 9_999 + "=1", "n" * 9_999, "work.x=1"])
def test_an_odd_key_is_named_on_one_short_line(pair: str) -> None:
    with pytest.raises(ConfigInvalid) as raised:
        read_config(TINY, parsed_overrides([pair]))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_is_one_that_every_stage_can_use(seed: int) -> None:
    with pytest.raises(ConfigInvalid, match=r"train\.seed: Input should be"):
        read_config(TINY, {"train.seed": seed})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"services.tls_ca": "ca.pem"}, "a pack's services are started in plaintext"),
        ({"services.tls_certificate": "a.pem"}, "tls_certificate and tls_key: give both"),
        (
            {"services.tls_certificate": "a.pem", "services.tls_key": "a.key"},
            "tls_certificate: needs tls_ca",
        ),
    ],
)
def test_half_of_tls_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigInvalid, match=said):
        read_config(TINY, given)
