"""What an engine needs of attention: the switch of a model and the memory it turns on.

The function itself lives with model loading (`glasshouse.server.models.attention`), because a model is built
around it.
"""

from glasshouse.server.models.attention import (
    IMPLEMENTATION,
    AttentionMemory,
    AttentionSite,
    AttentionSwitch,
    site_of,
)

__all__ = ["IMPLEMENTATION", "AttentionMemory", "AttentionSite", "AttentionSwitch", "site_of"]
