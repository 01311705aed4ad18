"""What the programs whose model a server runs over HTTP can be told of that server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from services.rpc.model_program import ModelSettings
from services.rpc.settings import PositiveCount


def http_url(url: str) -> str:
    """Returns the address of a server without what every path asked for begins with.

    Raises:
        PydanticCustomError: it is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc or parts.query or parts.fragment:
        raise PydanticCustomError("engine_url", "http://host:port or https://host:port")
    if parts.username is not None:
        raise PydanticCustomError(
            "engine_url",
            "an address with no user in it (ARBITRAGE_ENGINE_API_KEY_FILE has the key)",
        )
    # Servers are named with and without it; every path asked for begins with it.
    return url.rstrip("/").removesuffix("/v1")


EngineUrl = Annotated[str, AfterValidator(http_url)]


class RemoteSettings(ModelSettings):
    """How a server is reached, and what it does not say of its model."""

    engine_url: EngineUrl | None = Field(
        None, description="Address of that server: what stands before /v1, or before /info."
    )
    engine_api_key_file: Path | None = Field(
        None, description="File with the API key that it asks for."
    )
    engine_ca: Path | None = Field(
        None,
        description="PEM file with the CA of its certificate; by default the system's are "
        "believed.",
    )
    engine_tokenizer: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Tokenizer of the model there: a folder, org/name@revision, a .gguf file, or "
        "a pack; without it the server tokenises.",
    )
    engine_max_context_tokens: PositiveCount | None = Field(
        None, description="Tokens that fit the model's context there; by default what it says."
    )
    engine_revision: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None,
        description="What stands for the weights there and changes with them; by default made of "
        "what the server says of its model.",
    )
