import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlmoe_core.errors import TokenizerError
from vlmoe_core.tokenizers import codebook as module
from vlmoe_core.tokenizers.codebook import Codebook, fit_codebook
from vlmoe_core.tokenizers.visual import load_visual_tokenizer, to_patches

FLICKR = Path(__file__).parents[2].parent / "shared" / "data" / "flickr8k" / "flickr8k-dev-000000.tar"
PATCH = 8


def draw(seed: int, height: int = 32, width: int = 32) -> NDArray[np.uint8]:
    """A shaded ground with a few rectangles of plain colour, (3, height, width)."""
    random = np.random.default_rng(seed)
    image = np.full((3, height, width), random.integers(100, 200), dtype=np.uint8)
    image += np.linspace(0, 50, width).astype(np.uint8)
    for _ in range(4):
        y, x = random.integers(0, height - 6), random.integers(0, width - 6)
        image[:, y : y + random.integers(4, 16), x : x + random.integers(4, 16)] = random.integers(0, 256, (3, 1, 1))
    return image


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    return [draw(seed) for seed in range(60)]


@pytest.fixture(scope="module")
def codebook(images: list[NDArray[np.uint8]]) -> Codebook:
    return fit_codebook(images, PATCH, 64, 10, seed=0)


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return torch.from_numpy(np.stack([draw(seed) for seed in range(1000, 1010)]))


def psnr(shown: Tensor, images: Tensor) -> float:
    return float(-10 * (shown - images / 255).square().mean().log10())


def test_the_fit_is_bit_identical(images: list[NDArray[np.uint8]], codebook: Codebook) -> None:
    again = fit_codebook((torch.from_numpy(image) for image in images), PATCH, 64, 10, seed=0)
    for name, buffer in codebook.named_buffers():
        assert torch.equal(buffer, again.get_buffer(name)), name
    assert again.fingerprint == codebook.fingerprint


