"""A folder of keys and values: what is read is what was written, whatever happens in between."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topk_attention import topk_attention
from topk_attention.storage import StoredCache, folder, rows

ABOUT = {"model": "tiny"}


def opened(path, layers=(0, 1), about=ABOUT, **settings):
    return StoredCache(path, layers=layers, about=about, **settings)


def states(seed, num_tokens, batch=2, heads=3, head_dim=5, value_dim=7, dtype=torch.float32):
    """Keys and values of these tokens, unlike those of another seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ([batch, heads, num_tokens, size] for size in (head_dim, value_dim))
    key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return key, value


def write(cache, seed, num_tokens, **shape):
    """One forward pass; layer l has the states of seed + l."""
    for layer in range(2):
        cache.append(layer, *states(seed + layer, num_tokens, **shape))


def assert_holds(cache, *passes, **shape):
    """The cache holds the states of these passes of (seed, number of tokens), and no others."""
    for layer in range(2):
        expected = [states(seed + layer, num_tokens, **shape) for seed, num_tokens in passes]
        for came, parts in zip(cache.tensors(layer), zip(*expected, strict=True), strict=True):
            assert torch.equal(came, torch.cat(parts, dim=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "head_dim", "value_dim"), [(1, 8, 8), (2, 5, 7), (3, 1, 64)])
def test_a_cache_that_is_opened_again_holds_what_was_written(tmp_path, dtype, batch, head_dim, value_dim):
    shape = {"dtype": dtype, "batch": batch, "head_dim": head_dim, "value_dim": value_dim}
    with opened(tmp_path) as cache:
        write(cache, 10, 33, **shape)
        write(cache, 20, 1, **shape)
        assert_holds(cache, (10, 33), (20, 1), **shape)
    with opened(tmp_path) as cache:
        assert cache.num_tokens == 34
        assert [stop for _, stop in cache.check()] == [34, 34]
        assert_holds(cache, (10, 33), (20, 1), **shape)
        write(cache, 30, 2, **shape)
        assert_holds(cache, (10, 33), (20, 1), (30, 2), **shape)


def test_appending_returns_the_files_own_memory_and_growing_moves_no_row(tmp_path):
    with opened(tmp_path) as cache:
        write(cache, 10, 3)
        before = cache.tensors(0)[0]
        capacity = cache._rows[0].capacity
        write(cache, 20, 5)
        assert cache.tensors(0)[0].data_ptr() == before.data_ptr()  # nothing is joined, nothing copied
        key, value = cache.append(0, *states(30, capacity))
        assert cache._rows[0].capacity > capacity
        assert key.stride() == value.stride() == (3 * 12, 12, 2 * 3 * 12, 1)
        assert torch.equal(before, states(10, 3)[0])  # what was handed out stays readable


