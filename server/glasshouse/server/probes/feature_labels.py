"""What features are called: the labels of the set published last for each dictionary, looked up where they are shown.

Which set that is, is remembered until some set is published or deleted, here or by another server. While the database is
away features are shown without labels: a label is an ornament of what is served, never a reason not to serve it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Record
from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.errors import Unavailable


class FeatureNames:
    """Labels by dictionary and feature. Safe to use from several threads; `of` blocks."""

    def __init__(self, registry: Registry | None) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._sets: dict[tuple[str, str], Record | None] = {}
        self._changes = 0

    def of(self, model: str, dictionary: str, features: Sequence[int]) -> Mapping[int, str]:
        """The labels there are of `features`."""
        if self._registry is None or not features:
            return {}
        try:
            record = self._latest(self._registry, model, dictionary)
            if record is None:
                return {}
            found = self._registry.labels(record, features=features, limit=len(features))
        except Unavailable:
            return {}
        return {label.feature: label.label for label in found}

    def forget(self) -> None:
        """A set was published or deleted."""
        with self._lock:
            self._changes += 1
            self._sets.clear()

    def _latest(self, registry: Registry, model: str, dictionary: str) -> Record | None:
        key = (model, dictionary)
        with self._lock:
            if key in self._sets:
                return self._sets[key]
            changes = self._changes
        records: list[Record] = []
        token = ""
        while True:
            page = registry.list(
                Kind.FEATURE_LABELS, model=model, subject=dictionary, page_size=1000, page_token=token
            )
            records.extend(page.records)
            token = page.next_page_token
            if not token:
                break
        latest = max(records, key=lambda record: (record.created, record.id), default=None)
        with self._lock:
            if changes == self._changes:
                self._sets[key] = latest
        return latest
