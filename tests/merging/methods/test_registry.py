"""Methods by name, their parameters, and those of other packages."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
import torch

from peft_subspace.merging.methods import registry
from peft_subspace.merging.methods.memory import merge_tensors
from peft_subspace.merging.methods.registry import Inputs, Method, Parameter, get, names, register

TWICE = Method("twice", "elementwise", "delta", lambda inputs: 2 * inputs.tensors[0], reference="this test")


@pytest.fixture
def other_packages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that packages with these entry points are installed."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS) if get("ties") else {})
    monkeypatch.setattr(registry, "_LOADED", set())

    def install(*points: tuple[str, str]) -> None:
        found = EntryPoints(EntryPoint(name, value, registry.GROUP) for name, value in points)
        monkeypatch.setattr(registry, "entry_points", lambda group: found.select(group=group))

    return install


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown merge method 'tie'; did you mean 'ties'"):
        get("tie")
    with pytest.raises(ValueError, match=r"unknown merge method 'zzzzz'; there are atlas, average, breadcrumbs"):
        get("zzzzz")


def test_aliases_are_names_of_the_same_method() -> None:
    assert get("average") is get("linear")
    assert "average" not in names()


def test_methods_of_other_packages(other_packages: Any) -> None:
    other_packages(("twice", f"{__name__}:TWICE"))
    sys.modules.setdefault(__name__, sys.modules[TWICE.kernel.__module__])  # type: ignore[union-attr]
    assert "twice" in names()
    base, tensor = torch.randn(2, 3)
    assert torch.equal(merge_tensors("twice", base, [tensor]), base + 2 * (tensor - base))
    assert get("twice") is get("twice")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([("ties", "a:B")], r"a:B brings a merge method 'ties', which is built in; remove that package"),
        ([("new", "a:B"), ("new", "c:D")], r"two packages bring a merge method 'new': a:B and c:D; remove one"),
        ([("new", "torch:float32")], r"entry point torch:float32 must be a Method, got dtype"),
    ],
)
def test_methods_of_other_packages_that_cannot_be_used(other_packages: Any, points: Any, message: str) -> None:
    other_packages(*points)
    with pytest.raises(ValueError, match=message):
        get("new")


def test_a_taken_name_cannot_be_registered(other_packages: Any) -> None:
    with pytest.raises(ValueError, match=r"merge method 'average' is already registered \(as 'linear'\)"):
        register(replace(TWICE, aliases=("average",)))


@pytest.mark.parametrize(
    ("default", "good", "bad"),
    [
        (1.0, [1, 0.5, 2], [True, "1", None, [1.0]]),
        (10, [3, 4.0], [True, 2.5, "3", float("nan"), float("inf")]),
        (False, [True, False], [0, 1, "true"]),
        ("a", ["b"], [1, None]),
    ],
)
def test_values_have_the_type_of_the_default(default: Any, good: list[Any], bad: list[Any]) -> None:
    parameter = Parameter("knob", default)
    for value in good:
        assert parameter.check(value) == value
        assert type(parameter.check(value)) is type(default)
    for value in bad:
        with pytest.raises(ValueError, match=r"knob="):
            parameter.check(value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_values_outside_their_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"density=.*: expected a number >= 0 and <= 1"):
        get("ties").parameter("density").check(value)


def test_choices() -> None:
    with pytest.raises(ValueError, match=r"majority_sign_method='both': expected one of total, frequency"):
        get("ties").resolve("global", {"majority_sign_method": "both"})


def test_unknown_parameters_and_wrong_places() -> None:
    with pytest.raises(ValueError, match=r"merge method 'ties' has no parameter 'densty'; did you mean 'density'\?"):
        get("ties").resolve("model", {"densty": 0.5})
    with pytest.raises(ValueError, match=r"parameter 'lambda' of merge method 'ties' is set for all models"):
        get("ties").resolve("model", {"lambda": 0.5})


@pytest.mark.parametrize(
    ("method", "base", "count", "settings", "message"),
    [
        ("ties", False, 2, {}, r"'ties' needs a base model"),
        ("slerp", True, 2, {}, r"'slerp' takes 1 models beside the base, got 2"),
        ("model_stock", True, 1, {}, r"'model_stock' takes 2 or more models beside the base, got 1"),
        ("linear", False, 0, {}, r"'linear' takes 1 or more models beside the base, got 0"),
        ("linear", False, 2, {"weights": [1.0]}, r"got 1 weights for 2 models"),
        ("linear", False, 2, {"weights": [1.0, -1.0]}, r"the weights 1, -1 sum to 0; set normalize: false, or change them"),
        ("karcher", False, 2, {"weights": [1.0, -1.0]}, r"the weights 1, -1 sum to 0; change them"),
        ("atlas", True, 2, {}, r"'atlas' merges by what was learned: give `learned`, or a recipe with its adapter"),
        ("fisher", False, 2, {}, r"'fisher' needs statistics: the diagonal Fisher information"),
        ("della", True, 1, {"options": {"density": 0.9, "epsilon": 0.2}}, r"chances from 0.7 to 1.1, which must lie inside"),
    ],
)
def test_what_cannot_be_merged(method: str, base: bool, count: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_tensors(method, torch.zeros(3) if base else None, [torch.zeros(3)] * count, **settings)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"must have one shape, got \(3,\), \(4,\)"):
        merge_tensors("linear", None, [torch.zeros(3), torch.zeros(4)])


def test_the_table_imports_no_torch() -> None:
    """A recipe is planned from the table alone."""
    program = (
        "import sys, types\n"
        "import importlib.util, pathlib\n"
        "root = pathlib.Path(importlib.util.find_spec('peft_subspace').origin).parent\n"
        "for name, folder in (('peft_subspace', root), ('peft_subspace.merging', root / 'merging')):\n"
        "    module = sys.modules[name] = types.ModuleType(name)\n"  # without what their __init__ imports
        "    module.__path__ = [str(folder)]\n"
        "from peft_subspace.merging.methods import registry\n"
        "assert registry.get('ties').resolve('global', {})['lambda'] == 1.0\n"
        "assert registry.get('nuslerp').kind_for({'nuslerp_flatten': True}) == 'elementwise'\n"
        "assert not {'torch', 'numpy', 'peft'} & set(sys.modules), 'imported too much'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_inputs_have_useful_defaults() -> None:
    assert Inputs(None, (), (), {}, ()).semantics == "mergekit"
