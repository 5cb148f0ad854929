"""What a worker reads for one tensor: parts of the base and of every model, looked through for NaN the first time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ..task_vectors.errors import InputError
from ..task_vectors.reading import GivenReader, Reader, read_tensor
from .methods.loop import Part
from .plan import Plan, TensorPlan


class Stopped(Exception):
    """Another worker failed, or the user pressed Ctrl-C."""


class TensorInputs:
    """Reads the parts of one tensor from the base and all models, from its first to its last, once or several times."""

    def __init__(
        self, plan: Plan, tensor: TensorPlan, reader: Reader, dtype: torch.dtype, stopped: threading.Event | None = None
    ) -> None:
        self.plan, self.tensor, self.reader, self.dtype = plan, tensor, reader, dtype
        self.stopped = stopped or threading.Event()
        self.base: GivenReader | None = None
        self.models: list[GivenReader] = []
        self.slot = 0
        self.checked = 0

    def _open(self) -> None:
        tensor, dtype = self.tensor, self.dtype
        self.base = None if tensor.base is None else GivenReader(tensor.base, dtype, self.reader, 0)
        self.slot = 0 if self.base is None else self.base.slots
        self.models = []
        for given in tensor.models:
            self.models.append(GivenReader(given, dtype, self.reader, self.slot))
            self.slot += self.models[-1].slots

    def read(self, start: int, stop: int) -> Part:
        """See `Job.read`. Values are checked the first time that they are read."""
        if self.stopped.is_set():
            raise Stopped
        if start == 0:
            self._open()
        base = None if self.base is None else self.base.part(start, stop, None)
        tensors = [model.part(start, stop, base) for model in self.models]
        if stop > self.checked:
            self.checked = stop
            if base is not None:
                check_finite(self.plan, base, self.tensor, "the base")
            for number, tensor in enumerate(tensors):
                check_finite(self.plan, tensor, self.tensor, self.plan.names[number])
        part = Part(base, tensors, [model.is_delta for model in self.models], self._statistics(start, stop))
        if stop == self.tensor.count:
            self.base, self.models = None, []  # factors of low-rank deltas are not kept for tensors that wait
        return part

    def _statistics(self, start: int, stop: int) -> list[Tensor] | None:
        headers = self.tensor.statistics
        if headers is None:
            return None
        if self.plan.method.kind_for(self.tensor.options) == "matrix":
            return [read_tensor(header) for header in headers]
        return [self.reader.stored(header, start, stop, self.slot + n) for n, header in enumerate(headers)]


def check_finite(plan: Plan, values: Tensor, tensor: TensorPlan, owner: str) -> None:
    """Raise an InputError for values that are NaN or infinite, unless the recipe allows them and the method can take them."""
    decomposed = tensor.action == "merge" and plan.method.kind_for(tensor.options) == "matrix"
    if not values.is_floating_point() or (plan.recipe.subspace.non_finite == "allow" and not decomposed) or finite(values):
        return
    found = f"{owner}: {tensor.name!r} has values that are NaN or infinite"
    if decomposed:
        raise InputError(
            f"{found}, and {plan.method.name} works on whole matrices, which one such value spoils. Use an undamaged model, or "
            f"a method that works entry by entry, such as task_arithmetic or ties."
        )
    raise InputError(f"{found}. Use an undamaged model, or write `subspace: {{non_finite: allow}}`.")


@contextlib.contextmanager
def decomposing(name: str, method: str) -> Iterator[None]:
    """Values that are finite can still be too large for a decomposition: say so, with the tensor's name.

    Raises:
        InputError: in place of LAPACK's.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise InputError(
            f"{name!r}: {method} cannot decompose it: its values, weights or statistics are too large, NaN, or of a matrix "
            f"that has no inverse ({str(error).splitlines()[0]})."
        ) from error


def finite(values: Tensor) -> bool:
    """Whether all values are finite: their sum is not if one is not; the exact check if the sum overflowed."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
