"""What people get wrong, through the real commands: one sentence, a hint, an exit code, and nothing lost."""

import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import structlog
import torch
import trio
from processes_kit import LOCAL, PATIENCE, assert_nothing_left, commands, printed
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cli import peer
from cli.common import run_app
from cli.sources import DaemonSource
from tdml_p2p.demo.processes import Child, child
from tdml_p2p.demo.run import _make_room
from tdml_p2p.home import Home
from trainer import LocalRun, RunSettings
from trainer.tokens import byte_tokenizer, train_tokenizer

pytestmark = pytest.mark.slow
FAILED, USAGE = 1, 2
MODEL = {
    "vocab_size": 257,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
KEPT = ("key", "genesis.json", "config.toml", "chain.db", "signing.db")


@dataclass(frozen=True)
class Refusal:
    """How a command ended that had to fail."""

    code: int
    sentence: str
    hint: str


async def refusal(*arguments: object) -> Refusal:
    """Run a command that must fail."""
    module, *rest = map(str, arguments)
    with trio.fail_after(PATIENCE):
        ended = await trio.run_process(
            [sys.executable, "-m", module, *rest], capture_stdout=True, capture_stderr=True, check=False
        )
    return refusal_of(ended.returncode, ended.stderr.decode())


def refusal_of(code: int, said: str) -> Refusal:
    """Return the last two lines, the sentence and the hint; there must be no traceback before."""
    assert "Traceback" not in said, said
    lines = said.splitlines()
    assert code in (FAILED, USAGE), said
    assert lines[-2].startswith("error: "), said
    assert lines[-1].startswith("hint: "), said
    sentence = lines[-2].removeprefix("error: ")
    assert sentence.endswith("."), said
    assert len(sentence) < 500, said
    return Refusal(code, sentence, lines[-1].removeprefix("hint: "))


async def refused_start(home: Path, *more: object, local: bool = True) -> Refusal:
    """Return how `tdml-peer start` refuses this home; its lock and socket are gone afterwards."""
    found = await refusal("cli.peer", "start", "--home", home, *(LOCAL if local else ()), *more)
    assert not [line for line in commands() if str(home) in line]
    return found


async def refused_train(folder: Path, *more: object) -> Refusal:
    return await refusal("cli.peer", "train", *LOCAL, "--home", folder / "home", "--out", folder / "out", *more)


@asynccontextmanager
async def daemon(home: Path) -> AsyncIterator[dict[str, Any]]:
    """Run a peer of a private network; give its `ready` event."""
    async with child(home.name, "cli.peer", ["start", "--home", str(home), *LOCAL], home.with_suffix(".log")) as one:
        yield await one.expect("ready", PATIENCE)
        one.process.send_signal(signal.SIGTERM)
        with trio.fail_after(PATIENCE):
            assert await one.process.wait() == 0
    assert_nothing_left([home])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"Line {n} of a text to train on.\n" for n in range(2000)))
    return folder


