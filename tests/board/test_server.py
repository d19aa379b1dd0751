"""The dashboard's server: what it answers, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from megasft.board.run_folder import Runs
from megasft.board.server import HEADERS, PAGE, application
from tests.support.made_runs import make_run

SECRET = "the secret outside"
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
API = ["/api/plots", "/api/runs", "/api/curves", "/api/run", "/api/experts"]


def client(runs: Runs, *hosts: str) -> TestClient:
    while runs.advance():
        pass
    return TestClient(application(runs, list(hosts)), base_url="http://127.0.0.1:8420", raise_server_exceptions=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that nobody may read, and beside it runs/ with two runs and links that lead out."""
    root = tmp_path_factory.mktemp("root")
    (root / "secret.txt").write_text(SECRET)
    make_run(root / "outside", steps=20)
    (root / "outside" / "config.toml").write_text(f'[job]\nmodel = "{SECRET}"\n')
    make_run(root / "runs" / "first", steps=120)
    make_run(root / "runs" / "second", steps=60, seed=1, finished=False)
    (root / "runs" / "link").symlink_to(root / "outside")
    leaking = root / "runs" / "leaking"
    leaking.mkdir()
    for name in ("config.toml", "about.json", "answers.json"):
        (leaking / name).symlink_to(root / "secret.txt")
    (leaking / "metrics.jsonl").symlink_to(root / "outside" / "metrics.jsonl")
    return root


@pytest.fixture(scope="module")
def web(folder: Path) -> TestClient:
    return client(Runs([folder / "runs"]))


def test_every_file_and_answer_has_the_headers_that_keep_scripts_out(web):
    for path in [*PAGE, "/api/plots", "/api/runs", "/api/curves", "/nothing"]:
        found = web.get(path)
        assert found.status_code == (404 if path == "/nothing" else 200), path
        for name, value in HEADERS.items():
            assert found.headers[name] == value
    policy = web.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_page_refers_to_its_own_files_only_and_has_no_script_or_style_in_it(web):
    page = web.get("/").text
    assert set(re.findall(r'(?:src|href)="([^"]+)"', page)) <= {*PAGE, "#main"}
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", page)
    for path in PAGE:
        text = web.get(path).text
        assert "innerHTML" not in text
        assert "eval(" not in text
        assert not re.search(r"https?://(?!github\.com/leeoniya|www\.w3\.org)", text), path


def test_runs_are_listed_with_their_state_and_progress(web):
    found = {run["name"]: run for run in web.get("/api/runs").json()["runs"]}
    assert set(found) == {"first", "second", "leaking"}
    assert found["first"]["state"] == "finished"
    assert (found["first"]["step"], found["first"]["steps"]) == (120, 120)
    assert (found["second"]["step"], found["second"]["steps"]) == (60, 120)
    assert {"loss", "split", "memory", "utilization", "mfu", "norm_a"} <= set(found["first"]["plots"])


