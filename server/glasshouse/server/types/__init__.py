"""Values and errors every floor speaks in: no torch, no protobuf."""
