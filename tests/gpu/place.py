"""Where a check runs, and how it notes what it finds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.report import Measured, NeedsMore
from tests.support.ranks import RankPool

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Place:
    """The device of the checks, and how many ranks it has: GPUs, or four processes on CPUs.

    `model`: the folder or hub id of the 30B model, if there is one. `folder`: for files of this check.
    """

    device: str
    ranks: int
    folder: Path
    model: str | None = None
    measured: list[Measured] = field(default_factory=list)

    def pool(self) -> RankPool:
        """Ranks on the device."""
        return RankPool(self.device)

    def need(self, ranks: int = 1, gpu: bool = False, model: bool = False) -> None:
        """Raise NeedsMore unless all that is asked for is here."""
        if gpu and self.device != "cuda":
            raise NeedsMore("a GPU" if ranks == 1 else f"{ranks} GPUs")
        if ranks > self.ranks:
            raise NeedsMore(f"{ranks} GPUs" if self.device == "cuda" else f"{ranks} ranks")
        if model and self.model is None:
            raise NeedsMore("the 30B model: --model FOLDER")

    def note(self, what: str, got: object, expected: object, passed: bool) -> None:
        """A comparison that has been made."""
        self.measured.append(Measured(what, str(got), str(expected), bool(passed)))

    def at_most(self, what: str, got: float, bound: float) -> None:
        """`got` is a number, and not above `bound`."""
        self.note(what, f"{got:.3g}", f"at most {bound:.3g}", got <= bound)

    def equal(self, what: str, got: object, expected: object) -> None:
        """The two are equal."""
        self.note(what, got, expected, got == expected)

    def near(self, what: str, got: "Tensor", want: "Tensor", bound: float) -> None:
        """The largest difference is at most `bound` of the largest expected magnitude. `want` may be on the CPU."""
        error = (got.detach().cpu().double() - want.detach().cpu().double()).abs().max() if want.numel() else 0.0
        scale = float(want.detach().abs().max()) if want.numel() else 1.0
        self.at_most(what, float(error) / (scale or 1.0), bound)

    def same_bits(self, what: str, got: "Tensor", want: "Tensor") -> None:
        """Every element is the same."""
        differ = int((got.detach().cpu() != want.detach().cpu()).sum()) if got.shape == want.shape else -1
        self.note(what, f"{differ} of {want.numel()} elements differ", "0", differ == 0)
