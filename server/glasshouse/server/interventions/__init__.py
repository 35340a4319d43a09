"""Edits of activations: checked once, planned per forward pass, applied in batches."""
