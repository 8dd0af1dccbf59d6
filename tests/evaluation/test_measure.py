"""Changes between two measurements, and their intervals."""

import math

import pytest
import torch

from xshare_trtllm.evaluation import Quality
from xshare_trtllm.evaluation.measure import compare


def quality(nats, wrong):
    """40 documents of 10 tokens and 20 bytes, `wrong` [40] of them mispredicted."""
    targets = torch.ones(40, 10, dtype=torch.int64)
    predictions = (torch.arange(10) >= wrong[:, None]).long()
    return Quality(nats.double(), torch.full((40,), 20), predictions, targets)


def test_bits_per_byte_and_accuracy():
    measured = quality(torch.full((40,), 20 * math.log(2)), torch.full((40,), 3))
    assert measured.bits_per_byte == pytest.approx(1)
    assert measured.accuracy == pytest.approx(0.7)


def test_pairs_take_out_what_documents_differ_by():
    generator = torch.Generator().manual_seed(0)
    hard = 10 + 50 * torch.rand(40, generator=generator)
    wrong = torch.randint(0, 5, (40,), generator=generator)
    base = quality(hard, wrong)
    worse = quality(1.01 * hard, wrong + 1)
    change = compare(worse, base)
    assert change.bits_per_byte == pytest.approx(0.01)
    low, high = change.bits_interval
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01), "the same in every document"
    assert change.accuracy == pytest.approx(-4 / float((10 - wrong).sum()) * 10, rel=1e-6)
    low, high = change.accuracy_interval
    assert low < change.accuracy < high < 0


def test_noise_without_a_difference_has_zero_inside():
    generator = torch.Generator().manual_seed(1)
    nats = 30 + torch.randn(40, generator=generator)
    other = nats + 0.3 * torch.randn(40, generator=generator)
    low, high = compare(quality(other, torch.zeros(40)), quality(nats, torch.zeros(40))).bits_interval
    assert low < 0 < high
