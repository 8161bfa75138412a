"""Names and shapes of every tensor in the published full-size files, as formulas of the models' sizes.

Written from the description of the formats alone, independently of the loader: none of its names are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]
Widths = tuple[int, ...]

HEAD = 128
LATENT = 32


def transformer(doubles: int, singles: int, d: int, text: int) -> Shapes:
    """`transformer/` of a diffusers folder: hidden size d, `text` channels of a prompt embedding."""
    shapes: Shapes = {
        "x_embedder": (d, 128),
        "context_embedder": (d, text),
        "time_guidance_embed.timestep_embedder.linear_1": (d, 256),
        "time_guidance_embed.timestep_embedder.linear_2": (d, d),
        "double_stream_modulation_img.linear": (6 * d, d),
        "double_stream_modulation_txt.linear": (6 * d, d),
        "single_stream_modulation.linear": (3 * d, d),
        "norm_out.linear": (2 * d, d),
        "proj_out": (128, d),
    }
    squares = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    for i in range(doubles):
        block = f"transformer_blocks.{i}"
        shapes |= {f"{block}.attn.{name}": (d, d) for name in squares}
        shapes |= {f"{block}.attn.norm_{name}": (HEAD,) for name in ("q", "k", "added_q", "added_k")}
        for name in ("ff", "ff_context"):
            shapes |= {f"{block}.{name}.linear_in": (6 * d, d), f"{block}.{name}.linear_out": (d, 3 * d)}
    for i in range(singles):
        block = f"single_transformer_blocks.{i}.attn"
        shapes |= {f"{block}.to_qkv_mlp_proj": (9 * d, d), f"{block}.to_out": (d, 4 * d)}
        shapes |= {f"{block}.norm_{name}": (HEAD,) for name in "qk"}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def bfl_transformer(doubles: int, singles: int, d: int, text: int) -> Shapes:
    """The same network as one file with BFL's names."""
    shapes: Shapes = {
        "img_in.weight": (d, 128),
        "txt_in.weight": (d, text),
        "time_in.in_layer.weight": (d, 256),
        "time_in.out_layer.weight": (d, d),
        "double_stream_modulation_img.lin.weight": (6 * d, d),
        "double_stream_modulation_txt.lin.weight": (6 * d, d),
        "single_stream_modulation.lin.weight": (3 * d, d),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.linear.weight": (128, d),
    }
    for i in range(doubles):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= {
                f"{block}_attn.qkv.weight": (3 * d, d),
                f"{block}_attn.proj.weight": (d, d),
                f"{block}_attn.norm.query_norm.scale": (HEAD,),
                f"{block}_attn.norm.key_norm.scale": (HEAD,),
                f"{block}_mlp.0.weight": (6 * d, d),
                f"{block}_mlp.2.weight": (d, 3 * d),
            }
    for i in range(singles):
        shapes |= {
            f"single_blocks.{i}.linear1.weight": (9 * d, d),
            f"single_blocks.{i}.linear2.weight": (d, 4 * d),
            f"single_blocks.{i}.norm.query_norm.scale": (HEAD,),
            f"single_blocks.{i}.norm.key_norm.scale": (HEAD,),
        }
    return shapes


