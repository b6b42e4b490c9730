"""`topk-attention generate`: load a model, convert it, and let it continue a prompt or talk."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..calibrate import Calibration
from ..convert import convert
from ..convert.cache import topk_cache
from ..files import read_utf8
from ..functional import Completion
from ..functional.checks import check_count
from ..functional.words import full_attention_note
from .models import load

DTYPES = ("float32", "bfloat16", "float16")
# The file of a model may ask `generate` for what one text that is written as it comes, over a given cache, cannot have.
_ONE_TEXT: Mapping[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "use_cache": True,
    "cache_implementation": None,
}
Say = Callable[[str], None]
K = int | Literal["all"] | Calibration | None


@dataclass(frozen=True)
class GenerationRequest:
    """What generates after which prompt.

    prompt, prompt_file  one of them; in a chat the first message, or none
    attention_k          a number, "all", or the file of a calibration; None: the model as it is
    completed            complete attention, where a calibration does not bring its own completion
    temperature          of sampling; None: greedy

    Raises:
        ValueError: no prompt or two, or options that do not fit together.
    """

    model: str
    prompt: str | None = None
    prompt_file: Path | None = None
    attention_k: str | None = None
    completed: bool = False
    gguf_file: str | None = None
    chat: bool = False
    max_new_tokens: int = 256
    dtype: str = "float32"
    temperature: float | None = None
    seed: int = 0
    threads: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0 and finite, got {self.temperature:g}; leave it out for greedy"
            )
        if self.completed and self.attention_k in (None, "all"):
            raise ValueError("completed needs an --attention-k: with every key kept there is nothing to complete")
        if self.backend != "auto" and self.attention_k is None:
            raise ValueError(
                f"backend {self.backend!r} needs an --attention-k: the model as it is has its own attention"
            )
        self.k()
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("give one of --prompt and --prompt-file, got both")
        if self.prompt is None and self.prompt_file is None and not self.chat:
            raise ValueError("prompt is missing: give --prompt, --prompt-file or --chat")

    def k(self) -> K:
        """What `convert` takes as attention_k.

        Raises:
            ValueError: it is no number, not "all", and no calibration.
            FileNotFoundError: there is no such file.
        """
        given = self.attention_k
        if given is None or given == "all":
            return given  # type: ignore[return-value]
        if re.fullmatch(r"[+-]?[0-9]+", given):
            check_count("attention-k", int(given))
            return int(given)
        if not Path(given).is_file():
            reason = "this is a folder" if given and Path(given).is_dir() else "no such file"
            raise ValueError(
                f'attention-k must be a number, "all" or the file of a calibration, got {given!r}: {reason}'
            )
        return Calibration.load(given)

    def first_message(self) -> str | None:
        """The prompt, from its file if it is one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not UTF-8, or empty.
        """
        text = self.prompt if self.prompt_file is None else read_utf8(self.prompt_file)
        if text is not None and not text.strip():
            raise ValueError("prompt must not be empty")
        return text


def run_generation(request: GenerationRequest, write: Say, note: Say, ask: Callable[[], str | None]) -> None:
    """Generate after the prompt, or talk until the user ends it.

    write  receives the text, piece by piece
    note   receives lines about it: tokens a second, memory
    ask    the next message of a chat; None ends it

    Raises:
        FileNotFoundError: there is no such prompt file, or no such calibration.
        ValueError: transformers loads no such model, k does not fit it, or the prompt is too long for it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    k, message = request.k(), request.first_message()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    options: dict[str, Any] = {} if request.gguf_file is None else {"gguf_file": request.gguf_file}
    tokenizer = load(AutoTokenizer, request.model, **options)
    if request.chat and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"chat needs a model with a chat template, {request.model} has none; give --prompt instead")
    if options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    # Unpacking draws a bar that no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()) if options else contextlib.nullcontext():
        model = load(AutoModelForCausalLM, request.model, dtype=getattr(torch, request.dtype), **options)
    model.eval().requires_grad_(False)
    for name, needed in _ONE_TEXT.items():
        setattr(model.generation_config, name, needed)
    if k is not None:
        brings_its_own = isinstance(k, Calibration) and k.completion
        completion = Completion() if request.completed and not brings_its_own else None
        convert(model, attention_k=k, completion=completion, backend=request.backend)
    cache = (DynamicCache if k is None else topk_cache())(config=model.config)
    speaker = _Speaker(model, tokenizer, cache, request, write, note)
    if not request.chat:
        assert message is not None
        speaker.say_if_full(k, speaker.continue_text(message))
        return
    while True:
        if message is None and (message := ask()) is None:
            return
        if message.strip():
            speaker.answer(message)
        message = None


