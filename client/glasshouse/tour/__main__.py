"""`python -m glasshouse.tour [--engine NAME]`: the stages in order. Exit status 0 only when everything worked."""

from __future__ import annotations

import argparse
import sys
import time

from glasshouse.client import Client, GlasshouseError
from glasshouse.tour import crowd, explaining, features, mood, page, reading, refusals, watching, writing
from glasshouse.tour.guide import Guide, TourError
from glasshouse.tour.screen import Screen
from glasshouse.tour.server_process import ServerProcess, ServerProcessError

COMMAND = (
    *("--model", "fable", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
    *("--registry", "memory"),
)
# What is not said on the command line. vLLM compiles the model first.
ENGINE = "transformers"
START_TIMEOUT_S = 600.0


def take(screen: Screen, engine: str = ENGINE) -> None:
    """Everything, from the server's start to its end, on an engine.

    Raises:
        TourError, ServerProcessError, GlasshouseError: something did not work.
    """
    begun = time.perf_counter()
    screen.stage("A server with its embedded model, fable")
    command = COMMAND if engine == ENGINE else (*COMMAND, "--engine", engine)
    screen.code("glasshouse serve " + " ".join(command))
    with ServerProcess(*command, timeout_s=START_TIMEOUT_S) as server:
        with Client(server.target) as client:
            client.wait_ready()
            screen.say(server.start_line)
            guide = Guide(screen=screen, server=server, client=client, model=client.model())
            _introduce(guide)
            reading.list_hook_points(guide)
            reading.read_activations(guide)
            reading.read_lens(guide)
            writing.generate(guide)
            direction = mood.compute_direction(guide)
            mood.steer_both_ways(guide, direction)
            crowd.stream_together(guide, direction)
            moods = features.find_mood_features(guide)
            features.show_tokens(guide, moods)
            features.steer_by_features(guide, moods)
            probe = watching.train_probe(guide)
            watching.watch_and_stop(guide, probe)
            explaining.show_tokens_and_heads(guide)
            explaining.show_circuit(guide)
            explaining.show_features(guide)
            refusals.show_a_mistake(guide)
            page.show_metrics(guide)
        screen.stage("The end")
        seconds = server.stop()
        screen.note(f"SIGTERM; the server drained and ended with status 0 after {seconds:.1f} s.")
    screen.say(f"The tour took {time.perf_counter() - begun:.0f} s.", style="bold")


def _introduce(guide: Guide) -> None:
    info = guide.model.info
    guide.screen.note(
        f"Ready after {guide.server.startup_seconds:.1f} s: {info.family}, {info.n_layers} layers, "
        f"d_model {info.d_model}, vocabulary {info.vocab_size}, context {info.context_length}, {info.dtype}."
    )


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m glasshouse.tour", allow_abbrev=False)
    parser.add_argument("--engine", choices=(ENGINE, "vllm"), default=ENGINE, help="what runs the model")
    engine = parser.parse_args().engine
    screen = Screen()
    try:
        take(screen, engine)
    except (TourError, ServerProcessError, GlasshouseError) as error:
        screen.console.print(f"\nThe tour failed: {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
