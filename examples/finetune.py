"""Fine-tune a model with merging, in a loop of your own. `tomevit train` is such a loop with options, and resumes.

    pip install -e '.[train]'
    python -m examples.finetune FOLDER --model vit_b16 --r 13

FOLDER has train/ and val/ in it, and in each of them a folder for every class.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import tomevit
from tomevit.training.datasets import augmentation, load_data


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a model with merging.")
    parser.add_argument("data", help="a folder with train/ and val/ in it, or digits, or mnist")
    parser.add_argument("--model", default="vit_b16", help="a name as in `tomevit list`")
    parser.add_argument("--r", type=int, default=13, help="tokens that merge in each block, in the end")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-4, help="of the head, the highest")
    parser.add_argument("--out", default="finetuned.safetensors")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare = tomevit.transform(tomevit.create(options.model))
    data = load_data(options.data, prepare, augmentation(options.data, prepare))
    model = tomevit.create(options.model, pretrained=True, num_classes=len(data.classes), drop_path=0.1).to(device)
    model.card = replace(model.card, class_names=data.classes)

    loader = DataLoader(data.train, options.batch, shuffle=True, drop_last=True)
    steps = options.epochs * len(loader)
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, options.lr, weight_decay=0.05, layer_decay=0.75))
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    model.train()
    for epoch in range(options.epochs):
        data.train.set_epoch(epoch)  # other crops than in the epoch before
        for step, (images, labels) in enumerate(loader, epoch * len(loader)):
            model.r = min(options.r, 2 * options.r * step // steps)  # rises over the first half of the training
            loss = F.cross_entropy(model(images.to(device)), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model.eval().r = options.r
    with torch.inference_mode():
        right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum()) for x, y in DataLoader(data.test, 64))
    print(f"r = {model.r}: {100 * right / len(data.test):.2f} % of {len(data.test)} images")
    tomevit.save(model.cpu(), options.out)


if __name__ == "__main__":
    main()
