"""A plan becomes bytes: workers take tensors in the order of the base's file, read parts, merge, and write them in place.

A worker holds one part of every model at a time (or one whole tensor, for methods that work on matrices; one worker at a time
then), so memory does not depend on the size of the model. torch runs with one thread in each: threads work on different
tensors, and no sum is ever divided among them, so the bytes do not depend on how many there are.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..task_vectors.errors import InputError, RecipeError
from ..task_vectors.headers import ITEM_SIZES, TensorHeader
from ..task_vectors.reading import DTYPES, Reader, read_tensor
from .files import OutputFiles
from .inputs import Stopped, TensorInputs, check_finite, decomposing, finite
from .journal import Journal, crc_of
from .methods.loop import TILE, Job, map_tensor, reduce_tensors
from .plan import CHUNK, Plan, TensorPlan, held_bytes


@dataclass
class Settings:
    """How a merge runs; none of it changes the result, but for the device's arithmetic.

    Attributes:
        threads: tensors that are worked on at a time.
        device: of the computation.
        chunk: values that are read at a time.
        progress: called with the bytes of the result that were finished.
        taken: called with the number of each tensor, of those that are not done, when a worker takes it.
    """

    threads: int = 1
    device: str = "cpu"
    chunk: int = CHUNK
    progress: Callable[[int], None] = lambda count: None
    taken: Callable[[int], None] = lambda number: None


def execute(plan: Plan, files: OutputFiles, journal: Journal, done: dict[str, int], settings: Settings) -> None:
    """Compute and write every tensor that is not done.

    Raises:
        InputError: a model has values that are no numbers, or became shorter.
        OutputError: the disk is full.
        RecipeError: a merged value does not fit the result's dtype.
    """
    _check_equal(plan)
    remaining = [tensor for tensor in plan.tensors if tensor.name not in done]
    for name in done:
        files.finished(name)
    run = _Run(plan, settings)
    run.remaining = remaining
    # glibc returns freed memory above a threshold to the system, which then clears it page by page for the next tile; freeing
    # one large block, which was never touched, raises the threshold above what a tile needs.
    torch.empty(3 * 2**23, dtype=torch.uint8)
    with _one_thread_of_torch():
        run.reduced = whole_model_passes(plan, settings)
        with ThreadPoolExecutor(settings.threads, thread_name_prefix="merge") as pool:
            try:
                finished, _ = wait(
                    [pool.submit(run.work, files, journal) for _ in range(settings.threads)], return_when=FIRST_EXCEPTION
                )
            finally:
                run.stopped.set()
        for future in finished:
            if future.exception() is not None and not isinstance(future.exception(), Stopped):
                future.result()


_merges, _threads_before = 0, 1
_merges_lock = threading.Lock()


@contextlib.contextmanager
def _one_thread_of_torch() -> Iterator[None]:
    """Let torch compute in one thread within the block.

    torch keeps one number for threads that are yet to come and one for each that has computed. So what was before is known
    to the first of several merges that run at the same time, and each of them puts that back.
    """
    global _merges, _threads_before
    with _merges_lock:
        if _merges == 0:
            _threads_before = torch.get_num_threads()
        _merges += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _merges_lock:
            _merges -= 1
            torch.set_num_threads(_threads_before)


def verify_done(plan: Plan, files: OutputFiles, done: dict[str, int]) -> dict[str, int]:
    """Those of the tensors of a journal whose bytes are really there."""
    sizes = {tensor.name: tensor.nbytes for tensor in plan.tensors}
    return {name: crc for name, crc in done.items() if name in sizes and crc_of(*files.place(name), sizes[name]) == crc}


def _check_equal(plan: Plan) -> None:
    for pair in plan.equal:
        if not _same(pair.first, pair.second):
            raise InputError(pair.message)
    for tensor in plan.tensors:
        if tensor.action == "copy" and tensor.base is not None:
            for number, model in enumerate(tensor.models):
                if model.values is not None and tensor.base.values is not None and not _same(tensor.base.values, model.values):
                    raise InputError(
                        f"{plan.names[number]}: {tensor.name!r} ({model.values.dtype}) is no floating-point tensor, and it "
                        f"differs from the base's: it cannot be averaged."
                    )


def _same(first: TensorHeader, second: TensorHeader) -> bool:
    return first.dtype == second.dtype and torch.equal(read_tensor(first), read_tensor(second))


def whole_model_passes(plan: Plan, settings: Settings) -> dict[str, Any] | None:
    """What a method has to know of all tensors before it merges one (TIES in the paper's semantics); None for the others."""
    if plan.recipe.subspace.semantics not in plan.method.whole_model:
        return None
    run, reader = _Run(plan, settings), Reader()
    with torch.inference_mode():
        return reduce_tensors([run.job(t, run.inputs(t, reader)) for t in plan.tensors if t.action == "merge"])


def merged_tensor(plan: Plan, tensor: TensorPlan, as_delta: bool = False, reduced: dict[str, Any] | None = None) -> Tensor:
    """One merged tensor in memory, in the dtype of the computation; the merged delta with `as_delta`."""
    run = _Run(plan, Settings())
    run.reduced = reduced
    source = run.inputs(tensor, Reader())
    return torch.cat([values.clone() for _, values in run.merged(tensor, source, as_delta)]).reshape(tensor.shape)


class _Run:
    """What the workers share."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.plan, self.settings = plan, settings
        inputs = len(plan.sources) + (plan.base is not None)
        crowd = max(inputs, 4) * max(settings.threads, 4)  # many models and threads share the memory of a few
        self.chunk = min(settings.chunk, max(TILE, 16 * settings.chunk // crowd))
        self.remaining: list[TensorPlan] = []
        self.reduced: dict[str, Any] | None = None
        self.next = 0
        self.lock, self.whole_tensors = threading.Lock(), threading.Lock()
        self.stopped = threading.Event()
        self.dtype = getattr(torch, plan.recipe.subspace.compute_dtype)

    def work(self, files: OutputFiles, journal: Journal) -> None:
        torch.set_num_threads(1)
        reader = Reader(held_bytes(self.settings.threads) // self.settings.threads)
        try:
            with torch.inference_mode():
                while (tensor := self._take()) is not None:
                    self._one(tensor, reader, files, journal)
        except BaseException:
            self.stopped.set()
            raise

    def _take(self) -> TensorPlan | None:
        with self.lock:
            number, self.next = self.next, self.next + 1
        if self.stopped.is_set() or number >= len(self.remaining):
            return None
        self.settings.taken(number)
        return self.remaining[number]

    def _one(self, tensor: TensorPlan, reader: Reader, files: OutputFiles, journal: Journal) -> None:
        whole = tensor.action == "merge" and self.plan.method.kind_for(tensor.options) == "matrix"
        with self.whole_tensors if whole else contextlib.nullcontext():
            crc = 0
            if tensor.action == "merge" and not whole:
                reader.hold(tensor.bytes_read)
            for offset, data in self._bytes(tensor, reader):
                if self.stopped.is_set():
                    raise Stopped
                files.write(tensor.name, offset, data)
                crc = zlib.crc32(data, crc)
                self.settings.progress(len(data))
            reader.forget()
        journal.add(tensor.name, crc)
        files.finished(tensor.name)

    def _bytes(self, tensor: TensorPlan, reader: Reader) -> Iterator[tuple[int, memoryview]]:
        """The bytes of the result in parts, in order: (offset in the tensor, bytes)."""
        chunk = self.chunk
        if tensor.action == "copy":
            assert tensor.base is not None
            assert tensor.base.values is not None
            for start in range(0, tensor.count, chunk):
                values = reader.stored(tensor.base.values, start, min(start + chunk, tensor.count), 0)
                check_finite(self.plan, values, tensor, "the base")
                yield start * values.element_size(), _memory(values)
            return
        source = self.inputs(tensor, reader)
        size = ITEM_SIZES[tensor.dtype]
        out = torch.empty(min(tensor.count, chunk), dtype=DTYPES[tensor.dtype])
        first, filled = 0, 0
        for start, merged in self.merged(tensor, source, self.plan.recipe.subspace.output == "task_vector"):
            if filled and filled + merged.numel() > out.numel():
                yield first * size, self._finish(out[:filled], tensor)
                first, filled = start, 0
            if merged.numel() > out.numel():
                out = torch.empty(merged.numel(), dtype=out.dtype)
            out[filled : filled + merged.numel()] = merged
            filled += merged.numel()
        if filled:
            yield first * size, self._finish(out[:filled], tensor)

    def merged(self, tensor: TensorPlan, source: TensorInputs, as_delta: bool) -> Iterator[tuple[int, Tensor]]:
        """The merged values in parts, in order."""
        if tensor.action == "cast":
            for start in range(0, tensor.count, self.chunk):
                part = source.read(start, min(start + self.chunk, tensor.count))
                assert part.base is not None
                yield start, part.base
            return
        job = self.job(tensor, source, as_delta)
        with decomposing(tensor.name, self.plan.method.name):
            yield from map_tensor(job, reduce_tensors([job]) if self.reduced is None else self.reduced)

    def inputs(self, tensor: TensorPlan, reader: Reader) -> TensorInputs:
        """What is read for one tensor."""
        return TensorInputs(self.plan, tensor, reader, self.dtype, self.stopped)

    def job(self, tensor: TensorPlan, source: TensorInputs, as_delta: bool = False) -> Job:
        """The merge of one tensor, as the loop takes it."""
        subspace = self.plan.recipe.subspace
        return Job(
            self.plan.method, tensor.shape, source.read, tensor.options, tensor.per_model, name=tensor.draws_as,
            seed=subspace.seed, semantics=subspace.semantics, dtype=self.dtype, device=self.settings.device,
            chunk=self.chunk, as_delta=as_delta, learned=None if tensor.learned is None else tensor.learned.open(),
            mask=None if tensor.mask is None else tensor.mask.open(),
        )  # fmt: skip

    def _finish(self, out: Tensor, tensor: TensorPlan) -> memoryview:
        if self.plan.recipe.subspace.non_finite == "error" and not finite(out):
            raise RecipeError(
                f"{tensor.name!r}: the merged values do not fit {tensor.dtype} (they are infinite or no numbers). Use a wider "
                f"out_dtype, other weights, or write `subspace: {{non_finite: allow}}`."
            )
        return _memory(out)


def _memory(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data
