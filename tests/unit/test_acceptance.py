"""`tools/gpu_acceptance.sh`, with `--cpu`: the script and its report. The checks themselves are its own business."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.gpu import acceptance, report
from tests.gpu.report import CLAIMS, Measured, Outcome

ROOT = Path(__file__).parents[2]


def run(folder: Path, *only: str) -> tuple[int, str, dict]:
    words = [str(ROOT / "tools/gpu_acceptance.sh"), "--cpu", "--out", str(folder), "--only", *only]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    return done.returncode, done.stdout + done.stderr, json.loads((folder / "report.json").read_text())


def test_checks_run_in_their_order_and_what_needs_a_gpu_says_so(tmp_path):
    code, said, found = run(tmp_path, "dropout", "reference")
    assert code == 0, said
    dropout, reference = found["checks"]
    assert dropout["status"] == "passed"
    assert len(dropout["measured"]) == 16
    assert all(one["passed"] for one in dropout["measured"])
    assert (reference["status"], reference["reason"]) == ("not run", "needs 4 GPUs")
    assert found["claims"]["LoRA adds no collective"] == "not run"
    assert "| dropout | passed |" in (tmp_path / "report.md").read_text()


@pytest.fixture
def arguments(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["acceptance", "--cpu", "--out", str(tmp_path)])
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    return acceptance._arguments()


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (acceptance.Check("place.no_such_check", 60), "has no attribute 'no_such_check'"),
        (acceptance.Check("kernels.attention", 0), "no result within 0 s"),
    ],
)
def test_a_check_that_breaks_or_hangs_is_a_line_of_the_report(arguments, monkeypatch, check, reason):
    # The process of the check reads the table anew, so the name must lead it to the same function.
    monkeypatch.setitem(acceptance.CHECKS, check.place, check)
    script = "import sys; from tests.gpu import acceptance as a; a.CHECKS[{0!r}] = a.Check(*{1!r}); a.main()"
    popen = subprocess.Popen

    def with_the_check(words, **named):
        return popen([words[0], "-c", script.format(check.place, tuple(check)), *words[3:]], **named)

    monkeypatch.setattr(acceptance.subprocess, "Popen", with_the_check)
    outcome = acceptance._outside(check.place, arguments, 4)
    assert outcome.status == "failed"
    assert reason in outcome.reason


def test_claims_are_those_of_the_readme_and_checks_those_that_there_are():
    text = " ".join((ROOT / "README.md").read_text().split())
    for claim, checks in CLAIMS.items():
        assert claim in text
        assert set(checks) <= acceptance.CHECKS.keys()


def test_a_claim_is_confirmed_by_all_its_checks_and_refuted_by_one(tmp_path):
    passed, failed = Outcome("nf4", "passed"), Outcome("qlora", "failed", measured=[Measured("m", "1", "0", False)])
    assert report.verdict(("nf4",), {"nf4": passed}) == "confirmed"
    assert report.verdict(("nf4", "qlora"), {"nf4": passed}) == "not run"
    assert report.verdict(("nf4", "qlora"), {"nf4": passed, "qlora": failed}) == "refuted"
    assert "**failed**" in report.write(tmp_path, {"device": "cpu"}, [failed]).read_text()
    assert Outcome.of_json(json.dumps(json.loads((tmp_path / "report.json").read_text())["checks"][0])) == failed
