"""Directions and probes: examples in, handles with figures out."""
