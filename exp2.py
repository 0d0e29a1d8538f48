"""Second round of questions for the GPU: decode and L2, text beside image, where the VAE's time goes, fp8 attention in the step."""
import sys, traceback, torch, time, statistics
sys.path.insert(0, "tools")
import measure_speed as M
from measure_speed import *  # noqa
import triton, triton.language as tl
from vortex_core.nf4 import LEVELS
M.KERNELS = KERNELS = choose_kernels(DEVICE)
M.BACKEND = BACKEND = TritonBackend(DEVICE)
M.SIDE = SIDE = torch.cuda.Stream()

import vortex_core.kernels.attention as A_
if os.environ.get('NOHOPPER'):
    A_._hopper = lambda device: None

@triton.jit
def plain(packed, absmax, row_scale, levels, out, words, WORDS_A_ROW: tl.constexpr, SCALED: tl.constexpr, WORDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, FOLD: tl.constexpr):
    levels = tl.load(levels + tl.arange(0, 16))
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = word < words
    codes = tl.load(packed + word, mask=mask, other=0, eviction_policy=FIRST)
    scale = tl.load(absmax + word // 8, mask=mask, other=0.0, eviction_policy=FIRST)
    if SCALED:
        scale *= tl.load(row_scale + word // WORDS_A_ROW, mask=mask, other=1.0)
    shift = (tl.arange(0, 8) ^ 1) * 4
    code = (codes[:, None] >> shift[None, :]) & 15
    value = tl.gather(levels, tl.reshape(code, [WORDS * 8]), 0)
    value = tl.reshape(value, [WORDS, 8]) * scale[:, None]
    if FOLD:
        word = word % 262144
    target = out + word.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=mask[:, None], eviction_policy=LAST)

@triton.jit
def pairs8(packed, absmax, inverse, pairs, out, words, WORDS_A_ROW: tl.constexpr, WORDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, FOLD: tl.constexpr):
    pairs = tl.load(pairs + tl.arange(0, 256))
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    mask = word < words
    codes = tl.load(packed + word, mask=mask, other=0, eviction_policy=FIRST)
    scale = tl.load(absmax + word // 8, mask=mask, other=0.0, eviction_policy=FIRST)
    scale *= tl.load(inverse + word // WORDS_A_ROW, mask=mask, other=1.0)
    half = scale.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    twice = half | (half << 16)
    byte = (codes[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 255
    pair = tl.reshape(tl.gather(pairs, tl.reshape(byte, [WORDS * 4]), 0), [WORDS, 4])
    twice = tl.broadcast_to(twice[:, None], [WORDS, 4])
    two = tl.inline_asm_elementwise(
        "{ .reg .b32 t; mul.rn.f16x2 t, $1, $2; cvt.rn.satfinite.e4m3x2.f16x2 $0, t; }",
        "=h,r,r", [pair, twice], dtype=tl.int16, is_pure=True, pack=1)
    if FOLD:
        word = word % 262144
    target = out + word.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(target, two, mask=mask[:, None], eviction_policy=LAST)

LV = torch.tensor(LEVELS, device=DEVICE)
b = torch.arange(256, device=DEVICE)
PAIRS = torch.stack((LV[b >> 4], LV[b & 15]), 1).half().view(torch.int32).flatten().contiguous()

def decode2():
    for n, k in ((3072, 3072), (12288, 3072), (3072, 15360), (21504, 3072)):
        ws = [weight(n, k) for _ in range(max(3, 200_000_000 // (n * k)))]
        words = n * k // 8
        for kind in (FP8, BF16):
            out = torch.empty(n, k, device=DEVICE, dtype=kind)
            for name in ("plain", "pairs8"):
                if name == "pairs8" and kind == BF16: continue
                for first, last in (("", ""), ("evict_first", ""), ("evict_first", "evict_last"), ("evict_first", "evict_first")):
                    for W, warps, fold in ((512, 4, 0), (1024, 4, 0), (1024, 8, 0), (512, 4, 1), (1024, 4, 1)):
                        if fold and (first or last): continue
                        def call(w):
                            if name == "plain":
                                plain[(triton.cdiv(words, W),)](w.packed.view(torch.int32), w.absmax, 1 / w.row_scale if False else w.inv, LV, out, words, WORDS_A_ROW=k // 8, SCALED=kind == FP8, WORDS=W, FIRST=first, LAST=last, FOLD=fold, num_warps=warps)
                            else:
                                pairs8[(triton.cdiv(words, W),)](w.packed.view(torch.int32), w.absmax, w.inv, PAIRS, out.view(torch.int16), words, WORDS_A_ROW=k // 8, WORDS=W, FIRST=first, LAST=last, FOLD=fold, num_warps=warps)
                        for w in ws: w.inv = 1 / w.row_scale
                        try:
                            ms = bench(*[lambda w=w: call(w) for w in ws])
                            note(f"decode {n}x{k} {str(kind)[6:11]} {name} {W}/{warps} [{first},{last}]{' FOLD' if fold else ''}", ms, f"{1e3*ms:7.1f} us")
                        except Exception as e:
                            note(f"decode {n}x{k} {name} {W} {first} {last}", str(e)[:150])
            if kind == FP8:
                ref = torch.empty_like(out); reference.decode(ws[0].packed, ws[0].absmax, ref, ws[0].row_scale)
                pairs8[(triton.cdiv(words, 512),)](ws[0].packed.view(torch.int32), ws[0].absmax, ws[0].inv, PAIRS, out.view(torch.int16), words, WORDS_A_ROW=k // 8, WORDS=512, FIRST="", LAST="", FOLD=0, num_warps=4)
                note(f"pairs8 {n}x{k} differs", [float((out.float() != ref.float()).float().mean()), float((out.float() - ref.float()).abs().max())])

def lanes():
    """The products and decodes of a double block: image then text, and text on a second stream."""
    shapes = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]
    for m in (1024, 4096):
        for kind in (FP8, BF16):
            img = [(weight(n, k), quantized(m, k) if kind == FP8 else Operand(torch.randn(1, m, k, device=DEVICE, dtype=BF16)), torch.empty(m, n, device=DEVICE, dtype=BF16)) for n, k in shapes]
            txt = [(weight(n, k), quantized(256, k) if kind == FP8 else Operand(torch.randn(1, 256, k, device=DEVICE, dtype=BF16)), torch.empty(256, n, device=DEVICE, dtype=BF16)) for n, k in shapes]
            bufs = [torch.empty(12288 * 3072 * kind.itemsize, device=DEVICE, dtype=torch.uint8) for _ in range(2)]
            def run(part, lane):
                for w, x, out in part:
                    n, k = out.shape[1], x.values.shape[2]
                    d = bufs[lane].view(kind)[: n * k].view(n, k)
                    KERNELS.decode(w.packed, w.absmax, d, w.row_scale if kind == FP8 else None)
                    product(x.values[0], None if x.scale is None else x.scale[0], d, w.row_scale, w.bias, out)
            def serial():
                run(img, 0); run(txt, 0)
            def beside():
                main = torch.cuda.current_stream()
                SIDE.wait_stream(main)
                with torch.cuda.stream(SIDE): run(txt, 1)
                run(img, 0)
                main.wait_stream(SIDE)
            a, c = bench(serial, repeat=5), bench(beside, repeat=5)
            i, t = bench(lambda: run(img, 0), repeat=5), bench(lambda: run(txt, 0), repeat=5)
            note(f"lanes {m}+256 {str(kind)[6:11]}", [a, c, i, t], f"serial {1e3*a:.0f} us  beside {1e3*c:.0f} us  image {1e3*i:.0f}  text {1e3*t:.0f}")

def split():
    """bf16 at 4352 rows, whole and cut at the text."""
    for n, k in ((21504, 3072), (3072, 15360)):
        ws = [torch.randn(n, k, device=DEVICE, dtype=BF16) for _ in range(3)]
        x, out, bias = torch.randn(4352, k, device=DEVICE, dtype=BF16), torch.empty(4352, n, device=DEVICE, dtype=BF16), torch.randn(n, device=DEVICE, dtype=BF16)
        def cut(w, *rows):
            at = 0
            for r in rows:
                torch.addmm(bias, x[at:at + r], w.t(), out=out[at:at + r]); at += r
        for rows in ((4352,), (256, 4096), (1280, 3072), (2304, 2048), (2176, 2176), (4352,)):
            ms = bench(*[lambda w=w: cut(w, *rows) for w in ws], repeat=3)
            note(f"bf16 {k}->{n} rows {rows}", ms, f"{1e3*ms:.1f} us {2*4352*n*k/ms/1e9:.0f} T")

def vae_profile():
    torch.manual_seed(0)
    decoder = Decoder(VaeSpec()).to(DEVICE, BF16).requires_grad_(False).to(memory_format=torch.channels_last)
    for side in (512, 1024):
        z = torch.randn(1, 16, side // 8, side // 8, device=DEVICE, dtype=BF16).contiguous(memory_format=torch.channels_last)
        for _ in range(2): M.fused_decoder(decoder, z)
        torch.cuda.synchronize()
        from torch.profiler import profile as P, ProfilerActivity as A
        with P(activities=[A.CUDA]) as rec:
            M.fused_decoder(decoder, z); torch.cuda.synchronize()
        rows = sorted(rec.key_averages(), key=lambda e: -e.self_device_time_total)[:14]
        RESULTS[f"vae profile {side}"] = [(e.key[:100], e.count, e.self_device_time_total) for e in rows]
        print(f"vae {side}")
        for e in rows: print(f"    {e.self_device_time_total/1e3:8.3f} ms {e.count:4d} {e.key[:120]}")
    from vortex_core.kernels import groupnorm as g
    for c, side in ((128, 1024), (256, 512), (512, 256)):
        x = torch.randn(1, c, side, side, device=DEVICE, dtype=BF16).contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x); s = torch.rand(c, device=DEVICE)
        for tile, warps in ((8192, 4), (8192, 8), (16384, 8), (16384, 16), (32768, 16)):
            g.TILE, g.WARPS = tile, warps
            a = bench(lambda: g.group_moments(x, 32), repeat=3); bb = bench(lambda: g.norm_silu(x, s, s, y), repeat=3)
            note(f"norm {c}x{side} tile {tile} warps {warps}", [a, bb], f"moments {1e3*a:.1f} us {x.nbytes/a/1e9:.2f} TB/s   apply {1e3*bb:.1f} us {2*x.nbytes/bb/1e9:.2f} TB/s")
        conv = nn.Conv2d(c, c, 3, padding=1).to(DEVICE, BF16).requires_grad_(False).to(memory_format=torch.channels_last)
        ms = bench(lambda: conv(x), repeat=3)
        note(f"conv {c}x{side}", ms, f"{1e3*ms:.1f} us {2*9*c*c*side*side/ms/1e9:.0f} T")
        import exp_conv as own
        out = torch.empty_like(x)
        ref = conv(x).float()
        for rows, cols, warps, stages in ((2, 64, 8, 4), (2, 64, 4, 4), (4, 64, 8, 4), (2, 128, 8, 4), (4, 64, 8, 3)):
            own.ROWS, own.COLUMNS, own.WARPS, own.STAGES = rows, cols, warps, stages
            try:
                out.fill_(torch.nan)
                ms = bench(lambda: own.convolve(x, conv.weight, conv.bias, out), repeat=3)
                note(f"own conv {c}x{side} {rows}x{cols} warps {warps} stages {stages}", [ms, relative(out, ref)], f"{1e3*ms:.1f} us {2*9*c*c*side*side/ms/1e9:.0f} T  error {relative(out, ref):.5f}")
            except Exception as e:
                note(f"own conv {c}x{side} {rows}x{cols} warps {warps} stages {stages}", str(e)[:200])
        up = bench(lambda: F.interpolate(x[:, :, : side // 2, : side // 2].contiguous(memory_format=torch.channels_last), scale_factor=2.0, mode="nearest"))
        note(f"upsample to {c}x{side}", up, f"{1e3*up:.1f} us")

torch.manual_seed(0)
t0 = time.perf_counter()
for f in (M.ceilings, M.attention, M.steps, decode2, lanes, split, vae_profile):
    if sys.argv[1:] and f.__name__ not in sys.argv[1:]: continue
    print(f"=== {f.__name__} at {time.perf_counter()-t0:.0f} s", flush=True)
    try:
        with torch.inference_mode(): f()
    except Exception: traceback.print_exc()
    torch.cuda.empty_cache()
    Path(os.environ.get("OUT", "."), os.environ.get("NAME", "exp2") + ".json").write_text(json.dumps(RESULTS, indent=1))
