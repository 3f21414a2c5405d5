"""Functions that LLVM compiles by themselves, which compiled kernels call by address.

numba optimises a function again in every kernel that calls it, with all that it calls; a large one that is emitted
instruction by instruction gains nothing from that. Here it is compiled once per machine, in a fraction of the time, and
only the group that a model needs. A call costs a few nanoseconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from sempre.kernels.jit import cache_folder
from sempre.kernels.kernel_cache import KernelFiles
from sempre.kernels.vector_ir import F32, I64, address_intrinsic

Emit = Callable[..., ir.Value | None]

_VOID = ir.VoidType()
_FLOAT_ARGUMENT, _INTEGER_ARGUMENT = "f", "i"
_OPTIMISATION = 2
# for instructions that are written out
llvm.initialize_native_asmparser()
# LLVM's code generator is shared by all threads of the process
_COMPILING = Lock()


@dataclass(frozen=True)
class Native:
    """A function whose body is `emit(builder, *arguments)`.

    `arguments`: a letter for each, i for an integer or address (int64), f for a float32. It returns what `emit`
    returns, a float32, if `returns_float`, and otherwise nothing.
    """

    emit: Emit
    arguments: str
    returns_float: bool = False

    @property
    def kind(self) -> ir.FunctionType:
        of = {_INTEGER_ARGUMENT: I64, _FLOAT_ARGUMENT: F32}
        return ir.FunctionType(F32 if self.returns_float else _VOID, [of[letter] for letter in self.arguments])


class NativeGroup:
    """Functions that are compiled together, when their table is first asked for."""

    def __init__(self, name: str, functions: Mapping[str, Native]) -> None:
        """`name` distinguishes the group from all others, on disk too."""
        self.name = name
        self._functions = dict(functions)

    @cached_property
    def _compiled(self) -> tuple[Any, np.ndarray]:
        """The engine, which owns the code, and the functions' addresses [count] int64."""
        with _COMPILING:
            engine = _load(self._object_code())
        return engine, np.asarray([engine.get_function_address(name) for name in self._functions], np.int64)

    @cached_property
    def table(self) -> int:
        """The address of the functions' addresses, in the order of the group; valid as long as the group."""
        return int(self._compiled[1].ctypes.data)

    def _object_code(self) -> bytes:
        machine = cpu_target.target_context.codegen().magic_tuple()
        folder = cache_folder()
        files = None if folder is None else KernelFiles(folder, f"native.{self.name}.{sys.implementation.cache_tag}")
        code: bytes | None = None if files is None else files.load(machine)
        if code is None:
            code = _compile(self._module(), *machine)
            if files is not None:
                files.save(machine, code)
        return code

    def _module(self) -> ir.Module:
        module = ir.Module(self.name)
        for name, native in self._functions.items():
            function = ir.Function(module, native.kind, name)
            builder = ir.IRBuilder(function.append_basic_block())
            result = native.emit(builder, *function.args)
            if native.returns_float:
                builder.ret(result)
            else:
                builder.ret_void()
        return module


def _machine(triple: str, cpu: str, features: str) -> Any:
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=_OPTIMISATION, reloc="default", codemodel="jitdefault"
    )


def _compile(module: ir.Module, triple: str, cpu: str, features: str) -> bytes:
    """Object code for the machine. No fast-math: every operation of `module` rounds as IEEE 754 says."""
    module.triple = triple
    machine = _machine(triple, cpu, features)
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=_OPTIMISATION))
    passes.getModulePassManager().run(parsed, passes)
    code: bytes = machine.emit_object(parsed)
    return code


def _load(code: bytes) -> Any:
    """An engine that has linked the object code."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(triple, cpu, features))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _emit_call(b: ir.IRBuilder, returns: ir.Type, table: ir.Value, index: ir.Value, *arguments: ir.Value) -> ir.Value:
    kind = ir.FunctionType(returns, [argument.type for argument in arguments])
    entry = b.inttoptr(b.add(table, b.mul(index, I64(8))), kind.as_pointer().as_pointer())
    return b.call(b.load(entry), arguments)


def _emit_void_call(b: ir.IRBuilder, table: ir.Value, index: ir.Value, *arguments: ir.Value) -> None:
    _emit_call(b, _VOID, table, index, *arguments)


def _emit_float_call(b: ir.IRBuilder, table: ir.Value, index: ir.Value, *arguments: ir.Value) -> ir.Value:
    return _emit_call(b, F32, table, index, *arguments)


# (table, index, *arguments) in compiled kernels: call function `index` of a group, whose arguments these must be
call_native = address_intrinsic(_emit_void_call)
call_native_float = address_intrinsic(_emit_float_call, returns=types.float32)
