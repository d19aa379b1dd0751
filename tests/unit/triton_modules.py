"""megasft's Triton kernels, loaded to be interpreted on tensors of the CPU or to be compiled."""

import importlib
import sys
from types import ModuleType

import pytest

MODULES = [f"megasft.kernels.{name}" for name in ("copies", "dropout", "factors", "qkv", "routing", "scales", "swiglu")]


def load(monkeypatch: pytest.MonkeyPatch, name: str, interpreted: bool) -> ModuleType:
    """The module `megasft.kernels.<name>`, until the end of the test."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    for module in MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, module, None)  # and so it is removed again in the end
        del sys.modules[module]
    return importlib.import_module(f"megasft.kernels.{name}")


def compiled_for_hopper(kernel, types: str, constants: dict, any_number: tuple[str, ...]) -> str:
    """The PTX of a kernel. `types`: "name" (int32) or "name:type" of the arguments that are no constants, in order;
    `any_number`: those of which a launch does not know that they are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(word.split(":") if ":" in word else (word, "i32") for word in types.split())
    names = kernel.arg_names
    assert list(given) == names[: len(given)]
    multiples = {
        (i,): [["tt.divisibility", 16]] for i, one in enumerate(names) if one in given and one not in any_number
    }
    source = ASTSource(
        kernel, given | dict.fromkeys(names[len(given) :], "constexpr"),
        {(i,): constants[one] for i, one in enumerate(names) if one not in given}, multiples,
    )  # fmt: skip
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert ".target sm_90" in ptx
    assert ".local" not in ptx, "registers are spilled"
    assert "ld.global.b16" not in ptx, "16 bytes are loaded at a time"
    return ptx
