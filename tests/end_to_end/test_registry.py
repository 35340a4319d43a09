"""Real servers on one real PostgreSQL: what one publishes the other serves, and what goes on while it is away."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from glasshouse.client import (
    AlreadyExistsError,
    Client,
    Model,
    NotFoundError,
    UnavailableError,
    add_vector,
    read_probe,
)
from glasshouse.server.registry.registry import Registry
from glasshouse.tour.server_process import ServerProcess

from ..server.registry.conftest import MISSING
from ..server.registry.postgres import Cluster, find_binaries
from .conftest import HOOK_POINT, until

EXAMPLES = {
    "plain": ["The cat sat.", "A dog ran.", "The sun rose.", "A bird flew.", "The boy ate."],
    "loud": ["The cat sat!", "A dog ran!", "The sun rose!", "A bird flew!", "The boy ate!"],
}


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    binaries = find_binaries()
    if binaries is None:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n!!! {MISSING}\n", file=sys.stderr, flush=True)
        pytest.skip(MISSING)
    made = Cluster(binaries)
    yield made
    made.remove()


@pytest.fixture(scope="module")
def pair(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    """Clients of two servers that share a database and the folder of its tensors."""
    shared = (
        *("--registry", cluster.new_database(), "--registry-blobs", str(tmp_path_factory.mktemp("blobs"))),
        *("--listen", "127.0.0.1:0", "--threads", "1"),
    )
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(lambda _: ServerProcess(*shared), range(2))
    with first, second, Client(first.target) as one, Client(second.target) as other:
        yield one, other
        first.stop()
        second.stop()


def generate(model: Model, name: str) -> str:
    """Two tokens steered by a direction called `name`."""
    steered = [add_vector(HOOK_POINT, name, 1.0)]
    return model.generate("A", max_tokens=2, seed=0, interventions=steered).result().text


def test_two_servers_see_each_others_publications_within_a_second(pair: tuple[Client, Client]) -> None:
    one, other = (client.model() for client in pair)
    vector = np.random.default_rng(0).standard_normal(192).astype(np.float32)
    one.create_direction("shared", {HOOK_POINT: vector})
    published = time.monotonic()
    assert np.array_equal(other.direction("shared").vector, vector)
    assert generate(other, "shared")
    assert time.monotonic() - published < 10.0
    # A name that the other holds already: it must notice the new version by itself.
    one.create_direction("shared", {HOOK_POINT: -vector}, next_version=True)
    published = time.monotonic()
    until(lambda: np.array_equal(other.direction("shared").vector, -vector), within_s=5.0)
    assert time.monotonic() - published < 3.0
    with pytest.raises(AlreadyExistsError) as caught:
        other.create_direction("shared", {HOOK_POINT: 2 * vector})
    assert caught.value.next_version == 3
    other.direction("shared@2").delete()
    until(lambda: one.direction("shared").info.version == 1, within_s=5.0)


def test_a_probe_trained_on_one_is_read_on_the_other(pair: tuple[Client, Client]) -> None:
    one, other = (client.model() for client in pair)
    probe = one.train_probe(EXAMPLES, hook_points=HOOK_POINT, positive="loud", name="loud").result(60)
    assert float(probe.score("The fox hid!")) > 0.5 > float(probe.score("The fox hid."))
    assert float(other.probe("loud").score("The fox hid!")) == pytest.approx(
        float(probe.score("The fox hid!")), abs=1e-4
    )
    result = other.generate(
        "The fox hid!", max_tokens=3, seed=0, ignore_eos=True, readouts=[read_probe("loud")]
    ).result()
    assert result.tokens[1].probes["loud"].scores.shape == (1,)


def test_the_database_goes_away_and_comes_back(pair: tuple[Client, Client], cluster: Cluster) -> None:
    one, other = (client.model() for client in pair)
    vector = np.ones(192, np.float32)
    one.create_direction("held", {HOOK_POINT: vector})
    one.create_direction("unread", {HOOK_POINT: vector})
    before = generate(one, "held")
    cluster.stop()
    try:
        for refused in (
            lambda: one.create_direction("new", {HOOK_POINT: vector}, timeout=20),
            lambda: one.directions(timeout=20),
            lambda: one.probe("nobody-has-read-this", timeout=20),
            lambda: generate(one, "unread"),
        ):
            with pytest.raises(UnavailableError) as caught:
                refused()
            assert caught.value.reason == "REGISTRY_UNAVAILABLE", caught.value
        assert one.generate("Once upon a time", max_tokens=8, seed=0).result().text
        assert generate(one, "held") == before, "what it holds it goes on serving"
        assert one.direction("held").info.version == 1
        assert float(one.probe("mood").score("The dog was sad and cried.")) > 0.5, "comes with the model"
        operation = one.compute_directions(EXAMPLES, positive="loud", hook_points=HOOK_POINT)
        assert operation.result(60).vector.shape == (192,), "what is not published needs no registry"
    finally:
        cluster.start()
    # Whoever asks first may find connections that the database has closed: then again.
    until(lambda: _answers(one), within_s=20.0)
    one.create_direction("new", {HOOK_POINT: vector})
    until(lambda: _sees(other, "new"), within_s=20.0)
    assert generate(one, "unread")


def _answers(model: Model) -> bool:
    try:
        return bool(model.directions())
    except UnavailableError:
        return False


def _sees(model: Model, name: str) -> bool:
    try:
        return model.direction(name).name == name
    except (NotFoundError, UnavailableError):
        return False


def test_what_a_killed_server_published_is_there_again(tmp_path: Path) -> None:
    arguments = ("--listen", "127.0.0.1:0", "--threads", "1", "--data", str(tmp_path / "data"))
    with ServerProcess(*arguments) as server, Client(server.target) as client:
        model = client.model()
        model.train_probe(EXAMPLES, hook_points=HOOK_POINT, positive="loud", name="loud").result(60)
        score = float(model.probe("loud").score("Stop!"))
        server.kill()
    registry = Registry.at(tmp_path / "data")
    registry.close()
    with ServerProcess(*arguments) as server, Client(server.target) as client:
        assert float(client.model().probe("loud").score("Stop!")) == pytest.approx(score, abs=1e-4)
        server.stop()


def test_what_cannot_be_a_registry_says_why(tmp_path: Path) -> None:
    from glasshouse.tour.server_process import ServerProcessError

    for arguments, words in (
        (("--registry", "mysql://x/y"), "not supported"),
        (
            ("--registry", "postgresql://nobody@/x?host=/nowhere", "--registry-blobs", str(tmp_path)),
            "not answer",
        ),
        (("--registry", "postgresql://nobody@/x"), "where its tensors lie"),
        (("--data", "/proc/nothing"), "cannot be written"),
    ):
        with pytest.raises(ServerProcessError, match=words):
            ServerProcess("--listen", "127.0.0.1:0", *arguments)
