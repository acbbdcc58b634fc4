"""Built-in figures of well-known pipelines: unit sizes, passes, times and activations. Pure data.

    model = MODELS["flux"]
    workload = workload_of(model.parts, model.steps, model.step_ms, model.encode_ms, model.decode_ms)

Unit sizes are exact: the published configurations, built on the meta device and cut by `units.cut` in `order_of_use`, with
the default settings (tests/test_figures.py builds them again).

Activations of denoisers and decoders are the peak of live tensors of one pass on the meta device, with fused attention and
without the workspaces of convolutions. For Flux that gives 0.46 GiB, which is also what diffusers' benchmarks found on an A100
(22.63 GiB with weights). Those of encoders, 0.1 GiB, are a guess on the high side.

Times name their source, or say that they are estimates.
"""

from __future__ import annotations

from .config import GIB
from .shapes import Block, Model, Part


def _gib(size: float) -> int:
    return int(size * GIB)


_CLIP_L = (
    Block("rest", (76_009_728,), idle=True),
    Block("encoder.layers.0", (28_351_488,), 6),
    Block("rest", (3_072,)),
)
_CLIP_G = (
    Block("rest", (126_682_368,), idle=True),
    Block("text_model.encoder.layers.0", (39_354_880,), 32),
    Block("rest", (3_281_920,)),
)
_SDXL_UNET = (
    Block("rest", (19_126_784,)),
    Block("down_blocks.0.resnets.1", (19_471_360,)),
    Block("down_blocks.1.attentions.0", (17_555_200,)),
    Block("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", (20_010_240,)),
    Block("down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2", (20_491_520,)),
    Block("down_blocks.1.attentions.1", (17_555_200,)),
    Block("down_blocks.1.attentions.1.transformer_blocks.0.ff.net.2", (20_010_240,)),
    Block("down_blocks.1.attentions.1.transformer_blocks.1.ff.net.2", (60_642_560,)),
    Block("down_blocks.2.attentions.0", (30_167_040,)),
    Block("down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_out.0", (29_519_360, 22_945_280, 17_047_040), 9),
    Block("down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_out.0", (29_519_360,)),
    Block("down_blocks.2.attentions.0.transformer_blocks.9.ff.net.2", (78_666_240,)),
    Block("down_blocks.2.attentions.1", (30_167_040,)),
    Block("down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0", (29_519_360, 22_945_280, 17_047_040), 9),
    Block("down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0", (29_519_360,)),
    Block("down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2", (78_666_240,)),
    Block("mid_block.attentions.0", (30_167_040,)),
    Block("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", (29_519_360, 22_945_280, 17_047_040), 9),
    Block("mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0", (29_519_360,)),
    Block("mid_block.attentions.0.transformer_blocks.9.ff.net.2", (78_666_240,)),
    Block("up_blocks.0.resnets.0", (98_329_600,)),
    Block("up_blocks.0.attentions.0", (30_167_040,)),
    Block("up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", (29_519_360, 22_945_280, 17_047_040), 9),
    Block("up_blocks.0.attentions.0.transformer_blocks.9.attn2.to_out.0", (29_519_360,)),
    Block("up_blocks.0.attentions.0.transformer_blocks.9.ff.net.2", (114_718_720,)),
    Block("up_blocks.0.attentions.1", (30_167_040,)),
    Block("up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0", (29_519_360, 22_945_280, 17_047_040), 9),
    Block("up_blocks.0.attentions.1.transformer_blocks.9.attn2.to_out.0", (29_519_360,)),
    Block("up_blocks.0.attentions.1.transformer_blocks.9.ff.net.2", (98_332_160,)),
    Block("up_blocks.0.attentions.2", (30_167_040,)),
    Block("up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0", (29_519_360, 22_945_280, 17_047_040), 9),
    Block("up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_out.0", (29_519_360,)),
    Block("up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2", (45_882_880,)),
    Block("up_blocks.1.resnets.0", (33_602_560,)),
    Block("up_blocks.1.attentions.0", (17_555_200,)),
    Block("up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2", (20_010_240,)),
    Block("up_blocks.1.attentions.0.transformer_blocks.1.ff.net.2", (29_506_560,)),
    Block("up_blocks.1.attentions.1", (17_555_200,)),
    Block("up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2", (20_010_240,)),
    Block("up_blocks.1.attentions.1.transformer_blocks.1.ff.net.2", (25_409_536,)),
    Block("up_blocks.1.attentions.2", (17_555_200,)),
    Block("up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2", (20_010_240,)),
    Block("up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2", (20_287_744,)),
    Block("up_blocks.2.resnets.1", (13_555_968,)),
)
_VAE_4 = (
    Block("rest", (23_655_168,), idle=True),
    Block("encoder.down_blocks.2.downsamplers.0", (23_606_272,), idle=True),
    Block("encoder.mid_block.resnets.0", (20_989_952,), idle=True),
    Block("rest", (21_103_872,)),
    Block("decoder.up_blocks.0.resnets.0", (18_886_656,)),
    Block("decoder.up_blocks.0.resnets.2", (23_606_272,)),
    Block("decoder.up_blocks.1.resnets.1", (18_886_656,)),
    Block("decoder.up_blocks.1.upsamplers.0", (16_574_208,)),
)
_T5_XXL = (
    Block("rest", (263_192_576,), idle=True),
    Block("encoder.block.0.layer.0", (134_230_016,)),
    Block("encoder.block.0.layer.1", (251_666_432, 134_225_920), 23),
    Block("encoder.block.23.layer.1", (251_666_432,)),
    Block("rest", (8_192,)),
)
_VAE_16 = (
    Block("rest", (23_655_168,), idle=True),
    Block("encoder.down_blocks.2.downsamplers.0", (23_606_272,), idle=True),
    Block("encoder.mid_block.resnets.0", (20_989_952,), idle=True),
    Block("rest", (21_435_648,)),
    Block("decoder.up_blocks.0.resnets.0", (18_886_656,)),
    Block("decoder.up_blocks.0.resnets.2", (23_606_272,)),
    Block("decoder.up_blocks.1.resnets.1", (18_886_656,)),
    Block("decoder.up_blocks.1.upsamplers.0", (16_573_184,)),
)
_QWEN_VAE = (
    Block("rest", (22_163_968,), idle=True),
    Block("encoder.down_blocks.7", (18_583_296,), idle=True),
    Block("encoder.down_blocks.8", (16_813_824,), idle=True),
    Block("encoder.down_blocks.10", (31_856_640,), idle=True),
    Block("encoder.mid_block.attentions.0", (17_111_808,), idle=True),
    Block("rest", (16_928_512,)),
    Block("decoder.mid_block.attentions.0", (17_111_808,)),
    Block("decoder.up_blocks.0.resnets.0", (31_856_640,)),
    Block("decoder.up_blocks.0.resnets.2", (17_255_936,)),
    Block("decoder.up_blocks.0.upsamplers.0", (29_794_304,)),
    Block("decoder.up_blocks.1.resnets.2", (17_255_936,)),
    Block("decoder.up_blocks.1.upsamplers.0", (17_042_176,)),
    Block("rest", (16_128,)),
)
# Wan 2.2's first transformer runs while the noise is above 0.875: with the published flow shift of 3, in 30% of the steps,
# and some more for the scheduler's rounding. An estimate.
HIGH_NOISE = 0.325

