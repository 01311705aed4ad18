"""Reads the command line, runs the command, and turns how it ended into an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from arbitrage.channels import ClientTls
from arbitrage.core.errors import ArbitrageError
from arbitrage.core.steps import Sampling
from arbitrage.policy_specs import PolicyOptions, policy_named
from arbitrage.request import BudgetSpec
from services.cli.arguments import command_line
from services.cli.ask import AskOptions, ask
from services.cli.console import Terminal
from services.cli.demo import DemoOptions, demo, labelled_policies
from services.cli.failures import (
    FAILED,
    SIGNAL_BASE,
    BadInput,
    CommandError,
    exit_code_of,
    message_of,
)
from services.cli.keys import new_key
from services.cli.models import list_models, pull_models, verify_models
from services.cli.plan import ANY_PORTS, DEFAULT_PORTS
from services.cli.up import UpOptions, up
from services.engines.pack_manifest import PackError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    terminal = Terminal()
    try:
        return _run(command_line().parse_args(argv), terminal)
    except CommandError as error:
        terminal.error(str(error), error.details)
        return error.exit_code
    except (ArbitrageError, PackError) as error:
        terminal.error(message_of(error))
        return exit_code_of(error)
    except KeyboardInterrupt:
        return SIGNAL_BASE + 2
    except BrokenPipeError:
        # Whoever read the output has had enough; the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    match arguments.command:
        case "up":
            return up(_up_options(arguments), terminal)
        case "ask":
            return ask(_ask_options(arguments), terminal)
        case "demo":
            return demo(_demo_options(arguments), terminal)
        case "keys":
            return new_key(arguments.tenant, terminal)
        case "models" if arguments.action == "list":
            return list_models(terminal)
        case "models" if arguments.action == "pull":
            return pull_models(arguments.pack, arguments.mirror, terminal)
        case "models":
            return verify_models(arguments.pack, terminal)
        case unknown:
            raise BadInput(f"unknown command {unknown!r}; see arbitrage --help")


def _up_options(arguments: argparse.Namespace) -> UpOptions:
    ports = dict(DEFAULT_PORTS if arguments.ports == "default" else ANY_PORTS)
    for name in ports:
        asked = getattr(arguments, f"{name}_port")
        if asked is not None:
            ports[name] = asked
    extra: dict[str, dict[str, str]] = {}
    for setting in arguments.set:
        extra.setdefault(setting.name, {})[setting.variable] = setting.value
    return UpOptions(
        pack=arguments.pack,
        host=arguments.host,
        ports=ports,
        threads=arguments.threads,
        prefix_cache_mib=arguments.prefix_cache_mib,
        run_folder=arguments.run_folder,
        extra=extra,
        redis=arguments.redis,
    )


def _ask_options(arguments: argparse.Namespace) -> AskOptions:
    is_tls = arguments.tls or arguments.tls_ca is not None
    if is_tls and arguments.address is None:
        raise BadInput("--tls: needs --address; services of this one question are plaintext")
    return AskOptions(
        problem=_read_standard_input() if arguments.problem == "-" else arguments.problem,
        policy=policy_named(
            arguments.policy,
            PolicyOptions(
                arguments.threshold,
                arguments.target_share,
                arguments.policy_seed,
                arguments.token_count,
                arguments.max_threshold,
            ),
        ),
        budgets=BudgetSpec(
            max_steps=arguments.max_steps,
            max_tokens=arguments.max_tokens,
            max_step_tokens=arguments.max_step_tokens,
            max_target_steps=arguments.max_target_steps,
            time_limit_s=arguments.time_limit,
        ),
        sampling=Sampling(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed),
        allow_degraded=arguments.allow_degraded,
        timeout_s=arguments.timeout,
        address=arguments.address,
        tls=ClientTls(ca=arguments.tls_ca) if is_tls else None,
        # Not an argument: everyone on the machine sees those.
        api_key=os.environ.get("ARBITRAGE_API_KEY"),
        pack=arguments.pack,
        as_json=arguments.json,
    )


def _demo_options(arguments: argparse.Namespace) -> DemoOptions:
    return DemoOptions(
        pack=arguments.pack,
        problem_count=arguments.problems,
        policies=labelled_policies(arguments.policies),
        time_limit_s=arguments.time_limit,
        as_json=arguments.json,
    )


def _read_standard_input() -> str:
    try:
        # What ends a line in a pipe is no part of the question.
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise BadInput(
            f"problem: byte 0x{byte:02x} at {error.start} of standard input is not UTF-8; "
            "convert the text first, for example with iconv"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
