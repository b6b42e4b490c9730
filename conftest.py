"""Fixtures that tests of all layers share."""

import functools
import importlib.util
import os
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings

from topk_attention.backends import BACKENDS, cpu, triton
from topk_attention.backends.chunked import tiles
from triton_claims import is_triton_claim

settings.register_profile("local", max_examples=100, deadline=None)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of other backends in Triton's interpreter, and elsewhere what would be the same test again.

    Nothing but the chunked backend is cut into tiles. What the compiled kernels do not compute is computed by the
    chunked backend, so they need no small tiles either.
    """
    if triton.IS_INTERPRETED:
        kept = [item for item in items if is_triton_claim(item.nodeid)]
        for item in kept:  # of inf less inf, and the like, NumPy warns where a GPU says nothing
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
    else:
        kept = [item for item in items if not _is_cut_in_vain(getattr(item, "callspec", None))]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept


def _is_cut_in_vain(callspec):
    if callspec is None or callspec.params.get("tiling") != "small_tiles":
        return False
    backends = [callspec.params[name] for name in ("backend", "fast_backend") if name in callspec.params]
    return backends != [] and "chunked" not in backends


class ScoredTile(NamedTuple):
    step: tiles.Step
    keys: range


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # Inputs of a few rows gain nothing from a second thread and wait 8 ms for it whenever the machine is busy.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _sources_parsed_once():
    # Each record has a hash of all code, which takes half a second; what a source says depends on the source alone.
    environment = importlib.import_module("topk_attention.environment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "_code_of", functools.cache(environment._code_of))
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order():
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # which would write down the whole stack three times, for devices that are not there: half a millisecond
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerator_of_an_earlier_test():
    # accelerate keeps the precision of the first Accelerator of a process and refuses another.
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def kernels():
    """Skip the test where there are no compiled kernels; in CI that is a failure."""
    if cpu.problem() is not None:
        if os.environ.get("CI"):
            pytest.fail(cpu.problem())
        pytest.skip(cpu.problem())


# Triton's interpreter runs its kernels on CPU tensors. It has to be on before Triton is imported, and everything else
# runs as before without it, so a process tests the Triton kernels or all others.
if triton.IS_INTERPRETED:
    HERE = ["triton"]
    TILED = HERE
else:
    HERE = [name for name in BACKENDS if name != "triton"]
    TILED = ["cpu", "chunked", "chunked-small_tiles"]
# The kernels' files cannot be read for examples where Triton is not there.
_NEED_TRITON = ["src/topk_attention/backends/triton/*.py", "tests/support/compile_triton.py"]
collect_ignore_glob = [] if importlib.util.find_spec("triton") else _NEED_TRITON


@pytest.fixture(params=HERE)
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("kernels")
    return request.param


@pytest.fixture(params=[name for name in HERE if name != "reference"])
def fast_backend(request):
    """A backend to compare with the reference."""
    if request.param == "cpu":
        request.getfixturevalue("kernels")
    return request.param


@pytest.fixture(params=TILED)
def tiled_backend(request):
    """The same, and the chunked one again with the inputs cut into many tiles."""
    if request.param == "cpu":
        request.getfixturevalue("kernels")
    if request.param == "chunked-small_tiles":
        request.getfixturevalue("small_tiles")
    return request.param.removesuffix("-small_tiles")


@pytest.fixture
def scored_tiles(monkeypatch):
    """A list that receives every score tile the chunked backend computes."""
    tiles_so_far: list[ScoredTile] = []
    for name in ("attention", "full_attention"):
        # By its full name: in the package, `attention` is the function.
        module = importlib.import_module(f"topk_attention.backends.chunked.{name}")
        score_tile = module.score_tile

        def recorded(inputs, step, *rest, score_tile=score_tile):
            tiles_so_far.append(ScoredTile(step, next(x for x in rest if isinstance(x, range))))
            return score_tile(inputs, step, *rest)

        monkeypatch.setattr(module, "score_tile", recorded)
    return tiles_so_far


@pytest.fixture
def small_tiles(monkeypatch, scored_tiles):
    """Cut inputs of a dozen rows into several query chunks, key blocks and backward steps."""
    monkeypatch.setattr(tiles, "TILE_BYTES", 128)  # 16 scores in float64
    monkeypatch.setattr(tiles, "_QUERY_CHUNK_BEFORE_KEYS_ARE_BLOCKED", 4)
    monkeypatch.setattr(tiles, "_KEY_BLOCK_PER_K", 1)
    feed_forward = importlib.import_module("topk_attention.backends.chunked.feed_forward")
    monkeypatch.setattr(feed_forward, "TILE_BYTES", 128)
    monkeypatch.setattr(feed_forward, "_FEWEST_TOKENS", 1)
    monkeypatch.setattr(feed_forward, "_ENTRIES_PER_NEURON", 1)
    return scored_tiles


@pytest.fixture(params=["one_tile"] if triton.IS_INTERPRETED else ["one_tile", "small_tiles"])
def tiling(request):
    """Run the test with everything in one tile and again with the inputs cut into many."""
    if request.param == "small_tiles":
        request.getfixturevalue("small_tiles")
    return request.param
