"""Loads safetensors into a module built on the `meta` device, strictly in both directions.

Every name, shape and dtype is compared before a value is read, and a tensor that is not needed is never read.
`weights_digest` identifies the loaded weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from klein_core.checkpoint.component import Component
from klein_core.checkpoint.files import Checkpoint
from klein_core.checkpoint.header import PLAIN_DTYPES
from klein_core.checkpoint.key_mapping import KeyMap
from klein_core.checkpoint.tensor_reader import TORCH_DTYPES, TensorReader
from klein_core.errors import listed, raise_if_problems
from klein_core.quantization.loading import QuantizedLoader
from klein_core.quantization.quantized_weight import QuantizedWeight, set_weight, share_buffer

DIGEST_SAMPLES = 1024
"""About how many elements of each tensor the digest covers; training of any kind changes more than the others."""
_GOLDEN = 2654435769
"""2³² / φ: multiples of it, modulo 2³², are spread evenly whatever their number (Knuth, vol. 3, 6.4)."""


def load_weights(
    module: nn.Module,
    component: Component,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    quantized: QuantizedLoader | None = None,
) -> None:
    """Gives every parameter and persistent buffer of `module` its value from the checkpoint.

    Args:
        module: built on `meta`; its non-persistent buffers must be real already. A buffer that the checkpoint does
            not have and the component does not need becomes zeros.
        component: the tensors. Those that it does not need are not read, and their shards may be absent.
        device: where the tensors go, one at a time.
        dtype: of every tensor; `None` is the checkpoint's own (the commonest of its plain values).
        quantized: loads what is stored quantized; without it such a checkpoint is rejected.

    Raises:
        CheckpointError: names are missing, extra, half of a fused group, of another shape or dtype, or a file
            is corrupt. The message lists the names and the file. The module is unchanged.
    """
    checkpoint, targets = component.checkpoint, module.state_dict()
    match = component.match(targets, allow_companions=quantized is not None)
    match.raise_if_problems(checkpoint.path)
    quantized, plan = quantized or QuantizedLoader(), match.plan
    names = {each.name for slices in plan.values() for each in slices}
    _check_shapes(plan, targets, {name: quantized.shape(name, checkpoint) for name in names}, checkpoint.path)
    plain = {name: checkpoint.entry(name).dtype for name in names if not quantized.is_quantized(name)}
    unsupported = [f"{name} ({stored})" for name, stored in plain.items() if stored not in PLAIN_DTYPES]
    raise_if_problems(checkpoint.path, [(f"not one of {', '.join(PLAIN_DTYPES)}:", unsupported)])

    dtype = dtype or _commonest_dtype(checkpoint, names)
    loaded: dict[str, Tensor] = {}
    weights: dict[str, QuantizedWeight] = {}
    with TensorReader(checkpoint, names.union(*map(quantized.companions, names)), device) as reader:
        for target, slices in plan.items():
            value = quantized.load(target, slices, targets[target].shape, reader, dtype)
            if isinstance(value, Tensor):
                loaded[target] = value
            else:
                weights[target] = value
    for target in targets.keys() - plan.keys():
        loaded[target] = torch.zeros(targets[target].shape, dtype=targets[target].dtype, device=device)
    _assign(module, loaded, weights)


def _commonest_dtype(checkpoint: Checkpoint, names: set[str]) -> torch.dtype:
    """Returns the dtype that most of the plain values are stored in; bfloat16 if there are none."""
    counts: Counter[str] = Counter()
    for name in names:
        entry = checkpoint.entry(name)
        counts[entry.dtype] += entry.element_count if entry.dtype in PLAIN_DTYPES else 0
    commonest, count = counts.most_common(1)[0]
    return TORCH_DTYPES[commonest] if count else torch.bfloat16


def _assign(module: nn.Module, loaded: Mapping[str, Tensor], weights: Mapping[str, QuantizedWeight]) -> None:
    """Sets all parameters and buffers; the module is unchanged until here."""
    for name, weight in weights.items():
        set_weight(module, name, weight)
    left = module.load_state_dict(loaded, strict=False, assign=True)
    inner = {f"{name}.{buffer}" for name, weight in weights.items() for buffer in weight.state_dict()}
    if left.unexpected_keys or set(left.missing_keys) - inner:
        raise RuntimeError(
            f"parameters left without a value: {listed(left.unexpected_keys + left.missing_keys)}"
        )
    on_meta = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if on_meta:
        raise RuntimeError(f"non-persistent tensors must be real before loading: {listed(on_meta)}")
    share_buffer(module)


def _check_shapes(
    plan: KeyMap, targets: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Rejects parameters of another shape than their slices, and stored tensors with rows that no slice takes.

    Args:
        shapes: stored tensor → the shape of its values, unpacked.
    """
    wrong: list[str] = []
    taken: Counter[str] = Counter()
    for target, slices in plan.items():
        expected = tuple(targets[target].shape)
        parts = [each.shape(shapes[each.name]) for each in slices]
        if len(parts) > 1 and all(parts):
            # Several slices are stacked: their rows add up, their other dimensions agree.
            rows = sum(part[0] for part in parts)
            fits = rows == expected[0] and all(part[1:] == expected[1:] for part in parts)
        else:
            fits = parts == [expected]
        if not fits:
            found = ", ".join(f"{each.name} {shapes[each.name]}" for each in slices)
            wrong.append(f"{found} instead of {expected}")
        for each in slices:
            shape = shapes[each.name]
            taken[each.name] += len(each.row_range(shape[0])) if shape else 1
    for name, count in taken.items():
        if shapes[name] and shapes[name][0] != count:
            wrong.append(f"{name} {shapes[name]} instead of {count} rows")
    raise_if_problems(path, [("of another shape than the configuration requires:", wrong)])


def weights_digest(module: nn.Module, *salt: str) -> str:
    """Returns 32 hexadecimal digits that depend on every tensor's name, dtype, shape and samples of its values.

    Equal on every device and in every process that holds the same weights in the same precision, so that replicas
    agree. Samples are spread evenly over rows and columns; a model of gigabytes takes a fraction of a second.

    Args:
        module: a loaded model; quantized weights count as they are stored.
        salt: what else decides the model's output, for example its tokenizer's digest.
    """
    digest = hashlib.blake2b(digest_size=16)
    for text in salt:
        digest.update(f"{len(text)} {text}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        samples = flat[_sample_indices(flat.numel()).to(flat.device)].cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes(samples.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _sample_indices(count: int) -> Tensor:
    """Returns one index in each of about `DIGEST_SAMPLES` equal parts of a tensor, at another offset in each.

    A fixed stride would sample few columns: in klein's shapes it is a multiple of the row's length.
    """
    stride = max(1, count // DIGEST_SAMPLES)
    parts = torch.arange(-(-count // stride))
    offsets = (parts * _GOLDEN % (1 << 32)) * stride >> 32
    return (parts * stride + offsets).clamp(max=count - 1)
