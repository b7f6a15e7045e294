"""config.json of the members for small instances, with the sizes of their releases."""

from nxdi_deepseek.example_configs import RELEASED_CONFIG

_NO_GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
_COMMON = {name: value for name, value in RELEASED_CONFIG.items() if name != "quantization_config"} | _NO_GROUPS
_SMALL = {"num_hidden_layers": 27, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16}
_SMALL |= {"q_lora_rank": None, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2}
_SMALL |= {"num_experts_per_tok": 6}
_YARN = _COMMON["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}

SIZES = {
    "DeepSeek-V2-Lite": _COMMON
    | _SMALL
    | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 102400}
    | {"intermediate_size": 10944, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
    | {"routed_scaling_factor": 1.0, "rope_scaling": _YARN},
    "Moonlight-16B-A3B": _COMMON
    | _SMALL
    | {"vocab_size": 163840, "intermediate_size": 11264, "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5}
    | {"rope_scaling": None, "rope_theta": 50000.0, "max_position_embeddings": 8192},
    "GLM-4.7-Flash": {name: value for name, value in _COMMON.items() if name != "first_k_dense_replace"}
    | {"model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"], "num_hidden_layers": 47}
    | {"hidden_size": 2048, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 768}
    | {"qk_nope_head_dim": 192, "v_head_dim": 256, "intermediate_size": 10240, "moe_intermediate_size": 1536}
    | {"n_routed_experts": 64, "num_experts_per_tok": 4, "routed_scaling_factor": 1.8, "vocab_size": 154880}
    | {"mlp_layer_types": ["dense"] + 46 * ["sparse"], "rope_scaling": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
    | {"max_position_embeddings": 202752, "num_nextn_predict_layers": 1},
}
