"""`glasshouse serve`: settings, the engine, the server, and an orderly end.

1. Flags override the configuration file, which overrides the defaults.
2. The port is bound before the model is loaded, so that a taken one is known at once.
3. `glasshouse: serving MODEL on HOST:PORT` on standard output says that health answers SERVING; logs go to
   standard error.
4. The first SIGTERM or SIGINT drains: requests in flight finish, within a limit. The second exits at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasshouse.server.types.configuration import EngineSettings, Settings
from glasshouse.server.types.errors import ServingError

if TYPE_CHECKING:
    from glasshouse.server.engines.engine import Engine
    from glasshouse.server.probes.library import ConceptLibrary
    from glasshouse.server.transport.logs import Logger

EngineFactory = Callable[[str, EngineSettings], "Engine"]

EMBEDDED_MODEL = "fable"
ENGINES = ("transformers", "vllm")


class StartError(Exception):
    """The server cannot start; the message says why and what to do."""


def main(argv: list[str], engine_factory: EngineFactory | None = None) -> int:
    """Serves until told to stop. `argv`: the arguments after `serve`. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    # Read when torch loads. Threads that spin at each barrier take the cores that the event loop and clients on
    # this machine need, and wait for one another: where cores are shared, a step takes up to ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # NumPy's and SciPy's, which fit probes, always spin: beside a busy model training takes a hundred times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        return _run(arguments, engine_factory)
    except StartError as error:
        sys.stderr.write(f"glasshouse: {error}\n")
    except ServingError as error:
        remedy = f"; {error.remedy}" if error.remedy else ""
        sys.stderr.write(f"glasshouse: {error.message}{remedy}\n")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glasshouse serve",
        description="Serve a language model behind glass over gRPC.",
        epilog="Flags override the configuration file. deploy/README.md describes every setting.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model", metavar="fable|PATH|HUB_ID", help="the embedded model (the default), a folder, or a hub id"
    )
    add("--name", metavar="NAME", help="what callers call the model; default: the last part of --model")
    add("--engine", choices=ENGINES, help="what runs the model; default: transformers")
    add(
        "--dictionary",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="serve a dictionary of features too; the embedded model comes with its own",
    )
    add(
        "--listen",
        metavar="HOST:PORT",
        help="default: 127.0.0.1:50051; port 0 picks a free one; or unix:PATH",
    )
    add(
        "--metrics", metavar="HOST:PORT", help="Prometheus metrics at http://HOST:PORT/metrics; default: none"
    )
    add(
        "--data",
        metavar="FOLDER",
        help="where directions, probes and monitors are kept; default: glasshouse in the user's data folder",
    )
    add(
        "--registry",
        metavar="URL|memory",
        help="keep them in another database, postgresql://... or sqlite:///PATH, or until the server stops",
    )
    add("--registry-blobs", metavar="URL", help="the folder or object store of their tensors")
    add("--config", metavar="FILE.toml", type=Path, help="settings; see deploy/glasshouse.toml")
    add("--dtype", metavar="DTYPE", help="auto, float32, bfloat16 or float16")
    add("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    add("--threads", metavar="N", type=int, help="CPU threads of the computation; 0: the library's choice")
    add(
        "--vllm",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a setting of the vLLM engine, such as tensor_parallel_size=2; see deploy/vllm.md",
    )
    add("--max-running", metavar="N", type=int, help="sequences computed together; default: 64")
    add("--log-format", choices=("auto", "console", "json"), help="default: console on a terminal, else json")
    add("--log-level", choices=("debug", "info", "warning", "error"), help="default: info")
    add("--allow-remote-code", action="store_true", default=None, help="run code that comes with the model")
    add("--insecure-listen", action="store_true", default=None, help="allow plaintext beyond loopback")
    return parser


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The configuration file's settings with the flags put over them.

    Raises:
        StartError: settings that cannot be used.
    """
    from glasshouse.server.transport import configuration

    try:
        settings = configuration.load(arguments.config) if arguments.config else Settings()
        merged = _merge(settings, arguments)
        merged = replace(merged, vllm=configuration.vllm_settings(arguments.vllm, merged.vllm))
        configuration.check(merged)
    except configuration.ConfigurationError as error:
        raise StartError(str(error)) from error
    return merged


def _merge(settings: Settings, arguments: argparse.Namespace) -> Settings:
    def given(**flags: Any) -> dict[str, Any]:
        return {name: value for name, value in flags.items() if value is not None}

    a = arguments
    model = given(
        model=a.model,
        name=a.name,
        engine=a.engine,
        dtype=a.dtype,
        device=a.device,
        threads=a.threads,
        allow_remote_code=a.allow_remote_code,
    )
    server = given(listen=a.listen, metrics=a.metrics, insecure_listen=a.insecure_listen)
    return replace(
        settings,
        model=replace(settings.model, **model),
        server=replace(settings.server, **server),
        log=replace(settings.log, **given(format=a.log_format, level=a.log_level)),
        limits=replace(settings.limits, **given(max_running=a.max_running)),
        registry=replace(settings.registry, **given(data=a.data, url=a.registry, blobs=a.registry_blobs)),
        dictionaries={**settings.dictionaries, **dict(_dictionary(text) for text in a.dictionary)},
    )


def _dictionary(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise StartError(f"--dictionary {text!r} is not NAME=PATH")
    return name, path


def engine_settings(settings: Settings) -> EngineSettings:
    """What the engine is made from: the model found, its name settled.

    Raises:
        StartError: an embedded model that is not installed, or a name that cannot be one.
    """
    model = settings.model
    location = _embedded() if model.model == EMBEDDED_MODEL else model.model
    name = model.name or (
        EMBEDDED_MODEL if model.model == EMBEDDED_MODEL else Path(model.model).resolve().name
    )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise StartError(f"{name!r} cannot be a model's name; give one of letters, digits, . _ - with --name")
    return EngineSettings(
        model=location,
        name=name,
        dtype=model.dtype,
        device=model.device,
        threads=model.threads or None,
        limits=settings.limits,
        allow_remote_code=model.allow_remote_code,
        vllm=settings.vllm,
        dictionaries={**(_packaged() if model.model == EMBEDDED_MODEL else {}), **settings.dictionaries},
    )


def _packaged() -> dict[str, str]:
    """The dictionaries that the package carries for its embedded model, by name."""
    from glasshouse import fable

    return {name: str(fable.dictionary_path(name)) for name in fable.dictionary_names()}


def _embedded() -> str:
    try:
        from glasshouse.fable import model_path
    except ImportError as error:
        raise StartError(
            f"the embedded model is not installed ({error}); serve a folder with --model"
        ) from error
    return str(model_path())


def _create_engine(name: str, settings: EngineSettings) -> Engine:
    try:
        from glasshouse.server.engines.factory import create_engine

        return create_engine(name, settings)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if missing.startswith("glasshouse"):
            raise
        extra = "vllm" if name == "vllm" else "server"
        raise StartError(f"{missing} is not installed; run: pip install 'glasshouse[{extra}]'") from error


def _run(arguments: argparse.Namespace, engine_factory: EngineFactory | None) -> int:
    # What gRPC's core would print on a taken port, we say ourselves.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from glasshouse.server.transport.logs import build_logger, route_library_logs
    except ModuleNotFoundError as error:
        raise StartError(f"{error.name} is not installed; run: pip install 'glasshouse[server]'") from error
    settings = settings_from(arguments)
    route_library_logs(settings.log)
    return asyncio.run(_serve(settings, build_logger(settings.log), engine_factory or _create_engine))


async def _serve(settings: Settings, log: Logger, create: EngineFactory) -> int:
    from glasshouse.server.transport.keys import KeyFileError
    from glasshouse.server.transport.listening import ListenError, parse_address
    from glasshouse.server.transport.metrics_page import MetricsPage
    from glasshouse.server.transport.server import Server

    wanted = engine_settings(settings)
    with ExitStack() as stack:
        try:
            server = Server(settings, log)
            page = None
            if settings.server.metrics:
                page = MetricsPage(parse_address(settings.server.metrics), server.metrics.registry)
                stack.enter_context(page)
        except (ListenError, KeyFileError) as error:
            raise StartError(str(error)) from error
        library = stack.enter_context(_library(settings, wanted.name))
        engine = await _ready(create, settings.model.engine, wanted, log)
        try:
            await server.start([engine], library)
            stopping = _stop_on_signals(log)
            if page is not None:
                _say(f"glasshouse: metrics on {page.url}")
            _say(f"glasshouse: serving {wanted.name} on {server.address}")
            await stopping.wait()
            await server.drain()
        finally:
            await engine.stop()
            await server.stop()
    log.info("stopped")
    return 0


@contextmanager
def _library(settings: Settings, name: str) -> Iterator[ConceptLibrary]:
    """What is known of directions and probes of the model called `name`. Opening it blocks the loop: there is nothing else
    to do yet.
    """
    from glasshouse.server.probes.library import ConceptLibrary
    from glasshouse.server.registry.opening import opened

    with opened(settings.registry) as registry:
        library = ConceptLibrary(registry, max_cache_bytes=settings.registry.max_cache_bytes)
        if settings.model.model == EMBEDDED_MODEL:
            from glasshouse import fable

            library.add_built_in(fable.concepts_path(), name)
        library.start()
        try:
            yield library
        finally:
            library.stop()


async def _ready(create: EngineFactory, name: str, wanted: EngineSettings, log: Logger) -> Engine:
    """An engine that has been started. Loading blocks the loop: there is nothing else to do yet."""
    try:
        engine = create(name, wanted)
        await engine.start()
    except (StartError, ServingError):
        raise
    except Exception as error:
        log.debug("the engine did not start", exc_info=error)
        what = f"{type(error).__name__}: {error}".strip()
        raise StartError(f"{wanted.model} cannot be served: {what}; --log-level debug shows where") from error
    # What has been loaded stays: the collector would walk its million objects every few seconds, a tenth of a second in
    # which no token leaves.
    gc.collect()
    gc.freeze()
    return engine


def _stop_on_signals(log: Logger) -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT. The second ends the process."""
    stopping = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stopping.is_set():
            log.warning("second signal, exiting at once", signal=number.name)
            os._exit(128 + number)
        log.info("stopping", signal=number.name)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stopping


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
