"""Which models there are: every type of the installed transformers, with the classes that stand for it.

transformers is imported when a function needs it: a command line that only shows its help does not wait for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Family -> endings of the names of transformers' tables of classes, "MODEL_FOR_..._MAPPING_NAMES". A type belongs to
# the first family that one of its tables is of.
FAMILIES: Mapping[str, Sequence[str]] = {
    "Images or video with text": (
        "IMAGE_TEXT_TO_TEXT",
        "MULTIMODAL_LM",
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "ZERO_SHOT_OBJECT_DETECTION",
        "VISUAL_QUESTION_ANSWERING",
        "DOCUMENT_QUESTION_ANSWERING",
        "RETRIEVAL",
    ),
    "Speech and audio": (
        "SPEECH_SEQ_2_SEQ",
        "CTC",
        "AUDIO_CLASSIFICATION",
        "AUDIO_FRAME_CLASSIFICATION",
        "AUDIO_XVECTOR",
        "TEXT_TO_SPECTROGRAM",
        "TEXT_TO_WAVEFORM",
        "RNNT",
        "TDT",
    ),
    "Text, encoder and decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "Images and video": (
        "IMAGE_CLASSIFICATION",
        "OBJECT_DETECTION",
        "IMAGE_SEGMENTATION",
        "SEMANTIC_SEGMENTATION",
        "INSTANCE_SEGMENTATION",
        "UNIVERSAL_SEGMENTATION",
        "VIDEO_CLASSIFICATION",
        "DEPTH_ESTIMATION",
        "IMAGE",
        "MASKED_IMAGE_MODELING",
        "IMAGE_TO_IMAGE",
        "MASK_GENERATION",
        "KEYPOINT_DETECTION",
        "KEYPOINT_MATCHING",
        "BACKBONE",
        "CAUSAL_IMAGE_MODELING",
        "IMAGE_MATTING",
        "NORMAL_ESTIMATION",
        "POINTMAP_ESTIMATION",
        "POSE_ESTIMATION",
        "TEXT_RECOGNITION",
        "TABLE_RECOGNITION",
    ),
    "Text encoders": (
        "MASKED_LM",
        "TEXT_ENCODING",
        "MULTIPLE_CHOICE",
    ),
    "Text decoders": ("CAUSAL_LM",),
    "Time series": ("TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION"),
}
OTHERS = "Parts of models, and others"
# Of a type whose model has an input beside its decoder: the class that generates, the first that there is.
_GENERATING = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")


class Model(NamedTuple):
    """What is tried: a class of models of one type."""

    model_type: str
    model_class: str

    @property
    def family(self) -> str:
        return next(
            (name for name, tables in FAMILIES.items() if any(self.model_type in _of(t) for t in tables)), OTHERS
        )

    @property
    def is_decoder(self) -> bool:
        """Whether the class is the one for causal language modelling."""
        return self.model_class in _classes("CAUSAL_LM", self.model_type)

    def configuration(self) -> Any:
        """The class of its configuration."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.model_type]

    def load(self) -> Any:
        """The class itself.

        Raises:
            ImportError: it needs a package that is not there.
        """
        import transformers

        return getattr(transformers, self.model_class)

    def is_of_a_part(self) -> bool:
        """Whether the class takes the configuration of a part of its type, which is a type by itself. Loads it."""
        wanted = getattr(self.load(), "config_class", None)
        return wanted is not None and not issubclass(self.configuration(), wanted)


def model_types() -> list[str]:
    """Every type of model of the installed transformers."""
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING)


def models(types: Iterable[str] | None = None) -> list[Model]:
    """The models to try, of these types or of all.

    A type has one model that generates or, where none does, the plain one; besides, one for causal language modelling,
    where encoders have one too. Of a type that no table of transformers has a class for, the class is "".

    Raises:
        ValueError: there is no such type.
    """
    known = model_types()
    for name in types or ():
        if name not in known:
            raise ValueError(f"types must be model types of transformers, such as llama and gpt2, got {name!r}")
    return [Model(name, of) for name in (sorted(set(types)) if types else known) for of in _classes_to_try(name)]


def part(chosen: Sequence[Model], seed: int, of_each_family: int) -> list[Model]:
    """A few models of every family, by chance."""
    draw = random.Random(seed)
    families: dict[str, list[Model]] = {}
    for model in chosen:
        families.setdefault(model.family, []).append(model)
    return [
        model
        for _, of_family in sorted(families.items())
        for model in draw.sample(of_family, min(of_each_family, len(of_family)))
    ]


def _of(table: str) -> Mapping[str, Any]:
    """Type -> class or classes, by transformers' table with this ending; empty where this version has none."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, "MODEL_MAPPING_NAMES" if not table else f"MODEL_FOR_{table}_MAPPING_NAMES", {})


def _classes(table: str, model_type: str) -> tuple[str, ...]:
    found = _of(table).get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def _classes_to_try(model_type: str) -> list[str]:
    causal = _classes("CAUSAL_LM", model_type)[:1]
    generating = next((classes for table in _GENERATING if (classes := _classes(table, model_type))), ())[:1]
    is_encoder = any(
        model_type in _of(table) for table in ("MASKED_LM", "AUDIO_CLASSIFICATION", "IMAGE_CLASSIFICATION")
    )
    plain = _classes("", model_type)[:1] if not generating and (is_encoder or not causal) else ()
    if not (causal or generating or plain):
        plain = next((found for name in FAMILIES for t in FAMILIES[name] if (found := _classes(t, model_type))), ())[:1]
    return list(dict.fromkeys((*generating, *plain, *causal))) or [""]
