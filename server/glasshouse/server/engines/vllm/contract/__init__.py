"""What the gateway (the server's process) and the worker (inside vLLM) say to each other; neither half imports the other.

1. At start the gateway passes `settings.engine_arguments` to vLLM and, once it is up, calls `glasshouse_connect` on every
   worker with the ZMQ endpoint it pulls from; each answers with a `BootReport`.
2. A request becomes a `RequestPlan` (`plan.plan_request`), packed into `SamplingParams.extra_args[EXTRA_ARG]`.
   Positions are absolute half-open ranges by then: the worker decides nothing. `salt.cache_salt` keeps prefix-cache
   entries apart.
3. Every step the worker pushes at most one `messages.StepReport`: requests armed, errors, which positions ran under
   how many edits, and rows read. It leaves the worker before the step's tokens are sampled.
4. The gateway withholds a request's tokens until every reporter has armed it, joins rows and tokens by position, and
   ends with the receipt that `ledger.Ledger` counts.
"""

from .clauses import Clause, clause_of
from .ledger import Ledger
from .messages import Ran, RowBlock, StepError, StepReport, pack_report, unpack_report
from .plan import (
    ConditionPlan,
    EditPlan,
    ReadoutPlan,
    RequestPlan,
    pack_plan,
    plan_request,
    probes_of,
    unpack_plan,
)
from .salt import cache_salt
from .settings import EXTRA_ARG, PLUGIN_VERSION, BootReport, WorkerSettings, engine_arguments
from .watches import SCORES, Steering, WatchPlan

__all__ = [
    "EXTRA_ARG",
    "PLUGIN_VERSION",
    "SCORES",
    "BootReport",
    "Clause",
    "ConditionPlan",
    "EditPlan",
    "Ledger",
    "Ran",
    "ReadoutPlan",
    "RequestPlan",
    "RowBlock",
    "Steering",
    "StepError",
    "StepReport",
    "WatchPlan",
    "WorkerSettings",
    "cache_salt",
    "clause_of",
    "engine_arguments",
    "pack_plan",
    "pack_report",
    "plan_request",
    "probes_of",
    "unpack_plan",
    "unpack_report",
]
