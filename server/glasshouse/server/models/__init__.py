"""Loading a Hugging Face causal language model, and the one naming table of its hook points."""
