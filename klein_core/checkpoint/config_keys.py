"""Keys of every configuration file of a checkpoint: which are honored, which must have one value, which mean nothing.

`ConfigFile` reads the values of one file and rejects wrong ones by file and key.

A key that changes an image and is neither honored nor refused would change it silently. The table covers every key that
diffusers 0.42 and transformers 5.23 read for the classes of a klein checkpoint; a test walks the signatures of those
classes, so that a key which a later version adds fails it. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_core.errors import CheckpointError
from klein_core.model_registry import other_family
from klein_core.variants import read_json

VAE_LEVELS = 4
LARGEST_INTEGER = 1 << 20
"""Largest count or width: above that of every model, and too small to exhaust memory before tensors are compared."""
LARGEST_LAYER_COUNT = 1024
"""Largest number of layers, which are built one by one."""
LARGEST_NUMBER = 1e12
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class ConfigKeys:
    """Keys of one file. Keys that are not here are read by no class of a klein checkpoint."""

    honored: frozenset[str]
    """Read, and used as diffusers and transformers use them."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Key → the only value that is accepted."""
    without_effect: frozenset[str] = frozenset()
    """Read by no part of inference, or overridden by the pipeline's own arguments."""

    @property
    def known(self) -> frozenset[str]:
        """All keys of the file."""
        return self.honored | self.fixed.keys() | self.without_effect


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


MODEL_INDEX = ConfigKeys(
    honored=_keys("_class_name is_distilled scheduler vae text_encoder tokenizer transformer"),
)
SCHEDULER = ConfigKeys(
    honored=_keys("_class_name shift use_dynamic_shifting time_shift_type"),
    fixed={
        "num_train_timesteps": 1000,
        "shift_terminal": None,
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        # Not in the scheduler's signature: the klein pipeline itself looks for it.
        "use_flow_sigmas": False,
    },
    # The klein pipeline computes mu by its own formula, not from these four.
    without_effect=_keys("base_shift max_shift base_image_seq_len max_image_seq_len"),
)
TRANSFORMER = ConfigKeys(
    honored=_keys(
        "_class_name num_layers num_single_layers num_attention_heads attention_head_dim joint_attention_dim "
        "in_channels out_channels mlp_ratio axes_dims_rope rope_theta timestep_guidance_channels eps "
        "quantization_config"
    ),
    fixed={"patch_size": 1, "guidance_embeds": False},
)
VAE = ConfigKeys(
    honored=_keys(
        "_class_name block_out_channels decoder_block_out_channels layers_per_block latent_channels norm_num_groups "
        "batch_norm_eps use_quant_conv use_post_quant_conv mid_block_add_attention sample_size"
    ),
    fixed={
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * VAE_LEVELS,
        "up_block_types": ["UpDecoderBlock2D"] * VAE_LEVELS,
        "patch_size": [2, 2],
        "in_channels": 3,
        "out_channels": 3,
        "quantization_config": None,
    },
    # The momentum updates the batch norm's statistics in training only.
    without_effect=_keys("batch_norm_momentum"),
)
TEXT_ENCODER = ConfigKeys(
    # Those of Qwen3Config are used by transformers' own Qwen3Model; the last three are read by this suite.
    honored=_keys(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act rms_norm_eps rope_parameters rope_theta rope_scaling is_causal use_sliding_window "
        "sliding_window max_window_layers layer_types max_position_embeddings "
        "text_encoder_out_layers max_sequence_length quantization_config"
    ),
    fixed={"model_type": "qwen3", "attention_bias": False, "partial_rotary_factor": 1.0},
    without_effect=_keys(
        # Training, generation and bookkeeping.
        "attention_dropout initializer_range use_cache tie_word_embeddings pad_token_id bos_token_id eos_token_id "
        "transformers_version architectures dtype torch_dtype is_encoder_decoder id2label label2id problem_type "
        "chunk_size_feed_forward "
        # Set for every call, or by this suite.
        "attn_implementation output_hidden_states output_attentions return_dict"
    ),
)
TOKENIZER = ConfigKeys(
    honored=_keys(
        "tokenizer_class vocab merges vocab_file merges_file tokenizer_file tokenizer_object added_tokens_decoder "
        "extra_special_tokens additional_special_tokens model_specific_special_tokens special_tokens post_processor "
        "unk_token bos_token eos_token pad_token sep_token cls_token mask_token add_prefix_space add_bos_token "
        "add_eos_token chat_template fix_mistral_regex"
    ),
    # Also where tokenizer.json says so: the attributes of the loaded tokenizer are compared, not the file's text.
    fixed={"padding_side": "right", "truncation_side": "right", "split_special_tokens": False},
    without_effect=_keys(
        # The pipeline pads and cuts to its own length; decoding and chat answers do not occur.
        "model_max_length max_len tokenizer_truncation tokenizer_padding _json_truncation _json_padding "
        "clean_up_tokenization_spaces clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output errors "
        "model_input_names response_template response_schema chat_control_tokens verbose name_or_path processor_class"
    ),
)

