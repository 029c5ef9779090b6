"""Growing a network changes its size and not what it computes."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="needs the extra [train]")

from vla_spec.engines.nets.grow import grow  # noqa: E402
from vla_spec.engines.nets.vla import VLA, VLAConfig  # noqa: E402

SMALL = VLAConfig(
    num_words=9, width=32, num_layers=3, num_heads=2, mlp_width=32, image_size=32, num_cameras=1, tokens_per_camera=1,
    text_tokens=1, horizon=2, stem_channels=(4, 6, 8),
)  # fmt: skip


def test_a_grown_network_computes_the_same():
    torch.manual_seed(0)
    small = VLA(SMALL).eval()
    big = grow(small, replace(SMALL, num_layers=5, mlp_width=50)).eval()
    images = torch.randint(0, 255, (2, 1, 32, 32, 3), dtype=torch.uint8)
    words, state, tokens = torch.randint(0, 9, (2, 10)), torch.randn(2, 4), torch.randint(0, 256, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(big(images, words, state, tokens), small(images, words, state, tokens))
    assert len(big.blocks) == 5


@pytest.mark.parametrize("change", [{"width": 64}, {"num_layers": 2}, {"mlp_width": 16}])
def test_other_sizes_can_not_grow(change):
    with pytest.raises(ValueError, match=r"grow|shrink"):
        grow(VLA(SMALL), replace(SMALL, **change))
