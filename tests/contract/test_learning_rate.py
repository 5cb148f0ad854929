"""Each method brings the learning rate to start with, in one place; its page says where the figure comes from."""

from __future__ import annotations

from pathlib import Path

from peft import get_peft_model

from tests.methods import Method, each_method
from tests.pico import MODELS, train

DOCS = Path(__file__).parents[2] / "docs"


@each_method
def test_it_is_data_and_documented(method: Method) -> None:
    rate = method.config.recommended_learning_rate
    assert 0 < rate <= 1
    text = (DOCS / f"{method.config.method.lower()}.md").read_text()
    said = f"`{method.config.__name__}.recommended_learning_rate` is "
    assert said in text
    assert float(text.partition(said)[2].split()[0].rstrip(",;.")) == rate


@each_method
def test_it_lowers_the_loss(method: Method) -> None:
    pico = MODELS["llama"]
    model = get_peft_model(pico.model(), method.make(pico, **pico.targets, **method.steady))
    losses = train(model, pico.batch(), steps=10, lr=method.config.recommended_learning_rate)
    assert losses[-1] < losses[0]
