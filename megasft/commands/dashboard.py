"""`megasft dashboard` and `megasft report`."""

from pathlib import Path
from typing import Annotated

import typer

from megasft.commands.app import app


@app.command(
    epilog="""\b
Examples:
  megasft dashboard                         all runs in runs/
  megasft dashboard runs/demo runs/other
  megasft dashboard /data/runs --port 9000
"""
)
def dashboard(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN_OR_PARENT ...]", help="Run directories, or folders that hold them.  [default: runs]"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to listen on; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="The port; 0 takes a free one.")] = 8420,
    allow_host: Annotated[
        list[str],
        typer.Option(
            metavar="NAME", help="Answer requests for this host name too, as behind a proxy; may be repeated."
        ),
    ] = [],  # noqa: B006
) -> None:
    """Show runs in a browser, live, and compare them.

    Reads nothing outside the given folders and writes nothing. There is no password: by default only this machine can
    connect; from another, use `ssh -L 8420:127.0.0.1:8420`.
    """
    from megasft.board.run_folder import Runs
    from megasft.board.server import serve

    serve(Runs(runs or [Path("runs")]), host, port, allow_host)


@app.command(
    epilog="""\b
Examples:
  megasft report runs/demo
  megasft report runs/demo --out demo.html
"""
)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, of a run that is done or not.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to write.  [default: report.html in the run directory]"),
    ] = None,
) -> None:
    """Write one HTML file that says all of a run, to send to someone: no scripts, nothing loaded from elsewhere.

    A run that ends writes it too. It holds the settings, with their paths, and the answers, which quote the validation
    data.
    """
    from megasft.board.report import write_report

    print(write_report(run, out))
