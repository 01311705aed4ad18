"""Where the router service's model comes from, and which revision of it is the latest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.engines.loading import LoadOptions, ModelKind, folder_revision
from services.engines.revisions import RevisionError, RevisionStore
from services.engines.transformers_scorers import TransformersRouter
from services.router.settings import RouterSettings
from services.rpc.model_program import load_as_told

_KIND = ModelKind.SEQUENCE_CLASSIFICATION


def _engine(
    settings: RouterSettings, reference: str, revision: str | None = None
) -> TransformersRouter:
    loaded = load_as_told(settings, reference, _KIND, revision)
    return TransformersRouter(loaded, settings.engine_options)


@dataclass(frozen=True, slots=True)
class PromotedRouters:
    """A location that routers are promoted to. What lies elsewhere is copied below `cache`."""

    settings: RouterSettings
    store: RevisionStore
    cache: Path

    def latest(self) -> str:
        """Returns the revision that was promoted last."""
        revision = self.store.current()
        if revision is None:
            raise RevisionError(
                f"{self.store.location}: no router was promoted to it yet; run router_training"
            )
        return revision

    def load(self, revision: str) -> TransformersRouter:
        """Fetches a revision, checks its files, and loads it."""
        folder = self.store.fetch(revision, self.cache)
        return _engine(self.settings, str(folder), revision)


@dataclass(frozen=True, slots=True)
class RouterFolder:
    """A checkpoint folder whose files may be replaced."""

    settings: RouterSettings
    folder: Path

    def latest(self) -> str:
        """Returns the digest of the files as they are."""
        options = LoadOptions(self.settings.device, self.settings.dtype)
        try:
            return folder_revision(self.folder, options)
        except OSError as error:
            raise RevisionError(f"{self.folder}: it cannot be read ({error.strerror})") from None

    def load(self, revision: str) -> TransformersRouter:
        """Loads the folder."""
        return _engine(self.settings, str(self.folder))


@dataclass(frozen=True, slots=True)
class FixedRouter:
    """A model of the hub at a revision, which never changes."""

    settings: RouterSettings
    reference: str

    def latest(self) -> str:
        """Returns the reference."""
        return self.reference

    def load(self, revision: str) -> TransformersRouter:
        """Loads the model."""
        return _engine(self.settings, self.reference)