class _Speaker:
    """A model, what it has read and written so far, and the cache of that."""

    def __init__(
        self, model: Any, tokenizer: Any, cache: Any, request: GenerationRequest, write: Say, note: Say
    ) -> None:
        self._model, self._tokenizer, self._cache = model, tokenizer, cache
        self._request, self._write, self._note = request, write, note
        self._cached: list[int] = []
        self._messages: list[Mapping[str, str]] = []

    def continue_text(self, text: str) -> int:
        """Continue a text as it is; returns the number of all its tokens."""
        self._generate(list(self._tokenizer(text, verbose=False)["input_ids"]))
        return len(self._cached) + 1

    def answer(self, message: str) -> None:
        """Answer a message of a conversation. What the cache holds of it already is not read again."""
        self._messages.append({"role": "user", "content": message})
        text = self._tokenizer.apply_chat_template(self._messages, tokenize=False, add_generation_prompt=True)
        answer = self._generate(list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
        self._messages.append({"role": "assistant", "content": answer})

    def say_if_full(self, k: K, num_tokens: int) -> None:
        """A note where no query had more keys than k."""
        ks = (
            [k]
            if isinstance(k, int)
            else [one for of in k.values() for one in of]
            if isinstance(k, Calibration)
            else []
        )
        if ks and (words := full_attention_note(ks, num_tokens)) is not None:
            self._note(f"attention-k: {words}")

    def _generate(self, ids: list[int]) -> str:
        """The text that the model writes after these tokens."""
        import torch

        self._check_length(len(ids))
        known = _num_equal(ids[:-1], self._cached)
        self._cache.crop(known - len(self._cached))
        request = self._request
        how: dict[str, Any] = {"do_sample": request.temperature is not None}
        if request.temperature is not None:
            how["temperature"] = request.temperature
        end = self._tokenizer.eos_token_id if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        streamer = _Streamer(self._tokenizer, self._write)
        with torch.no_grad():
            tokens = self._model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                past_key_values=self._cache,
                max_new_tokens=request.max_new_tokens,
                pad_token_id=end,
                streamer=streamer,
                tokenizer=self._tokenizer,  # for a model that stops at certain words
                **how,
            )[0].tolist()
        self._write("\n")
        self._cached = tokens[: self._cache.get_seq_length()]
        self._note(streamer.in_words(num_read=len(ids) - known, num_written=len(tokens) - len(ids)))
        return str(self._tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True))

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens == 0:
            raise ValueError("prompt must hold at least one token, got none")
        longest = getattr(self._model.config, "max_position_embeddings", None)
        wanted = num_tokens + self._request.max_new_tokens
        if longest is not None and wanted > longest:
            raise ValueError(
                f"prompt must have at most {longest - self._request.max_new_tokens:,} tokens, the longest input of "
                f"{self._request.model} less max-new-tokens, got {num_tokens:,}; shorten it, or lower --max-new-tokens"
            )


class _Streamer:
    """What `generate` hands its tokens to: writes their text as it comes, and looks at the clock."""

    def __init__(self, tokenizer: Any, write: Say) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._written = ""
        self._times: list[float] = []

    def put(self, value: Any) -> None:
        """The prompt first, then one token at a time."""
        self._times.append(time.perf_counter())
        if len(self._times) == 1:
            return
        self._tokens += value.flatten().tolist()
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        # A character of several tokens is not whole before its last.
        if not text.endswith("\ufffd"):
            self._flush(text)

    def end(self) -> None:
        """All is written."""
        self._flush(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _flush(self, text: str) -> None:
        self._write(text[len(self._written) :])
        self._written = text

    def in_words(self, *, num_read: int, num_written: int) -> str:
        """Tokens a second of the prompt, and of what was written after the first token; memory of the process."""
        start, first, last = self._times[0], self._times[1], self._times[-1]
        parts = [f"prompt {num_read:,} tokens in {first - start:.2f} s ({num_read / (first - start):,.0f} tokens/s)"]
        if num_written > 1:
            rate = (num_written - 1) / (last - first)
            parts.append(f"then {num_written - 1:,} tokens in {last - first:.2f} s ({rate:,.1f} tokens/s)")
        if (peak := _peak_mib()) is not None:
            parts.append(f"peak memory {peak:,.0f} MiB")
        return "; ".join(parts)


def _num_equal(tokens: list[int], others: list[int]) -> int:
    """With how many of the same tokens both begin."""
    pairs = zip(tokens, others, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(tokens), len(others)))


def _peak_mib() -> float | None:
    """The most memory that this process has held; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
