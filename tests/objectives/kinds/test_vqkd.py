from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tokenizers.vqkd_support import encoder_of, pictures
from vlmoe_core.data.batch import Batch
from vlmoe_core.errors import TokenizerError
from vlmoe_core.model.encoder import Encoder
from vlmoe_core.objectives.kinds import vqkd
from vlmoe_core.objectives.kinds.vqkd import Config, VQKDTraining, trained_tokenizer
from vlmoe_core.objectives.learning import Learns
from vlmoe_core.tokenizers.config import TeacherConfig, TokenizersConfig
from vlmoe_core.tokenizers.vqkd import images_alone, patches_of

CODES = 12


class TeacherOfTests:
    """Patch features of a random linear map, which could have a gradient."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.map = nn.Linear(48, 7).double()
        self.dim, self.loads = 7, 0

    def load(self) -> None:
        self.loads += 1

    def features(self, pixels_ICHW: Tensor) -> Tensor:
        cut = pixels_ICHW.view(-1, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 48)
        told: Tensor = self.map(cut.double() / 255)
        return told


def objective(monkeypatch: pytest.MonkeyPatch | None = None, *, started: bool = True, **values: Any) -> VQKDTraining:
    """A small objective in float64, its codes started; with `monkeypatch` its teacher is a model."""
    settings: dict[str, Any] = {"code_dim": 6, "decoder_layers": 2, **values}
    if monkeypatch is not None:
        monkeypatch.setattr(vqkd, "open_teacher", lambda config, model: TeacherOfTests())
        settings["teacher"] = {"model": "a-model", "dim": 7}
    torch.manual_seed(0)
    built = VQKDTraining(Config.model_validate(settings), Encoder(encoder_of(), 1), CODES).double()
    built.codes.quantiser.shares_K.fill_(started / CODES)
    assert isinstance(built, Learns)
    return built


def batch_of(images: int = 3, seed: int = 0) -> dict[Any, Batch]:
    return {"image": images_alone(pictures(images, seed=seed), 16)}


def test_the_losses_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    built = objective(monkeypatch, commitment=0.7)
    batches = batch_of()
    loss = built(batches)
    with torch.no_grad():
        encoded = built.encoder(batches["image"])
        features = built.codes(patches_of(encoded)).numpy()
        codes = built.codes.quantiser.codes_KF.numpy()
        chosen = codes[[int(((codes - one) ** 2).sum(1).argmin()) for one in features]]
        told = built.decoder(torch.from_numpy(chosen), encoded.layout).numpy()
        target = built.teacher.features(batches["image"].pixels_ICHW).flatten(0, 1).numpy()
    lengths = np.linalg.norm(told, axis=1) * np.linalg.norm(target, axis=1)
    assert float(loss.parts["teacher"].sum.detach()) == pytest.approx(
        float((1 - (told * target).sum(1) / lengths).sum())
    )
    assert float(loss.parts["commitment"].sum.detach()) == pytest.approx(
        float(((features - chosen) ** 2).mean(1).sum())
    )
    assert {name: (part.count, part.weight) for name, part in loss.parts.items()} == {
        "teacher": (48, 1.0),
        "commitment": (48, 0.7),
    }
    assert built.counts(batches) == {"teacher": 48, "commitment": 48}


def test_gradients_reach_encoder_and_decoder_and_neither_teacher_nor_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    built = objective(monkeypatch)
    loss = built(batch_of())
    loss.total(built.counts(batch_of())).backward()
    trained = {name: p for name, p in built.named_parameters() if p.requires_grad}
    without = {n for n, p in built.named_parameters() if p.grad is None or not bool(p.grad.any())}
    assert without <= {"encoder.embeddings.image.mask"}
    assert "encoder.embeddings.image.mask" not in trained
    assert any(name.startswith("encoder.blocks.0") for name in trained)
    assert all(p.grad is None for p in built.teacher.map.parameters())  # type: ignore[attr-defined]
    assert not any("teacher" in name or "quantiser" in name for name in trained)
    assert not any("teacher" in name for name in built.state_dict())


def test_the_gradient_goes_straight_past_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the features is the decoder's gradient at the codes, and that of the commitment."""
    built = objective(monkeypatch, commitment=0.7)
    batches = batch_of()
    seen: list[Tensor] = []
    built.codes.register_forward_hook(lambda module, inputs, out: (out.retain_grad(), seen.append(out))[0])
    built(batches).total(built.counts(batches)).backward()
    (features_NF,) = seen
    encoded = built.encoder(batches["image"])
    codes_NF = built.codes.quantiser.codes_KF[built.codes.quantiser.nearest(features_NF.detach())].requires_grad_()
    target_NO = built.teacher.features(batches["image"].pixels_ICHW).flatten(0, 1)
    told_NO = built.decoder(codes_NF, encoded.layout)
    cosine_N = (told_NO * target_NO).sum(1) / (told_NO.norm(dim=1) * target_NO.norm(dim=1))
    (1 - cosine_N).mean().backward()
    assert codes_NF.grad is not None
    commitment_NF = 0.7 * 2 * (features_NF - codes_NF) / 6 / 48
    torch.testing.assert_close(features_NF.grad, codes_NF.grad + commitment_NF.detach())


