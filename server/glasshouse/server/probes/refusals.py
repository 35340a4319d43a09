"""Reasons of the refusals that only fitting and loading probes know."""

from __future__ import annotations

from typing import Final

# INVALID_ARGUMENT
ONE_CLASS_ONLY: Final = "ONE_CLASS_ONLY"
TOO_FEW_EXAMPLES: Final = "TOO_FEW_EXAMPLES"

# FAILED_PRECONDITION
PROBE_MALFORMED: Final = "PROBE_MALFORMED"
