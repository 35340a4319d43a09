"""Pictures of what the server found: pages of one file that need no network, and images.

`graph_page` needs nothing beyond the client; images need `glasshouse[plot]`.
"""

from __future__ import annotations

from glasshouse.client.pictures.graph_page import FeatureNote, graph_page

__all__ = ["FeatureNote", "graph_page"]