def test_rows_of_several_pieces_and_blocks_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(rows, "CHECKED_ROWS", 16)
    monkeypatch.setattr(rows, "_LEAST_GROWTH_BYTES", 100)
    with opened(tmp_path) as cache:
        write(cache, 10, 15)
        cache.commit()
        write(cache, 20, 1)
        cache.commit()
        write(cache, 30, 70)
    with opened(tmp_path) as cache:
        progress = []
        assert [stop for _, stop in cache.check(lambda *step: progress.append(step))] == 2 * [16, 32, 48, 64, 80, 86]
        assert progress[-1] == ("Reading the stored cache", 172, 172)
        assert_holds(cache, (10, 15), (20, 1), (30, 70))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "append", "crop", "commit", "reopen", "crash"]), st.integers(1, 40)),
        max_size=25,
    )
)
def test_any_sequence_of_appends_crops_and_crashes_gives_what_tensors_in_memory_give(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("cache")
    whole = [torch.empty(2, 3, 0, 5), torch.empty(2, 3, 0, 7)]
    committed = whole
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(rows, "CHECKED_ROWS", 8)
    monkeypatch.setattr(rows, "_LEAST_GROWTH_BYTES", 256)
    cache = opened(path, layers=[0], commit_tokens=10**9, commit_seconds=10**9)
    try:
        for number, (step, size) in enumerate(steps):
            num_tokens = whole[0].shape[2]
            if step == "append":
                if num_tokens < committed[0].shape[2]:
                    committed = whole  # committed before rows that count are overwritten
                new = states(number, size)
                cache.append(0, *new)
                whole = [torch.cat(pair, dim=2) for pair in zip(whole, new, strict=True)]
            elif step == "crop":
                whole = [x[:, :, : max(0, num_tokens - size)] for x in whole]
                cache.crop(0, whole[0].shape[2])
            elif step == "commit":
                cache.commit()
                committed = whole
            else:
                if step == "crash":  # as for a process that is killed: nothing is committed, no space given back
                    cache._process = -1
                    whole = committed
                cache.close()
                committed = whole
                cache = opened(path, layers=[0], commit_tokens=10**9, commit_seconds=10**9)
                assert [stop for _, stop in cache.check()][-1:] == [whole[0].shape[2]][: whole[0].shape[2]]
            came = cache.tensors(0) or [torch.empty(2, 3, 0, 5), torch.empty(2, 3, 0, 7)]
            assert all(torch.equal(*pair) for pair in zip(came, whole, strict=True))
    finally:
        cache.close()
        monkeypatch.undo()


WRITER = """
    import sys
    sys.path[:0] = {paths}
    from test_stored_cache import opened, states
    cache = opened(sys.argv[1], commit_tokens=3)
    start = cache.num_tokens
    for token in range(start, 10**6):
        for layer in range(2):
            cache.append(layer, *states(1000 * layer + token, 1))
            print(token, layer, flush=True)
        if token % 7 == 6:  # a draft of two tokens that is not taken
            for layer in range(2):
                cache.append(layer, *states(-1, 2))
            for layer in range(2):
                cache.crop(layer, token + 1)
"""


def test_a_killed_process_loses_at_most_the_tokens_since_the_last_commit(tmp_path):
    code = textwrap.dedent(WRITER).format(paths=[str(Path(__file__).parent), *sys.path])
    num_tokens = 0
    for lines in (19, 41):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
            printed = [writer.stdout.readline() for _ in range(lines)]
            writer.send_signal(signal.SIGKILL)
            printed += writer.stdout.readlines()
        token = int(printed[-1].split()[0])
        before, cache = num_tokens, opened(tmp_path)
        num_tokens = cache.num_tokens
        assert before <= token - 3 <= num_tokens <= token + 2
        list(cache.check())
        for layer in range(2):
            for came, parts in zip(
                cache.tensors(layer),
                zip(*(states(1000 * layer + token, 1) for token in range(num_tokens)), strict=True),
                strict=True,
            ):
                assert torch.equal(came, torch.cat(parts, dim=2))
        cache.close()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_pass_that_ends_in_the_middle_is_dropped_and_can_be_repeated(tmp_path, layer):
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        cache.append(0, *states(20, 1))
        if layer:
            with pytest.raises(RuntimeError, match="layer 0 holds 5 tokens, others 4; call drop_unfinished_pass"):
                cache.append(0, *states(30, 1))
        cache.drop_unfinished_pass()
        write(cache, 40, 2)
        assert_holds(cache, (10, 4), (40, 2))


def test_a_layer_that_is_refused_in_the_middle_of_a_pass_drops_the_pass(tmp_path):
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        cache.append(0, *states(20, 1))
        with pytest.raises(ValueError, match=r"holds keys .* of layer 1, got keys"):
            cache.append(1, *states(20, 1, heads=1))
        write(cache, 30, 1)
        assert_holds(cache, (10, 4), (30, 1))


@pytest.mark.parametrize("way", ["the first pass failed", "all was cropped", "all was cropped and committed"])
def test_a_cache_without_tokens_takes_another_batch(tmp_path, way):
    with opened(tmp_path) as cache:
        handed_out = cache.append(0, *states(10, 4, batch=3))
        expected = [x.clone() for x in handed_out]
        if way == "the first pass failed":
            cache.drop_unfinished_pass()
        else:
            cache.append(1, *states(11, 4, batch=3))
            cache.commit()
            for layer in range(2):
                cache.crop(layer, 0)
            if way == "all was cropped and committed":
                cache.commit()
        write(cache, 20, 9, batch=1)
        assert_holds(cache, (20, 9), batch=1)
        assert all(map(torch.equal, handed_out, expected))
        with pytest.raises(ValueError, match=r"holds keys \[1, 3, N, 5\] .* of layer 0, got keys \[3, 3, N, 5\]"):
            cache.append(0, *states(30, 1, batch=3))
    with opened(tmp_path) as cache:
        list(cache.check())
        assert_holds(cache, (20, 9), batch=1)


@pytest.mark.parametrize("committed", [False, True])
def test_a_process_that_is_killed_before_another_batch_is_committed_leaves_an_empty_cache(tmp_path, committed):
    cache = opened(tmp_path)
    write(cache, 10, 4, batch=3)
    if committed:
        cache.commit()
    for layer in range(2):
        cache.crop(layer, 0)
    write(cache, 20, 9, batch=1)
    cache._process = -1  # killed
    cache.close()
    with opened(tmp_path) as cache:
        assert cache.num_tokens == 0
        write(cache, 30, 2, batch=2)
        assert_holds(cache, (30, 2))
    with opened(tmp_path) as cache:
        list(cache.check())
        assert_holds(cache, (30, 2))


def test_tokens_that_count_are_never_overwritten_before_fewer_count(tmp_path):
    cache = opened(tmp_path)
    write(cache, 10, 20)
    cache.commit()
    for layer in range(2):
        cache.crop(layer, 12)
    cache.append(0, *states(50, 8))
    cache._process = -1  # killed
    cache.close()
    with opened(tmp_path) as cache:
        list(cache.check())
        assert cache.num_tokens == 12


# Disks and folders


def full_from(monkeypatch, num_calls):
    """A disk on which so many more reservations succeed."""
    left, allocate = [num_calls], os.posix_fallocate

    def posix_fallocate(file, offset, size):
        left[0] -= 1
        if left[0] < 0:
            os.ftruncate(file, offset + size // 2)  # some file systems lengthen the file before they fail
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space on the disk")
@pytest.mark.parametrize("successes", [0, 1])
def test_a_full_disk_is_an_error_before_any_layer_holds_a_token_more(tmp_path, monkeypatch, successes):
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        more = cache._rows[0].capacity
        with monkeypatch.context() as full:
            full_from(full, successes)
            with pytest.raises(
                OSError, match=rf"must take {more} more tokens .*No space left.* hold 4 tokens: make room"
            ):
                write(cache, 20, more)
            assert cache.length(0) == cache.length(1) == cache.num_tokens == 4
            write(cache, 30, 2)  # what there is space for can still be written
        write(cache, 20, more)
        assert_holds(cache, (10, 4), (30, 2), (20, more))
    with opened(tmp_path) as cache:
        list(cache.check())
        assert_holds(cache, (10, 4), (30, 2), (20, more))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space on the disk")
def test_a_disk_that_is_full_in_the_first_pass_leaves_an_empty_cache(tmp_path, monkeypatch):
    with opened(tmp_path) as cache:
        with monkeypatch.context() as full:
            full_from(full, 1)
            with pytest.raises(OSError, match="nothing is lost, all layers hold 0 tokens"):
                write(cache, 10, 4)
        write(cache, 20, 6)
        assert_holds(cache, (20, 6))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space on the disk")
def test_where_space_to_grow_is_missing_space_for_the_tokens_is_enough(tmp_path):
    code = f"""
        import resource, sys
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]}
        from test_stored_cache import opened, write, assert_holds
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # growing takes 2^20 bytes
        with opened({str(tmp_path)!r}) as cache:
            write(cache, 10, 600)
            try:
                write(cache, 20, 600)
            except OSError as error:
                print(error)
            assert_holds(cache, (10, 600))
        with opened({str(tmp_path)!r}) as cache:
            assert_holds(cache, (10, 600))
    """
    came = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "File too large" in came.stdout
    assert "all layers hold 600 tokens" in came.stdout


def test_a_write_that_fails_leaves_the_tokens_of_before(tmp_path, monkeypatch):
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
            with pytest.raises(OSError, match=r"Input/output error.* all layers hold 4 tokens"):
                write(cache, 20, 3)
        write(cache, 30, 1)
        assert_holds(cache, (10, 4), (30, 1))


def test_a_manifest_that_cannot_be_written_leaves_the_one_of_before(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    write(cache, 10, 4)
    cache.commit()
    write(cache, 20, 1)
    with monkeypatch.context() as full:
        full.setattr(folder, "flush_to_disk", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            cache.commit()
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "manifest.json", "layer-0000.rows", "layer-0001.rows"}
    cache._process = -1  # killed
    cache.close()
    with opened(tmp_path) as cache:
        assert_holds(cache, (10, 4))


def test_closing_gives_back_the_space_that_was_reserved(tmp_path):
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        key = cache.tensors(0)[0]
        assert (tmp_path / "layer-0000.rows").stat().st_size > 2**20
        cache.crop(0, 1)
    assert (tmp_path / "layer-0000.rows").stat().st_size == 4096 + 4 * 2 * 3 * 12 * 4
    assert torch.equal(key, states(10, 4)[0])


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"storage must be a folder that can be written, got .*file .*; give another one"):
        opened(tmp_path / "file")

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=r"storage must be a folder that can be written.*Read-only file system"):
        opened(tmp_path / "new")


def test_a_folder_serves_one_cache_at_a_time(tmp_path):
    with opened(tmp_path):
        with pytest.raises(RuntimeError, match=rf"must be free, but process {os.getpid()} has it open"):
            opened(tmp_path)
        code = f"""
            import sys
            sys.path[:0] = {[str(Path(__file__).parent), *sys.path]}
            from test_stored_cache import opened
            opened({str(tmp_path)!r})
        """
        came = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
        )
        assert f"RuntimeError: storage {tmp_path} must be free, but process {os.getpid()} has it open" in came.stderr
    opened(tmp_path).close()


