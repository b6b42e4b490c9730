"""Grey CIFAR-10 (Krizhevsky 2009), pixel by pixel."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runs.files import damage_named, folder_with
from .examples import Examples, ExamplesWriter
from .preparation import Progress, Splits, hold_out

_SIDE = 32
_PIXELS = _SIDE * _SIDE
# Weights of red, green and blue in the brightness (ITU-R BT.601).
_BRIGHTNESS = np.array([0.2989, 0.5870, 0.1140])
_BINARY_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_ARRAYS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}


@dataclass(frozen=True)
class GreyImages:
    """Which of ten things is in a 32 x 32 image? The model reads the grey pixels row by row.

    source          folder of the binary version of CIFAR-10 (data_batch_1.bin to data_batch_5.bin and test_batch.bin),
                    or the folder above; or an .npz file with x_train, y_train, x_test and y_test, the images uint8
                    [N, 32, 32] or, with colours, [N, 32, 32, 3]; colours are converted to grey
    num_validation  training images held out for validation
    """

    source: str
    num_validation: int = 5_000
    seed: int = 0

    name = "image"
    num_classes = 10
    vocabulary = 256
    parts = 1
    max_length = _PIXELS

    def make(self, progress: Progress) -> Splits:
        """All three splits."""
        train, test = self._read("train"), self._read("test")
        rest, validation = hold_out(train, self.num_validation, self.seed)
        progress.tell(train.num_examples + test.num_examples, train.num_examples + test.num_examples)
        return {"train": rest, "validation": validation, "test": test}

    def _read(self, split: str) -> Examples:
        source = folder_with(Path(self.source).expanduser(), lambda folder: (folder / "data_batch_1.bin").is_file())
        if source.is_dir():
            images, labels = _from_binary_version(source, split)
        elif source.is_file() and source.suffix == ".npz":
            images, labels = _from_arrays(source, split)
        else:
            raise FileNotFoundError(
                f"source must be the folder of CIFAR-10's binary version or an .npz file, got {self.source}"
            )
        if len(labels) != len(images):
            raise ValueError(f"{source} must hold a label for each of {len(images)} images, got {len(labels)}")
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"{source} must hold labels, all of them 0 to 9, got {sorted(set(labels.tolist()))[:20]}")
        writer = ExamplesWriter()
        for image, label in zip(images, labels, strict=True):
            writer.add([image], int(label))
        return writer.examples()


def _from_binary_version(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for name in _BINARY_FILES[split]:
        path = folder / name
        if not path.is_file() and path.with_suffix("").is_file():
            raise ValueError(
                f"source holds {path.stem} of CIFAR-10's Python version, a pickle, which could run any code and is not "
                f"opened; take the binary version, which holds {name}: {folder}"
            )
        if not path.is_file():
            raise FileNotFoundError(f"source must hold {name} of CIFAR-10's binary version: {path}")
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        if content.size % (1 + 3 * _PIXELS):
            raise ValueError(f"{path} must hold records of {1 + 3 * _PIXELS} bytes, got {content.size} bytes")
        records = content.reshape(-1, 1 + 3 * _PIXELS)
        labels.append(records[:, 0])
        colours = records[:, 1:].reshape(-1, 3, _PIXELS)
        images.append(np.einsum("c,ncp->np", _BRIGHTNESS, colours).astype(np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def _from_arrays(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no .npz file, or a damaged one")
    with damage_named(path, "write it again with numpy.savez", "cannot be read"), np.load(path) as arrays:
        missing = [name for name in _ARRAYS[split] if name not in arrays]
        if missing:
            raise ValueError(f"it must hold {' and '.join(_ARRAYS[split])}, got {', '.join(arrays)}")
        images, labels = (np.asarray(arrays[name]) for name in _ARRAYS[split])
        if not images.ndim:
            raise ValueError(f"{_ARRAYS[split][0]} must be an array of images")
    if labels.ndim == 2 and labels.shape[1] == 1:  # as Keras stores them
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuf" or (labels % 1 != 0).any():
        raise ValueError(
            f"labels of {path} must be whole numbers [N] or [N, 1], got {labels.dtype} {list(labels.shape)}"
        )
    if images.dtype == np.uint8 and images.shape[1:] == (_SIDE, _SIDE, 3):
        images = (images @ _BRIGHTNESS).astype(np.uint8)
    if images.dtype != np.uint8 or images.shape[1:] != (_SIDE, _SIDE):
        raise ValueError(f"images of {path} must be uint8 [N, 32, 32], got {images.dtype} {list(images.shape)}")
    return images, labels
