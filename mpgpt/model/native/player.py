"""The compiled player of programs: a slice's operations are handed to C++ once, and played once a step.

Knows: how programs become the structures of ``core/player.h``, and what memory they point to.
Must not know: families, files, other ranks, or how an operation is computed.

Legend: T tokens of a step, E embed, V vocabulary, D head dimension, S positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mpgpt.core import Row
from mpgpt.errors import ModelError
from mpgpt.model.loader import Loader, product_blocks
from mpgpt.model.native.library import BUFFERS, OperationArgs, PlayerArgs, StepArgs, cores, needed
from mpgpt.model.native.many_rows import LEAST_ROWS, ManyRows
from mpgpt.model.native.pages import PAGE, Pages
from mpgpt.model.native.weights import PackedWeight, padded
from mpgpt.model.program import (
    Activate,
    Add,
    Attend,
    Buffer,
    Norm,
    Operation,
    Product,
    Program,
    Rotate,
    Select,
    Write,
)

BUFFER_IDS: Mapping[Buffer, int] = {buffer: number for number, buffer in enumerate(Buffer)}
RMS_NORM, LAYER_NORM, PRODUCT, ROTATE, WRITE, ATTEND, ACTIVATE, ADD, SELECT = range(9)
ACTIVATIONS: Mapping[str, int] = {
    "silu": 0, "swish": 0, "relu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "gelu": 3,
}  # fmt: skip
STORED: Mapping[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
assert len(BUFFER_IDS) == BUFFERS
MOST_THREADS = 16
"""Of a player: more would mostly wait."""


def team_size() -> int:
    """A player's threads where torch has as many as it has now; no more than cores, for whose operations they would
    wait."""
    return min(torch.get_num_threads(), cores(), MOST_THREADS)


class NativePlayer:
    """Layers, and what follows the last where ``closing`` is given, over a cache of their own.

    ``programs`` are the layers', in order; their weights are loaded one after another.
    """

    def __init__(
        self, programs: Sequence[Program], closing: Program | None, loader: Loader, *, slots: int, context: int,
        threads: int, calls: ctypes.CDLL | None = None,
    ) -> None:  # fmt: skip
        """``calls`` are another library's than this processor's. Raises ``ModelError`` where none is to be had."""
        config = loader.config
        self._config, self._source, self._kernels = config, loader.source, loader.kernels
        stored = self._kernels.stored
        self._calls = calls or needed()
        self._kept: list[object] = []
        """What the library points to."""
        self.nbytes = self.head_nbytes = 0
        self._pages = Pages(slots, context)
        self._rotary = self._rotary_tables(context) if config.inv_freq else None
        self._first_layer = min((op.layer for p in programs for op in p.operations if isinstance(op, Write)), default=0)
        whole = [*programs, *([closing] if closing else [])]
        operations = [op for program in whole for op in program.operations]
        self._many_rows: dict[int, tuple[Product, ManyRows]] = {}
        """The products that torch computes for many rows, by their index."""
        self._selected = next((i for i, op in enumerate(operations) if isinstance(op, Select)), len(operations))
        args = (OperationArgs * len(operations))(*(self._operation(i, op) for i, op in enumerate(operations)))
        most = max((many_rows.part_bytes for _, many_rows in self._many_rows.values()), default=0)
        self._space = torch.empty(most, dtype=torch.uint8)
        self._ends = list(accumulate(len(program.operations) for program in whole))
        self._layers, self._closes = len(programs), closing is not None
        page_bytes = self._page_bytes(stored)
        self._caches = [torch.empty(self._pages.count * page_bytes, dtype=torch.uint8) for _ in programs]
        pages = (ctypes.c_void_p * len(programs))(*(cache.data_ptr() for cache in self._caches))
        player = PlayerArgs(
            operations=len(operations), operation=args, widths=self._widths(operations), heads=config.heads,
            kv_heads=config.kv_heads, dim=config.head_dim, stored=STORED[stored], positions=context,
            layers=len(programs), threads=threads, pages=ctypes.addressof(pages),
        )  # fmt: skip
        self._player = self._calls.mpgpt_player(player)
        if not self._player:
            raise ModelError(f"there is no memory or there are no {threads} threads for the kernels")

    def __del__(self) -> None:
        if player := getattr(self, "_player", None):
            self._calls.mpgpt_free(player)

    @property
    def kv_nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    def play(self, rows: Sequence[Row], x_TE: Tensor, between: Callable[[], None]) -> Tensor:
        """See ``slice.Player``."""
        x_TE = x_TE.contiguous()
        positions, slots, outputs = self._places(rows)
        out = torch.empty((len(outputs), self._config.vocab) if self._closes else x_TE.shape, dtype=torch.float32)
        step = StepArgs(
            rows=len(positions), outputs=len(outputs), positions=positions.ctypes.data, slots=slots.ctypes.data,
            output_rows=outputs.ctypes.data, tables=self._pages.tables.ctypes.data, table=self._pages.tables.shape[1],
            hidden_in=x_TE.data_ptr(),
        )  # fmt: skip
        whole = self._ends[-1]
        first = 0
        for layer, end in enumerate(self._ends):
            first = self._by_torch(step, first, end)
            if end == whole and self._closes:
                step.logits = out.data_ptr()
            elif end == whole:
                step.hidden_out = out.data_ptr()
            self._play_range(step, first, end)
            first = end
            if layer < self._layers:
                between()
        return out

    def _by_torch(self, step: StepArgs, first: int, end: int) -> int:
        """Play up to behind the last of the operations before ``end`` that torch computes; what is left begins at the
        index that is returned."""
        for at, (op, many_rows) in self._many_rows.items() if step.rows >= LEAST_ROWS else ():
            count = step.rows if at < self._selected else step.outputs
            if first <= at < end and count >= LEAST_ROWS:
                self._play_range(step, first, at)
                x_TI, y_TO = self.rows(op.source, count, op.inputs), self.rows(op.target, count, op.outputs)
                many_rows.multiply(x_TI, y_TO, self._space, partial(self.unpack, at))
                first = at + 1
        return first

    def unpack(self, product: int, first: int, last: int, brain: bool, columns: int) -> None:
        """Panels ``first`` to before ``last`` of a product's weight, by its index among all operations, as
        [inputs, panels x 16] at the address ``columns``; as bfloat16 or else as float32."""
        self._calls.mpgpt_unpack(self._player, product, first, last, brain, columns)

    def rows(self, buffer: Buffer, count: int, width: int) -> Tensor:
        """The first ``width`` elements of a buffer's first rows, where they lie: valid until the next step."""
        stride = ctypes.c_int64()
        at = self._calls.mpgpt_buffer(self._player, BUFFER_IDS[buffer], stride)
        floats = ctypes.cast(at, ctypes.POINTER(ctypes.c_float))
        return torch.from_numpy(np.ctypeslib.as_array(floats, (count, stride.value)))[:, :width]

    def _play_range(self, step: StepArgs, first: int, end: int) -> None:
        if self._calls.mpgpt_play(self._player, step, first, end):
            raise MemoryError(f"there is no memory for a step of {step.rows} rows")
        step.hidden_in = None

    def fill_cache(self, value: float) -> None:
        """See ``slice.Player``."""
        for cache in self._caches:
            cache.view(self._kernels.stored).fill_(value)

    def _places(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each token its position and its slot; and which tokens have an output."""
        positions, slots, outputs = list[int](), list[int](), list[int]()
        for row in rows:
            self._pages.reserve(row)
            positions += range(row.start, row.stop)
            slots += [row.slot] * len(row.ids)
            outputs += range(len(positions) - row.outputs, len(positions))
        return np.array(positions, np.int32), np.array(slots, np.int32), np.array(outputs, np.int32)

    def _page_bytes(self, stored: torch.dtype) -> int:
        dim = self._config.head_dim
        return self._config.kv_heads * PAGE * (dim + -(-dim // 16) * 16) * stored.itemsize

    def _widths(self, operations: Sequence[Operation]) -> ctypes.Array[ctypes.c_int32]:
        c = self._config
        widths = {
            Buffer.HIDDEN: c.embed, Buffer.NORMED: c.embed, Buffer.CHANGE: c.embed, Buffer.LOGITS: c.vocab,
            Buffer.QKV: (c.heads + 2 * c.kv_heads) * c.head_dim, Buffer.MIXED: c.heads * c.head_dim,
            Buffer.INNER: 2 * c.inner if c.gated else c.inner, Buffer.ACTIVE: c.inner,
        }  # fmt: skip
        for op in operations:
            if isinstance(op, Product):
                assert widths[op.source] >= op.inputs and widths[op.target] >= op.outputs
        return (ctypes.c_int32 * BUFFERS)(*(widths[buffer] for buffer in Buffer))

    def _rotary_tables(self, context: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [S, D / 2] each."""
        frequencies, gain = torch.tensor(self._config.inv_freq, dtype=torch.float32), self._config.rope_gain
        half = len(frequencies)
        cosines, sines = (torch.empty(context, half) for _ in range(2))
        self._calls.mpgpt_rotary(frequencies.data_ptr(), half, context, gain, cosines.data_ptr(), sines.data_ptr())
        return cosines, sines

    def _operation(self, number: int, op: Operation) -> OperationArgs:
        match op:
            case Norm():
                return self._norm(op)
            case Product():
                return self._product(number, op)
            case Rotate():
                assert self._rotary
                cosines, sines = (table.data_ptr() for table in self._rotary)
                at = BUFFER_IDS[op.buffer]
                return OperationArgs(kind=ROTATE, source=at, target=at, a=op.heads, data=cosines, more=sines)
            case Write():
                at = BUFFER_IDS[op.source]
                return OperationArgs(kind=WRITE, source=at, target=at, a=op.layer - self._first_layer)
            case Attend():
                return OperationArgs(
                    kind=ATTEND, a=op.layer - self._first_layer, b=op.window, x=op.scale, **_between(op)
                )  # fmt: skip
            case Activate():
                return OperationArgs(
                    kind=ACTIVATE, a=ACTIVATIONS[op.function], b=op.gated, c=self._config.inner, **_between(op)
                )  # fmt: skip
            case Add():
                return OperationArgs(kind=ADD, c=self._config.embed, **_between(op))
            case Select():
                return OperationArgs(kind=SELECT, a=sum(1 << BUFFER_IDS[buffer] for buffer in op.buffers))

    def _norm(self, op: Norm) -> OperationArgs:
        weight = padded(self._source.vector(f"{op.name}.weight"))
        bias = padded(self._source.vector(f"{op.name}.bias")) if op.centred else None
        self._kept += [weight, bias]
        first, last = op.heads or (0, 1)
        return OperationArgs(
            kind=LAYER_NORM if op.centred else RMS_NORM, a=first, b=last,
            c=self._config.head_dim if op.heads else self._config.embed, x=self._config.eps,
            data=weight.data_ptr(), more=None if bias is None else bias.data_ptr(), **_between(op),
        )  # fmt: skip

    def _product(self, number: int, op: Product) -> OperationArgs:
        source = self._source
        biases = [source.vector(f"{name}.bias") for name in op.names] if op.biased else []
        dtype, bias = self._kernels.dtype_of(op.inputs, head=op.head), torch.cat(biases) if biases else None
        weight = PackedWeight(self._calls, dtype, op.inputs, op.outputs, op.leaves or (op.inputs,), bias)
        weight.fill(product_blocks(source, op), op.label)
        self._kept.append(weight)
        many_dtype = None if op.head else self._kernels.many_rows(op.inputs, op.outputs)
        if many_dtype:  # never of the head, whose rows are few and whose logits do not lie in a buffer
            self._many_rows[number] = op, ManyRows(weight, many_dtype)
        self.nbytes += weight.nbytes
        self.head_nbytes += weight.nbytes if op.head else 0
        return OperationArgs(kind=PRODUCT, data=ctypes.addressof(weight.args), **_between(op))


def _between(op: Norm | Product | Attend | Activate | Add) -> dict[str, int]:
    return {"source": BUFFER_IDS[op.source], "target": BUFFER_IDS[op.target]}
