"""What is tried with the pack's CLIP and VAE inside a ComfyUI tree; see clip_by_comfyui.py."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from clip_by_comfyui import LONG
from model_by_comfyui import decoded, find, node, part, words

if TYPE_CHECKING:
    from clip_by_comfyui import ClipBench

TEXT = "a red circle on a white background"
WEIGHTED = "a (red:1.3) circle, ((blue)) and (a (green:0.4) ring:1.2), \\(literally\\)"

# ---------------------------------------------------------------- texts


def case_texts(bench: ClipBench) -> dict[str, Any]:
    texts = {"plain": TEXT, "weights": WEIGHTED, "long": LONG, "long weights": f"({LONG}:1.1) {WEIGHTED}", "empty": ""}
    return {name: bench.both_texts(text) for name, text in texts.items()}


def case_kinds(bench: ClipBench) -> dict[str, Any]:
    import comfy.sd
    import comfy.sd1_clip
    from comfy.text_encoders.flux import FluxClipModel

    stage = bench.clip.cond_stage_model
    return {
        "CLIP": isinstance(bench.clip, comfy.sd.CLIP), "VAE": isinstance(bench.vae, comfy.sd.VAE),
        "stage": isinstance(stage, FluxClipModel), "encoder": isinstance(stage.t5xxl, comfy.sd1_clip.SDClipModel),
        "names": stage.state_dict().keys() == bench.their_clip.cond_stage_model.state_dict().keys(),
    }  # fmt: skip


def case_skipped_layers(bench: ClipBench) -> dict[str, Any]:
    import nodes

    def change(number: int) -> Callable[[Any], Any]:
        return lambda clip: nodes.CLIPSetLastLayer().set_last_layer(clip, number)[0]

    found = {str(number): bench.both_texts(WEIGHTED, change(number)) for number in (-1, -2, -3, -20)}
    plain, skipped = bench.encode(bench.clip, TEXT), bench.encode(change(-2)(bench.clip), TEXT)
    return found | {"effect": bench.off(skipped[0][0], plain[0][0]), "after": bench.both_texts(TEXT)}


def case_two_prompts(bench: ClipBench) -> dict[str, Any]:
    """CLIPTextEncodeFlux: another text for each encoder, and guidance."""
    with bench.torch.inference_mode():
        ours, theirs = (
            node("nodes_flux", "CLIPTextEncodeFlux", clip, "a ring", LONG, 3.5)
            for clip in (bench.clip, bench.their_clip)
        )
    return bench.apart(ours, theirs) | {"guidance": ours[0][1]["guidance"]}


def case_drawn(bench: ClipBench) -> dict[str, Any]:
    """What the host's samplers make of the texts, combined by its nodes."""
    import nodes

    def texts(clip: Any) -> dict[str, Any]:
        one, other = bench.encode(clip, WEIGHTED), bench.encode(clip, "a blue square")
        return {
            "one": one,
            "zeroed": nodes.ConditioningZeroOut().zero_out(one)[0],
            "concat": nodes.ConditioningConcat().concat(one, other)[0],
            "combine": nodes.ConditioningCombine().combine(one, other)[0],
            "average": nodes.ConditioningAverage().addWeighted(one, other, 0.3)[0],
        }

    ours, theirs = texts(bench.clip), texts(bench.their_clip)
    return {
        name: {
            "MODEL": bench.off(
                bench.sample(bench.ours, positive=ours[name]), bench.sample(bench.ours, positive=theirs[name])
            ),
            "the host's": bench.off(
                bench.sample(bench.theirs, positive=ours[name]), bench.sample(bench.theirs, positive=theirs[name])
            ),
        }
        for name in ours
    }


def case_as_the_engine(bench: ClipBench) -> dict[str, Any]:
    """A plain prompt of up to 77 tokens is what the engine itself reads."""
    conditioning, found = bench.engine.encode(TEXT), bench.encode(bench.clip, TEXT)
    same = bench.torch.equal
    return {
        "same": same(found[0][0], conditioning.txt.float())
        and same(found[0][1]["pooled_output"], conditioning.pooled.float())
    }


def case_released_words(bench: ClipBench) -> dict[str, Any]:
    """FLUX.1-schnell's own vocabularies, which the host brings: its tokenizer and Vortex's give the same ids."""
    from comfy.text_encoders.flux import FluxTokenizer

    host, released = part("nodes.host"), SimpleNamespace(spec=part("nodes.types").RELEASED)
    theirs = part("nodes.native_tokens").tokenizer_of(released)
    ours = [part("vortex_core.checkpoint.tokenizer").read_tokenizer(path) for path in host.tokenizers()]
    split = part("vortex_core.flux1.text_encoders").tokenize_prompt

    def same(text: str) -> bool:
        chunks = theirs.tokenize_with_weights(text)
        found = [[token for token, _ in chunks[name][0]] for name in ("l", "t5xxl")]
        return found == [list(tokens.ids) for tokens in split(*ours, text)]

    texts = (TEXT, "", "A Café, 2 dogs & it's 50% off!", "word " * 60)
    return {"kind": type(theirs) is FluxTokenizer, "same": [same(text) for text in texts]}


