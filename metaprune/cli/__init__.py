"""The command line: one file per verb.

Nothing heavy is imported before a verb knows that it has work to do, so that ``metaprune --help`` answers at once.
"""

import os
import sys


def main() -> None:
    """Entry point of ``metaprune``."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:  # answered here, because even the parser takes longer to import than the rest
        from metaprune import __version__

        print(f"metaprune {__version__}")
        return
    # Before torch is loaded: threads that spin while they wait make small networks thirty times slower as soon as other
    # processes want the same cores, and cost nothing to do without where they do not.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from metaprune.cli.app import run

    sys.exit(run(arguments))