def test_the_fit_leaves_the_default_generator_alone(images: list[NDArray[np.uint8]]) -> None:
    before = torch.get_rng_state()
    fit_codebook(images[:10], PATCH, 8, 2, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_fingerprint_changes(images: list[NDArray[np.uint8]], codebook: Codebook) -> None:
    others = [
        fit_codebook(images, PATCH, 64, 10, seed=1),
        fit_codebook(images, PATCH, 32, 10, seed=0),
        fit_codebook(images[:-1], PATCH, 64, 10, seed=0),
        fit_codebook(images, 4, 64, 10, seed=0),
    ]
    assert len({codebook.fingerprint, *(o.fingerprint for o in others)}) == 5


def test_encode_equals_brute_force(codebook: Codebook, held_out: Tensor) -> None:
    ids = codebook.encode(held_out)
    assert ids.shape == (10, 16)
    assert ids.dtype == torch.int64
    for image, row in zip(held_out.numpy().astype(np.float64) / 255, ids.tolist(), strict=True):
        for n, found in enumerate(row):
            y, x = n // 4 * PATCH, n % 4 * PATCH
            patch = image[:, y : y + PATCH, x : x + PATCH].reshape(-1)
            feature = (patch - codebook.mean_D.numpy()) @ codebook.basis_DF.numpy()
            distance = ((codebook.codes_KF.numpy() - feature) ** 2).sum(1)
            assert distance[found] <= distance.min() + 1e-5


def test_bytes_and_floats_give_the_same_ids(codebook: Codebook, held_out: Tensor) -> None:
    ids = codebook.encode(held_out)
    assert torch.equal(codebook.encode(held_out / 255), ids)
    assert torch.equal(codebook.encode(held_out), ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.encode(held_out), ids)


def test_an_image_is_encoded_alone_as_in_a_batch(codebook: Codebook, held_out: Tensor) -> None:
    alone = torch.cat([codebook.encode(image[None]) for image in held_out])
    assert torch.equal(alone, codebook.encode(held_out))


def test_codes_are_numbered_by_use(images: list[NDArray[np.uint8]], codebook: Codebook) -> None:
    ids = codebook.encode(torch.from_numpy(np.stack(images)))
    assert torch.equal(codebook.counts_K, torch.bincount(ids.flatten(), minlength=64))
    assert torch.equal(codebook.counts_K, codebook.counts_K.sort(descending=True).values)


def test_use_is_reported(codebook: Codebook) -> None:
    use = codebook.use()
    share = codebook.counts_K.double().numpy() / (60 * 16)
    assert use.patches == 60 * 16
    assert (use.used, use.unused) == (64, 0)
    assert use.perplexity == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_unused_codes_are_reported() -> None:
    flat = [np.full((3, 16, 16), level, dtype=np.uint8) for level in (10, 90, 200)]
    codebook = fit_codebook(flat * 4, PATCH, 9, 10, seed=0)
    assert codebook.use() == module.CodeUse(patches=48, used=3, unused=6, perplexity=pytest.approx(3))
    shown = codebook.decode(codebook.encode(torch.from_numpy(np.stack(flat))))
    assert torch.allclose(shown * 255, torch.from_numpy(np.stack(flat)).float(), atol=0.1)


def test_one_plain_colour_can_be_fitted() -> None:
    plain = np.full((3, 16, 16), 70, dtype=np.uint8)
    codebook = fit_codebook([plain], PATCH, 2, 3, seed=0)
    shown = codebook.decode(codebook.encode(torch.from_numpy(plain)[None]))
    assert torch.allclose(shown, torch.full_like(shown, 70 / 255), atol=1e-4)


def test_decode_shows_the_image(codebook: Codebook, held_out: Tensor) -> None:
    shown = codebook.decode(codebook.encode(held_out))
    assert shown.shape == held_out.shape
    assert shown.dtype == torch.float32
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
    mean = to_patches(held_out / 255.0, PATCH).mean((0, 1))
    as_mean = mean.view(3, PATCH, PATCH).repeat(1, 4, 4).expand(held_out.shape)
    assert psnr(shown, held_out) > psnr(as_mean, held_out) + 2


def test_decoding_then_encoding_gives_the_same_codes(codebook: Codebook) -> None:
    ids = codebook.encode(torch.from_numpy(np.stack([draw(seed) for seed in range(60)])))
    assert float((codebook.encode(codebook.decode(ids)) == ids).float().mean()) > 0.9


def test_more_codes_show_more(images: list[NDArray[np.uint8]], codebook: Codebook, held_out: Tensor) -> None:
    coarse = fit_codebook(images, PATCH, 4, 10, seed=0)
    fine_psnr = psnr(codebook.decode(codebook.encode(held_out)), held_out)
    assert fine_psnr > psnr(coarse.decode(coarse.encode(held_out)), held_out) + 1


def test_images_that_are_not_square(codebook: Codebook) -> None:
    wide = torch.from_numpy(draw(7, 16, 40))[None]
    ids = codebook.encode(wide)
    assert ids.shape == (1, 10)
    shown = codebook.decode(ids, grid=(2, 5))
    assert shown.shape == wide.shape
    assert torch.equal(shown[0, :, :8, 8:16], codebook.decode(ids[:, 1:2])[0])
    with pytest.raises(TokenizerError, match="10 patches don't fill a grid of 3 x 3"):
        codebook.decode(ids)


def test_a_long_stream_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PATCHES", 500)
    levels = [np.full((3, 16, 16), i // 4, dtype=np.uint8) for i in range(1000)]
    codebook = fit_codebook(iter(levels), PATCH, 4, 10, seed=0)
    assert codebook.use().patches == 500
    assert float(codebook.mean_D.mean()) * 255 == pytest.approx(124.5, abs=4 * 72 / 500**0.5)


def test_it_has_no_parameters_and_no_state(codebook: Codebook) -> None:
    assert list(codebook.parameters()) == []
    assert codebook.state_dict() == {}


def test_save_and_load(codebook: Codebook, held_out: Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "visual"
    codebook.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["visual_tokenizer.json", "visual_tokenizer.safetensors"]
    loaded = load_visual_tokenizer(folder)
    assert isinstance(loaded, Codebook)
    assert (loaded.patch_size, loaded.codebook_size, loaded.fingerprint) == (PATCH, 64, codebook.fingerprint)
    assert torch.equal(loaded.encode(held_out), codebook.encode(held_out))
    assert loaded.use() == codebook.use()
    before = [p.read_bytes() for p in sorted(folder.iterdir())]
    loaded.save(folder)
    assert [p.read_bytes() for p in sorted(folder.iterdir())] == before


def test_a_missing_file_is_named(codebook: Codebook, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"visual_tokenizer\.json is not there; give a folder"):
        load_visual_tokenizer(tmp_path)
    codebook.save(tmp_path)
    (tmp_path / "visual_tokenizer.safetensors").unlink()
    with pytest.raises(TokenizerError, match=r"visual_tokenizer\.safetensors is not there"):
        load_visual_tokenizer(tmp_path)


def test_a_flipped_bit_and_a_cut_file_are_refused(codebook: Codebook, tmp_path: Path) -> None:
    codebook.save(tmp_path)
    path = tmp_path / "visual_tokenizer.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(TokenizerError, match="its fingerprint differs"):
        load_visual_tokenizer(tmp_path)
    path.write_bytes(whole[:-5])
    with pytest.raises(TokenizerError, match="does not hold a codebook"):
        load_visual_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "codebok"}, "unknown visual tokenizer 'codebok'; did you mean 'codebook'"),
        ({"kind": 3}, "names no kind"),
        ({"format": 2}, "has format 2, not 1; use a newer vlmoe"),
        ({"patch_size": 4}, "its fingerprint differs"),
        ({"patch_size": "x"}, "does not hold a codebook"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    codebook: Codebook, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    codebook.save(tmp_path)
    path = tmp_path / "visual_tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TokenizerError, match=message):
        load_visual_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(TokenizerError, match="can't be read"):
        load_visual_tokenizer(tmp_path)


def test_more_codes_than_patches_are_refused(images: list[NDArray[np.uint8]]) -> None:
    with pytest.raises(TokenizerError, match="100 codes can't be fitted on 64 patches of 8 x 8 pixels; lower"):
        fit_codebook(images[:4], PATCH, 100, 5, seed=0)
    with pytest.raises(TokenizerError, match="2 codes can't be fitted on 0 patches"):
        fit_codebook([], PATCH, 2, 5, seed=0)


def test_what_can_not_be_encoded_is_refused(codebook: Codebook) -> None:
    with pytest.raises(TokenizerError, match="images of 30 x 16 pixels can't be cut into patches of 8"):
        codebook.encode(torch.zeros(1, 3, 16, 30))
    with pytest.raises(TokenizerError, match=r"pixels are torch\.int64; give uint8"):
        codebook.encode(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    for bad in (-1, 64):
        with pytest.raises(TokenizerError, match="are not all codes; these are 0 to 63"):
            codebook.decode(torch.tensor([[0, bad, 1, 2]]))


@pytest.mark.skipif(not FLICKR.is_file(), reason="../shared is absent")
def test_photographs_are_recognisable() -> None:
    photos = []
    with tarfile.open(FLICKR) as tar:
        for member in (m for m in tar if m.name.endswith(".jpg")):
            data = tar.extractfile(member)
            assert data is not None
            photos.append(np.asarray(Image.open(io.BytesIO(data.read())).convert("RGB").resize((64, 64))))
            if len(photos) == 220:
                break
    pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2)
    codebook = fit_codebook(pixels[:200], PATCH, 256, 10, seed=0)
    shown = codebook.decode(codebook.encode(pixels[200:]))
    assert psnr(shown, pixels[200:]) > 15
    assert codebook.use().perplexity > 100
