"""Transformers: tiny random models, with our attention and with its own eager one. On the CPU."""

import copy
from importlib.util import find_spec

import pytest
import torch

tf = pytest.importorskip("transformers")
from mini_flash_attention.integrations import transformers as ours_in  # noqa: E402

ours_in.register()
NAME = "mini_flash_attention"
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = SIZES | dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=128, attention_dropout=0.0)
TEXT |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
WINDOW = TEXT | dict(sliding_window=5)
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**TEXT),
    "qwen3": lambda: tf.Qwen3Config(**TEXT),
    "mistral": lambda: tf.MistralConfig(**WINDOW),
    "gemma2": lambda: tf.Gemma2Config(**WINDOW, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "gpt_oss": lambda: tf.GptOssConfig(**WINDOW, num_local_experts=2, num_experts_per_tok=1),
}
MODELS = list(CONFIGS)


def pair(name, **options):
    """The same model with our attention and with transformers' own."""
    torch.manual_seed(0)
    config = CONFIGS[name]() if isinstance(name, str) else name
    build = options.pop("build", tf.AutoModelForCausalLM.from_config)
    eager = build(copy.deepcopy(config), attn_implementation="eager").eval()
    for key, p in eager.named_parameters():
        if "sinks" in key:
            torch.nn.init.normal_(p)
        elif "norm" not in key:
            torch.nn.init.normal_(p, std=0.3)
    ours = build(copy.deepcopy(config), attn_implementation=NAME).eval()
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == NAME
    return ours, eager


def tokens(batch=3, seqlen=13):
    return torch.randint(2, 96, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def close(x, y, **tolerance):
    torch.testing.assert_close(x, y, **({"rtol": 1e-4, "atol": 1e-4} | tolerance))


@pytest.mark.parametrize("name", MODELS)
def test_forward(name) -> None:
    ours, eager = pair(name)
    close(ours(tokens()).logits, eager(tokens()).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding(name, side) -> None:
    ours, eager = pair(name)
    mask = torch.arange(13) < torch.tensor([[13], [6], [9]])
    mask = (mask.flip(1) if side == "left" else mask).long()
    x, y = (m(tokens(), attention_mask=mask).logits[mask.bool()] for m in (ours, eager))
    close(x, y)


@pytest.mark.parametrize("name", MODELS)
def test_packed(name) -> None:
    """Sequences one after the other, told by position_ids alone, are as if they were alone."""
    ours, eager = pair(name)
    parts = [tokens(1, n) for n in (13, 4, 9)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in parts]).unsqueeze(0)
    packed = ours(torch.cat(parts, 1), position_ids=positions).logits
    close(packed, torch.cat([eager(x).logits for x in parts], 1))


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name) -> None:
    ours, eager = pair(name)
    for model in ours, eager:
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
    for (key, x), y in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if y.grad is not None:
            close(x.grad, y.grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generate(name, cache) -> None:
    ours, eager = pair(name)
    mask = (torch.arange(13) < torch.tensor([[13], [6], [9]])).flip(1).long()
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation=cache)
    result = [
        m.generate(tokens(), **options, return_dict_in_generate=True, output_logits=True)
        for m in (ours, eager)
    ]
    assert result[0].sequences.equal(result[1].sequences)
    for x, y in zip(result[0].logits, result[1].logits, strict=True):
        close(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_continuous_batching(name) -> None:
    if name == "mistral" and find_spec("transformers.integrations.flash_paged"):
        pytest.skip(
            "transformers 5.17 forgets the window in the prefill, with any FlashAttention; 5.24 does not"
        )
    ours, eager = pair(name)
    prompts = [tokens(1, n)[0].tolist() for n in (13, 4, 9)]
    config = tf.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = ours.generate_batch(prompts, generation_config=config, progress_bar=False)
    by_prompt = {tuple(r.prompt_ids): r.generated_tokens for r in results.values()}
    for prompt in prompts:
        wanted = eager.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert by_prompt[tuple(prompt)] == wanted.tolist()


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.full) for name in MODELS[1:])]
)
def test_compiled(name) -> None:
    """One graph, forward and backward. In fp32 Transformers would log a warning, which breaks the graph."""
    model = pair(name)[0].bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(
        model, fullgraph=name != "gpt_oss", backend="aot_eager"
    )  # its experts break the graph
    gradients = []
    for function in compiled, model:
        model.zero_grad()
        function(tokens()).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for x, y in zip(*gradients, strict=True):
        close(x, y, rtol=2e-2, atol=2e-2)


def test_packed_compiled() -> None:
    """position_ids that restart are found by their values, which breaks the graph; cu_seq_lens do not."""
    model = pair("llama")[0].bfloat16()
    x = tokens(1, 26)
    positions = torch.cat([torch.arange(n) for n in (13, 4, 9)]).unsqueeze(0)
    starts = torch.tensor([0, 13, 17, 26], dtype=torch.int32)
    lengths = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=13, max_length_k=13)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x, position_ids=positions, use_cache=False, **lengths).logits
    close(out, model(x, position_ids=positions, use_cache=False).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_encoders(kind) -> None:
    sizes = SIZES | dict(num_hidden_layers=3, max_position_embeddings=128, pad_token_id=0)
    if kind == "bert":
        config = tf.BertConfig(**sizes)
    else:
        sizes |= dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        config = tf.ModernBertConfig(**sizes, local_attention=6, global_attn_every_n_layers=2)
    ours, eager = pair(config, build=tf.AutoModelForMaskedLM.from_config)
    mask = (torch.arange(13) < torch.tensor([[13], [6], [9]])).long()
    x, y = ours(tokens(), attention_mask=mask).logits, eager(tokens(), attention_mask=mask).logits
    close(x[mask.bool()], y[mask.bool()])


def test_whisper() -> None:
    """Encoder, cross attention to other lengths."""
    sizes = dict(vocab_size=96, d_model=32, num_mel_bins=8, max_source_positions=20, max_target_positions=32)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    for part in "encoder", "decoder":
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    config = tf.WhisperConfig(**sizes, begin_suppress_tokens=None)
    ours, eager = pair(config, build=tf.WhisperForConditionalGeneration._from_config)
    sound = torch.randn(2, 8, 40)
    x, y = (m(input_features=sound, decoder_input_ids=tokens(2, 7)) for m in (ours, eager))
    close(x.logits, y.logits)
    close(x.encoder_last_hidden_state, y.encoder_last_hidden_state)


def test_refuses_models_that_add_to_the_scores() -> None:
    """T5's position bias: it would be left out without a word."""
    config = tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5"):
        tf.T5Model._from_config(config, attn_implementation=NAME)


def test_sinks() -> None:
    """What a sink does to out, and its gradient, against a softmax with one more column."""
    q, sinks = torch.randn(2, 5, 4, 8, requires_grad=True), torch.randn(4, requires_grad=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, q) / 8**0.5
    column = sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)
    weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    wanted = torch.einsum("bhij,bjhd->bihd", weights, q)
    out = ours_in.flash_attn_func(q, q, q, s_aux=sinks)
    close(out, wanted)
    results = (torch.autograd.grad(x.square().sum(), (q, sinks)) for x in (out, wanted))
    for x, y in zip(*results, strict=True):
        close(x, y)
    starts = torch.tensor([0, 5, 10])
    packed = ours_in.flash_attn_varlen_func(*[q.flatten(0, 1)] * 3, starts, starts, s_aux=sinks)
    close(packed.view_as(out), out)
    with torch.no_grad():
        close(ours_in.flash_attn_with_kvcache(q, q, q, s_aux=sinks), out)
