"""Rows and questions that tests make up."""

from __future__ import annotations

from typing import Any

from arbitrage.core.steps import ModelIdentity
from router_training.label import advantage, binary_label
from router_training.questions import question_id
from router_training.rows import Row


def a_row(**fields: Any) -> Row:
    """Returns a row with some fields as a test wants them and the rest as they may be."""
    problem = fields.pop("problem", "1 + 1?")
    draft_score = fields.pop("draft_score", 0.4)
    target_scores = fields.pop("target_scores", (0.9,))
    gap = advantage(draft_score, target_scores)
    values: dict[str, Any] = {
        "request_id": f"{question_id(problem)}-oracle",
        "question_id": question_id(problem),
        "source": "plain",
        "step_index": len(fields.get("history", ())),
        "problem": problem,
        "history": (),
        "draft_text": "2",
        "draft_token_count": 2,
        "draft_entropy": 0.1,
        "target_texts": ("3",),
        "target_token_counts": (2,),
        "draft_score": draft_score,
        "target_scores": target_scores,
        "advantage": gap,
        "label": binary_label(gap),
        "prm": ModelIdentity("prm", "r1"),
        "draft": ModelIdentity("draft", "r1"),
        "target": ModelIdentity("target", "r1"),
        "router": None,
        "router_score": None,
        "prefix_policy": "oracle",
        "propensity": 1.0,
        "seed": 0,
        "code_version": "test",
    }
    return Row(**{**values, **fields})
