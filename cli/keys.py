"""`tdml-peer key`: the account of a home, and its rotation to a fresh key; parameters as a voter writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from cli import render
from cli.common import default_home, new_app
from cli.sources import DaemonSource
from tdml_p2p.errors import USAGE, UserError

app = new_app("key", "Show this home's account, or rotate its key. The secret never leaves the home.")
Home = Annotated[Path | None, Parameter(name="--home", help="Home folder of the peer.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
_NEXT_STEP = "stop this peer, then run `tdml-peer key adopt`: a validator must not sign with both keys' records"


@app.default
def show(*, home: Home = None, json_: Json = False) -> None:
    """Show this home's account, making the key if there is none. The secret never leaves the home."""
    from chain.keys import peer_id

    folder = _folder(home)
    _print({"peer": peer_id(folder.load_key().account), "file": str(folder.key_path)}, json_)


@app.command
def rotate(*, home: Home = None, json_: Json = False) -> None:
    """Make a new key beside the old one and move the running peer's account to it, stake and all."""
    from chain.keys import peer_id
    from tdml_p2p.rotation import network_of, rotation

    folder = _folder(home)
    genesis, old = network_of(folder), folder.load_key()
    new = folder.load_next_key(make=True)
    assert new is not None  # it is made if missing
    daemon = DaemonSource(folder.path)
    told = {"old": peer_id(old.account), "new": peer_id(new.account), "file": str(folder.next_key_path)}
    if daemon.ask("account", {"id": told["old"]}).get("successor") != told["new"]:
        payload = rotation(genesis, old.account, new)
        daemon.post(
            "/transactions",
            {
                "kind": "rotate-key",
                "successor": told["new"],
                "onion_tip": payload.onion_tip.hex(),
                "proof": payload.proof.hex(),
            },
        )
    _print({**told, "next": _NEXT_STEP}, json_)


@app.command
def adopt(*, home: Home = None, json_: Json = False) -> None:
    """Change a stopped peer over to its new key and a new signing record; the old ones are kept."""
    from chain.keys import peer_id
    from tdml_p2p.rotation import adopt as change_over

    old, new = change_over(_folder(home))
    _print({"old": peer_id(old.account), "new": peer_id(new.account), "next": "start the peer"}, json_)


def wanted_params(now: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return the parameters in force with NAME=VALUE changes; raise `UserError` for what no vote can reach."""
    from chain.bounds import params_of, vote_problem

    current = {name: value for name, value in now.items() if name != "pending"}
    wanted = current | dict(_change(current, text) for text in changes)
    try:
        found = vote_problem(params_of(current), params_of(wanted))
    except ValueError as error:
        found = str(error)
    if found is not None:
        raise UserError(f"No vote can lead there: {found}.", "see `tdml-chain params`", USAGE)
    return wanted


def thresholds(calibration: Path | None) -> tuple[str, ...]:
    """Return the change of parameters that a calibration asks for, NAME=VALUE; raise `UserError`."""
    if calibration is None:
        return ()
    from chain.params import Params
    from tdml_p2p.bootstrap import calibrate

    found, _ = calibrate(Params(), calibration)
    return (f"{found.parameter}={','.join(map(str, found.tau))}",)


def _change(current: dict[str, Any], text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in current:
        raise UserError(f"There is no parameter {name!r}.", f"there are: {', '.join(sorted(current))}", USAGE)
    try:
        parsed = json.loads(f"[{value}]")
    except ValueError:
        raise UserError(
            f"{text!r} is not NAME=VALUE.", "such as lease_blocks=120 or tau=2500,27000,35000", USAGE
        ) from None
    return name, parsed if isinstance(current[name], list) or len(parsed) != 1 else parsed[0]


def _folder(home: Path | None) -> Any:
    from tdml_p2p.home import Home as HomeFolder

    folder = HomeFolder(home or default_home())
    folder.create()
    return folder


def _print(value: dict[str, Any], is_json: bool) -> None:
    print(json.dumps(value) if is_json else render.fields(value))
