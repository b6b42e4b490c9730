"""The one table of who computes attention. Every experiment calls such an entry a method, by the name it has here.

A method of this library may name its backend: "topk-cpu" is "topk" on the backend "cpu". "topk-completed" names none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from topk_attention.backends import BACKENDS, choose_backend

TOPK = "topk-"


class Method(NamedTuple):
    """What is true of a method, wherever it runs.

    description   its name in tables and pictures
    is_ours       computed by this library, on a backend
    keeps_k       keeps k keys per query
    is_completed  adds the keys that are not kept as one more entry, with the library's default completion
    is_random     random features stand for attention weights: there is nothing to add a bias to or to drop
    takes_bias    adds a bias to the scores and gives it a gradient
    has_chunks    computes some of its queries at a time
    """

    description: str
    is_ours: bool = False
    keeps_k: bool = False
    is_completed: bool = False
    is_random: bool = False
    takes_bias: bool = False
    has_chunks: bool = False


METHODS = {
    "topk": Method("top-k attention", is_ours=True, keeps_k=True, takes_bias=True, has_chunks=True),
    "topk-completed": Method(
        "top-k attention, completed", is_ours=True, keeps_k=True, is_completed=True, takes_bias=True, has_chunks=True
    ),
    "query-chunks": Method("every key, in query chunks", is_ours=True, takes_bias=True, has_chunks=True),
    "sdpa": Method("PyTorch's scaled_dot_product_attention", takes_bias=True),
    "vanilla": Method("vanilla (matmul, softmax, matmul)"),
    "vanilla-chunks": Method("vanilla, 1,024 queries at a time", has_chunks=True),
    "performer": Method("Performer", is_random=True, has_chunks=True),
    "rfa": Method("Random Feature Attention", is_random=True, has_chunks=True),
}


def method_of(name: str) -> Method:
    """The entry of a method, also where its name holds a backend."""
    return METHODS[split_backend(name)[0]]


def split_backend(name: str) -> tuple[str, str | None]:
    """The method and its backend; None where the name holds none.

    >>> split_backend("topk-cpu"), split_backend("vanilla-chunks")
    (('topk', 'cpu'), ('vanilla-chunks', None))
    """
    backend = name.removeprefix(TOPK)
    return ("topk", backend) if name.startswith(TOPK) and backend in BACKENDS else (name, None)


def topk_method(backend: str) -> str:
    """The method that is top-k on this backend."""
    return TOPK + choose_backend(backend).name


def kept(method: str, k: int) -> int | None:
    """k for top-k, completed or not, None for methods that use every key or neuron."""
    return k if method == "topk" or method.startswith(TOPK) else None


def among(methods: Iterable[str], *, is_random: bool | None = None, takes_bias: bool | None = None) -> tuple[str, ...]:
    """The methods of which this is true; None: either."""
    wanted = {"is_random": is_random, "takes_bias": takes_bias}
    return tuple(
        name
        for name in methods
        if all(value is None or getattr(method_of(name), field) == value for field, value in wanted.items())
    )


def check_method(method: str, names: Collection[str], *, argument: str = "methods") -> None:
    """
    names  of methods that an experiment has; "topk-BACKEND" is always one

    Raises:
        ValueError: there is no such method.
        RuntimeError: its backend cannot run here.
    """
    if method in names:
        return
    if not method.startswith(TOPK):
        raise ValueError(f"{argument} must be topk-BACKEND or among {', '.join(names)}, got {method!r}")
    choose_backend(method.removeprefix(TOPK))


def on_backend(method: str, backend: str, device: str = "cpu") -> str:
    """The method with its backend in the name: "auto" is the best one on a CPU, and plain PyTorch on a GPU.

    >>> on_backend("topk", "chunked"), on_backend("topk", "auto", "cuda"), on_backend("sdpa", "auto")
    ('topk-chunked', 'topk-chunked', 'sdpa')
    """
    if method != "topk":
        return method
    return topk_method("chunked" if backend == "auto" and device != "cpu" else backend)