# ---------------------------------------------------------------- LoRAs


def write_text_loras(bench: ClipBench) -> None:
    """Rank 4 on every linear of both encoders, as kohya and OneTrainer name them, and on the first of MODEL."""
    import folder_paths
    from safetensors.torch import save_file

    model, state = bench.engine._painter.model, {}
    named = {
        "lora_te1_text_model_": decoded(model.clip.modules[0][0]),
        "lora_te2_encoder_": decoded(model.t5.modules[0][0]),
        "lora_unet_": {
            "double_blocks.0.img_attn.qkv.weight": bench.theirs.model.diffusion_model.double_blocks[
                0
            ].img_attn.qkv.weight
        },
    }
    for prefix, weights in named.items():
        for name, weight in weights.items():
            if weight.ndim != 2 or "embedding" in name or "relative" in name:
                continue
            dice = bench.torch.Generator().manual_seed(sum(name.encode()))
            key = prefix + name.removesuffix(".weight").replace(".", "_")
            size = 0.1 * weight.float().std()
            state[f"{key}.lora_up.weight"] = size * bench.torch.randn(len(weight), 4, generator=dice)
            state[f"{key}.lora_down.weight"] = bench.torch.randn(4, weight.shape[1], generator=dice)
            state[f"{key}.alpha"] = bench.torch.tensor(2.0)
    save_file(state, bench.folder / "texts.safetensors")
    clip_only = {key: value * 2 if "up" in key else value for key, value in state.items() if "te1" in key}
    save_file(clip_only, bench.folder / "clip_only.safetensors")
    folder_paths.add_model_folder_path("loras", str(bench.folder))


def with_text_loras(bench: ClipBench, *chain: tuple[str, float]) -> Callable[[Any], Any]:
    """What gives a CLIP with these by the host's Load LoRA."""
    import nodes

    def change(clip: Any) -> Any:
        model = bench.ours if clip is bench.clip else bench.theirs
        for file, strength in chain:
            model, clip = nodes.LoraLoader().load_lora(model, clip, f"{file}.safetensors", 0.5, strength)
        return clip

    return change


def case_lora(bench: ClipBench) -> dict[str, Any]:
    write_text_loras(bench)
    plain = bench.encode(bench.clip, WEIGHTED)
    found = {}
    for name, chain in {
        "one": [("texts", 0.75)], "negative": [("texts", -0.5)], "two": [("texts", 0.75), ("clip_only", 0.5)],
    }.items():  # fmt: skip
        change = with_text_loras(bench, *chain)
        found[name] = bench.both_texts(WEIGHTED, change)
        found[name]["effect"] = bench.apart(bench.encode(change(bench.clip), WEIGHTED), plain)
    found["removed"] = bench.both_texts(WEIGHTED) | {"same": bench.same(bench.encode(bench.clip, WEIGHTED), plain)}
    clone = with_text_loras(bench, ("texts", 0.75))(bench.clip)
    drawn = bench.encode(clone, WEIGHTED)
    found["clones"] = {
        "original": bench.same(bench.encode(bench.clip, WEIGHTED), plain),
        "again": bench.same(bench.encode(clone, WEIGHTED), drawn),
        "of the clone": bench.same(bench.encode(clone.clone(), WEIGHTED), drawn),
    }
    return found


def case_loras_of_steps_stay(bench: ClipBench) -> dict[str, Any]:
    """A text in between does not take the LoRAs of MODEL away, and no picture changes."""
    import nodes

    write_text_loras(bench)
    model, clip = nodes.LoraLoader().load_lora(bench.ours, bench.clip, "texts.safetensors", 0.75, 0.75)
    loras = bench.engine._painter.loras
    plain, before = bench.encode(bench.clip, TEXT), bench.sample(model)
    kept = loras.chosen
    bench.encode(bench.clip, "another text")
    found = {"kept": len(kept) == 1 and loras.chosen == kept, "same": bool((bench.sample(model) == before).all())}
    bench.encode(clip, TEXT)
    found["two"] = len(loras.chosen)
    found["again"] = bool((bench.sample(model) == before).all())
    return found | {"text": bench.same(bench.encode(bench.clip, TEXT), plain)}


