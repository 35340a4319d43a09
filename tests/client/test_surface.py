"""What users import is pinned; torch is not among what the client imports."""

from __future__ import annotations

import inspect
import subprocess
import sys

import glasshouse.client as sdk
from glasshouse.client import testing

CONTRACT = {
    "Client", "AsyncClient", "add_vector", "ablate_direction", "replace", "read_activations",
    "read_logit_lens", "set_feature", "scale_feature", "read_features", "read_probe", "when",
    "prompt", "generated", "last", "at", "span", "GlasshouseError",
    "InvalidArgumentError", "NotFoundError",
    "FailedPreconditionError", "ResourceExhaustedError", "UnauthenticatedError", "PermissionDeniedError",
    "UnavailableError", "DeadlineExceededError", "CancelledError",
}  # fmt: skip
BEYOND = {
    "AlreadyExistsError", "AsyncDirection", "AsyncProbe", "Direction", "DirectionAt", "DirectionInfo", "Discrimination",
    "Example", "FeatureLabel", "FeatureLabelsInfo", "Interval", "OperatingPoint", "Pair", "Probe", "ProbeCandidate",
    "ProbeColumnReport", "ProbeInfo", "ProbeReport", "ProbeScores", "ProbeWeights", "Provenance", "SplitSummary",
    "Activations", "AsyncGenerationStream", "AsyncModel", "ChatMessage", "GeneratedToken", "GenerationResult",
    "GenerationStream", "HookPointInfo", "Intervention", "InterventionReceipt", "LensReadout", "Model",
    "ModelInfo", "Positions", "Progress", "PromptReadouts", "Readout", "RenderedChat", "Score", "TLSConfig",
    "Tokens", "TopTokens", "Usage", "cap_projection", "positions", "rotate",
    "AsyncDictionary", "AsyncOperation", "DecoderNorms", "Dictionary", "DictionaryCheck", "DictionaryEvaluation",
    "DictionaryInfo", "EncodedFeatures", "FeatureActivations", "FeatureInfo", "FeatureRows", "FeatureSummary",
    "FeatureTable", "LogitEffects", "NearestFeature", "Operation", "OperationProgress", "ablate_feature",
    "Abort", "Condition", "MonitorFlag", "ProbeReading", "ProbeReadings",
}  # fmt: skip

ATTRIBUTION = {
    "AsyncGraphOperation", "AsyncPatchSweep", "AttributionEstimate", "AttributionGraph",
    "AttributionPatchResult", "AttributionProgress", "Circuit", "DictionaryAttribution",
    "DirectAttribution", "FeatureAttribution", "FeatureConnection", "FeatureConnections",
    "FeatureContributions", "FeatureIntervention", "FeatureSetting", "GraphInfo", "GraphLogit",
    "GraphNode", "GraphOperation", "GraphScores", "HeldFixed", "LogitChange", "Mediation", "MediationGrid",
    "Metric", "PatchGrid", "PatchNode", "PatchResult", "PatchSweep", "PatchSweepResult", "Supernode",
    "SweepAxes", "SweepGrid", "TokenAttribution", "Verification", "direction_value", "feature_grid",
    "feature_setting", "feature_value", "kl_divergence", "likeliest", "log_probability",
    "logit_difference", "patch_grid", "patch_node", "probability", "probe_value",
}  # fmt: skip

MONITORS = {
    "AsyncMonitor", "AsyncMonitorWatch", "Drift", "DriftLimits", "Monitor", "MonitorCounts", "MonitorEvent",
    "MonitorInfo", "MonitorWatch", "ScoreHistogram", "Webhook",
}  # fmt: skip


def test_exported_names() -> None:
    assert set(sdk.__all__) == CONTRACT | BEYOND | ATTRIBUTION | MONITORS
    assert sdk.__all__ == sorted(sdk.__all__)
    assert all(hasattr(sdk, name) for name in sdk.__all__)
    assert sdk.all is sdk.positions.all, "exported, but a star import keeps the builtin"
    assert set(testing.__all__) == {"Failure", "FakeModel", "FakeServer", "RecordedCall"}


def parameters(function: object) -> list[str]:
    return [
        f"{name}={value.default!r}" if value.default is not value.empty else name
        for name, value in inspect.signature(function).parameters.items()  # type: ignore[arg-type]
        if name not in ("self", "timeout", "progress", "dtype")
    ]


