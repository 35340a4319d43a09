"""ModelService through a real server."""

from __future__ import annotations

from glasshouse.v1 import models_pb2 as pb

from ..fake_engine import BOS, EOS, FakeEngine
from ..serving import serving


async def test_models_are_listed_by_name_in_pages() -> None:
    async with serving(*(FakeEngine(name) for name in ("c", "a", "b"))) as served:
        seen: list[str] = []
        token = ""
        while True:
            page = await served.models.ListModels(pb.ListModelsRequest(page_size=2, page_token=token))
            seen += [model.name for model in page.models]
            token = page.next_page_token
            if not token:
                break
        everything = await served.models.ListModels(pb.ListModelsRequest(page_size=10**6))
    assert seen == ["models/a", "models/b", "models/c"]
    assert len(everything.models) == 3


async def test_a_model_is_found_by_either_name_or_as_the_only_one() -> None:
    async with serving() as served:
        for name in ("models/echo", "echo", ""):
            model = (await served.models.GetModel(pb.GetModelRequest(name=name))).model
            assert model.name == "models/echo"
    assert (model.d_model, model.n_layers, model.context_length) == (8, 2, 512)
    assert (list(model.eos_token_ids), model.bos_token_id) == ([EOS], BOS)


async def test_hook_points_in_order() -> None:
    async with serving() as served:
        first = await served.models.ListHookPoints(pb.ListHookPointsRequest(page_size=1))
        second = await served.models.ListHookPoints(
            pb.ListHookPointsRequest(page_size=1, page_token=first.next_page_token)
        )
    points = [*first.hook_points, *second.hook_points]
    assert [point.name for point in points] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    assert [point.layer for point in points] == [0, 1]
    assert all(point.HasField("layer") for point in points)
    assert not second.next_page_token


async def test_text_to_tokens_and_back() -> None:
    async with serving() as served:
        tokens = await served.models.Tokenize(pb.TokenizeRequest(input={"text": "héllo"}))
        empty = await served.models.Tokenize(pb.TokenizeRequest(input={"text": ""}))
        text = await served.models.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert list(tokens.token_ids) == [BOS, *"héllo".encode()]
    assert len(tokens.tokens) == len(tokens.token_ids)
    assert list(empty.token_ids) == [BOS]
    assert text.text == "héllo"


async def test_long_text_to_tokens_and_back() -> None:
    async with serving() as served:
        tokens = await served.models.Tokenize(pb.TokenizeRequest(input={"text": "ab" * 5000}))
        text = await served.models.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert text.text == "ab" * 5000


async def test_chat_is_rendered_with_the_assistants_turn_by_default() -> None:
    messages = [{"role": "user", "content": "hi"}]
    async with serving() as served:
        rendered = await served.models.RenderChat(pb.RenderChatRequest(messages=messages))
        closed = await served.models.RenderChat(
            pb.RenderChatRequest(messages=messages, add_generation_prompt=False)
        )
    assert rendered.text == "<user>hi\n<assistant>"
    assert list(rendered.token_ids) == list(rendered.text.encode())
    assert closed.text == "<user>hi\n"
