"""The Glasshouse SDK: read, steer and score language models over gRPC.

::

    from glasshouse.client import Client, add_vector, read_activations

    with Client("localhost:50051") as client:
        model = client.model()
        acts = model.activations("Once upon a time", hook_points=["blocks.3.hook_resid_post"])
        with model.generate("Once upon a time", max_tokens=64,
                            interventions=[add_vector("blocks.3.hook_resid_post", vector, 4.0)]) as stream:
            for token in stream:
                print(token.text, end="", flush=True)

`AsyncClient` has the same names, awaited. `all`, the selector, is exported but not by `import *`.
"""

from glasshouse.client import positions
from glasshouse.client.aio import AsyncClient, AsyncGenerationStream, AsyncModel
from glasshouse.client.connection import TLSConfig
from glasshouse.client.exceptions import (
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    GlasshouseError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from glasshouse.client.inputs import ChatMessage
from glasshouse.client.interventions import (
    Intervention,
    ablate_direction,
    add_vector,
    cap_projection,
    replace,
    rotate,
)
from glasshouse.client.positions import Positions, at, generated, last, prompt, span
from glasshouse.client.positions import all as all
from glasshouse.client.readouts import Readout, read_activations, read_logit_lens
from glasshouse.client.results import (
    Activations,
    GeneratedToken,
    GenerationResult,
    HookPointInfo,
    InterventionReceipt,
    LensReadout,
    ModelInfo,
    Progress,
    PromptReadouts,
    RenderedChat,
    Score,
    Tokens,
    TopTokens,
    Usage,
)
from glasshouse.client.sync import Client, GenerationStream, Model

__all__ = [
    "Activations",
    "AsyncClient",
    "AsyncGenerationStream",
    "AsyncModel",
    "CancelledError",
    "ChatMessage",
    "Client",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "GeneratedToken",
    "GenerationResult",
    "GenerationStream",
    "GlasshouseError",
    "HookPointInfo",
    "Intervention",
    "InterventionReceipt",
    "InvalidArgumentError",
    "LensReadout",
    "Model",
    "ModelInfo",
    "NotFoundError",
    "PermissionDeniedError",
    "Positions",
    "Progress",
    "PromptReadouts",
    "Readout",
    "RenderedChat",
    "ResourceExhaustedError",
    "Score",
    "TLSConfig",
    "Tokens",
    "TopTokens",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "ablate_direction",
    "add_vector",
    "at",
    "cap_projection",
    "generated",
    "last",
    "positions",
    "prompt",
    "read_activations",
    "read_logit_lens",
    "replace",
    "rotate",
    "span",
]
