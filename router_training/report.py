"""Writes the report folder of an evaluation: `report.json`, `report.md` and the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from router_training.metrics import Floats, Judged, shifted
from router_training.stages import write_atomically

_BINS = 10


def write_report(folder: Path, report: dict[str, Any], test: Judged, logit_shift: float) -> None:
    """Writes everything into `folder`; figures are those of `report`."""
    write_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_atomically(folder / "report.md", markdown(report))
    _plot_budget(folder / "budget_curve.png", report)
    _plot_reliability(folder / "reliability.png", test, shifted(test.scores, logit_shift))


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as a person reads it."""
    lines = [
        "# Router evaluation",
        "",
        f"{report['row_count']} steps of {report['question_count']} test questions, "
        f"{100 * report['positive_share']:.1f} % with an advantage above {report['margin']:g}. "
        "Intervals are 95 %, by bootstrap over questions.",
        "",
        f"PRM {report['models']['prm']} · draft {report['models']['draft']} · "
        f"target {report['models']['target']}",
        "",
        "| figure | value | 95 % interval |",
        "|---|---|---|",
        *(_line(name, estimate) for name, estimate in report["metrics"].items()),
        "",
        f"Accuracies are at the default threshold {report['threshold']:g}.",
        "",
        "## Area under the budget curve (mean reward against escalation rate), router minus other",
        "",
        "| other | difference | 95 % interval |",
        "|---|---|---|",
        *(_line(name, estimate) for name, estimate in report["budget_area_above"].items()),
        "",
        "Spearman's ρ of scores that need no training: "
        + ", ".join(f"{name} {value}" for name, value in report["baseline_spearman"].items()),
        "",
        "![budget curve](budget_curve.png) ![reliability](reliability.png)",
        "",
        "## Calibration table",
        "",
        "| threshold | expected target share |",
        "|---|---|",
        *(f"| {row['threshold']:g} | {row['target_share']:g} |" for row in report["calibration"]),
        "",
    ]
    return "\n".join(lines)


def _line(name: str, estimate: dict[str, float | None]) -> str:
    return f"| {name} | {estimate['value']} | {estimate['low']} … {estimate['high']} |"


def _plot_budget(path: Path, report: dict[str, Any]) -> None:
    figure, axes = _figure()
    curves = report["budget_curve"]
    for name, curve in curves.items():
        if name == "rates":
            continue
        is_router = name == "router"
        axes.plot(
            curves["rates"],
            curve,
            label=name,
            linewidth=2.5 if is_router else 1.2,
            linestyle="-" if is_router else "--",
        )
    axes.set_xlabel("escalation rate (share of steps)")
    axes.set_ylabel("mean process reward of the chosen steps")
    axes.set_title(f"Budget curve, n = {report['row_count']} steps")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _plot_reliability(path: Path, test: Judged, probabilities: Floats) -> None:
    figure, axes = _figure()
    for name, values in (("as trained", test.scores), ("prior corrected", probabilities)):
        bins = (values * _BINS).astype(int).clip(max=_BINS - 1)
        seen = [b for b in range(_BINS) if (bins == b).any()]
        axes.plot(
            [values[bins == b].mean() for b in seen],
            [test.labels[bins == b].mean() for b in seen],
            marker="o",
            label=name,
        )
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.set_xlabel("mean score in bin")
    axes.set_ylabel("share of steps with an advantage")
    axes.set_title(f"Reliability, n = {len(test.scores)} steps")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
