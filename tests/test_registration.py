"""The added members of PeftType are like PEFT's own in every way that code can see."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_subspace
from peft_subspace import FloraConfig, FloraModel, check_peft_version, register
from peft_subspace.registration import add_peft_type
from tests.processes import run_python

METHODS = ["ATLAS", "CONCRETE", "FLORA", "PELA", "SVFIT"]
NATIVE = PeftType.IA3  # a member of PEFT's own to compare with


@pytest.fixture(params=METHODS)
def member(request: pytest.FixtureRequest) -> PeftType:
    return PeftType[request.param]


LOOKUPS: dict[str, Callable[[str], Any]] = {
    "by value": lambda name: PeftType(name),
    "by name": lambda name: PeftType[name],
    "attribute": lambda name: getattr(PeftType, name),
    "iteration": lambda name: next(m for m in PeftType if m.name == name),
    "reversed": lambda name: next(m for m in reversed(PeftType) if m.name == name),
    "__members__": lambda name: PeftType.__members__[name],
    "copy": lambda name: copy.copy(PeftType[name]),
    "deepcopy": lambda name: copy.deepcopy({"type": [PeftType[name]]})["type"][0],
    **{
        f"pickle {p}": lambda name, p=p: pickle.loads(pickle.dumps(PeftType[name], p))
        for p in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("way", LOOKUPS)
def test_every_way_leads_to_the_same_object(way: str, member: PeftType) -> None:
    assert LOOKUPS[way](member.name) is member
    assert LOOKUPS[way](NATIVE.name) is NATIVE


def test_it_is_a_member_of_the_enum(member: PeftType) -> None:
    assert type(member) is PeftType
    assert member in PeftType
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert member.name in dir(PeftType)


SEEN_BY_CODE: dict[str, Callable[[PeftType], Any]] = {
    "str": str,
    "repr": repr,
    "format": lambda m: f"{m}|{m:>12}",
    "name": lambda m: m.name,
    "value": lambda m: m.value,
    "private name and value": lambda m: (m._name_, m._value_),
    "get_model_status": lambda m: str(m).partition(".")[-1],
    "json": lambda m: json.dumps({"peft_type": m}),
    "lower": lambda m: m.lower(),
}


@pytest.mark.parametrize("what", SEEN_BY_CODE)
def test_it_reads_like_a_native_member(what: str, member: PeftType) -> None:
    def anonymous(native: PeftType) -> Any:
        seen = SEEN_BY_CODE[what](native)
        text = repr(seen)
        return text.replace(native.name, "X").replace(native.name.lower(), "x").replace(" ", "")

    assert anonymous(member) == anonymous(NATIVE)
    assert member.name in repr(SEEN_BY_CODE[what](member)).upper()


def test_it_is_a_string_and_a_key(member: PeftType) -> None:
    assert isinstance(member, str)
    assert member == member.name
    assert hash(member) == hash(member.name)
    assert {member: 1}[member.name] == {member.name: 1}[member] == 1
    assert member != NATIVE


@pytest.mark.parametrize("change", [lambda name: setattr(PeftType, name, 3), lambda name: delattr(PeftType, name)])
def test_it_cannot_be_reassigned(change: Callable[[str], None], member: PeftType) -> None:
    for name in (member.name, NATIVE.name):
        with pytest.raises(AttributeError):
            change(name)
    assert getattr(PeftType, member.name) is member


def test_an_unknown_type_is_still_unknown() -> None:
    with pytest.raises(ValueError, match="'NOTHING' is not a valid PeftType"):
        PeftType("NOTHING")


def test_the_mappings_know_it(member: PeftType) -> None:
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[member]
    assert prefix == member.value.lower() + "_" == PEFT_TYPE_TO_TUNER_MAPPING[member].prefix
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member.value]().peft_type is member


# Of one process, because importing PEFT is what takes the time here.
FRESH_PROCESS = """
import importlib, importlib.util, pickle, sys

bare, config = (open(path, "rb").read() for path in sys.argv[1:])
import peft
try:
    pickle.loads(bare)
