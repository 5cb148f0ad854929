"""FLoRA on a convolutional net that is no transformers model: EfficientNet-Lite0 on Fashion-MNIST, a loop of one's own.

    accelerate launch examples/conv_net.py

The net is a plain `nn.Module` with pointwise, depthwise and 3x3 convolutions and BatchNorm. Only accelerate is used beside
PEFT. BatchNorm's running statistics are trained with the adapter, saved with it, and the base keeps its own.
"""

from __future__ import annotations

import argparse

import assets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from peft_subspace import FloraConfig


class Pictures(Dataset):
    """Rows of a data set as normalised `[3, side, side]` tensors."""

    def __init__(self, rows, side: int) -> None:
        self.rows, self.side = rows, side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[index]
        pixels = bytearray(row["image"].convert("RGB").resize((self.side, self.side)).tobytes())
        picture = torch.frombuffer(pixels, dtype=torch.uint8).view(self.side, self.side, 3).permute(2, 0, 1)
        return (picture.float() / 255 - 0.498) / 0.502, row["label"]


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Share of right answers over all processes."""
    model.eval()
    right, seen = 0, 0
    for pictures, labels in loader:
        answers, labels = accelerator.gather_for_metrics((model(pictures).argmax(-1), labels))
        right, seen = right + int((answers == labels).sum()), seen + len(labels)
    return right / seen


def main() -> None:
    """Train, evaluate, save, reload, and check that the base is what it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["flora", "lora"], default="flora")
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/conv-net")
    options = parser.parse_args()

    accelerator = Accelerator()
    set_seed(options.seed)
    rows = assets.dataset(options.dataset)
    train = Pictures(rows["train"].shuffle(seed=0).select(range(options.rows)), options.side)
    test = Pictures(rows["test"].shuffle(seed=0).select(range(options.rows // 2)), options.side)
    base = assets.efficientnet_lite0(num_classes=10)
    head = next(name for name, module in reversed(list(base.named_modules())) if isinstance(module, nn.Linear))
    if options.method == "flora":
        config = FloraConfig(r=8, target_modules="all-conv", modules_to_save=[head])
    else:  # PEFT's LoRA takes no depthwise convolutions at this rank: its rank must be a multiple of the groups
        names = [name for name, m in base.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=names, modules_to_save=[head])
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate, weight_decay=0)
    loader, held_out = DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=64)
    model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.epochs * len(loader))
    for epoch in range(options.epochs):
        model.train()
        for pictures, labels in (bar := tqdm(loader, desc=f"epoch {epoch + 1}", disable=not accelerator.is_main_process)):
            loss = nn.functional.cross_entropy(model(pictures), labels)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    score = evaluate(model, held_out, accelerator)
    accelerator.print(f"accuracy {score:.3f}")
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        trained.peft_config["default"].metrics = {"accuracy": score}
        trained.save_pretrained(options.output)
        fresh = PeftModel.from_pretrained(assets.efficientnet_lite0(num_classes=10), options.output).eval()
        sample = torch.stack([test[i][0] for i in range(8)])
        trained = trained.cpu().eval()
        print("reloaded, largest difference of a logit:", float((fresh(sample) - trained(sample)).abs().max().detach()))


if __name__ == "__main__":
    main()
