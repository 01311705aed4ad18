"""The recipe of the shipped pack: every model's stages, in the order they are run."""

from pathlib import Path
from typing import Final

from model_packs.tiny.domain import Mixture
from model_packs.tiny.language_model import Shape, Stage
from model_packs.tiny.reward_model import RewardRecipe

_LARGE_NUMBERS: Final = Mixture(
    operation_weights=((1, 0.5), (2, 0.5)),
    distractor_rate=0.1,
    largest_start=99,
    largest_amount=99,
    largest_factor=9,
    one_digit_rate=0.0,
)
_SHORT: Final = Mixture(operation_weights=((1, 0.5), (2, 0.5)), distractor_rate=0.1)
_TWO_LAYERS: Final = Shape(layer_count=2, width=128, feed_forward_width=256)
_FOUR_LAYERS: Final = Shape(layer_count=4, width=128, feed_forward_width=256)
_EIGHT_LAYERS: Final = Shape(layer_count=8, width=128, feed_forward_width=256)
_TWELVE_LAYERS: Final = Shape(layer_count=12, width=128, feed_forward_width=256)
_TWENTY_FOUR_LAYERS: Final = Shape(layer_count=24, width=128, feed_forward_width=256)

# Draft and target share their first 500 steps; then the target grows, four times.
LANGUAGE_MODEL_STAGES: Final[dict[str, Stage]] = {
    "draft-1": Stage(_TWO_LAYERS, 500, row_tokens=112, rows=34, mixture=_LARGE_NUMBERS, seed=11),
    "target-2": Stage(
        *(_FOUR_LAYERS, 1000, 112, 20, _SHORT),
        start="draft-1",
        seed=12,
        muon_rate=0.007,
        adam_rate=1.5e-3,
    ),
    "target-3": Stage(
        *(_FOUR_LAYERS, 1000, 160, 16), start="target-2", seed=13, muon_rate=0.007, adam_rate=1.5e-3
    ),
    "target-4": Stage(
        *(_EIGHT_LAYERS, 1500, 160, 16),
        start="target-3",
        seed=14,
        muon_rate=0.007,
        adam_rate=1.5e-3,
        last_rate=0.32,
    ),
    "target-5": Stage(
        *(_EIGHT_LAYERS, 500, 160, 16),
        start="target-4",
        seed=16,
        muon_rate=0.0045,
        adam_rate=1e-3,
        last_rate=0.67,
    ),
    "target-6": Stage(
        *(_EIGHT_LAYERS, 500, 160, 16),
        start="target-5",
        seed=17,
        muon_rate=0.0045,
        adam_rate=1e-3,
        first_rate=0.6,
        last_rate=0.0,
    ),
    "target-7": Stage(
        *(_TWELVE_LAYERS, 800, 160, 16),
        start="target-6",
        seed=20,
        muon_rate=0.0045,
        adam_rate=1e-3,
        first_rate=0.8,
        last_rate=0.0,
    ),
    # Twelve layers cost three times what the draft costs; published pairs are at five to eight.
    "target-8": Stage(
        *(_TWENTY_FOUR_LAYERS, 600, 160, 16),
        start="target-7",
        seed=25,
        muon_rate=0.0045,
        adam_rate=1e-3,
        first_rate=0.8,
        last_rate=0.0,
    ),
    "draft-2": Stage(
        *(_TWO_LAYERS, 350, 160, 24),
        start="draft-1",
        seed=15,
        muon_rate=0.01,
        adam_rate=2e-3,
        last_rate=0.0,
    ),
}
DRAFT: Final = "draft-2"
TARGET: Final = "target-8"
ROLLOUT_WRITERS: Final = (DRAFT, "target-7")
REWARD_TRUNK: Final = "target-5"
REWARD: Final = RewardRecipe()

SEEDS: Final = {"rollouts": 51, "questions": 1000}
ROLLOUT_PROBLEM_COUNT: Final = 6000
QUESTION_COUNT: Final = 6000  # what the router is trained on
ROUTER_CONFIG: Final = (
    Path(__file__).resolve().parents[2] / "router_training" / "configs" / "tiny.toml"
)
