"""What can go wrong in a training run. Every message names field or file, value and fix.

TrainingError
├── ConfigInvalid      the configuration cannot be used
├── QuestionsInvalid   the questions cannot be read
├── DatasetInvalid     rows are damaged, missing, or do not belong together
├── ServiceFailed      a service cannot be reached or refuses
├── StorageFailed      the disk is full or a folder cannot be written
└── PromotionRefused   the new router is not good enough to serve
"""

from __future__ import annotations


class TrainingError(Exception):
    """A stage cannot go on; what earlier stages wrote stays as it is."""

    exit_code = 2


class ConfigInvalid(TrainingError):
    """The configuration cannot be used."""


class QuestionsInvalid(TrainingError):
    """The questions cannot be read."""


class DatasetInvalid(TrainingError):
    """Rows are damaged, missing, or do not belong together."""


class ServiceFailed(TrainingError):
    """A model service or Redis cannot be reached, or refuses what it is asked."""


class StorageFailed(TrainingError):
    """The disk is full or a folder cannot be written."""


class PromotionRefused(TrainingError):
    """The new router's budget curve lies below the serving one's."""

    exit_code = 1