def test_curves_of_a_run_are_the_numbers_of_its_file_and_a_tail_adds_what_is_new(folder, tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    runs = Runs([tmp_path])
    web = client(runs)
    run_id = web.get("/api/runs").json()["runs"][0]["id"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    first = web.get("/api/curves", params={"plots": "loss,memory", "runs": run_id}).json()
    curve = first["runs"][run_id]["plots"]["loss"]["train.loss"]
    assert curve["x"] == list(range(1, 51))
    assert curve["mean"] == pytest.approx(losses, rel=1e-5)  # six digits are sent
    assert set(first["runs"][run_id]["plots"]["memory"]) == {
        "train.memory_allocated", "train.memory_reserved", "train.memory_peak", "train.rss"}  # fmt: skip
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": 51, "time": lines[-1]["time"] + 9, "loss": 0.25}) + "\n")
    assert runs.advance()
    known = f"{run_id}:{first['runs'][run_id]['version'][0]}:50"
    tail = web.get("/api/curves", params={"plots": "loss", "runs": known, "width": first["width"]}).json()["runs"][
        run_id
    ]
    assert tail["tail"]
    assert tail["plots"]["loss"]["train.loss"] == {"x": [50, 51], "mean": [pytest.approx(losses[-1], rel=1e-5), 0.25]}


def test_lines_that_are_taken_back_are_sent_again_from_the_start(tmp_path):
    run = make_run(tmp_path / "run", steps=50)
    runs = Runs([tmp_path])
    web = client(runs)
    before = web.get("/api/runs").json()["runs"][0]
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "time": 1.0, "loss": 9.0}\n')
    while runs.advance():
        pass
    found = web.get(
        "/api/curves", params={"plots": "loss", "runs": f"{before['id']}:{before['version'][0]}:50", "width": 0}
    )
    part = found.json()["runs"][before["id"]]
    assert not part["tail"]
    assert part["plots"]["loss"]["train.loss"]["mean"] == [9.0]


def test_a_run_of_today_without_the_newer_keys_is_shown(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    line = {"kind": "train", "step": 1, "time": 5.0, "loss": None, "lr": 1e-3, "grad_norm": 0.5, "epoch": 0.1, "tokens": 10,
            "supervised_tokens": 4, "seconds": 0.5, "data_wait": 0.01, "tokens_per_second": 20.0}  # fmt: skip
    (run / "metrics.jsonl").write_text(
        json.dumps(line) + '\nnot json\n[1]\n{"kind": 1}\n' + json.dumps(line | {"loss": 3.0, "step": 2}) + "\n{"
    )
    web = client(Runs([run]))
    (found,) = web.get("/api/runs").json()["runs"]
    assert found["last"]["train.loss"] == 3.0
    assert found["steps"] == 20
    assert {"loss", "lr", "split"} <= set(found["plots"])
    assert not {"mfu", "memory", "utilization"} & set(found["plots"])


# --- hostile requests ------------------------------------------------------------------------------------------------

OUT = ["/../secret.txt", "/static/../../secret.txt", "/..%2fsecret.txt", "/%2e%2e/%2e%2e/secret.txt", "/..%5csecret.txt",
       "/%252e%252e%252fsecret.txt", "//etc/passwd", "/etc/passwd", "/%00", "/app.js/..%2f..%2f..%2fmessages.py", "/.%00./secret.txt",
       "/api/run?id=../outside", "/api/run?id=..%2foutside", "/api/run?id=%2fetc", "/api/experts?id=link", "/api/curves?runs=outside",
       "/api/curves?runs=%2e%2e%2foutside::"]  # fmt: skip


@pytest.mark.parametrize("path", OUT)
def test_a_path_out_of_the_folders_finds_nothing(web, path):
    found = web.get(path)
    assert found.status_code == 404
    assert SECRET not in found.text


def test_symbolic_links_out_of_the_folders_are_not_followed(web):
    for run in web.get("/api/runs").json()["runs"]:
        for path in (
            f"/api/run?id={run['id']}",
            f"/api/curves?plots=loss&runs={run['id']}",
            f"/api/experts?id={run['id']}",
        ):
            found = web.get(path)
            assert found.status_code == 200
            assert SECRET not in found.text
            if run["name"] == "leaking":
                assert run["step"] == 0
                assert '"x"' not in found.text


def test_a_run_that_becomes_a_link_is_not_followed(tmp_path):
    outside = make_run(tmp_path / "outside", steps=20)
    (outside / "config.toml").write_text(f'[job]\nmodel = "{SECRET}"\n')
    run = make_run(tmp_path / "runs" / "run", steps=20)
    web = client(runs := Runs([tmp_path / "runs"]))
    run_id = web.get("/api/runs").json()["runs"][0]["id"]
    run.rename(tmp_path / "away")
    run.symlink_to(outside)
    runs.advance()
    assert SECRET not in web.get(f"/api/run?id={run_id}").text
    runs.discover()
    assert web.get("/api/runs").json()["runs"] == []


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "WHATEVER"])
def test_methods_that_are_not_for_reading_are_refused(web, method):
    for path in ("/", "/api/runs", "/nothing"):
        found = web.request(method, path)
        assert found.status_code == 405
        assert found.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8420", "127.0.0.1.evil.example", "localhost.evil.example:8420", "8.8.8.8",
                                  "[::2]", "", "127.0.0.1:8420:1", "127.0.0.1:", "127.0.0.1@evil.example", "localhost:80x"])  # fmt: skip
def test_a_foreign_host_is_refused(web, host):
    for path in ("/", *API):
        assert web.get(path, headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8420", "127.0.0.1", "[::1]:8420", "LOCALHOST.", "behind.example:443"]
)
def test_the_names_of_this_machine_and_those_allowed_are_answered(folder, host):
    assert (
        client(Runs([folder / "runs"]), "behind.example").get("/api/plots", headers={"host": host}).status_code == 200
    )