def case_hooks(bench: ClipBench) -> dict[str, Any]:
    import comfy.hooks
    from safetensors.torch import load_file

    write_text_loras(bench)
    plain = bench.encode(bench.clip, TEXT)

    def hooked(clip: Any) -> Any:
        hooks = comfy.hooks.create_hook_lora(load_file(bench.folder / "texts.safetensors"), 0.0, 0.75)
        return node("nodes_hooks", "SetClipHooks", clip, False, False, hooks)

    found = bench.both_texts(TEXT, hooked)
    found["effect"] = bench.off(bench.encode(hooked(bench.clip), TEXT)[0][0], plain[0][0])
    return found | {"after": bench.same(bench.encode(bench.clip, TEXT), plain)}


# ---------------------------------------------------------------- the VAE


def case_vae(bench: ClipBench) -> dict[str, Any]:
    import nodes

    torch, vae = bench.torch, bench.vae
    latents, odd = (
        torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(3)) for size in ((16, 16), (17, 9))
    )
    picture = part("nodes.host").from_native
    decode, tiled = nodes.VAEDecode(), nodes.VAEDecodeTiled()
    with torch.inference_mode():
        drawn, of_odd = (decode.decode(vae, {"samples": each})[0] for each in (latents, odd))
        in_tiles = tiled.decode(vae, {"samples": latents}, 64, 0)[0]
        raw = vae.first_stage_model.decode(latents)
        expected = [bench.engine.decode(picture(each)) for each in (latents, odd)]
    return {
        "same": torch.equal(drawn, expected[0]), "odd": torch.equal(of_odd, expected[1]),
        "sizes": [list(drawn.shape), list(of_odd.shape)], "tiled": torch.equal(in_tiles, drawn),
        "raw": bench.off(vae.process_output(raw.clone()).movedim(1, -1), drawn),
        "inherited tiles": float((vae.decode_tiled_(latents, 12, 12, 4).movedim(1, -1) - drawn).abs().mean()),
    }  # fmt: skip


def case_vae_encodes(bench: ClipBench) -> dict[str, Any]:
    import nodes

    torch, vae = bench.torch, bench.vae
    pictures = torch.rand(2, 131, 77, 3, generator=torch.Generator().manual_seed(4))
    cropped = pictures[:, 1:129, 2:74]
    with torch.inference_mode():
        found = nodes.VAEEncode().encode(vae, pictures)[0]["samples"]
        tiled = nodes.VAEEncodeTiled().encode(vae, pictures, 512, 64)[0]["samples"]
        expected = part("nodes.host").to_native(bench.engine.encode_image(cropped))
        mask = torch.zeros(1, 131, 77)
        mask[:, 30:90, 20:60] = 1
        inpaint = nodes.VAEEncodeForInpaint().encode(vae, pictures, mask, 6)[0]
        drawn = vae.decode(expected)
        raw = vae.first_stage_model.encode(vae.process_input(cropped.movedim(-1, 1)))
        conditioned = nodes.InpaintModelConditioning().encode(bench.text(0), bench.text(1), pictures, vae, mask, True)
    text = (
        node("nodes_edit_model", "ReferenceLatent", bench.text(0), {"samples": found})
        if find("nodes_edit_model", "ReferenceLatent")
        else None
    )
    return {
        "same": torch.equal(found, expected), "tiled": torch.equal(tiled, expected), "shape": list(found.shape),
        "kind": [str(found.dtype), str(found.device)], "raw": bench.off(raw, expected),
        "inpaint": list(inpaint["samples"].shape), "conditioned": list(conditioned[2]["samples"].shape),
        "again": bench.off(vae.encode(drawn), expected), "reference": text is None or len(text) == 1,
    }  # fmt: skip


def case_vae_without_an_encoder(bench: ClipBench) -> dict[str, Any]:
    """Its VAE decodes, and says what is missing where it has to encode."""
    from safetensors.torch import load_file, save_file

    import nodes

    engines, name = part("nodes.engines"), "diffusion_pytorch_model.safetensors"
    whole, half = Path(bench.handle.path) / "vae", bench.folder / "half"
    half.mkdir()
    shutil.copy(whole / "config.json", half)
    tensors = load_file(whole / name)
    save_file({key: value for key, value in tensors.items() if not key.startswith("encoder")}, half / name)
    handle = replace(bench.handle, fingerprint="half", parts=(("vae", half),))
    vae, latents = part("nodes.vae").vae_of(handle), bench.latent(seed=3)
    found = {
        "decodes": bool((vae.decode(latents["samples"]) == bench.vae.decode(latents["samples"])).all()),
        "encodes": words(lambda: nodes.VAEEncode().encode(vae, bench.torch.rand(1, 64, 64, 3))),
    }
    engines._unload(handle.key)
    return found


