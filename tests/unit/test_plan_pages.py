"""docs/reference-job.md and docs/scaling.md say what the plan says."""

import re
from pathlib import Path

import pytest

from megasft.plan.report import GiB
from tools import plan_pages

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["reference-job.md", "scaling.md"])
def test_tables_are_those_of_the_plan(page):
    """`python tools/plan_pages.py` writes them."""
    text = (DOCS / page).read_text(encoding="utf-8")
    assert "<!-- plan: " in text
    assert plan_pages.filled(text) == text


def test_pictures_are_those_of_the_plan():
    for name, picture in plan_pages.pictures().items():
        assert (DOCS / "images" / name).read_text(encoding="utf-8") == picture


def test_the_figures_beside_the_budget_are_those_of_the_plan():
    text = (DOCS / "reference-job.md").read_text(encoding="utf-8").partition("## Beside the budget")[2]
    plans = plan_pages.reference_plans()
    bf16, four_bits, fast = (plan.memory for plan in plans.values())
    gb = {
        "base": bf16.state["frozen weights"], "adapters": bf16.state["adapters"], "gradients": bf16.state["gradients"],
        "states": bf16.state["optimizer states"], "total": bf16.peak, "fast": fast.peak, "qlora": four_bits.peak,
        "qlora base": four_bits.state["frozen weights"] + four_bits.state["4-bit weights"],
        "workspace": four_bits.state["dequantization workspace"],
    }  # fmt: skip
    said = {name: f"{size / 1e9:.1f}" if name != "fast" else f"{size / 1e9:.0f}" for name, size in gb.items()}
    for words in (
        f"{said['base']} GB a GPU", f"| {said['adapters']} GB |", f"| {said['gradients']} and {said['states']} GB |",
        f"| {said['total']} GB at most |", f"in the fastest topology {said['fast']} GB", f"| {said['qlora']} GB at most |",
        f"takes {said['qlora base']} GB, and {said['workspace']} GB is a workspace",
    ):  # fmt: skip
        assert words in text
    assert (
        f"{next(iter(plans.values())).usable / GiB:.0f} GiB of them usable" in (DOCS / "reference-job.md").read_text()
    )
    assert re.search(r"844 million trained", text)
