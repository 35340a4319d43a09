"""The server's half of the vLLM engine: requests in, tokens joined with what was read, receipts out.

- `environment`: what vLLM reads from the process's environment, and the versions known to work.
- `arguments`: our settings as vLLM's.
- `sampling`: a request as vLLM's sampling parameters, its answers as ours.
- `admission`: how many may wait, and the workers' edit slots, taken before a request is sent.
- `channel`: the socket that the workers report on.
- `join`: one request's rows, runs and errors, matched with its tokens by position.
- `reading`: one readout's rows.
- `looking`, `watching`: conditions for ending early, and monitors.
- `probes`: those that the workers hold.
- `bulk`: forward-only work within a window.
- `statistics`: what the engine counts.
"""
