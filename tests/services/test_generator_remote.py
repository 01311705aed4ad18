"""A generator whose model runs on another server: its settings, its start, and its steps."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from arbitrage.core.errors import DraftUnavailable, FieldInvalid
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, Source, Step, StopReason, Trajectory
from services.engines.engine_prompts import ChatText, load_tokenizer
from services.engines.loading import ModelKind, ModelLoadError, load_model
from services.engines.transformers_generator import TransformersGenerator
from services.generator.__main__ import build
from services.generator.remote import running_remote_engine
from services.generator.settings import GeneratorSettings
from services.rpc.clients import GrpcGenerator
from services.rpc.pool import opened_pool
from services.rpc.program import StartError
from services.rpc.settings import SettingsError, read_settings
from services.rpc.telemetry import Telemetry
from tests.services.certificates import Authority
from tests.services.engine_models import byte_tokenizer, random_model, save
from tests.services.engine_requests import write
from tests.services.http_servers import HttpReply, HttpRequest, http_server
from tests.services.openai_servers import END_TOKEN, FakeOpenAi
from tests.services.running import GENERATOR, serving

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TWO_STEPS = ["Two", ".", "\n\n", "So", END_TOKEN]
ENTRY = {"id": "smol", "root": "/models/smol@1", "max_model_len": 200}


def saved_tokenizer(folder: Path, template: str | None) -> str:
    """Writes a tokenizer and returns its folder as a reference."""
    tokenizer = byte_tokenizer(adds_start=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(url: str, **fields: Any) -> GeneratorSettings:
    """Returns settings of a draft on an OpenAI-compatible server."""
    given = {"role": "draft", "model": "smol", "engine": "openai", "engine_url": url, "port": 0}
    return GeneratorSettings(**{**given, **fields})


async def refusal(fields: dict[str, Any], fake: FakeOpenAi | None = None) -> str:
    """Returns why a generator does not start."""
    async with http_server(fake or FakeOpenAi(TWO_STEPS, model_entry=ENTRY)) as server:
        with pytest.raises(StartError) as caught:
            async with build(settings(fields.pop("url", server.url), **fields), Telemetry()):
                pass
    return str(caught.value)


async def test_steps_come_through_the_service_as_a_models_own(tmp_path: Path) -> None:
    tokenizer = await asyncio.to_thread(saved_tokenizer, tmp_path, TEMPLATE)
    fake = FakeOpenAi(TWO_STEPS, model_entry=ENTRY)
    telemetry = Telemetry()
    async with http_server(fake) as server:
        told = settings(server.url + "/v1/", engine_tokenizer=tokenizer, engine_prompt="chat")
        async with (
            build(told, telemetry) as servicer,
            serving(GENERATOR, servicer) as generator,
            opened_pool("draft", generator.address) as pool,
        ):
            asked = StepRequest(Trajectory("1?", (Step("One", Source.DRAFT),)), 20)
            client = GrpcGenerator(pool, DraftUnavailable)
            [step] = [item async for item in client.generate_step(asked)]
    assert isinstance(step, GeneratedStep)
    assert (step.text, step.stop_reason) == ("Two.", StopReason.SEPARATOR)
    assert step.model.model_id == "smol"
    written = byte_tokenizer().decode(fake.bodies[-1]["prompt"])
    assert written == "<|start|>user: 1?\nassistant: One\n\n"
    count = telemetry.registry.get_sample_value(
        "arbitrage_engine_tokens_total", {"role": "draft", "kind": "decoded"}
    )
    assert count == 2 + step.token_count  # with the two of the first call


async def test_a_server_that_goes_away_is_the_draft_that_is_unavailable() -> None:
    fake = FakeOpenAi(TWO_STEPS, model_entry=ENTRY, broken_after=[1, 1])
    async with (
        http_server(fake) as server,
        build(settings(server.url), Telemetry()) as servicer,
        serving(GENERATOR, servicer) as generator,
        opened_pool("draft", generator.address) as pool,
    ):
        client = GrpcGenerator(pool, DraftUnavailable)
        with pytest.raises(DraftUnavailable, match="peer closed"):
            async for _ in client.generate_step(StepRequest(Trajectory("1?"), 20)):
                pass


async def test_a_start_that_cannot_be_names_the_setting_and_the_fix(tmp_path: Path) -> None:
    plain = await asyncio.to_thread(saved_tokenizer, tmp_path / "plain", None)
    broken = await asyncio.to_thread(saved_tokenizer, tmp_path / "broken", "{{ messages[9].x }}")
    empty, noise = tmp_path / "empty", tmp_path / "noise"
    await asyncio.to_thread(empty.write_text, " \n")
    await asyncio.to_thread(noise.write_text, "no certificate")
    ca = await asyncio.to_thread(lambda: Authority(tmp_path).path)
    chat = {"engine_prompt": "chat"}
    for fields, said in (
        ({"model": "llama"}, "ARBITRAGE_MODEL: .* serves no model 'llama'; .* it does: smol"),
        ({"url": "http://127.0.0.1:1"}, "ARBITRAGE_ENGINE_URL: .*start the server first"),
        ({**chat, "engine_tokenizer": plain}, "ARBITRAGE_ENGINE_TOKENIZER: .*no chat template; .*"),
        ({**chat, "engine_tokenizer": broken}, "ARBITRAGE_ENGINE_TOKENIZER: .*cannot be used"),
        ({"engine_tokenizer": "nowhere"}, "ARBITRAGE_ENGINE_TOKENIZER: .*no such tokenizer"),
        ({"engine_tokenizer": str(tmp_path)}, "ARBITRAGE_ENGINE_TOKENIZER: .*cannot be loaded"),
        ({"engine_api_key_file": empty}, "ARBITRAGE_ENGINE_API_KEY_FILE: .*holds no key"),
        ({"engine_api_key_file": tmp_path / "no"}, "ARBITRAGE_ENGINE_API_KEY_FILE: .*be read"),
        ({"url": "https://127.0.0.1:1", "engine_ca": noise}, "ARBITRAGE_ENGINE_CA: .*certificate"),
        ({"engine_ca": ca}, "ARBITRAGE_ENGINE_CA: .*https"),
    ):
        assert re.match(said, await refusal(dict(fields))), fields


async def test_a_server_that_is_there_and_fails_is_not_called_absent() -> None:
    for status, wanted in (
        (
            401,
            "ARBITRAGE_ENGINE_API_KEY_FILE: .*answered 401: no; give it an API key that it knows",
        ),
        (500, "ARBITRAGE_ENGINE_URL: .*answered 500: no; look into the server's log"),
    ):

        async def refused(request: HttpRequest, reply: HttpReply, status: int = status) -> None:
            await reply.answer(status, {"error": "no"})

        async with http_server(refused) as server:
            with pytest.raises(StartError) as caught:
                async with build(settings(server.url), Telemetry()):
                    pass
        assert re.match(wanted, str(caught.value)), caught.value


async def test_what_a_server_does_not_say_has_to_be_set() -> None:
    silent = {"id": "smol", "created": 5}
    said = await refusal({}, FakeOpenAi(TWO_STEPS, model_entry=silent))
    assert said.startswith("ARBITRAGE_ENGINE_REVISION: is not set")
    assert "; ARBITRAGE_ENGINE_MAX_CONTEXT_TOKENS: is not set" in said
    said = await refusal({"engine_revision": "r1"}, FakeOpenAi(TWO_STEPS, model_entry=silent))
    assert said.startswith("ARBITRAGE_ENGINE_MAX_CONTEXT_TOKENS: is not set")
    async with http_server(FakeOpenAi(TWO_STEPS, model_entry=silent)) as server:
        told = settings(server.url, engine_revision="r1", engine_max_context_tokens=64)
        async with build(told, Telemetry()):
            pass


async def test_the_revision_changes_with_what_the_server_says_of_its_model() -> None:
    revisions = set()
    for entry in (ENTRY, {**ENTRY, "created": 99}, {**ENTRY, "root": "/models/smol@2"}):
        async with (
            http_server(FakeOpenAi(TWO_STEPS, model_entry=entry)) as server,
            running_remote_engine(settings(server.url), Telemetry()) as engine,
        ):
            revisions.add(engine.identity.revision)
    assert len(revisions) == 2


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ENGINE": "openai"}, "ARBITRAGE_ENGINE_URL: is not set, but ARBITRAGE_ENGINE is openai"),
        ({"ENGINE_URL": "http://a:1"}, "ARBITRAGE_ENGINE_URL: is set, but ARBITRAGE_ENGINE is tr"),
        ({"ENGINE": "vllm"}, "ARBITRAGE_ENGINE: expected one of transformers, openai or tgi"),
        (
            {"ENGINE": "tgi", "ENGINE_URL": "http://a:1", "ENGINE_PROMPT": "chat"},
            "ARBITRAGE_ENGINE_TOKENIZER: is not set, but ARBITRAGE_ENGINE_PROMPT is",
        ),
        ({"ENGINE": "tgi", "ENGINE_URL": "a:1"}, "ARBITRAGE_ENGINE_URL: expected http://host:port"),
        (
            {"ENGINE": "tgi", "ENGINE_URL": "http://me:secret@a:1"},
            "ARBITRAGE_ENGINE_URL: expected an address with no user in it",
        ),
    ],
)
def test_engine_settings_that_do_not_go_together_are_refused(
    variables: dict[str, str], said: str
) -> None:
    given = {"MODEL": "smol", "ROLE": "draft", **variables}
    with pytest.raises(SettingsError) as caught:
        read_settings(GeneratorSettings, {f"ARBITRAGE_{k}": v for k, v in given.items()})
    assert str(caught.value).startswith(said)


def test_a_chat_prompt_leaves_the_models_turn_open(tmp_path: Path) -> None:
    text = ChatText(load_tokenizer(saved_tokenizer(tmp_path, TEMPLATE)), "smol")
    steps = (Step("One", Source.DRAFT), Step("and a", Source.TARGET, StopReason.STEP_LENGTH))
    pieces = text.pieces(Trajectory("1?", steps))
    assert "".join(pieces) == "<|start|>user: 1?\nassistant: One\n\nand a"
    assert pieces[0] == text.pieces(Trajectory("1?"))[0]


def test_a_problem_that_the_template_refuses_is_the_callers(tmp_path: Path) -> None:
    template = "{% if '!' in messages[0].content %}{{ raise_exception('no!') }}{% endif %}a"
    text = ChatText(load_tokenizer(saved_tokenizer(tmp_path, template)), "smol")
    with pytest.raises(FieldInvalid, match="refuses it"):
        text.pieces(Trajectory("1!"))


async def test_a_model_in_this_process_reads_its_chat_template_too(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_start=True)
    tokenizer.chat_template = TEMPLATE
    folder = await asyncio.to_thread(save, tmp_path, random_model(), tokenizer)
    loaded = await asyncio.to_thread(load_model, folder, ModelKind.CAUSAL_LM)
    asked = StepRequest(Trajectory("1?"), 3)
    steps = {}
    for is_chat in (False, True):
        engine = TransformersGenerator(loaded, is_chat=is_chat)
        steps[is_chat] = await write(engine, asked)
        await engine.close()
    assert steps[False].prefill_token_count == 1 + len("1?\n")
    assert steps[True].prefill_token_count == 1 + len("user: 1?\nassistant: ")
    # What a prefix cache keeps for the one must never answer the other.
    assert steps[True].model.revision.startswith(steps[False].model.revision + "-chat-")


async def test_chat_without_a_template_is_a_clear_error(tmp_path: Path) -> None:
    folder = await asyncio.to_thread(save, tmp_path, random_model(), byte_tokenizer())
    loaded = await asyncio.to_thread(load_model, folder, ModelKind.CAUSAL_LM)
    with pytest.raises(ModelLoadError, match="no chat template; set ARBITRAGE_ENGINE_PROMPT=plain"):
        TransformersGenerator(loaded, is_chat=True)
