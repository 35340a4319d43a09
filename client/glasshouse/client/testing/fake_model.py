"""A model that means nothing and is the same every time.

Tokens are UTF-8 bytes, after a BOS; generated letters are a checksum of everything before them, of the seed
and of the interventions; an activation is a sine of its hook point, token and position. An edit changes the
activations at its own hook point and, through the checksum, the text that follows.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.testing.failures import invalid, refused
from glasshouse.client.testing.fake_dictionary import FakeDictionary
from glasshouse.v1 import inputs_pb2, interventions_pb2, models_pb2, readouts_pb2
from glasshouse.wire import reasons
from glasshouse.wire.tensors import TensorError, unpack

T = TypeVar("T")
BOS, EOS, VOCAB_SIZE = 256, 257, 258
N_LAYERS, D_MODEL, N_HEADS, CONTEXT_LENGTH = 2, 8, 2, 512


@dataclass(frozen=True)
class FakeDirection:
    """A direction: its best hook point, and its vectors by hook point."""

    hook_point: str
    at: Mapping[str, NDArray[Any]]


class FakeModel:
    """The model behind `FakeServer`. `reply` is what every generation says, where it is given."""

    def __init__(self, name: str = "fake", reply: str | None = None) -> None:
        self.name = name
        self._reply = None if reply is None else [*reply.encode(), EOS]
        residual = [f"blocks.{layer}.hook_resid_{at}" for layer in range(N_LAYERS) for at in ("pre", "post")]
        self.residual = ["hook_embed", *residual]
        self.attention = [f"blocks.{layer}.attn.hook_pattern" for layer in range(N_LAYERS)]
        self.dictionaries = {
            each.name: each
            for each in (FakeDictionary(f"resid-post-{layer}", layer) for layer in range(N_LAYERS))
        }
        # By name and version. What is published at run time is added by the services that publish.
        at = "blocks.1.hook_resid_post"
        self.directions = {"joy": {1: FakeDirection(at, {at: np.arange(D_MODEL, dtype=np.float32)})}}
        # The labels of each probe's columns.
        self.probes: dict[str, dict[int, tuple[str, ...]]] = {
            "vowels": {1: ("vowel",)},
            "letters": {1: ("vowel", "consonant")},
        }

    def info(self) -> models_pb2.Model:
        """Its entry in the list of models."""
        return models_pb2.Model(
            name=f"models/{self.name}",
            family="fake",
            n_layers=N_LAYERS,
            d_model=D_MODEL,
            n_heads=N_HEADS,
            n_kv_heads=N_HEADS,
            d_head=D_MODEL // N_HEADS,
            d_mlp=4 * D_MODEL,
            vocab_size=VOCAB_SIZE,
            context_length=CONTEXT_LENGTH,
            dtype="float32",
            device="cpu",
            engine="fake",
            has_chat_template=True,
            eos_token_ids=[EOS],
            bos_token_id=BOS,
            capabilities=["generate", "score", "extract", "intervene", "readout", "probes"],
        )

    def hook_points(self) -> list[models_pb2.HookPoint]:
        """All its hook points, residual stream first."""
        points = []
        for name in [*self.residual, *self.attention]:
            is_residual = name in self.residual
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
            points.append(
                models_pb2.HookPoint(
                    name=name,
                    module_path=name.replace("blocks", "model.layers").replace("hook_", ""),
                    width=D_MODEL if is_residual else 0,
                    readable=True,
                    writable=is_residual,
                    layer=layer,
                    n_heads=0 if is_residual else N_HEADS,
                )
            )
        return points

    def token_ids(self, value: inputs_pb2.Input, field: str = "input") -> list[int]:
        """The tokens of an input."""
        n_forms = value.HasField("text") + bool(value.token_ids) + bool(value.messages)
        if n_forms != 1:
            raise invalid(field, "exactly one of text, token_ids and messages", reasons.EMPTY_INPUT)
        if value.token_ids:
            ids = list(value.token_ids)
        elif value.messages:
            ids = [BOS, *self.render(value.messages).encode()]
        else:
            special = not value.HasField("add_special_tokens") or value.add_special_tokens
            if not value.text:
                raise invalid(field, "the text is empty", reasons.EMPTY_INPUT, "Give at least one character")
            ids = [BOS] * special + list(value.text.encode())
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < VOCAB_SIZE:
                raise invalid(
                    f"{field}.token_ids[{index}]", f"{token_id} is no token", reasons.TOKEN_OUT_OF_RANGE
                )
        return ids

    def render(self, messages: Sequence[inputs_pb2.ChatMessage], add_generation_prompt: bool = True) -> str:
        """A conversation as text."""
        turns = "".join(f"{message.role}: {message.content}\n" for message in messages)
        return turns + "assistant:" * add_generation_prompt

    def strings(self, ids: Sequence[int]) -> list[str]:
        """One string a token."""
        special = {BOS: "<bos>", EOS: "<eos>"}
        return [special.get(i) or bytes([i]).decode(errors="replace") for i in ids]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        marked = b"".join({BOS: b"<bos>", EOS: b"<eos>"}.get(i) or bytes([i]) for i in ids)
        return marked.decode(errors="replace")

    def next_token(self, ids: Sequence[int], n_generated: int, salt: bytes) -> int:
        """What follows `ids`, of which `n_generated` are new."""
        if self._reply is not None:
            return self._reply[n_generated] if n_generated < len(self._reply) else EOS
        return b"abcdefghijklmnopqrstuvwxyz     "[self._checksum(ids, salt) % 31]

    def logprob(self, ids: Sequence[int], salt: bytes) -> float:
        """The log-probability of whatever follows `ids`."""
        return -(self._checksum(ids, salt) % 4096) / 1024

    def top_tokens(self, ids: Sequence[int], top_k: int, salt: bytes) -> readouts_pb2.TopTokens:
        """`top_k` alternatives to what follows `ids`."""
        first = self._checksum(ids, salt) % 26
        tokens = [97 + (first + rank) % 26 for rank in range(top_k)]
        logprobs = [self.logprob(ids, salt) - rank for rank in range(top_k)]
        return readouts_pb2.TopTokens(token_ids=tokens, logprobs=logprobs, tokens=self.strings(tokens))

    def activations(
        self, hook_point: str, ids: Sequence[int], positions: Sequence[int]
    ) -> NDArray[np.float32]:
        """(n_pos, d_model), or (n_heads, n_pos, n_tokens) uniform causal attention; before any edit."""
        at = np.asarray(positions, dtype=np.int64)
        if hook_point in self.attention:
            causal = np.arange(len(ids))[None, :] <= at[:, None]
            pattern = causal / np.maximum(causal.sum(axis=1, keepdims=True), 1)
            return np.ascontiguousarray(np.broadcast_to(pattern, (N_HEADS, *pattern.shape)), dtype=np.float32)
        token = np.asarray(ids, dtype=np.float64)[at]
        phase = 1.0 + self.residual.index(hook_point) + 0.1 * token + 0.01 * at
        wave: NDArray[np.float32] = np.sin(phase[:, None] * (1 + np.arange(D_MODEL))).astype(np.float32)
        return wave

    def resolve(self, name: str, field: str) -> str:
        """The canonical name of a hook point."""
        known = [*self.residual, *self.attention]
        if name in known:
            return name
        by_path = {point.module_path: point.name for point in self.hook_points()}
        if name in by_path:
            return by_path[name]
        closest = tuple(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
        raise refused(
            "NOT_FOUND",
            f"no hook point {name!r}",
            reason=reasons.HOOK_POINT_NOT_FOUND,
            field=field,
            value=name,
            remedy="Use a name that ListHookPoints returns",
            closest=closest,
        )

    def dictionary(self, name: str, field: str) -> FakeDictionary:
        """A dictionary by its short or resource name."""
        short = name.removeprefix(f"models/{self.name}/dictionaries/")
        if short in self.dictionaries:
            return self.dictionaries[short]
        closest = tuple(difflib.get_close_matches(short, self.dictionaries, n=3, cutoff=0.0))
        raise refused(
            "NOT_FOUND",
            f"no dictionary {name!r}",
            reason=reasons.DICTIONARY_NOT_FOUND,
            field=field,
            value=name,
            remedy="Use a name that ListDictionaries returns",
            closest=closest,
        )

    def edited_point(self, edit: interventions_pb2.Intervention, field: str) -> str:
        """The hook point an edit writes: its own, or its dictionary's."""
        kind = edit.WhichOneof("edit")
        if kind in ("set_features", "scale_features"):
            return self.dictionary(getattr(edit, kind).dictionary, f"{field}.{kind}.dictionary").hook_point
        if not edit.hook_point and kind is not None:
            for name in self.named_directions(edit):
                return self.direction(name, f"{field}.{kind}")[1].hook_point
        return self.resolve(edit.hook_point, f"{field}.hook_point")

    def concept(self, held: Mapping[str, dict[int, T]], kind: str, name: str, field: str) -> tuple[str, T]:
        """The full name and the value of one of `held`, directions or probes, by its name in any form."""
        short, _, wanted = name.removeprefix(f"models/{self.name}/{kind}s/").partition("@")
        versions = held.get(short, {})
        version = int(wanted) if wanted.isdecimal() else max(versions, default=0)
        if version not in versions:
            raise refused(
                "NOT_FOUND",
                f"no {kind} {name!r}",
                reason=reasons.RESOURCE_NOT_FOUND,
                field=field,
                value=name,
                remedy="Use one that is there",
                closest=tuple(difflib.get_close_matches(short, held, n=3, cutoff=0.0)),
            )
        return f"models/{self.name}/{kind}s/{short}@{version}", versions[version]

    def direction(self, name: str, field: str) -> tuple[str, FakeDirection]:
        """The full name of a direction, and it."""
        return self.concept(self.directions, "direction", name, field)

    def _named(self, edit: interventions_pb2.Intervention, part: str) -> str:
        """The direction's name that stands for a vector of an edit, or ""."""
        kind = edit.WhichOneof("edit")
        field = "direction" if part == "vector" else f"{part}_direction"
        return getattr(getattr(edit, kind), field, "") if kind else ""

    def named_directions(self, edit: interventions_pb2.Intervention) -> list[str]:
        """The directions that an edit names."""
        return [name for part in ("vector", "first", "second") if (name := self._named(edit, part))]

    def _vector(self, edit: interventions_pb2.Intervention, part: str = "vector") -> NDArray[Any]:
        name = self._named(edit, part)
        if name:
            direction = self.direction(name, part)[1]
            return direction.at.get(edit.hook_point, direction.at[direction.hook_point])
        return unpack(getattr(getattr(edit, edit.WhichOneof("edit") or ""), part))

    def check_edit(self, edit: interventions_pb2.Intervention, field: str) -> None:
        """Refuses what a server would refuse before it runs anything."""
        name = self.edited_point(edit, field)
        if name not in self.residual:
            raise refused(
                "FAILED_PRECONDITION",
                f"{name} cannot be edited",
                reason=reasons.HOOK_POINT_NOT_WRITABLE,
                field=f"{field}.hook_point",
            )
        kind = edit.WhichOneof("edit")
        if kind is None:
            raise invalid(field, "no edit", reasons.FIELD_REQUIRED)
        if kind in ("set_features", "scale_features"):
            chosen = getattr(edit, kind)
            dictionary = self.dictionary(chosen.dictionary, f"{field}.{kind}.dictionary")
            dictionary.check_features(chosen.features, f"{field}.{kind}.features")
            numbers = chosen.values if kind == "set_features" else chosen.factors
            if len(numbers) not in (1, len(chosen.features)):
                message = f"{len(numbers)} numbers for {len(chosen.features)} features"
                raise invalid(
                    f"{field}.{kind}", message, reasons.FIELD_CONFLICT, "Give one each, or one for all"
                )
        for part in ("vector", "first", "second", "activations"):
            tensor = getattr(getattr(edit, kind), part, None)
            if tensor is None or self._named(edit, part):
                continue
            path = f"{field}.{kind}.{part}"
            try:
                array = unpack(tensor)
            except TensorError as error:
                raise invalid(path, str(error), reasons.TENSOR_MALFORMED) from None
            if array.ndim == 0 or array.shape[-1] != D_MODEL:
                message = f"the width is {array.shape[-1:]}, {name} has {D_MODEL}"
                raise invalid(path, message, reasons.WRONG_WIDTH, f"Pass a vector of {D_MODEL} elements")
            if not np.isfinite(array.astype(np.float32)).all():
                raise invalid(path, "not finite", reasons.VALUE_NOT_FINITE, "Remove NaN and infinities")

    def edit(self, s: NDArray[np.float32], edit: interventions_pb2.Intervention) -> NDArray[np.float32]:
        """The rows s (n, d_model) after one edit."""
        kind = edit.WhichOneof("edit")
        edited: NDArray[Any] = s
        if kind == "add_vector":
            v, coefficient = self._vector(edit), _coefficient(edit.add_vector)
            if edit.add_vector.scale == interventions_pb2.ADD_SCALE_NORM:
                edited = s + coefficient * _norm(s) * _unit(v)
            else:
                edited = s + coefficient * v
        elif kind == "ablate_direction":
            v = _unit(self._vector(edit))
            edited = s - (s @ v)[:, None] * v
        elif kind == "cap_projection":
            cap = edit.cap_projection
            v = _unit(self._vector(edit))
            low = cap.min if cap.HasField("min") else -np.inf
            high = cap.max if cap.HasField("max") else np.inf
            edited = s + (np.clip(s @ v, low, high) - s @ v)[:, None] * v
        elif kind == "rotate":
            first = _unit(self._vector(edit, "first"))
            second = self._vector(edit, "second")
            second = _unit(second - (second @ first) * first)
            along, across = (s @ first)[:, None], (s @ second)[:, None]
            turned = np.cos(edit.rotate.angle_radians) * first + np.sin(edit.rotate.angle_radians) * second
            edited = s - along * first - across * second + np.hypot(along, across) * turned
        elif kind == "replace":
            edited = np.broadcast_to(unpack(edit.replace.activations), s.shape)
        elif kind == "set_features":
            dictionary = self.dictionary(edit.set_features.dictionary, "dictionary")
            edited = dictionary.with_features(
                s, edit.set_features.features, edit.set_features.values, scale=False
            )
        elif kind == "scale_features":
            scaled = edit.scale_features
            dictionary = self.dictionary(scaled.dictionary, "dictionary")
            edited = dictionary.with_features(s, scaled.features, scaled.factors, scale=True)
        if edit.preserve_norm:
            edited = edited * _norm(s) / np.maximum(_norm(edited), 1e-12)
        return edited.astype(np.float32)

    def _checksum(self, ids: Sequence[int], salt: bytes) -> int:
        return zlib.crc32(np.asarray(ids, dtype="<i4").tobytes(), zlib.crc32(salt))


