"""One point: a stack of attention layers over stored keys, a token at a time; in a process of its own."""

from __future__ import annotations

import resource
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from topk_attention import KeyIndex, topk_attention
from topk_attention.backends.cpu.key_index import index_obstacle
from topk_attention.storage import StoredCache

from ...runs.process import Send
from ...runs.records import Json
from ...runs.steps import start_point
from .states import BLOCK, States

_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured: `tokens` are cached, then `steps` more follow one by one."""

    tokens: int = 100_000
    k: Annotated[int, "Keys kept per query."] = 64
    layers: Annotated[int, "Layers of the stack."] = 16
    heads: Annotated[int, "Query heads."] = 32
    key_heads: Annotated[int, "Key heads."] = 8
    head_dim: Annotated[int, "Size of a head."] = 64
    dtype: Annotated[str, "Of keys and values: bfloat16, float16 or float32."] = "bfloat16"
    steps: Annotated[int, "Tokens that are timed."] = 16
    threads: Annotated[int, "CPU threads."] = 1
    seed: Annotated[int, "Seed of random numbers."] = 0

    def as_record(self) -> Json:
        return asdict(self)

    def states(self, layer: int) -> States:
        return States(layer, self.heads, self.key_heads, self.head_dim, getattr(torch, self.dtype), self.seed)

    @property
    def file_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self.tokens * self.layers * self.key_heads * 2 * self.head_dim * getattr(torch, self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.layers} layers, {self.file_bytes / 2**30:.1f} GiB in files"


@dataclass
class _Meter:
    """Time and reads of this process."""

    wall_s: float
    cpu_s: float
    read_bytes: int
    page_faults: int

    @staticmethod
    def now() -> _Meter:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        return _Meter(time.perf_counter(), time.process_time(), _number_in(_IO, "read_bytes:"), faults)

    def since(self, before: _Meter) -> Json:
        return {name: getattr(self, name) - getattr(before, name) for name in asdict(self)}


def _number_in(path: Path, name: str) -> int:
    """A number of a file in /proc; 0 where there is none."""
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):
        return 0


def measure_point(request: Json, send: Send) -> Json:
    """Write what is missing of the files, then time tokens, check them, and take the files away.

    request  point: fields of `Point`; folder: of the files; keep: whether they stay
    """
    start_point(request)
    point, folder = Point(**request["point"]), Path(request["folder"])
    with torch.no_grad():
        result = _Run(point, folder, send).result()
    if not request["keep"]:
        shutil.rmtree(folder)
    return result


class _Run:
    def __init__(self, point: Point, folder: Path, send: Send) -> None:
        self.point, self.folder, self._send = point, folder, send
        self.states = [point.states(layer) for layer in range(point.layers)]

    def _opened(self) -> StoredCache:
        return StoredCache(self.folder, layers=range(self.point.layers), about=about(self.point))

    def result(self) -> Json:
        point = self.point
        filled = self._fill()
        cache = self._opened()
        try:
            cache.drop_pages()
            begun = _Meter.now()
            self.indexes = self._index(cache)
            indexed = _Meter.now().since(begun)
            cache.drop_pages()
            steps = self._steps(cache)
            memory = {
                "index_bytes": sum(index.nbytes for index in self.indexes.values()),
                "anonymous_bytes": 1024 * _number_in(_STATUS, "RssAnon:"),
                "mapped_bytes": 1024 * _number_in(_STATUS, "RssFile:"),
            }
            self.indexes.clear()  # of 1,000,000 tokens they take 10 GiB, and a layer that is made anew 4
            checked = self._check(cache)
            full = self._full_attention(cache)
        finally:
            cache.close()
        return {
            "filled": filled,
            "indexed": indexed,
            "steps": steps,
            "first_token_s": steps[0]["wall_s"],
            "token_s": statistics.median(step["wall_s"] for step in steps[len(steps) // 2 :]),
            "token_cpu_s": statistics.median(step["cpu_s"] for step in steps[len(steps) // 2 :]),
            "token_read_bytes": statistics.median(step["read_bytes"] for step in steps[len(steps) // 2 :]),
            "reckoned_read_bytes": self._reckoned_bytes(),
            **memory,
            "checked": checked,
            "full_attention_of_a_layer": full,
            "file_bytes": point.file_bytes,
        }

    def _fill(self) -> Json:
        """Continue with the files where they end."""
        begun, point = _Meter.now(), self.point
        with self._opened() as cache:
            before = cache.num_tokens
            if before > point.tokens:  # steps of a run that was interrupted
                for layer in range(point.layers):
                    cache.crop(layer, point.tokens)
            while (start := cache.num_tokens) < point.tokens:
                self._say(f"writing token {start:,} of {point.tokens:,}")
                stop = min((start // BLOCK + 1) * BLOCK, point.tokens)
                for layer, states in enumerate(self.states):
                    cache.append(layer, *states.keys_and_values(start, stop))
        return {**_Meter.now().since(begun), "tokens": point.tokens - min(before, point.tokens)}

    def _index(self, cache: StoredCache) -> dict[int, KeyIndex]:
        """Check what the files hold, as one that continues them must, and index it."""
        indexes = {}
        for layer, stop in cache.check():
            if stop == cache.num_tokens:
                self._say(f"indexing layer {layer + 1} of {self.point.layers}")
                key = _tensors(cache, layer)[0]
                if obstacle := index_obstacle(key):
                    raise RuntimeError(f"keys must have an index here, got none: {obstacle}")
                indexes[layer] = KeyIndex(key, keys_in_files=True)
                cache.expect_random_reads(layer, True)
        return indexes

    def _steps(self, cache: StoredCache) -> list[Json]:
        point, steps = self.point, []
        for step in range(point.steps):
            token = point.tokens + step
            self._say(f"token {step + 1} of {point.steps}")
            inputs = [(states.query(token), *states.keys_and_values(token, token + 1)) for states in self.states]
            parts = dict.fromkeys(("append_s", "index_s", "attention_s"), 0.0)
            before = _Meter.now()
            outputs = []
            for layer, (query, *new) in enumerate(inputs):
                times = [time.perf_counter()]
                key, value = cache.append(layer, *new)
                times.append(time.perf_counter())
                self.indexes[layer].append(key)
                times.append(time.perf_counter())
                outputs.append(self._attend(query, key, value, self.indexes[layer]))
                times.append(time.perf_counter())
                for name, begin, end in zip(parts, times, times[1:], strict=False):
                    parts[name] += end - begin
            steps.append({**_Meter.now().since(before), **parts})
            self.last = inputs, outputs
        return steps

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, index: KeyIndex | None = None) -> Tensor:
        return topk_attention(query, key, value, k=self.point.k, enable_gqa=True, key_index=index)

    def _check(self, cache: StoredCache) -> Json:
        """The last token against the operation on tensors in memory, made anew and without an index, and two heads
        against a dense computation in float64."""
        point, (inputs, outputs) = self.point, self.last
        num_tokens, group = cache.num_tokens, point.heads // point.key_heads
        errors = []
        layers = sorted({0, point.layers - 1})
        for layer in layers:
            self._say(f"checking layer {layer + 1} of {point.layers}")
            query, output = inputs[layer][0], outputs[layer]
            key, value = self.states[layer].keys_and_values(0, num_tokens)
            if not torch.equal(self._attend(query, key, value), output):
                raise AssertionError(f"layer {layer} gives other bits with its files and index than in memory")
            for head in (0, point.heads - 1):
                exact = _dense(query[0, head, 0], key[0, head // group], value[0, head // group], point.k)
                error = (output[0, head, 0].double() - exact).abs().max() / exact.abs().max()
                errors.append(float(error))
                if error > 4 * torch.finfo(query.dtype).eps:
                    raise AssertionError(f"layer {layer}, head {head} is off from a dense computation by {error:.2g}")
        return {"layers": layers, "heads": [0, point.heads - 1], "largest_error": max(errors), "bits_equal": True}

    def _full_attention(self, cache: StoredCache) -> Json:
        """PyTorch's attention, heads of a group as rows, over all keys of the first layer, read from its file."""
        self._say("full attention over one layer")
        cache.drop_pages()
        key, value = _tensors(cache, 0)
        query = self.last[0][0][0].view(1, self.point.key_heads, -1, self.point.head_dim)
        begun = _Meter.now()
        cache.expect_random_reads(0, False)
        F.scaled_dot_product_attention(query, key, value)
        return _Meter.now().since(begun)

    def _reckoned_bytes(self) -> int:
        """A page for each key that a head keeps, if no two lie on the same page and none is in memory."""
        return 4096 * self.point.k * self.point.heads * self.point.layers

    def _say(self, doing: str) -> None:
        self._send({"doing": doing})


def about(point: Point) -> Json:
    """What the files of a point are of: those of more or fewer tokens begin alike."""
    return {"states": {name: value for name, value in asdict(point).items() if name not in _NOT_OF_THE_FILES}}


_NOT_OF_THE_FILES = ("tokens", "k", "steps", "threads")


def _tensors(cache: StoredCache, layer: int) -> tuple[Tensor, Tensor]:
    tensors = cache.tensors(layer)
    assert tensors is not None
    return tensors


def _dense(query: Tensor, key: Tensor, value: Tensor, k: int) -> Tensor:
    """Softmax over the k largest of all scores, in float64: query [D], key [M, D], value [M, E]."""
    scores = key.double() @ query.double() * query.shape[0] ** -0.5
    best, kept = scores.topk(k)
    return best.softmax(0) @ value[kept].double()
