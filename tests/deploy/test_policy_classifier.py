"""The classifier of the example content policy, with weights made on the fly. Slow: each process loads transformers."""

from __future__ import annotations

import json
import subprocess
from io import BytesIO
from pathlib import Path

import grpc
import pytest
from PIL import Image

from klein_api.v1 import content_policy_service_pb2 as pb
from klein_api.v1 import image_pb2
from klein_api.v1.content_policy_service_pb2_grpc import ContentPolicyServiceStub
from tests.deploy.tools import tool
from tests.services.fakes.example_policy import FOLDER, example, failed_start


def test_hadolint_finds_nothing_in_its_dockerfile() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(FOLDER / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def save_red_detector(folder: Path) -> None:
    """Writes a classifier whose label `red` wins for red images: one linear layer over the mean of each channel."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4],
        depths=[1],
        id2label={0: "fine", 1: "red"},
        label2id={"fine": 0, "red": 1},
    )
    model = ResNetForImageClassification(config).eval()
    pixels = torch.stack([torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), -1.0)])
    pixels[1, 0] = 1.0
    with torch.inference_mode():
        dark, red = model.resnet(pixels).pooler_output.flatten(1)
        model.classifier[1].weight.copy_(torch.stack([dark - red, red - dark]) * 100)
        model.classifier[1].bias.copy_(torch.stack([red @ red - dark @ dark, dark @ dark - red @ red]) * 50)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def checked(color, image_format) -> pb.CheckImageRequest:
    image = Image.new("RGB", (64, 32), color)
    if image_format == image_pb2.IMAGE_FORMAT_RAW_RGB:
        data = image.tobytes()
    else:
        file = BytesIO()
        image.save(file, "PNG" if image_format == image_pb2.IMAGE_FORMAT_PNG else "JPEG")
        data = file.getvalue()
    return pb.CheckImageRequest(format=image_format, width_px=64, height_px=32, data=data)


async def test_a_mounted_classifier_denies_its_label(tmp_path):
    save_red_detector(tmp_path / "weights")
    options = ("--classifier", str(tmp_path / "weights"), "--deny", "red")
    async with example(tmp_path, "", *options) as target, grpc.aio.insecure_channel(target) as channel:
        policy = ContentPolicyServiceStub(channel)
        for image_format in (1, 2, image_pb2.IMAGE_FORMAT_RAW_RGB):
            denied = await policy.CheckImage(checked("red", image_format))
            assert denied.decision.reason_code == "CLASSIFIED"
            allowed = await policy.CheckImage(checked("black", image_format))
            assert allowed.decision.verdict == pb.CONTENT_VERDICT_ALLOW
        with pytest.raises(grpc.aio.AioRpcError):
            await policy.CheckImage(pb.CheckImageRequest(format=1, data=b"garbage"))


async def test_a_classifier_without_the_label_stops_the_start(tmp_path):
    save_red_detector(tmp_path / "weights")
    options = ("--classifier", str(tmp_path / "weights"), "--deny", "blue")
    assert "has no label 'blue'; it has fine, red" in await failed_start(tmp_path, "", *options)
