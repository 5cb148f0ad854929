"""Which adapter is meant: the active one, unless it is named."""

from __future__ import annotations

from typing import Any


def chosen_adapter(model: Any, adapter_name: str | None = None) -> str:
    """The name of the adapter that something is to be done with.

    Args:
        model: a tuner, a PeftModel, or a transformers model with adapters.
        adapter_name: the adapter; None for the active one.

    Raises:
        ValueError: there is none of that name, or several are active and none was named; says which there are.
    """
    known = sorted(getattr(model, "peft_config", {}))
    if adapter_name is None:
        active = model.active_adapters if known else []
        active = [name for name in (active() if callable(active) else active) if name in known]
        if len(active) != 1:
            which = f"Several adapters are active: {active}" if active else f"No adapter is active, of {known}"
            raise ValueError(f"{which}. Say which one is meant: pass adapter_name=...")
        return str(active[0])
    if adapter_name not in known:
        raise ValueError(f"There is no adapter {adapter_name!r}, only {known}. Pass adapter_name=...")
    return adapter_name


class OfAdapter(dict[str, Any]):
    """What was found, or done, by name of the weight; `adapter_name` says of which adapter."""

    def __init__(self, adapter_name: str, values: Any = ()) -> None:
        super().__init__(values)
        self.adapter_name = adapter_name

    def __reduce__(self) -> Any:
        return OfAdapter, (self.adapter_name, dict(self))
