"""The keys and values of one layer in a file that is mapped into memory.

A file is a page with a header, then one row per token: [M, B, G, D + E], so that it grows at its end and nothing moves.
The key and the value of a head lie side by side, so that a token that is chosen costs one page (of 4 KiB, while its
D + E numbers are not more), not two. The header never changes; how many rows count, `folder.py` writes elsewhere.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEADER_BYTES = 4096
# Rows that have one checksum.
CHECKED_ROWS = 4096
_MAGIC = b"topk_attention/stored-rows/1\n"
_KIND = b"topk_attention/stored-rows/"
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE_BYTES = 1 << 24
# A file grows by a quarter of itself, within these limits: few calls, and little space that is never used.
_LEAST_GROWTH_BYTES = 1 << 20
_MOST_GROWTH_BYTES = 1 << 28


@dataclass(frozen=True)
class RowFormat:
    """What the rows of a layer hold. B batch, G key heads, D key size, E value size."""

    batch: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: str

    @staticmethod
    def of(key: Tensor, value: Tensor) -> RowFormat:
        """The format of rows of key [B, G, N, D] and value [B, G, N, E].

        Raises:
            ValueError: they do not fit one another, or cannot be stored.
        """
        for name, tensor in (("key", key), ("value", value)):
            if tensor.dim() != 4:
                raise ValueError(f"{name} must have shape [B, G, N, D] to be stored, got {list(tensor.shape)}")
            if tensor.device.type != "cpu":
                raise ValueError(
                    f"{name} must be on the CPU to be stored, got {tensor.device}; run the model there, or use a cache "
                    "without storage"
                )
            if tensor.dtype not in _NAMES:
                raise ValueError(f"{name} must be {', '.join(_NAMES.values())} to be stored, got {tensor.dtype}")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name} must need no gradient to be stored, got one that does; run the model under "
                    "torch.no_grad(), or use a cache without storage"
                )
        if key.shape[:3] != value.shape[:3] or key.dtype != value.dtype:
            raise ValueError(
                f"value must have shape {[*key.shape[:3], 'E']} and dtype {key.dtype} to match key, got "
                f"{list(value.shape)} and {value.dtype}"
            )
        if not key.shape[0] * key.shape[1] * (key.shape[3] + value.shape[3]):
            raise ValueError(f"key must hold numbers to be stored, got shape {list(key.shape)}")
        return RowFormat(key.shape[0], key.shape[1], key.shape[3], value.shape[3], _NAMES[key.dtype])

    @staticmethod
    def from_json(content: dict[str, Any]) -> RowFormat:
        """What `asdict` gave.

        Raises:
            ValueError: it is something else.
        """
        sizes = {name: content.get(name) for name in ("batch", "heads", "head_dim", "value_dim")}
        if content.get("dtype") not in _DTYPES or not all(type(size) is int and size >= 0 for size in sizes.values()):
            raise ValueError(f"rows must have four sizes and a dtype, got {content!r:.100}")
        return RowFormat(**sizes, dtype=content["dtype"])  # type: ignore[arg-type]

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return self.batch * self.heads * (self.head_dim + self.value_dim) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        key, value = ([self.batch, self.heads, "N", size] for size in (self.head_dim, self.value_dim))
        return f"keys {key} and values {value} in {self.dtype}".replace("'", "")


class StoredRows:
    """The rows of one layer: an open file and its map.

    length    rows that hold a token
    capacity  rows for which the disk has space
    """

    def __init__(self, path: Path, file: int, form: RowFormat, length: int) -> None:
        self.path, self.form, self.length = path, form, length
        self._file = file
        self._most = length  # the most rows that were ever handed out: the file is never cut below them
        self._random = False
        self._map()

    @staticmethod
    def create(path: Path, form: RowFormat, owner: str, layer: int) -> StoredRows:
        """Make the file of a layer anew.

        owner  the cache that it belongs to; another one refuses the file

        Raises:
            OSError: the file cannot be written; it is gone again.
        """
        about = json.dumps({"owner": owner, "layer": layer, **asdict(form)}).encode()
        content = _MAGIC + struct.pack("<II", len(about), zlib.crc32(about)) + about
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_at(file, content.ljust(HEADER_BYTES, b"\0"), 0)
            return StoredRows(path, file, form, 0)
        except BaseException:
            os.close(file)
            path.unlink()
            raise

    @staticmethod
    def open(path: Path, form: RowFormat, owner: str, layer: int, length: int) -> StoredRows:
        """Open the file of a layer that holds at least so many rows.

        Raises:
            FileNotFoundError: it is gone.
            ValueError: it is another file, or was cut short.
        """
        try:
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} must hold layer {layer} of the cache, but is gone; put the file back, or give an empty folder"
            ) from error
        try:
            _check_header(path, os.pread(file, HEADER_BYTES, 0), {"owner": owner, "layer": layer, **asdict(form)})
            needed, size = HEADER_BYTES + length * form.row_bytes, os.fstat(file).st_size
            if size < needed:
                raise ValueError(
                    f"{path} must have {needed:,} bytes for {length:,} tokens, got {size:,}: it was cut short; put the "
                    "whole file back, or give an empty folder"
                )
            return StoredRows(path, file, form, length)
        except BaseException:
            os.close(file)
            raise

    @property
    def key(self) -> Tensor:
        """[B, G, length, D], the file's own memory: it is never to be written in place."""
        return self._key[:, :, : self.length]

    @property
    def value(self) -> Tensor:
        """[B, G, length, E], likewise."""
        return self._value[:, :, : self.length]

    def reserve(self, length: int) -> None:
        """Take space for so many rows from the disk, or leave everything as it is.

        Raises:
            OSError: the disk has no space, or the file may not be so long.
        """
        if length <= self.capacity:
            return
        row_bytes, size = self.form.row_bytes, self.capacity * self.form.row_bytes
        growth = min(max(size // 4, _LEAST_GROWTH_BYTES), _MOST_GROWTH_BYTES)
        generous = max(length, (size + growth) // row_bytes)
        try:
            _allocate(self._file, HEADER_BYTES + size, HEADER_BYTES + generous * row_bytes)
        except OSError:
            if generous == length:
                raise
            _allocate(self._file, HEADER_BYTES + size, HEADER_BYTES + length * row_bytes)
        self._map()

    def append(self, key: Tensor, value: Tensor) -> None:
        """Write rows behind the last one, then count them: key [B, G, N, D], value [B, G, N, E].

        Raises:
            OSError: they cannot be written; none of them counts.
        """
        num_rows, row_bytes = key.shape[2], self.form.row_bytes
        self.reserve(self.length + num_rows)
        for start in range(0, num_rows, step := max(1, _PIECE_BYTES // row_bytes)):
            part = slice(start, start + step)
            rows = torch.cat([key.detach()[:, :, part], value.detach()[:, :, part]], dim=-1)
            rows = rows.permute(2, 0, 1, 3).contiguous()  # [N, B, G, D + E]
            content = rows.view(-1).view(torch.uint8).numpy().data
            write_at(self._file, content, HEADER_BYTES + (self.length + start) * row_bytes)
        self.length += num_rows
        self._most = max(self._most, self.length)

    def crop(self, length: int) -> None:
        """Keep the first rows only. The file keeps its size."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be 0 to {self.length}, the rows of {self.path}, got {length}")
        self.length = length

    def expect_random_reads(self, random: bool) -> None:
        """Say how rows are read next: here and there, or, as at the start, from first to last.

        The system reads ahead, on some disks megabytes: of rows here and there that would be nearly all for nothing.
        Without it, a pass over all rows would wait for every single page.
        """
        if random != self._random:
            self._random = random
            self._advise()

    def checksums(self, length: int, known: list[int], unchanged: int) -> list[int]:
        """One checksum for every `CHECKED_ROWS` of the first rows; the last may be over fewer.

        known      those of before
        unchanged  how many rows have not changed since, so that they need not be read
        """
        kept = known[: unchanged // CHECKED_ROWS]
        return kept + [checksum for _, checksum in self._each_checksum(length, len(kept))]

    def checked(self, length: int, checksums: list[int]) -> Iterator[int]:
        """Read the first rows, and yield how many have been read and are as they were written.

        Raises:
            ValueError: they are not.
        """
        expected = -(-length // CHECKED_ROWS)
        if len(checksums) != expected:
            raise ValueError(f"{self.path} must have {expected} checksums for {length} rows, got {len(checksums)}")
        for (stop, checksum), written in zip(self._each_checksum(length, 0), checksums, strict=True):
            if checksum != written:
                raise ValueError(
                    f"{self.path} must hold what was written for tokens {(stop - 1) // CHECKED_ROWS * CHECKED_ROWS} to "
                    f"{stop - 1} (checksum {written}), got other numbers (checksum {checksum}); put the whole file "
                    "back, or give an empty folder"
                )
            yield stop

    def _each_checksum(self, length: int, first: int) -> Iterator[tuple[int, int]]:
        row_bytes = self.form.row_bytes
        for start in range(first * CHECKED_ROWS, length, CHECKED_ROWS):
            stop = min(start + CHECKED_ROWS, length)
            checksum = 0
            for piece in read_at(self._file, HEADER_BYTES + start * row_bytes, HEADER_BYTES + stop * row_bytes):
                checksum = zlib.crc32(piece, checksum)
            yield stop, checksum

    def drop_pages(self) -> None:
        """Have the system give back the memory in which it keeps pages of the file; on Linux only.

        What is read next comes from the disk.
        """
        self.flush()
        if hasattr(os, "posix_fadvise"):
            self._pages.madvise(mmap.MADV_DONTNEED)  # pages that a process has mapped are not given back
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Have the disk hold what was written.

        Raises:
            OSError: it does not.
        """
        flush_to_disk(self._file)

    def close(self, *, give_back: bool = True) -> None:
        """Close the file, and give back the space behind the last row. Tensors that were handed out stay readable."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            if give_back:
                os.ftruncate(file, HEADER_BYTES + self._most * self.form.row_bytes)
        finally:
            os.close(file)

    def _map(self) -> None:
        """Map the file as it is now. Maps of before live as long as a tensor in them."""
        form = self.form
        self.capacity = (os.fstat(self._file).st_size - HEADER_BYTES) // form.row_bytes
        num_bytes = HEADER_BYTES + self.capacity * form.row_bytes
        self._pages = mmap.mmap(self._file, num_bytes)
        self._advise()
        width = form.head_dim + form.value_dim
        if self.capacity:
            count = self.capacity * form.batch * form.heads * width
            flat = torch.frombuffer(self._pages, dtype=form.torch_dtype, count=count, offset=HEADER_BYTES)
        else:
            flat = torch.empty(0, dtype=form.torch_dtype)
        rows = flat.view(self.capacity, form.batch, form.heads, width).permute(1, 2, 0, 3)  # [B, G, M, D + E]
        self._key, self._value = rows[..., : form.head_dim], rows[..., form.head_dim :]

    def _advise(self) -> None:
        if hasattr(mmap, "MADV_RANDOM"):
            self._pages.madvise(mmap.MADV_RANDOM if self._random else mmap.MADV_NORMAL)


def _check_header(path: Path, header: bytes, expected: dict[str, Any]) -> None:
    if header.startswith(_KIND) and not header.startswith(_MAGIC):
        came = header[len(_KIND) :].split(b"\n")[0][:10].decode(errors="replace")
        raise ValueError(f"{path} must have version 1 of stored rows, got {came}; use the version that wrote it")
    if not header.startswith(_MAGIC) or len(header) < HEADER_BYTES:
        raise ValueError(f"{path} must be a file of stored rows, got another file; give an empty folder")
    num_bytes, checksum = struct.unpack_from("<II", header, len(_MAGIC))
    start = len(_MAGIC) + 8
    about = header[start : start + num_bytes]
    if zlib.crc32(about) != checksum:
        raise ValueError(f"{path} must have a whole header, got a torn one; put the file back, or give an empty folder")
    came = json.loads(about)
    for name, needed in expected.items():
        if came.get(name) != needed:
            raise ValueError(
                f"{path} must be of {name} {needed}, as its folder says, got {came.get(name)}: it comes from another "
                "cache; put the right file back, or give an empty folder"
            )


def _allocate(file: int, old_size: int, size: int) -> None:
    """Lengthen a file by space that the disk really has, or leave it as it is."""
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                return os.posix_fallocate(file, old_size, size - old_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise
        # macOS, and file systems that reserve nothing: no promise, but a disk that is full already is noticed here.
        # Each write may still say so.
        disk = os.fstatvfs(file)
        if size - old_size > disk.f_bavail * disk.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(file, size)
    except OSError:
        os.ftruncate(file, old_size)
        raise


def write_at(file: int, content: bytes | memoryview, offset: int) -> None:
    """Write all of it at that place.

    A write that fails raises. Through the map the process would be killed.
    """
    left = memoryview(content).cast("B")
    while left:
        written = os.pwrite(file, left[:_PIECE_BYTES], offset)
        left, offset = left[written:], offset + written


def read_at(file: int, start: int, stop: int) -> Iterator[bytes]:
    """What stands there, in pieces."""
    while start < stop:
        piece = os.pread(file, min(_PIECE_BYTES, stop - start), start)
        if not piece:
            raise OSError(f"a file ends at byte {start}, where {stop} were needed")
        yield piece
        start += len(piece)


def flush_to_disk(file: int) -> None:
    """Have the disk, not only the system, hold what was written."""
    try:
        import fcntl
    except ImportError:
        os.fsync(file)
        return
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves the data in the drive's own memory
        fcntl.fcntl(file, fcntl.F_FULLFSYNC)
    else:
        os.fsync(file)
