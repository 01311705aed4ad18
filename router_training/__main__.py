"""`python -m router_training run --config FILE`: one command from questions to a serving router."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from router_training.config import RunConfig, parsed_overrides, read_config
from router_training.errors import TrainingError
from router_training.pipeline import Pipeline


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 refused to promote, 2 bad input."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel("WARNING")
    try:
        config = read_config(parsed.config, parsed_overrides(parsed.set))
        return _run(config, parsed)
    except TrainingError as error:
        sys.stderr.write(f"{parsed.command}: {error}\n")
        return error.exit_code


def _run(config: RunConfig, parsed: argparse.Namespace) -> int:
    pipeline = Pipeline(config, force=parsed.force)
    match parsed.command:
        case "collect":
            pipeline.collect(_shard(parsed.shard), parsed.from_feedback)
        case "rollback":
            pipeline.rollback()
        case "promote":
            pipeline.promote(dry_run=parsed.dry_run)
        case "run":
            pipeline.run(dry_run=parsed.dry_run)
        case stage:
            getattr(pipeline, stage)()
    return 0


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise SystemExit(f"--shard {text}: expected K/N with K from 0 to N-1, such as 0/4")
    return int(index), int(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m router_training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "every stage whose outputs are not current"),
        ("collect", "walk questions with the running services"),
        ("label", "draw labelled, balanced rows and splits from what was collected"),
        ("train", "train the router"),
        ("evaluate", "measure it, tabulate thresholds, write the report"),
        ("promote", "make it the serving router, unless it is worse"),
        ("rollback", "make the router before the serving one serve again"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", type=Path, required=True, help="a TOML file")
        command.add_argument(
            *("--set",), action="append", default=[], metavar="KEY=VALUE", help="replaces a value"
        )
        command.add_argument("--force", action="store_true", help="run stages that are current too")
        if name in {"run", "promote"}:
            command.add_argument("--dry-run", action="store_true", help="decide, change nothing")
        if name == "collect":
            command.add_argument("--shard", default="0/1", metavar="K/N", help="walk part K of N")
            command.add_argument(
                *("--from-feedback",),
                metavar="FOLDER_OR_URL",
                help="turn production records into rows instead of walking: those of a folder, or "
                "of orchestrators' Redis, as redis://host:6379",
            )
    return parser


if __name__ == "__main__":
    sys.exit(main())
