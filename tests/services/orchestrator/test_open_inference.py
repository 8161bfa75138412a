"""The Open Inference Protocol, asked by a plain stub as clients of KServe and Triton ask."""

from __future__ import annotations

import struct
from contextlib import asynccontextmanager

import grpc
import pytest

from klein_api.inference import grpc_inference_service_pb2 as api
from klein_api.inference.grpc_inference_service_pb2_grpc import GRPCInferenceServiceStub
from klein_api.v1 import image_pb2
from klein_services.orchestrator import open_inference
from klein_services.runtime.status import explain
from tests.services.fakes.fake_stages import MODEL
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, generate
from tests.services.fakes.runtime_toy import failure

PROMPT = "a red fox"


@asynccontextmanager
async def inference_suite(**settings: object):
    suite = FakeSuite(settings={"oip": True, **settings})
    async with suite.running():
        yield suite, GRPCInferenceServiceStub(suite.channel)


def raw(*elements: bytes) -> bytes:
    """Elements of BYTES as clients send them raw."""
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def tensor(name: str, count: int = 1, datatype: str = "BYTES", shape: list[int] | None = None):
    return api.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape or [count])


def parameter(value: object) -> api.InferParameter:
    kind = {bool: "bool", int: "int64", str: "string", float: "double"}[type(value)]
    return api.InferParameter(**{f"{kind}_param": value})


def inference(prompt: str = PROMPT, references: tuple[bytes, ...] = (), **parameters: object):
    request = api.ModelInferRequest(
        model_name=MODEL,
        inputs=[tensor("prompt")],
        raw_input_contents=[raw(prompt.encode())],
        parameters={name: parameter(value) for name, value in parameters.items()},
    )
    if references:
        request.inputs.append(tensor("references", len(references)))
        request.raw_input_contents.append(raw(*references))
    return request


def elements(data: bytes) -> list[bytes]:
    """Elements of a raw tensor of BYTES."""
    found = []
    while data:
        (length,) = struct.unpack("<I", data[:4])
        found.append(data[4 : 4 + length])
        data = data[4 + length :]
    return found


async def violations(stub: GRPCInferenceServiceStub, request: api.ModelInferRequest) -> dict[str, str]:
    details = explain(await failure(stub.ModelInfer(request)))
    assert details.code is grpc.StatusCode.INVALID_ARGUMENT
    return {violation.field: violation.description for violation in details.violations}


async def test_a_server_without_the_setting_has_no_such_service():
    async with inference_suite(oip=False) as (_, stub):
        error = await failure(stub.ServerLive(api.ServerLiveRequest()))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_the_server_and_its_model_describe_themselves():
    async with inference_suite() as (suite, stub):
        assert open_inference.SERVICE_NAME in suite.orchestrator.service_names
        assert (await stub.ServerLive(api.ServerLiveRequest())).live
        assert (await stub.ServerReady(api.ServerReadyRequest())).ready
        server = await stub.ServerMetadata(api.ServerMetadataRequest())
        assert server.name == "klein-suite"
        assert server.version
        assert (await stub.ModelReady(api.ModelReadyRequest(name=MODEL, version="1"))).ready
        assert not (await stub.ModelReady(api.ModelReadyRequest(name="other"))).ready
        model = await stub.ModelMetadata(api.ModelMetadataRequest(name=MODEL))
        assert (model.name, list(model.versions), model.platform) == (MODEL, ["1"], "klein")
        assert {each.name: (each.datatype, list(each.shape)) for each in model.inputs} == {
            "prompt": ("BYTES", [1]),
            "negative_prompt": ("BYTES", [1]),
            "references": ("BYTES", [-1]),
            "initial_image": ("BYTES", [1]),
            "mask": ("BYTES", [1]),
        }
        assert {each.name: each.datatype for each in model.outputs} == {"images": "BYTES", "seeds": "INT64"}
        unknown = explain(await failure(stub.ModelMetadata(api.ModelMetadataRequest(name="other"))))
        assert unknown.code is grpc.StatusCode.NOT_FOUND
        old = explain(await failure(stub.ModelReady(api.ModelReadyRequest(name=MODEL, version="2"))))
        assert [violation.field for violation in old.violations] == ["version"]


async def test_a_server_without_stages_is_live_and_not_ready():
    async with inference_suite(denoiser_target="127.0.0.1:1") as (_, stub):
        assert (await stub.ServerLive(api.ServerLiveRequest())).live
        assert not (await stub.ServerReady(api.ServerReadyRequest())).ready
        assert not (await stub.ModelReady(api.ModelReadyRequest(name=MODEL))).ready


async def test_images_are_those_of_image_service():
    async with inference_suite() as (suite, stub):
        request = inference(seed=7, image_count=2, width_px=96, height_px="64", format="webp", quality=80)
        request.id = "mine"
        response = await stub.ModelInfer(request)
        assert (response.model_name, response.model_version, response.id) == (MODEL, "1", "mine")
        assert [(each.name, each.datatype, list(each.shape)) for each in response.outputs] == [
            ("images", "BYTES", [2]),
            ("seeds", "INT64", [2]),
        ]
        images, seeds = response.raw_output_contents
        expected = await generate(
            suite,
            prompt=PROMPT,
            seed=7,
            image_count=2,
            width_px=96,
            height_px=64,
            format=image_pb2.IMAGE_FORMAT_WEBP,
            quality=80,
        )
        assert elements(images) == [image.data for image in expected.images]
        assert struct.unpack("<2q", seeds) == (7, 8)
        assert response.parameters["width_px"].int64_param == 96
        assert response.parameters["flow"].string_param == "text-to-image"
        assert response.parameters["request_id"].string_param


