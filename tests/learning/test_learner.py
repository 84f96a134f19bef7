import pytest
import torch

from paragraph_ocr.learning.learner import add_token_noise
from paragraph_ocr.validation import compose, validate


def first_step(accumulate, batch_size, tmp_path, *more):
    """Return by how much the optimizer's first step moves each weight, on the same 4 paragraphs."""
    import pytorch_lightning as pl

    from paragraph_ocr import build, build_model

    overrides = [
        "model=tiny",
        "model.encoder.freeze=true",  # BatchNorm would see other batches
        "debug=ci",
        "datamodule=fake",
        "regularization=none",
        "optimizer=sgd",
        "schedule=constant",
        f"datamodule.batch_size={batch_size}",
        "datamodule.num_train=4",
        f"trainer.accumulate_grad_batches={accumulate}",
        "trainer.max_steps=1",
        "trainer.overfit_batches=1.0",
        "trainer.accelerator=cpu",
        f"outputs={tmp_path}",
        *more,
    ]
    experiment = validate(compose(overrides))
    pl.seed_everything(0, verbose=False)
    vocabulary = build.build_vocabulary(experiment)
    recognizer = build_model.build_recognizer(experiment, vocabulary)
    learner = build.build_learner(experiment, recognizer, vocabulary)
    before = {name: tensor.clone() for name, tensor in recognizer.state_dict().items()}
    trainer = build.build_trainer(experiment, folder=tmp_path, logger=None, callbacks=[])
    trainer.fit(learner, datamodule=build.build_pages(experiment, vocabulary))
    assert trainer.global_step == 1
    return {name: tensor - before[name] for name, tensor in recognizer.state_dict().items()}


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole = first_step(1, 4, tmp_path)
    parts = first_step(4, 1, tmp_path)  # four texts of unequal length
    moved = [name for name, change in whole.items() if change.any()]
    assert len(moved) > 20
    for name, change in whole.items():
        torch.testing.assert_close(change, parts[name], atol=1e-5, rtol=1e-3, msg=name)


def test_gradients_are_clipped_to_their_norm_for_a_fused_optimizer_too(tmp_path):
    """Lightning refuses to clip for one in mixed precision."""
    plain = "optimizer.extra.momentum=0", "optimizer.extra.nesterov=false", "optimizer.lr=1"
    fused = "+optimizer.extra.fused=true", "trainer.precision=bf16-mixed"

    def length(*more):
        moved = first_step(1, 4, tmp_path, *plain, *fused, *more)
        return torch.stack([change.float().norm() for change in moved.values()]).norm()

    assert length() > 0.1
    assert length("regularization.gradient_clip=0.01") == pytest.approx(0.01, rel=1e-2)


def test_token_noise_changes_a_share_of_the_characters_and_no_special_token():
    torch.manual_seed(0)
    tokens = torch.randint(0, 84, (50, 200))
    noisy = add_token_noise(tokens, share=0.2, first=4, num_tokens=84)
    changed = noisy != tokens
    assert not changed[tokens < 4].any()
    assert float(changed[tokens >= 4].float().mean()) == pytest.approx(0.2 * 79 / 80, abs=0.02)
    assert noisy[tokens >= 4].min() >= 4
    assert add_token_noise(tokens, share=0.0, first=4, num_tokens=84) is tokens
