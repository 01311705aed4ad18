"""Speaks with text-generation-inference through `huggingface_hub`, its maintained client.

TGI refuses with a status, or, once it streams, with an event that holds the same words.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, Final, cast

from huggingface_hub import (
    AsyncInferenceClient,
    InferenceTimeoutError,
    TextGenerationStreamOutput,
    set_async_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    IncompleteGenerationError,
    OverloadedError,
    TextGenerationError,
    ValidationError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # made lazily
from pydantic import BaseModel, ConfigDict, Field
from pydantic import ValidationError as ShapeError

from arbitrage.core.shown import one_line
from arbitrage.core.steps import SEPARATOR, StopReason
from services.engines.engine_http import (
    ConnectionBroken,
    EngineSetupError,
    HttpServer,
    ServerError,
    ServerOverloaded,
    ServerRefused,
    ServerUnavailable,
    read_out,
)
from services.engines.engine_server import (
    Completion,
    End,
    Piece,
    ServedModel,
    digest_of,
    entropy_of,
)

_STOP_REASONS: Final = {
    "stop_sequence": StopReason.SEPARATOR,
    "eos_token": StopReason.END_OF_SEQUENCE,
    "length": StopReason.STEP_LENGTH,
}


class _Info(BaseModel):
    """What is read of TGI's description of itself."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model_id: str
    model_sha: str | None = None
    max_total_tokens: int = Field(ge=1)


class TgiServer:
    """Implements `EngineServer` over text-generation-inference.

    `top_logprobs` is how many tokens' log-probabilities are asked for where an entropy is wanted;
    a server takes 5 unless it was started with another `--max-top-n-tokens`.
    Making one reads files, so a coroutine does it in a thread.
    """

    def __init__(self, http: HttpServer, top_logprobs: int = 5) -> None:
        # The client names the libraries it finds to every server, and looks for them once.
        build_hf_headers(token=False)
        self._http = http
        self._top_logprobs = top_logprobs

    async def describe(self, model: str) -> ServedModel:
        """Asks which model it runs; a TGI runs one.

        Raises:
            EngineSetupError: another one than `model`.
            ServerError
        """
        try:
            known = _Info.model_validate(await self._http.get("/info"))
        except ShapeError as error:
            raise EngineSetupError(
                "engine_url",
                f"{self._http.url}/info does not describe a model",
                "name a text-generation-inference server",
            ) from error
        if known.model_id != model:
            raise EngineSetupError(
                "model",
                f"{self._http.url} serves no model {one_line(model)!r}",
                f"set it to the one that it does: {one_line(known.model_id)}",
            )
        revision = digest_of(known.model_id, known.model_sha) if known.model_sha else ""
        return ServedModel(revision, known.max_total_tokens)

    async def complete(self, completion: Completion) -> AsyncGenerator[Piece | End]:
        """Yields pieces, then one `End`, last.

        Raises:
            ServerError
        """
        # A client of its own for each call: it holds what it streams until it is closed.
        async with self._client() as client:
            with self._failures():
                outputs = await self._asked(client, completion)
                async with aclosing(cast("AsyncGenerator[Any]", outputs)):
                    async for output in outputs:
                        if output.details is None:
                            yield self._piece(output)
                            continue
                        await read_out(outputs)
                        yield self._last_piece(output)
                        yield self._end(output)
                        return
        raise ConnectionBroken(f"{self._http.url}: the stream ended without its details")

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.close()

    def _client(self) -> AsyncInferenceClient:
        # Without a token the client would look for one in this machine's files, at every call. The
        # connections replace it by the server's own key, or by none.
        return AsyncInferenceClient(model=f"{self._http.url}/generate_stream", token="-")  # noqa: S106 - none

    async def _asked(
        self, client: AsyncInferenceClient, completion: Completion
    ) -> AsyncIterable[TextGenerationStreamOutput]:
        sampling = completion.sampling
        # A TGI that is told how to draw draws, `do_sample` or not.
        is_drawn = sampling.temperature > 0.0
        # The factory is the whole process's, and nothing comes between here and its use.
        set_async_client_factory(self._http.lent_client)
        return await client.text_generation(
            completion.prompt.text,
            stream=True,
            details=True,
            max_new_tokens=completion.max_tokens,
            stop=[SEPARATOR],
            return_full_text=False,
            do_sample=is_drawn,
            # TGI refuses what would change nothing: a temperature of 0, a top_p of 1.
            temperature=sampling.temperature or None,
            top_p=sampling.top_p if is_drawn and sampling.top_p < 1.0 else None,
            top_k=sampling.top_k or None if is_drawn else None,
            seed=completion.seed if is_drawn else None,
            top_n_tokens=(self._top_logprobs or None) if completion.wants_entropy else None,
        )

    def _piece(self, output: TextGenerationStreamOutput) -> Piece:
        token = output.token
        logarithms = [top.logprob for top in output.top_tokens or ()]
        entropies = (entropy_of(logarithms),) if logarithms else ()
        return Piece("" if token.special else token.text, entropies)

    def _last_piece(self, output: TextGenerationStreamOutput) -> Piece:
        """Returns the piece before the end, without the stop sequence, which TGI leaves in."""
        piece = self._piece(output)
        if output.details is None or output.details.finish_reason != "stop_sequence":
            return piece
        # The sequence may have begun in a piece before, and then only its last newline is here.
        text = piece.text.removesuffix(SEPARATOR)
        return replace(piece, text=text if text != piece.text else text.removesuffix("\n"))

    def _end(self, output: TextGenerationStreamOutput) -> End:
        details = output.details
        assert details is not None, "the last event has them"
        reason = _STOP_REASONS.get(details.finish_reason)
        if reason is None:
            raise ServerUnavailable(
                f"{self._http.url}: ended for a reason that is not known: {details.finish_reason}"
            )
        return End(reason, details.generated_tokens, details.input_length)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns what the client raises into a `ServerError`."""
        url = self._http.url
        with self._http.failures():
            try:
                yield
            except InferenceTimeoutError as error:
                if error.__cause__ is not None:
                    raise error.__cause__ from None
                raise
            except TextGenerationError as error:
                raise self._of_tgi(error) from error
            except HfHubHTTPError as error:
                raise self._http.refusal(error.response, error.response.content) from error
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                if isinstance(error, UnicodeDecodeError):
                    raise
                raise ServerUnavailable(f"{url}: sent an event that cannot be read") from error

    def _of_tgi(self, error: TextGenerationError) -> ServerError:
        if isinstance(error.__cause__, HfHubHTTPError):
            # The status and the headers say more than the body alone.
            return self._http.refusal(error.__cause__.response, error.__cause__.response.content)
        said = f"{self._http.url}: {error}"
        match error:
            case OverloadedError():
                return ServerOverloaded(said)
            case ValidationError():
                return ServerRefused(said, str(error))
            case IncompleteGenerationError():
                return ConnectionBroken(said)
            case _:
                return ServerUnavailable(said)
