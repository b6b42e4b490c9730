"""Every command of an application with its options, found by looking at it, so that no test lists them."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args, get_type_hints

import typer
from typer.testing import CliRunner

_RUNNER = CliRunner()
_CONFIGURATION = "listops-small"


class Option(NamedTuple):
    """An option of a command: its name on the command line and the types that its value may have."""

    name: str
    kinds: tuple[type, ...]


class Command(NamedTuple):
    """A command.

    path      its groups and its name
    required  arguments without which it does not start
    """

    path: tuple[str, ...]
    options: tuple[Option, ...]
    required: tuple[tuple[str, ...], ...]
    app: typer.Typer

    def run(self, *arguments: str) -> Any:
        """Run it with these arguments, and what it requires beside them."""
        others = itertools.chain(*(one for one in self.required if one[0] not in arguments))
        return _RUNNER.invoke(self.app, [*self.path, *arguments, *others])


def commands_of(app: typer.Typer, path: tuple[str, ...] = (), whole: typer.Typer | None = None) -> Iterator[Command]:
    """All commands of an application, those in groups too."""
    whole = whole or app
    for found in app.registered_commands:
        assert found.callback is not None
        name = found.name or found.callback.__name__.replace("_", "-")
        yield _command((*path, name), found.callback, whole)
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from commands_of(group.typer_instance, (*path, str(group.name)), whole)


def _command(path: tuple[str, ...], function: Callable[..., None], app: typer.Typer) -> Command:
    hints = get_type_hints(function, include_extras=True)
    options, required = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *described = get_args(hints[name]) or (None,)
        info = next((one for one in described if hasattr(one, "param_decls")), None)
        if info is None:
            continue  # the context
        must_be_given = parameter.default is inspect.Parameter.empty
        if isinstance(info, typer.models.ArgumentInfo):
            required += [(_CONFIGURATION,)] if must_be_given else []
            continue
        flags = [flag for flag in (info.default, *(info.param_decls or ())) if isinstance(flag, str)]
        long = next((flag for flag in flags if flag.startswith("--")), "--" + name.replace("_", "-"))
        options.append(Option(long.partition("/")[0], get_args(kind) or (kind,)))
        if must_be_given:
            required.append((long, "/no/such/place" if name != "out" else "build/out"))
    return Command(path, tuple(options), tuple(required), app)
