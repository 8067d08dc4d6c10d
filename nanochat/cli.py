"""Typed settings -> command line: one frozen dataclass a script; flags, help and defaults come from it.

Each field's type gives the flag's type, the docstring under it gives the help (name the unit there), and
`int_flag`/`float_flag` give the valid range. cyclopts does the parsing; what is added here is `2e9` for integers and
one-line errors instead of a box.
"""

import dataclasses
import math
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, dataclass_transform

from cyclopts import App, CycloptsError, Parameter, Token, validators
from cyclopts.help import DefaultFormatter

from nanochat import errors

T = TypeVar("T")
LARGEST = 1e100  # of a float: products of larger ones with sizes would be infinite


def _whole_number(type_: Any, tokens: Sequence[Token]) -> int:
    """Integers may be written 2e9 or 524_288; 1.5 is refused rather than rounded."""
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(number)


def int_flag(gte: int | None = None, lte: int | None = None) -> Parameter:
    """An integer flag with its valid range, both ends included: `Annotated[int, int_flag(gte=1)]`."""
    return Parameter(converter=_whole_number, validator=validators.Number(gte=gte, lte=lte))


def count_flag() -> Parameter:
    """How many there are to be, -1 for a default that the help names. 0 is refused rather than taken for that."""
    return Parameter(converter=_whole_number, validator=(validators.Number(gte=-1), _not_zero))


def _not_zero(type_: Any, value: int) -> None:
    if value == 0:
        raise ValueError("Must be >= 1, or -1")


def seed_flag() -> Parameter:
    """A seed: as many bits as torch's generators take."""
    return int_flag(gte=0, lte=2**64 - 1)


def float_flag(gte: float | None = None, lte: float | None = None) -> Parameter:
    """A float flag with its valid range, both ends included."""
    return Parameter(validator=(validators.Number(gte=gte, lte=lte), _finite))


def _finite(type_: Any, value: float | None) -> None:
    if value is not None and not abs(value) <= LARGEST:  # of an infinite rate all weights would be NaN
        raise ValueError(f"Must be a finite number, below {LARGEST:g}")


def alias(*names: str) -> Parameter:
    """Extra names of a flag: `Annotated[int, int_flag(), alias("-n")]`."""
    return Parameter(alias=names)


def read(cls: type[T], argv: Sequence[str]) -> T | None:
    """Build `cls` from command-line words; None: --help was asked for and has been printed. Raises CycloptsError."""
    app = App(
        name=_program_name(),
        help=cls.__doc__,
        help_format="plaintext",  # markdown would take 0.3 s to import
        help_formatter=_Panels(),
        version_flags=[],
        result_action="return_value",
    )

    def collect(settings: T | None = None) -> T:
        return settings if settings is not None else cls()

    # cyclopts flattens a dataclass parameter named "*" into top-level flags; without a single flag it gives None where
    # that is allowed, and asks for the flags that must be given where it is not
    flags: Any = Annotated[cls, Parameter(name="*")]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    if any(field.default is field.default_factory is dataclasses.MISSING for field in fields):
        collect.__defaults__ = None
    collect.__annotations__ = {"settings": flags if collect.__defaults__ is None else flags | None, "return": cls}
    app.default(collect)
    result = app(list(argv), exit_on_error=False, print_error=False)
    return result if isinstance(result, cls) else None


def parse(cls: type[T], argv: Sequence[str]) -> T:
    """As `read`; ends the process after --help, and with one line (exit 2) when the words do not fit."""
    if strange := [word for word in argv if any("\ud800" <= character <= "\udfff" for character in word)]:
        errors.end(f"{strange[0]!a}: these bytes are no text in the encoding of this locale", code=2)
    if errors.is_other_rank() and not {"--help", "-h"}.isdisjoint(argv):
        sys.exit(0)  # rank 0 shows it
    try:
        settings = read(cls, argv)
    except CycloptsError as error:
        errors.end(f"{error} (see --help)", code=2)
    if settings is None:
        sys.exit(0)
    return settings


class _Panels(DefaultFormatter):
    """Shows docstrings without the line breaks that the source has."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        for entry in panel.entries:
            if text := getattr(entry.description, "primary_renderable", None):
                text.plain = " ".join(text.plain.split())
        super().__call__(console, options, panel)


checking = False  # within `check`
_started: dict[type, Any] = {}  # class -> what `start` has made of the command line


class Checked(BaseException):
    """Ends a script that `check` has begun."""


def start(cls: type[T], check: Callable[[T], object] = bool) -> None:
    """Parse sys.argv for the `run` that follows. A script calls this before it imports what takes seconds, so that
    `--help` and mistakes are answered at once. check: raises UserError for what else can be known by then."""
    if checking:
        if (settings := read(cls, sys.argv[1:])) is not None:
            check(settings)
        raise Checked

    def parse_and_check() -> None:
        _started[cls] = parse(cls, sys.argv[1:])
        check(_started[cls])

    errors.exit_on_user_error(parse_and_check)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def program(cls: type[T]) -> type[T]:
    """Make a frozen dataclass of a script's flags, and `start` at once where the script is what runs: before it imports
    what takes seconds."""
    settings = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    if cls.__module__ == "__main__":
        start(settings)
    return settings


def check(module: str, words: Sequence[str]) -> None:
    """Begin `python -m module words` in this process, and end it once its command line has been checked. Raises
    CycloptsError or UserError for what is wrong with that."""
    global checking
    argv, sys.argv, checking = sys.argv, [module, *words], True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the module has been imported before
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Checked:
        pass
    finally:
        sys.argv, checking = argv, False


def run(main: Callable[[T], object], cls: type[T]) -> None:
    """Entry point of every script: parse sys.argv into `cls`, call `main`, end on a user's mistake with one line."""
    if cls not in _started:
        start(cls)
    settings = _started.pop(cls)
    errors.exit_on_user_error(lambda: main(settings))


def run_with_command(main: Callable[[T, Sequence[str]], int | None], cls: type[T]) -> None:
    """As `run`, for a program that is given a command after `--`; main returns the exit code."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    errors.exit_on_user_error(lambda: sys.exit(main(parse(cls, words[:end]), words[end + 1 :])))


def as_dict(settings: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """Settings as plain values, to be stored with a checkpoint and shown in the report. `without`: fields to leave out,
    such as where a benchmark writes its results."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in without}


def _program_name() -> str:
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {module.name.removesuffix('.__main__')}" if module else os.path.basename(sys.argv[0])
