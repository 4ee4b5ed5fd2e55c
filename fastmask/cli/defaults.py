"""Defaults in `--help` come from the library's Config, so that no number is written twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand, TyperOption


def of(config: type[Any]) -> dict[str, Any]:
    """The defaults of a dataclass by field name; fields without one are left out."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def command(fields: Mapping[str, str], load: Any) -> type[TyperCommand]:
    """A command class that fills in defaults when its help is asked for, not before.

    Args:
        fields: the Config field each option sets, by the option's name in Python.
        load: returns the Config class; called only for help.
    """

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            defaults = of(load())
            for option in self.params:
                value = defaults.get(fields.get(option.name or "", ""))
                if isinstance(option, TyperOption):
                    # The process ends with its help, so nothing else sees this default.
                    option.default = value
                    option.show_default = value is not False and value not in (None, (), [])
            super().format_help(ctx, formatter)

    return Command
