"""Values become requests: each edit, readout and input as the proto has it, nothing lost, nothing guessed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from glasshouse.client import (
    ChatMessage,
    InvalidArgumentError,
    ablate_direction,
    add_vector,
    builders,
    cap_projection,
    prompt,
    read_activations,
    read_logit_lens,
    replace,
    rotate,
)
from glasshouse.client.inputs import as_input, as_inputs
from glasshouse.v1.tensors_pb2 import DType
from glasshouse.wire.tensors import unpack

HOOK = "blocks.0.hook_resid_post"


@pytest.mark.parametrize(
    "vector",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], dtype=np.float64),
        np.array([1, 2, 3], dtype=">f4"),
        np.array([1, 2, 3], dtype=ml_dtypes.bfloat16),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
    ],
    ids=lambda vector: f"{type(vector).__name__}-{getattr(vector, 'dtype', '')}",
)
def test_vectors_of_every_kind_are_float32(vector: object) -> None:
    message = builders.intervention(add_vector(HOOK, vector, 2.0), "interventions[0]")  # type: ignore[arg-type]
    assert message.add_vector.vector.dtype == DType.DTYPE_F32
    assert unpack(message.add_vector.vector).tolist() == [1, 2, 3]
    assert message.add_vector.coefficient == 2.0


def test_an_intervention_does_not_follow_its_array() -> None:
    vector = np.ones(4, dtype=np.float32)
    edit = add_vector(HOOK, vector)
    vector[:] = 7
    assert edit.vector.tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        edit.vector[0] = 2


@pytest.mark.parametrize("wrong", [["a"], [1j], [[1.0], [1.0, 2.0]], None, {"a": 1}], ids=str)
def test_what_is_not_numbers_is_refused_by_name(wrong: object) -> None:
    with pytest.raises(InvalidArgumentError, match="array of numbers") as caught:
        add_vector(HOOK, wrong)  # type: ignore[arg-type]
    assert caught.value.field == "vector"
    assert caught.value.remedy


def test_each_edit_on_the_wire() -> None:
    v, w = [1.0, 0.0], [0.0, 1.0]
    build = builders.intervention
    add = build(add_vector(HOOK, v, 3, scale="norm", preserve_norm=True, positions=prompt()), "i")
    assert (add.hook_point, add.preserve_norm, add.add_vector.scale) == (HOOK, True, 2)
    assert add.positions.named == 2
    assert build(ablate_direction(HOOK, v), "i").WhichOneof("edit") == "ablate_direction"
    cap = build(cap_projection(HOOK, v, max=0.0), "i").cap_projection
    assert cap.HasField("max") and cap.max == 0.0 and not cap.HasField("min")
    turned = build(rotate(HOOK, v, w, 1.5), "i").rotate
    assert turned.angle_radians == 1.5 and unpack(turned.second).tolist() == w
    rows = build(replace(HOOK, [v, w], [4, 5]), "i")
    assert unpack(rows.replace.activations).shape == (2, 2)
    assert list(rows.positions.at.positions) == [4, 5]
    assert not build(ablate_direction(HOOK, v), "i").HasField("positions")


def test_unknown_words_name_their_field() -> None:
    with pytest.raises(InvalidArgumentError, match="'plain', 'norm'") as caught:
        builders.intervention(add_vector(HOOK, [1.0], scale="unit"), "interventions[2]")  # type: ignore[arg-type]
    assert caught.value.field == "interventions[2].add_vector.scale"
    with pytest.raises(InvalidArgumentError) as caught:
        builders.readout(read_activations(HOOK, dtype="int8"), "readouts[1]")  # type: ignore[arg-type]
    assert caught.value.field == "readouts[1].activations.dtype"
    with pytest.raises(TypeError, match=r"interventions\[0\] must be an intervention"):
        builders.score("m", "x", interventions=[read_activations(HOOK)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"readouts\[0\] must be a readout"):
        builders.generate("m", "x", max_tokens=1, readouts=[HOOK])  # type: ignore[list-item]


def test_readouts_on_the_wire() -> None:
    request = builders.generate(
        "m",
        "x",
        max_tokens=1,
        readouts=[read_activations(HOOK, dtype="bfloat16"), read_logit_lens(HOOK, 3, positions=slice(1, 4))],
    )
    activations, lens = request.readouts
    assert activations.activations.dtype == DType.DTYPE_BF16 and not activations.HasField("positions")
    assert lens.logit_lens.top_k == 3 and (lens.positions.span.start, lens.positions.span.stop) == (1, 4)


def test_a_generation_says_all_it_is_given() -> None:
    request = builders.generate(
        "models/m",
        [1, 2],
        max_tokens=5,
        temperature=0.0,
        top_p=0.5,
        top_k=7,
        seed=-3,
        stop="END",
        stop_token_ids=[9],
        ignore_eos=True,
        logprobs=2,
    )
    sampling = request.sampling
    assert sampling.HasField("temperature") and sampling.temperature == 0.0
    assert (sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 7, -3)
    assert (list(request.stop), list(request.stop_token_ids)) == (["END"], [9])
    assert (request.max_tokens, request.ignore_eos, request.top_logprobs) == (5, True, 2)
    assert not builders.generate("m", "x", max_tokens=1).sampling.HasField("seed")


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"max_tokens": 1 << 31}, "max_tokens"),
        ({"max_tokens": 1, "seed": 1 << 63}, "sampling.seed"),
        ({"max_tokens": 1, "top_k": -(1 << 40)}, "sampling.top_k"),
        ({"max_tokens": 1, "stop": ["ok", "\ud800"]}, "stop[1]"),
        ({"max_tokens": 1, "stop_token_ids": [1 << 40]}, "stop_token_ids[0]"),
    ],
    ids=lambda value: str(value).encode("ascii", "replace").decode(),
)
def test_numbers_and_text_that_do_not_fit_name_their_field(parameters: dict, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        builders.generate("m", "x", **parameters)
    assert caught.value.field == field
    assert caught.value.remedy and not caught.value.request_id


def test_inputs_that_the_wire_cannot_carry() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        builders.model_input("a\udfff", "input")
    assert caught.value.field == "input.text"
    with pytest.raises(InvalidArgumentError) as caught:
        builders.model_input([1, 1 << 33], "inputs[4]")
    assert caught.value.field == "inputs[4].token_ids[1]"
    with pytest.raises(TypeError, match="max_tokens must be an integer"):
        builders.generate("m", "x", max_tokens=1.5)  # type: ignore[arg-type]


CHAT = [ChatMessage("user", "hi")]


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("text", "text"),
        ("", ""),
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        ([np.int32(1)], [1]),
        ([], []),
        ([{"role": "user", "content": "hi"}], CHAT),
        ([("user", "hi")], CHAT),
        (CHAT, CHAT),
    ],
    ids=str,
)
def test_one_input(given: object, canonical: object) -> None:
    assert as_input(given) == canonical


@pytest.mark.parametrize(
    ("given", "canonical", "many"),
    [
        ("text", ["text"], False),
        (["a", "b"], ["a", "b"], True),
        (("a", "b"), ["a", "b"], True),
        ([1, 2], [[1, 2]], False),
        ([[1, 2], [3]], [[1, 2], [3]], True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]], True),
        ([np.array([1]), np.array([2])], [[1], [2]], True),
        ([("user", "hi")], [CHAT], False),
        ([[("user", "hi")], "b", [7]], [CHAT, "b", [7]], True),
        ([], [], True),
    ],
    ids=str,
)
def test_one_input_or_many(given: object, canonical: object, many: bool) -> None:
    assert as_inputs(given) == (canonical, many)


@pytest.mark.parametrize(
    "wrong", [None, 3, 1.5, [1, "a"], [1.5], {"role": "user"}, [{"role": "user"}], [True]], ids=str
)
def test_what_is_no_input(wrong: object) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        as_input(wrong)
    assert caught.value.field.startswith("input")
    assert caught.value.remedy
