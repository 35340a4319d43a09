"""Makes fable's directions and probes: `python -m glasshouse.fable.concepts.making`.

1. The model is served in this process as `glasshouse serve` would serve it.
2. Of each latent: a direction at every layer (difference in means, of two labels) and a logistic probe at the best
   layer, by the server's own operations, learnt from the training half of the labelled set and judged on the other.
3. Each is written as soon as it is there. One whose weights and examples are what they were is left as it is, so the
   script may be stopped and run again; `--again` makes them all.
4. `CARD.md` beside them says what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

from glasshouse.fable import concepts_path, model_path
from glasshouse.fable.concepts.card import write_card
from glasshouse.fable.concepts.latents import LATENTS, Latent, records
from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.factory import create_engine
from glasshouse.server.operations.compute_directions import DirectionsRequest, compute
from glasshouse.server.operations.examples import Example, data_hash, labelling, reading
from glasshouse.server.operations.gathering import GatherOptions
from glasshouse.server.operations.manager import Progress
from glasshouse.server.operations.train_probe import ProbeRequest, train
from glasshouse.server.probes import built_in
from glasshouse.server.probes.directions import DirectionMethod
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.saved import direction_draft, probe_draft
from glasshouse.server.probes.training import ProbeSpec
from glasshouse.server.registry.records import Draft
from glasshouse.server.types.configuration import EngineSettings
from glasshouse.server.types.selectors import EVERYWHERE

_OPTIONS = GatherOptions(pooling=Pooling.LAST, held_out_share=0.25, seed=0, max_bytes=1 << 30)


def examples_of(latent: Latent, engine: Engine) -> tuple[Example, ...]:
    """A latent's labelled set as the server's examples, its own test half held out."""
    return tuple(
        Example(
            reading=reading(engine.codec.encode(record["text"]), EVERYWHERE, engine.info, "text"),
            labels=(record["label"],),
            held_out=record["split"] == "test",
        )
        for record in records(latent)
    )


async def make_direction(latent: Latent, engine: Engine, examples: tuple[Example, ...]) -> Draft:
    """The latent's direction after every layer."""
    request = DirectionsRequest(
        hook_points=tuple(p for p in engine.hook_points if p.name.endswith("hook_resid_post")),
        options=_OPTIONS,
        method=DirectionMethod.DIFFERENCE_IN_MEANS,
        made_by=DirectionMethod.DIFFERENCE_IN_MEANS.value,
        examples=examples,
        labelling=labelling(examples, names=latent.labels, positive=latent.positive),
    )
    found = (await compute(engine, ConceptLibrary(), request, Progress())).direction
    described = built_in.described(found, latent.what)
    return direction_draft(described, model=engine.info.name, name=latent.name, version=1)


async def make_probe(latent: Latent, engine: Engine, examples: tuple[Example, ...]) -> Draft:
    """The latent's probe at the layer where it does best."""
    request = ProbeRequest(
        hook_points=tuple(p for p in engine.hook_points if p.name.endswith("hook_resid_post")),
        options=_OPTIONS,
        spec=ProbeSpec(),
        examples=examples,
        labelling=labelling(examples, names=latent.labels, positive=latent.positive),
        each=True,
    )
    found = (await train(engine, ConceptLibrary(), request, Progress())).probe
    described = built_in.described(found, latent.what)
    return probe_draft(described, model=engine.info.name, name=latent.name, version=1)


def is_current(path: Path, revision: str, examples: tuple[Example, ...]) -> bool:
    """Whether a file was made from these weights and examples."""
    if not path.exists():
        return False
    origin = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    return bool(origin["model_revision"] == revision and origin["data_hash"] == data_hash(examples))


async def make(folder: Path, *, again: bool = False) -> None:
    """Makes what is missing, or all of it."""
    engine = create_engine("transformers", EngineSettings(model=str(model_path()), name="fable"))
    await engine.start()
    try:
        for latent in LATENTS:
            examples = examples_of(latent, engine)
            for kind, maker in (("direction", make_direction), ("probe", make_probe)):
                path = folder / f"{kind}-{latent.name}.json"
                if kind == "direction" and not latent.positive:
                    continue
                if not again and is_current(path, engine.info.revision, examples):
                    print(f"{path.stem}: as it was")
                    continue
                built_in.write(await maker(latent, engine, examples), folder, datetime.now(UTC))
                print(f"{path.stem}: made")
    finally:
        await engine.stop()
    write_card(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make fable's directions and probes.")
    parser.add_argument("--out", type=Path, default=concepts_path())
    parser.add_argument("--again", action="store_true", help="make those that are there too")
    args = parser.parse_args()
    asyncio.run(make(args.out, again=args.again))


if __name__ == "__main__":
    main()
