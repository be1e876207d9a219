"""8-bit AdamW trains a small decoder on real text as well as 32-bit AdamW does, and a broken map is noticed."""

from __future__ import annotations

import itertools
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polybit import optim
from polybit.optim import state

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from tiny_llama import batches, decoder, documentation, encode, loss_of, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY, STEPS, WARM_UP, TAIL = 320, 400, 40, 20


@cache
def tokens() -> Tensor:
    text = documentation()[:400_000]
    return encode(train_tokenizer(text, VOCABULARY), text)


def warm_up_and_decay(step: int) -> float:
    """The learning rate's factor. Without it, training so short is chaotic: runs that differ in a bit end apart."""
    return min((step + 1) / WARM_UP, 1.0) * (1 - step / STEPS)


def train(bits: int, seed: int) -> tuple[float, float]:
    """(first loss, mean loss of the last steps); the same data and the same start for the same seed."""
    model = decoder(VOCABULARY, 64, 2, seed)
    optimizer = optim.AdamW(model.parameters(), lr=2e-3, optim_bits=bits)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_decay)
    losses = []
    for batch in itertools.islice(batches(tokens(), 4, seed), STEPS):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    widths = {state.bits_of(entry) for entry in optimizer.state.values()}
    assert widths == ({8, 32} if bits == 8 else {32}), "large parameters in 8 bits, small ones in 32"
    return losses[0], sum(losses[-TAIL:]) / TAIL


train_32 = cache(partial(train, 32))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_8_bits_train_as_well_as_32(seed: int) -> None:
    first, wide = train_32(seed)
    _, narrow = train(8, seed)
    print(f"seed {seed}: {first:.3f} -> {wide:.4f} in 32 bits, {narrow:.4f} in 8")
    assert wide <= 0.6 * first and narrow <= 0.6 * first
    assert abs(narrow / wide - 1) <= 0.01


def test_a_broken_map_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced codes, as good as none for second moments: the bound of the test above must not hold."""

    def linear(second_moment: bool, device: torch.device) -> Tensor:
        return torch.linspace(0.0 if second_moment else -1.0, 1.0, 256, device=device)

    _, wide = train_32(0)
    monkeypatch.setattr(state, "state_map", linear)
    _, broken = train(8, 0)
    print(f"{wide:.4f} in 32 bits, {broken:.4f} with evenly spaced codes")
    assert broken / wide - 1 > 0.01
