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
from glasshouse.client.attribution.aio import AsyncGraphOperation, AsyncPatchSweep
from glasshouse.client.attribution.builders import FeatureSetting, feature_setting
from glasshouse.client.attribution.graph import (
    AttributionGraph,
    GraphInfo,
    GraphLogit,
    GraphNode,
    Supernode,
)
from glasshouse.client.attribution.metrics import (
    Metric,
    direction_value,
    feature_value,
    kl_divergence,
    likeliest,
    log_probability,
    logit_difference,
    probability,
    probe_value,
)
from glasshouse.client.attribution.patches import (
    PatchGrid,
    PatchNode,
    feature_grid,
    patch_grid,
    patch_node,
)
from glasshouse.client.attribution.pruning import GraphScores
from glasshouse.client.attribution.sweeps import (
    Mediation,
    MediationGrid,
    PatchResult,
    PatchSweepResult,
    SweepAxes,
    SweepGrid,
)
from glasshouse.client.attribution.sync import GraphOperation, PatchSweep
from glasshouse.client.attribution.values import (
    AttributionEstimate,
    AttributionPatchResult,
    AttributionProgress,
    Circuit,
    DictionaryAttribution,
    DirectAttribution,
    FeatureAttribution,
    FeatureConnection,
    FeatureConnections,
    FeatureContributions,
    FeatureIntervention,
    HeldFixed,
    LogitChange,
    TokenAttribution,
    Verification,
)
from glasshouse.client.concepts.aio import AsyncDirection, AsyncProbe
from glasshouse.client.concepts.examples import Example, Pair
from glasshouse.client.concepts.sync import Direction, Probe
from glasshouse.client.concepts.values import (
    DirectionAt,
    DirectionInfo,
    Discrimination,
    FeatureLabel,
    FeatureLabelsInfo,
    Interval,
    OperatingPoint,
    ProbeCandidate,
    ProbeColumnReport,
    ProbeInfo,
    ProbeReport,
    ProbeScores,
    ProbeWeights,
    Provenance,
    SplitSummary,
)
from glasshouse.client.conditions import Condition, when
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
    AlreadyExistsError,
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
from glasshouse.client.monitors.aio import AsyncMonitor, AsyncMonitorWatch
from glasshouse.client.monitors.sync import Monitor, MonitorWatch
from glasshouse.client.monitors.values import (
    Drift,
    DriftLimits,
    MonitorCounts,
    MonitorEvent,
    MonitorInfo,
    ScoreHistogram,
    Webhook,
)
from glasshouse.client.operations import OperationProgress
from glasshouse.client.positions import Positions, at, generated, last, prompt, span
from glasshouse.client.positions import all as all
from glasshouse.client.probe_readings import ProbeReading, ProbeReadings
from glasshouse.client.readouts import (
    Readout,
    read_activations,
    read_features,
    read_logit_lens,
    read_probe,
)
from glasshouse.client.results import (
    Abort,
    Activations,
    GeneratedToken,
    GenerationResult,
    HookPointInfo,
    InterventionReceipt,
    LensReadout,
    ModelInfo,
    MonitorFlag,
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
    "Abort",
    "Activations",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncDictionary",
    "AsyncDirection",
    "AsyncGenerationStream",
    "AsyncGraphOperation",
    "AsyncModel",
    "AsyncMonitor",
    "AsyncMonitorWatch",
    "AsyncOperation",
    "AsyncPatchSweep",
    "AsyncProbe",
    "AttributionEstimate",
    "AttributionGraph",
    "AttributionPatchResult",
    "AttributionProgress",
    "CancelledError",
    "ChatMessage",
    "Circuit",
    "Client",
    "Condition",
    "DeadlineExceededError",
    "DecoderNorms",
    "Dictionary",
    "DictionaryAttribution",
    "DictionaryCheck",
    "DictionaryEvaluation",
    "DictionaryInfo",
    "DirectAttribution",
    "Direction",
    "DirectionAt",
    "DirectionInfo",
    "Discrimination",
    "Drift",
    "DriftLimits",
    "EncodedFeatures",
    "Example",
    "FailedPreconditionError",
    "FeatureActivations",
    "FeatureAttribution",
    "FeatureConnection",
    "FeatureConnections",
    "FeatureContributions",
    "FeatureInfo",
    "FeatureIntervention",
    "FeatureLabel",
    "FeatureLabelsInfo",
    "FeatureRows",
    "FeatureSetting",
    "FeatureSummary",
    "FeatureTable",
    "GeneratedToken",
    "GenerationResult",
    "GenerationStream",
    "GlasshouseError",
    "GraphInfo",
    "GraphLogit",
    "GraphNode",
    "GraphOperation",
    "GraphScores",
    "HeldFixed",
    "HookPointInfo",
    "Interval",
    "Intervention",
    "InterventionReceipt",
    "InvalidArgumentError",
    "LensReadout",
    "LogitChange",
    "LogitEffects",
    "Mediation",
    "MediationGrid",
    "Metric",
    "Model",
    "ModelInfo",
    "Monitor",
    "MonitorCounts",
    "MonitorEvent",
    "MonitorFlag",
    "MonitorInfo",
    "MonitorWatch",
    "NearestFeature",
    "NotFoundError",
    "OperatingPoint",
    "Operation",
    "OperationProgress",
    "Pair",
    "PatchGrid",
    "PatchNode",
    "PatchResult",
    "PatchSweep",
    "PatchSweepResult",
    "PermissionDeniedError",
    "Positions",
    "Probe",
    "ProbeCandidate",
    "ProbeColumnReport",
    "ProbeInfo",
    "ProbeReading",
    "ProbeReadings",
    "ProbeReport",
    "ProbeScores",
    "ProbeWeights",
    "Progress",
    "PromptReadouts",
    "Provenance",
    "Readout",
    "RenderedChat",
    "ResourceExhaustedError",
    "Score",
    "ScoreHistogram",
    "SplitSummary",
    "Supernode",
    "SweepAxes",
    "SweepGrid",
    "TLSConfig",
    "TokenAttribution",
    "Tokens",
    "TopTokens",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "Verification",
    "Webhook",
    "ablate_direction",
    "ablate_feature",
    "add_vector",
    "at",
    "cap_projection",
    "direction_value",
    "feature_grid",
    "feature_setting",
    "feature_value",
    "generated",
    "kl_divergence",
    "last",
    "likeliest",
    "log_probability",
    "logit_difference",
    "patch_grid",
    "patch_node",
    "positions",
    "probability",
    "probe_value",
    "prompt",
    "read_activations",
    "read_features",
    "read_logit_lens",
    "read_probe",
    "replace",
    "rotate",
    "scale_feature",
    "set_feature",
    "span",
    "when",
]
