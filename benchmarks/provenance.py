"""Time to sign an image with a C2PA manifest, by format and by what the manifest holds of a reference.

    python -m benchmarks.provenance [--check] [--repeats 30] [--side 1024]

Signs as the orchestrator does, with credentials made on the fly, one image after the other. With `--check` the exit
code is 1 unless the median of JPEG is within the bar of 25 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measure import Bar, describe_machine, finish
from klein_core.image_format import TRAINED_ALGORITHMIC_MEDIA
from klein_services.orchestrator.input_images import InputImage
from klein_services.orchestrator.manifest_signer import INGREDIENT_CONTENTS, ManifestSigner
from klein_services.runtime.pem import PemFiles
from tests.services.fakes.signing import Authority

BAR_MILLISECONDS = 25
FORMATS = {
    "png": {"format": "PNG", "compress_level": 1},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95, "method": 0},
}


def picture(image_format: str, side: int) -> bytes:
    """Returns a smooth image with some noise, as large as a photograph is."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (side // 32, side // 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = (smooth + random.integers(-3, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(noisy).save(file, **FORMATS[image_format])
    return file.getvalue()


def manifest(fields: list[str]) -> dict[str, object]:
    action = {
        "action": "c2pa.created",
        "digitalSourceType": TRAINED_ALGORITHMIC_MEDIA,
        "parameters": {"ingredientIds": fields} if fields else {},
    }
    actions = {"label": "c2pa.actions.v2", "data": {"actions": [action]}}
    return {"claim_generator_info": [{"name": "benchmark"}], "assertions": [actions]}


async def signing_times(
    signer: ManifestSigner, image_format: str, side: int, inputs: list[InputImage], repeats: int
) -> tuple[list[float], int]:
    """Returns milliseconds of each signature and the bytes that a manifest adds."""
    data = picture(image_format, side)
    milliseconds: list[float] = []
    added = 0
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        signed = await signer.sign(
            manifest([each.field for each in inputs]), inputs, f"image/{image_format}", [memoryview(data)]
        )
        milliseconds.append((time.perf_counter() - begin) * 1000)
        added = len(signed) - len(data)
    return milliseconds[1:], added


async def measure(options: argparse.Namespace) -> list[Bar]:
    bars: list[Bar] = []
    print(f"{options.side} x {options.side} pixels, median of {options.repeats}")
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        authority.issue()
        certificate, key = map(str, authority.files)
        reference = InputImage("references[0]", picture("jpeg", options.side))
        for content in INGREDIENT_CONTENTS:
            signer = ManifestSigner(PemFiles(certificate, key, "", ("", "", "")), ingredients=content)
            for image_format in FORMATS:
                for inputs in ([], [reference]):
                    times, added = await signing_times(
                        signer, image_format, options.side, inputs, options.repeats
                    )
                    median = statistics.median(times)
                    what = f"{content:<12} {image_format:<5} {len(inputs)} references"
                    print(f"{what}  {median:6.1f} ms  {max(times):6.1f} ms at most  +{added} bytes")
                    if (content, image_format, len(inputs)) == ("digest", "jpeg", 0):
                        bars.append(Bar("signing a JPEG, ms", median, BAR_MILLISECONDS))
            signer.close()
    return bars


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar is missed")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--side", type=int, default=1024, help="width and height in pixels")
    options = parser.parse_args()
    print(describe_machine("c2pa-python", "pillow"))
    return finish(asyncio.run(measure(options)), check=options.check)


if __name__ == "__main__":
    sys.exit(main())
