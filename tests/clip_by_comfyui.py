"""Runs inside a ComfyUI tree's own Python: the pack's CLIP and VAE beside the host's own text encoders, same weights.

Arguments: a folder, the tree, and names of cases; without names, all. See model_by_comfyui.py, which this builds on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_by_comfyui import Bench, decoded, part, run_cases, start

LONG = " ".join(f"a {colour} {shape} number {i}" for i in range(60) for colour, shape in [("red", "ring")])  # 300 words


class ClipBench(Bench):
    """Both CLIPs, the VAE, and what encodes with them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        loaded = part("nodes").NODE_CLASS_MAPPINGS["VortexFluxLoader"]().load("tiny-schnell", 6.5, "exact")
        self.vae, self.clip = loaded[1], loaded[3]
        self.their_clip = self._theirs()

    def _theirs(self) -> Any:
        """The host's CLIP of Flux with the engine's weights, dequantized, and the engine's words."""
        import comfy.sd
        from comfy.text_encoders.flux import FluxClipModel

        spec, ours = self.engine.spec, self.clip
        sizes = {
            "clip_l_model_config": {
                "hidden_size": spec.clip.hidden_size, "intermediate_size": spec.clip.intermediate_size,
                "num_hidden_layers": spec.clip.num_hidden_layers,
                "num_attention_heads": spec.clip.num_attention_heads, "vocab_size": spec.clip.vocab_size,
            },
            "t5xxl_model_config": {
                "d_model": spec.t5.d_model, "d_ff": spec.t5.d_ff, "d_kv": spec.t5.d_kv,
                "num_heads": spec.t5.num_heads, "num_layers": spec.t5.num_layers, "vocab_size": spec.t5.vocab_size,
            },
        }  # fmt: skip

        class Target:
            params: dict[str, Any] = {"dtype_t5": self.torch.float32}  # noqa: RUF012
            clip = FluxClipModel

            @staticmethod
            def tokenizer(**options: Any) -> Any:
                return ours.tokenizer

        made = comfy.sd.CLIP(Target, model_options={"dtype": self.torch.float32, **sizes})
        stage, model = made.cond_stage_model, self.engine._painter.model
        stage.clip_l.special_tokens = ours.cond_stage_model.clip_l.special_tokens
        weights = {}  # copies: the host patches its weights in place
        for prefix, encoder in {"clip_l.transformer.text_model.": model.clip, "t5xxl.transformer.": model.t5}.items():
            for module, inner in encoder.modules:
                weights |= {prefix + inner + name: tensor.clone() for name, tensor in decoded(module).items()}
        words = "clip_l.transformer.text_model.embeddings.token_embedding.weight"  # the host's number of them is fixed
        more = len(stage.state_dict()[words]) - len(weights[words])
        weights[words] = self.torch.nn.functional.pad(weights[words], (0, 0, 0, more))
        strange = weights.keys() - stage.state_dict().keys()
        missing = stage.state_dict().keys() - weights.keys()
        known = ("logit_scale", "text_projection.weight")
        assert not strange, strange
        assert not [name for name in missing if not name.endswith(known)], missing
        stage.load_state_dict(weights, strict=False, assign=True)
        return made

    def encode(self, clip: Any, text: str) -> Any:
        import nodes

        with self.torch.inference_mode():
            return nodes.CLIPTextEncode().encode(clip, text)[0]

    def apart(self, ours: Any, theirs: Any) -> dict[str, Any]:
        """How far two conditionings are from each other."""
        return {
            "off": self.off(ours[0][0], theirs[0][0]),
            "pooled": self.off(ours[0][1]["pooled_output"], theirs[0][1]["pooled_output"]),
            "shape": list(ours[0][0].shape),
            "kind": [str(ours[0][0].dtype), str(ours[0][0].device), str(ours[0][1]["pooled_output"].dtype)],
        }

    def both_texts(self, text: str, change: Callable[[Any], Any] = lambda clip: clip) -> dict[str, Any]:
        """The same text by both CLIPs; `change` makes the clone that encodes."""
        return self.apart(self.encode(change(self.clip), text), self.encode(change(self.their_clip), text))

    def same(self, ours: Any, before: Any) -> bool:
        return bool((ours[0][0] == before[0][0]).all()) and bool(
            (ours[0][1]["pooled_output"] == before[0][1]["pooled_output"]).all()
        )


def main(folder: Path, tree: Path, only: list[str]) -> None:
    start(tree)
    import clip_cases
    import torch

    torch.set_num_threads(1)  # as the engine does for the miniature: sums in another order round otherwise
    run_cases(ClipBench(folder), vars(clip_cases), folder, only)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
