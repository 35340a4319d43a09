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
from glasshouse.client.aio_operation import AsyncOperation
from glasshouse.client.connection import TLSConfig
from glasshouse.client.dictionaries.aio import AsyncDictionary
from glasshouse.client.dictionaries.sync import Dictionary
from glasshouse.client.dictionaries.values import (
    DecoderNorms,
    DictionaryCheck,
    DictionaryEvaluation,
    DictionaryInfo,
    FeatureInfo,
    FeatureSummary,
    LogitEffects,
    NearestFeature,
)
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
from glasshouse.client.feature_tables import FeatureTable
from glasshouse.client.features import EncodedFeatures, FeatureActivations, FeatureRows
from glasshouse.client.inputs import ChatMessage
from glasshouse.client.interventions import (
    Intervention,
    ablate_direction,
    ablate_feature,
    add_vector,
    cap_projection,
    replace,
    rotate,
    scale_feature,
    set_feature,
)
from glasshouse.client.operations import OperationProgress
from glasshouse.client.positions import Positions, at, generated, last, prompt, span
from glasshouse.client.positions import all as all
from glasshouse.client.readouts import Readout, read_activations, read_features, read_logit_lens
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
from glasshouse.client.sync_operation import Operation

__all__ = [
    "Activations",
    "AsyncClient",
    "AsyncDictionary",
    "AsyncGenerationStream",
    "AsyncModel",
    "AsyncOperation",
    "CancelledError",
    "ChatMessage",
    "Client",
    "DeadlineExceededError",
    "DecoderNorms",
    "Dictionary",
    "DictionaryCheck",
    "DictionaryEvaluation",
    "DictionaryInfo",
    "EncodedFeatures",
    "FailedPreconditionError",
    "FeatureActivations",
    "FeatureInfo",
    "FeatureRows",
    "FeatureSummary",
    "FeatureTable",
    "GeneratedToken",
    "GenerationResult",
    "GenerationStream",
    "GlasshouseError",
    "HookPointInfo",
    "Intervention",
    "InterventionReceipt",
    "InvalidArgumentError",
    "LensReadout",
    "LogitEffects",
    "Model",
    "ModelInfo",
    "NearestFeature",
    "NotFoundError",
    "Operation",
    "OperationProgress",
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
    "ablate_feature",
    "add_vector",
    "at",
    "cap_projection",
    "generated",
    "last",
    "positions",
    "prompt",
    "read_activations",
    "read_features",
    "read_logit_lens",
    "replace",
    "rotate",
    "scale_feature",
    "set_feature",
    "span",
]
