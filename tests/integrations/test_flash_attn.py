"""Programs that import flash_attn run unmodified: ring-flash-attn, yunchang, Transformers by its old name."""

import importlib.util
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mini_flash_attention as mini
from mini_flash_attention.integrations.context_parallel import shard
from mini_flash_attention.integrations.flash_attn import install_as_flash_attn
from tests.integrations.processes import spawn

needs_ring = pytest.mark.skipif(
    importlib.util.find_spec("ring_flash_attn") is None, reason="pip install --no-deps ring-flash-attn==0.1.8"
)


@pytest.fixture
def uninstalled() -> Iterator[None]:
    """For what the test installs."""
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_imports(uninstalled) -> None:
    install_as_flash_attn()
    install_as_flash_attn()  # again: nothing more
    import flash_attn
    from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    from flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_qkvpacked_func

    assert flash_attn.__version__ == "2.8.3" and importlib.util.find_spec("flash_attn") is not None
    public = (
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
        flash_attn_varlen_qkvpacked_func,
    )
    assert all(function is getattr(mini, function.__name__) for function in (*public, pad_input, unpad_input))
    x, rows = torch.randn(5, 3), torch.tensor([4, 1])
    torch.testing.assert_close(index_put_first_axis(index_first_axis(x, rows), rows, 5)[rows], x[rows])


def test_a_real_one_is_not_replaced(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.raises(RuntimeError, match="is installed"):
        install_as_flash_attn()


def test_private_functions(uninstalled) -> None:
    """Arguments by place and by name, as packages pass them; gradients written into given tensors."""
    install_as_flash_attn()
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    tensors = [torch.randn(2, 9, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    wanted = mini.flash_attn_func(*tensors, softmax_scale=0.3, causal=True)
    score = dict(dropout_p=0.0, softmax_scale=0.3, causal=True, softcap=0.0, alibi_slopes=None)
    score |= dict(window_size_left=-1, window_size_right=-1)
    plain = [x.detach() for x in tensors]
    out, lse, _, _ = _flash_attn_forward(*plain, **score, return_softmax=False)
    torch.testing.assert_close(out, wanted)
    dout, gradients = torch.randn_like(out), [torch.empty_like(x) for x in plain]
    _flash_attn_backward(dout, *plain, out, lse, *gradients, **score, deterministic=False)
    for x, y in zip(gradients, torch.autograd.grad(wanted, tensors, dout), strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        _flash_attn_forward(*plain, **score | dict(dropout_p=0.5), return_softmax=False)


def check_ring_flash_attn(rank: int, world: int) -> None:
    install_as_flash_attn()
    adapters = types.ModuleType("ring_flash_attn.adapters")  # does not import with Transformers 5
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules["ring_flash_attn.adapters"] = adapters
    from ring_flash_attn import zigzag_ring_flash_attn_func, zigzag_ring_flash_attn_varlen_func

    def make(*lead: int) -> tuple[list[Tensor], Tensor]:
        shapes = [(*lead, heads, 16) for heads in (4, 2, 2)]
        # Its buffers alias in fp32.
        return [torch.randn(s).bfloat16().requires_grad_() for s in shapes], torch.randn(shapes[0]).bfloat16()

    def split(x: Tensor) -> Tensor:
        if x.ndim == 4:
            return shard(x, rank, world)
        return torch.cat([shard(one, rank, world, dim=0) for one in x.split(lengths)])

    lengths = [16, 8, 40]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    cases = (
        ((2, 48), lambda *t: zigzag_ring_flash_attn_func(*t, causal=True), mini.flash_attn_func, ()),
        (
            (64,),
            lambda *t: zigzag_ring_flash_attn_varlen_func(*t, starts // 2, 20, causal=True),
            mini.flash_attn_varlen_func,
            (starts, starts, 40, 40),
        ),
    )
    for lead, theirs, ours, where in cases:
        whole, dout = make(*lead)
        out = ours(*whole, *where, causal=True)
        wanted = out, *torch.autograd.grad(out, whole, dout)
        mine = [split(x).detach().requires_grad_() for x in whole]
        out = theirs(*mine)
        for x, y in zip((out, *torch.autograd.grad(out, mine, split(dout))), wanted, strict=True):
            torch.testing.assert_close(x, split(y), rtol=2e-2, atol=3e-2)


@needs_ring
@pytest.mark.timeout(300)
def test_ring_flash_attn_runs_on_us() -> None:
    spawn(2, check_ring_flash_attn)


def check_yunchang(rank: int, world: int) -> None:
    """Its zigzag ring, built on the private functions, and its Ulysses, on flash_attn_func."""
    install_as_flash_attn()
    import yunchang
    from yunchang.kernels import AttnType

    yunchang.set_seq_parallel_pg(1, world, rank, world)
    ring = yunchang.LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.FA)
    ulysses = yunchang.UlyssesAttention(torch.distributed.group.WORLD, attn_type=AttnType.FA)
    whole = [torch.randn(2, 48, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    dout = torch.randn(2, 48, 4, 16).bfloat16()
    out = mini.flash_attn_func(*whole, causal=True)
    wanted = out, *torch.autograd.grad(out, whole, dout)
    for attend, split in (
        (ring, lambda x: shard(x, rank, world)),
        (ulysses, lambda x: x.chunk(world, 1)[rank]),
    ):
        mine = [split(x).detach().requires_grad_() for x in whole]
        out = attend(*mine, causal=True)
        for x, y in zip((out, *torch.autograd.grad(out, mine, split(dout))), wanted, strict=True):
            torch.testing.assert_close(x, split(y), rtol=2e-2, atol=3e-2)


@pytest.mark.skipif(
    importlib.util.find_spec("yunchang") is None, reason="pip install --no-deps yunchang==0.6.4"
)
@pytest.mark.timeout(300)
def test_yunchang_runs_on_us() -> None:
    spawn(2, check_yunchang)


def test_transformers_under_the_old_name() -> None:
    """attn_implementation="flash_attention_2", as it stands in configs and scripts."""
    tf = pytest.importorskip("transformers")
    from mini_flash_attention.integrations import transformers

    transformers.register(also=["flash_attention_2"])
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config = tf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="flash_attention_2").eval()
    tokens = torch.randint(0, 64, (2, 9))
    out = model(tokens).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(out, model(tokens).logits, rtol=1e-4, atol=1e-4)
