"""Requests of the Open Inference Protocol as this API's own: tensors and parameters become fields of ImageSpec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from klein_api.inference import grpc_inference_service_pb2 as api
from klein_api.v1 import image_pb2
from klein_api.v1.image_service_pb2 import ImageSpec
from klein_core.errors import InvalidInput, Violation
from klein_services.orchestrator.open_inference_tensors import BYTES, INT64, TensorKind, read_inputs

VERSION = "1"
"""The only version of each model."""
INPUTS: Mapping[str, TensorKind] = {
    kind.name: kind
    for kind in (
        TensorKind("prompt", BYTES, is_list=False),
        TensorKind("negative_prompt", BYTES, is_list=False),
        TensorKind("references", BYTES, is_list=True),
        TensorKind("initial_image", BYTES, is_list=False),
        TensorKind("mask", BYTES, is_list=False),
    )
}
"""Tensors of a request, named as the fields of ImageSpec; files as they are, texts in UTF-8."""
OUTPUTS: Mapping[str, TensorKind] = {
    kind.name: kind
    for kind in (TensorKind("images", BYTES, is_list=True), TensorKind("seeds", INT64, is_list=True))
}
"""Tensors of a response: image files, and the seeds that make them again."""
PARAMETERS = (
    "width_px",
    "height_px",
    "step_count",
    "guidance_scale",
    "seed",
    "image_count",
    "format",
    "quality",
    "priority",
    "embed_prompt",
    "strength",
    "mask_is_alpha",
    "mask_padding_px",
    "preserve_unmasked",
)
"""Fields of ImageSpec that are parameters of a request."""
_NAMES: Mapping[str, Mapping[str, int]] = {
    "format": {
        "png": image_pb2.IMAGE_FORMAT_PNG,
        "jpeg": image_pb2.IMAGE_FORMAT_JPEG,
        "webp": image_pb2.IMAGE_FORMAT_WEBP,
        "raw": image_pb2.IMAGE_FORMAT_RAW_RGB,
    },
    "priority": {
        "interactive": image_pb2.PRIORITY_INTERACTIVE,
        "standard": image_pb2.PRIORITY_STANDARD,
        "batch": image_pb2.PRIORITY_BATCH,
    },
}
_TEXTS = ("prompt", "negative_prompt")
_FLOATS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


def image_spec(request: api.ModelInferRequest) -> ImageSpec:
    """Returns the request as this API's own, which checks the limits of its fields.

    Raises:
        InvalidInput: tensors or parameters are no fields of a request; names all of the first kind that is wrong.
    """
    check_version("model_version", request.model_version)
    inputs = read_inputs(request, INPUTS)
    if "prompt" not in inputs:
        raise InvalidInput.of("prompt", "is missing; give an input of this name with one element")
    spec = ImageSpec(model=request.model_name, references=inputs.get("references", []))
    violations = []
    for name in _TEXTS:
        if name in inputs:
            try:
                setattr(spec, name, inputs[name][0].decode())
            except UnicodeDecodeError:
                violations.append(Violation(name, "is not valid UTF-8"))
    for name in ("initial_image", "mask"):
        if name in inputs:
            setattr(spec, name, inputs[name][0])
    for name, value in sorted(request.parameters.items()):
        try:
            _set(spec, name, value)
        except ValueError as error:
            violations.append(Violation(name[:64], str(error)))
    for index, output in enumerate(request.outputs):
        if output.name not in OUTPUTS:
            description = f"is {output.name[:64]!r}; must be one of {', '.join(OUTPUTS)}"
            violations.append(Violation(f"outputs[{index}].name", description))
    if violations:
        raise InvalidInput(violations)
    return spec


def check_version(field: str, version: str) -> None:
    """Raises InvalidInput for a version that no model has."""
    if version not in ("", VERSION):
        raise InvalidInput.of(field, f"is {version[:64]!r}; models have only the version {VERSION}")


def _set(spec: ImageSpec, name: str, parameter: api.InferParameter) -> None:
    """Sets a field; raises ValueError with a sentence's end about what is wrong."""
    if name not in PARAMETERS:
        raise ValueError(f"is no parameter; there are {', '.join(PARAMETERS)}")
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise ValueError("has no value")
    value: Any = getattr(parameter, kind)
    if name in _NAMES:
        if value not in _NAMES[name]:
            raise ValueError(f"is {_shown(value)}; must be one of {', '.join(_NAMES[name])}")
        setattr(spec, name, _NAMES[name][value])
        return
    field = spec.DESCRIPTOR.fields_by_name[name]
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        # KServe's clients have truth values; texts are for those that send everything as text.
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError(f"is {_shown(value)}; must be true or false")
    else:
        value = _number(value, is_float=field.cpp_type in _FLOATS)
    try:
        setattr(spec, name, value)
    except (TypeError, ValueError):
        raise ValueError(f"is {_shown(value)}, which is far outside its limits") from None


def _number(value: Any, *, is_float: bool) -> float | int:
    """Returns a parameter as a number; also of a text, because KServe's parameters have no fractions."""
    try:
        if isinstance(value, bool):
            raise ValueError
        if is_float:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        if isinstance(value, float) and not value.is_integer():
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise ValueError(f"is {_shown(value)}; must be a {'' if is_float else 'whole '}number") from None


def _shown(value: object) -> str:
    return repr(value)[:64]
