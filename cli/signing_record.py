"""`tdml-peer signing-record`: a validator moves to another machine without ever signing in two places."""

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from cli.common import default_home, new_app
from tdml_p2p.errors import FAILED, USAGE, UserError

app = new_app("signing-record", "Move the record of signed votes, and with it the right to sign, to another machine.")
Home = Annotated[Path | None, Parameter(help="Home folder of the peer, which must not run.")]
File = Annotated[Path, Parameter(name="file", help="The file to write or to read.")]


@app.command(name="export")
def export(file: File, *, home: Home = None) -> None:
    """Write the record to FILE and close it here for good: this home never signs again with its key."""
    from chain.signing import RecordMissing, SigningRecord

    folder = _folder(home)
    if file.exists():
        raise UserError(f"{file} exists.", "name a new file: nothing is overwritten", USAGE)
    with folder.lock():
        try:
            record = SigningRecord.open_existing(folder.path / "signing.db", folder.load_key().sign)
        except RecordMissing as error:
            raise UserError(f"{error}.", "only a peer that has signed has a record", FAILED) from None
        try:
            _write(file, record.export())
        finally:
            record.close()
    print(f"exported to {file}; import it where the same key is, and keep no copy")


@app.command(name="import")
def import_(file: File, *, home: Home = None) -> None:
    """Take over a record that was exported elsewhere; this home must hold the same key, and no record."""
    from chain.codec import DecodeError
    from chain.signing import RecordMissing, SigningRecord

    folder = _folder(home)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.", "signing-record export writes it", USAGE) from None
    with folder.lock():
        try:
            height = SigningRecord.import_(folder.path / "signing.db", data, folder.load_key().account)
        except FileExistsError:
            raise UserError("This home has a signing record already.", "two records are never joined", FAILED) from None
        except DecodeError as error:
            raise UserError(f"{file} is no exported record: {error}.", "export it again", FAILED) from None
        except RecordMissing as error:
            raise UserError(f"Not imported: {error}.", "copy the key file of the old home first", FAILED) from None
    print(f"imported; the newest vote in it is of height {height}")


def _folder(home: Path | None) -> Any:
    from tdml_p2p.home import Home as HomeFolder

    folder = HomeFolder(home or default_home())
    folder.create()
    return folder


def _write(file: Path, data: bytes) -> None:
    """Make a file that only its owner can read, whole and durable before the command ends."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(descriptor)