_WAN_14B = (
    Block("rest", (56_281_088,)),
    Block("rest", (314_572_800,)),
    Block("rest", (94_453_760,)),
    Block("blocks.0", (157_378_560, 52_439_040, 157_337_600, 52_439_040, 141_626_368, 141_568_000), 40),
    Block("rest", (655_616,)),
)
_WAN_VAE = (
    Block("rest", (18_364_416,), idle=True),
    Block("encoder.down_blocks.5.resample.1", (25_960_704,), idle=True),
    Block("encoder.down_blocks.7", (31_856_640,), idle=True),
    Block("encoder.down_blocks.8.resample.1", (38_937_600,), idle=True),
    Block("encoder.down_blocks.10", (31_856_640,), 2, idle=True),
    Block("encoder.mid_block.attentions.0", (34_223_616,), idle=True),
    Block("rest", (33_856_256,)),
    Block("decoder.mid_block.attentions.0", (34_223_616,)),
    Block("decoder.up_blocks.0.resnets.0", (31_856_640,), 3),
    Block("decoder.up_blocks.0.upsamplers.0.resample.1", (30_386_688,)),
    Block("decoder.up_blocks.1.resnets.1", (31_856_640,), 2),
    Block("decoder.up_blocks.1.upsamplers.0.resample.1", (22_128_384,)),
    Block("decoder.up_blocks.2.resnets.2", (14_639_872,)),
)
_LTX_VAE = (
    Block("rest", (20_752_384,)),
    Block("encoder.down_blocks.1.resnets.1", (17_697_280,), idle=True),
    Block("encoder.down_blocks.1", (21_499_904,), idle=True),
    Block("encoder.down_blocks.2.resnets.0", (28_313_600,), 3, idle=True),
    Block("encoder.down_blocks.2.downsamplers.0", (42_470_400,), idle=True),
    Block("encoder.down_blocks.3.resnets.1", (28_313_600,), 6, idle=True),
    Block("rest", (35_420_672,)),
    Block("decoder.mid_block.resnets.1", (28_313_600,), 6),
    Block("decoder.up_blocks.1.upsamplers.0", (113_254_400,)),
    Block("decoder.up_blocks.1.resnets.0", (28_313_600,), 3),
    Block("decoder.up_blocks.2", (39_198_208,)),
    Block("decoder.up_blocks.2.resnets.0", (21_236_736,)),
    Block("decoder.up_blocks.3", (16_881_408,)),
    Block("rest", (332_032,)),
)

