import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paragraph_ocr.learning.callbacks import Measure, TrainingProgress
from paragraph_ocr.learning.learner import add_token_noise
from paragraph_ocr.model.generate import Greedy
from paragraph_ocr.model.vote import Vote
from paragraph_ocr.validation import compose, validate


def first_step(accumulate, batch_size, tmp_path, *more):
    """Return by how much the optimizer's first step moves each weight, on the same 4 paragraphs."""
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


def test_guidance_is_a_part_of_the_cost_and_none_of_the_loss(tmp_path):
    from paragraph_ocr import build, build_model

    def sums(guidance, data="synthetic_lines"):
        typed = ["model=tiny", "debug=ci", f"datamodule={data}", "regularization=none"]
        typed += ["datamodule.num_train=8", "trainer=cpu", f"outputs={tmp_path}"]
        experiment = validate(compose([*typed, f"regularization.guidance={guidance}"]))
        pl.seed_everything(0, verbose=False)
        vocabulary = build.build_vocabulary(experiment)
        recognizer = build_model.build_recognizer(experiment, vocabulary)
        learner = build.build_learner(experiment, recognizer, vocabulary)
        pages = build.build_pages(experiment, vocabulary)
        pages.prepare_data()
        pages.setup()
        cost, sums = learner.training_loss(next(iter(pages.train_dataloader())))
        return cost.detach(), *sums

    cost, count, loss, unheeded = sums(0)
    assert cost == loss and unheeded == 0
    guided, same_count, same_loss, guidance = sums(0.5)
    assert (count, loss) == (
        same_count,
        same_loss,
    ) and guidance > count  # more than e to choose from
    assert guided == pytest.approx(loss + 0.5 * guidance)
    assert sums(0.5, data="fake")[3] == 0, "nobody knows where noise has letters"


class Answers(TorchFunctionMode):
    """Notes what Python asks a tensor of float numbers for: a GPU would be waited for."""

    asking = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__bool__, Tensor.cpu)

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.asking and args[0].is_floating_point():
            self.asked.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Listen(pl.Callback):
    """Listens from one step's beginning to the end of another's."""

    def __init__(self, first, last):
        self.first, self.last, self.answers = first, last, Answers()

    def on_train_batch_start(self, trainer, learner, batch, batch_index):
        if trainer.global_step == self.first:
            self.answers.__enter__()

    def on_train_batch_end(self, trainer, learner, outputs, batch, batch_index):
        if trainer.global_step == self.last:
            self.answers.__exit__(None, None, None)


def asked_in_steps(tmp_path, callbacks, *, log_every):
    """Return what was asked of tensors in steps 3 to 5 of a training by the Trainer."""
    from paragraph_ocr import build, build_model

    experiment = validate(
        compose(
            [
                "model=tiny", "debug=ci", "datamodule=fake", "optimizer=sgd", "trainer=cpu",
                "trainer.max_steps=6", "trainer.max_epochs=6", "trainer.limit_val_batches=0",
                f"trainer.log_every_n_steps={log_every}", f"outputs={tmp_path}",
            ]
        )
    )  # fmt: skip
    vocabulary = build.build_vocabulary(experiment)
    recognizer = build_model.build_recognizer(experiment, vocabulary)
    learner = build.build_learner(experiment, recognizer, vocabulary)
    listen = Listen(2, 5)
    trainer = build.build_trainer(
        experiment, folder=tmp_path, logger=None, callbacks=[*callbacks, listen]
    )
    trainer.fit(learner, datamodule=build.build_pages(experiment, vocabulary))
    return listen.answers.asked


def test_steps_that_are_not_logged_wait_for_no_number_of_a_gpu(tmp_path):
    callbacks = [Measure(), TrainingProgress()]
    assert asked_in_steps(tmp_path, callbacks, log_every=100) == []
    assert asked_in_steps(tmp_path, [Measure(), TrainingProgress()], log_every=1) != []


def test_validation_reads_a_page_once_and_the_test_by_a_vote(monkeypatch):
    from paragraph_ocr import build, build_model

    experiment = validate(compose(["model=tiny", "debug=ci", "datamodule=fake", "decoding=vote"]))
    vocabulary = build.build_vocabulary(experiment)
    recognizer = build_model.build_recognizer(experiment, vocabulary)
    learner = build.build_learner(experiment, recognizer, vocabulary)
    pages = build.build_pages(experiment, vocabulary)
    pages.setup("fit")
    batch = next(iter(pages.val_dataloader()))
    seen = []
    read = recognizer.read
    monkeypatch.setattr(
        recognizer, "read", lambda *a, **k: seen.append(type(k["decoding"])) or read(*a, **k)
    )
    learner.read(batch, stage="val")
    assert len(learner.read(batch)) == len(batch)
    assert seen == [Greedy, Vote]


@pytest.mark.parametrize(("limit", "calm_from"), [({"max_steps": 6}, 3), ({"max_epochs": 3}, 3)])
def test_augmentation_is_calmer_once_so_much_of_the_training_is_gone(limit, calm_from, monkeypatch):
    from paragraph_ocr import build, build_model
    from paragraph_ocr.data.augment import Augment

    words = [*(f"trainer.{name}={value}" for name, value in limit.items()), "trainer.max_time=null"]
    experiment = validate(
        compose(
            ["model=tiny", "debug=ci", "datamodule=fake", "regularization=standard", *words,
             "trainer.limit_train_batches=2", "regularization.calm_after=0.5", "regularization.calm=0.25"]
        )
    )  # fmt: skip
    vocabulary = build.build_vocabulary(experiment)
    recognizer = build_model.build_recognizer(experiment, vocabulary)
    seen = []
    augment = Augment.with_letters
    monkeypatch.setattr(
        Augment, "with_letters", lambda self, *a: seen.append(self.strengths) or augment(self, *a)
    )
    learner = build.build_learner(experiment, recognizer, vocabulary)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, limit_train_batches=2, **limit,
    )  # fmt: skip
    trainer.fit(learner, datamodule=build.build_pages(experiment, vocabulary))
    strong, calm = seen[0], seen[-1]
    assert seen == [strong] * calm_from + [calm] * (6 - calm_from)
    assert strong.shear_deg == experiment.regularization.augmentation.shear_deg
    assert calm.shear_deg == 0.25 * strong.shear_deg and calm.noise == 0.25 * strong.noise
