"""The vLLM engine: per-request edits and readouts inside vLLM's continuous, compiled batch.

`contract` what the two halves say to each other; `worker` the half inside vLLM's worker processes.
"""
