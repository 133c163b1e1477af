"""The entry point `deqcore`: finds the command, runs it, and turns errors into one readable message.

Commands are records like all plugins: the built-in ones are the table `COMMANDS` in
`deqcore/plugins/builtin.py` (one line each), others come through the hook `deqcore_commands`. The module of a
command is imported when it is called, so that `deqcore --help` stays fast.

Exit codes: 0 fine, 1 a check failed (the command raises `typer.Exit(1)`), 2 wrong usage or a DeqcoreError.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from deqcore import plugins
from deqcore.cli.output import print_error, readable_warnings
from deqcore.errors import DeqcoreError, PluginError
from deqcore.plugins.builtin import BUILTIN


class LazyGroup(TyperGroup):
    """Commands by name, from the registry. The help page knows their summaries and imports nothing."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands; a conflict between plugins must not cost the user the help page."""
        try:
            return list(plugins.commands())
        except PluginError as error:
            print_error(error)
            return list(BUILTIN["command"])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a placeholder that knows the name and the summary."""
        try:
            record = plugins.spec("command", cmd_name)
        except DeqcoreError:
            if ctx.resilient_parsing:
                return None
            raise
        return TyperCommand(name=record.name, help=record.summary, rich_markup_mode="markdown")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command to run."""
        name, result, rest = super().resolve_command(ctx, args)
        return name, result and command(str(name)), rest


def command(name: str) -> Any:
    """Import a registered command: a typer app, or a function that becomes one."""
    target = plugins.load("command", name)
    if isinstance(target, typer.Typer):
        return _plain_flags(typer.main.get_command(target))
    if not callable(target):
        raise PluginError(f"The command {name!r} must be a typer app or a function (got {target!r}).")
    single = typer.Typer(add_completion=False, rich_markup_mode="markdown")  # rich's own markup swallows [words]
    single.command(name)(target)
    return _plain_flags(typer.main.get_command(single))


def _plain_flags(made: Any) -> Any:
    """Let the help page show no type for flags, which take no value; also in the commands of a group."""
    for param in [*made.params, made.get_help_option(typer.Context(made))]:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    for inner in getattr(made, "commands", {}).values():
        _plain_flags(inner)
    return made


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _version(asked: bool) -> None:
    if asked:
        from deqcore import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Deep equilibrium models on PyTorch, JAX and NumPy: train, compare, check."""


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: instead of those that the process was started with.
    """
    try:
        with readable_warnings():
            _plain_flags(typer.main.get_command(app))(args=args, prog_name="deqcore")
    except DeqcoreError as error:
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
