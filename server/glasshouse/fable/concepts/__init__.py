"""fable's directions and probes: the generator's latents, found in the model's own activations."""