@dataclass(frozen=True)
class Trainer:
    """`tdml-peer train` in this process, for what must be refused before the network is touched."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    def refuses(self, *more: object) -> Refusal:
        arguments = ["train", *LOCAL, "--home", self.folder / "home", "--out", self.folder / "out", *more]
        code = run_app(peer.app, [str(argument) for argument in arguments])
        return refusal_of(code, self.capture.readouterr().err)


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Trainer]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Trainer(tmp_path, capsys)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    assert not (tmp_path / "home").exists()


def test_a_model_that_cannot_be_trained(tmp_path: Path, text: Path, train: Trainer) -> None:
    config = tmp_path / "model.json"
    config.write_text('{"model_type": "mamba", "vocab_size": 300}')
    family = train.refuses("--model", config, "--data", text)
    assert "family 'mamba' is not known" in family.sentence
    assert "llama" in family.hint
    name = train.refuses("--model", "gpt-9", "--data", text)
    assert "'gpt-9' is not known" in name.sentence
    assert "llama-tiny" in name.hint
    stages = train.refuses("--model", "llama-tiny", "--data", text, "--stages", "5")
    assert "4 layers cannot be cut into 5 stages" in stages.sentence
    assert "at most 4" in stages.hint


def test_data_that_cannot_be_read(tmp_path: Path, train: Trainer) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name, said in {
        "gone": "There is no file or folder",
        "empty": "There is no text in",
        "empty.txt": "There is no text in",
        "binary.txt": "is not UTF-8 text",
        "loop": "There is no file or folder",
        "pipe": "cannot be read",
    }.items():
        found = train.refuses("--data", tmp_path / name)
        assert said in found.sentence
        assert found.code == USAGE
        assert found.hint
    none = train.refuses()
    assert none.code == USAGE
    assert "--data" in none.hint
    if os.geteuid():
        closed = tmp_path / "closed.txt"
        closed.write_text("text")
        closed.chmod(0)
        assert "Permission denied" in train.refuses("--data", closed).sentence


def test_tables_without_the_column_are_refused(tmp_path: Path, train: Trainer) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["words"], "id": [1]}), tmp_path / "a.parquet")
    missing = train.refuses("--data", tmp_path / "a.parquet")
    assert "no column `text`" in missing.sentence
    assert "--text-field: body, id" in missing.hint
    number = train.refuses("--data", tmp_path / "a.parquet", "--text-field", "id")
    assert "holds int64, not text" in number.sentence
    (tmp_path / "a.jsonl").write_text('{"body": "words"}')
    line = train.refuses("--data", tmp_path / "a.jsonl")
    assert "Line 1 of" in line.sentence
    assert {missing.code, number.code, line.code} == {USAGE}


def write_model(folder: Path, dtype: torch.dtype = torch.float32, vocabulary: int = 0) -> Path:
    """Write a tiny model folder with a tokenizer of `vocabulary` ids, or one of bytes."""
    torch.manual_seed(1)
    config = LlamaConfig(**MODEL)
    LlamaForCausalLM(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    tokenizer = train_tokenizer(["some words and more words"] * 9, vocabulary) if vocabulary else byte_tokenizer()
    for name, data in tokenizer.files(32).items():
        (folder / name).write_bytes(data)
    return folder


def test_a_model_folder_whose_parts_do_not_fit(tmp_path: Path, text: Path, train: Trainer) -> None:
    common = ("--data", text, "--sequence", "16", "--model")
    dtype = train.refuses(*common, write_model(tmp_path / "whole-numbers", torch.int8))
    assert "holds int8, not plain floating-point numbers" in dtype.sentence
    large = train.refuses(*common, write_model(tmp_path / "large", vocabulary=270))
    assert "The tokenizer has" in large.sentence
    assert "the model a vocabulary of 257" in large.sentence
    cut = write_model(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    short = train.refuses(*common, cut)
    assert "cannot be read" in short.sentence
    assert {dtype.code, large.code, short.code} == {USAGE}


def test_an_out_folder_of_another_run_and_a_damaged_one(tmp_path: Path, text: Path, train: Trainer) -> None:
    run = LocalRun.create("llama-tiny", text, tmp_path / "out", RunSettings(steps=2, batch=1, sequence=16))
    run.save()
    other = train.refuses("--data", text)
    assert "holds the model of another run" in other.sentence
    assert "--resume" in other.hint
    (state,) = (tmp_path / "out" / "state").rglob("*.safetensors")
    data = state.read_bytes()
    state.write_bytes(data[:-4] + b"\1\2\3\4")
    wrong = train.refuses("--data", text, "--resume")
    assert "is not the one that was saved" in wrong.sentence
    save_file({name: part.half() for name, part in load_file(state).items()}, state)
    dtype = train.refuses("--data", text, "--resume")
    assert "is not the one that was saved" in dtype.sentence
    state.unlink()
    assert "cannot be read" in train.refuses("--data", text, "--resume").sentence
    assert {other.code, wrong.code, dtype.code} == {USAGE}


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--validation", "2", "A share of 2"),
        ("--validation", "nowhere", "no file or folder nowhere"),
        ("--eval-every", "-1", "--eval-every cannot be negative"),
        ("--max-data", "-1", "--max-data"),
        ("--steps", "0", "steps is 0"),
        ("--sequence", "0", "sequence is 0"),
        ("--seed", "-1", "seed is -1"),
        ("--learning-rate", "nan", "learning_rate cannot be nan"),
        ("--clip", "-1", "clip cannot be -1.0"),
        ("--audit-rate", "nan", "--audit-rate cannot be nan"),
        ("--audit-rate", "2", "--audit-rate cannot be 2"),
        ("--price", "-1", "--price cannot be negative"),
        ("--steps", "many", 'unable to convert "many"'),
    ],
)
def test_settings_that_make_no_sense(text: Path, train: Trainer, flag: str, value: str, said: str) -> None:
    assert said in train.refuses("--model", "llama-tiny", "--data", text, flag, value).sentence


def test_an_out_folder_that_cannot_be_made(tmp_path: Path, text: Path, train: Trainer) -> None:
    (tmp_path / "out").symlink_to("/proc/none/out")
    assert "out cannot be made" in train.refuses("--model", "llama-tiny", "--data", text, "--join", "INVITE").sentence


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [("--cheat", "bribe", "no attack 'bribe'"), ("--peers", "5", "5 peers are too few"), ("--steps", "9", "too few")],
)
def test_a_demonstration_without_sense(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str, value: str, said: str
) -> None:
    code = run_app(peer.app, ["demo", "--out", str(tmp_path / "out"), flag, value])
    found = refusal_of(code, capsys.readouterr().err)
    assert found.code == USAGE
    assert said in found.sentence
    assert not (tmp_path / "out").exists()


def test_a_demonstration_takes_the_place_of_a_former_one_but_of_no_other_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    state = tmp_path / "out" / "state" / "step-0000000002"
    state.mkdir(parents=True)
    found = refusal_of(run_app(peer.app, ["demo", "--out", str(tmp_path / "out")]), capsys.readouterr().err)
    assert "another run" in found.sentence
    assert state.exists()
    (tmp_path / "out" / "logs").mkdir()
    _make_room(tmp_path / "out")
    assert not state.exists()


def test_there_is_no_network_to_train_on(text: Path, train: Trainer) -> None:
    found = train.refuses("--data", text, "--steps", 2)
    assert found.code == USAGE
    assert "--join" in found.hint


async def test_nobody_answers_the_invite(tmp_path: Path, text: Path) -> None:
    async with daemon(tmp_path / "a") as ready:
        pass
    for found in (
        await refused_start(tmp_path / "b", "--join", ready["invite"]),
        await refused_train(tmp_path, "--data", text, "--join", ready["invite"]),
    ):
        assert found.code == FAILED
        assert "No peer of the network could be reached" in found.sentence
        assert "invite" in found.hint
    assert_nothing_left([tmp_path / "b", tmp_path / "home"])
    malformed = await refused_train(tmp_path, "--data", text, "--join", "somewhere")
    assert "'somewhere' is not an invite" in malformed.sentence


async def test_an_invite_of_another_network(tmp_path: Path) -> None:
    other = tmp_path / "other"
    await printed("cli.peer", "init", "--home", str(other), "--json")
    before = contents(other)
    async with daemon(tmp_path / "a") as ready:
        belongs = await refused_start(other, "--join", ready["invite"])
        address, _, chain = ready["invite"].partition("@")
        false = f"{address}@{'ab' * 32}"
        unknown = await refused_start(tmp_path / "fresh", "--join", false)
    assert f"not to {chain[:12]}" in belongs.sentence
    assert "--home" in belongs.hint
    assert contents(other) == before
    assert unknown.code == FAILED
    assert not (tmp_path / "fresh" / "genesis.json").exists()
    assert_nothing_left([other, tmp_path / "fresh"])


def contents(home: Path) -> dict[str, bytes]:
    """Return what a home must not lose."""
    return {name: (home / name).read_bytes() for name in KEPT if (home / name).exists()}


async def test_a_port_in_use_and_a_home_in_use(tmp_path: Path) -> None:
    home = tmp_path / "a"
    async with daemon(home) as ready:
        address = ready["invite"].partition("/p2p/")[0]
        by_peer = await refused_start(tmp_path / "b", "--listen", address, "--json", local=False)
        status = ready["status_url"].rstrip("/").rpartition(":")[2]
        page = await refused_start(tmp_path / "b", "--status-port", status)
        in_use = await refusal("cli.peer", "start", "--home", home, *LOCAL)
        with Home(home).lock_path.open() as lock:
            assert f"process id {lock.read().strip()}" in in_use.sentence
        assert (await printed("cli.peer", "status", "--home", str(home), "--json"))["invite"] == ready["invite"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        by_other = await refused_start(tmp_path / "b", "--listen", f"/ip4/127.0.0.1/tcp/{port}", local=False)
    for found in (by_peer, by_other):
        assert "Cannot listen on" in found.sentence
        assert "--listen" in found.hint
    assert f"status port {status}" in page.sentence
    assert_nothing_left([home, tmp_path / "b"])


async def test_a_key_that_others_can_read(tmp_path: Path) -> None:
    home = tmp_path / "a"
    await printed("cli.peer", "init", "--home", str(home), "--json")
    before = contents(home)
    (home / "key").chmod(0o644)
    found = await refused_start(home)
    assert "open to other users" in found.sentence
    assert found.hint == f"chmod 600 {home / 'key'}"
    assert (await refusal("cli.peer", "key", "--home", home)) == found
    assert contents(home) == before
    assert_nothing_left([home])


async def test_a_damaged_chain(tmp_path: Path) -> None:
    home = tmp_path / "a"
    async with daemon(home):
        await height_of(home, 2)
    database = home / "chain.db"
    whole, first = database.read_bytes(), await block(database, 1)
    for damaged in (b"this is no database\n" * 500, whole[: len(whole) // 2]):
        database.write_bytes(damaged)
        before = contents(home)
        found = await refused_start(home)
        assert "The chain database cannot be used" in found.sentence
        assert "signing.db" in found.hint
        assert contents(home) == before
        assert "damaged" in (await refusal("cli.chain", "db", "check", "--db", database)).sentence
    database.write_bytes(whole)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE blocks SET block = zeroblob(length(block)) WHERE height = 1")
        connection.commit()
    assert "damaged" in (await refusal("cli.chain", "db", "check", "--db", database)).sentence
    database.unlink()
    async with daemon(home):  # the signing record knows what it signed: the chain is the same again
        await height_of(home, 3)
    assert (await inspected(database, "db", "check"))["ok"] is True
    assert await block(database, 1) == first


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
async def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    python = f"{sys.executable} -m cli.peer start --home {disk}/a {' '.join(LOCAL)}"
    script = f"""
        mount -t tmpfs -o size=240k none {disk} || exit 77
        {python}
        printf '{{"event": "ended", "code": %d}}\\n' $?
        mount -o remount,size=16m {disk}
        exec {python}
    """
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if (await trio.run_process([*namespace, "true"], capture_stderr=True, check=False)).returncode:
        pytest.skip("this machine has no user namespaces")
    log = tmp_path / "log.txt"
    with log.open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            [*namespace, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
        )
    running = Child("full disk", process, log)
    try:
        before = await running.expect("ready", PATIENCE)
        assert (await running.expect("ended", PATIENCE))["code"] == FAILED
        said = log.read_text()
        after = await running.expect("ready", PATIENCE)
    finally:
        await running.stop()
        assert process.stdout is not None
        await process.stdout.aclose()
    assert "error: The disk is full.\nhint: free some space and start again" in said
    assert "Traceback" not in said
    assert (after["peer"], after["invite"].partition("@")[2]) == (before["peer"], before["invite"].partition("@")[2])
    assert after["height"] > 0
    assert process.returncode == 0


async def inspected(database: Path, *query: str) -> Any:
    return (await printed("cli.chain", *query, "--db", str(database), "-o", "json"))["data"]


async def block(database: Path, height: int) -> Any:
    return (await inspected(database, "block", str(height)))["hash"]


async def height_of(home: Path, height: int) -> None:
    """Wait until a running peer has that block."""
    with trio.fail_after(PATIENCE):
        while int(DaemonSource(home).ask("status", {})["height"]) < height:
            await trio.sleep(0.1)
