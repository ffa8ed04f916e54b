"""Configuration of the Llamba student: the published fields, and two more for a hybrid's attention layers."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Fields of a teacher's configuration that its decoder layers need; the rest follows from the Llamba's own sizes.
ATTENTION_FIELDS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "max_position_embeddings",
    "attention_bias",
    "attention_dropout",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "rms_norm_eps",
    "hidden_act",
    "mlp_bias",
)


class LlambaConfig(PreTrainedConfig):
    """Sizes of a Llamba model (arXiv 2502.14458); `attention_layers` and `attention_cfg` describe a hybrid.

    `ssm_cfg`: d_state (N), n_v_heads (H), n_qk_heads (G), expand (d_inner / d_model), chunk_size, activation, bias,
    and two of ours: mixer (llamba, or mamba2: see `LlambaMixer`), z_bias (False: the gate has none).
    `mlp_cfg`: intermediate_size, bias, act_fn. `attention_cfg`: the teacher's model_type and attention fields.
    Raises ValueError when H is not a multiple of G or d_inner not one of H.
    """

    model_type = "llamba"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 128256,
        d_model: int = 4096,
        n_layer: int = 32,
        tie_embeddings: bool = False,
        pad_vocab_size_multiple: int = 8,
        lm_head_bias: bool = False,
        norm_epsilon: float = 1e-5,
        mlp_cfg: dict[str, Any] | None = None,
        ssm_cfg: dict[str, Any] | None = None,
        attention_layers: list[int] | None = None,
        attention_cfg: dict[str, Any] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        self.vocab_size = -(-vocab_size // pad_vocab_size_multiple) * pad_vocab_size_multiple
        self.d_model, self.n_layer = d_model, n_layer
        self.tie_embeddings = tie_embeddings or bool(kwargs.get("tie_word_embeddings"))
        self.pad_vocab_size_multiple = pad_vocab_size_multiple
        self.lm_head_bias = lm_head_bias
        self.norm_epsilon = norm_epsilon
        self.mlp_cfg: dict[str, Any] = {"intermediate_size": 14336, "bias": False, "act_fn": "silu"} | (mlp_cfg or {})
        defaults: dict[str, Any] = {"d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "expand": 1, "chunk_size": 128}
        defaults |= {"activation": "identity", "bias": False, "mixer": "llamba", "z_bias": True}
        self.ssm_cfg: dict[str, Any] = defaults | (ssm_cfg or {})
        self.attention_layers = sorted(attention_layers or [])
        self.attention_cfg = attention_cfg
        self.use_cache = use_cache
        self._check_heads()
        kwargs["tie_word_embeddings"] = self.tie_embeddings
        super().__init__(**kwargs)

    def _check_heads(self) -> None:
        heads, groups = self.ssm_cfg["n_v_heads"], self.ssm_cfg["n_qk_heads"]
        if heads % groups:
            raise ValueError(f"ssm_cfg: n_v_heads {heads} is not a multiple of n_qk_heads {groups}")
        if self.ssm_cfg["mixer"] not in ("llamba", "mamba2"):
            raise ValueError(f"ssm_cfg: mixer {self.ssm_cfg['mixer']!r} is neither llamba nor mamba2")
        if self.ssm_cfg["mixer"] == "mamba2" and heads != groups:
            raise ValueError(f"ssm_cfg: a mamba2 mixer needs n_qk_heads {groups} to be n_v_heads {heads}")
        if self.d_inner % heads:
            raise ValueError(f"ssm_cfg: d_inner {self.d_inner} is not a multiple of n_v_heads {heads}")
        if self.attention_layers and self.attention_cfg is None:
            raise ValueError("attention_layers needs attention_cfg")

    @property
    def d_inner(self) -> int:
        """Width of the mixer: expand * d_model, rounded, since `expand` may be a float."""
        return round(self.ssm_cfg["expand"] * self.d_model)

    @property
    def layer_types(self) -> list[str]:
        """What each layer is, in transformers' words: its caches and masks are made by these."""
        fields = self.attention_cfg or {}
        sliding = "sliding_attention" if fields.get("sliding_window") else "full_attention"
        types = fields.get("layer_types") or [sliding] * self.n_layer
        return [types[i] if i in self.attention_layers else "linear_attention" for i in range(self.n_layer)]

    @property
    def sliding_window(self) -> int | None:
        """Of the attention layers that have one: how many tokens they see."""
        return (self.attention_cfg or {}).get("sliding_window")

    @sliding_window.setter
    def sliding_window(self, tokens: int | None) -> None:
        if self.attention_cfg is not None:
            self.attention_cfg["sliding_window"] = tokens

    @property
    def num_attention_heads(self) -> int:
        """Of the attention layers, or of the mixers where there are none."""
        return (self.attention_cfg or {}).get("num_attention_heads", self.ssm_cfg["n_v_heads"])

    @property
    def num_key_value_heads(self) -> int:
        """Of the attention layers, as a static cache that is made ahead is sized."""
        return (self.attention_cfg or {}).get("num_key_value_heads", self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Of the attention layers."""
        return (self.attention_cfg or {}).get("head_dim") or self.d_model // self.num_attention_heads

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own, which names one class for remote code: AutoModel finds the backbone beside it."""
        classes = getattr(self, "auto_map", None) or {}
        if "AutoModelForCausalLM" in classes:
            classes["AutoModel"] = classes["AutoModelForCausalLM"].replace("LlambaForCausalLM", "LlambaModel")
        super().save_pretrained(*args, **kwargs)

    @staticmethod
    def describe_attention(teacher: PreTrainedConfig) -> dict[str, Any]:
        """`attention_cfg` for a teacher's configuration."""
        fields = {name: getattr(teacher, name) for name in ATTENTION_FIELDS if hasattr(teacher, name)}
        return {"model_type": teacher.model_type, **fields}

    def attention_config(self) -> PreTrainedConfig:
        """The transformers configuration that the attention layers are built from."""
        fields = dict(self.attention_cfg or {})
        config_class: Any = CONFIG_MAPPING[fields.pop("model_type")]
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layer,
            "intermediate_size": self.mlp_cfg["intermediate_size"],
            "hidden_act": self.mlp_cfg["act_fn"],
            "mlp_bias": self.mlp_cfg["bias"],
            "rms_norm_eps": self.norm_epsilon,
        }
        return config_class(**(sizes | fields))
