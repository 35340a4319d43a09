"""The methods of a fake server: what each is called, what it takes, and who answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.longrunning import operations_pb2

from glasshouse.client.testing.fake_attribution_services import FakeAttributionServices
from glasshouse.client.testing.fake_concept_services import FakeConceptServices
from glasshouse.client.testing.fake_dictionary_services import FakeDictionaryServices
from glasshouse.client.testing.fake_monitor_services import FakeMonitorServices
from glasshouse.client.testing.fake_operations import FakeOperations
from glasshouse.client.testing.fake_services import FakeServices
from glasshouse.v1 import (
    activations_pb2,
    attribution_graphs_pb2,
    attribution_pb2,
    dictionaries_pb2,
    directions_pb2,
    feature_labels_pb2,
    generation_pb2,
    models_pb2,
    monitors_pb2,
    probes_pb2,
)


@dataclass(frozen=True)
class FakeMethod:
    """A method. `answer` gives one response, or an iterator of them where it `streams`. Of one that `takes_stream`, it gets
    the messages merged into one."""

    name: str
    request: Any
    answer: Callable[[Any], Any]
    streams: bool = False
    takes_stream: bool = False


Services: TypeAlias = "list[tuple[str, list[FakeMethod]]]"


def model_methods(serve: FakeServices) -> Services:
    """The services of models, generation and activations."""
    return [
        (
            "glasshouse.v1.ModelService",
            [
                FakeMethod("ListModels", models_pb2.ListModelsRequest, serve.list_models),
                FakeMethod("GetModel", models_pb2.GetModelRequest, serve.get_model),
                FakeMethod("ListHookPoints", models_pb2.ListHookPointsRequest, serve.list_hook_points),
                FakeMethod("Tokenize", models_pb2.TokenizeRequest, serve.tokenize),
                FakeMethod("Detokenize", models_pb2.DetokenizeRequest, serve.detokenize),
                FakeMethod("RenderChat", models_pb2.RenderChatRequest, serve.render_chat),
            ],
        ),
        (
            "glasshouse.v1.GenerationService",
            [
                FakeMethod("Score", generation_pb2.ScoreRequest, serve.score),
                FakeMethod("Generate", generation_pb2.GenerateRequest, serve.generate, streams=True),
            ],
        ),
        (
            "glasshouse.v1.ActivationService",
            [
                FakeMethod(
                    "ExtractActivations",
                    activations_pb2.ExtractActivationsRequest,
                    serve.extract_activations,
                    streams=True,
                )
            ],
        ),
    ]


def dictionary_methods(serve: FakeDictionaryServices) -> Services:
    """The service of dictionaries."""
    pb = dictionaries_pb2
    return [
        (
            "glasshouse.v1.DictionaryService",
            [
                FakeMethod("ListDictionaries", pb.ListDictionariesRequest, serve.list_dictionaries),
                FakeMethod("GetDictionary", pb.GetDictionaryRequest, serve.get_dictionary),
                FakeMethod("LoadDictionary", pb.LoadDictionaryRequest, serve.load_dictionary),
                FakeMethod("UnloadDictionary", pb.UnloadDictionaryRequest, serve.unload_dictionary),
                FakeMethod("EncodeFeatures", pb.EncodeFeaturesRequest, serve.encode_features, streams=True),
                FakeMethod("DecodeFeatures", pb.DecodeFeaturesRequest, serve.decode_features),
                FakeMethod("GetFeature", pb.GetFeatureRequest, serve.get_feature),
                FakeMethod("ListFeatures", pb.ListFeaturesRequest, serve.list_features),
                FakeMethod("EvaluateDictionary", pb.EvaluateDictionaryRequest, serve.evaluate_dictionary),
            ],
        )
    ]


def concept_methods(serve: FakeConceptServices) -> Services:
    """The services of directions, probes and feature labels."""
    directions, probes, labels = directions_pb2, probes_pb2, feature_labels_pb2
    return [
        (
            "glasshouse.v1.DirectionService",
            [
                FakeMethod(
                    "ComputeDirections",
                    directions.ComputeDirectionsRequest,
                    serve.compute_directions,
                    takes_stream=True,
                ),
                FakeMethod("CreateDirection", directions.CreateDirectionRequest, serve.create_direction),
                FakeMethod("GetDirection", directions.GetDirectionRequest, serve.get_direction),
                FakeMethod("ListDirections", directions.ListDirectionsRequest, serve.list_directions),
                FakeMethod("DeleteDirection", directions.DeleteDirectionRequest, serve.delete_direction),
            ],
        ),
        (
            "glasshouse.v1.ProbeService",
            [
                FakeMethod("TrainProbe", probes.TrainProbeRequest, serve.train_probe, takes_stream=True),
                FakeMethod("CreateProbe", probes.CreateProbeRequest, serve.create_probe),
                FakeMethod("GetProbe", probes.GetProbeRequest, serve.get_probe),
                FakeMethod("ListProbes", probes.ListProbesRequest, serve.list_probes),
                FakeMethod("DeleteProbe", probes.DeleteProbeRequest, serve.delete_probe),
                FakeMethod("ScoreProbe", probes.ScoreProbeRequest, serve.score_probe, streams=True),
            ],
        ),
        (
            "glasshouse.v1.FeatureLabelService",
            [
                FakeMethod(
                    "CreateFeatureLabels", labels.CreateFeatureLabelsRequest, serve.create_feature_labels
                ),
                FakeMethod("GetFeatureLabels", labels.GetFeatureLabelsRequest, serve.get_feature_labels),
                FakeMethod("ListFeatureLabels", labels.ListFeatureLabelsRequest, serve.list_feature_labels),
            ],
        ),
    ]


def monitor_methods(serve: FakeMonitorServices) -> Services:
    """The service of monitors."""
    pb = monitors_pb2
    return [
        (
            "glasshouse.v1.MonitorService",
            [
                FakeMethod("CreateMonitor", pb.CreateMonitorRequest, serve.create_monitor),
                FakeMethod("UpdateMonitor", pb.UpdateMonitorRequest, serve.update_monitor),
                FakeMethod("GetMonitor", pb.GetMonitorRequest, serve.get_monitor),
                FakeMethod("ListMonitors", pb.ListMonitorsRequest, serve.list_monitors),
                FakeMethod("DeleteMonitor", pb.DeleteMonitorRequest, serve.delete_monitor),
                FakeMethod("WatchMonitor", pb.WatchMonitorRequest, serve.watch_monitor, streams=True),
                FakeMethod("ListMonitorEvents", pb.ListMonitorEventsRequest, serve.list_monitor_events),
            ],
        )
    ]


def attribution_methods(serve: FakeAttributionServices) -> Services:
    """The service of attribution."""
    pb, stored = attribution_pb2, attribution_graphs_pb2
    return [
        (
            "glasshouse.v1.AttributionService",
            [
                FakeMethod(
                    "AttributeTokens", pb.AttributeTokensRequest, serve.attribute_tokens, streams=True
                ),
                FakeMethod(
                    "DirectAttribution", pb.DirectAttributionRequest, serve.direct_attribution, streams=True
                ),
                FakeMethod("PatchSweep", pb.PatchSweepRequest, serve.patch_sweep, streams=True),
                FakeMethod("MediateEffect", pb.MediateEffectRequest, serve.mediate_effect, streams=True),
                FakeMethod("PathPatch", pb.PathPatchRequest, serve.path_patch),
                FakeMethod(
                    "AttributionPatch", pb.AttributionPatchRequest, serve.attribution_patch, streams=True
                ),
                FakeMethod(
                    "AttributeFeatures", pb.AttributeFeaturesRequest, serve.attribute_features, streams=True
                ),
                FakeMethod("DiscoverCircuit", pb.DiscoverCircuitRequest, serve.discover_circuit),
                FakeMethod("CreateAttributionGraph", pb.CreateAttributionGraphRequest, serve.create_graph),
                FakeMethod("EstimateAttribution", pb.EstimateAttributionRequest, serve.estimate),
                FakeMethod(
                    "InterveneOnFeatures", pb.InterveneOnFeaturesRequest, serve.intervene, streams=True
                ),
                FakeMethod("FeatureConnections", pb.FeatureConnectionsRequest, serve.connections),
                FakeMethod("GetAttributionGraph", stored.GetAttributionGraphRequest, serve.get_graph),
                FakeMethod("ListAttributionGraphs", stored.ListAttributionGraphsRequest, serve.list_graphs),
                FakeMethod(
                    "UpdateAttributionGraph", stored.UpdateAttributionGraphRequest, serve.update_graph
                ),
                FakeMethod(
                    "DeleteAttributionGraph", stored.DeleteAttributionGraphRequest, serve.delete_graph
                ),
                FakeMethod(
                    "ReadAttributionGraph", stored.ReadAttributionGraphRequest, serve.read_graph, streams=True
                ),
                FakeMethod("GetCircuit", stored.GetCircuitRequest, serve.get_circuit),
                FakeMethod("ListCircuits", stored.ListCircuitsRequest, serve.list_circuits),
                FakeMethod("DeleteCircuit", stored.DeleteCircuitRequest, serve.delete_circuit),
            ],
        )
    ]


def operation_methods(serve: FakeOperations) -> Services:
    """The service of long operations."""
    pb = operations_pb2
    return [
        (
            "google.longrunning.Operations",
            [
                FakeMethod("GetOperation", pb.GetOperationRequest, serve.get),
                FakeMethod("WaitOperation", pb.WaitOperationRequest, serve.wait),
                FakeMethod("CancelOperation", pb.CancelOperationRequest, serve.cancel),
            ],
        )
    ]
