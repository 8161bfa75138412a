"""Names and shapes of every tensor in the published full-size files, as formulas of the models' sizes.

Written from the description of the formats alone, independently of the loader: none of its names are used.
"""

from __future__ import annotations

from itertools import pairwise

Shapes = dict[str, tuple[int, ...]]

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


def vae(encoder_widths: tuple[int, ...], decoder_widths: tuple[int, ...]) -> Shapes:
    """`vae/` of a diffusers folder; the widths are those of the levels, from the image inwards."""
    innermost, outermost = decoder_widths[-1], decoder_widths[0]
    shapes = _conv("encoder.conv_in", 3, encoder_widths[0])
    for level, (before, width) in enumerate(pairwise((encoder_widths[0], *encoder_widths))):
        block = f"encoder.down_blocks.{level}"
        shapes |= _resnets(block, before, width, count=2)
        if level < len(encoder_widths) - 1:
            shapes |= _conv(f"{block}.downsamplers.0.conv", width, width)
    shapes |= _middle("encoder", encoder_widths[-1]) | _norm("encoder.conv_norm_out", encoder_widths[-1])
    shapes |= _conv("encoder.conv_out", encoder_widths[-1], 2 * LATENT)
    shapes |= _conv("decoder.conv_in", LATENT, innermost) | _middle("decoder", innermost)
    for level, (before, width) in enumerate(pairwise((innermost, *reversed(decoder_widths)))):
        block = f"decoder.up_blocks.{level}"
        shapes |= _resnets(block, before, width, count=3)
        if level < len(decoder_widths) - 1:
            shapes |= _conv(f"{block}.upsamplers.0.conv", width, width)
    shapes |= _norm("decoder.conv_norm_out", outermost) | _conv("decoder.conv_out", outermost, 3)
    shapes |= _conv("quant_conv", 2 * LATENT, 2 * LATENT, 1) | _conv("post_quant_conv", LATENT, LATENT, 1)
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


def _resnets(block: str, before: int, width: int, count: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(count):
        name, entering = f"{block}.resnets.{i}", width if i else before
        shapes |= _norm(f"{name}.norm1", entering) | _conv(f"{name}.conv1", entering, width)
        shapes |= _norm(f"{name}.norm2", width) | _conv(f"{name}.conv2", width, width)
        if entering != width:
            shapes |= _conv(f"{name}.conv_shortcut", entering, width, 1)
    return shapes


def _middle(part: str, width: int) -> Shapes:
    shapes = _resnets(f"{part}.mid_block", width, width, count=2)
    attention = f"{part}.mid_block.attentions.0"
    shapes |= _norm(f"{attention}.group_norm", width)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= {f"{attention}.{name}.weight": (width, width), f"{attention}.{name}.bias": (width,)}
    return shapes
