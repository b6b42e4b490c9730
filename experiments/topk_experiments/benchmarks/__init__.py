"""Benchmarks: memory and time of the operations and of whole models, and the error of attention.

tables.py        the one maker of tables and pictures
round_tables.py  tables of methods that took turns
rounds.py        what is missing on file is measured, by one of two protocols
attention/       the operation alone, one layer, and chunk sizes
feed_forward/    the same for feed-forward layers
model/           one training step of a whole model
decode/          one query against a long cache, as when a token is generated
generation/      whole models that generate, beside other caches and llama.cpp
error/           how far the output is from full attention, at equal time and memory
long_cache/      a token over a context in files
sequence_parallel/  a training step of one sequence over processes
networks/        networks of experts and of fused weights in the shapes of models, beside dense ones
paths/           peak memory of each way through a converted model, against length
figures.py       the figures of Gupta et al. 2021, in sizes for two cores
"""

from __future__ import annotations

from pathlib import Path

from . import (
    attention,
    decode,
    error,
    feed_forward,
    generation,
    long_cache,
    model,
    networks,
    paths,
    sequence_parallel,
)


def redraw(results: Path) -> list[Path]:
    """Draw all tables and pictures of the benchmarks again from the records in a folder of results.

    Nothing is measured. Returns the files written; folders without records are skipped.
    """
    written = []
    for table in (attention.LAYERS, attention.CHUNKS, feed_forward.LAYERS):
        written += table.report(results / table.name)
    for operation, name in ((attention, "attention-kernel"), (feed_forward, "feed-forward-kernel")):
        for sweep in ("table", "layers", *operation.ROUNDS.sweeps):
            written += operation.ROUNDS.report(results / name, sweep)
    return [
        *written,
        *decode.report(results / "decode"),
        *generation.report(results / "generation"),
        *model.redraw(results),
        *error.report(results / "attention-error"),
        *long_cache.report(results / "long-cache"),
        *sequence_parallel.report(results / "sequence-parallel"),
        *networks.report(results / "networks"),
        *paths.report(results / "paths"),
    ]
