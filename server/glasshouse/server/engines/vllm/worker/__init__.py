"""Inside vLLM's worker process: hooks in the model's graph, edits and readouts of the batch's rows."""
