"""The command line: every option, its default and its help. Turns arguments into options."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, NoReturn

from arbitrage.policy_specs import POLICY_NAMES
from services.cli.failures import BadInput
from services.cli.plan import DEFAULT_PORTS

DEFAULT_PACK = "tiny"
# Measured in CPU time: 28 s for the start, shared by all cores, then 0.85 s a problem for three
# policies, on one core at a time. That makes about 65 s on two idle cores.
DEMO_PROBLEM_COUNT = 60
_MOST_SECONDS = 365 * 24 * 3600
DEMO_POLICIES = "draft_only,target_only,arbitrage"

_EXIT_CODES = "exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 130 interrupted"


class ServiceSetting(NamedTuple):
    """One variable for one service."""

    name: str
    variable: str
    value: str


class _Parser(argparse.ArgumentParser):
    """Refuses wrong usage like every other bad input: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see {self.prog} --help")


def command_line() -> argparse.ArgumentParser:
    """Returns the parser; the chosen command is `command`, of `models` and `keys` also `action`."""
    parser = _Parser(
        prog="arbitrage",
        description="Step-level speculative reasoning: a draft model writes, a router decides "
        "which steps a larger target model should write instead.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"arbitrage {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands.add_parser("up", help="run every service on this machine"))
    _add_ask(commands.add_parser("ask", help="solve one problem, step by step before your eyes"))
    _add_demo(commands.add_parser("demo", help="compare policies on bundled held-out problems"))
    _add_models(commands.add_parser("models", help="list, pull and verify model packs"))
    _add_keys(commands.add_parser("keys", help="make API keys"))
    return parser


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.description = "Runs every service on this machine until Ctrl-C or SIGTERM."
    _add_pack(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--ports",
        choices=("default", "any"),
        default="default",
        help="any: free ports where no --NAME-port says otherwise (%(default)s)",
    )
    for name, port in DEFAULT_PORTS.items():
        parser.add_argument(
            f"--{name}-port", type=_port, metavar="PORT", help=f"default {port}, 0 for any"
        )
    parser.add_argument(
        "--threads", type=_positive, default=1, help="threads per model process (%(default)s)"
    )
    parser.add_argument(
        "--prefix-cache-mib",
        type=_not_negative,
        default=64,
        metavar="MIB",
        help="memory for answers to equal prefixes, 0 for none (%(default)s)",
    )
    parser.add_argument(
        "--redis",
        metavar="URL",
        help="keep sessions and the prefix cache in this Redis; embedded: in one that is started",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=service_setting,
        metavar="NAME.SETTING=VALUE",
        help="any other setting of one service, such as orchestrator.max_steps=64",
    )
    parser.add_argument(
        "--run-folder", type=Path, metavar="FOLDER", help="where logs go (a new temporary folder)"
    )


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Solves one problem. Without --address it starts services for this one question."
    )
    parser.add_argument("problem", help="the question, or - to read it from standard input")
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="an orchestrator that is running; where it asks for a key, ARBITRAGE_API_KEY has it",
    )
    parser.add_argument("--tls", action="store_true", help="reach it over TLS")
    parser.add_argument(
        "--tls-ca",
        type=Path,
        metavar="FILE",
        help="reach it over TLS, with a certificate of this CA (PEM)",
    )
    _add_pack(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per event and line, its kind under `event`, `finished` last",
    )
    policy = parser.add_argument_group("policy")
    policy.add_argument(
        "--policy",
        default="arbitrage",
        metavar="NAME",
        help=f"one of {', '.join(POLICY_NAMES)} (%(default)s)",
    )
    policy.add_argument(
        "--threshold",
        type=float,
        help="the policy's own: escalation threshold, acceptance score, advantage threshold, "
        "escalation rate or entropy in nats",
    )
    policy.add_argument(
        "--target-share", type=float, help="arbitrage: share of steps the target may write"
    )
    policy.add_argument(
        "--max-threshold",
        type=float,
        metavar="THRESHOLD",
        help="arbitrage: what the threshold may rise to while the target is saturated",
    )
    policy.add_argument("--policy-seed", type=int, metavar="SEED", help="random: seed of the coin")
    policy.add_argument(
        "--token-count", type=int, help="first_token_entropy: first tokens that are averaged"
    )
    budgets = parser.add_argument_group("budgets (by default the server's)")
    for option, what in (
        ("max-steps", "committed steps"),
        ("max-tokens", "tokens of the solution"),
        ("max-step-tokens", "tokens of one step"),
        ("max-target-steps", "steps the target may write"),
    ):
        budgets.add_argument(f"--{option}", type=int, metavar="COUNT", help=f"{what} at most")
    budgets.add_argument(
        "--time-limit", type=_seconds, metavar="SECONDS", help="time the solution may take"
    )
    sampling = parser.add_argument_group("sampling (by default greedy)")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 to 2 (%(default)s)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="nucleus mass (%(default)s)")
    sampling.add_argument("--top-k", type=int, default=0, help="0 keeps all (%(default)s)")
    sampling.add_argument("--seed", type=int, help="seed of the draw")
    parser.add_argument(
        "--allow-degraded",
        action="store_true",
        help="keep the draft's step, flagged, where the target cannot be reached",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="give up on the server after this time (the time limit and some grace, or 600)",
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Starts every service, solves held-out problems under each policy in turn, and shows "
        "what each cost."
    )
    _add_pack(parser)
    parser.add_argument(
        "--problems",
        type=int,
        default=DEMO_PROBLEM_COUNT,
        metavar="COUNT",
        help="problems per policy (%(default)s)",
    )
    parser.add_argument(
        "--policies",
        default=DEMO_POLICIES,
        metavar="LIST",
        help="names with commas between them, each with :THRESHOLD where it needs one "
        "(%(default)s)",
    )
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        default=100.0,
        metavar="SECONDS",
        help="no new problem is begun after this time (%(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, nothing else"
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Packs are looked for in the folders of ARBITRAGE_MODEL_PACKS, then beside the program. "
        "What is pulled goes to ARBITRAGE_MODEL_FILES, by default ~/.local/share/arbitrage/models."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="show every pack with its models and sizes")
    pull = actions.add_parser("pull", help="fetch the files of a pack, checked and resumed")
    pull.add_argument("pack", help="name or path")
    pull.add_argument(
        "--from",
        dest="mirror",
        default="",
        metavar="MIRROR",
        help="folder or https:// address that is asked first, for PACK/FILE",
    )
    verify = actions.add_parser("verify", help="compare every file of a pack with its digest")
    verify.add_argument("pack", nargs="?", default=DEFAULT_PACK, help="name or path (%(default)s)")