def test_a_forked_process_neither_writes_nor_commits(tmp_path):
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        child = os.fork()
        if not child:
            try:
                cache.append(0, *states(20, 1))
            except RuntimeError as error:
                cache.close()
                os._exit(0 if f"belongs to process {os.getppid()}" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(RuntimeError, match="must be free"):  # the lock is still held
            opened(tmp_path)
        write(cache, 30, 1)
        assert_holds(cache, (10, 4), (30, 1))


def test_a_closed_cache_is_refused_and_a_forgotten_one_is_committed(tmp_path):
    cache = opened(tmp_path)
    write(cache, 10, 4)
    cache.close()
    cache.close()
    with pytest.raises(RuntimeError, match="was closed; open the folder anew"):
        write(cache, 20, 1)
    cache = opened(tmp_path)
    write(cache, 20, 1)
    del cache
    with opened(tmp_path) as cache:
        assert_holds(cache, (10, 4), (20, 1))


def test_a_process_that_ends_by_itself_commits(tmp_path):
    code = f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]}
        from test_stored_cache import opened, write
        cache = opened({str(tmp_path)!r})
        write(cache, 10, 4)
        raise SystemExit(3)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == 3
    with opened(tmp_path) as cache:
        assert_holds(cache, (10, 4))


def test_what_was_stored_is_committed_every_so_many_tokens_or_seconds(tmp_path):
    def counted():
        outer = json.loads((tmp_path / "manifest.json").read_text())
        return json.loads(outer["content"])["num_tokens"]

    with opened(tmp_path, commit_tokens=3) as cache:
        seen = []
        for token in range(7):
            write(cache, token, 1)
            seen.append(counted())
        assert seen == [0, 0, 0, 3, 3, 3, 6]
    with opened(tmp_path, commit_seconds=0) as cache:
        write(cache, 10, 1)
        assert counted() == 7
        write(cache, 10, 1)
        assert counted() == 8


