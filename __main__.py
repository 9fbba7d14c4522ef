"""`python -m dgemma`, and the script `dgemma`."""

from __future__ import annotations

import os
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line as this process."""
    try:
        from .cli import main
        from .cli.process import run as run_process
    except KeyboardInterrupt:  # in the first moments
        os.write(2, b"dgemma: interrupted\n")
        os._exit(130)
    run_process(lambda: main(prog_name="dgemma"))


if __name__ == "__main__":
    run()