def _add_keys(parser: argparse.ArgumentParser) -> None:
    parser.description = "Orchestrators that have ARBITRAGE_API_KEYS_FILE answer nobody without."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser(
        "new", help="show a new key on standard error, its entry on standard output"
    )
    new.add_argument("--tenant", required=True, metavar="NAME", help="whose key it is")


def _add_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pack", default=DEFAULT_PACK, help="model pack, by name or path (%(default)s)"
    )


def _port(text: str) -> int:
    return _integer(text, 0, 65535)


def service_setting(text: str) -> ServiceSetting:
    """Reads `NAME.SETTING=VALUE`."""
    path, equals, value = text.partition("=")
    name, dot, setting = path.partition(".")
    if not (equals and dot and setting) or name not in DEFAULT_PORTS:
        names = ", ".join(DEFAULT_PORTS)
        raise argparse.ArgumentTypeError(
            f"expected NAME.SETTING=VALUE with NAME one of {names}, got {text!r}"
        )
    return ServiceSetting(name, f"ARBITRAGE_{setting.upper()}", value)


def _positive(text: str) -> int:
    return _integer(text, 1, 1024)


def _not_negative(text: str) -> int:
    return _integer(text, 0, 1 << 20)


def _integer(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(
            f"expected an integer from {least} to {most}, got {text!r}"
        )
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    # Not a number fails both comparisons.
    if not 0 < value <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"expected seconds above 0 and at most {_MOST_SECONDS} (a year), got {text!r}; "
            "give a number such as 2.5, or leave the option out"
        )
    return value


def _version() -> str:
    try:
        return version("arbitrage")
    except PackageNotFoundError:
        return "(not installed)"