def advice(path):
    """What the system knows of how a file's map is read, as words of /proc/self/smaps."""
    of_file = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("VmFlags:") and of_file:
            return line.split()[1:]
        if "-" in line.split()[0]:
            of_file = line.endswith(str(path))
    return None


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell how maps are read")
def test_a_layer_that_is_read_here_and_there_is_not_read_ahead(tmp_path):
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        cache.expect_random_reads(0, True)
        assert "rr" in advice(tmp_path / "layer-0000.rows")
        assert "rr" not in advice(tmp_path / "layer-0001.rows")
        capacity = cache._rows[0].capacity
        write(cache, 20, capacity)
        assert cache._rows[0].capacity > capacity
        assert "rr" in advice(tmp_path / "layer-0000.rows")  # the map that has grown too
        cache.expect_random_reads(0, False)
        assert "rr" not in advice(tmp_path / "layer-0000.rows")


def test_dropped_pages_are_read_again_as_they_were(tmp_path):
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        cache.drop_pages()
        assert_holds(cache, (10, 4))
        write(cache, 20, 1)
        cache.drop_pages()
        assert_holds(cache, (10, 4), (20, 1))


def test_a_process_commits_all_its_caches_also_where_one_of_them_cannot_be(tmp_path):
    code = f"""
        import shutil, sys
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]}
        from test_stored_cache import opened, write
        caches = [opened(f"{tmp_path}/{{number}}") for number in range(6)]
        for cache in caches:
            write(cache, 10, 4)
        for number in range(0, 6, 2):
            shutil.rmtree(f"{tmp_path}/{{number}}")
    """
    came = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "FileNotFoundError" in came.stderr
    for number in range(1, 6, 2):
        with opened(tmp_path / str(number)) as cache:
            assert_holds(cache, (10, 4))


