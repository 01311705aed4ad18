"""API keys: what the file says of them, and the authenticator that asks for one.

The file is TOML, with no key in it but each one's SHA-256:

    [[keys]]
    id = "acme-1"
    tenant = "acme"
    sha256 = "…"
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from arbitrage.policy_specs import POLICY_NAMES
from services.rpc.auth import Caller, Metadata
from services.rpc.refusals import KeyRefused, Refusal
from services.rpc.settings import variable_of
from services.rpc.watched import WatchedFiles

AUTHORIZATION = "authorization"
_SCHEME = "bearer "

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@/-]{0,63}$")]
Limit = Annotated[int, Field(ge=1)]


class KeysError(Exception):
    """A file of API keys cannot be used. The message names variable, file, place and problem."""


class KeyEntry(BaseModel):
    """What a keys file says of one key. The key itself is in no file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: Name
    revoked: bool = False
    expires_at: AwareDatetime | None = None
    policies: frozenset[str] | None = None
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_concurrency: Limit | None = None

    @field_validator("policies")
    @classmethod
    def _policies_are_known(cls, policies: frozenset[str] | None) -> frozenset[str] | None:
        unknown = sorted((policies or frozenset()) - set(POLICY_NAMES))
        if unknown:
            raise ValueError(f"no such policy: {unknown[0]}; known are {', '.join(POLICY_NAMES)}")
        return policies

    @property
    def caller(self) -> Caller:
        """Who shows this key."""
        return Caller(
            self.tenant,
            self.id,
            self.policies,
            self.requests_per_minute,
            self.tokens_per_minute,
            self.max_concurrency,
        )


class KeysFile(BaseModel):
    """All keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[KeyEntry, ...]

    @field_validator("keys")
    @classmethod
    def _each_is_there_once(cls, keys: tuple[KeyEntry, ...]) -> tuple[KeyEntry, ...]:
        for what in ("id", "sha256"):
            seen: dict[str, str] = {}
            for key in keys:
                value = getattr(key, what)
                if value in seen:
                    raise ValueError(f"keys {seen[value]} and {key.id} have the same {what}")
                seen[value] = key.id
        return keys


def read_keys(path: Path) -> KeysFile:
    """Returns the keys in a TOML file.

    Raises:
        KeysError
    """
    place = f"{variable_of('api_keys_file')}: {path}"
    try:
        return KeysFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise KeysError(
            f"{place}: cannot be read ({error.strerror}); name a file that can"
        ) from None
    except ValidationError as error:
        # Not what was found: in the place of a digest it may be a key.
        problems = (
            f"{place}: {_place(problem['loc'])}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False, include_input=False)
        )
        raise KeysError(f"{'; '.join(problems)}; correct it, as docs/security.md shows") from None
    except ValueError as error:
        raise KeysError(f"{place}: is not TOML ({error}); correct it") from None


def digest_of(key: str) -> str:
    """Returns what a keys file holds of a key.

    A plain hash is enough because a key has 256 bits of chance; it is no password.
    """
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKeys:
    """Lets in whoever shows a key of the file, as `authorization: Bearer KEY`."""

    def __init__(
        self,
        path: Path,
        on_failure: Callable[[], None] = lambda: None,
        look_interval_s: float = 1.0,
    ) -> None:
        """Reads the file.

        Raises:
            KeysError
        """
        self._files = WatchedFiles((path,), lambda: read_keys(path), on_failure)
        self._look_interval_s = look_interval_s
        self._look_at_s = 0.0

    async def authenticate(
        self, method: str, metadata: Metadata, identities: frozenset[str]
    ) -> Caller:
        """Returns whose key it is.

        Raises:
            KeyRefused
        """
        digest = digest_of(_shown_key(metadata))
        # All entries, however early one fits: time must not tell how much of a digest was right.
        fitting = [
            entry for entry in await self._keys() if hmac.compare_digest(entry.sha256, digest)
        ]
        if not fitting:
            raise KeyRefused(
                Refusal.UNKNOWN_KEY,
                f"{AUTHORIZATION}: this API key is not known here; check for which deployment "
                "it was issued",
            )
        entry = fitting[0]
        if entry.revoked:
            raise KeyRefused(
                Refusal.REVOKED_KEY,
                f"{AUTHORIZATION}: API key {entry.id} was revoked; ask for a new one",
                entry.id,
            )
        if entry.expires_at is not None and entry.expires_at <= datetime.now(UTC):
            raise KeyRefused(
                Refusal.EXPIRED_KEY,
                f"{AUTHORIZATION}: API key {entry.id} expired at {entry.expires_at.isoformat()}; "
                "ask for a new one",
                entry.id,
            )
        return entry.caller

    async def _keys(self) -> tuple[KeyEntry, ...]:
        now_s = time.monotonic()
        if now_s >= self._look_at_s:
            # Set first: whoever calls meanwhile is answered from what is known.
            self._look_at_s = now_s + self._look_interval_s
            await asyncio.to_thread(self._files.look)
        return self._files.value.keys


def _shown_key(metadata: Metadata) -> str:
    shown = [value for name, value in metadata if name == AUTHORIZATION]
    text = shown[0] if len(shown) == 1 else ""
    if not isinstance(text, str) or not text.lower().startswith(_SCHEME):
        raise KeyRefused(
            Refusal.MISSING_KEY,
            f"{AUTHORIZATION}: the call has no API key; send exactly one, as metadata "
            f"`{AUTHORIZATION}: Bearer KEY`",
        )
    return text[len(_SCHEME) :].strip()


def _place(location: tuple[int | str, ...]) -> str:
    place = ""
    for part in location:
        place += f"[{part}]" if isinstance(part, int) else f".{part}"
    return place.removeprefix(".") or "the whole file"