async def test_references_make_an_edit():
    async with inference_suite() as (suite, stub):
        files = (reference_file(64, 64), reference_file(96, 64, "second"))
        response = await stub.ModelInfer(inference(references=files, seed=3))
        images, _ = response.raw_output_contents
        expected = await generate(suite, prompt=PROMPT, seed=3, references=files)
        assert elements(images) == [expected.images[0].data]
        assert response.parameters["flow"].string_param == "multi-reference"
        assert (await violations(stub, inference(references=(files[0], b"")))).keys() == {"references[1]"}


async def test_elements_may_be_contents_and_shapes_have_a_batch_dimension():
    async with inference_suite() as (_, stub):
        request = inference(seed=7)
        (expected,) = elements((await stub.ModelInfer(request)).raw_output_contents[0])
        request.ClearField("raw_input_contents")
        request.inputs[0].contents.bytes_contents.append(PROMPT.encode())
        request.inputs[0].shape[:] = [1, 1]
        request.outputs.add(name="images")
        response = await stub.ModelInfer(request)
        assert [output.name for output in response.outputs] == ["images"]
        assert elements(response.raw_output_contents[0]) == [expected]


async def test_one_key_makes_one_image():
    async with inference_suite() as (_, stub):
        metadata = [("idempotency-key", "once")]
        first, second = [await stub.ModelInfer(inference(), metadata=metadata) for _ in range(2)]
        assert first.raw_output_contents == second.raw_output_contents
        assert first.raw_output_contents != (await stub.ModelInfer(inference())).raw_output_contents


async def test_other_models_are_not_found():
    async with inference_suite() as (_, stub):
        request = inference()
        request.model_name = "other"
        assert explain(await failure(stub.ModelInfer(request))).code is grpc.StatusCode.NOT_FOUND
        request.model_name = ""
        assert (await stub.ModelInfer(request)).model_name == MODEL


def _changed(change) -> api.ModelInferRequest:
    request = inference()
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        (lambda request: request.raw_input_contents.append(b""), "raw_input_contents", "has 2 entries"),
        (
            lambda request: setattr(request.inputs[0], "name", "text"),
            "inputs[0].name",
            "must be one of prompt",
        ),
        (lambda request: setattr(request.inputs[0], "datatype", "FP32"), "prompt", "must be BYTES"),
        (lambda request: request.inputs[0].shape.append(2), "prompt", "both must agree"),
        (
            lambda request: request.inputs[0].shape.__setitem__(slice(None), [-1, -1]),
            "prompt",
            "both must agree",
        ),
        (lambda request: request.inputs[0].shape.extend([1] * 9), "prompt", "both must agree"),
        (lambda request: request.raw_input_contents.__setitem__(0, b"\1\0"), "prompt", "within the length"),
        (
            lambda request: request.raw_input_contents.__setitem__(0, b"\xff" * 9),
            "prompt",
            "alone has 4294967295",
        ),
        (
            lambda request: request.raw_input_contents.__setitem__(0, raw(b"\xff")),
            "prompt",
            "not valid UTF-8",
        ),
        (lambda request: request.inputs[0].contents.SetInParent(), "prompt", "give one of both"),
        (lambda request: request.inputs[0].parameters["x"].SetInParent(), "prompt", "inputs take none"),
        (lambda request: request.ClearField("raw_input_contents"), "prompt", "0 elements"),
        (lambda request: setattr(request, "model_version", "2"), "model_version", "only the version 1"),
        (lambda request: request.outputs.add(name="latents"), "outputs[0].name", "must be one of images"),
        (lambda request: request.inputs.append(request.inputs[0]), "raw_input_contents", "one for each of 2"),
        (lambda request: request.parameters["prompt"].SetInParent(), "prompt", "is no parameter"),
        (lambda request: request.parameters["seed"].SetInParent(), "seed", "has no value"),
    ],
)
async def test_malformed_requests_name_the_field(change, field, text):
    async with inference_suite() as (_, stub):
        found = await violations(stub, _changed(change))
        assert found.keys() == {field}
        assert text in found[field]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("width_px", 70, "multiple of 16"),
        ("width_px", "wide", "must be a whole number"),
        ("width_px", 64.5, "must be a whole number"),
        ("width_px", True, "must be a whole number"),
        ("width_px", 2**40, "far outside"),
        ("guidance_scale", float("nan"), "must be a number"),
        ("format", "tiff", "must be one of png"),
        ("format", 1, "must be one of png"),
        ("priority", 3, "must be one of interactive"),
        ("embed_prompt", "maybe", "must be true or false"),
        ("sequence_id", 5, "is no parameter"),
    ],
)
async def test_bad_parameters_name_the_field(name, value, text):
    async with inference_suite() as (_, stub):
        found = await violations(stub, inference(**{name: value}))
        assert found.keys() == {name}
        assert text in found[name]


async def test_a_missing_prompt_and_several_mistakes_are_all_named():
    async with inference_suite() as (_, stub):
        assert (await violations(stub, api.ModelInferRequest(model_name=MODEL))).keys() == {"prompt"}
        assert (await violations(stub, inference(seed="x", format="x", other=1))).keys() == {
            "seed",
            "format",
            "other",
        }
        twice = inference()
        twice.inputs.append(twice.inputs[0])
        twice.raw_input_contents.append(twice.raw_input_contents[0])
        assert (await violations(stub, twice)).keys() == {"inputs[1].name"}


async def test_fractions_may_be_texts_or_doubles():
    async with inference_suite() as (_, stub):
        # The fake model is distilled: it takes no other guidance than 1, so the limit proves that the value arrived.
        for value in ("1.0", 1.0, 1):
            await stub.ModelInfer(inference(guidance_scale=value, embed_prompt="true"))
        for value in ("2.5", 2.5):
            assert (await violations(stub, inference(guidance_scale=value))).keys() == {"guidance_scale"}