# What is refused


def stored(path):
    with opened(path) as cache:
        write(cache, 10, 40)
    return path


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ValueError, match=r"must be empty or hold a cache, got other files \(thesis.txt\)"):
        opened(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["a lock of somebody else", "12\nlines", "7" * 99])
def test_a_foreign_file_that_is_named_as_the_lock_is_left_alone(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with pytest.raises(ValueError, match=r"must be empty or hold a cache, got other files \(lock\)"):
        opened(tmp_path)
    assert (tmp_path / "lock").read_text() == content


@pytest.mark.parametrize("content", ["", "123\n"])
def test_the_lock_of_a_process_that_was_killed_before_it_wrote_more_is_taken_over(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    opened(tmp_path).close()


def test_the_cache_of_another_model_is_refused(tmp_path):
    stored(tmp_path)
    with pytest.raises(ValueError, match="with model small, got one with tiny: it is of another model"):
        opened(tmp_path, about={"model": "small"})
    with pytest.raises(ValueError, match=r"with layers \[0, 1, 2\], got one with \[0, 1\]"):
        opened(tmp_path, layers=range(3))
    with opened(tmp_path) as cache:
        with pytest.raises(
            ValueError, match=r"holds keys \[2, 3, N, 5\] and values .* in float32 of layer 0, got keys \[1,"
        ):
            cache.append(0, *states(1, 1, batch=1))
        assert_holds(cache, (10, 40))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "got another or a torn file"),
        (b"[]", "got another or a torn file"),
        (b"[" * 100_000, "got another or a torn file"),
        (b"\xff\x00", "got another or a torn file"),
        (b'{"format": "something"}', "got format 'something'"),
        (b'{"format": "topk_attention/stored-cache/2"}', "must have version 1, got 2; use the version that wrote it"),
        (b'{"format": "topk_attention/stored-cache/1"}', "got other content than its checksum says"),
        (b'{"format": "topk_attention/stored-cache/1", "content": "{}", "checksum": 1}', "than its checksum says"),
    ],
)
def test_another_manifest_is_refused(tmp_path, content, words):
    (stored(tmp_path) / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        opened(tmp_path)


@settings(max_examples=25, deadline=None)
@given(place=st.floats(0, 0.9999), is_cut=st.booleans())
def test_a_manifest_that_is_cut_or_changed_anywhere_is_refused(tmp_path_factory, place, is_cut):
    path = stored(tmp_path_factory.mktemp("cache"))
    whole = (path / "manifest.json").read_bytes()
    at = int(place * len(whole))
    changed = whole[:at] if is_cut else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    (path / "manifest.json").write_bytes(changed)
    with pytest.raises(ValueError, match=r"manifest\.json must "):
        opened(path)


def test_a_manifest_of_the_other_byte_order_is_refused(tmp_path):
    path = stored(tmp_path) / "manifest.json"
    outer = json.loads(path.read_text())
    outer["content"] = outer["content"].replace(folder._byte_order(), "middle")
    outer["checksum"] = zlib.crc32(outer["content"].encode())
    path.write_text(json.dumps(outer))
    with pytest.raises(ValueError, match="byte order"):
        opened(tmp_path)


def change_bytes(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_file_of_another_cache_is_refused(tmp_path):
    first, second = stored(tmp_path / "a"), stored(tmp_path / "b")
    (first / "layer-0001.rows").write_bytes((second / "layer-0001.rows").read_bytes())
    with pytest.raises(ValueError, match=r"layer-0001.rows must be of owner .* it comes from another cache"):
        opened(first)
    (second / "layer-0001.rows").write_bytes((second / "layer-0000.rows").read_bytes())
    with pytest.raises(ValueError, match="must be of layer 1, as its folder says, got 0"):
        opened(second)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "layer-0000.rows must hold layer 0 of the cache, but is gone"),
        (lambda path: path.write_bytes(b""), "must be a file of stored rows, got another file"),
        (lambda path: path.write_bytes(b"PK" * 4000), "must be a file of stored rows, got another file"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), r"must have 15,616 bytes for 40 tokens, got 15,615"),
        (lambda path: os.truncate(path, 4096), "it was cut short"),
        (lambda path: change_bytes(path, 27, b"2"), "must have version 1 of stored rows, got 2"),
        (lambda path: change_bytes(path, 60, b"~"), "must have a whole header, got a torn one"),
        (lambda path: change_bytes(path, 29, b"\xff\xff\xff\xff"), "must have a whole header, got a torn one"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, change, words):
    change(stored(tmp_path) / "layer-0000.rows")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        opened(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):  # and the lock is free again
        opened(tmp_path)


