"""The text of a corpus as a stream of pieces: text files and folders, JSON lines, parquet, saved data sets.

Nothing is held beyond a piece and what a reader buffers. What the pieces are depends on the content alone.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from blake3 import blake3

from trainer.errors import DataError, DataReason

_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_PIECE_BYTES = 1 << 18
_MAX_LINE = 64 << 20
_ROWS = 256
_HINT = "Give text files, JSON lines, parquet, a saved `datasets` folder, or a folder of such files."
_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Corpus:
    """Where text comes from: `field` names it in JSON lines and tables; 0 bytes a path is no `limit`."""

    paths: tuple[Path, ...]
    field: str = "text"
    limit: int = 0

    def pieces(self) -> Iterator["Piece"]:
        """Yield the text in its training order, at most `limit` bytes of each path; raise `DataError`.

        Of a folder, files that are not UTF-8 text are skipped; the order is by the hash of their relative
        paths, so that a part of a large folder is a fair sample of it.
        """
        for path in self.paths:
            if not path.exists():
                raise DataError(DataReason.MISSING, f"There is no file or folder {path}.", _HINT)
            total = 0
            for piece in _pieces_of(path, self.field):
                size = len(piece.text.encode())
                if self.limit and total + size >= self.limit:
                    part = piece.text.encode()[: self.limit - total].decode(errors="ignore")
                    yield Piece(part, is_end=True)
                    total += len(part)
                    break
                yield piece
                total += size
            if not total:
                raise DataError(DataReason.EMPTY, f"There is no text in {path}.", _HINT)

    def texts(self) -> Iterator[str]:
        """Yield the text of the pieces."""
        return (piece.text for piece in self.pieces())


class Piece(NamedTuple):
    """A stretch of a document, valid Unicode; a long document has several, and the last `is_end`."""

    text: str
    is_end: bool


def _pieces_of(path: Path, field: str) -> Iterator[Piece]:
    arrow = data_set_files(path)
    if arrow:
        for file in arrow:
            yield from _from_arrow(file, field)
        return
    for file in _files(path):
        if file.suffix == ".parquet":
            yield from _from_parquet(file, field)
        elif file.suffix in _JSON_LINES:
            yield from _from_json_lines(file, field)
        else:
            yield from _from_text(file, is_alone=file == path)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=_unreadable):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        found.extend(Path(folder) / name for name in names if not name.startswith("."))
    return sorted(
        (file for file in found if file.is_file()),
        key=lambda file: blake3(file.relative_to(path).as_posix().encode(errors="surrogateescape")).digest(),
    )


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(DataReason.UNREADABLE, f"{error.filename} cannot be read: {error.strerror}.", _HINT) from None


def _from_text(file: Path, is_alone: bool) -> Iterator[Piece]:
    held = ""
    try:
        with file.open("rb") as stream:
            for number, (start, data) in enumerate(_blocks(stream)):
                text = _decoded(data)
                if text is None and number:
                    raise DataError(DataReason.NOT_TEXT, f"{file} is not UTF-8 text from byte {start} on.", _HINT)
                if text is None:
                    if is_alone:
                        raise DataError(DataReason.NOT_TEXT, f"{file} is not UTF-8 text.", _HINT)
                    return
                if held:
                    yield Piece(held, is_end=False)
                held = text
                if not number and not text.strip():
                    held = ""
    except OSError as error:
        _unreadable(error)
    if held:
        yield Piece(held, is_end=True)


def _blocks(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield about 256 KiB each, cut after a line, else between characters, and where each one starts."""
    rest, start = b"", 0
    while block := stream.read(_PIECE_BYTES):
        data = rest + block
        is_last = len(block) < _PIECE_BYTES
        cut = len(data) if is_last else data.rfind(b"\n") + 1 or _between_characters(data)
        yield start, data[:cut]
        rest, start = data[cut:], start + cut
    if rest:
        yield start, rest


def _between_characters(data: bytes) -> int:
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] >= 0xC0:  # the first byte of a character of several
            return len(data) - back
        if data[-back] < 0x80:
            break
    return len(data)


def _decoded(data: bytes) -> str | None:
    if b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _from_json_lines(file: Path, field: str) -> Iterator[Piece]:
    try:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(_MAX_LINE):
                number += 1
                if line.strip():
                    yield from _cut(_json_text(line, field, f"Line {number} of {file}"))
    except OSError as error:
        _unreadable(error)


def _json_text(line: bytes, field: str, name: str) -> str:
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise DataError(
            DataReason.UNREADABLE,
            f"{name} is not a JSON object with a `{field}` string.",
            f'Each line must look like {{"{field}": "…"}}; --text-field names another field.',
        )
    return text


def _cut(text: str) -> Iterator[Piece]:
    """Yield a document of any length in pieces that are cut after lines where that is possible."""
    text = text.encode(errors="replace").decode()  # half a surrogate pair has no UTF-8 form
    if not text.strip():
        return
    while len(text) > _PIECE_BYTES:
        cut = text.rfind("\n", 0, _PIECE_BYTES) + 1 or _PIECE_BYTES
        yield Piece(text[:cut], is_end=False)
        text = text[cut:]
    yield Piece(text, is_end=True)


def _from_parquet(file: Path, field: str) -> Iterator[Piece]:
    arrow = load_pyarrow()
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_column(arrow, table.schema_arrow, field, file)
            for batch in table.iter_batches(_ROWS, columns=[field]):
                yield from _rows(batch.column(0))
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def data_set_files(path: Path) -> list[Path]:
    """Return the arrow files of a folder that `datasets` saved, its train split if it has several; else none."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            path /= "train" if "train" in splits else str(splits[0])
        if not (path / "state.json").is_file() or not (path / "dataset_info.json").is_file():
            return []
        files = json.loads((path / "state.json").read_bytes())["_data_files"]
        return [path / Path(file["filename"]).name for file in files]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise DataError(
            DataReason.UNREADABLE, f"{path} is a damaged `datasets` folder.", "Save it again with save_to_disk."
        ) from None


def _from_arrow(file: Path, field: str) -> Iterator[Piece]:
    arrow = load_pyarrow()
    try:
        with arrow.memory_map(str(file)) as source, arrow.ipc.open_stream(source) as batches:
            _check_column(arrow, batches.schema, field, file)
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS):
                    yield from _rows(batch.column(field).slice(start, _ROWS))
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from None


def _rows(column: Any) -> Iterator[Piece]:
    texts: Iterable[str | None] = column.to_pylist()
    for text in texts:
        if text is not None:
            yield from _cut(text)


def _check_column(arrow: Any, schema: Any, field: str, file: Path) -> None:
    if field not in schema.names:
        names = ", ".join(schema.names[:8])
        raise DataError(
            DataReason.FIELD, f"{file} has no column `{field}`.", f"Name one of its columns with --text-field: {names}."
        )
    kind = schema.field(field).type
    kinds = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view, arrow.types.is_null)
    if not any(is_kind(kind) for is_kind in kinds):
        raise DataError(
            DataReason.FIELD, f"The column `{field}` of {file} holds {kind}, not text.", "Name one with --text-field."
        )


def load_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            DataReason.LIBRARY, "Tables need pyarrow, which is not installed.", "Install it: pip install 'tdml[data]'."
        ) from None
    return pyarrow


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(DataReason.UNREADABLE, f"{file} cannot be read: {str(error)[:200]}.", _HINT)
