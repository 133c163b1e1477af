"""An equilibrium layer trained by transformers' `Trainer`: mixed precision, accumulation, monitor, restart.

    python examples/trainers/with_transformers.py
    python examples/trainers/with_transformers.py --epochs 12 --resume

The trainer restores its random state and skips the batches that were done, so a restarted run continues with
the same numbers, also from the middle of an epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from digits import ACCUMULATE, BATCH, RATE, Classifier, accuracy, arguments, data, last
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, set_seed

from deqcore.monitor import Monitor
from deqcore.monitor.adapters import transformers_callback


class Model(nn.Module):
    """What `Trainer` asks of a model: keyword arguments in, a dictionary with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Classifier()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train, or train on; returns the test accuracy and the weights."""
    options = arguments(__doc__, given)
    train, test = data()
    set_seed(0)
    model = Model()
    settings = TrainingArguments(
        str(options.out),
        use_cpu=True,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        bf16=options.precision == "bf16",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    monitor = Monitor(sinks=[{"sink": "jsonl", "path": str(options.out / "monitor.jsonl")}])
    trainer = Trainer(
        model,
        settings,
        data_collator=lambda rows: {"images": stack(rows, 0), "labels": stack(rows, 1)},
        train_dataset=train,
        callbacks=[transformers_callback(monitor)],
    )
    begin = last(options.out, "checkpoint-*") if options.resume else None
    trainer.train(resume_from_checkpoint=None if begin is None else str(begin))
    found = accuracy(model.model, test)
    print(f"{trainer.state.global_step} steps, test accuracy {100 * found:.1f} %")
    return {"accuracy": found, "steps": trainer.state.global_step, "weights": model.model.state_dict()}


def stack(rows: Any, column: int) -> Tensor:
    return torch.stack([row[column] for row in rows])


if __name__ == "__main__":
    main()
