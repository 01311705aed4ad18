"""The router's text is what published checkpoints were trained on; golden strings pin it."""

from __future__ import annotations

from arbitrage.core.prompts import generator_pieces, problem_text, router_steps
from arbitrage.core.steps import Source, Step, StopReason, Trajectory


def test_an_annotated_step_names_its_writer_and_the_candidate_is_the_drafts() -> None:
    history = [Step("abc", Source.TARGET), Step("abc", Source.TARGET)]
    joined = problem_text("q") + "".join(text + "\n\n" for text in router_steps(history, "abc"))
    assert joined == "q\nModel 1: abc\n\nModel 1: abc\n\nModel 0: abc\n\n"


def test_without_annotation_the_steps_stand_alone() -> None:
    history = [Step("a", Source.DRAFT)]
    assert router_steps(history, "b", annotated=False) == ("a", "b")


def test_a_step_cut_by_its_cap_is_continued_without_a_separator() -> None:
    trajectory = Trajectory(
        "q",
        (
            Step("one", Source.DRAFT),
            Step("two and", Source.DRAFT, StopReason.STEP_LENGTH),
            Step(" a half", Source.DRAFT),
        ),
    )
    assert "".join(generator_pieces(trajectory)) == "q\none\n\ntwo and a half\n\n"


def test_the_pieces_of_a_prefix_are_a_prefix_of_the_pieces() -> None:
    shorter = Trajectory("q", (Step("one", Source.DRAFT),))
    longer = shorter.append(Step("two", Source.TARGET))
    assert generator_pieces(longer)[: len(generator_pieces(shorter))] == generator_pieces(shorter)