def test_huge_and_senseless_parameters_are_refused_or_bounded(web):
    run = next(run for run in web.get("/api/runs").json()["runs"] if run["name"] == "first")
    assert web.get("/api/curves?plots=" + "x" * 20_000).status_code == 414
    assert web.get("/" + "x" * 20_000).status_code == 414
    for name in ("from", "to", "points", "width"):
        for value in ("nan", "inf", "-inf", "1e999", "x", "", "0x10", "1" * 5000):
            found = web.get("/api/curves", params={"plots": "loss", "runs": run["id"], name: value})
            assert found.status_code == 400, (name, value)
    for query in ({"points": 1e300}, {"points": -5}, {"from": 5, "to": 1}, {"from": 1, "to": 1 + 1e-300}, {"from": -1e300, "to": 1e300},
                  {"axis": "nothing"}, {"from": 0, "to": 5e-324}, {"width": 1e-300},
        {"axis": "time", "from": 0, "to": 5e-324, "points": 10}):  # fmt: skip
        found = web.get("/api/curves", params={"plots": "loss,loss,nothing", "runs": run["id"]} | query)
        assert found.status_code == 200, query
        for curve in found.json()["runs"][run["id"]]["plots"]["loss"].values():
            assert len(curve["x"]) <= 1002
    few = web.get("/api/curves", params={"plots": "loss", "runs": run["id"], "points": -5}).json()
    assert 5 <= len(few["runs"][run["id"]]["plots"]["loss"]["train.loss"]["x"]) <= 11
    assert web.get("/api/curves", params={"runs": f"{run['id']}:x:nan"}).status_code == 400
    for frame, status in (("99999999999", 200), ("-5", 200), ("1e300", 200), ("nan", 400), ("zero", 400)):
        assert web.get("/api/experts", params={"id": run["id"], "frame": frame}).status_code == status


def test_markup_in_names_tags_settings_and_answers_stays_text(tmp_path):
    run = make_run(tmp_path / EVIL.replace("/", "\u2215"), steps=20)
    text = json.dumps(EVIL)
    (run / "config.toml").write_text(f"[tags]\n{text} = {text}\n")
    (run / "answers.json").write_text(
        json.dumps({"answers": [{"prompt": EVIL, "before": "\ud800", "after": "x" * 99_999, "x": 1}, EVIL]})
    )
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"kind": "event", "step": 21, "time": 1.8e9, "event": EVIL, "reason": "\ud800" + EVIL * 5000})
            + "\n"
        )
    web = client(Runs([tmp_path]))
    found = web.get("/api/runs")
    assert found.headers["content-type"] == "application/json"
    (one,) = found.json()["runs"]
    assert one["name"] == run.name
    details = web.get("/api/run", params={"id": one["id"]}).json()
    assert [f"tags.{EVIL}", EVIL] in details["config"]
    assert details["events"][-1]["event"] == EVIL
    assert len(details["events"][-1]["reason"]) <= 4000
    assert details["answers"] == [{"prompt": EVIL, "before": "\ud800", "after": "x" * 8000}]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"kind": "train", "step": 1e400, "time": 1}', '{"kind": "experts", "step": 1, "time": 1, "tokens": [[1], [2, 3]]}',
                '{"kind": "train", "step": 1, "time": 1, "loss": 1e308, "x": {"a": {"b": {"c": {"d": {"e": 1}}}}}}', "\x00\xff", "x" * 3_000_000,
                '{"kind": "train", "step": -5, "time": -1e18, "lr": true, "loss": "1"}', '{"kind": "event", "step": 1, "time": 1, "event": {"a": []}}'],
    ids=range(8))  # fmt: skip
def test_a_file_of_any_content_is_answered(tmp_path, content):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.jsonl", "config.toml", "about.json", "answers.json"):
        (run / name).write_bytes(content.encode("latin-1") + b"\n")
    web = client(Runs([tmp_path]))
    (one,) = web.get("/api/runs").json()["runs"]
    for path in (
        f"/api/run?id={one['id']}",
        f"/api/experts?id={one['id']}",
        f"/api/curves?plots=loss,split,memory&runs={one['id']}",
    ):
        assert web.get(path).status_code == 200
