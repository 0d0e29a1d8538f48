"""Does the miniature draw what the prompt says? The judge looks at pictures of captions never seen in training.

The whole check, hundreds of captions, is tools/training/evaluate.py; this is a sample of it through our own engine.
"""

from pathlib import Path

import evaluate
import pytest
import torch

from vortex_core import Engine

# Far above chance (a shape, a colour, a place and a background must all be right: below 1 in 500), and below what the
# bundled weights score over many captions (README): 98 and 99 %, of which 20 captions are a small sample.
FLOOR = 0.9


@pytest.mark.slow
@pytest.mark.parametrize("things", [1, 2])
def test_pictures_show_what_their_captions_say(engine: Engine, things: int) -> None:
    captions = 20

    def draw(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        return torch.cat([engine.generate(p, seed=s) for p, s in zip(prompts, seeds, strict=True)])

    share, why = evaluate.score(draw, things, captions, 10)
    print(f"\n{share:.0%} of {captions} captions of {things} right in NF4; the others: {dict(why)}")
    assert share >= FLOOR


def test_the_miniature_stays_small(tiny_dir: Path) -> None:
    assert sum(path.stat().st_size for path in tiny_dir.rglob("*") if path.is_file()) <= 24e6
