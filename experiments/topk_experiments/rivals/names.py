"""Names of methods: topk-BACKEND for this library's backends, beside the rivals of a benchmark."""

from __future__ import annotations

from topk_attention.backends import choose_backend

TOPK = "topk-"


def topk_method(backend: str) -> str:
    """The method that is top-k on this backend.

    >>> topk_method("chunked")
    'topk-chunked'
    """
    return TOPK + choose_backend(backend).name


def kept(method: str, k: int) -> int | None:
    """k for top-k, None for methods that use every key or neuron."""
    return k if method.startswith(TOPK) else None


def check_method(method: str, rivals: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: there is no such method.
        RuntimeError: its backend cannot run here.
    """
    if method in rivals:
        return
    if not method.startswith(TOPK):
        raise ValueError(f"methods must be topk-BACKEND or among {', '.join(rivals)}, got {method!r}")
    choose_backend(method.removeprefix(TOPK))
