from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from topk_experiments.cli.options import taking


@dataclass
class Sizes:
    num_heads: Annotated[int, "Number of heads."] = 2
    ks: Annotated[Sequence[int] | None, "Keys kept."] = (4, 8)
    out: Annotated[str, "Folder."] = "."
    hidden: int = 7


@dataclass
class Draw:
    seed: Annotated[int, "Seed."] = 0
    p: Annotated[float, "Probability."] = 0.5


@pytest.fixture
def run():
    app, got = typer.Typer(), []

    @app.command()
    @taking(Sizes, (Draw, "seed"), num_heads=3)
    def command(sizes, draw, methods: Annotated[Sequence[str], "Methods."] = ("a", "b")):
        got.append((sizes, draw, methods))

    def invoke(*arguments):
        result = CliRunner().invoke(app, arguments)
        return result, got

    return invoke


def test_a_command_gets_the_values_of_fields_with_a_text_as_their_types(run):
    _, got = run()
    assert got == [({"num_heads": 3, "ks": [4, 8], "out": "."}, {"seed": 0}, ["a", "b"])]
    _, got = run("--heads", "5", "--ks", "16, 32", "--out", "x", "--seed", "1", "--methods", "c")
    assert got[1] == ({"num_heads": 5, "ks": [16, 32], "out": "x"}, {"seed": 1}, ["c"])


def test_help_holds_the_texts_and_no_field_without_one(run):
    text = " ".join(run("--help")[0].output.replace("│", " ").split())
    assert "Number of heads." in text
    assert "Keys kept. Separated by commas." in text
    assert "--hidden" not in text
    assert "--p " not in text


def test_a_sequence_that_cannot_be_read_ends_with_one_line_and_status_2(run):
    result, got = run("--ks", "few")
    assert result.exit_code == 2
    assert "error: ks must be whole numbers separated by commas, got 'few'" in result.output
    assert got == []
