"""Answers HTTP requests by asking orchestrators."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from arbitrage.calls import solution_of
from arbitrage.client import AsyncArbitrageClient
from arbitrage.core.errors import FieldInvalid, Unauthenticated
from services.gateway.chat import Answer, ChatCall, chat_call, model_list, no_such_model
from services.gateway.orchestrators import Orchestrators
from services.rpc.tracing import asking

_BEARER = "bearer "

Json = dict[str, Any]


class GatewayServicer:
    """The methods behind the routes: each takes a request's headers and body.

    Callers' keys go on to the orchestrator, which alone knows them.
    """

    def __init__(self, orchestrators: Orchestrators) -> None:
        self._orchestrators = orchestrators
        self._started_s = int(time.time())

    async def chat_completions(
        self, headers: Mapping[str, str], body: bytes
    ) -> Json | AsyncGenerator[Json]:
        """Returns the answer, or its chunks where a stream was asked for.

        Raises:
            ArbitrageError
        """
        call = chat_call(body)
        if call.is_stream:
            return self._chunks(headers, call)
        with asking("orchestrator", "GenerateSolution") as asked:
            client = self._client(headers, asked.metadata)
            async with aclosing(client.stream(call.messages, **call.options)) as events:
                solution = solution_of([event async for event in events])
        return Answer(call.policy).whole(solution)

    async def models(self, headers: Mapping[str, str], body: bytes) -> Json:
        """Returns the policies that are offered, as models."""
        return model_list(await self._policies(headers), self._started_s)

    async def model(self, headers: Mapping[str, str], body: bytes, name: str) -> Json:
        """Returns one of them.

        Raises:
            HttpError: there is none of that name.
        """
        policies = await self._policies(headers)
        if name not in policies:
            raise no_such_model(name, policies)
        [found] = model_list((name,), self._started_s)["data"]
        assert isinstance(found, dict)
        return found

    async def _chunks(self, headers: Mapping[str, str], call: ChatCall) -> AsyncGenerator[Json]:
        answer = Answer(call.policy, call.includes_usage)
        with asking("orchestrator", "GenerateSolution") as asked:
            client = self._client(headers, asked.metadata)
            async with aclosing(client.stream(call.messages, **call.options)) as events:
                async for event in events:
                    for chunk in answer.chunks(event):
                        yield chunk

    async def _policies(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        with asking("orchestrator", "GetCapabilities") as asked:
            return (await self._client(headers, asked.metadata).capabilities()).policies

    def _client(
        self, headers: Mapping[str, str], metadata: tuple[tuple[str, str], ...]
    ) -> AsyncArbitrageClient:
        key = _key_in(headers)
        if not self._orchestrators.passes_keys_on:
            key = None
        try:
            return self._orchestrators.client.on_behalf_of(key, metadata)
        except FieldInvalid as error:
            raise Unauthenticated(f"authorization: {error.problem}; {error.fix}") from None


def _key_in(headers: Mapping[str, str]) -> str | None:
    given = headers.get("authorization")
    if given is None:
        return None
    if not given.lower().startswith(_BEARER):
        raise Unauthenticated("authorization: is no API key; send it as: Authorization: Bearer KEY")
    return given[len(_BEARER) :].strip()