def select(selector: inputs_pb2.PositionSelector | None, ids: Sequence[int], n_prompt: int) -> list[int]:
    """The positions of `ids` that a selector covers, ascending; `n_prompt` of them are the prompt."""
    if selector is None:
        return list(range(len(ids)))
    kind = selector.WhichOneof("select")
    if kind == "at":
        chosen = sorted(selector.at.positions)
        if chosen and not 0 <= chosen[0] <= chosen[-1] < CONTEXT_LENGTH:
            raise invalid("positions.at", f"{chosen} is out of reach", reasons.POSITION_UNREACHABLE)
        chosen = [position for position in chosen if position < len(ids)]
    elif kind == "span":
        stop = selector.span.stop if selector.span.HasField("stop") else len(ids)
        chosen = list(range(selector.span.start, min(stop, len(ids))))
    else:
        chosen = {
            inputs_pb2.NAMED_POSITIONS_ALL: list(range(len(ids))),
            inputs_pb2.NAMED_POSITIONS_PROMPT: list(range(n_prompt)),
            inputs_pb2.NAMED_POSITIONS_GENERATED: list(range(n_prompt, len(ids))),
            inputs_pb2.NAMED_POSITIONS_LAST: [n_prompt - 1],
        }[selector.named]
    hidden = {BOS, EOS} if selector.exclude_special else {BOS} if selector.exclude_bos else set()
    return [position for position in chosen if ids[position] not in hidden]


def _coefficient(add: interventions_pb2.AddVector) -> float:
    return add.coefficient if add.HasField("coefficient") else 1.0


def _norm(rows: NDArray[np.float32]) -> NDArray[Any]:
    norms: NDArray[Any] = np.linalg.norm(rows, axis=-1, keepdims=True)
    return norms


def _unit(vector: NDArray[Any]) -> NDArray[Any]:
    scaled: NDArray[Any] = vector / np.maximum(np.linalg.norm(vector), 1e-12)
    return scaled