except ValueError as error:
    assert str(error) == "'FLORA' is not a valid PeftType", error
else:
    raise AssertionError("without the plugin a bare member cannot be read")
assert "peft_subspace" not in sys.modules

config = pickle.loads(config)
assert type(config).__module__ == "peft_subspace.adapters.flora"
assert config.r == [3, 2] and config.target_modules == {"q_proj"}
member = peft.PeftType("FLORA")
assert config.peft_type is member is pickle.loads(bare)
assert peft.get_peft_config({"peft_type": "FLORA"}).peft_type is member

# A module that is executed again renews its own classes and nothing else.
before, position = len(peft.PeftType), list(peft.PeftType).index(member)
flora = importlib.reload(sys.modules["peft_subspace.adapters.flora"])
assert peft.get_peft_config({"peft_type": "FLORA"}).__class__ is flora.FloraConfig
spec = importlib.util.spec_from_file_location("peft_subspace.adapters.second_path", flora.__file__)
second = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = second
spec.loader.exec_module(second)
assert peft.get_peft_config({"peft_type": "FLORA"}).__class__ is second.FloraConfig
importlib.reload(sys.modules["peft_subspace.registration"])
importlib.reload(sys.modules["peft_subspace"])
importlib.reload(sys.modules["peft_subspace.hub"])
wrapped = peft.PeftModel._upload_modified_files.peft_subspace_wraps
assert not hasattr(wrapped, "peft_subspace_wraps") and wrapped.__module__.startswith("transformers")
assert len(peft.PeftType) == before and list(peft.PeftType).index(member) == position
assert peft.PeftType("FLORA") is member and second.FloraConfig().peft_type is member
print("checked")
"""


def test_pickles_in_a_fresh_process_and_repeated_imports(tmp_path: Any) -> None:
    bare, config = tmp_path / "bare", tmp_path / "config"
    bare.write_bytes(pickle.dumps(PeftType.FLORA))
    config.write_bytes(pickle.dumps(FloraConfig(r=[3, 2], target_modules=["q_proj"])))
    assert run_python(FRESH_PROCESS, bare, config).strip() == "checked"


def test_registering_again_changes_nothing(member: PeftType) -> None:
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register(FloraConfig, FloraModel)
    assert add_peft_type(member.name) is member
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


def fake(name: str, prefix: str | None = None) -> tuple[type, type]:
    return type("FakeConfig", (), {"method": name}), type("FakeModel", (), {"prefix": prefix or f"{name.lower()}_"})


def test_the_name_of_another_method_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"'LORA' exists already \(peft.tuners.lora.config.LoraConfig\)"):
        register(*fake("LORA"))
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is peft.LoraConfig


def test_the_name_of_a_bare_member_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.IA3)
    with pytest.raises(RuntimeError, match=r"'IA3' exists already \(without a config class\)"):
        register(*fake("IA3"))


def test_a_prefix_in_use_is_refused_and_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.IA3, "probe_")
    with pytest.raises(RuntimeError, match="'probe_' of 'PROBE' is taken by the PEFT type 'IA3'"):
        register(*fake("PROBE"))
    assert "PROBE" not in PeftType.__members__


def test_a_prefix_that_transformers_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="transformers needs 'probe_'"):
        register(*fake("PROBE", "other_"))
    assert "PROBE" not in PeftType.__members__


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0.dev0", "0.22.0", "0.3", "1.0.0"])
def test_an_untested_peft_is_reported(version: str) -> None:
    with pytest.warns(UserWarning, match=rf"found peft {version}.*pip install 'peft>=0\.21,<0\.22'"):
        check_peft_version(version)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.99", "0.21.3.dev0", peft.__version__])
def test_a_tested_peft_is_not(version: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_peft_version(version)
    assert caught == []


def test_every_method_of_the_package_is_registered() -> None:
    configs = [c for c in vars(peft_subspace).values() if isinstance(c, type) and issubclass(c, peft.PeftConfig)]
    assert [c.method for c in configs if "method" in vars(c)] == METHODS