_ALL = (
    Model(
        "sdxl",
        "Stable Diffusion XL base 1.0",
        "StableDiffusionXLPipeline",
        "one image of 1024 x 1024, guidance in one pass",
        # In float16 diffusers decodes with a float32 copy of this VAE, which takes twice its activations.
        (
            Part("text_encoder", "encoder", "bfloat16", _CLIP_L, 123_060_480, _gib(0.1)),
            Part("text_encoder_2", "encoder", "bfloat16", _CLIP_G, 694_659_840, _gib(0.1)),
            Part("unet", "denoiser", "bfloat16", _SDXL_UNET, 2_567_463_684, _gib(0.31)),
            Part("vae", "decoder", "bfloat16", _VAE_4, 83_653_863, _gib(1.5)),
        ),
        steps=30,
        step_ms=102,
        step_source=(
            "A100 80 GB: 3.31 s for 30 steps in bfloat16 (diffusers, Accelerate inference of text-to-image "
            "diffusion models), less encode and decode"
        ),
        encode_ms=20,
        decode_ms=228,
        times_source="encode: an estimate; decode: A100, NVIDIA's SDXL TensorRT page",
    ),
    Model(
        "sd3",
        "Stable Diffusion 3 medium",
        "StableDiffusion3Pipeline",
        "one image of 1024 x 1024, guidance in one pass",
        (
            Part(
                "text_encoder",
                "encoder",
                "float16",
                (
                    Block("rest", (76_009_728,), idle=True),
                    Block("text_model.encoder.layers.0", (28_351_488,), 6),
                    Block("rest", (1_182_720,)),
                ),
                123_650_304,
                _gib(0.1),
            ),
            Part("text_encoder_2", "encoder", "float16", _CLIP_G, 694_659_840, _gib(0.1)),
            Part("text_encoder_3", "encoder", "float16", _T5_XXL, 4_762_310_656, _gib(0.1)),
            Part(
                "transformer",
                "denoiser",
                "float16",
                (
                    Block("rest", (142_559_232,)),
                    Block("transformer_blocks.0", (84_989_952, 28_329_984, 18_877_440, 18_886_656, 18_877_440), 23),
                    Block("transformer_blocks.23", (66_103_296,)),
                    Block("transformer_blocks.23.attn.to_out.0", (23_608_320,)),
                    Block("transformer_blocks.23.ff.net.2", (18_877_440,)),
                    Block("rest", (9_640_192,)),
                ),
                2_028_328_000,
                _gib(0.32),
            ),
            Part("vae", "decoder", "float16", _VAE_16, 83_819_683, _gib(1.5)),
        ),
        steps=28,
        step_ms=162,
        step_source=(
            "A100 80 GB: 4.76 s for 28 steps in float16 (Hugging Face, Diffusers welcomes Stable Diffusion "
            "3), less encode and decode"
        ),
        encode_ms=60,
        decode_ms=160,
        times_source="estimates for an A100",
    ),
    Model(
        "flux",
        "FLUX.1 dev",
        "FluxPipeline",
        "one image of 1024 x 1024",
        (
            Part("text_encoder", "encoder", "bfloat16", _CLIP_L, 123_060_480, _gib(0.1)),
            Part("text_encoder_2", "encoder", "bfloat16", _T5_XXL, 4_762_310_656, _gib(0.1)),
            Part(
                "transformer",
                "denoiser",
                "bfloat16",
                (
                    Block("rest", (90_095_616,)),
                    Block(
                        "transformer_blocks.0",
                        (
                            264_327_680,
                            18_880_512,
                            18_880_512,
                            75_522_560,
                            75_522_048,
                            75_503_616,
                            75_522_048,
                            75_503_616,
                        ),
                        19,
                    ),
                    Block("single_transformer_blocks.0", (264_303_104, 18_880_512), 38),
                    Block("rest", (38_154_496,)),
                ),
                11_901_408_320,
                _gib(0.46),
            ),
            Part("vae", "decoder", "bfloat16", _VAE_16, 83_819_683, _gib(1.5)),
        ),
        steps=28,
        step_ms=535,
        step_source=(
            "A100 80 GB: one forward pass in bfloat16, not compiled (diffusers/benchmarks, huggingface/diffusers#11565)"
        ),
        encode_ms=60,
        decode_ms=160,
        times_source="estimates for an A100",
    ),
    Model(
        "qwen-image",
        "Qwen-Image",
        "QwenImagePipeline",
        "one image of 1024 x 1024, guidance in two passes",
        (
            Part(
                "text_encoder",
                "encoder",
                "bfloat16",
                (
                    Block("rest", (42_415_616,), idle=True),
                    Block("model.visual.blocks.1", (39_404_544,), 31, idle=True),
                    Block("rest", (52_441_600,), idle=True),
                    Block("model.visual.merger.mlp.2", (36_707_328,), idle=True),
                    Block("rest", (1_089_994_752,), idle=True),
                    Block("model.language_model.layers.0", (194_520_064, 135_790_592, 135_804_928), 28),
                    Block("rest", (7_680,)),
                    Block("rest", (1_089_994_752,)),
                ),
                8_292_166_656,
                _gib(0.1),
            ),
            Part(
                "transformer",
                "denoiser",
                "bfloat16",
                (
                    Block("rest", (42_892_288,)),
                    Block(
                        "transformer_blocks.0.img_mod.1",
                        (
                            113_283_072,
                            113_283_584,
                            18_880_512,
                            18_881_024,
                            75_522_048,
                            75_503_616,
                            113_283_072,
                            75_522_048,
                            75_503_616,
                        ),
                        60,
                    ),
                    Block("rest", (38_154_496,)),
                ),
                20_430_401_088,
                _gib(0.36),
                passes_per_step=2,
            ),
            Part("vae", "decoder", "bfloat16", _QWEN_VAE, 126_892_531, _gib(3.38)),
        ),
        steps=50,
        step_ms=1730,
        step_source="an estimate for an A100 80 GB: 96 TFLOP a pass at the 111 TFLOP/s that Flux reaches",
        encode_ms=60,
        decode_ms=300,
        times_source="estimates for an A100",
    ),
    Model(
        "wan-2.2",
        "Wan 2.2 T2V A14B",
        "WanPipeline",
        "81 frames of 832 x 480, guidance in two passes",
        (
            Part(
                "text_encoder",
                "encoder",
                "bfloat16",
                (
                    Block("rest", (2_100_297_728,), idle=True),
                    Block("encoder.block.0.layer.0", (134_230_016, 251_666_432), 24),
                    Block("rest", (8_192,)),
                ),
                5_680_910_336,
                _gib(0.1),
            ),
            Part("transformer", "denoiser", "bfloat16", _WAN_14B, 14_288_491_584, _gib(3.48), 2, HIGH_NOISE),
            Part("transformer_2", "denoiser", "bfloat16", _WAN_14B, 14_288_491_584, _gib(3.48), 2, 1 - HIGH_NOISE),
            Part("vae", "decoder", "float32", _WAN_VAE, 126_892_531, _gib(7.61)),
        ),
        steps=40,
        step_ms=24000,
        step_source="an estimate for an A100 80 GB: 1.8 PFLOP a pass, half of them attention, at 150 TFLOP/s",
        encode_ms=120,
        decode_ms=10000,
        times_source="estimates for an A100",
    ),
    Model(
        "ltx",
        "LTX-Video 0.9",
        "LTXPipeline",
        "161 frames of 704 x 512, guidance in one pass",
        (
            Part("text_encoder", "encoder", "bfloat16", _T5_XXL, 4_762_310_656, _gib(0.1)),
            Part(
                "transformer",
                "denoiser",
                "bfloat16",
                (
                    Block("rest", (85_512_192,)),
                    Block("transformer_blocks.0", (25_210_880, 33_579_008, 41_963_520, 33_558_528), 28),
                    Block("rest", (524_544,)),
                ),
                1_923_385_472,
                _gib(0.91),
            ),
            Part("vae", "decoder", "bfloat16", _LTX_VAE, 419_193_649, _gib(5.41)),
        ),
        steps=50,
        step_ms=780,
        step_source="an estimate for an A100 80 GB: 82 TFLOP a step at the 105 TFLOP/s that LTX-Video 0.9.7 reaches",
        encode_ms=60,
        decode_ms=1500,
        times_source="estimates for an A100",
    ),
)

MODELS: dict[str, Model] = {m.name: m for m in _ALL}
