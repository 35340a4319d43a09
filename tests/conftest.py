"""Nothing that a test starts writes to the user's own data folder."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

if "GLASSHOUSE_DATA" not in os.environ:
    os.environ["GLASSHOUSE_DATA"] = tempfile.mkdtemp(prefix="glasshouse-tests-")
    atexit.register(shutil.rmtree, os.environ["GLASSHOUSE_DATA"], ignore_errors=True)
