"""Triton's own client against the orchestrator: `tritonclient[grpc]`, in an environment of its own, as it needs
another protobuf than this project."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import venv
from pathlib import Path

import pytest

from tests.deploy.tools import ROOT
from tests.services.fakes.fake_stages import MODEL
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, generate

pytestmark = pytest.mark.deploy
FOLDER = ROOT / ".tools" / "tritonclient"
REQUIREMENTS = ("tritonclient[grpc]==2.73.0", "protobuf>=6.30,<7", "grpcio>=1.80")
CLIENT = """
import hashlib, json, sys
import numpy as np
import tritonclient.grpc as triton

address, model, *references = sys.argv[1:]
client = triton.InferenceServerClient(address)
prompt = triton.InferInput("prompt", [1], "BYTES")
prompt.set_data_from_numpy(np.array(["a red fox"], dtype=np.object_))
inputs = [prompt]
if references:
    files = triton.InferInput("references", [len(references)], "BYTES")
    data = [open(name, "rb").read() for name in references]
    files.set_data_from_numpy(np.array(data, dtype=np.object_))
    inputs.append(files)
outputs = [triton.InferRequestedOutput("images"), triton.InferRequestedOutput("seeds")]
parameters = {"seed": 7, "image_count": 2, "format": "png"}
result = client.infer(model, inputs, outputs=outputs, request_id="mine", parameters=parameters)
try:
    client.infer(model, inputs, parameters={"width_px": 70})
    refusal = ("", "")
except triton.InferenceServerException as error:
    refusal = (error.status(), error.message())
metadata = client.get_model_metadata(model)
print(json.dumps({
    "live": client.is_server_live(),
    "ready": client.is_server_ready(),
    "model_ready": client.is_model_ready(model),
    "other_ready": client.is_model_ready("other"),
    "server": client.get_server_metadata().name,
    "inputs": [each.name for each in metadata.inputs],
    "id": result.get_response().id,
    "flow": result.get_response().parameters["flow"].string_param,
    "images": [hashlib.sha256(image).hexdigest() for image in result.as_numpy("images")],
    "seeds": result.as_numpy("seeds").tolist(),
    "refusal": refusal,
}))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """Python of an environment that has Triton's client; kept between runs."""
    executable = FOLDER / "bin" / "python"
    installed = FOLDER / "requirements.txt"
    if not installed.is_file() or installed.read_text(encoding="utf-8") != "\n".join(REQUIREMENTS):
        venv.create(FOLDER, clear=True, with_pip=True)
        command = [executable, "-m", "pip", "install", "--quiet", "--retries", "1", *REQUIREMENTS]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"Triton's client cannot be installed: {done.stderr.strip()[-300:]}")
        installed.write_text("\n".join(REQUIREMENTS), encoding="utf-8")
    return executable


async def answer(python: Path, *arguments: str) -> dict:
    process = await asyncio.create_subprocess_exec(
        python, "-c", CLIENT, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, errors.decode()
    return json.loads(output)


@pytest.mark.parametrize("reference_count", [0, 2])
async def test_tritons_client_makes_and_edits_images(
    python: Path, tmp_path: Path, reference_count: int
) -> None:
    files = [tmp_path / f"{index}.png" for index in range(reference_count)]
    for file in files:
        file.write_bytes(reference_file(64, 64, file.name))
    suite = FakeSuite(settings={"oip": True})
    async with suite.running():
        found = await answer(python, suite.address, MODEL, *map(str, files))
        expected = await generate(
            suite, prompt="a red fox", seed=7, image_count=2, references=[file.read_bytes() for file in files]
        )
    assert found.pop("refusal")[0] == "StatusCode.INVALID_ARGUMENT"
    assert found == {
        "live": True,
        "ready": True,
        "model_ready": True,
        "other_ready": False,
        "server": "klein-suite",
        "inputs": ["prompt", "negative_prompt", "references", "initial_image", "mask"],
        "id": "mine",
        "flow": "multi-reference" if reference_count else "text-to-image",
        "images": [hashlib.sha256(image.data).hexdigest() for image in expected.images],
        "seeds": [7, 8],
    }
