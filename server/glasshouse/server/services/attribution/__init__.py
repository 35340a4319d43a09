"""AttributionService."""

from .servicer import AttributionServicer

__all__ = ["AttributionServicer"]
