"""The part of Gluon that the kernels for Hopper use, on the host: numbers by torch, warpgroups as threads in turns.

A kernel's partitions run as threads, of which one runs at a time: whenever one comes to a barrier, any that can go on
may be next, by a seeded draw. So a run is repeatable, many seeds are many orders, and it is an error if

- nobody can go on (a deadlock),
- shared memory is written while a product in flight, or the copy engine, still reads it.

Columns of a box that lie a whole instruction past the end of a row are NaN here, where the copy engine fills in zeros:
nobody needs to multiply them. Programs run one after the other, but at the same time where their additions have an
order: then the copy engine adds at once or when the sum is waited for, by the draw. Its loads write at once, the
earliest that they can. Registers, layouts and proxies are not checked.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.language import constexpr
from triton.runtime.jit import JITFunction

from flashbias.attention.hopper.configs import width_of
from flashbias.attention.hopper.operands import FAR


class Int(int):
    """A number of a kernel: as Python's, with the kernel's conversions."""

    def to(self, dtype: Any) -> Int:
        return self

    @property
    def value(self) -> Int:
        """As a constant's."""
        return self


def _wrapped(name: str) -> Callable[..., Any]:
    own = getattr(int, name)

    def operation(self: Int, *others: Any) -> Any:
        result = own(self, *others)
        return Int(result) if isinstance(result, int) else result

    return operation


_OPERATIONS = ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "rshift", "lshift")
for _name in (
    *(f"__{side}{operation}__" for operation in _OPERATIONS for side in ("", "r")),
    "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__neg__",
):  # fmt: skip
    setattr(Int, _name, _wrapped(_name))
Int.__hash__ = int.__hash__  # type: ignore[method-assign]


class Stuck(AssertionError):
    """Nobody can go on."""


@dataclass
class Turns:
    """Threads that take turns: which is next is drawn among those that can go on.

    Each sleeps until it is called by name, so that a turn wakes one thread, not all; nobody else touches what they
    share meanwhile.
    """

    seed: int
    waiting: dict[int, Callable[[], bool]] = field(default_factory=dict)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.calls: list[SimpleQueue[None]] = []

    def pass_on(self) -> None:
        """Choose who is next; after a failure everybody is, to end."""
        ready = sorted(name for name, can_go in self.waiting.items() if can_go()) if self.failure is None else []
        if ready:
            self.calls[self.draw.choice(ready)].put(None)
            return
        if self.waiting and self.failure is None:
            self.failure = Stuck(f"{len(self.waiting)} partitions wait for each other")
        for call in self.calls:
            call.put(None)

    def wait(self, can_go: Callable[[], bool] = lambda: True) -> None:
        """Let others run until the draw comes back, and the condition holds."""
        name = int(threading.current_thread().name)
        self.waiting[name] = can_go
        self.pass_on()
        self.calls[name].get()
        if self.failure is not None:
            raise Stuck from self.failure
        del self.waiting[name]

    def run(self, partitions: Sequence[Callable[[], None]]) -> None:
        """Run all partitions to their end."""

        def body(name: int, partition: Callable[[], None]) -> None:
            self.calls[name].get()
            try:
                if self.failure is None:
                    del self.waiting[name]
                    partition()
            except BaseException as error:
                self.failure = self.failure or error
            self.pass_on()

        self.waiting = dict.fromkeys(range(len(partitions)), lambda: True)
        self.calls = [SimpleQueue() for _ in partitions]
        threads = [
            threading.Thread(target=body, args=(name, partition), name=str(name), daemon=True)
            for name, partition in enumerate(partitions)
        ]
        for thread in threads:
            thread.start()
        self.pass_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure


@dataclass
class Barrier:
    """An mbarrier: its phase ends with the last arrival."""

    turns: Turns
    count: int = 0
    pending: int = 0
    phase: int = 0

    def arrive(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Cell:
    """One buffer of shared memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.content: Tensor | None = None
        self.readers = 0  # products in flight, and the copy engine

    def write(self, x: Tensor) -> None:
        assert self.readers == 0, "shared memory is written while it is read"
        self.content = x.to(self.dtype)

    def write_part(self, x: Tensor, part: Callable[[Tensor], Tensor], shape: Sequence[int]) -> None:
        """Write a part of a matrix of a shape; the rest keeps what it held, NaN if that was no such matrix."""
        if self.content is None or self.content.shape != torch.Size(shape):
            self.content = torch.full(tuple(shape), torch.nan, dtype=self.dtype)
        whole = self.content.clone()
        part(whole).copy_(x)
        self.write(whole)


@dataclass
class View:
    """A matrix in shared memory, or a part of one."""

    cell: Cell
    part: Callable[[Tensor], Tensor] = lambda x: x
    order: Any = None
    shape: tuple[int, ...] | None = None  # of the matrix, where it has been said
    is_whole: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return self.cell.dtype

    def _reinterpret(self, dtype: Any, shape: Any, layout: Any) -> View:
        return View(self.cell, self.part, layout, tuple(int(n) for n in shape), self.is_whole)

    def slice(self, start: int, length: int, dim: int = 0) -> View:
        return replace(self, part=lambda x: self.part(x).narrow(dim, int(start), int(length)), is_whole=False)

    def permute(self, order: Any) -> View:
        return replace(self, part=lambda x: self.part(x).T)

    def load(self, layout: Any = None) -> Tensor:
        assert self.cell.content is not None, "shared memory is read before it is written"
        return self.part(self.cell.content)

    def store(self, x: Tensor) -> None:
        if self.is_whole:
            self.cell.write(x)
        else:
            assert self.shape is not None
            self.cell.write_part(x, self.part, self.shape)


class Buffers:
    """Buffers of one kind."""

    def __init__(self, dtype: torch.dtype, count: int) -> None:
        self.dtype = dtype
        self.cells = [Cell(dtype) for _ in range(count)]

    def index(self, place: int) -> View:
        return View(self.cells[place])


@dataclass
class Box:
    """What a descriptor says: a tensor, and the box that is copied."""

    x: Tensor
    rows: int
    columns: int
    flat: Callable[[Tensor], Tensor] | None = None
    multiplied: Callable[[int], int] = width_of

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    layout = None

    def matrix(self, place: Sequence[int]) -> tuple[Tensor, int, int]:
        """The matrix that a box lies in, and its first row and column."""
        *lead, row, column = (int(i) for i in place)
        return self.x[tuple(lead)], row, column

    def empty(self) -> Tensor:
        """A box past the end of all rows."""
        found = torch.zeros(self.rows, self.columns, dtype=self.x.dtype)
        found[:, self.multiplied(self.x.shape[-1]) :] = torch.nan
        return found

    def read(self, place: Sequence[int]) -> Tensor:
        matrix, row, column = self.matrix(place)
        found = self.empty()
        inside = matrix[row : row + self.rows, column : column + self.columns]
        found[: inside.shape[0], : inside.shape[1]] = inside
        return found

    def target(self, place: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        """Where a box is written, and what of it is."""
        matrix, row, column = self.matrix(place)
        inside = matrix[row : row + self.rows, column : column + self.columns]
        return inside, x[: inside.shape[0], : inside.shape[1]]


class PackedBox(Box):
    """Boxes of packed tokens `[1, H, T, width]`, as `operands.packed` describes them."""

    def rows_of(self, place: Sequence[int]) -> tuple[Tensor, int]:
        """The rows of a sequence that a box covers, and its first column."""
        _, end, head, row, column = (int(i) for i in place)
        first = end + row - FAR
        return self.x[0, head, first : max(first, min(first + self.rows, end))], column

    def read(self, place: Sequence[int]) -> Tensor:
        rows, column = self.rows_of(place)
        found = self.empty()
        inside = rows[:, column : column + self.columns]
        found[: inside.shape[0], : inside.shape[1]] = inside
        return found

    def target(self, place: Sequence[int], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, column = self.rows_of(place)
        inside = rows[:, column : column + self.columns]
        return inside, x[: inside.shape[0], : inside.shape[1]]


@dataclass(frozen=True)
class Pointer:
    """Addresses of elements."""

    x: Tensor
    index: Any = 0

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.x, self.index + step)


def _number(x: Tensor) -> Any:
    """A whole number where x is one."""
    return Int(int(x)) if x.dim() == 0 and not x.is_floating_point() else x


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    x, index = pointer.x.flatten(), pointer.index
    if mask is None:
        return _number(x[index])
    return torch.where(mask, x[torch.where(mask, index, 0)], other)


def _store(pointer: Pointer, value: Tensor, mask: Any = True) -> None:
    index, mask = torch.broadcast_tensors(torch.as_tensor(pointer.index), torch.as_tensor(mask))
    pointer.x.view(-1)[index[mask]] = value.expand(index.shape)[mask].to(pointer.x.dtype)


def _atomic_add(pointer: Pointer, value: Tensor) -> None:
    index, value = torch.broadcast_tensors(torch.as_tensor(pointer.index), value)
    pointer.x.view(-1).index_add_(0, index.flatten(), value.flatten())


def _either(of_tensors: Callable[..., Tensor], of_numbers: Callable[..., int]) -> Callable[..., Any]:
    """A function of tensors, or of numbers."""

    def function(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return of_tensors(*(torch.as_tensor(x) for x in (a, b)))
        return Int(of_numbers(a, b))

    return function


class Device:
    """What the kernels' modules find in the place of Gluon."""

    def __init__(self, seed: int) -> None:
        self.turns = Turns(seed)
        self.program, self.programs = Int(0), Int(1)
        self.is_ordered = False
        self.started: list[tuple[Int, Callable[[], None]]] = []
        self.adding: dict[str, list[Callable[[], Any]]] = {}
        self.in_flight: dict[str, list[list[Cell]]] = {}
        self.copies: dict[str, list[Cell]] = {}
        self.gl = SimpleNamespace(
            float32=torch.float32, int32=torch.int32, int64=torch.int64, constexpr=constexpr, static_range=range,
            zeros=lambda shape, dtype, layout: torch.zeros(*map(int, shape), dtype=dtype),
            arange=lambda first, last, layout: torch.arange(int(first), int(last)),
            full=lambda shape, x, dtype, layout: torch.full([int(n) for n in shape], x, dtype=dtype),
            minimum=_either(torch.minimum, min), maximum=_either(torch.maximum, max), where=self._where,
            max=lambda x, axis: _number(x.amax(axis)), sum=lambda x, axis: x.sum(axis), log2=torch.log2,
            load=_load, store=_store, atomic_add=_atomic_add, floor=torch.floor, convert_layout=lambda x, layout: x,
            program_id=lambda axis: self._program(), num_programs=lambda axis: self.programs,
            allocate_shared_memory=self._allocate, warp_specialize=self._warp_specialize,
            NVMMADistributedLayout=lambda *_: None, SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None,
            BlockedLayout=lambda *_: None, SharedLinearLayout=lambda **_: None, SwizzledSharedLayout=lambda *_: None,
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: Barrier, init=self._init, wait=self._wait, arrive=self._arrive, expect=self._expect
        )

    @staticmethod
    def _where(condition: Any, a: Any, b: Any) -> Any:
        is_one = not isinstance(condition, Tensor) or condition.dim() == 0
        return (a if condition else b) if is_one else torch.where(condition, a, b)

    def _allocate(self, dtype: Any, shape: Sequence[int], layout: Any) -> Any:
        if layout is Barrier:
            barriers = [Barrier(self.turns) for _ in range(int(shape[0]))]
            return SimpleNamespace(index=lambda i: barriers[i])
        lead = [int(n) for n in shape[:-2]]
        if not lead:
            # [stages, numbers], or the one buffer of its kind.
            return _Either(dtype, int(shape[0]))
        return Buffers(dtype, lead[0])

    def _init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = int(count)

    def _wait(self, barrier: Barrier, parity: int, pred: Any = True) -> None:
        self.turns.wait(lambda: not pred or barrier.phase & 1 != int(parity))

    def _arrive(self, barrier: Barrier, pred: Any = True) -> None:
        self.turns.wait()
        if pred:
            barrier.arrive()

    def _expect(self, barrier: Barrier, size: int) -> None:
        # Nobody else runs before its boxes are copied.
        barrier.arrive()

    def load(self, box: Box, place: Sequence[int], barrier: Barrier, view: View) -> None:
        view.cell.write(box.read(place))

    def fence(self) -> None:
        """Order stores before the copy engine: nothing to do where there is one memory."""

    def _copies(self) -> list[Cell]:
        return self.copies.setdefault(threading.current_thread().name, [])

    def store(self, box: Box, place: Sequence[int], view: View) -> None:
        inside, x = box.target(place, view.load())
        inside.copy_(x)
        self._read_by_engine(view.cell)

    def reduce_add(self, box: Box, place: Sequence[int], view: View) -> None:
        x = view.load()
        if box.flat is not None:  # lines of a slab
            assert view.cell.content is not None
            x = view.part(box.flat(view.cell.content).view(-1, box.columns))
            assert len(x) == box.rows
        inside, x = box.target(place, x)
        if self.is_ordered and self.turns.draw.random() < 0.5:
            later = x.clone()
            # What is added to slabs has an order; the rest may come as late as the end of the kernel.
            name = threading.current_thread().name if box.flat is not None else ""
            self.adding.setdefault(name, []).append(lambda: inside.add_(later))
        else:
            inside.add_(x)
        self._read_by_engine(view.cell)

    def ticket(self, counter: Pointer) -> Int:
        """Draw the next number."""
        drawn = Int(int(counter.x[counter.index]))
        counter.x[counter.index] += 1
        self.turns.wait()
        return drawn

    def await_turn(self, place: Pointer, turn: int) -> None:
        self.turns.wait(lambda: int(place.x[place.index]) >= turn)

    def hand_over(self, place: Pointer, turn: int) -> None:
        for add in self.adding.pop(threading.current_thread().name, []):
            add()
        self.turns.wait()
        if turn > 0:
            place.x[place.index] = turn

    def _read_by_engine(self, cell: Cell) -> None:
        cell.readers += 1
        self._copies().append(cell)

    def store_wait(self, pending: int) -> None:
        copies = self._copies()
        while len(copies) > pending:
            copies.pop(0).readers -= 1

    def warpgroup_mma(self, a: Any, b: View, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
        cells = [x.cell for x in (a, b) if isinstance(x, View)]
        for cell in cells:
            cell.readers += 1
        self.in_flight.setdefault(threading.current_thread().name, []).append(cells)
        first = a.load() if isinstance(a, View) else a
        product = first.to(torch.float32) @ b.load().to(torch.float32)
        return acc + product if use_acc else product

    def warpgroup_mma_wait(self, pending: int, deps: Sequence[Any]) -> Any:
        flight = self.in_flight.setdefault(threading.current_thread().name, [])
        while len(flight) > pending:
            for cell in flight.pop(0):
                cell.readers -= 1
        self.turns.wait()
        return deps[0] if len(deps) == 1 else tuple(deps)

    def _warp_specialize(self, partitions: Sequence[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        bodies = [lambda f=f, arguments=arguments: f(*arguments) for f, arguments in partitions]
        if self.is_ordered:
            self.started += [(self.program, body) for body in bodies]
        else:
            self.turns.run(bodies)

    def _program(self) -> Int:
        """Whose thread this is."""
        name = threading.current_thread().name
        return self.started[int(name)][0] if self.is_ordered and name.isdigit() else self.program

    def run_together(self) -> None:
        """Run all programs that have been started."""
        self.turns.run([body for _, body in self.started])
        for add in self.adding.pop("", []):
            add()
        assert not any(self.adding.values()), "a sum is not waited for"


class _Either(View):
    """A buffer of rows: one by one where it is indexed, else as the one buffer that it is."""

    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        super().__init__(Cell(dtype))
        self.rows = [Cell(dtype) for _ in range(rows)]

    def index(self, place: int) -> View:
        return View(self.rows[place])


@contextmanager
def on_host(device: Device, modules: Sequence[ModuleType]) -> Iterator[pytest.MonkeyPatch]:
    """Let the functions of these modules run as Python, on a device that is none.

    What a caller replaces besides goes through the patch that is handed out: one that began earlier would be
    undone later, and put back what stands here meanwhile.
    """
    names = {
        "gl": device.gl, "mbarrier": device.mbarrier, "load": device.load, "store": device.store,
        "reduce_add": device.reduce_add, "store_wait": device.store_wait, "fence_async_shared": device.fence,
        "warpgroup_mma": device.warpgroup_mma, "warpgroup_mma_wait": device.warpgroup_mma_wait, "exp2": torch.exp2,
        "ticket": device.ticket, "await_turn": device.await_turn, "hand_over": device.hand_over,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, value in list(vars(module).items()):
                if name in names:
                    patch.setattr(module, name, names[name])
                elif isinstance(value, JITFunction):
                    patch.setattr(module, name, value.fn)
                elif isinstance(value, constexpr):
                    own = value.value
                    patch.setattr(module, name, Int(own) if type(own) is int else own)
        yield patch


def _held(x: Any) -> Any:
    """An argument as kernels get it."""
    return Pointer(x) if isinstance(x, Tensor) else Int(x) if type(x) is int else x


class Launched:
    """A kernel that runs on the host, program after program, or all at once where additions have an order."""

    def __init__(self, function: Callable[..., None], device: Device) -> None:
        self.function, self.device = function, device

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            held = [_held(x) for x in arguments]
            for name in ("num_warps", "maxnreg"):
                constants.pop(name)
            constants |= {name: _held(x) for name, x in constants.items() if name.islower()}
            self.device.is_ordered = constants.get("REPEATABLE", False)
            for program in range(grid[0]):
                self.device.program, self.device.programs = Int(program), Int(grid[0])
                self.function(*held, **constants)
            if self.device.is_ordered:
                self.device.run_together()

        return launch
