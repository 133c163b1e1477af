"""How Python calls a kernel: its samples in pieces, which this thread or torch's threads work on.

A kernel that Python calls counts references to its arrays: once for each row that it reads, by an atomic operation. Two
threads that count in one place wait for each other, and took longer than one. An entry passes its arrays
without a counter, because the caller holds them until all pieces are done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.compiler import Flags
from numba.extending import intrinsic

from deqcore_torch.native.kernels import compiled

BYTES: Final = ir.IntType(8).as_pointer()
NUMBER: Final = ir.IntType(64)
CODE: Final = ir.IntType(32)
FAILED: Final = ir.IntType(1)
WORK: Final = ir.FunctionType(ir.VoidType(), [BYTES])
PARALLEL: Final = ir.FunctionType(ir.VoidType(), [WORK.as_pointer(), BYTES, CODE, CODE])
"""`GOMP_parallel(work, shared, threads, flags)`. With 0 threads it takes torch's number: another number would end some
of torch's threads, which start again at its next operation."""


@cache
def entry(kernel: Any) -> Callable[..., None]:
    """Return the entry of a kernel, `entry(parallel, start, stop, pieces, *arguments)`.

    `parallel` is the address of `GOMP_parallel`, or 0 for this thread alone. Each thread takes the next piece of the
    samples `start … stop` until none is left, so that any number of threads works on all of them. When all have ended,
    a `MemoryError` tells that a piece had no memory for its small arrays: kernels have no other error.
    """
    own, known = kernel.py_func, {"_in_pieces": _in_pieces, "kernel": kernel, "__name__": kernel.py_func.__module__}
    # The cache of compiled code lies beside the kernel's file.
    code = _template.__code__.replace(
        co_filename=own.__code__.co_filename,
        co_firstlineno=own.__code__.co_firstlineno,
        co_name=f"{own.__name__}_entry",
    )
    return compiled(FunctionType(code, known))  # type: ignore[no-any-return]


def _template(parallel, start, stop, pieces, *arguments):  # type: ignore[no-untyped-def]
    if _in_pieces(parallel, start, stop, pieces, kernel, arguments):  # type: ignore[name-defined]  # noqa: F821
        raise MemoryError("A compiled solver step found no memory. Use a smaller batch or a smaller history_size.")


@intrinsic
def _in_pieces(typing: Any, parallel: Any, start: Any, stop: Any, pieces: Any, kernel: Any, arguments: Any) -> Any:
    """Call `kernel(*arguments, a, b)` for each piece; return whether one of them failed."""
    called = types.void(*arguments.types, types.int64, types.int64)
    signature = types.boolean(parallel, start, stop, pieces, kernel, arguments)

    def code(context: Any, builder: Any, _: Any, values: Any) -> Any:
        parallel, start, stop, pieces, _, packed = values
        flags = Flags()
        kernel.dispatcher.targetdescr.options.parse_as_flags(flags, kernel.dispatcher.targetoptions)
        result = context.compile_subroutine(builder, kernel.dispatcher.py_func, called, flags=flags)
        kinds = zip(arguments.types, cgutils.unpack_tuple(builder, packed), strict=True)
        borrowed = cgutils.pack_struct(builder, [_borrowed(context, builder, *each) for each in kinds])
        parts = [NUMBER(0), FAILED(0), start, builder.sub(stop, start), pieces, borrowed]
        shared = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, parts))
        work = ir.Function(builder.module, WORK, builder.module.get_unique_name("work"))
        work.linkage = "internal"
        _write_work(context, work, shared.type, result.fndesc, called)
        given = builder.bitcast(shared, BYTES)
        with builder.if_else(cgutils.is_not_null(builder, parallel)) as (together, alone):
            with together:
                run = builder.inttoptr(parallel, PARALLEL.as_pointer())
                builder.call(run, [work, given, CODE(0), CODE(0)])
            with alone:
                builder.call(work, [given])
        return builder.load(cgutils.gep_inbounds(builder, shared, 0, 1))

    return signature, code


def _borrowed(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """Return an array without its counter of references, and anything else as it is."""
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = array.meminfo.type(None)
    return array._getvalue()


def _write_work(context: Any, work: Any, shared: Any, kernel: Any, called: Any) -> None:
    """Write the function that each thread runs on what they share."""
    builder = ir.IRBuilder(work.append_basic_block())
    following, body, end = (work.append_basic_block(name) for name in ("following", "body", "end"))
    places = [cgutils.gep_inbounds(builder, builder.bitcast(work.args[0], shared), 0, i) for i in range(6)]
    start, count, pieces, packed = (builder.load(place) for place in places[2:])
    arguments = cgutils.unpack_tuple(builder, packed)
    builder.branch(following)
    builder.position_at_end(following)
    piece = builder.atomic_rmw("add", places[0], NUMBER(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", piece, pieces), body, end)
    builder.position_at_end(body)
    cuts = (builder.sdiv(builder.mul(count, each), pieces) for each in (piece, builder.add(piece, NUMBER(1))))
    own = [*arguments, *(builder.add(start, cut) for cut in cuts)]
    status, _ = context.call_internal_no_propagate(builder, kernel, called, own)
    with builder.if_then(status.is_error, likely=False):
        builder.store(FAILED(1), places[1])
    builder.branch(following)
    builder.position_at_end(end)
    builder.ret_void()
