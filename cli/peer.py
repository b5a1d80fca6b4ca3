"""`tdml-peer`: start a peer, train on a swarm, handle a wallet, run the demonstration."""

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.config import Env

from cli import keys, render, render_peer, settings
from cli.common import default_home, exit_with, new_app, run_app, whole
from cli.report import reporter
from cli.signing_record import app as signing_record
from cli.sources import DaemonSource
from tdml_p2p.config import PeerConfig, TrainConfig
from tdml_p2p.errors import UserError

app = new_app("tdml-peer", "Train models on machines that nobody vouches for.")
app.config = (Env("TDML_", command=False), settings.from_home)
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Amount = Annotated[int, Parameter(name="amount", converter=whole, help="Base units.")]
Home = Annotated[Path | None, Parameter(name="--home", help="Home folder of the peer.")]
Calibrated = Annotated[Path | None, Parameter(help="Thresholds as `python -m bench.numerics --calibration` measured.")]
Flat = Parameter(name="*")
_PEER = PeerConfig()
_TRAIN = TrainConfig()
_WATCH_SECONDS = 2.0


@app.command
def start(*, config: Annotated[PeerConfig, Flat] = _PEER, json_: Json = False) -> int:
    """Run a peer: with no flags a private network of its own, with --join INVITE part of another."""
    from tdml_p2p.peer import run_start

    return _run(run_start, json_, replace(config, home=config.home or default_home()))


@app.command
def train(
    *,
    config: Annotated[PeerConfig, Flat] = _PEER,
    training: Annotated[TrainConfig, Flat] = _TRAIN,
    json_: Json = False,
) -> int:
    """Train a model on a swarm: post the task, feed the data, follow, save."""
    from tdml_p2p.train import run_train

    return _run(run_train, json_, config, training)


@app.command
def demo(
    *,
    peers: Annotated[int, Parameter(help="Peer processes.")] = 6,
    steps: Annotated[int, Parameter(help="Optimiser steps.")] = 40,
    cheat: Annotated[str, Parameter(help="sign-flip, noise, scale, skip-layer, stale, or none.")] = "sign-flip",
    out: Annotated[Path, Parameter(help="Folder for the model, the chain and the logs.")] = Path("demo-out"),
    json_: Json = False,
) -> int:
    """Show it all on this machine: real peers train a model while one cheats and is voted out."""
    from tdml_p2p.demo import DemoConfig, run_demo

    return _run(run_demo, json_, DemoConfig(peers, steps, cheat, out))


@app.command
def init(
    *,
    home: Home = None,
    genesis: Annotated[Path | None, Parameter(help="genesis.json of a network; without it a private one.")] = None,
    calibration: Calibrated = None,
    json_: Json = False,
) -> None:
    """Make a home: key, settings, and the genesis of a network."""
    from tdml_p2p.bootstrap import initialize
    from tdml_p2p.logs import configure_logs

    configure_logs("info")
    folder = home or default_home()
    made = initialize(folder, genesis, calibration)
    config = folder / settings.FILE
    if not config.exists():
        config.write_text(settings.template())
    _print({**made, "config": str(config)}, json_)


@app.command
def tasks(*, home: Home = None, json_: Json = False) -> None:
    """Open tasks found through the DHT, checked against the chain."""
    found = _daemon(home).get("/tasks.json")
    print(json.dumps(found) if json_ else render.table(found, render.columns_of(found)))


@app.command
def status(
    *,
    home: Home = None,
    watch: Annotated[bool, Parameter(negative="", help="Print it again every two seconds.")] = False,
    json_: Json = False,
) -> None:
    """This peer: reachability, peers, height, seats, earnings, warnings."""
    source = _daemon(home)
    while True:
        found = source.get("/status.json")
        print(json.dumps(found) if json_ else render_peer.status(found), flush=True)
        if not watch:
            return
        time.sleep(_WATCH_SECONDS)


@app.command
def stake(amount: Amount, *, home: Home = None, json_: Json = False) -> None:
    """Bond AMOUNT base units."""
    _transact(home, json_, {"kind": "bond", "amount": str(amount)})


@app.command
def unstake(amount: Amount, *, home: Home = None, json_: Json = False) -> None:
    """Start to release AMOUNT base units of stake."""
    _transact(home, json_, {"kind": "unbond", "amount": str(amount)})


@app.command
def send(to: str, amount: Amount, *, home: Home = None, json_: Json = False) -> None:
    """Send AMOUNT base units to an account."""
    _transact(home, json_, {"kind": "transfer", "to": to, "amount": str(amount)})


@app.command
def faucet(*, home: Home = None, json_: Json = False) -> None:
    """Ask the network's faucet for its grant."""
    _transact(home, json_, {"kind": "faucet"})


@app.command
def vote_params(*changes: str, calibration: Calibrated = None, home: Home = None, json_: Json = False) -> None:
    """Stand with this validator's stake for other parameters: NAME=VALUE…; none takes the vote back."""
    wanted = keys.wanted_params(_daemon(home).ask("params", {}), (*keys.thresholds(calibration), *changes))
    _transact(home, json_, {"kind": "vote-params", "params": wanted})


app.command(keys.app)

app.command(signing_record)


@app.command
def generate(
    *,
    model: Annotated[Path, Parameter(help="Folder of a trained model.")],
    prompt: Annotated[str, Parameter(help="Text to continue.")],
    tokens: Annotated[int, Parameter(help="Tokens to add.")] = 64,
    temperature: Annotated[float, Parameter(help="0 always takes the likeliest token.")] = 0.8,
    seed: Annotated[int, Parameter(help="Seed of the draw.")] = 0,
    json_: Json = False,
) -> None:
    """Continue a prompt with a trained model, on this machine."""
    from trainer.errors import TrainerError
    from trainer.generate import generate as continue_text

    try:
        text = continue_text(model, prompt, tokens, temperature, seed)
    except TrainerError as error:
        raise UserError(error.sentence, error.hint) from None
    print(json.dumps({"prompt": prompt, "text": text}) if json_ else text)


def _daemon(home: Path | None) -> DaemonSource:
    return DaemonSource(home or default_home())


def _transact(home: Path | None, is_json: bool, body: dict[str, Any]) -> None:
    _print(_daemon(home).post("/transactions", body), is_json)


def _print(value: dict[str, Any], is_json: bool) -> None:
    print(json.dumps(value) if is_json else render.fields(value))


def _run(command: Callable[..., Awaitable[int]], is_json: bool, *arguments: Any) -> int:
    """Run a long command on a trio loop with a report, which leaves the terminal as it was."""
    import trio

    report = reporter(is_json)
    try:
        return trio.run(command, *arguments, report)
    finally:
        report.close()


def main() -> None:
    """Run `tdml-peer`."""
    exit_with(lambda: run_app(app))


if __name__ == "__main__":
    main()
