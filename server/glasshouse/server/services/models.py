"""ModelService: what is served, its hook points, its tokenizer."""

from __future__ import annotations

import asyncio

from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import models_pb2 as pb

from . import fields
from .call import Call
from .catalogue import Catalogue, ServedModel
from .inputs import InputReader
from .pages import page

_INLINE_TOKENS = 1024


class ModelServicer:
    """Serves `glasshouse.v1.ModelService`."""

    def __init__(self, catalogue: Catalogue, limits: Limits) -> None:
        self._catalogue = catalogue
        self._limits = limits

    async def ListModels(self, request: pb.ListModelsRequest, call: Call) -> pb.ListModelsResponse:
        """The models, by name."""
        models, token = page(
            self._catalogue.all(),
            page_size=request.page_size,
            page_token=request.page_token,
            default=50,
            most=1000,
        )
        return pb.ListModelsResponse(models=[_model(model) for model in models], next_page_token=token)

    async def GetModel(self, request: pb.GetModelRequest, call: Call) -> pb.GetModelResponse:
        """One model."""
        return pb.GetModelResponse(model=_model(self._catalogue.find(request.name, "name")))

    async def ListHookPoints(
        self, request: pb.ListHookPointsRequest, call: Call
    ) -> pb.ListHookPointsResponse:
        """The hook points, in the order of the forward pass."""
        model = self._catalogue.find(request.model, "model")
        points, token = page(
            model.engine.hook_points,
            page_size=request.page_size,
            page_token=request.page_token,
            default=1000,
            most=1000,
        )
        return pb.ListHookPointsResponse(hook_points=[_hook_point(p) for p in points], next_page_token=token)

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        """Text or a conversation to token ids."""
        model = self._catalogue.find(request.model, "model")
        ids = await InputReader(model, self._limits).tokens(request.input, request.HasField("input"), "input")
        strings = await self._strings(model, ids)
        return pb.TokenizeResponse(token_ids=ids, tokens=strings)

    async def Detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """Token ids to text."""
        model = self._catalogue.find(request.model, "model")
        ids = list(request.token_ids)
        limit = self._limits.max_input_tokens_total
        fields.count(len(ids), "token_ids", limit, "max_input_tokens_total", "tokens")
        InputReader(model, self._limits).check_ids(ids, "token_ids")
        if len(ids) <= _INLINE_TOKENS:
            return pb.DetokenizeResponse(text=model.engine.codec.decode(ids))
        return pb.DetokenizeResponse(text=await asyncio.to_thread(model.engine.codec.decode, ids))

    async def RenderChat(self, request: pb.RenderChatRequest, call: Call) -> pb.RenderChatResponse:
        """A conversation as the text the model reads."""
        model = self._catalogue.find(request.model, "model")
        answer = request.add_generation_prompt if request.HasField("add_generation_prompt") else True
        reader = InputReader(model, self._limits)
        text, ids = await reader.chat(request.messages, "messages", answer=answer)
        return pb.RenderChatResponse(text=text, token_ids=ids)

    @staticmethod
    async def _strings(model: ServedModel, ids: list[int]) -> list[str]:
        if len(ids) <= _INLINE_TOKENS:
            return model.strings.of(ids)
        return await asyncio.to_thread(model.strings.of, ids)


def _model(model: ServedModel) -> pb.Model:
    info = model.engine.info
    return pb.Model(
        name=model.resource_name,
        family=info.family,
        n_layers=info.n_layers,
        d_model=info.d_model,
        n_heads=info.n_heads,
        n_kv_heads=info.n_kv_heads,
        d_head=info.d_head,
        d_mlp=info.d_mlp,
        vocab_size=info.vocab_size,
        context_length=info.context_length,
        dtype=info.dtype,
        device=info.device,
        engine=info.engine,
        has_chat_template=info.has_chat_template,
        eos_token_ids=info.eos_token_ids,
        capabilities=info.capabilities,
        bos_token_id=info.bos_token_id,
    )


def _hook_point(point: HookPoint) -> pb.HookPoint:
    return pb.HookPoint(
        name=point.name,
        module_path=point.module_path,
        width=point.width,
        readable=point.readable,
        writable=point.writable,
        layer=point.layer,
        n_heads=point.n_heads,
        note=point.note,
    )
