"""The home folder of one peer: its key, its lock, its genesis and where everything else lives."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from chain.genesis import Genesis, from_json, to_json
from chain.keys import PrivateKey
from tdml_p2p.errors import UserError

KEY_BYTES = 32
MAX_GENESIS_BYTES = 32 << 20


def default_home() -> Path:
    """Return the home folder of a peer whose owner names none."""
    return platformdirs.user_data_path("tdml", appauthor=False)


class Home:
    """Paths below one folder and the files that a peer keeps there; nothing is written outside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key_path = path / "key"
        self.next_key_path = path / "key.next"
        self.lock_path = path / "lock"
        self.genesis_path = path / "genesis.json"
        self.config_path = path / "config.toml"
        self.socket_path = path / "control.sock"
        self.chain_path = path / "chain.db"
        self.signing_path = path / "signing.db"
        self.blobs_path = path / "blobs"
        self.evidence_path = path / "evidence"
        self.tasks_path = path / "tasks"

    def create(self) -> None:
        """Make the folder (0700) if it is missing; raise `UserError` when that cannot be done."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The home folder {self.path} cannot be made: {error.strerror}.",
                "choose another folder with --home DIR",
            ) from error
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(
                f"The home folder {self.path} is not writable by this user.",
                "make it yours with chown, or choose another folder with --home DIR",
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this home for the calling process; raise `UserError` naming the process that has it."""
        descriptor = self._take_lock()
        try:
            yield
        finally:
            self.lock_path.unlink(missing_ok=True)
            os.close(descriptor)

    def _take_lock(self) -> int:
        while True:
            descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The former holder unlinks the file as it leaves: a lock on an unlinked file is void.
                if _is_same_file(descriptor, self.lock_path):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    return descriptor
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                os.close(descriptor)
                raise UserError(
                    f"The home {self.path} is in use by the peer with process id {holder}.",
                    "stop that peer first, or give this one a home of its own with --home DIR",
                ) from None
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def load_key(self) -> PrivateKey:
        """Return this peer's key, made on the first call; raise `UserError` for one others can read."""
        return _read_key(self.key_path) or _create_key(self.key_path)

    def load_next_key(self, *, make: bool = False) -> PrivateKey | None:
        """Return the key that is to follow, made durably if wanted; raise `UserError` as `load_key`."""
        return _read_key(self.next_key_path) or (_create_key(self.next_key_path) if make else None)

    def swap_keys(self, name: str) -> None:
        """Put the next key in the place of the key, which is kept in a file of this name."""
        kept = self.path / name
        if not kept.exists():
            os.link(self.key_path, kept)
        os.replace(self.next_key_path, self.key_path)
        _sync_folder(self.path)

    def load_genesis(self) -> Genesis | None:
        """Return the genesis of this home's network, None before there is one; raise `UserError`."""
        try:
            with self.genesis_path.open("rb") as file:
                text = file.read(MAX_GENESIS_BYTES + 1)
        except FileNotFoundError:
            return None
        return read_genesis(text, str(self.genesis_path))

    def save_genesis(self, genesis: Genesis) -> None:
        """Write the genesis durably; raise `UserError` when this home belongs to another network."""
        present = self.load_genesis()
        if present is not None:
            if present.chain_id != genesis.chain_id:
                raise other_network(self.path, present.chain_id, genesis.chain_id)
            return
        _write_new(self.genesis_path, to_json(genesis).encode())


def read_genesis(text: bytes, source: str) -> Genesis:
    """Return the genesis in the JSON `text`; raise `UserError` naming `source` when it is none."""
    try:
        if len(text) > MAX_GENESIS_BYTES:
            raise ValueError("it is too large")
        return from_json(text.decode("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{source} is not a genesis file: {str(error).rstrip('.')}.",
            "restore it, or use a new home and join the network again with --join INVITE",
        ) from error


def other_network(path: Path, ours: bytes, theirs: bytes) -> UserError:
    """The refusal of a network that is not the home's own."""
    return UserError(
        f"The home {path} belongs to network {ours.hex()[:12]}, not to {theirs.hex()[:12]}.",
        "use another home for the other network: --home DIR",
    )


def _read_key(path: Path) -> PrivateKey | None:
    """Return the key in a file, None where there is none; raise `UserError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable_key(path, error) from error
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise UserError(f"The key file {path} is open to other users (mode {mode:04o}).", f"chmod 600 {path}")
        text = file.read(4 * KEY_BYTES)
    try:
        seed = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        seed = b""
    if len(seed) != KEY_BYTES:
        raise UserError(
            f"The key file {path} does not hold a key.",
            "restore it from a backup; removing it makes a new identity with an empty account",
        )
    return PrivateKey(seed)


def _create_key(path: Path) -> PrivateKey:
    key = PrivateKey.generate()
    _write_new(path, f"{key.seed.hex()}\n".encode())
    return key


def _unreadable_key(path: Path, error: OSError) -> UserError:
    if error.errno == errno.ELOOP:
        return UserError(f"The key file {path} is a symbolic link.", "put the key itself into the home")
    return UserError(
        f"The key file {path} cannot be read: {error.strerror}.",
        f"make it yours: chown $USER {path} && chmod 600 {path}",
    )


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_new(path: Path, data: bytes) -> None:
    """Create `path` (0600) with `data`, whole and durable or not at all; raise `FileExistsError`."""
    draft = path.with_name(f".{path.name}.new")
    # A draft that a killed process left is worthless; the lock says that nobody is writing it now.
    draft.unlink(missing_ok=True)
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