def rows_in_bfl(doubles: int, singles: int, d: int) -> dict[str, list[tuple[str, int, int]]]:
    """Diffusers' name → the rows of BFL's tensors that it consists of, from top to bottom."""
    whole = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "proj_out": "final_layer.linear",
    }
    of_double = {
        "attn.to_out.0.weight": "img_attn.proj.weight",
        "attn.to_add_out.weight": "txt_attn.proj.weight",
        "ff.linear_in.weight": "img_mlp.0.weight",
        "ff.linear_out.weight": "img_mlp.2.weight",
        "ff_context.linear_in.weight": "txt_mlp.0.weight",
        "ff_context.linear_out.weight": "txt_mlp.2.weight",
        "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
        "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
        "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
        "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    }
    of_single = {
        "attn.to_qkv_mlp_proj.weight": "linear1.weight",
        "attn.to_out.weight": "linear2.weight",
        "attn.norm_q.weight": "norm.query_norm.scale",
        "attn.norm_k.weight": "norm.key_norm.scale",
    }
    names = {f"{diffusers}.weight": f"{bfl}.weight" for diffusers, bfl in whole.items()}
    for i in range(doubles):
        names |= {f"transformer_blocks.{i}.{n}": f"double_blocks.{i}.{bfl}" for n, bfl in of_double.items()}
    for i in range(singles):
        names |= {
            f"single_transformer_blocks.{i}.{n}": f"single_blocks.{i}.{bfl}" for n, bfl in of_single.items()
        }
    shapes = bfl_transformer(doubles, singles, d, 1)
    rows = {name: [(bfl, 0, shapes[bfl][0])] for name, bfl in names.items()}
    for i in range(doubles):
        for stream, parts in (
            ("img", ("to_q", "to_k", "to_v")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            for third, part in enumerate(parts):
                fused = f"double_blocks.{i}.{stream}_attn.qkv.weight"
                rows[f"transformer_blocks.{i}.attn.{part}.weight"] = [(fused, third * d, third * d + d)]
    # Diffusers has scale above shift, BFL shift above scale.
    head = "final_layer.adaLN_modulation.1.weight"
    return rows | {"norm_out.linear.weight": [(head, d, 2 * d), (head, 0, d)]}


@dataclass(frozen=True)
class VaeNames:
    """What the modules of the autoencoder are called."""

    down: str
    up: str
    resnet: str
    shortcut: str
    downsample: str
    upsample: str
    norm_out: str
    middle: tuple[str, str]
    attention: str
    attention_parts: tuple[str, str, str, str, str]
    quant: str
    post_quant: str
    up_counts_from_image: bool
    attention_is_convolution: bool


DIFFUSERS_VAE = VaeNames(
    down="down_blocks",
    up="up_blocks",
    resnet="resnets",
    shortcut="conv_shortcut",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    norm_out="conv_norm_out",
    middle=("mid_block.resnets.0", "mid_block.resnets.1"),
    attention="mid_block.attentions.0",
    attention_parts=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    quant="quant_conv",
    post_quant="post_quant_conv",
    up_counts_from_image=False,
    attention_is_convolution=False,
)
BFL_VAE = VaeNames(
    down="down",
    up="up",
    resnet="block",
    shortcut="nin_shortcut",
    downsample="downsample.conv",
    upsample="upsample.conv",
    norm_out="norm_out",
    middle=("mid.block_1", "mid.block_2"),
    attention="mid.attn_1",
    attention_parts=("norm", "q", "k", "v", "proj_out"),
    quant="encoder.quant_conv",
    post_quant="decoder.post_quant_conv",
    up_counts_from_image=True,
    attention_is_convolution=True,
)


def vae(encoder_widths: Widths, decoder_widths: Widths, names: VaeNames = DIFFUSERS_VAE) -> Shapes:
    """The autoencoder, in the same order whatever the names; widths are of the levels from the image inwards."""
    innermost, outermost = decoder_widths[-1], decoder_widths[0]
    last = len(encoder_widths) - 1
    shapes = _conv("encoder.conv_in", 3, encoder_widths[0])
    for level, (before, width) in enumerate(pairwise((encoder_widths[0], *encoder_widths))):
        block = f"encoder.{names.down}.{level}"
        shapes |= _resnets(block, before, width, 2, names)
        if level < last:
            shapes |= _conv(f"{block}.{names.downsample}", width, width)
    shapes |= _middle("encoder", encoder_widths[-1], names)
    shapes |= _norm(f"encoder.{names.norm_out}", encoder_widths[-1])
    shapes |= _conv("encoder.conv_out", encoder_widths[-1], 2 * LATENT)
    shapes |= _conv("decoder.conv_in", LATENT, innermost) | _middle("decoder", innermost, names)
    for level, (before, width) in enumerate(pairwise((innermost, *reversed(decoder_widths)))):
        block = f"decoder.{names.up}.{last - level if names.up_counts_from_image else level}"
        shapes |= _resnets(block, before, width, 3, names)
        if level < last:
            shapes |= _conv(f"{block}.{names.upsample}", width, width)
    shapes |= _norm(f"decoder.{names.norm_out}", outermost) | _conv("decoder.conv_out", outermost, 3)
    shapes |= _conv(names.quant, 2 * LATENT, 2 * LATENT, 1) | _conv(names.post_quant, LATENT, LATENT, 1)
    statistics: Shapes = {"bn.running_mean": (128,), "bn.running_var": (128,), "bn.num_batches_tracked": ()}
    return shapes | statistics


def qwen3(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int) -> Shapes:
    """`text_encoder/` of a diffusers folder, with what the image pipeline never uses."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for i in range(layers):
        layer: Shapes = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (heads * HEAD, hidden),
            "self_attn.k_proj": (kv_heads * HEAD, hidden),
            "self_attn.v_proj": (kv_heads * HEAD, hidden),
            "self_attn.o_proj": (hidden, heads * HEAD),
            "self_attn.q_norm": (HEAD,),
            "self_attn.k_norm": (HEAD,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _conv(name: str, before: int, after: int, size: int = 3) -> Shapes:
    return {f"{name}.weight": (after, before, size, size), f"{name}.bias": (after,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnets(block: str, before: int, width: int, count: int, names: VaeNames) -> Shapes:
    shapes: Shapes = {}
    for i in range(count):
        shapes |= _resnet(f"{block}.{names.resnet}.{i}", width if i else before, width, names)
    return shapes


def _resnet(name: str, before: int, width: int, names: VaeNames) -> Shapes:
    shapes = _norm(f"{name}.norm1", before) | _conv(f"{name}.conv1", before, width)
    shapes |= _norm(f"{name}.norm2", width) | _conv(f"{name}.conv2", width, width)
    return shapes | (_conv(f"{name}.{names.shortcut}", before, width, 1) if before != width else {})


def _middle(part: str, width: int, names: VaeNames) -> Shapes:
    shapes: Shapes = {}
    for block in names.middle:
        shapes |= _resnet(f"{part}.{block}", width, width, names)
    norm, *projections = (f"{part}.{names.attention}.{name}" for name in names.attention_parts)
    shapes |= _norm(norm, width)
    for name in projections:
        square = (width, width, 1, 1) if names.attention_is_convolution else (width, width)
        shapes |= {f"{name}.weight": square, f"{name}.bias": (width,)}
    return shapes
