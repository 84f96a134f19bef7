import pytest
import torch

from paragraph_ocr.learning.learner import add_token_noise
from paragraph_ocr.validation import compose, validate


def gradients(accumulate, batch_size, tmp_path):
    """Return the gradients that the optimizer's first step sees, of the same 4 paragraphs."""
    import pytorch_lightning as pl

    from paragraph_ocr import build

    experiment = validate(
        compose(
            [
                "model=tiny",
                "model.encoder.freeze=true",  # BatchNorm would see other batches
                "debug=ci",
                "datamodule=fake",
                "regularization=none",
                "optimizer=sgd",
                f"datamodule.batch_size={batch_size}",
                "datamodule.num_train=4",
                f"trainer.accumulate_grad_batches={accumulate}",
                "trainer.max_steps=1",
                "trainer.overfit_batches=1.0",
                "trainer.accelerator=cpu",
                f"outputs={tmp_path}",
            ]
        )
    )
    pl.seed_everything(0, verbose=False)
    vocabulary = build.build_vocabulary(experiment)
    recognizer = build.build_recognizer(experiment, vocabulary)
    learner = build.build_learner(experiment, recognizer, vocabulary)
    seen = []

    class Look(pl.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
            seen.append(grads) if grads else None

    trainer = build.build_trainer(experiment, folder=tmp_path, logger=None, callbacks=[Look()])
    trainer.fit(learner, datamodule=build.build_datamodule(experiment, vocabulary))
    return seen[0]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole = gradients(1, 4, tmp_path)
    parts = gradients(4, 1, tmp_path)  # four texts of unequal length
    assert len(whole) == len(parts) > 10
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_token_noise_changes_a_share_of_the_characters_and_no_special_token():
    torch.manual_seed(0)
    tokens = torch.randint(0, 84, (50, 200))
    noisy = add_token_noise(tokens, share=0.2, first=4, num_tokens=84)
    changed = noisy != tokens
    assert not changed[tokens < 4].any()
    assert float(changed[tokens >= 4].float().mean()) == pytest.approx(0.2 * 79 / 80, abs=0.02)
    assert noisy[tokens >= 4].min() >= 4
    assert add_token_noise(tokens, share=0.0, first=4, num_tokens=84) is tokens
