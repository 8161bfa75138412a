"""The orchestrator starts and answers in an environment without the model's libraries."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.settings import SettingsError

ROOT = Path(__file__).parents[3]
PROGRAM = textwrap.dedent(
    """
    import sys

    FORBIDDEN = {"torch", "transformers", "safetensors", "numpy", "PIL", "diffusers"}


    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in FORBIDDEN:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return None


    sys.meta_path.insert(0, Absent())

    import asyncio

    import grpc
    from klein_api.v1.image_service_pb2 import ListModelsRequest
    from klein_api.v1.image_service_pb2_grpc import ImageServiceStub

    import klein_services.orchestrator.__main__
    from klein_services.orchestrator.servicer import Orchestrator
    from klein_services.orchestrator.settings import OrchestratorSettings
    from klein_services.runtime.server import running_server


    async def main():
        settings = OrchestratorSettings(port=0, metrics_port=0, drain_delay_seconds=0)
        async with running_server(Orchestrator(settings, settings.table()), settings) as address:
            async with grpc.aio.insecure_channel(address) as channel:
                answer = await ImageServiceStub(channel).ListModels(ListModelsRequest())
        print(answer.default_model, answer.models[0].serving, bool(answer.models[0].stages[0].problem))


    asyncio.run(main())
    assert not FORBIDDEN & {name.partition(".")[0] for name in sys.modules}
    """
)


def test_it_serves_where_torch_cannot_be_imported():
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}:{ROOT / 'services'}", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["pico", "False", "True"]


def test_settings_whose_largest_answer_could_not_be_sent_are_refused():
    with pytest.raises(SettingsError, match=r"_IMAGE_COUNT is 22; .* holds 21 images of 4194304 pixels"):
        OrchestratorSettings(maximum_image_count=22).check()
    OrchestratorSettings(maximum_image_count=21).check()
    OrchestratorSettings(maximum_image_count=64, maximum_pixel_count=1024 * 1024).check()
