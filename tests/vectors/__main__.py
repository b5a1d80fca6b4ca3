"""Write the vectors: `python -m tests.vectors`. A changed file is a changed protocol."""

from tests.vectors.make import FILES, path_of, text_of

for name in FILES:
    path_of(name).write_text(text_of(name))
