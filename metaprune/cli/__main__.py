"""``python -m metaprune.cli``, for machines where the folder of scripts is not in PATH."""

from metaprune.cli import main

main()
