"""Every command line of this project that a text names exists, with the options that it is given there."""

import re
import shlex

import pytest
import typer

import topk_attention.cli
import topk_experiments.cli
from pages import PAGES, ROOT, blocks, name_of

PROGRAMS = {"topk-attention": topk_attention.cli.app, "topk-experiments": topk_experiments.cli.app}
TEXTS = [*PAGES, *(ROOT / name for name in ("LOG.md", "CHANGELOG.md", "DESIGN.md", "STYLE.md", "CONTRIBUTING.md"))]
TEXTS += sorted((ROOT / "examples").rglob("*.md"))
CODE = re.compile(r"`([^`\n]+)`")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def whole_lines(text):
    """The command lines in shell blocks: they hold every argument that they need."""
    lines = [
        line
        for block in blocks(text)
        if block.language in ("sh", "bash", "shell")
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line, comments=True) for line in lines]


def mentions(text):
    """Commands within sentences: they may leave out arguments."""
    # Fences are removed: they would pair up with the backticks of the text.
    sentences = re.sub(r"^```.*?^```", "", text.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(code) for code in CODE.findall(sentences) if code.split()[0] in (*PROGRAMS, "make")]


def after_program(words, programs):
    """Program and arguments of a command line that may begin with variables or a launcher; None without a program."""
    at = next((index for index, word in enumerate(words) if word in programs), None)
    return None if at is None else (words[at], words[at + 1 :])


def find_command(program, arguments):
    """The command that the first arguments name, its full name, and what is left of the arguments.

    Raises:
        ValueError: there is no such command.
    """
    command, name = typer.main.get_command(PROGRAMS[program]), program
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        if arguments[0] not in command.commands:
            raise ValueError(f"{name} has no command {arguments[0]!r}")
        name = f"{name} {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, name, arguments


def check_options(command, name, arguments):
    """That the command has every option that is named."""
    if command.context_settings.get("ignore_unknown_options"):
        return
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in known]
    assert not unknown, f"{name} has no option {', '.join(unknown)}"


def check_line(program, arguments):
    """That the command takes exactly these arguments, with all that it requires."""
    command, name, rest = find_command(program, arguments)
    check_options(command, name, rest)
    if "--help" in rest or command.context_settings.get("ignore_unknown_options"):
        return
    try:
        command.make_context(name, list(rest))
    except Exception as error:  # the classes are those of a copy of click within typer
        raise AssertionError(f"{name} {' '.join(rest)}: {error}") from error


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_every_command_line_of_a_text_parses(text):
    for words in whole_lines(text):
        if found := after_program(words, PROGRAMS):
            check_line(*found)


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_every_command_that_a_text_mentions_exists(text):
    for words in mentions(text):
        if words[0] in PROGRAMS:
            command, name, rest = find_command(words[0], words[1:])
            check_options(command, name, rest)


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_every_make_target_that_a_text_names_exists(text):
    for words in [*whole_lines(text), *mentions(text)]:
        if words[:1] == ["make"]:
            named = {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)}
            assert named <= TARGETS, f"{text.name} names make {' '.join(sorted(named - TARGETS))}"


def test_a_command_that_does_not_exist_is_found():
    with pytest.raises(ValueError, match="no command 'lra'"):
        find_command("topk-attention", ["lra", "table"])


def test_an_option_that_does_not_exist_is_found():
    with pytest.raises(AssertionError, match="no option --keys"):
        check_line("topk-attention", ["calibrate", "--keys", "3"])


def test_an_option_that_is_missing_is_found():
    with pytest.raises(AssertionError, match="topk-attention calibrate"):
        check_line("topk-attention", ["calibrate", "--model", "m", "--text", "t"])