def test_statistics_are_what_each_code_got_and_move_it() -> None:
    built = objective(decay=0.9, revive_below=0.0)
    batches = batch_of()
    statistics = built(batches).statistics
    with torch.no_grad():
        features_NF = built.codes(patches_of(built.encoder(batches["image"])))
    ids = built.codes.quantiser.nearest(features_NF).tolist()
    for k in range(CODES):
        own = [features_NF[n] for n, found in enumerate(ids) if found == k]
        assert int(statistics["patches"][k]) == len(own)
        torch.testing.assert_close(statistics["features"][k], sum(own, torch.zeros(6).double()))
    before = built.codes.quantiser.codes_KF.clone()
    built.learn(statistics, step=0)
    after = built.codes.quantiser.codes_KF
    for k in set(ids):
        mean = statistics["features"][k] / statistics["features"][k].norm()
        code = 0.9 * before[k] + 0.1 * mean
        torch.testing.assert_close(after[k], code / code.norm())
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("values", [{"decoder_layers": 1}, {"decoder_layers": 3, "code_dim": 5}])
def test_parameters_of_the_heads(values: dict[str, Any]) -> None:
    built = objective(**values)
    heads = sum(p.numel() for name, p in built.named_parameters() if not name.startswith("encoder."))
    assert built.config.num_head_params(built.encoder.config, TokenizersConfig()) == heads


def test_revived_codes_lie_elsewhere_in_each_step() -> None:
    found = []
    for step in (0, 0, 1):
        built = objective(decay=0.5, revive_below=0.9)
        built.learn(built(batch_of()).statistics, step)
        found.append(built.codes.quantiser.codes_KF)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_figures_of_an_evaluation() -> None:
    built = objective()
    sums = {"patches": torch.tensor([6, 2, 0] + 9 * [0]), "error": torch.tensor([3.0, 12.0])}
    found = built.figures({**sums, "features": torch.zeros(CODES, 6)})
    assert found["codes/used"] == pytest.approx(2 / CODES)
    assert found["codes/perplexity"] == pytest.approx((4 / 3) ** 0.75 * 4**0.25)
    assert found["codes/pixel_error"] == 0.25


def test_there_are_no_figures_of_no_patch() -> None:
    built = objective()
    assert built.figures(built(batch_of(0)).statistics) == {}


def test_the_pixel_error_is_that_of_the_drawn_codes() -> None:
    built = objective()
    error = built(batch_of()).statistics["error"]
    tokenizer = trained_tokenizer(built.config, built.encoder.config, CODES, built.float().state_dict())
    drawn = tokenizer.decode(tokenizer.encode(pictures()), (4, 4))
    assert int(error[1]) == 3 * 3 * 16 * 16
    assert float(error[0] / error[1]) == pytest.approx(float((drawn - pictures() / 255).square().mean()), rel=1e-4)


def test_a_model_as_teacher_has_no_pixel_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "error" not in objective(monkeypatch)(batch_of()).statistics


def test_the_start_reads_as_many_images_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    built = objective(monkeypatch, started=False)
    read = []

    def batches() -> Any:
        for number in range(100):
            read.append(number)
            yield batch_of(seed=number)

    built.start(batches())
    assert len(read) == 4, "16 patches a code, 48 a batch"
    assert built.teacher.loads == 1  # type: ignore[attr-defined]
    codes_KF = built.codes.quantiser.codes_KF
    torch.testing.assert_close(codes_KF.norm(dim=1), torch.ones(CODES).double())


def test_codes_of_another_model_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = objective()
    before.start([batch_of(images=9)])
    built = objective(monkeypatch)
    built.codes.load_state_dict(before.codes.state_dict())
    built.start([batch_of(images=9, seed=1)])
    assert torch.equal(built.codes.quantiser.codes_KF, before.codes.quantiser.codes_KF)
    assert built.teacher.loads == 1, "before the first step, so that its errors come early"  # type: ignore[attr-defined]


def test_before_the_start_patches_pass_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    built = objective(monkeypatch, started=False)
    batches = batch_of()
    loss = built(batches)
    with torch.no_grad():
        encoded = built.encoder(batches["image"])
        told_NO = built.decoder(built.codes(patches_of(encoded)), encoded.layout)
    target_NO = built.teacher.features(batches["image"].pixels_ICHW).flatten(0, 1)
    wanted = (1 - torch.nn.functional.cosine_similarity(told_NO, target_NO, dim=-1)).sum()
    torch.testing.assert_close(loss.parts["teacher"].sum.detach(), wanted.detach())
    assert float(loss.parts["commitment"].sum.detach()) == 0
    before = built.codes.quantiser.codes_KF.clone()
    built.learn(loss.statistics, step=0)
    assert torch.equal(built.codes.quantiser.codes_KF, before)
    assert built.figures(loss.statistics) == {}
    with pytest.raises(TokenizerError, match=r"they start at step 0 \(objective.quantise_from\)"):
        trained_tokenizer(built.config, built.encoder.config, CODES, built.float().state_dict())


def test_too_few_patches_are_refused() -> None:
    with pytest.raises(TokenizerError, match="12 codes can't be started from the 0 patches"):
        objective(started=False).start([])


def test_an_empty_batch_costs_nothing_and_touches_all() -> None:
    built = objective()
    loss = built(batch_of(0))
    total = loss.total({"teacher": 48, "commitment": 48})
    assert float(total.detach()) == 0
    total.backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)


def test_the_tokenizer_of_a_run_gives_the_same_tokens() -> None:
    built = objective().float()
    tokenizer = trained_tokenizer(built.config, built.encoder.config, CODES, built.state_dict())
    with torch.no_grad():
        features_NF = built.codes(patches_of(built.encoder(batch_of()["image"])))
    assert torch.equal(tokenizer.encode(pictures()).flatten(), built.codes.quantiser.nearest(features_NF))


@pytest.mark.parametrize(
    ("teacher", "said"),
    [({"model": "pixels", "dim": 5}, "leave out dim"), ({"model": "openai/clip"}, "say their width with dim")],
)
def test_a_teachers_width(teacher: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TeacherConfig.model_validate(teacher)
