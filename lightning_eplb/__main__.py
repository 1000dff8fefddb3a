"""``python -m lightning_eplb``, which is also installed as ``lightning-eplb``."""

import sys

from lightning_eplb.cli import main

if __name__ == "__main__":
    sys.exit(main())
