"""Vision transformers (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.branches import NO_BRANCH_DROPPED, Branch, Branches, given, make_backdrop

xavier = nnx.initializers.xavier_uniform()


class MLP(nnx.Module):
    """Two dense layers applied to every token; the hidden one is four times as wide."""

    def __init__(self, width: int, *, dtype: DTypeLike, dropout_rate: float, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, 4 * width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dropout(nnx.gelu(self.fc1(x)))
        return self.fc2(x)


class Block(nnx.Module):
    """Attention, then an MLP, each on the normalised input and added to the residual stream."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dtype: DTypeLike,
        dropout_rate: float,
        drop_path: Branch,
        rngs: nnx.Rngs,
    ):
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads, width, kernel_init=xavier, dtype=dtype, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, dtype=dtype, dropout_rate=dropout_rate, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.drop_path = drop_path

    def attend(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.attention(self.norm1(x)))

    def feed_forward(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.mlp(self.norm2(x)))

    def __call__(
        self, x: jax.Array, gate: jax.Array | None = None, kept: Sequence[Any] = (None, None)
    ) -> jax.Array:
        x = x + self.drop_path(Block.attend, self, x, gate=gate, kept=kept[0])
        return x + self.drop_path(Block.feed_forward, self, x, gate=gate, kept=kept[1])


class ViT(nnx.Module):
    """Patches to tokens, transformer blocks, and a linear head on the class token.

    Args:
      width: features of a token.
      depth: number of blocks.
      num_heads: attention heads of each block.
      num_classes: number of logits.
      image_shape: (height, width, channels) of one image; fixes the position embedding.
      patch_size: side of the square patches.
      dtype: of the computation; parameters are float32.
      dropout_rate: dropout on the embedded tokens, inside each MLP and after every branch.
      backdrop_rate: Backdrop over the tokens, before the last block.
      branches: what drops the blocks, whose two branches are each dropped on their own.
      rngs: streams "params", "dropout", "backdrop", "drop_path" and "drop_backward".
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        *,
        num_classes: int,
        image_shape: tuple[int, int, int],
        patch_size: int,
        dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.0,
        backdrop_rate: float = 0.0,
        branches: Branches = NO_BRANCH_DROPPED,
        rngs: nnx.Rngs,
    ):
        image_height, image_width, in_channels = image_shape
        if image_height % patch_size or image_width % patch_size:
            raise ValueError(
                f"patch_size={patch_size} does not divide images of {image_height}x{image_width}."
            )
        num_tokens = 1 + (image_height // patch_size) * (image_width // patch_size)
        self.patch_embed = nnx.Conv(
            in_channels,
            width,
            kernel_size=(patch_size, patch_size),
            strides=patch_size,
            padding="VALID",
            dtype=dtype,
            rngs=rngs,
        )
        embedding_init = nnx.initializers.normal(width**-0.5)
        self.cls_token = nnx.Param(embedding_init(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(embedding_init(rngs.params(), (1, num_tokens, width)))
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(
                    width,
                    num_heads,
                    dtype=dtype,
                    dropout_rate=dropout_rate,
                    drop_path=branches.make(i, depth, rngs),
                    rngs=rngs,
                )
                for i in range(depth)
            ]
        )
        self.draw_kept = branches.draw(2, rngs)
        self.backdrop = make_backdrop(backdrop_rate, 1, rngs)
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(
            width,
            num_classes,
            kernel_init=nnx.initializers.zeros,
            dtype=jnp.float32,  # Logits in full precision, whatever the trunk computes in.
            rngs=rngs,
        )

    def __call__(
        self,
        images: jax.Array,
        gates: jax.Array | None = None,
        kept: jax.Array | None = None,
    ) -> jax.Array:
        """Maps images to logits.

        Args:
          images: (batch, height, width, channels).
          gates: factors of the branches, (blocks,).
          kept: whether to keep the backward pass of each branch, (2 * blocks,); None to draw it.
        """
        if kept is None and self.draw_kept:
            kept = self.draw_kept()
        patches = self.patch_embed(images)
        batch, _, _, width = patches.shape
        patches = patches.reshape(batch, -1, width)
        cls = jnp.broadcast_to(self.cls_token.astype(patches.dtype), (batch, 1, width))
        x = jnp.concatenate([cls, patches], axis=1)
        x = self.dropout(x + self.pos_embed.astype(x.dtype))
        for i, block in enumerate(self.blocks):
            if self.backdrop and i == len(self.blocks) - 1:
                x = self.backdrop(x)
            x = block(x, **given(i, 2, gates, kept))
        return self.head(self.norm(x[:, 0]))


# Width, depth, heads.
VITS = {
    "vit_mini": (48, 3, 4),  # For images of 8x8 to 32x32.
    "vit_ti": (192, 12, 3),
    "vit_s": (384, 12, 6),
    "vit_b": (768, 12, 12),
    "vit_l": (1024, 24, 16),
}
