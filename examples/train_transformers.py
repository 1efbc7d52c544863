"""The Hugging Face Trainer: the model inside a module of a few lines, which returns loss and logits.

Run: torchrun --nproc-per-node 2 -m examples.train_transformers --out run; with --resume it goes on.
"""

# ruff: noqa: ARG002  (the Trainer says what its callbacks take)
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

import tomevit
from examples import common


class Classifier(nn.Module):
    """What the Trainer asks of a model: the loss and the logits."""

    def __init__(self, model: tomevit.VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Schedule(TrainerCallback):
    """r over the training, and the log."""

    def __init__(self, model: tomevit.VisionTransformer, options: Any) -> None:
        self.model, self.options = model, options

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.model.r = common.r_at(state.global_step, state.max_steps, self.options.r)

    def on_log(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        if "loss" in event["logs"]:
            common.record(self.options.out, state.global_step - 1, event["logs"]["loss"])


def main() -> None:
    options = common.parse_options(__doc__)
    model, data, checkpoint = common.prepare(options, "checkpoint-*/trainer_state.json")
    arguments = TrainingArguments(
        output_dir=str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        accelerator_config={"split_batches": True},  # the batch is that of all processes
        dataloader_drop_last=True,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="epoch",
        save_total_limit=1,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        seed=options.seed,
        report_to="none",
    )
    trainer = Trainer(
        Classifier(model),
        arguments,
        lambda samples: dict(zip(("images", "labels"), default_collate(samples), strict=True)),  # as forward names them
        data.train,
        callbacks=[Schedule(model, options)],
        optimizers=(torch.optim.AdamW(tomevit.param_groups(model, options.lr, layer_decay=0.75)), None),
    )
    trainer.train(resume_from_checkpoint=str(checkpoint.parent) if checkpoint else None)
    if trainer.is_world_process_zero():
        model.r = options.r
        tomevit.save(model, options.out / "model.safetensors")
        common.report(options.out / "model.safetensors", data.test)
    accelerator = trainer.accelerator
    del trainer
    accelerator.free_memory()  # torch's wrapper, which must not outlive the process group: gloo could wait for ever
    accelerator.end_training()


if __name__ == "__main__":
    main()
