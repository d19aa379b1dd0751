"""The web server of `megasft dashboard`: five files, and the numbers of the runs as JSON. It only reads."""

import contextlib
import ipaddress
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megasft.board import plots
from megasft.board.curves import bin_width, curves, extent, rounded
from megasft.board.describe import flat_settings, state_of
from megasft.board.run_folder import Run, Runs
from megasft.board.table import AXES, Axis
from megasft.messages import UserError, say

STATIC = Path(__file__).parent / "static"
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/colors.css": ("colors.css", "text/css; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/uplot.min.css": ("uplot.min.css", "text/css; charset=utf-8"),
    "/uplot.min.js": ("uplot.min.js", "text/javascript; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/panels.js": ("panels.js", "text/javascript; charset=utf-8"),
    "/format.js": ("format.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
LONGEST_QUERY = 8000  # characters
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def serve(runs: Runs, host: str, port: int, allowed_hosts: list[str]) -> None:
    """Serve the page until Ctrl-C. Raises UserError where the address cannot be used."""
    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot be used ({reason}); --port 0 takes a free one") from None
    port = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    if not _is_loopback(host):
        say(f"--host {host}: everyone who reaches this port can read these runs; there is no password")
    say(f"http://{shown}:{port}/ shows the runs ({len(runs.all())} so far); Ctrl-C ends it")
    config = uvicorn.Config(
        application(runs, [host, *allowed_hosts]),
        log_level="warning", access_log=False, proxy_headers=False, server_header=False, lifespan="off", ws="none",
        http="h11", h11_max_incomplete_event_size=32 << 10, limit_concurrency=200, timeout_graceful_shutdown=1,
    )  # fmt: skip
    runs.follow()
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    runs.stop()


def application(runs: Runs, allowed_hosts: list[str]) -> ASGIApp:
    """The ASGI application. `allowed_hosts`: names in a request's Host header beside those of this machine's loopback
    and the address that was connected to.
    """
    api = _Api(runs)
    routes = [Route(path, _file(*file), methods=["GET"]) for path, file in PAGE.items()]
    for path, answer in [
        ("/api/plots", api.plots),
        ("/api/runs", api.runs),
        ("/api/curves", api.curves),
        ("/api/run", api.run),
        ("/api/experts", api.experts),
    ]:
        routes.append(Route(path, _json(runs, answer), methods=["GET"]))
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refused})
    return _Guard(app, frozenset(name.lower().rstrip(".") for name in (*LOOPBACK, *allowed_hosts)))


class _Guard:
    """Refuses requests for other hosts (DNS rebinding) and long addresses, and adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("only GET and HEAD\n", 405, {"allow": "GET, HEAD"})
        names = [value for name, value in scope["headers"] if name == b"host"]
        if len(names) != 1 or not self._knows(names[0].decode("latin-1"), scope.get("server")):
            return PlainTextResponse("another host's name; see --allow-host\n", 421)
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_QUERY:
            return PlainTextResponse("the address is too long\n", 414)
        return None

    def _knows(self, header: str, server: tuple[str, int | None] | None) -> bool:
        name, colon, port = header.rpartition(":") if not header.endswith("]") else (header, "", "")
        name = (name if colon else header).lower().rstrip(".")
        if colon and not (port.isascii() and port.isdigit()):
            return False
        name = name.removeprefix("[").removesuffix("]")
        return name in self._hosts or (server is not None and _is_address(server[0]) and name == server[0].lower())


class _Api:
    """What the page asks for. A parameter that makes no sense is answered 400, an unknown run 404."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def plots(self, request: Request) -> Any:
        """All plots there can be."""
        return plots.described()

    def runs(self, request: Request) -> Any:
        """The state of each run."""
        found = []
        for run in self._runs.all():
            with run.lock:
                found.append(state_of(run))
        return {"runs": found, "folders": [str(folder) for folder in self._runs.folders]}

    def curves(self, request: Request) -> Any:
        """Parameters: `runs`: ids, each with `:generation:after` where its curves are known up to there; `plots`: ids;
        `axis`; `from`, `to`: a window; `points`: the most bins; `width`: that of the known curves; `bands`: 0 leaves
        the lowest and highest values out.
        """
        asked = request.query_params
        chosen = plots.chosen(asked.get("plots", "").split(","))
        axis: Axis = next((name for name in AXES if name == asked.get("axis", "step")), "step")
        window = _number(asked.get("from"), -1e300), _number(asked.get("to"), 1e300)
        bands = asked.get("bands") != "0"
        points = int(min(1000, max(10, _number(asked.get("points"), 300))))
        known: dict[Run, tuple[str, float]] = {}  # generation, after
        for item in filter(None, asked.get("runs", "").split(",")):
            run_id, _, place = item.partition(":")
            generation, _, after = place.partition(":")
            known[self._run(run_id)] = generation, _number(after or None, -1e300)
        low, high, most = extent([run.content for run in known], axis)
        inside = max(low, window[0]), min(high, window[1])
        # The narrowest bins that show all there is need none; within a window of it the table's buckets are few enough.
        width = 0.0 if most <= points else bin_width(*inside, points)
        same = _number(asked.get("width"), -1.0) == width
        found = {}
        for run, (known_generation, known_after) in known.items():
            with run.lock:
                version = run.version
                start = known_after if same and known_generation == str(version[0]) else -1e300
                content = run.content
                columns = {plot.id: plots.resolve(plot, set(content.keys)) for plot in chosen}
                found[run.id] = {
                    "version": version,
                    "tail": start > -1e300,
                    "plots": {
                        name: curves(content, list(keys), axis, window, width, start, bands)
                        for name, keys in columns.items()
                    },
                }
        return {"width": width, "runs": found}

    def run(self, request: Request) -> Any:
        """One run's settings, events and answers."""
        run = self._run(request.query_params.get("id", ""))
        with run.lock:
            noted = [*run.content.events, *run.content.checkpoints]
        return {
            "config": flat_settings(run.config()),
            "about": flat_settings(run.about()),
            "events": sorted(noted, key=lambda event: (event["time"], event["step"])),
            "answers": run.answers(),
        }

    def experts(self, request: Request) -> Any:
        """The load of one run at one of its frames, the last one by default."""
        run = self._run(request.query_params.get("id", ""))
        with run.lock:
            frames = list(run.content.frames)
        number = int(_number(request.query_params.get("frame"), len(frames) - 1))
        if not frames:
            return {"steps": [], "tokens": []}
        step, tokens = frames[min(max(number, 0), len(frames) - 1)]
        return {"steps": [of for of, _ in frames], "step": step, "tokens": [rounded(layer) for layer in tokens]}

    def _run(self, run_id: str) -> Run:
        run = self._runs.get(run_id)
        if run is None:
            raise HTTPException(404, "no such run")
        return run


def _number(text: str | None, default: float) -> float:
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) <= 1e300:
        raise HTTPException(400, "not a number, or too large")
    return value


def _json(runs: Runs, answer: Callable[[Request], Any]) -> Callable[[Request], Response]:
    """An endpoint in a thread of its own; ASCII, since a name may hold what is no UTF-8."""

    def endpoint(request: Request) -> Response:
        with runs.answering():
            text = json.dumps(answer(request), allow_nan=False, separators=(",", ":"))
        return Response(text, media_type="application/json")

    return endpoint


def _file(name: str, media_type: str) -> Callable[[Request], Response]:
    content = (STATIC / name).read_bytes()

    def endpoint(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return endpoint


def _refused(request: Request, error: Exception) -> Response | Awaitable[Response]:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{error.detail}\n", error.status_code, dict(error.headers or {}))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
