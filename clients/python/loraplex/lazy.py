"""Sub-commands that live in packages which are slow to import, or not installed. Knows click, not what they do."""

import importlib

import click


class LazyCommand(click.Command):
    """Stands in for the command at `target` ("package.module:attribute") until that is called.

    It has only what a list of commands shows, so that `loraplex --help` imports nothing. `extra` is the optional
    dependency group that the command needs, "" for none.
    """

    def __init__(self, name: str, target: str, *, short_help: str, extra: str = "") -> None:
        super().__init__(name, short_help=short_help)
        self.target = target
        self.extra = extra

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        """The context of the command itself; click goes on with that one, and never invokes this stand-in."""
        module, _, attribute = self.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command.make_context(info_name, args, parent, **extra)  # type: ignore[arg-type]


class LazyGroup(click.Group):
    """A group that says which extra to install when one of its lazy commands misses a module, early or late."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            extra = command.extra if isinstance(command, LazyCommand) else ""
            missing = (error.name or "").partition(".")[0]
            if not extra or missing.startswith("loraplex"):  # our own mistake, not an extra left out
                raise
            install = f"pip install 'loraplex[{extra}]'"
            raise click.ClickException(f"loraplex {ctx.invoked_subcommand} needs {missing}: {install}") from error
