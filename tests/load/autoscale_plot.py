"""Draws how replicas followed the load."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.load.wave import Wave


def draw(path: Path, *waves: Wave) -> None:
    """Draws each wave: above what the rule saw, below the replicas."""
    figure = Figure(figsize=(6.5 * len(waves), 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(waves), squeeze=False, sharex="col")
    for (above, below), wave in zip(axes.T, waves, strict=True):
        _signals(above, wave)
        _replicas(below, wave)
    figure.savefig(path, dpi=110)


def _signals(axes: Axes, wave: Wave) -> None:
    times = [look.at_s - wave.began_s for look in wave.looks]
    for name in wave.looks[0].values:
        values = [look.values[name] for look in wave.looks]
        gapped = [float("nan") if value is None else value for value in values]
        axes.plot(times, gapped, ".-", label=name)
    _marks(axes, wave)
    axes.set(title=f"scaled {wave.rule}", ylabel="what the autoscaler sees", ylim=(0, None))
    axes.legend(fontsize=8)


def _replicas(axes: Axes, wave: Wave) -> None:
    times = [look.at_s - wave.began_s for look in wave.looks]
    for name, style in (("replicas", "-"), ("ready", "--")):
        counts = [getattr(look, name) for look in wave.looks]
        axes.step(times, counts, style, where="post", label=name)
    _marks(axes, wave)
    axes.set(xlabel="seconds", ylabel="target replicas", ylim=(0, None))
    axes.legend(fontsize=8)


def _marks(axes: Axes, wave: Wave) -> None:
    """Says on an axis when the load changed, and shades the time without Prometheus."""
    for what, at_s in wave.marks_s.items():
        if not what.startswith("Prometheus"):
            axes.axvline(at_s, color="grey", linewidth=0.8)
            axes.annotate(f" {what}", (at_s, 0.97), xycoords=("data", "axes fraction"), fontsize=8)
    if "Prometheus away" in wave.marks_s:
        away, back = wave.marks_s["Prometheus away"], wave.marks_s["Prometheus back"]
        axes.axvspan(away, back, color="grey", alpha=0.15, label="Prometheus away")
    axes.grid(alpha=0.3)
