"""Names a model's question by its content. The hash of a prefix is chained: h' = H(h, step)."""

from __future__ import annotations

from hashlib import blake2b

from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GREEDY, Sampling, Trajectory

_DIGEST_BYTES = 20


def prefix_digest(trajectory: Trajectory) -> bytes:
    """Returns the digest of a problem and its steps, with who wrote each and why it ended."""
    digest = _digest(b"problem", trajectory.problem.encode())
    for step in trajectory.steps:
        digest = _digest(
            digest,
            step.text.encode(),
            step.source.value.encode(),
            step.stop_reason.value.encode(),
        )
    return digest


def step_question(request: StepRequest) -> bytes:
    """Returns the digest of everything a deterministic generator's step depends on."""
    # Greedy decoding looks at nothing else, whatever top_p, top_k and seed say.
    sampling = GREEDY if request.sampling.temperature == 0.0 else request.sampling
    return _digest(
        b"step",
        prefix_digest(request.trajectory),
        _sampling(sampling),
        b"%d %d" % (request.max_tokens, request.entropy_token_count),
    )


def score_question(trajectory: Trajectory, candidate: str) -> bytes:
    """Returns the digest of everything a scorer's answer depends on."""
    return _digest(b"score", prefix_digest(trajectory), candidate.encode())


def answer_key(role: str, revision: str, question: bytes) -> bytes:
    """Returns the key under which a role's answer lies; another revision has other keys."""
    return _digest(b"answer", role.encode(), revision.encode(), question)


def _sampling(sampling: Sampling) -> bytes:
    return f"{sampling.temperature} {sampling.top_p} {sampling.top_k} {sampling.seed}".encode()


def _digest(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        # Lengths keep ("ab", "c") apart from ("a", "bc").
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