CONFIG_KEYS: Mapping[str, ConfigKeys] = {
    "model_index.json": MODEL_INDEX,
    "scheduler/scheduler_config.json": SCHEDULER,
    "transformer/config.json": TRANSFORMER,
    "vae/config.json": VAE,
    "text_encoder/config.json": TEXT_ENCODER,
    "tokenizer/tokenizer_config.json": TOKENIZER,
}


@dataclass(frozen=True)
class ConfigFile:
    """A JSON file and its values. Methods raise CheckpointError for a missing or wrong value, naming file and key."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Reads a file. Raises CheckpointError when it is missing or not a JSON object."""
        return cls(path, read_json(path))

    def error(self, key: str, value: object, needed: str) -> CheckpointError:
        """Returns the error for a wrong value; `needed` is the requirement that it breaks."""
        shown = repr(value)[:_SHOWN_CHARACTERS]
        return CheckpointError(f"{self.path}: {key} is {shown}; {needed}")

    def require_only(self, supported: Mapping[str, Any]) -> None:
        """Rejects keys whose value is not the supported one; missing keys are accepted."""
        for key, value in supported.items():
            if key in self.values and self.values[key] != value:
                raise self.error(key, self.values[key], f"only {value!r} is supported")

    def require_class(self, supported: Collection[str]) -> None:
        """Rejects an unsupported `_class_name`; a missing one is accepted."""
        name = self.values.get("_class_name")
        if name is not None:
            check_class(self.path, "_class_name", name, supported)

    def integer(self, key: str, default: int | None = None, largest: int = LARGEST_INTEGER) -> int:
        """Returns a whole number in 1 … largest."""
        return self._integer(key, self.values.get(key, default), largest)

    def integers(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Returns 1 to `LARGEST_LAYER_COUNT` whole numbers in 1 … `LARGEST_INTEGER`."""
        value = self.values.get(key, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= LARGEST_LAYER_COUNT:
            raise self.error(key, value, f"it must be a list of 1 to {LARGEST_LAYER_COUNT} whole numbers")
        return tuple(self._integer(key, item, LARGEST_INTEGER) for item in value)

    def number(self, key: str, default: float) -> float:
        """Returns a number above 0 and up to `LARGEST_NUMBER`."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST_NUMBER:
            raise self.error(key, value, f"it must be a number above 0 and up to {LARGEST_NUMBER:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns a boolean."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "it must be true or false")
        return value

    def _integer(self, key: str, value: object, largest: int) -> int:
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise self.error(key, value, f"it must be a whole number in 1 … {largest}")
        return value


def check_class(path: Path, key: str, name: object, supported: Collection[str]) -> None:
    """Rejects an unsupported class name; the error describes the family of a class of another one."""
    if name in supported:
        return
    family = other_family(name) if isinstance(name, str) else None
    if family is not None:
        raise CheckpointError(f"{path}: {key} is {name}: this is {family}")
    raise CheckpointError(f"{path}: {key} is {name}; only {' or '.join(supported)} is supported")
