"""What directions, probes and feature labels have in common: publications, provenance, figures, pages."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from datetime import datetime

from google.protobuf import timestamp_pb2

from glasshouse.server.operations.compute_directions import Publication
from glasshouse.server.probes.discrimination import Discrimination, Interval
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.saved import MAX_DESCRIPTION, Saved, SplitSummary, saved_of
from glasshouse.server.registry import pages
from glasshouse.server.registry.names import Kind, Reference, check_name, parse
from glasshouse.server.registry.records import Provenance
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import examples_pb2, provenance_pb2
from glasshouse.wire import reasons

from . import fields
from .catalogue import COLLECTION, Catalogue, ServedModel

POOLINGS = {
    examples_pb2.POOLING_UNSPECIFIED: Pooling.LAST,
    examples_pb2.POOLING_TOKEN: Pooling.TOKEN,
    examples_pb2.POOLING_LAST: Pooling.LAST,
    examples_pb2.POOLING_MEAN: Pooling.MEAN,
    examples_pb2.POOLING_MAX: Pooling.MAX,
}
_BUILT_IN_PAGE = b"built-in:"


def pooling(number: int) -> Pooling:
    """What positions are made into."""
    for known, value in POOLINGS.items():
        if known == number:
            return value
    raise fields.out_of_range("pooling", number, "a known Pooling: token, last, mean or max")


def pooling_number(value: Pooling) -> examples_pb2.Pooling.ValueType:
    """The number of a pooling."""
    return {known: number for number, known in POOLINGS.items() if number}[value]


def publication(message: provenance_pb2.Publication, present: bool, *, required: bool) -> Publication | None:
    """Under which name something is published. Raises `InvalidArgument`."""
    if not present:
        if required:
            raise fields.required("publication", "under which name", "give a publication with a name")
        return None
    if not message.name:
        raise fields.required("publication.name", "a name", "give a name of letters, digits, '.', '_', '-'")
    check_name(message.name, field="publication.name")
    if message.version < 0:
        raise fields.out_of_range("publication.version", message.version, "1 or more; 0 is the default, 1")
    if message.version and message.next_version:
        raise InvalidArgument(
            "publication gives a version and asks for the next one",
            reason=reasons.FIELD_CONFLICT,
            field="publication.next_version",
            value=message.version,
            remedy="leave one of version and next_version out",
        )
    if len(message.description) > MAX_DESCRIPTION:
        raise fields.out_of_range(
            "publication.description", f"{len(message.description)} characters", f"at most {MAX_DESCRIPTION}"
        )
    return Publication(
        name=message.name,
        version=None if message.next_version else message.version or 1,
        description=message.description,
    )


def provenance_message(provenance: Provenance) -> provenance_pb2.Provenance:
    """Where something came from."""
    return provenance_pb2.Provenance(
        model_revision=provenance.model_revision,
        hook_points=provenance.hook_points,
        method=provenance.method,
        data_hash=provenance.data_hash,
        metrics=provenance.metrics,
        author=provenance.author,
    )


def timestamp(time: datetime | None) -> timestamp_pb2.Timestamp | None:
    """A time in UTC as a message."""
    if time is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(time)
    return message


def interval_message(interval: Interval) -> examples_pb2.Interval:
    """A figure with its interval."""
    return examples_pb2.Interval(
        value=interval.value, low=interval.low, high=interval.high, level=interval.level
    )


def discrimination_message(found: Discrimination) -> examples_pb2.Discrimination:
    """Held-out figures."""
    return examples_pb2.Discrimination(
        auroc=interval_message(found.auroc),
        accuracy=interval_message(found.accuracy),
        effect_size=found.effect_size,
        n_positive=found.n_positive,
        n_negative=found.n_negative,
    )


def split_message(split: SplitSummary) -> examples_pb2.SplitSummary:
    """How examples were divided."""
    return examples_pb2.SplitSummary(
        n_train=split.n_train,
        n_held_out=split.n_held_out,
        n_duplicates=split.n_duplicates,
        n_left_out=split.n_left_out,
        n_conflicting=split.n_conflicting,
    )


def named(
    catalogue: Catalogue, text: str, kind: Kind, *, field: str = "name"
) -> tuple[ServedModel, Reference]:
    """The served model and the reference that `text` names, full or short.

    Raises:
        InvalidArgument: no name, or one that is malformed.
        NotFound: a model that is not served here.
    """
    if not text:
        raise fields.required(field, "a name", f"name one of {kind.value}, such as {{name}} or {{name}}@1")
    full = text.startswith(COLLECTION)
    model = catalogue.find(text.split("/")[1] if full and text.count("/") >= 2 else "", field)
    return model, parse(text, kind=kind, model=model.engine.info.name, field=field)


def hook_points(model: ServedModel, names: Sequence[str], limits: Limits) -> tuple[HookPoint, ...]:
    """Readable hook points with one vector a position, each named once."""
    fields.count(len(names), "hook_points", limits.max_hook_points, "max_hook_points", "hook points")
    found: dict[str, HookPoint] = {}
    for index, name in enumerate(names):
        field = f"hook_points[{index}]"
        point = vector_point(model, name, field)
        if point.name in found:
            raise InvalidArgument(
                f"{field} repeats {point.name}",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                value=name,
                remedy="name each hook point once",
            )
        found[point.name] = point
    return tuple(found.values())


def vector_point(model: ServedModel, name: str, field: str) -> HookPoint:
    """A readable hook point with one vector a position."""
    if not name:
        raise fields.required(field, "a hook point", "name a readable hook point; ListHookPoints lists them")
    point = model.engine.hook_point(name, field=field)
    if not point.readable or point.kind == "attention":
        raise InvalidArgument(
            f"{point.name} holds no vector that can be read at a position",
            reason=reasons.HOOK_POINT_NOT_READABLE,
            field=field,
            value=name,
            remedy="name a readable hook point that is no attention map; ListHookPoints says which",
        )
    return point


def listed(
    library: ConceptLibrary,
    kind: Kind,
    *,
    model: str,
    name_prefix: str,
    every_version: bool,
    page_size: int,
    page_token: str,
) -> tuple[list[Saved], str]:
    """A page of what there is, without numbers: first what comes with the model, then the registry's. Blocks."""
    size, own = pages.size_of(page_size), library.built_in(kind, model=model, name_prefix=name_prefix)
    start = _built_in_start(page_token, len(own))
    found: list[Saved] = [] if start is None else list(own[start : start + size])
    if start is not None and (start + size < len(own) or (len(found) == size and own)):
        return found, _built_in_token(start + size)
    if not library.has_registry:
        return found, ""
    page = library.registry.list(
        kind,
        model=model,
        name_prefix=name_prefix,
        every_version=every_version,
        page_size=size - len(found),
        page_token="" if start is not None else page_token,
    )
    found.extend(saved_of(record, None) for record in page.records)
    return found, page.next_page_token


def _built_in_token(start: int) -> str:
    return base64.urlsafe_b64encode(_BUILT_IN_PAGE + str(start).encode()).decode()


def _built_in_start(token: str, n: int) -> int | None:
    """Where a page of what comes with the model begins; None for a token of the registry's."""
    if not token:
        return 0
    try:
        raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    if not raw.startswith(_BUILT_IN_PAGE):
        return None
    digits = raw.removeprefix(_BUILT_IN_PAGE)
    return min(int(digits), n) if digits.isdigit() else None
