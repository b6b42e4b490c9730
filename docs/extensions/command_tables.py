"""What a command says about itself, as Markdown."""

from __future__ import annotations

from typing import Any

import typer

from topk_attention.cli import app


def markdown(command_line: str) -> str:
    """The help of a command of `topk-attention` and a table of its options.

    Raises:
        ValueError: there is no such command.
    """
    program, *names = command_line.split()
    command: Any = typer.main.get_command(app)
    for name in names:
        if name not in getattr(command, "commands", {}):
            raise ValueError(f"{program} has no command {name!r}")
        command = command.commands[name]
    options = [option for option in command.params if option.name != "help"]
    lines = [(command.help or "").strip(), ""]
    if options:
        lines += ["| Option | Default | Meaning |", "| --- | --- | --- |"]
    for option in options:
        flags = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
        default = "required" if option.required else _in_words(option.default)
        lines.append(f"| {flags} | {default} | {(option.help or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _in_words(default: object) -> str:
    """A default in the table; nothing for options that do nothing by default."""
    if default is None or default is False:
        return ""
    return f"{default:,}" if isinstance(default, int | float) else str(default)
