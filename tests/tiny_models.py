"""Two-layer transformers models with random weights, one for each way to build attention."""

import torch
import transformers as hf

VOCABULARY = 97
LENGTH = 11  # longer than every window below, so that windows cut something off

_DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.25,
}  # fmt: skip
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
    "initializer_range": 0.25, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _decoder(config, model, **changes):
    def build(**more):
        return model(config(**{**_DECODER, **changes, **more}))

    return build


DECODERS = {
    "llama": _decoder(hf.LlamaConfig, hf.LlamaForCausalLM),
    "mistral, window": _decoder(hf.MistralConfig, hf.MistralForCausalLM, sliding_window=4),
    "qwen2, window in one layer": _decoder(
        hf.Qwen2Config, hf.Qwen2ForCausalLM, use_sliding_window=True, sliding_window=4,
        max_window_layers=1,
    ),
    "qwen3": _decoder(hf.Qwen3Config, hf.Qwen3ForCausalLM),
    "gemma2, softcap and windows": _decoder(
        hf.Gemma2Config, hf.Gemma2ForCausalLM, sliding_window=4, attn_logit_softcapping=2.0,
        query_pre_attn_scalar=8,
    ),
    "gemma3, windows": _decoder(
        hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8,
    ),
    "phi3, window": _decoder(
        hf.Phi3Config, hf.Phi3ForCausalLM, sliding_window=5, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "gpt_oss, sinks and windows": _decoder(
        hf.GptOssConfig, hf.GptOssForCausalLM, sliding_window=4, **_MOE
    ),
    "mixtral, window": _decoder(hf.MixtralConfig, hf.MixtralForCausalLM, sliding_window=4, **_MOE),
    "qwen3_moe": _decoder(
        hf.Qwen3MoeConfig, hf.Qwen3MoeForCausalLM, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, decoder_sparse_step=1,
    ),
    "deepseek_v3, values narrower than keys": _decoder(
        hf.DeepseekV3Config, hf.DeepseekV3ForCausalLM, num_key_value_heads=4, head_dim=4,
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1,
        moe_intermediate_size=24, first_k_dense_replace=1,
    ),
}  # fmt: skip

ENCODERS = {
    "bert": lambda **more: hf.BertModel(hf.BertConfig(**{**_ENCODER, **more})),
    "roberta": lambda **more: hf.RobertaModel(hf.RobertaConfig(**{**_ENCODER, **more})),
}


def vit(**more):
    config = {**_ENCODER, "image_size": 12, "patch_size": 4, **more}
    del config["vocab_size"], config["max_position_embeddings"], config["pad_token_id"]
    return hf.ViTModel(hf.ViTConfig(**config))


def bart(**more):
    """Encoder, causal decoder and the cross-attention between them."""
    config = hf.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCABULARY,
        max_position_embeddings=64, dropout=0.0, init_std=0.25, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, decoder_start_token_id=1, forced_eos_token_id=None, **more,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def seeded(build, **more):
    """A model whose weights do not depend on the attention implementation."""
    torch.manual_seed(1)
    return build(**more).eval()


def of_kind(report, kind="attention"):
    """What a report says was replaced, and skipped, of one kind."""
    return (
        [r for r in report.replaced if r.kind == kind],
        [s for s in report.skipped if s.kind == kind],
    )


def tokens(batch=2, length=LENGTH):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def padding(side, batch=2, length=LENGTH):
    """(B, L) int64: the first row is padded by four tokens on one side, the last by none."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if side == "left":
        mask[0, :4] = 0
    elif side == "right":
        mask[0, -4:] = 0
    return mask
