"""Single steps of quickstart.py, each run in a process of its own: push, reload, export, reload-lora."""

from __future__ import annotations

import sys
from pathlib import Path

import assets
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def predictions(model: PeftModel) -> torch.Tensor:
    """Logits for the first 64 test questions."""
    texts = assets.dataset("trec")["test"]["text"][:64]
    tokenizer = AutoTokenizer.from_pretrained(assets.model_path("minilm"))
    with torch.no_grad():
        return model.eval()(**tokenizer(list(texts), return_tensors="pt", padding=True)).logits


def main(step: str, output: Path, repository: str) -> None:
    """Run one step; the logits of the first travel to the others in a file."""
    kept = output / "logits.pt"
    if step != "reload-lora":
        import peft_subspace  # registers FLORA with PEFT
    if step == "push":
        model = AutoPeftModelForSequenceClassification.from_pretrained(output / "flora", num_labels=6)
        torch.save(predictions(model), kept)
        model.push_to_hub(repository)
        print(f"Pushed to {repository} on the local Hub")
    elif step == "reload":
        model = AutoPeftModelForSequenceClassification.from_pretrained(repository, num_labels=6)
        same = torch.equal(predictions(model), torch.load(kept))
        print(f"Loaded from the Hub in a new process: predictions are {'bit for bit the same' if same else 'DIFFERENT'}")
        if not same:
            raise SystemExit(1)
    elif step == "export":
        model = AutoPeftModelForSequenceClassification.from_pretrained(output / "flora", num_labels=6)
        peft_subspace.save_as_lora(model, output / "flora-as-lora", overwrite=True)
        print(f"Exported to plain LoRA: {output / 'flora-as-lora'}")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(assets.model_path("minilm"), num_labels=6)
        difference = (predictions(PeftModel.from_pretrained(base, output / "flora-as-lora")) - torch.load(kept)).abs().max()
        known = "peft_subspace" in sys.modules
        print(f"Loaded by plain PEFT {'with' if known else 'without'} peft_subspace: logits differ by {difference:.1e} at most")
        if known or difference > 1e-4:
            raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
