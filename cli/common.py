"""What both commands share: the default home, exit codes, errors in one sentence."""

import sys
from pathlib import Path

from cyclopts import App, CycloptsError
from platformdirs import user_data_path

from tdml_p2p.errors import USAGE, UserError


def default_home() -> Path:
    """Return the platform's data folder for a peer."""
    return user_data_path("tdml")


def run_app(app: App, arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code: 0 done, 1 failed, 2 usage, 3 peer unreachable."""
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UserError as error:
        print_error(error)
        return error.exit_code
    except CycloptsError as error:
        print(f"error: {str(error).strip()}", file=sys.stderr)
        print(f"hint: see {app.name[0]} --help", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def print_error(error: UserError) -> None:
    """Print an error and its hint on stderr."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
