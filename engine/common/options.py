"""A command's options as one frozen dataclass: each is named once, with its type, its default and its help.

@dataclass(frozen=True)
class Options:
    model: str = option(..., "GGUF file or model folder")
    seeds: int = option(3, "seeds", min=1)

@app.command()
@takes(Options)
def serve(options: Options) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import MISSING, field, fields
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

import typer

from engine.errors import SlalomError

P = ParamSpec("P")
T = TypeVar("T")


def command_app() -> typer.Typer:
    """An application of one command. Its help is plain text: boxes cut the names of options short in 80 columns."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def option(default: Any, help: str, *names: str, **limits: Any) -> Any:
    """A field of an options class.

    :param default: ``...`` where the user must give a value
    :param names: how it is written, where that does not follow from the field's name
    :param limits: ``min``, ``max`` and whatever else ``typer.Option`` takes
    """
    given = {} if default is ... else {"default": default}
    return field(**given, metadata={"option": typer.Option(*names, help=help, **limits), "names": names})


def same(options: type, name: str) -> Any:
    """A field that is the one called ``name`` of another options class: what two commands share is declared once."""
    other = next(each for each in fields(options) if each.name == name)
    given = {} if other.default is MISSING else {"default": other.default}
    return field(**given, metadata=other.metadata)


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Decorator: shows typer a function of ``options`` as one with a parameter for each of its fields."""
    hints = get_type_hints(options)
    shown = {each.name: Annotated[hints[each.name], each.metadata["option"]] for each in fields(options)}  # type: ignore[arg-type]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=_default(options, name))
        for name, annotation in shown.items()
    ]

    def made(function: Callable[[T], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            function(options(**given))

        del command.__wrapped__  # whose signature is not this one's
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = shown
        return command

    return made


def only(options: Any, used: Collection[str], fix: str) -> None:
    """Refuse what would be ignored: all but ``used``, see :func:`none_of`."""
    none_of(options, [each.name for each in fields(options) if each.name not in used], fix)


def none_of(options: Any, ignored: Collection[str], fix: str) -> None:
    """Refuse what would be ignored.

    :param options: as :func:`takes` gives them
    :param ignored: fields that do not count in what the command was asked to do
    :raises SlalomError: one of them is not as it is where nobody gives it
    """
    for each in fields(options):
        value = getattr(options, each.name)
        if each.name in ignored and value != each.default:
            named = (*each.metadata["names"], "--" + each.name.replace("_", "-"))[0]
            raise SlalomError(named, value, fix)


def _default(options: type, name: str) -> Any:
    return getattr(options, name, inspect.Parameter.empty)  # a dataclass keeps defaults as attributes of the class


def refuses(name: str) -> Callable[[Callable[P, T]], Callable[P, T | int]]:
    """Decorator of a command that gives its exit code: a mistake of the user is one line on standard error and 2,
    Ctrl-C one line and 130."""

    def made(function: Callable[P, T]) -> Callable[P, T | int]:
        @functools.wraps(function)
        def command(*given: P.args, **named: P.kwargs) -> T | int:
            try:
                return function(*given, **named)
            except SlalomError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"{name}: interrupted", file=sys.stderr)
                return 130

        return command

    return made


def run_command(name: str, app: Callable[[], Any]) -> None:
    """What an entry point does with a command of typer, see :func:`refuses`."""
    if code := refuses(name)(app)():
        sys.exit(code)


def listed(text: str) -> list[str]:
    """What stands between the commas of an option, without spaces around it and without what is empty."""
    return [part.strip() for part in text.split(",") if part.strip()]
