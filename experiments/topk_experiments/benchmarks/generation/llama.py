"""llama.cpp through llama-cpp-python: flash attention, and keys and values in a type of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Tokens that it reads at a time, its own default.
_BATCH = 512
# Bytes of the longest token that is expected.
_LONGEST_TOKEN = 1024


class LlamaModel:
    """A GGUF file, ready to read tokens.

    path        of the file
    length      of all tokens that will be held
    cache_type  "f16" or "q8_0"
    """

    def __init__(self, path: Path, length: int, cache_type: str, threads: int) -> None:
        import llama_cpp

        kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[cache_type]
        self._llama: Any = llama_cpp.Llama(
            model_path=str(path),
            n_ctx=length,
            n_batch=_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )

    @property
    def version(self) -> str:
        import llama_cpp

        return str(llama_cpp.__version__)

    def forget(self) -> None:
        """Begin anew with an empty cache."""
        self._llama.reset()
        self._llama._ctx.kv_cache_clear()

    def read(self, token_ids: Sequence[int]) -> int:
        """Read further tokens; returns the token that is most likely after the last of them."""
        import numpy as np

        self._llama.eval(list(token_ids))
        logits = self._llama._ctx.get_logits_ith(-1)
        return int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, as this model understands them."""
        import llama_cpp

        # The package's own detokenize leaves out long tokens:
        # findings/llama_cpp_python_detokenize_drops_long_tokens.sh
        buffer = ctypes.create_string_buffer(_LONGEST_TOKEN)
        pieces = []
        for token in token_ids:
            size = llama_cpp.llama_token_to_piece(self._llama._model.vocab, token, buffer, _LONGEST_TOKEN, 0, False)
            if size < 0:
                raise ValueError(f"token {token} has {-size} bytes, more than {_LONGEST_TOKEN}")
            pieces.append(buffer.raw[:size])
        return b"".join(pieces).decode("utf-8", "replace")