@pytest.mark.parametrize("offset", [4096, 4096 + 5000, 4096 + 40 * 288 - 1])
def test_a_torn_page_is_found_when_the_cache_is_read(tmp_path, offset):
    change_bytes(stored(tmp_path) / "layer-0001.rows", offset, b"\x99")
    with (
        opened(tmp_path) as cache,
        pytest.raises(ValueError, match=r"layer-0001.rows must hold what was written for tokens 0 to 39"),
    ):
        list(cache.check())


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (torch.zeros(3, 1, 5), torch.zeros(2, 3, 1, 7), r"key must have shape \[B, G, N, D\]"),
        (torch.zeros(2, 3, 1, 5), torch.zeros(2, 3, 2, 7), r"value must have shape \[2, 3, 1, 'E'\]"),
        (torch.zeros(2, 3, 1, 5), torch.zeros(2, 3, 1, 7).double(), "to match key, got"),
        (torch.zeros(2, 3, 1, 5).int(), torch.zeros(2, 3, 1, 7), "key must be float16, bfloat16, float32, float64"),
        (
            torch.zeros(2, 3, 1, 5, device="meta"),
            torch.zeros(2, 3, 1, 7),
            "key must be on the CPU to be stored, got meta",
        ),
        (torch.zeros(2, 3, 1, 5, requires_grad=True), torch.zeros(2, 3, 1, 7), "key must need no gradient"),
        (torch.zeros(0, 3, 1, 5), torch.zeros(0, 3, 1, 7), "key must hold numbers"),
    ],
)
def test_keys_that_cannot_be_stored_are_refused(tmp_path, key, value, words):
    with opened(tmp_path) as cache:
        with pytest.raises(ValueError, match=words):
            cache.append(0, key, value)
        assert cache.num_tokens == 0


def test_a_stored_cache_is_neither_copied_nor_pickled(tmp_path):
    import copy

    with opened(tmp_path) as cache, pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(cache)


def test_a_system_without_locks_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    with pytest.raises(RuntimeError, match="storage needs Linux or macOS"):
        opened(tmp_path)


@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("system", ["macOS", "another file system"])
def test_where_space_cannot_be_reserved_a_full_disk_is_noticed(tmp_path, monkeypatch, reserved, system):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    if system == "macOS":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with opened(tmp_path) as cache:
        write(cache, 10, 4)
        assert_holds(cache, (10, 4))
        if reserved:
            return
        disk = os.statvfs(tmp_path)
        none_left = os.statvfs_result((*disk[:3], 0, 0, *disk[5:]))
        monkeypatch.setattr(os, "fstatvfs", lambda _: none_left)
        with pytest.raises(OSError, match="No space left"):
            write(cache, 20, cache._rows[0].capacity)
        assert cache.num_tokens == 4


# Attention reads them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_attention_over_stored_keys_equals_that_over_keys_in_memory(tmp_path, dtype, num_queries):
    key, value = states(1, 300, dtype=dtype, head_dim=16, value_dim=8)
    query = torch.randn(2, 6, num_queries, 16).to(dtype)
    with opened(tmp_path, layers=[0]) as cache:
        stored_key, stored_value = cache.append(0, key, value)
        settings = {"k": 9, "is_causal": True, "enable_gqa": True}
        expected = topk_attention(query, key, value, **settings)
        assert torch.equal(topk_attention(query, stored_key, stored_value, **settings), expected)
