"""The errors that only the registry meets.

`AlreadyExists` has the code of its parent until the transport's table names it.
"""

from __future__ import annotations

from typing import Final

from glasshouse.server.types.errors import FailedPrecondition

# ALREADY_EXISTS
NAME_TAKEN: Final = "NAME_TAKEN"

# FAILED_PRECONDITION
IN_USE: Final = "IN_USE"
BLOB_DAMAGED: Final = "BLOB_DAMAGED"
REGISTRY_MISMATCH: Final = "REGISTRY_MISMATCH"

# UNAVAILABLE
REGISTRY_UNAVAILABLE: Final = "REGISTRY_UNAVAILABLE"


class AlreadyExists(FailedPrecondition):
    """The name and version are taken by something else; `metadata["next_version"]` is free."""
