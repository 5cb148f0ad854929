"""The one place that adds methods to PEFT's closed list of types.

PEFT 0.21 keeps its methods in an `enum.Enum`, `PeftType`, and in three dictionaries. `register_peft_method` refuses a name
that the enum does not have, and several places of PEFT and transformers read `.value` of the type, so a plain string is not
enough: a real member has to be added. Everything that this needs to know about Python's and PEFT's internals is in this file.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any

import peft
from packaging.version import Version
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

SUPPORTED_PEFT = (0, 21)


def check_peft_version(installed: str = peft.__version__) -> None:
    """Warn when PEFT is outside the range that the conformance tests have seen (`peft>=0.21,<0.22`)."""
    if Version(installed).release[:2] != SUPPORTED_PEFT:
        warnings.warn(
            f"peft_subspace is tested with peft>=0.21,<0.22 and found peft {installed}: adapters may fail to load or train. "
            f"Install a tested release with `pip install 'peft>=0.21,<0.22'`.",
            stacklevel=2,
        )


def add_peft_type(name: str) -> PeftType:
    """Add a member to `PeftType` and return it; a member of that name that already exists is returned as it is.

    An enum reads its members from four places: the list of names (iteration), name -> member (`PeftType["X"]`), value ->
    member (`PeftType("X")`) and the class attribute (`PeftType.X`). `EnumType.__setattr__` refuses the last, hence
    `type.__setattr__`; Python 3.12 and later also keep the values in a list of their own.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if name not in getattr(PeftType, "_hashable_values_", [name]):
        PeftType._hashable_values_.append(name)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    return member


def register(config_cls: Any, model_cls: Any) -> None:
    """Make a method known to PEFT. Calling it again with classes of the same name (a reloaded module) renews them.

    Args:
        config_cls: the config dataclass; its `method` is the name of the type, in capitals.
        model_cls: the tuner; its `prefix` must be the name in lower case and `_`, because transformers computes it so.

    Raises:
        ValueError: the prefix is not `<name>_`.
        RuntimeError: the name or the prefix belongs to somebody else (a later PEFT, another plugin). PEFT itself looks
            for a prefix among the keys of its table and so never finds a clash.
    """
    name, prefix = config_cls.method, model_cls.prefix
    if prefix != name.lower() + "_":
        raise ValueError(f"{model_cls.__name__}.prefix is {prefix!r}; transformers needs {name.lower() + '_'!r}.")
    owner = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    if owner is not None and _identity(owner) == _identity(config_cls):
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType[name]] = model_cls
        return
    if name in PeftType.__members__:
        raise RuntimeError(
            f"The PEFT type {name!r} exists already ({_full_name(owner) if owner else 'without a config class'}), so "
            f"peft_subspace cannot add its own. Use the existing one, or install a version of PEFT and of other plugins "
            f"that leaves the name free."
        )
    for other, taken in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if taken == prefix:
            raise RuntimeError(f"The prefix {prefix!r} of {name!r} is taken by the PEFT type {other.value!r}.")
    add_peft_type(name)
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix)


def complete_cards(update: Callable[[str, Any], None]) -> None:
    """Have `update(directory, config)` called when others have written the README.md of a model with adapters.

    `PeftModel.push_to_hub` saves the adapter with its card, and then writes the Hub's old card or an empty form over it;
    `Trainer.push_to_hub` writes a card of its own and asks PEFT to complete it. Neither has a hook, so the two methods of
    PeftModel that they call afterwards are wrapped. `update` gets the configs of other methods too.
    """
    for method, first in (("create_or_update_model_card", False), ("_upload_modified_files", True)):
        original = getattr(PeftModel, method)
        original = getattr(original, "peft_subspace_wraps", original)  # when this module is executed again

        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, original: Any = original, first: bool = first, **kwargs: Any) -> Any:
            result = None if first else original(self, *args, **kwargs)
            if "default" in self.peft_config:  # other adapters have folders, and cards, of their own
                directory = list(inspect.signature(original).bind(self, *args, **kwargs).arguments.values())[1]
                update(str(directory), self.peft_config["default"])
            return original(self, *args, **kwargs) if first else result

        wrapper.peft_subspace_wraps = original  # type: ignore[attr-defined]
        setattr(PeftModel, method, wrapper)


def check_before_saving() -> None:
    """Let a tuner refuse a bare `PeftModel.save_pretrained` by `check_saved_whole()`.

    PEFT asks a tuner for its tensors also where a whole `state_dict` was passed on, so that it cannot tell the one call from
    the other; with FSDP2's shares the bare call ends in torch's "invalid python storage".
    """
    original = PeftModel.save_pretrained
    original = getattr(original, "peft_subspace_wraps", original)  # when this module is executed again

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        check = getattr(self.base_model, "check_saved_whole", None)
        if check is not None and kwargs.get("state_dict") is None:
            check()
        return original(self, *args, **kwargs)

    wrapper.peft_subspace_wraps = original  # type: ignore[attr-defined]
    setattr(PeftModel, original.__name__, wrapper)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _identity(cls: type) -> tuple[str | None, str]:
    """File and name of a class: the same for a reloaded module and for one that was imported by two paths."""
    return getattr(sys.modules.get(cls.__module__), "__file__", cls.__module__), cls.__qualname__
