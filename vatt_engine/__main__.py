"""`python -m vatt_engine <verb>` is `vatt <verb>`."""

import sys

from vatt_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
