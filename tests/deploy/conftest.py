"""Prometheus and Alertmanager from the system's packages. Without them these tests are skipped, loudly; with
GLASSHOUSE_REQUIRE_PROMETHEUS=1, as in continuous integration, that is an error.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass

import pytest

INSTALL = "apt-get install prometheus prometheus-alertmanager"
MISSING = f"Prometheus and Alertmanager are not installed: the alert tests did NOT run. Install them with: {INSTALL}"


@dataclass(frozen=True)
class Programs:
    """Where they are."""

    promtool: str
    prometheus: str
    alertmanager: str


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> Programs:
    found = [
        next((path for name in names if (path := shutil.which(name))), None)
        for names in (("promtool",), ("prometheus",), ("prometheus-alertmanager", "alertmanager"))
    ]
    if None in found:
        if os.environ.get("GLASSHOUSE_REQUIRE_PROMETHEUS"):
            pytest.fail(MISSING)
        # A skip is one letter, and pytest-xdist's workers have no summary of their own: say it where it is seen.
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n!!! {MISSING}\n", file=sys.stderr, flush=True)
        pytest.skip(MISSING)
    promtool, prometheus, alertmanager = map(str, found)
    return Programs(promtool=promtool, prometheus=prometheus, alertmanager=alertmanager)
