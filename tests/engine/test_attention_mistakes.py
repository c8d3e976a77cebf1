"""What a tired person passes to the attention functions: small tensors that want gradients, one layout of two."""

import pytest
import torch

import flexkern
from flexkern.functional import frame_turns

F, R, S, H, D = 2, 3, 6, 4, 64
TURN, LOGIT_SCALE = frame_turns([3, 4], [0, 3, 4], head_dim=D)


def flat() -> list[torch.Tensor]:
    return [torch.randn(1, frames * S, H, D) for frames in (F, R, R)]


def paged() -> list[torch.Tensor]:
    return [torch.randn(1, frames, S, H, D) for frames in (F, R, R)]


@pytest.mark.parametrize("name", ["turn", "logit_scale", "bias"])
def test_no_gradient_is_lost_in_silence(name):
    """A learnt bias would be trained by nothing: the result has no backward."""
    plan = {"turn": TURN, "logit_scale": LOGIT_SCALE, "bias": torch.zeros(F, R)}
    plan[name] = plan[name].clone().requires_grad_()
    calls = (
        lambda: flexkern.attention(*flat(), **plan, pairs="split"),
        lambda: flexkern.paged_attention(*paged(), range(R), **plan),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match=f"{name} requires a gradient, and there is no backward"):
            call()
        with torch.no_grad():
            assert call().isfinite().all()


def test_a_causal_bias_is_not_learnt_either():
    frames, bias = [0, 1, 2], torch.zeros(R, R, requires_grad=True)
    query, key, value = (torch.randn(1, R * S, H, D) for _ in range(3))
    placed = dict(query_frames=frames, key_frames=frames, pairs="split", is_causal=True)
    with pytest.raises(NotImplementedError, match="bias requires a gradient"):
        flexkern.attention(query, key, value, bias=bias, **placed)


@pytest.mark.parametrize("first", ["query", "pages", "both"])
def test_pages_and_queries_with_heads_first_are_told_so(first):
    query, keys, values = paged()
    if first != "pages":
        query = query.transpose(2, 3).contiguous()
    if first != "query":
        keys, values = (x.transpose(2, 3).contiguous() for x in (keys, values))
    with pytest.raises(ValueError, match=r"x.transpose\(2, 3\) of") as raised:
        flexkern.paged_attention(query, keys, values, range(R), TURN, tokens=S)
    assert "enable_gqa" not in str(raised.value)


def test_fewer_heads_are_told_both_ways():
    query, keys, values = paged()
    few = [x[:, :, :, :1].contiguous() for x in (keys, values)]
    with pytest.raises(
        ValueError, match=r"pass enable_gqa=True; if heads come first, pass x.transpose\(2, 3\) of each"
    ):
        flexkern.paged_attention(query, *few, range(R), TURN)
