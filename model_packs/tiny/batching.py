"""Groups rows of like length into batches, so that little of a batch is padding.

Compiling a model costs a minute a shape on these processors, more than it saves in runs of ten
minutes, so batches may have any length.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

Rest = TypeVar("Rest")
_CHUNK_BATCHES = 8


def by_length(
    rows: Iterable[tuple[list[int], Rest]], batch_rows: int, rng: random.Random
) -> Iterator[list[tuple[list[int], Rest]]]:
    """Yields full batches of (ids, rest), sorted by length within chunks of a few batches."""
    source = iter(rows)
    while chunk := list(islice(source, batch_rows * _CHUNK_BATCHES)):
        chunk.sort(key=lambda row: len(row[0]))
        batches = [chunk[at : at + batch_rows] for at in range(0, len(chunk), batch_rows)]
        rng.shuffle(batches)
        yield from batches


def padded(rows: Sequence[list[int]], fill: int) -> list[list[int]]:
    """Returns the rows filled up on the right to the longest.

    >>> padded([[1], [2, 3]], 0)
    [[1, 0], [2, 3]]
    """
    longest = max(map(len, rows))
    return [row + [fill] * (longest - len(row)) for row in rows]
