"""The tour: the embedded model served, read, steered and stopped, through the real client.

- `server_process`: `glasshouse serve` as a process of its own.
- `screen`: the look of it, on a terminal and in a pipe.
- `guide`: what every stage is given, and how it fails.
- one file a subject: `reading`, `writing`, `mood`, `crowd`, `features`, `watching`, `explaining`, `refusals`, `page`.
- `explanation`: what `explaining` tells, to be had without the tour.
- `__main__`: the stages in order (`make demo`).
"""

import os

# What gRPC's core would print of a connection that a stopping server ends.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
