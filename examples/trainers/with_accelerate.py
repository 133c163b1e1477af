"""An equilibrium layer trained by Hugging Face Accelerate: mixed precision, accumulation, monitor, restart.

    python examples/trainers/with_accelerate.py
    python examples/trainers/with_accelerate.py --epochs 12 --resume
    torchrun --nproc-per-node 2 examples/trainers/with_accelerate.py  # two processes, each with its own batches

`use_seedable_sampler` makes each epoch's order depend on its number alone: a run that is started again after an epoch
continues with the same numbers. The loop is the user's own, and so is the monitor's block around it.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from digits import ACCUMULATE, BATCH, RATE, Classifier, accuracy, arguments, data, last
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from deqcore.monitor import Monitor


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train, or train on; returns the test accuracy and the weights."""
    options = arguments(__doc__, given)
    train, test = data()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if options.precision == "bf16" else "no",
        gradient_accumulation_steps=ACCUMULATE,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(0)
    bare = Classifier()
    model, optimizer, loader = accelerator.prepare(
        bare, torch.optim.AdamW(bare.parameters(), RATE), DataLoader(train, BATCH, shuffle=True)
    )
    done = 0
    if options.resume:
        begin = last(options.out, "epoch-*")
        accelerator.load_state(str(begin))
        done = int(begin.name.removeprefix("epoch-"))

    steps = done * (len(loader) // ACCUMULATE)
    sinks = [{"sink": "jsonl", "path": str(options.out / "monitor.jsonl")}] if accelerator.is_main_process else []
    with Monitor(sinks=sinks) as monitor:
        monitor.advance(steps)
        for epoch in range(done, options.epochs):
            model.train()
            loader.set_epoch(epoch)
            for images, labels in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(cross_entropy(model(images), labels))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    steps += 1
                    monitor.advance(steps)
            accelerator.save_state(str(options.out / f"epoch-{epoch + 1}"))

    found = accuracy(accelerator.unwrap_model(model), test)
    accelerator.print(f"{steps} steps, test accuracy {100 * found:.1f} %")
    return {"accuracy": found, "steps": steps, "weights": accelerator.unwrap_model(model).state_dict()}


if __name__ == "__main__":
    main()
