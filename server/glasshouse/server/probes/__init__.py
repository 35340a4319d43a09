"""Directions and probes: from labelled activations to a concept that can be scored, calibrated and watched."""
