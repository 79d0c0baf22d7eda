#!/usr/bin/env bash
# tensorflow-checkpoint-reader 0.2.2, which reads TensorFlow 2 checkpoints without TensorFlow, cannot be imported on Python
# 3.11 or newer: it asks for inspect.ArgSpec, which Python 3.11 removed. (It also needs six, which it does not declare, and
# NumPy below 2.)
#
# Expected: a reader, since the package names Python 3.6 to 3.15 as supported. Seen: AttributeError.
#
# What it taught: interop.read_tf_checkpoint is a reader of our own, of Python and NumPy alone; its tests hold what that
# package leaves out, checksums and indexes of several blocks (tests/interop/test_tf_bundle.py).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q --disable-pip-version-check tensorflow-checkpoint-reader==0.2.2 \
    numpy==1.26.4 six==1.17.0
cat > "$place/read.py" <<'PYTHON'
import sys
from importlib.metadata import version

try:
    from tensorflow_checkpoint_reader import py_checkpoint_reader  # noqa: F401
except AttributeError as error:
    seen = str(error)
else:
    seen = "a reader"
print(f"{version('tensorflow-checkpoint-reader')} on Python {sys.version.split()[0]}: {seen}")
sys.exit("ArgSpec" not in seen)
PYTHON
"$place/venv/bin/python" "$place/read.py"
