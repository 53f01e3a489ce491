"""docs/recipes.md: each recipe, as the page has it, in a short training with its library."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ecosystem.common import VOID, batch
from ecosystem.test_transformers import PER_PIXEL

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEARNING_RATE = 0.05
STEPS = 3


def run_recipe(library: str, **names: Any) -> dict[str, Any]:
    """Runs the settings of the page and the recipe of one library, whose names are returned."""
    settings = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[0]
    recipe = re.findall(r"^```python\n(.*?)^```$", PAGE.split(f"\n## {library}\n")[1], re.DOTALL | re.MULTILINE)[0]
    assert len([line for line in recipe.splitlines() if line and not line.startswith("import ")]) <= 5
    names |= {"mean": MEAN, "std": STD}
    exec(compile(settings, "settings", "exec"), names)
    exec(compile(recipe, library, "exec"), names)
    return names


def criterion(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=VOID)


def channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


class Training:
    """A model and data for a recipe, and what the model was given in train mode."""

    def __init__(self, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.model = model or nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)
        )
        self.model.train()
        self.untrained = copy.deepcopy(self.model)
        self.pixels, self.labels = batch((32, 32), count=2 * STEPS)
        self.images = (self.pixels - channels(MEAN)) / channels(STD)
        self.loader = DataLoader(TensorDataset(self.images, self.labels), batch_size=2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.seen: list[Tensor] = []
        self.forwards = 0
        self.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        if model.training:
            assert all(module.training for module in model.modules())
            self.seen.append((args[0] if args else kwargs["pixel_values"]).detach().clone())

    def check(self) -> None:
        """The model was trained on attacked images in the ball, by the gradients of these alone."""
        assert len(self.seen) == STEPS
        optimizer = torch.optim.SGD(self.untrained.parameters(), lr=LEARNING_RATE)
        for images in self.seen:
            # Trainer shuffles.
            rows = torch.cdist(images.flatten(1), self.images.flatten(1)).argmin(1)
            adversarial = images * channels(STD) + channels(MEAN)
            distances = (adversarial - self.pixels[rows]).abs().amax((1, 2, 3))
            assert float(distances.min()) >= 2 / 255
            assert float(distances.max()) <= 4 / 255 + 1e-6
            assert -1e-6 <= float(adversarial.min()) <= float(adversarial.max()) <= 1 + 1e-6
            logits = getattr(output := self.untrained(images), "logits", output)
            loss = criterion(F.interpolate(logits, images.shape[2:], mode="bilinear"), self.labels[rows])
            assert loss.isfinite()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(self.model.state_dict(), self.untrained.state_dict())


@pytest.mark.works("training", "a loop in plain PyTorch", "[five lines](recipes.md#pytorch)")
def test_pytorch() -> None:
    training = Training()
    run_recipe(
        "PyTorch",
        model=training.model,
        loader=training.loader,
        criterion=criterion,
        optimizer=training.optimizer,
    )
    assert training.model.training
    training.check()


@pytest.mark.works("training", "Lightning", "[a callback](recipes.md#lightning)")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    training = Training()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = training.model

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return criterion(self(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            assert self.training

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer

    callback = run_recipe("Lightning")["Adversarial"]()
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), training.loader)
    training.check()


@pytest.mark.works("training", "transformers Trainer", "[a subclass](recipes.md#transformers), `compute_loss`")
def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = PER_PIXEL["SegFormer"]()
    model.config.semantic_loss_ignore_index = VOID
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # or the training could not be repeated
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    training = Training(model)
    data = [
        {"pixel_values": image, "labels": label} for image, label in zip(training.images, training.labels, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(training.optimizer, factor=1.0)
    trainer_class = run_recipe("transformers")["AdversarialTrainer"]
    trainer = trainer_class(
        model, arguments, train_dataset=data, eval_dataset=data, optimizers=(training.optimizer, schedule)
    )
    trainer.train()
    assert model.training
    training.check()
    before = training.forwards
    trainer.evaluate()
    assert training.forwards == before + 1, "the attack ran in evaluation too"


@pytest.mark.works("training", "accelerate", "[five lines](recipes.md#accelerate)")
def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    training = Training()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(training.model, training.optimizer, training.loader)
    run_recipe(
        "accelerate", accelerator=accelerator, model=model, loader=loader, criterion=criterion, optimizer=optimizer
    )
    assert model.training
    training.check()
