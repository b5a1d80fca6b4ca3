#!/bin/sh
# Creates the virtual environment and installs everything, after saying what the machine lacks.
set -eu
missing=0

need() { # need WHAT HINT
    echo "missing: $1" >&2
    echo "  get it with: $2" >&2
    missing=1
}

if ! command -v "$PYTHON" >/dev/null 2>&1; then
    for candidate in python3.11 python3.12 python3; do
        if command -v "$candidate" >/dev/null 2>&1; then PYTHON=$candidate; break; fi
    done
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    need "Python 3.11 or newer" "apt-get install python3.11 python3.11-venv (or set PYTHON=/path/to/python3.11)"
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
    need "Python's venv module" "apt-get install python3.11-venv"
command -v gcc >/dev/null 2>&1 || need "gcc (one dependency is built from source)" "apt-get install gcc"
if command -v gcc >/dev/null 2>&1; then
    echo '#include <gmp.h>' | gcc -E -x c - >/dev/null 2>&1 ||
        need "the GMP headers (gmp.h)" "apt-get install libgmp-dev   # Fedora: dnf install gmp-devel"
fi
[ "$missing" = 0 ] || exit 1

"$PYTHON" -m venv "$VENV"
"$VENV/bin/pip" install --quiet --constraint constraints.txt --editable '.[hf,data,plot,dev]'
