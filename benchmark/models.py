"""Shapes of real models: what the suite `models` times, with heads and head dims as published.

A name says what a shape is: the model, what of it, and `window` with the keys that a row sees beside its own.
"""

# (direction, batch, queries, keys, query heads, key heads, head dim, causal, name[, window])
_FORWARD = (
    # Language models, prefill. Llama 3 8B has 32/8 heads of 128, 70B 64/8 (on 8 GPUs 8/1), 405B 128/8.
    (1, 1024, 1024, 32, 8, 128, True, "llama3-8b-prefill-1k"),
    (1, 8192, 8192, 32, 8, 128, True, "llama3-8b-prefill-8k"),
    (1, 16384, 16384, 8, 1, 128, True, "llama3-70b-tp8-prefill-16k"),
    (1, 8192, 8192, 16, 1, 128, True, "llama3-405b-tp8-prefill-8k"),
    (4, 4096, 4096, 14, 2, 64, True, "qwen2-0.5b-prefill-4k"),  # Qwen2 0.5B: 14/2 of 64
    (2, 8192, 8192, 28, 4, 128, True, "qwen2-7b-prefill-8k"),  # Qwen2 7B: 28/4
    (1, 4096, 4096, 32, 4, 128, True, "qwen3-30b-a3b-prefill-4k"),  # Qwen3 30B-A3B: 32/4
    (1, 8192, 8192, 71, 1, 64, True, "falcon-7b-prefill-8k"),  # Falcon 7B: 71/1 of 64
    (2, 4096, 4096, 32, 32, 80, True, "phi2-prefill-4k"),  # Phi-2: 32/32 of 80
    (2, 4096, 4096, 32, 32, 96, True, "phi3-mini-prefill-4k"),  # Phi-3 mini: 32/32 of 96
    (1, 4096, 4096, 8, 1, 256, True, "gemma-2b-prefill-4k"),  # Gemma 2B: 8/1 of 256
    (1, 8192, 8192, 16, 8, 256, True, "gemma2-9b-prefill-8k"),  # Gemma 2 9B: 16/8 of 256
    # The same with sliding windows.
    (1, 16384, 16384, 32, 8, 128, True, "mistral-7b-window4095", 4095),  # Mistral 7B v0.1: 32/8, 4096
    (1, 8192, 8192, 16, 8, 256, True, "gemma2-9b-window4095", 4095),
    (1, 8192, 8192, 8, 4, 256, True, "gemma3-4b-window1023", 1023),  # Gemma 3 4B: 8/4 of 256, 1024
    (1, 8192, 8192, 64, 8, 64, True, "gpt-oss-window127", 127),  # gpt-oss: 64/8 of 64, 128
    # Images and encoders.
    (32, 197, 197, 12, 12, 64, False, "vit-base-224"),  # ViT-B/16: 12 of 64, 197 tokens
    (16, 577, 577, 16, 16, 64, False, "clip-vit-large-336"),  # CLIP ViT-L/14 at 336: 16 of 64
    (8, 729, 729, 16, 16, 72, False, "siglip-so400m"),  # SigLIP SO400M/14 at 384: 16 of 72
    (2, 4096, 4096, 16, 16, 80, False, "sam-vit-h-global"),  # SAM ViT-H: 16 of 80
    (1, 4096, 4096, 16, 16, 64, False, "sam-vit-l-global"),  # SAM ViT-L: 16 of 64, 64 x 64 patches
    (16, 512, 512, 16, 16, 64, False, "bert-large-512"),  # BERT large: 16 of 64
    # Diffusion.
    (2, 4096, 4096, 10, 10, 64, False, "sdxl-self-64x64"),  # SDXL: 10 and 20 heads of 64
    (2, 1024, 1024, 20, 20, 64, False, "sdxl-self-32x32"),
    (2, 4096, 77, 10, 10, 64, False, "sdxl-cross-77"),
    (2, 1024, 77, 20, 20, 64, False, "sdxl-cross-77-32x32"),
    (1, 4608, 4608, 24, 24, 128, False, "flux-joint-1024px"),  # FLUX.1: 24 of 128, 4096 + 512 tokens
    (2, 4250, 4250, 24, 24, 64, False, "sd3-joint-1024px"),  # SD 3 medium: 24 of 64, 4096 + 154 tokens
    (2, 1024, 1024, 16, 16, 72, False, "dit-xl-512px"),  # DiT-XL/2: 16 of 72
    (1, 16384, 16384, 12, 12, 128, False, "wan-1.3b-video-self"),  # Wan 2.1 1.3B: 12 of 128
    # Speech.
    (8, 1500, 1500, 20, 20, 64, False, "whisper-large-encoder"),  # Whisper large: 20 of 64, 1500 frames
    (8, 224, 1500, 20, 20, 64, False, "whisper-large-cross"),
    # Few queries against many keys.
    (1, 512, 32768, 32, 8, 128, True, "llama3-8b-chunk512-32k"),
    (4, 64, 8192, 32, 8, 128, True, "llama3-8b-chunk64-8k"),
    (8, 4, 8192, 32, 8, 128, True, "llama3-8b-speculative4-8k"),
    (32, 8, 4096, 32, 8, 128, True, "llama3-8b-speculative8-4k"),
    (1, 1, 8192, 32, 8, 128, False, "llama3-8b-decode-8k"),
    (8, 1, 4096, 32, 8, 128, False, "llama3-8b-decode-b8-4k"),
    (16, 1, 8192, 8, 1, 128, False, "llama3-70b-tp8-decode-8k"),
    (8, 1, 1500, 20, 20, 64, False, "whisper-large-decode-cross"),
)
_BACKWARD = (
    (1, 4096, 4096, 8, 1, 128, True, "llama3-70b-tp8-train-4k"),
    (1, 16384, 16384, 8, 1, 128, True, "llama3-70b-tp8-train-16k"),
    (1, 8192, 8192, 32, 8, 128, True, "llama3-8b-train-8k"),
    (1, 8192, 8192, 16, 1, 64, True, "mqa-16-heads-train-8k"),  # multi-query, no single model's
    (1, 4096, 4096, 32, 4, 128, True, "qwen3-30b-a3b-train-4k"),
    (1, 8192, 8192, 32, 4, 128, True, "qwen3-30b-a3b-train-8k"),
    (4, 4096, 4096, 14, 2, 64, True, "qwen2-0.5b-train-4k"),
    (2, 4096, 4096, 28, 4, 128, True, "qwen2-7b-train-4k"),
    (1, 4096, 4096, 71, 1, 64, True, "falcon-7b-train-4k"),
    (1, 4096, 4096, 8, 1, 256, True, "gemma-2b-train-4k"),
    (1, 8192, 8192, 32, 8, 128, True, "mistral-7b-train-window4095", 4095),
    (4, 4096, 4096, 10, 10, 192, True, "d192-train-4k"),  # head dim 192, no single model's
    (2, 4096, 4096, 32, 32, 80, True, "phi2-train-4k"),
    (4, 4096, 4096, 25, 25, 80, False, "d80-train-4k"),
    (32, 197, 197, 12, 12, 64, False, "vit-base-224-train"),
    (2, 4096, 4096, 10, 10, 64, False, "sdxl-self-64x64-train"),
    (2, 4096, 77, 10, 10, 64, False, "sdxl-cross-77-train"),
    (8, 1500, 1500, 20, 20, 64, False, "whisper-large-encoder-train"),
)
# As the fields of a Case after its suite.
SHAPES = tuple(
    (direction, "bf16", *shape)
    for direction, shapes in (("fwd", _FORWARD), ("bwd", _BACKWARD))
    for shape in shapes
)