def test_signatures_of_the_contract() -> None:
    assert parameters(sdk.Client.__init__)[:4] == [
        "target='localhost:50051'",
        "api_key=None",
        "tls=None",
        "max_attempts=5",
    ]
    assert inspect.signature(sdk.Client).parameters["timeout"].default == 60.0
    model = sdk.Model
    assert parameters(model.tokenize) == ["text", "add_special_tokens=True"]
    assert parameters(model.activations) == ["input", "hook_points", "positions=None", "interventions=()"]
    assert parameters(model.score) == ["input", "interventions=()", "top_k=0"]
    assert parameters(model.generate) == [
        "prompt", "max_tokens", "temperature=1.0", "top_p=1.0", "top_k=0", "seed=None", "stop=()",
        "stop_token_ids=()", "ignore_eos=False", "logprobs=0", "interventions=()", "readouts=()",
        "abort_when=()", "labels=None", "allow_text_in_events=False",
    ]  # fmt: skip
    assert parameters(sdk.add_vector) == [
        "hook_point", "vector=''", "coefficient=1.0", "positions=None", "scale='plain'", "preserve_norm=False",
        "condition=None",
    ]  # fmt: skip
    assert parameters(sdk.ablate_direction)[:3] == ["hook_point", "vector=''", "positions=None"]
    assert parameters(sdk.replace) == ["hook_point", "activations", "positions=None", "condition=None"]
    assert parameters(sdk.read_probe) == ["probe", "positions=None", "output='score'", "name=''"]
    conditions = [
        "source", "above=None", "below=None", "over='position'", "label=''", "output='score'", "aggregate=None",
        "positions=None",
    ]  # fmt: skip
    assert parameters(sdk.when) == parameters(sdk.Intervention.when) == conditions
    assert parameters(sdk.read_activations) == ["hook_point", "positions=None"]
    assert parameters(sdk.read_logit_lens)[:2] == ["hook_point", "top_k=5"]
    assert parameters(sdk.set_feature) == [
        "dictionary",
        "feature",
        "value",
        "positions=None",
        "condition=None",
    ]
    assert parameters(sdk.scale_feature) == [
        "dictionary",
        "feature",
        "factor",
        "positions=None",
        "condition=None",
    ]
    assert parameters(sdk.ablate_feature) == ["dictionary", "feature", "positions=None", "condition=None"]
    assert parameters(sdk.read_features)[:3] == ["dictionary", "top_k=None", "features=()"]


def test_signatures_of_dictionaries() -> None:
    assert parameters(sdk.Model.dictionary) == ["name"]
    assert parameters(sdk.Model.load_dictionary) == ["name", "path"]
    dictionary = sdk.Dictionary
    assert parameters(dictionary.encode) == [
        "input=None", "activations=None", "top_k=0", "features=()", "positions=None", "interventions=()",
    ]  # fmt: skip
    assert parameters(dictionary.decode) == ["features", "bias=True"]
    assert parameters(dictionary.feature) == ["index", "n_tokens=10", "n_nearest=5"]
    assert parameters(dictionary.features) == ["order='index'", "page_size=100"]
    assert parameters(dictionary.evaluate) == ["inputs=None", "max_tokens=0"]
    assert parameters(sdk.EncodedFeatures.top) == ["k=5"]
    assert list(inspect.signature(sdk.Operation.result).parameters) == ["self", "timeout", "on_progress"]


def test_the_client_imports_no_torch_and_no_server() -> None:
    code = (
        "import sys, glasshouse.client, glasshouse.client.testing, glasshouse.cli.main\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors', 'glasshouse.server'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_vectors_from_torch_need_no_import_of_torch_by_us() -> None:
    code = (
        "import sys\n"
        "import numpy as np\n"
        "from glasshouse.client import add_vector\n"
        "class Tensor:\n"
        "    def detach(self): return self\n"
        "    def cpu(self): return self\n"
        "    def is_floating_point(self): return True\n"
        "    def float(self): return self\n"
        "    def numpy(self): return np.ones(3, np.float32)\n"
        "assert add_vector('h', Tensor()).vector.tolist() == [1, 1, 1]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
