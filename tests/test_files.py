"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from topk_attention import Calibration
from topk_attention.files import write_whole


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind_and_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    write_whole(path, "before")

    def fails(*_):
        raise PermissionError("no")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(PermissionError):
        write_whole(path, "after")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert path.read_text() == "before"


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match=r"cannot be written in place of the folder .*runs; name a file in it"):
        write_whole(folder, b"")
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("notes")
    with pytest.raises(
        NotADirectoryError, match=r"k.json cannot be written because .*runs is a file; give a path in a"
    ):
        write_whole(tmp_path / "runs" / "first" / "k.json", "{}")
    assert (tmp_path / "runs").read_text() == "notes"


def test_a_calibration_with_notes_that_json_cannot_hold_writes_nothing(tmp_path):
    path = tmp_path / "folder" / "k.json"
    with pytest.raises(ValueError, match=r"about must hold what JSON can: words, .* Tensor is not JSON serializable"):
        Calibration({"layer": (3,)}, about={"loss": torch.zeros(2)}).save(path)
    assert not path.parent.exists()
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        Calibration({"layer": (3,)}).save(tmp_path)
