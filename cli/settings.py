"""`config.toml` of a home: settings for flags that neither the command line nor the environment gives."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from cli.common import default_home
from tdml_p2p.config import PeerConfig, TrainConfig
from tdml_p2p.errors import USAGE, UserError

FILE = "config.toml"
_PEER_KEYS = frozenset(field.name.replace("_", "-") for field in fields(PeerConfig)) - {"home"}
_TRAIN_KEYS = frozenset(field.name.replace("_", "-") for field in fields(TrainConfig))
_READERS = frozenset(("start", "train"))


def from_home(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what is still unset (a cyclopts configuration); raise `UserError` for a file that makes no sense."""
    if not commands or commands[0] not in _READERS:
        return
    path = _home(arguments) / FILE
    settings = _read(path)
    of_train = settings.pop("train", {})
    _refuse_unknown(path, settings, _PEER_KEYS)
    _refuse_unknown(path, of_train, _TRAIN_KEYS)
    if commands[0] == "train":
        settings |= of_train
    Dict(settings, use_commands_as_keys=False, source=str(path))(app, commands, arguments)


def template() -> str:
    """Return a `config.toml` that names every setting of a daemon, each at its default and commented out."""
    lines = ["# Settings of this peer: flags and TDML_… variables come first, then this file."]
    for field in fields(PeerConfig):
        if field.name != "home":
            lines += ["", f"# {field.metadata['help']}", f"# {field.name.replace('_', '-')} = {_toml(field.default)}"]
    return "\n".join([*lines, ""])


def _home(arguments: ArgumentCollection) -> Path:
    for argument in arguments:
        if argument.name == "--home" and argument.tokens:
            return Path(argument.tokens[0].value)
    return default_home()


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", "make it readable, or remove it") from None
    except ValueError as error:
        raise UserError(f"{path} is not TOML: {error}.", "correct it, or remove it", USAGE) from None


def _refuse_unknown(path: Path, settings: Any, known: frozenset[str]) -> None:
    if not isinstance(settings, dict):
        raise UserError(f"`train` in {path} is not a table.", "write its settings below a line [train]", USAGE)
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UserError(f"{path} has a setting {unknown[0]!r} that does not exist.", _hint(known), USAGE)


def _hint(known: frozenset[str]) -> str:
    return f"there are: {', '.join(sorted(known))}"


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case tuple():
            return "[]"
        case _:
            return str(value)
