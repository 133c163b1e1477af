"""An equilibrium layer trained by Lightning: mixed precision, accumulation, monitor, restart.

    python examples/trainers/with_lightning.py
    python examples/trainers/with_lightning.py --epochs 12 --resume

Lightning calls `set_epoch` of a sampler that has it, so each epoch's order depends on its number alone: a run that is
started again after an epoch continues with the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from digits import ACCUMULATE, BATCH, RATE, Classifier, accuracy, arguments, data, last
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from deqcore.monitor import Monitor
from deqcore.monitor.adapters import lightning_callback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Classifier()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), RATE)


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train, or train on; returns the test accuracy and the weights."""
    options = arguments(__doc__, given)
    train, test = data()
    seed_everything(0, verbose=False)
    module = Digits()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=options.epochs,
        accumulate_grad_batches=ACCUMULATE,
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        callbacks=[
            lightning_callback(Monitor(sinks=[{"sink": "jsonl", "path": str(options.out / "monitor.jsonl")}])),
            ModelCheckpoint(options.out, "{epoch}", save_top_k=-1, every_n_epochs=1),
        ],
        default_root_dir=options.out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    sampler = DistributedSampler(train, num_replicas=trainer.world_size, rank=trainer.global_rank)
    begin = last(options.out, "epoch=*.ckpt") if options.resume else None
    trainer.fit(module, DataLoader(train, BATCH, sampler=sampler), ckpt_path=begin)
    found = accuracy(module.model, test)
    print(f"{trainer.global_step} steps, test accuracy {100 * found:.1f} %")
    return {"accuracy": found, "steps": trainer.global_step, "weights": module.model.state_dict()}


if __name__ == "__main__":
    main()
