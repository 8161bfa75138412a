"""Signed images: manifests, ingredients, tampering, rotation of credentials, and credentials that cannot sign."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
from io import BytesIO

import grpc
import pytest
from PIL import Image
from prometheus_client import REGISTRY

from klein_api.v1 import image_pb2
from klein_api.v1.image_pb2 import Adapter, ImageExpansion
from klein_api.v1.image_service_pb2 import ImageSpec, StreamGenerateImageRequest
from klein_core.image_format import COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA, TRAINED_ALGORITHMIC_MEDIA
from klein_services.orchestrator.input_images import InputImage
from klein_services.orchestrator.manifest_signer import ManifestSigner, SigningFailed
from klein_services.orchestrator.provenance import DIGEST_FIELD
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.runtime.pem import PemFiles
from klein_services.runtime.settings import SettingsError
from klein_services.runtime.stage import software_version
from tests.services.fakes.fake_tensors import reference_file
from tests.services.fakes.orchestrator_suite import FakeSuite, generate, nothing_left_running, refusal
from tests.services.fakes.runtime_toy import until

pytest.importorskip("c2pa", reason="c2pa is not installed; pip install 'klein-suite[provenance]'")

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.services.fakes.signing import Authority, new_key

FORMATS = {"PNG": 1, "JPEG": 2, "WEBP": 3}
MEDIA_TYPES = {name: f"image/{name.lower()}" for name in FORMATS}
INITIAL, MASK, REFERENCE = reference_file(96, 80, "initial"), b"mask:", reference_file(64, 64)
MANIFEST = {
    "claim_generator_info": [{"name": "test"}],
    "assertions": [
        {
            "label": "c2pa.actions.v2",
            "data": {
                "actions": [
                    {
                        "action": "c2pa.created",
                        "digitalSourceType": TRAINED_ALGORITHMIC_MEDIA,
                        "parameters": {"ingredientIds": ["references[0]"]},
                    }
                ]
            },
        }
    ],
}


def picture(name: str = "PNG", color: str = "red", side: int = 64, **options) -> bytes:
    file = BytesIO()
    Image.new("RGB", (side, side), color).save(file, name, **options)
    return file.getvalue()


@pytest.fixture
def authority(tmp_path):
    made = Authority(tmp_path)
    made.issue()
    return made


def signing_suite(authority, **settings):
    made = FakeSuite(settings=authority.settings | settings)
    made.vae_decoder.files = {number: picture(name) for name, number in FORMATS.items()}
    return made


@pytest.fixture
async def suite(authority):
    async with signing_suite(authority).running() as running:
        yield running


def signed(outcome: str) -> float:
    return REGISTRY.get_sample_value("klein_c2pa_signatures_total", {"outcome": outcome}) or 0


@pytest.mark.parametrize("name", FORMATS)
async def test_an_image_says_how_it_was_made_and_by_whom(suite, authority, name):
    before = signed("signed")
    response = await generate(suite, prompt="secret", seed=7, format=FORMATS[name])
    data = response.images[0].data
    found = authority.read(data, MEDIA_TYPES[name])
    assert (found.state, found.signer, found.failures) == ("Trusted", "Signer", [])
    (made,) = found.actions
    agent = {"name": "klein-suite", "version": software_version()}
    assert (made["action"], made["digitalSourceType"]) == ("c2pa.created", TRAINED_ALGORITHMIC_MEDIA)
    assert made["softwareAgent"] == agent
    assert made["parameters"] == {
        "org.klein-suite.model": "fake",
        "org.klein-suite.flow": "text-to-image",
        "org.klein-suite.request_id": response.summary.request_id,
        "org.klein-suite.seed": "7",
        "org.klein-suite.steps": "4",
    }
    disclosure = found.assertion("c2pa.ai-disclosure")
    assert (disclosure["modelName"], disclosure["modelType"]) == ("fake", "c2pa.types.model")
    assert disclosure["contentProfile"]["humanOversightLevel"] == "prompt_guided"
    assert agent.items() <= found.manifest["claim_generator_info"][0].items()
    assert "thumbnail" not in found.manifest
    assert b"secret" not in data
    # The pixels are those that the vae-decoder wrote.
    assert Image.open(BytesIO(data)).tobytes() == Image.open(BytesIO(picture(name))).tobytes()
    assert len(data) < len(picture(name)) + 8192
    assert signed("signed") == before + 1
    assert not response.summary.warnings


async def test_images_and_previews_of_a_stream_are_signed(suite, authority):
    suite.denoiser.step_seconds = 0.05
    request = StreamGenerateImageRequest(
        spec=ImageSpec(prompt="fox", seed=4, image_count=2), preview_interval_steps=2
    )
    events = [event async for event in suite.images.StreamGenerateImage(request)]
    previews = [event.preview for event in events if event.HasField("preview")]
    images = sorted((event.image for event in events if event.HasField("image")), key=lambda each: each.index)
    assert previews
    assert previews[0].step == 2
    found = authority.read(previews[0].data, "image/jpeg")
    assert found.state == "Trusted"
    assert found.actions[0]["description"] == "Preview after step 2 of 4"
    read = [authority.read(image.data, "image/png") for image in images]
    assert [each.state for each in read] == ["Trusted"] * 2
    assert [each.actions[0]["parameters"]["org.klein-suite.seed"] for each in read] == ["4", "5"]


@pytest.mark.parametrize("name", FORMATS)
async def test_a_changed_file_is_detected(suite, authority, name):
    data = bytearray((await generate(suite, seed=1, format=FORMATS[name])).images[0].data)
    pixels = {"PNG": b"IDAT", "JPEG": b"\xff\xda", "WEBP": b"VP8 "}[name]
    data[data.rindex(pixels) + 20] ^= 1
    found = authority.read(bytes(data), MEDIA_TYPES[name])
    assert found.state == "Invalid"
    assert "assertion.dataHash.mismatch" in found.failures


async def test_another_authority_is_not_trusted(suite, tmp_path):
    data = (await generate(suite, seed=1)).images[0].data
    found = Authority(tmp_path / "other").read(data, "image/png")
    assert (found.state, found.failures) == ("Valid", ["signingCredential.untrusted"])


async def test_references_are_ingredients_with_a_digest_and_without_the_picture(suite, authority):
    references = [REFERENCE, reference_file(96, 64, "unique content")]
    data = (await generate(suite, references=references, seed=1)).images[0].data
    found = authority.read(data, "image/png")
    assert found.state == "Trusted"
    assert list(found.ingredients) == ["references[0]", "references[1]"]
    for title, file in zip(found.ingredients, references, strict=True):
        ingredient = found.ingredients[title]
        assert ingredient["relationship"] == "inputTo"
        assert ingredient["metadata"] == {DIGEST_FIELD: hashlib.sha256(file).hexdigest()}
    (made,) = found.actions
    # The model makes all pixels; what it looked at does not make the image a composite.
    assert (made["action"], made["digitalSourceType"]) == ("c2pa.created", TRAINED_ALGORITHMIC_MEDIA)
    assert len(made["parameters"]["ingredients"]) == 2
    assert b"unique content" not in data


@pytest.mark.parametrize(
    ("fields", "source_type"),
    [
        ({"mask": MASK}, COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA),
        ({"expand": ImageExpansion(left_px=16)}, COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA),
        ({}, TRAINED_ALGORITHMIC_MEDIA),
    ],
)
async def test_a_masked_edit_opens_and_edits_its_initial_image(suite, authority, fields, source_type):
    response = await generate(suite, initial_image=INITIAL, references=[REFERENCE], seed=1, **fields)
    found = authority.read(response.images[0].data, "image/png")
    assert found.state == "Trusted"
    opened, edited = found.actions
    assert (opened["action"], edited["action"]) == ("c2pa.opened", "c2pa.edited")
    assert edited["digitalSourceType"] == source_type
    assert edited["parameters"]["org.klein-suite.strength"] == "0.8"
    expected = {"initial_image": "parentOf", "references[0]": "inputTo"}
    if "mask" in fields:
        expected["mask"] = "inputTo"
    assert {title: each["relationship"] for title, each in found.ingredients.items()} == expected
    digest = hashlib.sha256(INITIAL).hexdigest()
    assert found.ingredients["initial_image"]["metadata"] == {DIGEST_FIELD: digest}
    assert suite.vae_decoder.decode_specs[0].metadata["DigitalSourceType"] == source_type


async def test_without_metadata_the_manifest_names_the_model_and_no_parameters(authority):
    async with signing_suite(authority, image_metadata=False).running() as suite:
        response = await generate(suite, seed=1, adapters=[Adapter(name="style")])
        (made,) = authority.read(response.images[0].data, "image/png").actions
        assert {key.rpartition(".")[2] for key in made["parameters"]} == {"model", "flow", "request_id"}
        assert dict(suite.vae_decoder.decode_specs[0].metadata) == {}


async def test_a_raw_image_is_unsigned_and_the_summary_says_so(suite):
    response = await generate(suite, seed=1, format=image_pb2.IMAGE_FORMAT_RAW_RGB)
    assert response.images[0].data.startswith(b"IMAGE")
    assert any("not signed" in warning for warning in response.summary.warnings)


async def test_many_images_at_once_are_all_signed(suite, authority):
    responses = await asyncio.gather(*(generate(suite, seed=seed, image_count=4) for seed in range(8)))
    files = [image.data for response in responses for image in response.images]
    assert len(set(files)) == 32
    assert {authority.read(data, "image/png").state for data in files} == {"Trusted"}


async def test_an_image_that_cannot_be_signed_is_not_sent(suite):
    before = signed("failed")
    suite.vae_decoder.files = {}
    details = await refusal(suite, prompt="fox", seed=1)
    assert (details.code, details.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL_ERROR")
    assert "IMAGE" not in details.message
    assert signed("failed") == before + 1
    await nothing_left_running()


async def test_a_preview_that_cannot_be_signed_costs_the_preview_only(suite):
    suite.denoiser.step_seconds = 0.05
    del suite.vae_decoder.files[image_pb2.IMAGE_FORMAT_JPEG]
    request = StreamGenerateImageRequest(spec=ImageSpec(seed=4), preview_interval_steps=1)
    kinds = [event.WhichOneof("event") async for event in suite.images.StreamGenerateImage(request)]
    assert "preview" not in kinds
    assert kinds[-2:] == ["image", "summary"]


def look_at_files(suite) -> None:
    """Does at once what a thread does every ten seconds."""
    suite.orchestrator.generator.release.signer.store.reload()


async def test_rotated_credentials_sign_the_next_image(suite, authority):
    assert authority.read((await generate(suite, seed=1)).images[0].data, "image/png").signer == "Signer"
    authority.issue("Rotated", valid_days=(-1, 20))
    look_at_files(suite)
    found = authority.read((await generate(suite, seed=1)).images[0].data, "image/png")
    assert (found.signer, found.state) == ("Rotated", "Trusted")
    labels = {"stage": "orchestrator", "kind": "signer"}
    expires_at = REGISTRY.get_sample_value("klein_certificate_expiry_timestamp_seconds", labels)
    assert expires_at == pytest.approx(time.time() + 20 * 86400, abs=600)


async def test_the_files_are_followed(authority):
    async with signing_suite(authority, tls_reload_seconds=0.1).running() as suite:
        authority.issue("Rotated")

        async def is_rotated() -> bool:
            data = (await generate(suite, seed=1)).images[0].data
            return authority.read(data, "image/png").signer == "Rotated"

        await until(is_rotated, seconds=30)


@pytest.mark.parametrize("fault", ["half of a pair", "garbage", "missing", "expired", "for servers"])
async def test_a_rotation_that_cannot_sign_leaves_the_old_credentials(suite, authority, fault, caplog):
    certificate, key = authority.files
    old = key.read_bytes()
    if fault == "half of a pair":
        authority.issue("Rotated")
        key.write_bytes(old)
    elif fault == "garbage":
        certificate.write_bytes(b"garbage")
    elif fault == "missing":
        key.unlink()
    elif fault == "expired":
        authority.issue("Rotated", valid_days=(-2, -1))
    else:
        authority.issue("Rotated", usage=ExtendedKeyUsageOID.SERVER_AUTH)
    for _ in range(2):
        look_at_files(suite)
        found = authority.read((await generate(suite, seed=1)).images[0].data, "image/png")
        assert (found.signer, found.state) == ("Signer", "Trusted")
    assert [record.levelname for record in caplog.records if "credentials" in record.message][-1] == "ERROR"
    assert old.decode() not in caplog.text
    authority.issue("Repaired")
    look_at_files(suite)
    found = authority.read((await generate(suite, seed=1)).images[0].data, "image/png")
    assert found.signer == "Repaired"


async def test_credentials_that_expire_while_serving_sign_no_more(authority):
    authority.issue(valid_days=(-1, 3 / 86400))
    signer = await signer_of(authority)

    async def is_refused() -> bool:
        try:
            await signer.sign(
                MANIFEST, [InputImage("references[0]", b"")], "image/png", [memoryview(picture())]
            )
        except SigningFailed:
            return True
        return False

    await until(is_refused, seconds=30)
    signer.close()


async def signer_of(authority, **options):
    certificate, key = authority.files
    files = PemFiles(str(certificate), str(key), "", ("CERTIFICATE", "KEY", ""))
    return ManifestSigner(files, **options)


@pytest.mark.parametrize(
    "make_key",
    [
        new_key,
        lambda: new_key(ec.SECP384R1),
        lambda: new_key(ec.SECP521R1),
        ed25519.Ed25519PrivateKey.generate,
        lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    ],
    ids=["P-256", "P-384", "P-521", "Ed25519", "RSA"],
)
async def test_keys_of_every_kind_sign(authority, make_key):
    authority.issue(key=make_key())
    signer = await signer_of(authority)
    data = await signer.sign(
        MANIFEST, [InputImage("references[0]", b"x")], "image/png", [memoryview(picture())]
    )
    signer.close()
    assert authority.read(data, "image/png").state == "Trusted"


def fault_text(authority, **changes) -> str:
    settings = OrchestratorSettings(**(authority.settings | changes))
    with pytest.raises(SettingsError) as caught:
        settings.signer()
    assert [str(caught.value)] == list(settings.problems())
    return str(caught.value)


def test_credentials_that_cannot_sign_stop_the_start(authority, tmp_path):
    certificate, key = authority.files
    other = tmp_path / "other.pem"
    other.write_bytes(authority.issue("Other")[1])
    authority.issue()
    assert (
        fault_text(authority, c2pa_key=str(other))
        == f"KLEIN_C2PA_KEY: {other} is the key of another certificate"
    )
    assert "cannot be read: No such file" in fault_text(authority, c2pa_key=str(tmp_path / "none"))
    assert "cannot be read: Is a directory" in fault_text(authority, c2pa_certificate=str(tmp_path))
    assert "is set without KLEIN_C2PA_KEY" in fault_text(authority, c2pa_key="")
    assert "is set without KLEIN_C2PA_CERTIFICATE" in fault_text(authority, c2pa_certificate="")
    assert "KLEIN_C2PA_TIMESTAMP_URL" in fault_text(authority, c2pa_timestamp_url="ftp://x")
    assert "no private key" in fault_text(authority, c2pa_key=str(certificate))
    authority.issue(valid_days=(-3, -1))
    assert "expired at" in fault_text(authority)
    authority.issue(valid_days=(1, 3))
    assert "not valid before" in fault_text(authority)
    authority.issue(usage=ExtendedKeyUsageOID.SERVER_AUTH)
    assert "c2pa cannot sign" in fault_text(authority)
    authority.issue(key=rsa.generate_private_key(public_exponent=65537, key_size=1024))
    assert "RSA of at least 2048 bits" in fault_text(authority)
    secret = key.read_text()
    key.write_text(secret.replace("PRIVATE", "SECRET"))
    assert secret.splitlines()[1] not in fault_text(authority)


def test_the_process_refuses_to_start_and_names_the_extra(authority, tmp_path):
    (tmp_path / "c2pa.py").write_text("raise ModuleNotFoundError(\"No module named 'c2pa'\", name='c2pa')")
    variables = {f"KLEIN_{name.upper()}": str(value) for name, value in authority.settings.items()}
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "klein_services.orchestrator"],
        env=os.environ | variables | {"PYTHONPATH": path, "KLEIN_PORT": "0", "KLEIN_METRICS_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install 'klein-suite[provenance]'")
    assert "Traceback" not in done.stderr


def test_the_library_is_not_imported_when_images_are_not_signed():
    check = (
        "import sys; import klein_services.orchestrator.__main__; "
        "print({'c2pa', 'cryptography'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "set()"


async def sign_with_reference(authority, reference: bytes, ingredients: str):
    signer = await signer_of(authority, ingredients=ingredients)
    try:
        inputs = [InputImage("references[0]", reference)]
        data = await signer.sign(MANIFEST, inputs, "image/png", [memoryview(picture())])
    finally:
        signer.close()
    found = authority.read(data, "image/png")
    assert found.state == "Trusted"
    digest = {DIGEST_FIELD: hashlib.sha256(reference).hexdigest()}
    assert found.ingredients["references[0]"]["metadata"] == digest
    return data, found


async def test_a_signed_reference_brings_its_manifest_only_if_that_is_set(authority):
    reference, _ = await sign_with_reference(authority, picture("JPEG"), "digest")
    _, found = await sign_with_reference(authority, reference, "digest")
    assert len(found.store["manifests"]) == 1
    _, found = await sign_with_reference(authority, reference, "credentials")
    assert len(found.store["manifests"]) == 2
    assert "thumbnail" not in found.ingredients["references[0]"]


async def test_thumbnails_are_stored_only_if_that_is_set(authority):
    reference = picture("PNG", "blue", 600)
    _, found = await sign_with_reference(authority, reference, "thumbnail")
    assert found.ingredients["references[0]"]["thumbnail"]["format"] == "image/jpeg"
    assert found.manifest["thumbnail"]["format"] == "image/jpeg"


@pytest.mark.parametrize(
    "reference",
    [
        b"\x89PNG\r\n\x1a\nxxxx",
        b"\xff\xd8\xffgarbage",
        b"RIFF\0\0\0\0WEBPgarbage",
        b"GIF89a",
        b"BM",
        b"neither",
        b"",
        picture("GIF"),
        picture("BMP"),
    ],
)
async def test_a_file_that_c2pa_cannot_read_is_an_ingredient_by_its_digest(authority, reference):
    for ingredients in ("digest", "credentials"):
        await sign_with_reference(authority, reference, ingredients)


async def test_a_reference_that_names_an_address_is_not_fetched(authority):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/manifest.c2pa"
        xmp = (
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            '<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
            f'dcterms:provenance="{address}"/></rdf:RDF></x:xmpmeta>'
        )
        await sign_with_reference(authority, picture("JPEG", xmp=xmp.encode()), "credentials")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_manifests_of_references_are_left_out_where_they_are_too_large(authority, monkeypatch):
    reference, _ = await sign_with_reference(authority, picture("JPEG"), "digest")
    monkeypatch.setattr("klein_services.orchestrator.manifest_signer.MANIFEST_BYTES_LIMIT", 4096)
    data, found = await sign_with_reference(authority, reference, "credentials")
    assert len(found.store["manifests"]) == 1
    assert len(data) < len(picture()) + 4096


async def test_an_authority_for_time_stamps_that_hangs_fails_the_image(authority, monkeypatch):
    monkeypatch.setattr("klein_services.orchestrator.manifest_signer.SIGN_SECONDS_LIMIT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        signer = await signer_of(authority, timestamp_url=url)
        with pytest.raises(SigningFailed, match="longer than"):
            await signer.sign(
                MANIFEST, [InputImage("references[0]", b"")], "image/png", [memoryview(picture())]
            )
        signer.close()
    signer = await signer_of(authority, timestamp_url="http://127.0.0.1:9/")
    monkeypatch.setattr("klein_services.orchestrator.manifest_signer.SIGN_SECONDS_LIMIT", 30)
    with pytest.raises(SigningFailed):
        await signer.sign(MANIFEST, [InputImage("references[0]", b"")], "image/png", [memoryview(picture())])
    signer.close()
