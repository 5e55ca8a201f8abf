"""``metaprune ui``: the web page of MLflow on the store where commands keep their runs."""

import subprocess
from typing import Annotated

import typer

from metaprune.cli.options import Debug


def ui(
    tracking_uri: Annotated[str | None, typer.Option(metavar="URI", help="MLflow store. [sqlite:///mlflow.db]")] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen. [127.0.0.1]")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Where to listen. [5000]")] = 5000,
    debug: Debug = False,
) -> int:
    """Show past runs in the browser, until Ctrl-C. Nobody but this machine can see them unless --host says so."""
    from metaprune.cli.screen import Screen
    from metaprune.errors import ConfigError, ResourceError
    from metaprune.tracking import ui_command, ui_environment

    if not 1 <= port <= 65535:
        raise ConfigError(f"`1 <= port <= 65535` must hold, but port={port}.")
    command = ui_command(tracking_uri, host, port)
    if _in_use(host, port):
        raise ResourceError(f"a free port is needed, but {port} on {host} is taken. Give another one with --port.")
    Screen(as_json=False).say(f"Runs are shown on http://{host}:{port} in a few seconds. Ctrl-C ends it.")
    with subprocess.Popen(command, env=ui_environment()) as server:
        try:
            code = server.wait()
        except KeyboardInterrupt:  # this is how it is meant to end
            server.terminate()
            server.wait()
            return 0
    if code:
        raise ResourceError(f"the server of MLflow ended with code {code}; what it said stands above.")
    return 0


def _in_use(host: str, port: int) -> bool:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
