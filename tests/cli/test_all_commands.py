"""What holds for every command of both projects, found by looking at them: a new command cannot forget it."""

import errno
from pathlib import Path

import pytest

from commands import commands_of
from topk_attention.cli import app as product
from topk_experiments.cli import app as experiments

COMMANDS = [*commands_of(product), *commands_of(experiments)]
# Options with the path of something that is only read. Any other path is written.
READ = {"--text", "--evaluate-text", "--audio", "--weights", "--prompt-file"}
READ_BY = {("lra", "evaluate"): {"--out"}}
# Numbers that may be 0.
FROM_ZERO = {"--seed", "--start", "--evaluate-start", "--shots", "--stand-in-rank", "--warm-up-steps"}


def options_of(kind, *, but=lambda command: ()):
    return [
        pytest.param(command, option.name, id=" ".join((*command.path, option.name)))
        for command in COMMANDS
        for option in command.options
        if kind in option.kinds and option.name not in but(command)
    ]


WRITTEN = options_of(Path, but=lambda command: READ | READ_BY.get(command.path, set()))
COUNTS = options_of(int)
NUMBERS = options_of(float)
# Options with a comma-separated list of numbers.
KS = {"--k", "--attention-k", "--feed-forward-k", "--uniform", "--also-mean-k"}
SIZES = {"--lengths", "--d-ff", "--chunk-sizes", "--features", "--seeds"}
LISTS = [parameter for parameter in options_of(str) if parameter.values[1] in KS | SIZES]


def test_the_commands_of_both_projects_are_found():
    assert {("calibrate",), ("lm-eval",), ("info",), ("benchmark", "attention"), ("lra", "train")} <= {
        command.path for command in COMMANDS
    }
    assert len(WRITTEN) > 20
    assert len(COUNTS) > 80


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Runs a command that must end with one line in words."""
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        result = command.run(*arguments)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        (line,) = result.output.splitlines()
        assert list(tmp_path.iterdir()) == []  # nothing was begun
        return line

    return run


@pytest.mark.parametrize(("command", "option"), WRITTEN)
def test_an_option_that_cannot_be_written_is_refused_with_its_name_its_path_and_the_reason(command, option, refused):
    line = refused(command, option, "/dev/null/there")
    name = option.lstrip("-")
    assert line == f"error: {name} cannot be written: /dev/null/there (Not a directory); give another --{name}"


@pytest.mark.parametrize(("command", "option"), WRITTEN)
def test_a_default_place_that_cannot_be_written_is_refused_too(command, option, refused, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    line = refused(command)
    assert "cannot be written: " in line or option in ("--save", "--record")
    assert "(Read-only file system)" in line or option in ("--save", "--record")


@pytest.mark.parametrize(("command", "option"), COUNTS)
def test_a_count_that_makes_no_sense_is_refused_in_words(command, option, refused):
    for number in ("-1",) if option in FROM_ZERO else ("0", "-1"):
        line = refused(command, option, number)
        assert option.lstrip("-") in line.replace("_", "-").replace("num-", "")
        assert line.endswith(f"got {number}") or f"got {number} " in line or f"got {number};" in line


def names(option, line):
    return option.lstrip("-") in line.replace("_", "-").replace("num-", "")


@pytest.mark.parametrize(("command", "option"), COUNTS)
def test_a_count_beyond_all_that_can_be_counted_is_refused_in_words(command, option, refused):
    line = refused(command, option, str(10**30))
    assert names(option, line), line
    assert "below 2^31" in line or "at most" in line or "from 1 to" in line, line


@pytest.mark.parametrize(("command", "option"), NUMBERS)
@pytest.mark.parametrize("number", ["-1", "nan", "inf"])
def test_a_number_that_makes_no_sense_is_refused_in_words(command, option, number, refused):
    line = refused(command, option, number)
    assert names(option, line) or "bound must be" in line, line
    assert line.split(", got ")[1].startswith(number), line


@pytest.mark.parametrize(("command", "option"), LISTS)
@pytest.mark.parametrize("listed", ["-1", str(10**30), "8.5"])
def test_a_list_of_numbers_that_makes_no_sense_is_refused_in_words(command, option, listed, refused):
    line = refused(command, option, listed)
    assert names(option, line), line


@pytest.mark.parametrize(("command", "option"), [p for p in COUNTS if p.values[1] in ("--threads", "--seed")])
def test_threads_and_seeds_that_no_machine_has_are_refused_in_words(command, option, refused):
    assert f"error: {option.lstrip('-')} must be at most" in refused(command, option, str(10**30))
