"""A folder with the keys and values of all layers of a cache, of which one process may write at a time.

`manifest.json` alone says how many tokens count. It is replaced in one step after the disk holds the rows that it
counts, and rows that it counts are never written again before another manifest counts fewer. So whenever the process
or the machine stops, the folder holds what the last manifest counts; what was written after it is lost.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakSet

import torch
from torch import Tensor

from .rows import RowFormat, StoredRows, flush_to_disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
LOCK = "lock"
_KIND = "topk_attention/stored-cache/"
_FORMAT = _KIND + "1"
_PARTIAL = f".{MANIFEST}.partial"
_LOCK_CONTENT = re.compile(rb"(\d+\n)?")  # the process that holds it, or held it last
# Called with (name of the current work, steps done, steps in all).
Progress = Callable[[str, int, int], None]
_open_caches: WeakSet[StoredCache] = WeakSet()


class StoredCache:
    """Keys and values of some layers of a model, in the files of a folder.

    folder          a new or empty folder, or one that holds a cache of this model: that cache is continued
    layers          indices of the model's layers whose keys and values it holds
    about           what the cache belongs to, in words and numbers: another model's is refused
    commit_tokens   after so many new tokens, and
    commit_seconds  after so much time, the next step first has the disk hold them; so does `commit`, and `close`

    The files take B * G * (D + E) numbers a token and layer, and space to grow by a quarter, at most 256 MiB a layer.
    Works on Linux and macOS. On macOS space on the disk is not reserved: a full disk shows only when rows are written.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: it is in use, or the system is neither Linux nor macOS.
        ValueError: it holds something else, or what it holds is not whole.
    """

    _lock = -1  # a file, while the cache is open

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: Iterable[int],
        about: dict[str, Any],
        commit_tokens: int = 256,
        commit_seconds: float = 30.0,
    ) -> None:
        if fcntl is None:
            raise RuntimeError(
                "storage needs Linux or macOS, whose files can be locked and mapped; leave storage out here"
            )
        self.folder, self.about = Path(folder), json.loads(json.dumps(about))  # as the manifest gives it
        self.commit_tokens, self.commit_seconds = commit_tokens, commit_seconds
        self._process = os.getpid()
        self._rows: dict[int, StoredRows] = {}
        self._lengths = dict.fromkeys(sorted(layers), 0)
        if not self._lengths:
            raise ValueError("layers must name a layer at least, got none")
        self._checksums: dict[int, list[int]] = {}
        self._committed = 0
        self._changed = False  # whether rows were written since then
        self._lock = _locked(self.folder)
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        self._committed_at = time.monotonic()
        _open_caches.add(self)

    @property
    def num_tokens(self) -> int:
        """How many tokens every layer holds."""
        return min(self._lengths.values())

    def length(self, layer: int) -> int:
        """How many tokens this layer holds: within a forward pass some are ahead of others."""
        return self._lengths[layer]

    @property
    def is_open(self) -> bool:
        return self._lock >= 0

    def tensors(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys [B, G, M, D] and values [B, G, M, E] of a layer, in the files' own memory, or None before the first.

        They are never to be written in place.
        """
        rows = self._rows.get(layer)
        return None if rows is None else (rows.key, rows.value)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store more tokens of a layer: key [B, G, N, D], value [B, G, N, E]. Returns all of them, as `tensors`.

        If it fails, each layer holds the tokens of before this forward pass, which can be done again.

        Raises:
            OSError: they cannot be written.
            RuntimeError: the cache was closed, or the pass before was interrupted, or this is another process.
            ValueError: they do not fit those that are stored.
        """
        self._check_usable()
        length, rows, num_new = self.length(layer), self._rows.get(layer), key.shape[-2] if key.dim() > 1 else 0
        if length > self.num_tokens:
            raise RuntimeError(
                f"the last forward pass was interrupted: layer {layer} holds {length} tokens, others {self.num_tokens};"
                " call drop_unfinished_pass() of the cache's storage, then repeat the pass"
            )
        try:
            form = RowFormat.of(key, value)
            if rows is not None and form != rows.form:
                if any(self._lengths.values()):
                    raise ValueError(
                        f"the cache in {self.folder} holds {rows.form} of layer {layer}, got {form}; give an empty "
                        "folder for another batch, model or dtype"
                    )
                self._forget_rows()
                rows = None
            if length == max(self._lengths.values()):
                self._begin_pass(length + num_new)
            if length < self._committed:
                self.commit()
            if rows is None:
                path = self.folder / f"layer-{layer:04}.rows"
                rows = self._rows[layer] = StoredRows.create(path, form, self._id, layer)
            self._changed = True
            rows.append(key, value)
        except BaseException as error:
            self.drop_unfinished_pass()
            if isinstance(error, OSError):
                raise self._full(error, num_new) from error
            raise
        self._lengths[layer] = rows.length
        return rows.key, rows.value

    def _forget_rows(self) -> None:
        """Have no rows, as in a new folder, where no token is held: after a first pass that failed, or a reset."""
        self._write_manifest(0, {})
        self._committed, self._checksums, self._changed = 0, {}, False
        for rows in self._rows.values():
            rows.close()
            rows.path.unlink(missing_ok=True)  # tensors that were handed out are read from the old file
        self._rows = {}

    def _begin_pass(self, length: int) -> None:
        """What is done once for all layers, before any of them holds a token more."""
        tokens, seconds = self.num_tokens - self._committed, time.monotonic() - self._committed_at
        if tokens >= self.commit_tokens or (tokens > 0 and seconds >= self.commit_seconds):
            self.commit()
        for rows in self._rows.values():
            rows.reserve(length)

    def _full(self, error: OSError, num_new: int) -> OSError:
        needed = num_new * sum(rows.form.row_bytes for rows in self._rows.values())
        disk = os.statvfs(self.folder)
        message = (
            f"storage {self.folder} must take {num_new} more tokens (about {needed / 2**20:,.1f} MiB), but "
            f"{error.strerror or error} ({disk.f_bavail * disk.f_frsize / 2**20:,.0f} MiB are free); nothing is lost, "
            f"all layers hold {self.num_tokens} tokens: make room, then repeat the pass"
        )
        return OSError(error.errno, message)

    def drop_unfinished_pass(self) -> None:
        """Have all layers hold the same tokens again, after a forward pass that ended in the middle."""
        num_tokens = self.num_tokens
        for layer in self._lengths:
            self.crop(layer, num_tokens)

    def crop(self, layer: int, length: int) -> None:
        """Let a layer hold its first tokens only. The disk hears of it when they are overwritten, or at `commit`."""
        if layer in self._rows:
            self._rows[layer].crop(length)
        self._lengths[layer] = length

    def commit(self) -> None:
        """Have the disk hold the tokens that all layers hold, and count them.

        Raises:
            OSError: it cannot; then the tokens of the commit before count, and those here are as they were.
        """
        self._check_usable()
        num_tokens = self.num_tokens
        if not self._changed and num_tokens == self._committed:
            return
        unchanged = min(num_tokens, self._committed)
        checksums = {}
        # Without a token nothing is said of rows: others may follow.
        for layer, rows in self._rows.items() if num_tokens else ():
            rows.flush()
            checksums[layer] = rows.checksums(num_tokens, self._checksums.get(layer, []), unchanged)
        self._write_manifest(num_tokens, checksums)
        self._committed, self._checksums, self._committed_at = num_tokens, checksums, time.monotonic()
        self._changed = False

    def check(self, progress: Progress | None = None) -> Iterator[tuple[int, int]]:
        """Read all that the manifest counts, layer by layer. Yields (layer, tokens of it that are as written).

        Raises:
            ValueError: some are not.
        """
        total = self._committed * len(self._rows)
        for number, (layer, rows) in enumerate(sorted(self._rows.items())):
            for stop in rows.checked(self._committed, self._checksums.get(layer, [])):
                yield layer, stop
                if progress is not None:
                    progress("Reading the stored cache", number * self._committed + stop, total)

    def expect_random_reads(self, layer: int, random: bool) -> None:
        """Say how rows of a layer are read next: here and there, or, as at the start, from first to last."""
        if layer in self._rows:
            self._rows[layer].expect_random_reads(random)

    def drop_pages(self) -> None:
        """Have the system give back the memory in which it keeps pages of the files; on Linux only.

        It would do so by itself where memory gets scarce. What is read next comes from the disk.
        """
        self._check_usable()
        for rows in self._rows.values():
            rows.drop_pages()

    def close(self) -> None:
        """Commit, give back the space that is not used, and let others write. Tensors stay readable."""
        if not self.is_open:
            return
        try:
            if os.getpid() == self._process:
                self.commit()
        finally:
            self._release()

    def __enter__(self) -> StoredCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"the cache in {self.folder} cannot be copied or pickled, as its files are its own; use a cache without "
            "storage"
        )

    def _release(self) -> None:
        lock, self._lock = self._lock, -1
        _open_caches.discard(self)
        try:
            for rows in self._rows.values():
                # A process that was forked off shares the files with the one that owns them.
                rows.close(give_back=os.getpid() == self._process)
        finally:
            os.close(lock)

    def _check_usable(self) -> None:
        if not self.is_open:
            raise RuntimeError(f"the cache in {self.folder} was closed; open the folder anew to continue it")
        if os.getpid() != self._process:
            raise RuntimeError(
                f"the cache in {self.folder} belongs to process {self._process}, got a call from {os.getpid()}; use "
                "it in the process that opened it"
            )

    def _open(self) -> None:
        path = self.folder / MANIFEST
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            self._id = uuid4().hex
            self._write_manifest(0, {})
            return
        known = _manifest(path, content)
        self._id, self._committed = known["id"], known["num_tokens"]
        if known["byte_order"] != _byte_order():
            raise ValueError(
                f"{path} must be of a machine whose byte order is {_byte_order()}, got {known['byte_order']}; give an "
                "empty folder"
            )
        for name, needed in {"layers": list(self._lengths), **self.about}.items():
            came = known["layers"] if name == "layers" else known["about"].get(name)
            if came != needed:
                raise ValueError(
                    f"storage {self.folder} must hold a cache with {name} {needed}, got one with {came}: it is of "
                    "another model; give an empty or a new folder"
                )
        for layer, row in known["rows"].items():
            form = RowFormat.from_json(row)
            path = self.folder / f"layer-{int(layer):04}.rows"
            self._rows[int(layer)] = StoredRows.open(path, form, self._id, int(layer), self._committed)
            self._checksums[int(layer)] = row["checksums"]
        if self._committed and len(self._rows) < len(self._lengths):
            raise ValueError(f"{path} must have rows of {len(self._lengths)} layers, got {len(self._rows)}")
        self._lengths = dict.fromkeys(self._lengths, self._committed)

    def _write_manifest(self, num_tokens: int, checksums: dict[int, list[int]]) -> None:
        content = {
            "id": self._id,
            "byte_order": _byte_order(),
            "about": self.about,
            "layers": list(self._lengths),
            "num_tokens": num_tokens,
            "rows": {
                str(layer): {**asdict(self._rows[layer].form), "checksums": checksums[layer]} for layer in checksums
            },
        }
        body = json.dumps(content)
        written = json.dumps({"format": _FORMAT, "checksum": zlib.crc32(body.encode()), "content": body})
        partial = self.folder / _PARTIAL
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(written)
                file.flush()
                flush_to_disk(file.fileno())
            partial.replace(self.folder / MANIFEST)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _manifest(path: Path, content: bytes) -> dict[str, Any]:
    """What a manifest says.

    Raises:
        ValueError: it is none, or not whole, or of another version.
    """
    way_out = "give an empty or a new folder, or put the whole file back"
    try:
        outer = json.loads(content)
        form = outer["format"]
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be the manifest of a stored cache, got another or a torn file; {way_out}"
        ) from error
    if form != _FORMAT:
        if isinstance(form, str) and form.startswith(_KIND):
            raise ValueError(
                f"{path} must have version 1, got {form.removeprefix(_KIND)[:10]}; use the version that wrote it, or "
                "give an empty folder"
            )
        raise ValueError(f"{path} must be the manifest of a stored cache, got format {form!r:.60}; {way_out}")
    body = outer.get("content")
    if not isinstance(body, str) or zlib.crc32(body.encode()) != outer.get("checksum"):
        raise ValueError(f"{path} must be as it was written, got other content than its checksum says; {way_out}")
    inner: dict[str, Any] = json.loads(body)
    return inner


def _check_not_foreign(folder: Path) -> None:
    """Raise where a folder without a manifest holds files that no cache has made; one may be named as the lock is."""
    if (folder / MANIFEST).exists():
        return
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK, _PARTIAL))
    lock = folder / LOCK
    if lock.exists() and not (lock.is_file() and _LOCK_CONTENT.fullmatch(lock.read_bytes()[:30])):
        others.append(LOCK)
    if others:
        raise ValueError(
            f"storage {folder} must be empty or hold a cache, got other files ({', '.join(others[:3])}); give an empty "
            "or a new folder"
        )


def _locked(folder: Path) -> int:
    """The open lock of a folder, which is made if it is not there.

    Raises:
        OSError: the folder cannot be written.
        RuntimeError: another cache holds the lock.
        ValueError: the folder holds other files; nothing is written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_not_foreign(folder)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        message = f"storage must be a folder that can be written, got {folder} ({error.strerror}); give another one"
        raise OSError(error.errno, message) from error
    try:
        # A lock of the open file, so that two caches in one process keep each other out too.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
        os.close(lock)
        raise RuntimeError(
            f"storage {folder} must be free, but process {holder or '?'} has it open; close that cache, or give "
            "another folder"
        ) from error
    except OSError as error:
        os.close(lock)
        raise OSError(
            error.errno, f"storage {folder} must be on a file system with locks ({error.strerror}); give another folder"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _byte_order() -> str:
    return "little" if torch.tensor([1], dtype=torch.int16).view(torch.uint8)[0] == 1 else "big"


@atexit.register
def _close_all() -> None:
    with ExitStack() as closing:  # one that cannot commit must not keep the others from it
        for cache in list(_open_caches):
            closing.callback(cache.close)
