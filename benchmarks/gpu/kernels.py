"""Ceilings of a device: products, copies, attention by each backend, and the first call of an unseen length."""

from __future__ import annotations

import importlib
import itertools
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.record import Record, Target, timed

_LARGEST_FLOAT8 = 448.0
_PACKAGES = ("torch", "triton", "transformers", "diffusers", "flash-attn-3", "grpcio", "nvidia-cudnn-cu13")


def versions(record: Record, target: Target) -> None:
    """Records the device, its state, versions, and which ways of attention exist."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    record.add("versions", **found)
    if not target.on_gpu:
        return
    properties = torch.cuda.get_device_properties(target.device)
    record.add(
        "device",
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory_gib=round(properties.total_memory / 2**30, 1),
        processors=properties.multi_processor_count,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
    )
    record.attempt("state", state)
    record.attempt("attention implementations", _implementations)


def state() -> dict[str, Any]:
    """Returns clock, temperature and power of the first GPU."""
    if (program := shutil.which("nvidia-smi")) is None:
        return {"nvidia_smi": None}
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
    answer = subprocess.run(
        [program, f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    )
    return {"nvidia_smi": answer.stdout.strip()}


def _implementations() -> dict[str, Any]:
    attention: Any = importlib.import_module("torch.nn.attention")
    has_lists = hasattr(attention, "list_flash_attention_impls")
    return {"flash": list(attention.list_flash_attention_impls()) if has_lists else None}


def products(record: Record, target: Target) -> None:
    """Records products in bf16 and fp8, of one size and of the shapes in a step, and a copy."""
    side, device, dtype = target.scale.matrix, target.device, target.dtype
    hidden = 3072 if target.on_gpu else 96
    shapes = [(side, side, side)]
    for rows in (512, 1536, 4608, 12288) if target.on_gpu else (48,):
        shapes += [(rows, hidden, 3 * hidden), (rows, hidden, 9 * hidden), (rows, 4 * hidden, hidden)]
    for rows, inner, columns in shapes:
        left, right = (
            torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (columns, inner))
        )
        name, operations = f"{rows}×{inner}→{columns}", 2 * rows * inner * columns
        _rate(record, f"plain {name}", target, lambda a=left, b=right: functional.linear(a, b), operations)
        if target.on_gpu:
            _rate(record, f"fp8 {name}", target, _float8_product(left, right), operations)
    source = torch.empty(target.scale.copied_bytes, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    # Bytes are read and written.
    _rate(record, "copy", target, lambda: copy.copy_(source), 2 * source.numel())


def _rate(record: Record, case: str, target: Target, run: Callable[[], object], operations: int) -> None:
    def measure() -> dict[str, Any]:
        times = timed(run, target)
        return times | {"tera_per_second": round(operations / times["ms"] / 1e9, 3)}

    record.attempt(case, measure)


def _float8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    scales = [each.float().abs().amax(dim=1, keepdim=True) / _LARGEST_FLOAT8 for each in (left, right)]
    small = [
        (each / scale).to(torch.float8_e4m3fn) for each, scale in zip((left, right), scales, strict=True)
    ]
    return lambda: torch._scaled_mm(
        small[0], small[1].t(), scale_a=scales[0], scale_b=scales[1].t(), out_dtype=torch.bfloat16
    )


def attention(record: Record, target: Target) -> None:
    """Records attention by each backend: steady, and the first call of an unseen length on two threads."""
    heads = 24 if target.on_gpu else 2
    for tokens, batch in [(n, 1) for n in target.scale.attention_tokens] + [
        (target.scale.attention_tokens[0], 4)
    ]:
        query, key, value = _heads(target, heads, tokens, batch)
        operations = 4 * batch * heads * tokens * tokens * query.shape[-1]
        for name, run in _backends(target, query, key, value):
            _rate(record, f"{name} {batch}×{tokens}", target, run, operations)
    lengths = itertools.count(target.scale.attention_tokens[0] + 16, 16)
    for name in ("default", *(_BACKENDS if target.on_gpu else ())):
        record.attempt(
            f"first call of an unseen length, {name}", lambda n=name: _first_calls(target, n, next(lengths))
        )


_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _heads(target: Target, heads: int, tokens: int, batch: int) -> list[Tensor]:
    shape = (batch, tokens, heads, 128)
    made = (torch.randn(shape, device=target.device, dtype=target.dtype) for _ in range(3))
    # As the blocks lay them out.
    return [each.transpose(1, 2) for each in made]


def _backends(
    target: Target, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    yield "default", lambda: functional.scaled_dot_product_attention(query, key, value)
    if not target.on_gpu:
        return
    for name in _BACKENDS:
        yield name, lambda n=name: _with_backend(n, query, key, value)
    yield "varlen", _varlen(query, key, value)


def _with_backend(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(_BACKENDS[name]):
        return functional.scaled_dot_product_attention(query, key, value)


def _varlen(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    batch, _, tokens, _ = query.shape
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)

    def run() -> Tensor:
        varlen: Any = importlib.import_module("torch.nn.attention.varlen")
        result: Tensor = varlen.varlen_attn(*flat, starts, starts, tokens, tokens)
        return result

    return run


def _first_calls(target: Target, name: str, tokens: int) -> dict[str, Any]:
    query, key, value = _heads(target, 24 if target.on_gpu else 2, tokens, 1)

    def run() -> Tensor:
        if name == "default":
            return functional.scaled_dot_product_attention(query, key, value)
        return _with_backend(name, query, key, value)

    result: dict[str, Any] = {"tokens": tokens} | timed(run, target)

    def again() -> None:
        result["first_ms_of_a_second_thread"] = timed(run, target)["first_ms"]

    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
    return result
