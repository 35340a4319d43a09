"""The tour: the embedded model served, read, steered and stopped, through the real client.

- `server_process`: `glasshouse serve` as a process of its own.
- `screen`: the look of it, on a terminal and in a pipe.
- `guide`: what every stage is given, and how it fails.
- one file a stage: `reading`, `writing`, `mood`, `crowd`, `refusals`, `page`.
- `__main__`: the stages in order (`make demo`).
"""
