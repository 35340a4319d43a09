"""What the operator sees of all this: the key lines of the metrics page."""

from __future__ import annotations

from urllib.request import urlopen

from glasshouse.tour.guide import Guide, expect

KEY_LINES = (
    "glasshouse_requests_total",
    "glasshouse_prompt_tokens_total",
    "glasshouse_generated_tokens_total",
    "glasshouse_interventions_total",
    "glasshouse_readout_bytes_total",
    "glasshouse_time_to_first_token_seconds_count",
    "glasshouse_active_requests",
    "glasshouse_queue_depth",
)


def show_metrics(guide: Guide) -> None:
    """Prints them; nothing runs any more, and what was refused is counted."""
    screen = guide.screen
    screen.stage("Metrics: what the operator sees")
    screen.code(f"curl {guide.server.metrics_url}")
    with urlopen(guide.server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    shown = [line for line in lines if line.startswith(KEY_LINES)]
    for line in shown:
        screen.say(line)
    expect("glasshouse_active_requests 0.0" in shown, "no request still active")
    expect(any('code="NOT_FOUND"' in line for line in shown), "the refusal counted")
    expect(any('edit="add_vector"' in line for line in shown), "the interventions counted")
