"""What both commands share: the default home, exit codes, errors in one sentence."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cyclopts import App, CycloptsError, Parameter, Token
from platformdirs import user_data_path

from tdml_p2p.errors import FAILED, USAGE, UserError

INTERRUPTED = 130


def default_home() -> Path:
    """Return the platform's data folder for a peer."""
    return user_data_path("tdml", appauthor=False)


def new_app(name: str, text: str) -> App:
    """Return a command whose lists have no `--empty-…` flags and whose help goes to stdout."""
    flags = Parameter(negative_iterable=())
    return App(name=name, help=text, version=_version, default_parameter=flags, suppress_keyboard_interrupt=False)


def whole(_kind: type, tokens: Sequence[Token]) -> int:
    """Return digits as a number (a converter of cyclopts, which would round 1.5 to 2)."""
    text = tokens[0].value
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a whole number.")
    return int(text)


def run_app(app: App, arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0 done, 1 failed, 2 usage, 3 peer unreachable."""
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UserError as error:
        return _explain(error)
    except CycloptsError as error:
        return _explain(UserError(_sentence(error), f"see {app.name[0]} --help", USAGE))
    except BaseExceptionGroup as group:
        mended, _ = group.split(UserError)
        if mended is None:
            raise
        return _explain(_first(mended))
    except KeyboardInterrupt:
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def exit_with(run: Callable[[], int]) -> None:
    """End the process with the exit code of `run`, quietly when the reader of stdout has gone."""
    try:
        code = run()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)


def _explain(error: UserError) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def _sentence(error: CycloptsError) -> str:
    return " ".join(str(error).split())


def _first(group: BaseExceptionGroup[UserError]) -> UserError:
    inner = group.exceptions[0]
    return inner if isinstance(inner, UserError) else _first(inner)


def _version() -> str:
    try:
        return version("tdml")
    except PackageNotFoundError:
        return "0+source"
