"""Multi-head self-attention between the positions of a feature map."""

from __future__ import annotations

from torch import Tensor, nn

_NUM_HEADS = 8


class SelfAttention(nn.Module):
    """Apply a layer norm and torch's multi-head attention between all positions, and add the result to the input.

    The row "multi-task CNN with multi-head attention" of the paper's table 11 leaves the block open. This is the
    attention half of a transformer's layer (Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.2),
    with 8 heads, without position embeddings and without the feed-forward half. The output projection starts at zero,
    so that the block first passes its input on.

    Args:
        num_channels: of the feature map, a multiple of 8.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_channels)
        self.attention = nn.MultiheadAttention(num_channels, _NUM_HEADS, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, feature_map_nchw: Tensor) -> Tensor:
        """Return the map, of the same shape."""
        tokens = feature_map_nchw.flatten(2).transpose(1, 2)
        queries = self.norm(tokens)
        attended, _ = self.attention(queries, queries, queries, need_weights=False)
        changed: Tensor = (tokens + attended).transpose(1, 2)
        return changed.reshape(feature_map_nchw.shape)
