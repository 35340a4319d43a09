"""FeatureLabelService: what features stand for, kept in named, versioned sets."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence

import torch

from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.records import Draft, FeatureLabel, Provenance, Record
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.v1 import feature_labels_pb2 as pb
from glasshouse.wire import reasons

from . import fields
from .call import Call
from .catalogue import Catalogue, ServedModel
from .concept_messages import named, provenance_message, publication, timestamp

_COLLECTION = "/dictionaries/"
_DEFAULT_PAGE, _MOST_PAGE = 1000, 10_000
_MOST_CHARACTERS = 1000


class FeatureLabelServicer:
    """Serves `glasshouse.v1.FeatureLabelService`."""

    def __init__(self, catalogue: Catalogue, library: ConceptLibrary) -> None:
        self._catalogue = catalogue
        self._library = library

    async def CreateFeatureLabels(
        self, request: pb.CreateFeatureLabelsRequest, call: Call
    ) -> pb.CreateFeatureLabelsResponse:
        """Publishes a set."""
        model, dictionary = self._dictionary(request.dictionary)
        wanted = publication(request.publication, request.HasField("publication"), required=True)
        assert wanted is not None
        held = model.engine.dictionaries.get(dictionary, field="dictionary")
        labels = _labels(request.labels)
        held.dictionary.check_feature_ids(
            torch.tensor([label.feature for label in labels]), field="labels.feature"
        )
        draft = Draft(
            kind=Kind.FEATURE_LABELS,
            model=model.engine.info.name,
            name=wanted.name,
            version=wanted.version,
            subject=held.name,
            labels=labels,
            body={"description": wanted.description, "count": len(labels)},
            provenance=Provenance(
                model_revision=model.engine.info.revision,
                hook_points=tuple(point.name for point in held.points_in),
                method=request.method,
                author=call.caller,
            ),
        )
        record = await asyncio.to_thread(self._library.publish, draft)
        return pb.CreateFeatureLabelsResponse(feature_labels=_message(record))

    async def GetFeatureLabels(
        self, request: pb.GetFeatureLabelsRequest, call: Call
    ) -> pb.GetFeatureLabelsResponse:
        """One version of a set, and some of its labels."""
        _, reference = named(self._catalogue, request.name, Kind.FEATURE_LABELS)
        size, after = _page_size(request.page_size), _after(request.page_token)
        record, labels = await asyncio.to_thread(
            self._read, reference, tuple(request.features), after, size + 1
        )
        token = ""
        if len(labels) > size:
            labels = labels[:size]
            token = base64.urlsafe_b64encode(f"label:{labels[-1].feature}".encode()).decode()
        return pb.GetFeatureLabelsResponse(
            feature_labels=_message(record),
            labels=[
                pb.FeatureLabel(feature=label.feature, label=label.label, score=label.score)
                for label in labels
            ],
            next_page_token=token,
        )

    async def ListFeatureLabels(
        self, request: pb.ListFeatureLabelsRequest, call: Call
    ) -> pb.ListFeatureLabelsResponse:
        """A page of sets."""
        model, subject = self._catalogue.find(request.model, "model"), ""
        if request.dictionary:
            model, subject = self._dictionary(request.dictionary)
        page = await asyncio.to_thread(
            self._library.registry.list,
            Kind.FEATURE_LABELS,
            model=model.engine.info.name,
            subject=subject,
            every_version=request.every_version,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListFeatureLabelsResponse(
            feature_labels=[_message(record) for record in page.records],
            next_page_token=page.next_page_token,
        )

    async def DeleteFeatureLabels(
        self, request: pb.DeleteFeatureLabelsRequest, call: Call
    ) -> pb.DeleteFeatureLabelsResponse:
        """Deletes a version, or every version."""
        _, reference = named(self._catalogue, request.name, Kind.FEATURE_LABELS)
        deleted = await asyncio.to_thread(self._library.delete, reference)
        return pb.DeleteFeatureLabelsResponse(deleted=[str(record.reference) for record in deleted])

    def _dictionary(self, name: str) -> tuple[ServedModel, str]:
        if not name:
            raise fields.required("dictionary", "whose features", "name a dictionary that is loaded")
        model_name, separator, short = name.partition(_COLLECTION)
        return self._catalogue.find(model_name if separator else "", "dictionary"), short or name

    def _read(
        self, reference: Reference, features: tuple[int, ...], after: int, limit: int
    ) -> tuple[Record, tuple[FeatureLabel, ...]]:
        registry = self._library.registry
        record = registry.get(reference)
        return record, registry.labels(record, features=features, after=after, limit=limit)


def _labels(messages: Sequence[pb.FeatureLabel]) -> tuple[FeatureLabel, ...]:
    if not messages:
        raise fields.required("labels", "at least one label", "give features with their labels")
    found = []
    for index, message in enumerate(messages):
        field = f"labels[{index}]"
        if not message.label.strip() or len(message.label) > _MOST_CHARACTERS:
            raise fields.out_of_range(
                f"{field}.label", repr(message.label[:50]), f"1 to {_MOST_CHARACTERS} characters"
            )
        score = fields.finite(message.score, f"{field}.score") if message.HasField("score") else None
        found.append(FeatureLabel(feature=message.feature, label=message.label, score=score))
    return tuple(found)


def _page_size(size: int) -> int:
    if size < 0:
        raise fields.out_of_range("page_size", size, "0 or more; 0 takes the default")
    return min(size or _DEFAULT_PAGE, _MOST_PAGE)


def _after(token: str) -> int:
    if not token:
        return -1
    try:
        kind, _, number = base64.b64decode(token.encode(), altchars=b"-_", validate=True).partition(b":")
        if kind == b"label" and number.isdigit():
            return int(number)
    except (binascii.Error, ValueError):
        pass
    raise InvalidArgument(
        "page_token is not one that this list gave out",
        reason=reasons.VALUE_MALFORMED,
        field="page_token",
        value=token,
        remedy="send next_page_token of the page before, unchanged, or nothing for the first page",
    )


def _message(record: Record) -> pb.FeatureLabels:
    model = record.reference.model
    return pb.FeatureLabels(
        name=str(record.reference),
        dictionary=f"models/{model}{_COLLECTION}{record.subject}",
        count=int(record.body.get("count", 0)),
        description=str(record.body.get("description", "")),
        provenance=provenance_message(record.provenance),
        create_time=timestamp(record.created),
    )
