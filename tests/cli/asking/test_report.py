"""Lines on stderr."""

import pytest

from fastkv_jax.cli.asking.report import Reporter


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "slow"),
    [
        ("gpu", "float32", 64, True),
        ("gpu", "bfloat16", 256, True),
        ("gpu", "bfloat16", 128, False),
        ("cpu", "float32", 64, False),
        ("tpu", "float32", 64, False),
    ],
)
def test_a_gpu_that_reads_without_cudnn_says_so_in_a_line(capsys, platform, dtype: str, head_dim: int, slow: bool):
    Reporter(quiet=False).attention(platform, dtype, head_dim)
    err = capsys.readouterr().err
    assert err.count("\n") == slow and (f"{dtype} at {head_dim} are read by plain jax.numpy" in err) == slow
    Reporter(quiet=True).attention(platform, dtype, head_dim)
    assert not capsys.readouterr().err