def case_vae_attributes(bench: ClipBench) -> dict[str, Any]:
    vae = bench.vae
    names = ("latent_channels", "downscale_ratio", "upscale_ratio", "latent_dim", "output_channels", "crop_input")
    calls = ("spacial_compression_encode", "spacial_compression_decode", "temporal_compression_decode", "is_dynamic")
    one = bench.torch.tensor([0.25])
    return {name: getattr(vae, name) for name in names} | {name: getattr(vae, name)() for name in calls} | {
        "patcher": vae.patcher.model.vortex.engine is bench.engine, "device": str(vae.device),
        "output_device": str(vae.output_device), "process_input": float(vae.process_input(one)),
        "process_output": float(vae.process_output(vae.process_input(one))), "size": vae.model_size(),
        "parameters": len(list(vae.first_stage_model.parameters())), "dtype": str(vae.vae_dtype),
        "memory": [vae.memory_used_decode((1, 16, 8, 8), None), vae.memory_used_encode((1, 3, 64, 64), None)],
    }  # fmt: skip


# ---------------------------------------------------------------- the model as a whole


def case_unloaded(bench: ClipBench) -> dict[str, Any]:
    import comfy.model_management

    engines, torch = part("nodes.engines"), bench.torch
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    text, picture = bench.encode(bench.clip, WEIGHTED), bench.vae.decode(latents)
    comfy.model_management.unload_all_models()
    found = {"same": bench.same(bench.encode(bench.clip, WEIGHTED), text)}
    comfy.model_management.unload_all_models()
    found["picture"] = torch.equal(bench.vae.decode(latents), picture)
    clone = bench.clip.clone()
    engines._unload(bench.handle.key)  # as when two other models are loaded
    found["loaded again"] = bench.same(bench.encode(clone, WEIGHTED), text)
    bench.engine = bench.ours.model.vortex.engine
    found["one engine"] = engines._loaded[bench.handle.key].engine is bench.engine
    return found | {"picture again": torch.equal(bench.vae.decode(latents), picture)}


def case_one_entry(bench: ClipBench) -> dict[str, Any]:
    """MODEL, CLIP and VAE of an engine are one in the host's list of loaded models."""
    import comfy.model_management

    def entries() -> list[Any]:
        listed = (loaded.model for loaded in comfy.model_management.current_loaded_models)
        return [each for each in listed if getattr(each.model, "vortex", None) is not None]

    found = {}
    for name, act in {
        "CLIP": lambda: bench.encode(bench.clip, TEXT),
        "MODEL": lambda: bench.sample(bench.ours),
        "VAE": lambda: bench.vae.decode(bench.latent()["samples"]),
    }.items():
        act()
        found[name] = len(entries())
    sizes = bench.clip.patcher.model_size(), bench.ours.model_size()
    bench.encode(bench.clip.clone(), TEXT)
    gc.collect()
    comfy.model_management.cleanup_models()
    return found | {"one size": sizes[0] == sizes[1], "after its clone died": len(entries())}


def case_refused(bench: ClipBench) -> dict[str, Any]:
    import folder_paths
    from safetensors.torch import save_file

    merging = find("nodes_model_merging", "CLIPMergeSimple")
    saving = find("nodes_model_merging", "CLIPSave")
    save_file({"clip_l": bench.torch.ones(2, bench.engine.spec.clip.hidden_size)}, bench.folder / "trick.safetensors")
    folder_paths.add_model_folder_path("embeddings", str(bench.folder))
    again = part("nodes.engines").native_clip(bench.handle)  # with the folder
    return {
        "merge": words(lambda: merging().merge(bench.clip, bench.their_clip, 0.5)),
        "merge into": words(lambda: merging().merge(bench.their_clip, bench.clip, 0.5)),
        "save": words(lambda: saving().save(bench.clip, "saved")),
        "state": words(bench.clip.clone().get_sd),
        "embedding": words(lambda: bench.encode(again, "a ring embedding:trick here")),
        "no such embedding": bench.apart(
            bench.encode(again, "a ring embedding:none"), bench.encode(again, "a ring")
        )["off"],
        "too long": words(lambda: bench.encode(bench.clip, "word " * 5000)),
        "VAE": words(bench.vae.get_sd),
        "after": bench.both_texts(TEXT),
    }  # fmt: skip


def case_old_route(bench: ClipBench) -> dict[str, Any]:
    """The Schnell Sampler draws the same, whatever CLIP was used last."""
    write_text_loras(bench)

    def draw() -> Any:
        sampler = part("nodes").NODE_CLASS_MAPPINGS["VortexSchnellSampler"]()
        return sampler.sample(bench.handle, TEXT, 128, 128, 1, 3, 4)[0]

    before = draw()
    bench.encode(with_text_loras(bench, ("texts", 0.75))(bench.clip), LONG)
    return {"same": bool((draw() == before).all())}
