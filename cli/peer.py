"""`tdml-peer`: start a peer, train on a swarm, handle a wallet, run the demonstration."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.config import Env

from cli import render
from cli.common import default_home, run_app
from cli.report import reporter
from cli.sources import DaemonSource
from tdml_p2p.config import PeerConfig, TrainConfig
from tdml_p2p.errors import UserError

app = App(
    name="tdml-peer",
    help="Train models on machines that nobody vouches for.",
    config=Env("TDML_", command=False),
)
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Home = Annotated[Path | None, Parameter(name="--home", help="Home folder of the peer.")]
Flat = Parameter(name="*")
_PEER = PeerConfig()
_TRAIN = TrainConfig()


@app.command
def start(config: Annotated[PeerConfig, Flat] = _PEER, *, json_: Json = False) -> int:
    """Run a peer: with no flags a private network of its own, with --join INVITE part of another."""
    import trio

    from tdml_p2p.peer import run_start

    ready = replace(config, home=config.home or default_home())
    return trio.run(run_start, ready, reporter(json_))


@app.command
def train(
    config: Annotated[PeerConfig, Flat] = _PEER,
    training: Annotated[TrainConfig, Flat] = _TRAIN,
    *,
    json_: Json = False,
) -> int:
    """Train a model on a swarm: post the task, feed the data, follow, save."""
    import trio

    from tdml_p2p.train import run_train

    return trio.run(run_train, config, training, reporter(json_))


@app.command
def demo(
    *, peers: int = 6, steps: int = 40, cheat: str = "sign-flip", out: Path = Path("demo-out"), json_: Json = False
) -> int:
    """Show it all on this machine: real peers train a model while one cheats and is voted out."""
    import trio

    from tdml_p2p.demo import DemoConfig, run_demo

    return trio.run(run_demo, DemoConfig(peers, steps, cheat, out), reporter(json_))


@app.command
def init(*, home: Home = None, genesis: Path | None = None, json_: Json = False) -> None:
    """Make a home: key, lock, and the genesis of a network (--genesis FILE, or a private one)."""
    from tdml_p2p.bootstrap import initialize

    _print(initialize(home or default_home(), genesis), json_)


@app.command
def tasks(*, home: Home = None, json_: Json = False) -> None:
    """Open tasks found through the DHT, checked against the chain."""
    found = _daemon(home).get("/tasks.json")
    print(json.dumps(found) if json_ else render.table(found, render.columns_of(found)))


@app.command
def status(*, home: Home = None, watch: bool = False, json_: Json = False) -> None:
    """This peer: reachability, peers, height, seats, earnings, warnings."""
    import time

    source = _daemon(home)
    while True:
        _print(source.get("/status.json"), json_)
        if not watch:
            return
        sys.stdout.flush()
        time.sleep(2)


@app.command
def stake(amount: int, *, home: Home = None, json_: Json = False) -> None:
    """Bond AMOUNT base units."""
    _transact(home, json_, {"kind": "bond", "amount": str(amount)})


@app.command
def unstake(amount: int, *, home: Home = None, json_: Json = False) -> None:
    """Start to release AMOUNT base units of stake."""
    _transact(home, json_, {"kind": "unbond", "amount": str(amount)})


@app.command
def send(to: str, amount: int, *, home: Home = None, json_: Json = False) -> None:
    """Send AMOUNT base units to an account."""
    _transact(home, json_, {"kind": "transfer", "to": to, "amount": str(amount)})


@app.command
def faucet(*, home: Home = None, json_: Json = False) -> None:
    """Ask the network's faucet for its grant."""
    _transact(home, json_, {"kind": "faucet"})


@app.command
def key(*, home: Home = None, json_: Json = False) -> None:
    """Show this home's account, making the key if there is none. The secret never leaves the home."""
    from chain.keys import peer_id
    from tdml_p2p.home import Home as HomeFolder

    folder = HomeFolder(home or default_home())
    folder.create()
    _print({"peer": peer_id(folder.load_key().account), "file": str(folder.key_path)}, json_)


@app.command
def generate(*, model: Path, prompt: str, tokens: int = 64, temperature: float = 0.8, seed: int = 0) -> None:
    """Continue a prompt with a trained model, on this machine."""
    from trainer.errors import TrainerError
    from trainer.generate import generate as continue_text

    try:
        print(continue_text(model, prompt, tokens, temperature, seed))
    except TrainerError as error:
        raise UserError(error.sentence, error.hint) from None


def _daemon(home: Path | None) -> DaemonSource:
    return DaemonSource(home or default_home())


def _transact(home: Path | None, is_json: bool, body: dict[str, Any]) -> None:
    _print(_daemon(home).post("/transactions", body), is_json)


def _print(value: dict[str, Any], is_json: bool) -> None:
    print(json.dumps(value) if is_json else render.fields(value))


def main() -> None:
    """Run `tdml-peer`."""
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
