"""The corpus fable is trained on: generated text whose latents (mood, gender, number, facts, endings) are
known."""
